"""The command `tsdiff evaluate`: options in, a table or JSON out."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tsdiff.config import Adapt
from tsdiff.durations import parse_duration_ms
from tsdiff.errors import ConfigError

if TYPE_CHECKING:
    from train.evaluate import Result, Settings
    from train.labelled import LabelledSet

# Column, key, digits: what fits into 80 characters; JSON has more.
_COLUMNS = (
    ("VUS-PR", "vus_pr", 3),
    ("AUC-PR", "auc_pr", 3),
    ("prec.", "event_precision", 2),
    ("recall", "event_recall", 2),
    ("F1", "event_f1", 2),
    ("delay", "delay_slots", 1),
    ("false/day", "false_alarms_per_entity_day", 2),
    ("alarmed", "alarmed", 3),
    ("causes", "root_cause_hit_rate", 2),
)


def evaluate(
    data: Annotated[
        list[Path],
        typer.Argument(metavar="DIR", help="Labelled folders.", show_default=False),
    ],
    detector: Annotated[
        list[str] | None,
        typer.Option(
            help="One to run, repeatable; tsdiff-crps, tsdiff-elbo, tsdiff-score-norms and "
            "tsdiff-flow are slow, and run only when named.  [default: all others]",
            show_default=False,
        ),
    ] = None,
    period: Annotated[
        list[str] | None,
        typer.Option(
            help="Time from slot to slot where timestamps are steps, as 60s; SET=60s for one set.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of what depends on chance; --stress does.")
    ] = 1,
    shared: Annotated[
        bool, typer.Option("--shared/--own", help="One model for a whole set, or one an entity.")
    ] = True,
    network: Annotated[
        bool, typer.Option("--network/--no-network", help="Train a network beside the anchor.")
    ] = True,
    adapt: Annotated[
        Adapt, typer.Option(help="What our detectors go on learning while they score.")
    ] = "auto",
    lag: Annotated[
        int, typer.Option(help="Slots after a slot that our detectors may see: 0, 3, 7 or 15.")
    ] = 0,
    stress: Annotated[
        bool, typer.Option("--stress", help="Also spoil the data, and say what is kept.")
    ] = False,
    false_alarms: Annotated[
        float, typer.Option(help="Allowed per entity and week: where alarms begin.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the JSON here as well.", show_default=False)
    ] = None,
) -> None:
    """Compare detectors on labelled data.

    DIR is a folder SET/ENTITY/{train,test}.parquet, one of its entities, or a folder of such
    sets. Test parts have a column `label` (0 or 1) and no say in anything: detectors are fitted to
    the training part, calibrated on its last 15 %, and score the test part once and in order.

    VUS-PR (± its spread over seeds) is TSB-AD's. Events are labelled segments, against the alarms
    that the service would raise at the allowed rate: precision, recall, F1, median delay in slots,
    false alarms per entity and day, and the share of unlabelled rows that are alarmed. `causes` is
    the share of a fault's true channels (interpretation.json) among as many blamed ones. --json
    has more.

    Examples:

      tsdiff evaluate labelled/servers --period 60s

      tsdiff evaluate labelled/ --period servers=60s --period apps=5m --json --out result.json

      tsdiff evaluate labelled/pumps --detector tsdiff --detector pca --seeds 3 --stress
    """  # noqa: D412, D413  (the docstring is the --help text)
    # JAX is slow to import; --help is not.
    from train.evaluate import DETECTORS, Settings, summarize  # noqa: PLC0415
    from train.evaluate import evaluate as run  # noqa: PLC0415

    settings = Settings(
        detectors=tuple(dict.fromkeys(detector or DETECTORS)),
        seeds=seeds,
        shared=shared,
        network=network,
        stress=stress,
        adapt=adapt,
        lag=lag,
        false_alarms_per_entity_week=false_alarms,
    )
    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError(f"--out: expected a file in a folder that exists, got {out}")
    sets = _load(data, period or ())
    results: list[Result] = []
    try:
        for result in run(sets, settings, _report):
            results.append(result)
    finally:
        # Also what there is when it is interrupted.
        if results:
            summary = summarize(results)
            _print(_without_nan(summary), sets, settings, as_json, out)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _load(paths: Sequence[Path], periods: Sequence[str]) -> "list[LabelledSet]":
    """Read every set with its period."""
    from train.labelled import find_sets, load_set  # noqa: PLC0415

    found = find_sets(paths)
    steps_ms: int | None = None
    of_set: dict[str, int] = {}
    for text in periods:
        name, equals, duration = text.rpartition("=")
        period_ms = parse_duration_ms(duration, name="--period", minimum_ms=1)
        if not equals:
            steps_ms = period_ms
        elif name in found:
            of_set[name] = period_ms
        else:
            raise ConfigError(f"--period: expected one of the sets {', '.join(found)}, got {name}")
    return [load_set(name, found[name], of_set.get(name), steps_ms) for name in found]


def _without_nan(value: Any) -> Any:  # noqa: ANN401
    """Null where there was nothing to measure: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _print(
    summary: dict[str, Any],
    sets: "Sequence[LabelledSet]",
    settings: "Settings",
    as_json: bool,
    out: Path | None,
) -> None:
    text = json.dumps(summary)
    if out is not None:
        out.write_text(text + "\n", "utf-8")
    if as_json:
        print(text, flush=True)
        return
    entities = {each.name: sum(one.test is not None for one in each.entities) for each in sets}
    console = Console()
    for name, found in summary["sets"].items():
        title = f"{name}: mean of {entities[name]} entities"
        rows = [
            [detector, *(_number(own[key], digits) for _, key, digits in _COLUMNS)]
            for detector, own in found.items()
        ]
        head = ["detector", *(column for column, _, _ in _COLUMNS)]
        if settings.seeds > 1:
            head.insert(2, "±")
            for row, own in zip(rows, found.values(), strict=True):
                row.insert(2, _number(own["vus_pr_spread"], 3))
        short = [own["entities"] for own in found.values() if own["entities"] < entities[name]]
        if short:
            title += f" (interrupted: {short[0]} of the last detector)"
        _table(console, title, head, rows)
    for name, found in summary.get("stress", {}).items():
        kinds = list(dict.fromkeys(kind for own in found.values() for kind in own))
        rows = [
            [detector, *(_number(own.get(kind), 2) for kind in kinds)]
            for detector, own in found.items()
        ]
        _table(console, f"{name}: share of the VUS-PR kept", ["detector", *kinds], rows)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(
    console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Draw a table on a terminal, plain aligned lines in a pipe."""
    if console.is_terminal:
        table = Table(
            title=title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=0,  # so that it fits into 80 characters
        )
        for place, column in enumerate(head):
            table.add_column(column, justify="right" if place else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(len(line[place]) for line in (head, *rows)) for place in range(len(head))]
    print(title)
    for line in (head, *rows):
        first, *others = (
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *others]))
    print(flush=True)
