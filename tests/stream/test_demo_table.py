"""The demo's tables, drawn on a console without a terminal."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from stream.demo_table import (
    STATE_STYLES,
    FaultRow,
    FleetHeader,
    FleetRow,
    fleet_table,
    summary_table,
)
from stream.records import STATES

HEADER = FleetHeader("tsdiff demo", ("9,800 readings/s", "slot 12:04"))


def drawn(table: Table, width: int = 130) -> list[str]:
    console = Console(
        record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


def line_of(lines: list[str], word: str) -> str:
    (found,) = [line for line in lines if word in line]
    return found


def test_the_fleet_in_one_picture() -> None:
    rows = [
        FleetRow("web-1", "ok", 0.42, "cpu", 0.4, 0.41234567, "%", None),
        FleetRow("web-2", "firing", 3.1, "mem", 2e9, 3.456e9, "B", "12:04 mem, swap"),
        FleetRow("web-3", "warming"),
    ]
    assert drawn(fleet_table(rows, HEADER)) == [
        "tsdiff demo",
        "entity   state        score             top channel   expected      observed   last alert",
        "─" * 94,
        "web-1    ok             0.42 █▏         cpu              0.4 %      0.4123 %   –",
        "web-2    firing         3.10 ████████   mem            2e+09 B   3.456e+09 B"
        "   12:04 mem, swap",
        "web-3    warming      –                 –                    –             –   –",
        "9,800 readings/s · slot 12:04",
    ]


@pytest.mark.parametrize("state", STATES)
def test_every_state_has_a_colour(state: str) -> None:
    assert set(STATE_STYLES) == set(STATES)
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    console.print(fleet_table([FleetRow("e", state, 1.5)], HEADER))  # type: ignore[arg-type]
    assert "\x1b[" in console.export_text(styles=True)


@pytest.mark.parametrize(
    ("anomaly_score", "shown"),
    [
        (0.0, "  0.00"),
        (1e9, "  >999 ████████"),
        (float("inf"), "  >999 ████████"),
        (1.5, "  1.50 ████ "),
        (-1.0, " -1.00"),
    ],
)
def test_scores_of_any_size_keep_their_width(anomaly_score: float, shown: str) -> None:
    line = line_of(drawn(fleet_table([FleetRow("e-1", "ok", anomaly_score)], HEADER)), "e-1")
    assert shown in line
    assert line.count("–") == 4


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_what_is_not_known_is_a_dash(unknown: float | None) -> None:
    row = FleetRow("e-1", "stale", unknown, None, unknown, unknown)
    assert line_of(drawn(fleet_table([row], HEADER)), "e-1").count("–") == 5


def test_names_are_no_markup() -> None:
    row = FleetRow("[red]web[/red]", "ok", 0.1, "[bold]cpu", last_alert="[/]")
    lines = drawn(fleet_table([row], FleetHeader("[x]", ("[y]",))))
    line = line_of(lines, "[red]web[/red]")
    assert "[bold]cpu" in line
    assert "[/]" in line
    assert lines[0] == "[x]"
    assert lines[-1] == "[y]"


def test_a_narrow_terminal_keeps_one_line_an_entity() -> None:
    rows = [FleetRow(f"host-{i}-{'x' * 60}", "ok", 0.1, "c" * 60, 1.0, 2.0) for i in range(3)]
    lines = drawn(fleet_table(rows, HEADER), width=80)
    assert all(len(line) <= 80 for line in lines)
    shown = [line for line in lines if line.startswith("host")]
    assert len(shown) == 3
    assert all("  0.10 ▎" in line for line in shown)


def test_an_empty_fleet_is_drawn_too() -> None:
    assert "entity" in line_of(drawn(fleet_table([], FleetHeader())), "entity")


def test_the_summary_says_caught_and_missed_in_words() -> None:
    lines = drawn(
        summary_table(
            [
                FaultRow("spike", "web-1", ("cpu",), "12:04", True, 2, True),
                FaultRow("drift", "web-2", ("mem", "swap"), "12:30", False),
                FaultRow("stuck", "web-3", (), "12:40", True, 7, False),
            ]
        )
    )
    assert lines[0] == "Faults injected and caught"
    assert line_of(lines, "spike").split() == [
        "spike", "web-1", "cpu", "12:04", "caught", "2", "right",
    ]  # fmt: skip
    assert line_of(lines, "drift").split() == [
        "drift", "web-2", "mem,", "swap", "12:30", "missed", "–", "–",
    ]  # fmt: skip
    assert line_of(lines, "stuck").split() == [
        "stuck", "web-3", "–", "12:40", "caught", "7", "wrong",
    ]  # fmt: skip
    assert lines[-1] == "2 of 3 caught"
    assert drawn(summary_table([]))[-1] == "no faults"
