"""What `tsdiff demo` draws: the fleet while it is scored, and what was caught at the end. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from rich import box
from rich.table import Table
from rich.text import Text

from stream.records import State

STATE_STYLES: Final[dict[State, str]] = {
    "ok": "green",
    "pending": "yellow",
    "firing": "bold red",
    "recovering": "magenta",
    "warming": "cyan",
    "stale": "dim",
}
_NOTHING: Final = "–"
_BAR_CELLS: Final = 8
# The bar's full length: three times as rare, in powers of ten, as what alerts.
_BAR_FULL_SCORE: Final = 3.0
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class FleetRow:
    """One entity as it is now; None = not known (yet)."""

    entity: str
    state: State
    anomaly_score: float | None = None
    top_channel: str | None = None
    expected: float | None = None
    observed: float | None = None
    unit: str = ""
    last_alert: str | None = None
    """When and why it last alerted, as text: "12:04 cpu, mem"."""


@dataclass(frozen=True)
class FleetHeader:
    """What is said above and below the table."""

    title: str = "tsdiff demo"
    details: tuple[str, ...] = field(default=())
    """Short facts, such as "9,800 readings/s" or "slot 12:04"; shown in one line."""


@dataclass(frozen=True)
class FaultRow:
    """An injected fault, and what became of it."""

    kind: str
    entity: str
    channels: tuple[str, ...]
    start: str
    """When it began, as text."""
    caught: bool
    delay_slots: int | None = None
    """Slots from its start to the alert; None where there was none."""
    blamed_right: bool | None = None
    """Whether the channels blamed were among its own; None where there was no alert."""


def fleet_table(rows: Sequence[FleetRow], header: FleetHeader) -> Table:
    """Draw the fleet, one entity a row in the order given."""
    table = _table(header.title, " · ".join(header.details))
    # Columns that may wrap are narrowed first; their cells are cut instead (`_name`).
    table.add_column("entity", min_width=6, max_width=24)
    table.add_column("state", no_wrap=True, min_width=max(map(len, STATE_STYLES)))
    table.add_column("score", no_wrap=True, min_width=_BAR_CELLS + 7)
    table.add_column("top channel", min_width=6, max_width=24)
    table.add_column("expected", justify="right", no_wrap=True)
    table.add_column("observed", justify="right", no_wrap=True)
    table.add_column("last alert", min_width=6, max_width=32)
    for row in rows:
        style = STATE_STYLES[row.state]
        table.add_row(
            _name(row.entity),
            Text(row.state, style),
            _score(row.anomaly_score, style),
            _name(row.top_channel),
            _quantity(row.expected, row.unit),
            _quantity(row.observed, row.unit),
            _name(row.last_alert),
        )
    return table


def summary_table(faults: Sequence[FaultRow]) -> Table:
    """Draw faults injected beside what was caught of them."""
    caught = sum(fault.caught for fault in faults)
    table = _table(
        "Faults injected and caught", f"{caught} of {len(faults)} caught" if faults else "no faults"
    )
    table.add_column("fault", no_wrap=True)
    table.add_column("entity", min_width=6, max_width=24)
    table.add_column("channels", min_width=8, max_width=36)
    table.add_column("start", no_wrap=True)
    table.add_column("caught", no_wrap=True)
    table.add_column("delay (slots)", justify="right", no_wrap=True)
    table.add_column("blamed", no_wrap=True)
    for fault in faults:
        table.add_row(
            Text(fault.kind),
            _name(fault.entity),
            _name(", ".join(fault.channels)),
            Text(fault.start),
            _yes_no(fault.caught, "caught", "missed"),
            Text(_NOTHING if fault.delay_slots is None else str(fault.delay_slots)),
            _yes_no(fault.blamed_right, "right", "wrong"),
        )
    return table


def _table(title: str, caption: str) -> Table:
    return Table(
        # Text for the same reason as in the cells.
        title=Text(title, "bold"),
        caption=Text(caption, "dim") if caption else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )


def _name(name: str | None) -> Text:
    # Text, not str: a name such as "[red]" is not markup.
    return Text(name, no_wrap=True, overflow="ellipsis") if name else Text(_NOTHING, "dim")


def _yes_no(answer: bool | None, yes: str, no: str) -> Text:
    if answer is None:
        return Text(_NOTHING, "dim")
    # Words as well as colours: a pipe has none, and not everyone tells green from red.
    return Text(yes, "green") if answer else Text(no, "red")


def _score(anomaly_score: float | None, style: str) -> Text:
    if anomaly_score is None or math.isnan(anomaly_score):
        return Text(_NOTHING, "dim")
    shown = f"{anomaly_score:6.2f}" if anomaly_score < 1000 else "  >999"
    return Text.assemble(shown, " ", (_bar(anomaly_score), style))


def _bar(anomaly_score: float) -> str:
    share = min(max(anomaly_score, 0.0) / _BAR_FULL_SCORE, 1.0)
    eighths = round(share * _BAR_CELLS * 8)
    bar = "█" * (eighths // 8)
    return f"{bar}{_EIGHTHS[eighths % 8].strip()}"


def _quantity(value: float | None, unit: str) -> Text:
    if value is None or not math.isfinite(value):
        return Text(_NOTHING, "dim")
    return Text(f"{value:.4g} {unit}".rstrip())
