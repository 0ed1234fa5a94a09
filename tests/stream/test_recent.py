"""What is kept for the page: rings that never lie about a slot, and who is kept when room is short.

slot          0    1    2    3    4    5
told          .2   .3              .4   .5     two slots nobody told of
shown         .2   .3   –    –     .4   .5
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.decide import AlertPolicy
from stream.recent import CELL_BYTES, LEAST_SLOTS, MOST_SLOTS, Layout, Recent
from stream.records import AlertEvent, ChannelScore, SlotScore
from stream.scoring import Detail
from stream.shown import entity as entity_of
from stream.shown import numbers, overview

MINUTE = 60_000
LAYOUT = Layout(("a", "b"), ("%", ""), MINUTE, settle_slots=3)
CELL = 16 * (LAYOUT.slots + 64) * 2
"""Bytes of one entity's channels."""


class Clock:
    """Seconds, as a test says."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def kept(clock: Clock | None = None, **changes: Any) -> Recent:  # noqa: ANN401
    settings: dict[str, Any] = {"max_entities": 4, "ttl_s": 60.0, "clock": clock or Clock()}
    return Recent(LAYOUT, AlertPolicy(), **{**settings, **changes})


def told(slot: int, number: float | None = 0.5, entity: str = "e", **changes: Any) -> SlotScore:  # noqa: ANN401
    settings: dict[str, Any] = {
        "state": "ok",
        "channels": {"b": ChannelScore(1.0, 2.0, 1.0, 3.0, 0.9)},
    }
    settings |= changes
    return SlotScore(entity, slot * MINUTE, number, 0.1, imputed_ratio=0.0, model="m@0", **settings)


def detail(first: int, width: int = 1, entity: str = "e", *, emit: bool = True) -> Detail:
    """Observed is the slot's number, expected one more, for both channels."""
    slots = np.arange(first, first + width, dtype=np.float32)
    cells = np.repeat(slots[None, :, None], 2, axis=2)
    return Detail(
        [entity], first, emit, slots[None] / np.float32(100), cells, cells + 1, cells, cells + 2
    )


def shown(recent: Recent, name: str = "e") -> dict[str, Any]:
    found = entity_of(recent, name)
    assert found is not None
    return found


def by_slot(found: dict[str, Any], values: list[Any]) -> dict[int, Any]:
    """What is told, by slot; what is not is left out."""
    first = found["start_ms"] // MINUTE
    return {first + i: value for i, value in enumerate(values) if value is not None}


def test_slots_are_where_they_belong_and_those_not_told_are_unknown() -> None:
    recent = kept()
    for slot in (0, 1, 4, 5):
        recent.take(detail(slot))
        recent.observe([told(slot, slot / 10)])
    found = shown(recent)
    assert by_slot(found, found["scores"]) == {0: 0.0, 1: 0.1, 4: 0.4, 5: 0.5}
    (b,) = [c for c in found["channels"] if c["channel"] == "b"]
    assert by_slot(found, b["observed"]) == {0: 0, 1: 1, 4: 4, 5: 5}
    assert by_slot(found, b["upper"]) == {0: 2, 1: 3, 4: 6, 5: 7}
    assert b["unit"] == ""
    assert (found["since_ms"], found["channels_since_ms"]) == (0, 0)
    assert found["summary"].startswith("b on e was") or "nothing unusual" in found["summary"]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.integers(1, 900))
def test_a_ring_tells_what_was_told_last(jumps: list[int], begin: int) -> None:
    recent, slot, wanted = kept(), begin, {}
    for jump in jumps:
        slot += jump
        recent.take(detail(slot))
        recent.observe([told(slot, slot / 1000)])
        wanted[slot] = round(slot / 1000, 3)
    since = slot - LAYOUT.slots
    wanted = {s: v for s, v in wanted.items() if s > since}
    found = shown(recent)
    assert by_slot(found, found["scores"]) == pytest.approx(wanted, rel=1e-3)
    assert by_slot(found, found["channels"][0]["observed"]).keys() == wanted.keys()


def test_many_slots_at_once_and_a_clock_that_goes_back() -> None:
    recent = kept()
    width = 3 * LAYOUT.slots
    recent.take(detail(5, width))
    recent.observe([told(5 + i, 0.25) for i in range(width)])
    found = shown(recent)
    assert found["scores"] == [0.25] * LAYOUT.slots
    assert found["channels"][0]["observed"][-1] == 5 + width - 1
    assert None not in found["channels"][0]["observed"]
    recent.take(detail(7))
    recent.observe([told(7, 0.75)])
    found = shown(recent)
    assert by_slot(found, found["scores"]) == {7: 0.75}
    assert by_slot(found, found["channels"][0]["observed"]) == {7: 7}


def test_what_is_not_committed_is_not_shown() -> None:
    recent = kept()
    recent.take(detail(3))
    assert entity_of(recent, "e") is None
    recent.observe([told(3)])
    recent.take(detail(4, 5))
    assert shown(recent)["timestamp_ms"] == 3 * MINUTE
    assert shown(recent)["channels"][0]["observed"][-1] == 3
    # The round failed, and is done again.
    recent.take(detail(4))
    recent.observe([told(4)])
    assert by_slot(shown(recent), shown(recent)["channels"][0]["observed"]) == {3: 3, 4: 4}


def test_a_restart_fills_what_is_rebuilt_as_soon_as_it_is_as_it_was() -> None:
    recent = kept()
    for slot in range(10, 20):
        recent.take(detail(slot, emit=False))
    recent.take(detail(20))
    recent.observe([told(20, 0.2)])
    found = shown(recent)
    assert list(by_slot(found, found["scores"])) == [*range(13, 20), 20]
    assert list(by_slot(found, found["channels"][0]["expected"])) == [*range(13, 20), 20]
    assert found["states"][-2:] == [
        {"from_ms": found["start_ms"], "state": None},
        {"from_ms": 20 * MINUTE, "state": "ok"},
    ]
    # What has been told already is not told otherwise when windows are rebuilt once more.
    for slot in range(17, 21):
        recent.take(detail(slot, emit=False))
    recent.observe([told(21, 0.3)])
    assert by_slot(shown(recent), shown(recent)["scores"])[20] == 0.2


def test_the_worst_come_first_and_a_search_finds_the_others() -> None:
    recent = kept(max_entities=9)
    recent.observe(
        [
            told(1, 0.9, "Calm"),
            told(1, 0.1, "calmer"),
            told(1, 0.2, "dead", faulty={"a": "dead"}),
            told(1, 1.2, "pends", state="pending"),
            told(1, 1.1, "fires", state="firing"),
            told(1, None, "warms", state="warming"),
        ]
    )
    found = overview(recent)
    names = [row["entity"] for row in found["entities"]]
    assert names == ["fires", "pends", "dead", "Calm", "calmer", "warms"]
    assert found["entities"][0]["channels"] == ["b"]
    assert found["entities"][2]["faulty"] == {"a": "dead"}
    assert found["entities"][3]["spark"][-1] == 0.9
    found = overview(recent, "CALM", 1)
    assert ([row["entity"] for row in found["entities"]], found["matching"]) == (["Calm"], 2)
    assert overview(recent, "<nobody>")["entities"] == []


def test_an_entity_that_alerts_takes_the_place_of_the_calmest() -> None:
    recent = kept(max_entities=2)
    recent.observe([told(1, 0.9, "a"), told(1, 0.1, "b"), told(1, 0.5, "late")])
    assert {row["entity"] for row in overview(recent)["entities"]} == {"a", "b"}
    recent.observe([told(2, 1.5, "late", state="firing"), told(2, 0.2, "b"), told(2, 0.8, "a")])
    assert {row["entity"] for row in overview(recent)["entities"]} == {"a", "late"}
    recent.budget(1)
    assert [row["entity"] for row in overview(recent)["entities"]] == ["late"]


def test_who_is_silent_or_taken_away_is_forgotten() -> None:
    clock = Clock()
    recent = kept(clock)
    recent.observe([told(1, entity="a"), told(1, entity="b")])
    recent.forget(["a", "never"])
    assert entity_of(recent, "a") is None
    clock.now = 61.0
    assert overview(recent)["kept"] == 0


def test_many_entities_come_one_by_one() -> None:
    recent = kept(max_entities=1000)
    for i in range(200):
        recent.observe([told(1, i / 1000, f"e{i}")])
    assert shown(recent, "e7")["anomaly_score"] == 0.007
    assert overview(recent, "e19", 3)["matching"] == 11


def test_channels_are_kept_of_those_looked_at_alerting_or_worst() -> None:
    clock = Clock()
    recent = kept(clock, max_entities=9, cell_bytes=2 * CELL)
    names = ["a", "b", "c", "d"]

    def turn(slot: int, **states: Any) -> set[str]:  # noqa: ANN401
        clock.now += 2.0
        for name in names:
            recent.take(detail(slot, entity=name))
        recent.observe(
            [
                told(slot, 1.5 if name in states else 0.3, name, state=states.get(name, "ok"))
                for name in names
            ]
        )
        rows = [name for name, row in recent._names.items() if recent._cell[row] >= 0]
        return set(rows)

    assert turn(1) == {"a", "b"}
    assert "d" in turn(2, d="firing")
    assert entity_of(recent, "c") is not None  # looked at
    assert turn(3, d="firing") == {"c", "d"}
    turn(4, d="firing")
    found = shown(recent, "c")
    assert list(by_slot(found, found["channels"][0]["observed"])) == [4]
    assert found["channels_since_ms"] == 4 * MINUTE
    assert "observed" not in shown(recent, "a")["channels"][0]


def test_of_many_channels_a_part_is_sent_and_a_search_finds_the_rest() -> None:
    names = tuple(f"c{i}" for i in range(500))
    recent = Recent(Layout(names, ("",) * 500, MINUTE), AlertPolicy(), max_entities=4, ttl_s=9)
    cells = {"c400": ChannelScore(1.0, 2.0, 1.0, 3.0, 0.9)}
    recent.observe([told(1, 1.5, state="firing", channels=cells, faulty={"c300": "stuck"})])
    found = shown(recent)
    listed = [c["channel"] for c in found["channels"]]
    assert listed[:3] == ["c300", "c400", "c0"]
    assert (len(listed), found["channels_matching"], found["channels_known"]) == (60, 500, 500)
    matching = entity_of(recent, "e", "C49")
    assert matching is not None
    assert [c["channel"] for c in matching["channels"]] == [
        "c49",
        *(f"c{i}" for i in range(490, 500)),
    ]


def test_an_alert_begins_with_its_first_pending_slot() -> None:
    recent = kept()
    states = ["ok", "ok", "pending", "firing", "firing"]
    cells = {"b": ChannelScore(9.0, 2.0, 1.0, 3.0, 0.9)}
    for slot, state in enumerate(states):
        recent.observe([told(slot, 1.5, state=state, channels=cells)])
    assert "unusual since 00:02 UTC" in shown(recent)["summary"]
    event = AlertEvent("e", 0, "ok", "firing", 0, 0.1, {}, "m@0", summary="all is well")
    recent.observe([told(9)], [event])
    assert shown(recent)["events"][0]["summary"] == "all is well"
    assert overview(recent)["events"][0]["entity"] == "e"


def test_how_many_slots_are_shown() -> None:
    assert LAYOUT.slots == 360
    assert Layout((), (), 1_000).slots == MOST_SLOTS
    assert Layout((), (), 3_600_000).slots == LEAST_SLOTS
    # However many channels: memory is bounded.
    wide = Recent(Layout(("c",) * 999, ("",) * 999, 1), AlertPolicy(), max_entities=9, ttl_s=9)
    assert wide._cells.nbytes <= CELL_BYTES


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.1, 0.1),
        (-123456.0, -123460.0),
        (1.23456e-20, 1.2346e-20),
        (3e38, 3e38),
        (0.0, 0.0),
        (float("nan"), None),
        (float("inf"), None),
    ],
)
def test_numbers_are_short(value: float, said: float | None) -> None:
    (found,) = numbers(np.array([value], np.float32), 5)
    assert found == (said if said is None else pytest.approx(said, rel=1e-9))
    if found is not None and 1e-6 < abs(found) < 1e9:
        assert len(repr(found)) < 12
