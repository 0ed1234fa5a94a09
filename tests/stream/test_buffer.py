"""Readings on the grid: which slots close, when, with which values, and what is remembered.

Slots are 10 ms long. In the timelines every column is a slot, `a` a reading of entity a in it, and
`||` stands before the oldest open slot: it moves when the newest reading so far (`^`) is `lateness`
(10 ms unless said otherwise) past the end of a slot.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.buffer import EntitySnapshot, PartitionBuffer, _rank_within
from stream.decide import AlertState
from stream.grid import NO_WATERMARK, Grid, ReplayPoint
from stream.records import ReadingBatch
from tests.stream.fakes import FakeScorer, Reading, batch, grid

Cells = tuple[float | None, ...]
GONE = (None, None)


class Slot(NamedTuple):
    """One closed slot of one entity."""

    values: Cells
    warming: bool
    silent: int
    emit: bool


def cells(row: np.ndarray) -> Cells:
    return tuple(None if np.isnan(x) else round(float(x), 3) for x in row)


class Tape:
    """A buffer, and everything that came out of it; every slot may come out once."""

    def __init__(self, shape: Grid | None = None, buffer: PartitionBuffer | None = None) -> None:
        self.buffer = buffer or PartitionBuffer(shape or grid(), FakeScorer())
        self.slots: dict[str, dict[int, Slot]] = defaultdict(dict)
        self.windows: dict[tuple[str, int], list[Cells]] = {}
        self.statistics: dict[tuple[str, int], list[Cells]] = {}
        self.next_offset = 0

    def feed(self, *readings: Reading, most: int = 10**9) -> list[int]:
        """Feed one batch; return the slots that it closes, in the order of closing."""
        fed = batch(list(readings), self.next_offset)
        self.next_offset += len(readings)
        return self.take(fed, most)

    def take(self, fed: ReadingBatch, most: int = 10**9) -> list[int]:
        order = [slot for part in self.parts(fed, most) for slot in part]
        return sorted(set(order), key=order.index)

    def parts(self, fed: ReadingBatch, most: int) -> Iterator[list[int]]:
        """Feed a batch in parts; yield the slots that each closes, one of each entity."""
        rest: ReadingBatch | None = fed
        while rest is not None:
            now, rest = self.buffer.divide(rest, most)
            yield self._take(now)

    def _take(self, fed: ReadingBatch) -> list[int]:
        order: list[int] = []
        for closing in self.buffer.advance(fed):
            names = {row: self.buffer.entity(row).name for row in closing.rows.tolist()}
            for i, row in enumerate(closing.rows.tolist()):
                for t in np.flatnonzero(closing.present[i]).tolist():
                    slot = closing.first_slot + t
                    assert slot not in self.slots[names[row]], "closed twice"
                    self.slots[names[row]][slot] = Slot(
                        cells(closing.values[i, t]),
                        bool(closing.warming[i, t]),
                        int(closing.silent[i, t]),
                        closing.emit,
                    )
                    order.append(slot)
            for span in closing.spans:
                width = self.buffer.grid.window
                for i, row in enumerate(span.rows.tolist()):
                    for t in range(int(span.lengths[i])):
                        at = (names[row], span.first_slot + t)
                        self.windows[at] = [cells(c) for c in span.values[i, t : t + width]]
                        self.statistics[at] = [cells(span.mean[i]), cells(span.scale[i])]
        return order

    def values(self, entity: str) -> dict[int, Cells]:
        return {slot: closed.values for slot, closed in self.slots[entity].items()}


def reading(entity: str, slot: int, value: float | None = None) -> Reading:
    """A reading in the middle of a slot; its value says where it came from."""
    return entity, slot * 10 + 5, float(slot) if value is None else value, 0.0


# -- when slots close --------------------------------------------------------------------------


def test_slots_in_order_close_one_lateness_after_their_end() -> None:
    tape = Tape()
    #  slot   0    1    2    3
    #         a    a    a    a
    assert tape.feed(reading("a", 0)) == []  #  || 0^
    assert tape.feed(reading("a", 1)) == []  #  || 0  1^
    assert tape.feed(reading("a", 2)) == [0]  #    0 || 1  2^
    assert tape.feed(reading("a", 3)) == [1]  #    0  1 || 2  3^
    assert tape.values("a") == {0: (0, 0), 1: (1, 0)}
    assert tape.buffer.next_slot == 2
    assert tape.buffer.placement.placed == 4
    assert tape.buffer.placement.late == tape.buffer.placement.duplicates == 0


def test_a_slot_closes_exactly_when_the_watermark_reaches_its_end_plus_lateness() -> None:
    #  ms     0         10        20
    #         |  slot 0 | lateness|
    #         a                 a |            19: still open
    #         a                   a            20: closed
    tape = Tape()
    assert tape.feed(("a", 0, 1, 1), ("a", 19, 1, 1)) == []
    assert tape.feed(("a", 20, 1, 1)) == [0]


def test_without_lateness_the_next_reading_closes_the_slot() -> None:
    tape = Tape(grid(lateness_ms=0))
    assert tape.feed(("a", 0, 1, 1), ("a", 9, 2, 2)) == []
    assert tape.feed(("a", 10, 3, 3)) == [0]
    assert tape.values("a") == {0: (2, 2)}


@pytest.mark.parametrize(
    ("lateness_ms", "closes_at"), [(0, 10), (1, 11), (5, 15), (10, 20), (15, 25), (25, 35)]
)
def test_lateness_need_not_be_a_multiple_of_the_period(lateness_ms: int, closes_at: int) -> None:
    #  lateness 15:    0         10        20   25
    #                  |  slot 0 |- lateness ---|
    #                  a                       b          24: open, a reading for it counts
    #                  a         |              b         25: closed, a reading for it is late
    in_time, late = Tape(grid(lateness_ms=lateness_ms)), Tape(grid(lateness_ms=lateness_ms))
    assert in_time.feed(("a", 0, 1, 1), ("b", closes_at - 1, 0, 0), ("a", 9, 2, 2)) == []
    assert in_time.buffer.placement.late == 0
    assert late.feed(("a", 0, 1, 1), ("b", closes_at, 0, 0), ("a", 9, 2, 2)) == [0]
    assert late.buffer.placement.late == 1
    assert late.values("a") == {0: (1, 1)}


def test_late_readings_are_counted_and_dropped() -> None:
    #  slot   0    1    2    3    4
    #         a         a    a              closes 0 and 1, || before 2
    #              a                        late: slot 1 is closed
    tape = Tape()
    tape.feed(reading("a", 0), reading("a", 2), reading("a", 3))
    assert tape.feed(reading("a", 1)) == []
    assert tape.feed(reading("a", 4), reading("a", 0, 99.0), reading("a", 5)) == [2, 3]
    assert tape.values("a") == {0: (0, 0), 1: GONE, 2: (2, 0), 3: (3, 0)}
    assert tape.buffer.placement.late == 2
    assert tape.buffer.placement.placed == 5


def test_within_lateness_order_does_not_matter() -> None:
    #  slot   0    1    2    3
    #         a2   a1                       1 before 0: slot 0 is open still
    #                   a4   a3             3 before 2
    tape = Tape()
    closed = tape.feed(reading("a", 1), reading("a", 0), reading("a", 3), reading("a", 2))
    assert closed == [0, 1]
    tape.feed(reading("a", 5))
    assert tape.values("a") == {slot: (slot, 0) for slot in range(4)}
    assert tape.buffer.placement.late == 0


def test_a_repeated_reading_replaces_the_cells_it_gives() -> None:
    #  slot 0:  a(1, 2)  a(5, -)  a(-, 7)  -> (5, 7), two readings said a cell again
    tape = Tape()
    tape.feed(("a", 0, 1, 2), ("a", 0, 5, None))
    tape.feed(("a", 4, None, 7), reading("a", 2))
    assert tape.values("a") == {0: (5, 7)}
    assert tape.buffer.placement.duplicates == 2
    assert tape.buffer.placement.placed == 4


def test_many_repeats_in_one_batch_keep_the_last() -> None:
    tape = Tape()
    tape.feed(*[("a", 0, float(i), -float(i)) for i in range(20)], reading("a", 2))
    assert tape.values("a") == {0: (19, -19)}
    assert tape.buffer.placement.duplicates == 19


def test_partial_readings_of_a_slot_become_one_row() -> None:
    #  slot 0:  a(1, -)  b(8, 9)  a(-, 2)  -> a (1, 2), and nothing was said twice
    tape = Tape()
    tape.feed(("a", 0, 1, None), ("b", 1, 8, 9), ("a", 9, None, 2), reading("a", 2))
    assert tape.values("a") == {0: (1, 2)}
    assert tape.values("b") == {0: (8, 9)}
    assert tape.buffer.placement.duplicates == 0


def test_missing_slots_are_closed_as_missing() -> None:
    #  slot   0    1    2    3    4    5
    #         a              a         a
    tape = Tape()
    assert tape.feed(reading("a", 0), reading("a", 3), reading("a", 5)) == [0, 1, 2, 3]
    assert tape.values("a") == {0: (0, 0), 1: GONE, 2: GONE, 3: (3, 0)}
    assert [closed.silent for closed in tape.slots["a"].values()] == [0, 1, 2, 0]
    # The window of slot 3 has the holes in it; those of 2 and 3 are the first after the warm-up.
    assert tape.windows["a", 3] == [GONE, GONE, (3, 0)]
    assert sorted(tape.windows) == [("a", 2), ("a", 3)]


def test_a_reading_without_any_value_moves_time_and_nothing_else() -> None:
    #  slot   0    1    2
    #         a         z          z says nothing, and is nobody
    tape = Tape()
    assert tape.feed(reading("a", 0), ("z", 25, None, None)) == [0]
    assert set(tape.buffer.names) == {"a"}
    assert tape.buffer.placement.placed == 2


def test_a_gap_longer_than_the_ring_is_all_closed_and_all_missing() -> None:
    #  slot   0  1  2                        ...                    50 51 52
    #         a  a  a                                                a  a  a
    tape = Tape(grid(ttl_slots=100))
    assert tape.buffer.grid.ring < 20
    tape.feed(*[reading("a", slot, 7.0) for slot in range(3)])
    closed = tape.feed(*[reading("a", slot) for slot in range(50, 53)])
    assert closed == list(range(1, 51))
    silent = [slot for slot, values in tape.values("a").items() if values == GONE]
    assert silent == list(range(3, 50))
    # Nothing of a round of the ring before is left in a window.
    assert tape.windows["a", 50] == [GONE, GONE, (50, 0)]
    assert all(window == [GONE] * 3 for (_, s), window in tape.windows.items() if 5 <= s < 50)


def test_one_jump_ahead_closes_everybody_and_makes_the_rest_late() -> None:
    #  slot   0    1   ...   60
    #         ab
    #                        b               one wrong (or very fast) clock
    #              a                         late now
    tape = Tape(grid(ttl_slots=1000))
    closed = tape.feed(
        reading("a", 0), reading("b", 0), reading("b", 60), reading("a", 1), reading("b", 61)
    )
    assert closed == list(range(60))
    assert tape.buffer.placement.late == 1
    assert tape.values("a") == {0: (0, 0)} | dict.fromkeys(range(1, 60), GONE)


def test_two_entities_share_the_watermark_of_their_partition() -> None:
    #  slot   0    1    2    3
    #         b    ab   a    a               a's clock closes b's slots too
    tape = Tape()
    closed = tape.feed(*(reading(*at) for at in [("b", 0), ("b", 1), ("a", 1), ("a", 2), ("a", 3)]))
    assert closed == [0, 1]
    assert tape.values("b") == {0: (0, 0), 1: (1, 0)}
    assert tape.values("a") == {1: (1, 0)}


@pytest.mark.parametrize("origin", [-1000, -7, 0, 3, 10**12])
def test_the_grid_goes_through_zero_and_below(origin: int) -> None:
    #  slot  -2   -1    0    1    2
    #   ms -20  -10    0    10   20          -1 ms is in slot -1, not in slot 0
    tape = Tape()
    at = origin * 10
    tape.feed(("a", at - 11, 1, 1), ("a", at - 1, 2, 2), ("a", at, 3, 3), ("a", at + 29, 9, 9))
    assert tape.values("a") == {origin - 2: (1, 1), origin - 1: (2, 2), origin: (3, 3)}


def test_an_empty_batch_closes_nothing() -> None:
    tape = Tape()
    assert tape.take(batch([])) == []
    assert tape.buffer.watermark_ms == NO_WATERMARK
    assert tape.buffer.replay_point(17) == ReplayPoint(17, NO_WATERMARK)


# -- entities come and go ----------------------------------------------------------------------


def test_an_entity_born_in_the_stream_has_no_past() -> None:
    #  slot   0    1    2    3    4    5
    #         a    a    a    ab   ab   a
    tape = Tape()
    tape.feed(*(reading("a", slot) for slot in range(3)))
    tape.feed(*(reading(e, slot) for slot in (3, 4) for e in "ab"), reading("a", 5))
    assert list(tape.values("a")) == [0, 1, 2, 3]
    assert tape.values("b") == {3: (3, 0)}
    assert tape.slots["b"][3].warming


def test_a_birth_out_of_order_begins_with_the_earliest_open_slot() -> None:
    #  slot   0    1    2    3    4    5
    #         a    a    b2   b1   a    a      b's second reading is the earlier one
    tape = Tape()
    tape.feed(reading("a", 1), reading("b", 2), reading("b", 1), reading("a", 4), reading("a", 5))
    assert tape.values("b") == {1: (1, 0), 2: (2, 0), 3: GONE}
    # The warm-up of two slots counts from there.
    assert [slot.warming for slot in tape.slots["b"].values()] == [True, True, False]


def test_a_known_entity_warms_up_for_its_first_window() -> None:
    tape = Tape()
    tape.feed(*(reading("c", slot) for slot in range(6)))
    assert [tape.slots["c"][slot].warming for slot in range(4)] == [True, True, False, False]
    # Row 2 of the model; its statistics come from there.
    assert tape.statistics["c", 2] == [(2, 2), (2, 2)]
    assert tape.windows["c", 2] == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.parametrize("together", [True, False])
def test_a_newcomer_is_scored_once_its_statistics_are_known(together: bool) -> None:
    #  slot   0    1    2    3    4  | 5    6
    #         n    n         n    n  | n    n     five slots, with a hole, then scores
    #         1    2    -    4    5  | 50
    tape = Tape()
    readings = [("n", 10 * s, v, 3.0) for s, v in [(0, 1.0), (1, 2.0), (3, 4.0), (4, 5.0)]]
    later = [("n", 50, 50.0, 3.0), ("n", 60, 0.0, 0.0), ("n", 70, 0.0, 0.0)]
    if together:
        tape.feed(*readings, *later)
    else:
        for one in [*readings, *later]:
            tape.feed(one)
    assert [slot.warming for slot in tape.slots["n"].values()] == [True] * 5 + [False]
    assert list(tape.windows) == [("n", 5)]
    # Mean of 1, 2, 4, 5 and of 3, 3, 3, 3; FakeScorer's scale is 1 + standard deviation.
    assert tape.statistics["n", 5] == [(3, 3), (round(1 + 2.5**0.5, 3), 1)]


def test_a_newcomers_statistics_are_in_its_snapshots() -> None:
    tape = Tape()
    tape.feed(*(("n", 10 * slot, 2.0, None) for slot in range(4)))
    (before,), _ = tape.buffer.snapshots()
    assert before.statistics is None
    assert before.sums is not None
    assert before.sums.tolist() == [[2, 0], [4, 0], [8, 0]]  # slots 0 and 1 are closed
    tape.feed(*(("n", 10 * slot, 2.0, None) for slot in range(4, 7)))
    (after,), _ = tape.buffer.snapshots()
    assert after.sums is None
    assert after.statistics is not None
    assert after.statistics.tolist() == [[2, 0], [1, 1]]


def test_silence_is_counted_until_the_time_to_live_and_then_the_entity_is_gone() -> None:
    #  slot   0    1    2    3    4    5    6    7    8
    #         ab   b    b    b    b    b    b    b    b      ttl 3: a is present to slot 3
    tape = Tape(grid(ttl_slots=3))
    tape.feed(reading("a", 0), *(reading("b", slot) for slot in range(9)))
    assert [(slot, s.silent) for slot, s in tape.slots["a"].items()] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 3),
    ]
    assert list(tape.buffer.names) == ["b"]
    due, gone = tape.buffer.snapshots()
    assert gone == ["a"]
    assert [snapshot.entity for snapshot in due] == ["b"]
    assert not any(tape.buffer.snapshots())


def test_who_comes_back_after_the_time_to_live_is_new() -> None:
    #  slot   0    1    2    3    4   ...  9    10   11   12   13   14
    #         ab   b    b    b    b        ab   ab   ab   ab   ab   b
    tape = Tape(grid(ttl_slots=3))
    tape.feed(reading("a", 0), *(reading("b", slot) for slot in range(9)))
    tape.buffer.snapshots()
    tape.feed(*(reading(e, slot) for slot in range(9, 14) for e in "ab"), reading("b", 14))
    assert list(tape.slots["a"]) == [0, 1, 2, 3, 9, 10, 11, 12]
    assert [tape.slots["a"][slot].warming for slot in range(9, 13)] == [True, True, False, False]
    assert tape.windows["a", 11] == [(9, 0), (10, 0), (11, 0)]
    due, gone = tape.buffer.snapshots()
    assert "a" in [snapshot.entity for snapshot in due]
    assert gone == []


def test_who_expires_with_readings_in_open_slots_is_back_at_once() -> None:
    #  slot   0    1    2    3    4 || 5    6
    #         ab   b    b    b    b    a    b      a expires when 4 closes; its reading in 5 waits
    tape = Tape(grid(ttl_slots=3))
    tape.feed(reading("a", 0), *(reading("b", slot) for slot in range(5)))
    tape.feed(reading("a", 5, 55.0), reading("b", 6))
    assert set(tape.buffer.names) == {"a", "b"}
    due, gone = tape.buffer.snapshots()
    assert gone == []
    assert {s.entity: s.first_slot for s in due}["a"] == 5
    tape.feed(reading("b", 7), reading("b", 8))
    assert tape.values("a") == {0: (0, 0), 1: GONE, 2: GONE, 3: GONE, 5: (55, 0), 6: GONE}
    assert tape.slots["a"][5].silent == 0


def test_when_everybody_is_gone_time_goes_on_without_slots() -> None:
    tape = Tape(grid(ttl_slots=2))
    tape.feed(reading("a", 0))
    assert tape.feed(reading("b", 10**9)) == [0, 1, 2]
    assert list(tape.buffer.names) == ["b"]
    assert tape.buffer.next_slot == 10**9 - 1
    assert tape.feed(reading("b", 10**9 + 2)) == [10**9]


def test_rows_are_used_again_without_what_was_in_them() -> None:
    tape = Tape(grid(ttl_slots=2))
    tape.feed(*(("n", 10 * slot, 7.0, 7.0) for slot in range(6)))
    row = tape.buffer.names["n"]
    tape.feed(*(reading("a", slot) for slot in range(6, 12)))
    assert "n" not in tape.buffer.names
    tape.feed(*(reading(e, slot) for slot in range(12, 17) for e in ("b", "a")))
    assert tape.buffer.names["b"] == row
    assert tape.statistics["b", 14] == [(1, 1), (2, 2)]
    assert tape.windows["b", 14] == [(12, 0), (13, 0), (14, 0)]


def test_a_hundred_entities_outgrow_the_first_rows() -> None:
    tape = Tape()
    names = [f"e{i}" for i in range(100)]
    for slot in range(8):
        tape.feed(*((name, 10 * slot, float(i), float(slot)) for i, name in enumerate(names)))
    assert len(tape.buffer.entities) >= 100
    for i, name in enumerate(names):
        assert tape.values(name) == {slot: (i, slot) for slot in range(6)}, name
        # Statistics of the first five slots: each entity has its own.
        assert tape.statistics[name, 5][0] == (i, 2)
    due, _ = tape.buffer.snapshots()
    assert {snapshot.entity for snapshot in due} == set(names)


# -- what is remembered ------------------------------------------------------------------------


def test_the_replay_point_is_the_first_reading_of_the_oldest_slot_still_needed() -> None:
    #  slot       0 ... 20 | 21 ...       ... 39 || 40   41
    #                       <- replay_slots --->
    tape = Tape()
    needed = tape.buffer.grid.replay_slots
    for slot in range(42):
        tape.feed(reading("a", slot), reading("b", slot))
        tape.buffer.replay_point(tape.next_offset)
    assert tape.buffer.next_slot == 40
    oldest = 40 - needed
    assert tape.buffer.replay_point(84) == ReplayPoint(2 * oldest, (oldest - 1) * 10 + 5)


def test_the_replay_point_does_not_move_back_for_slots_without_readings() -> None:
    #  slot   0          (silence)           60  61  62
    tape = Tape(grid(ttl_slots=1000))
    tape.feed(reading("a", 0), reading("a", 1))
    tape.feed(reading("a", 60), reading("a", 61), reading("a", 62))
    assert tape.buffer.replay_point(5) == ReplayPoint(2, 15)


def test_the_replay_point_is_the_earliest_offset_however_readings_are_shuffled() -> None:
    #  offset    0   1   2   3
    #  slot      1   0   3   2      the readings of slot 0 begin at offset 1, of slot 1 at offset 0
    tape = Tape()
    tape.feed(reading("a", 1), reading("a", 0), reading("a", 3), reading("a", 2))
    assert tape.buffer.replay_point(4) == ReplayPoint(0, NO_WATERMARK)


def test_a_message_is_replayed_from_before_its_first_reading() -> None:
    #  offset 0: slot 0;  offset 1: slots 20, 40, 41 in one message, of which 20 is long done with
    tape = Tape(grid(ttl_slots=1000))
    fed = batch([reading("a", 0), *(reading("a", slot) for slot in (20, 40, 41))])
    tape.take(replace(fed, offsets=np.array([0, 1, 1, 1]), next_offset=2))
    # For slot 40 the message at offset 1 is needed, as it was met: at the watermark of offset 0.
    assert tape.buffer.replay_point(2) == ReplayPoint(1, 5)


def test_snapshots_are_due_at_birth_at_intervals_and_on_demand() -> None:
    tape = Tape()  # every 7 slots
    due_at: dict[int, list[str]] = {}
    for slot in range(60):
        tape.feed(reading("a", slot), reading("b", slot))
        due, gone = tape.buffer.snapshots()
        assert gone == []
        for snapshot in due:
            assert snapshot.slot == tape.buffer.next_slot - 1
            assert snapshot.silent == 0
            due_at.setdefault(slot, []).append(snapshot.entity)
    assert due_at.pop(0) == ["a", "b"]
    for name in "ab":
        at = [slot for slot, names in due_at.items() if name in names]
        assert max(np.diff(at)) == 7, name
        assert 60 // 7 <= len(at) <= 60 // 7 + 1
    # Spread over slots: not everybody at once.
    assert all(len(names) == 1 for names in due_at.values())
    tape.buffer.mark_dirty(tape.buffer.names["b"])
    assert [snapshot.entity for snapshot in tape.buffer.snapshots()[0]] == ["b"]
    assert not any(tape.buffer.snapshots())


def snapshot(entity: str, slot: int, **changes: object) -> EntitySnapshot:
    given: dict[str, object] = {"first_slot": 0, "silent": 0, "alert": AlertState("ok")}
    return EntitySnapshot(entity, slot, **{**given, **changes})  # type: ignore[arg-type]


def primed(
    snapshots: list[EntitySnapshot], until: int, watermark_ms: int, replay_watermark_ms: int
) -> Tape:
    buffer = PartitionBuffer(
        grid(),
        FakeScorer(),
        watermark_ms=replay_watermark_ms,
        prime_until=until,
        prime_watermark_ms=watermark_ms,
    )
    buffer.restore(snapshots)
    return Tape(buffer=buffer)


def test_priming_rebuilds_windows_and_says_nothing() -> None:
    #  offset   0   1   2   3 | 4   5             committed: 4, with the watermark in slot 3
    #  slot     0   1   2   3 | 4   5
    tape = primed([snapshot("a", 1)], until=4, watermark_ms=35, replay_watermark_ms=-10)
    tape.feed(reading("a", 0), reading("a", 1), reading("a", 2))
    assert tape.buffer.priming
    tape.feed(reading("a", 3), reading("a", 4), reading("a", 5))
    assert {slot: s.emit for slot, s in tape.slots["a"].items()} == {
        0: False,
        1: False,
        2: True,
        3: True,
    }
    assert tape.windows["a", 2] == [(0, 0), (1, 0), (2, 0)]
    # What was counted before the crash is not counted again.
    assert tape.buffer.placement.placed == 2


def test_priming_ignores_who_was_gone_at_the_commit_and_what_was_never_accepted() -> None:
    #  offset 0..2 were committed with the watermark at 15: z had gone, and 999 was refused then
    tape = primed([snapshot("a", -1)], until=3, watermark_ms=15, replay_watermark_ms=-10)
    tape.feed(reading("a", 0), ("a", 999, 5, 5), ("z", 7, 1, 1), reading("a", 1))
    assert set(tape.buffer.names) == {"a"}
    assert tape.buffer.watermark_ms == 15
    assert tape.slots["a"] == {}


def test_priming_ends_with_nothing_left_to_replay() -> None:
    # Retention took what was to be replayed: an empty batch that ends at the committed offset.
    tape = primed([snapshot("a", 1)], until=9, watermark_ms=35, replay_watermark_ms=NO_WATERMARK)
    tape.take(replace(batch([]), next_offset=9))
    assert not tape.buffer.priming
    assert tape.buffer.next_slot == 2
    tape.next_offset = 9
    tape.feed(reading("a", 4))
    assert tape.values("a") == {2: GONE}


@pytest.mark.parametrize("most", [1, 7, 20])
def test_a_jump_is_closed_in_parts_and_so_is_one_that_is_rebuilt(most: int) -> None:
    #  slot   0  1  2  3        ...        28        ...        50
    #         a  a  a  a                 (commit)               a
    log = [*(reading("a", slot) for slot in range(4)), reading("a", 50)]
    shape = grid(ttl_slots=1000)
    tape = Tape(shape)
    closed = [len(part) for part in tape.parts(batch(log), most)]
    assert max(closed) == most
    assert sum(closed) == 49
    assert list(tape.slots["a"]) == [*range(49)]

    buffer = PartitionBuffer(
        shape, FakeScorer(), watermark_ms=-10, prime_until=4, prime_watermark_ms=300
    )
    buffer.restore([snapshot("a", -1)])
    again = Tape(buffer=buffer)
    assert max(len(part) for part in again.parts(batch(log), most)) == most
    emitted = [slot for slot, closed in again.slots["a"].items() if closed.emit]
    assert emitted == [*range(29, 49)]
    assert again.slots["a"][48] == tape.slots["a"][48]


def test_the_readings_of_one_message_stay_together() -> None:
    #  offset 0: slots 0, 40, 41 in one message;  offset 1: slot 42
    tape = Tape(grid(ttl_slots=1000))
    fed = batch([reading("a", slot) for slot in (0, 40, 41, 42)])
    fed = replace(fed, offsets=np.array([0, 0, 0, 1]), next_offset=2)
    now, rest = tape.buffer.divide(fed, 5)
    assert (now.timestamps_ms.tolist(), now.next_offset) == ([5, 405, 415], 1)
    assert rest is not None
    assert (rest.timestamps_ms.tolist(), rest.next_offset) == ([425], 2)


def test_only_what_is_looked_back_on_is_scored_again() -> None:
    #  slot   0   ...   34   ...   40 | 41       the snapshot is as of 40, seven are looked back on
    assert grid().settling_slots == 7
    tape = primed([snapshot("a", 40)], until=42, watermark_ms=425, replay_watermark_ms=-10)
    tape.feed(*(reading("a", slot) for slot in range(45)))
    assert [slot for _, slot in tape.windows] == [*range(34, 43)]
    assert tape.windows["a", 34] == [(32, 0), (33, 0), (34, 0)]
    assert [slot for slot, closed in tape.slots["a"].items() if closed.emit] == [41, 42]


def test_silence_goes_on_where_the_snapshot_stopped() -> None:
    #  slot    3      4    5    6    7
    #        (snapshot: two silent slots, in 3 the third)   b speaks, a does not
    tape = primed(
        [snapshot("a", 3, silent=3), snapshot("b", 3)],
        until=1,
        watermark_ms=50,
        replay_watermark_ms=30,
    )
    tape.feed(("b", 50, 1, 1), ("b", 60, 1, 1), ("b", 70, 1, 1))
    assert {slot: s.silent for slot, s in tape.slots["a"].items() if s.emit} == {4: 4, 5: 5}


def test_after_a_restart_snapshots_are_due_by_their_age() -> None:
    # Rows are dealt anew, so whose turn it is by row says nothing about the age.
    tape = primed(
        [snapshot(name, 10) for name in "abc"], until=1, watermark_ms=125, replay_watermark_ms=0
    )
    due_at: dict[str, int] = {}
    for slot in range(12, 30):
        tape.feed(*(reading(name, slot) for name in "abc"))
        for due in tape.buffer.snapshots()[0]:
            due_at.setdefault(due.entity, due.slot)
    assert due_at.keys() == set("abc")
    assert max(due_at.values()) <= 10 + 7


def test_a_shorter_time_to_live_after_a_restart_forgets_the_silent_ones() -> None:
    # The settings changed while a had been silent for 20 slots: the limit is 5 now.
    buffer = PartitionBuffer(
        grid(ttl_slots=5), FakeScorer(), watermark_ms=500, prime_until=1, prime_watermark_ms=505
    )
    buffer.restore([snapshot("a", 48, silent=20), snapshot("b", 48)])
    tape = Tape(buffer=buffer)
    tape.feed(("b", 505, 1, 1), ("b", 510, 1, 1), ("b", 520, 1, 1))
    assert list(buffer.names) == ["b"]
    assert buffer.snapshots()[1] == ["a"]
    assert list(tape.slots["a"]) == []


# -- complete slots, closed at once ------------------------------------------------------------


EAGER = grid(close_complete=True)


def test_a_complete_slot_closes_with_its_last_reading_and_waits_for_nobody() -> None:
    #  slot   0    1    2    3
    #         ab   ab   a    a         two slots of warm-up, then a is scored as it speaks
    tape = Tape(EAGER)
    assert tape.feed(*(reading(e, slot) for slot in (0, 1) for e in "ab")) == []
    assert tape.feed(("a", 21, 7, None)) == [0]
    assert tape.feed(("a", 22, None, 8)) == []  # 1 is in the warm-up: it waits
    assert tape.feed(reading("a", 3)) == [1, 2, 3]
    assert tape.values("a") == {0: (0, 0), 1: (1, 0), 2: (7, 8), 3: (3, 0)}
    assert tape.windows["a", 3] == [(1, 0), (7, 8), (3, 0)]
    assert tape.feed(reading("b", 3)) == []  # b's slot 2 may still be filled
    assert tape.feed(reading("b", 2)) == [2, 3]
    assert tape.values("b") == {slot: (slot, 0) for slot in range(4)}
    assert tape.buffer.next_slot == 2


def test_what_is_incomplete_closes_as_ever_and_lets_go_of_what_waited_behind_it() -> None:
    #  slot   2      3    4    5
    #         a(-)   a    a         slot 2 has one of two channels; 5 closes it, by b's clock
    tape = Tape(EAGER)
    tape.feed(reading("a", 0), reading("a", 1), ("a", 20, 2, None))
    assert tape.feed(reading("a", 3)) == [1]
    assert tape.feed(reading("a", 4)) == [2, 3, 4]
    assert tape.values("a")[2] == (2, None)


@pytest.mark.parametrize("together", [True, False])
def test_a_complete_slot_takes_no_more_readings(together: bool) -> None:
    tape = Tape(EAGER)
    tape.feed(*(reading("a", slot) for slot in range(4)))
    readings = [("a", 40, 1, 1), ("a", 41, 2, 2), ("a", 42, None, 3), reading("a", 5)]
    for fed in [readings] if together else [[one] for one in readings]:
        tape.feed(*fed)
    assert tape.values("a")[4] == (1, 1)
    assert tape.buffer.placement.duplicates == 2
    assert tape.windows["a", 5] == [(3, 0), (1, 1), (5, 0)]


def test_what_training_never_saw_of_an_entity_is_not_waited_for() -> None:
    class OnlyTheFirst(FakeScorer):
        def longest_runs(self, rows: np.ndarray) -> np.ndarray:
            longest = super().longest_runs(rows)
            longest[rows == 0, 1, 1] = 0  # the second channel of entity a never had a reading
            return longest

    tape = Tape(buffer=PartitionBuffer(EAGER, OnlyTheFirst()))
    for slot in range(4):
        tape.feed(*((name, slot * 10, 1, None) for name in "ac"))
    assert list(tape.slots["a"]) == [0, 1, 2, 3]
    assert list(tape.slots["c"]) == [0, 1]


def test_a_snapshot_says_how_far_its_entity_is_and_the_log_was_read() -> None:
    tape = Tape(EAGER)
    tape.feed(*(reading(e, slot) for slot in range(5) for e in "ab"), reading("a", 5))
    tape.buffer.mark_dirty(tape.buffer.names["a"])
    due = {s.entity: s for s in tape.buffer.snapshots()[0]}
    assert {name: (s.slot, s.offset) for name, s in due.items()} == {"a": (5, 11), "b": (4, 11)}


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_who_changes_the_rule_between_two_runs_gets_every_slot_once(
    before: bool, after: bool
) -> None:
    log = [reading("a", slot) for slot in range(8)]
    first = Tape(grid(close_complete=before))
    first.feed(*log[:6])
    buffer = PartitionBuffer(
        grid(close_complete=after),
        FakeScorer(),
        watermark_ms=-10,
        prime_until=6,
        prime_watermark_ms=55,
        prime_complete=before,
    )
    buffer.restore([snapshot("a", -1)])
    second = Tape(buffer=buffer)
    second.feed(*log[:6], ("a", 55, 99, 99), *log[6:], reading("a", 8))
    assert buffer.placement.duplicates == 1
    assert list(second.windows["a", 6][1]) == [5, 0]  # what was told is not changed any more
    told = [slot for slot, closed in second.slots["a"].items() if closed.emit]
    assert sorted([*first.slots["a"], *told]) == list(range(9 if after else 7))


# -- against a model that is too simple to be wrong --------------------------------------------


@st.composite
def logs(draw: st.DrawFn) -> list[Reading]:
    now, log = draw(st.integers(-200, 200)), []
    value = st.sampled_from([None, 1.0, 2.0, 3.0])
    for _ in range(draw(st.integers(1, 50))):
        now += draw(st.sampled_from([0, 0, 3, 10, 10, 25, 120]))
        shift = draw(st.sampled_from([0, 0, 0, -4, -10, -17, -60]))
        log.append((draw(st.sampled_from("abn")), now + shift, draw(value), draw(value)))
    return log


@given(
    log=logs(),
    lateness_ms=st.sampled_from([0, 4, 10, 25]),
    cuts=st.sets(st.integers(1, 49)),
    span=st.sampled_from([1, 2, 5]),
    complete=st.booleans(),
    most=st.sampled_from([1, 10, 10**9]),
)
@settings(max_examples=120, deadline=None)
def test_slots_and_values_are_those_of_a_simple_model(
    log: list[Reading], lateness_ms: int, cuts: set[int], span: int, complete: bool, most: int
) -> None:
    shape = grid(lateness_ms=lateness_ms, span=span, ttl_slots=10_000, close_complete=complete)
    tape = Tape(shape)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(log)), len(log)]
    for begin, end in pairwise(bounds):
        tape.feed(*log[begin:end], most=most)

    watermark, late = -(10**9), 0
    table: dict[str, dict[int, list[float | None]]] = defaultdict(dict)
    for entity, timestamp_ms, a, b in log:
        slot = timestamp_ms // 10
        if (slot + 1) * 10 + lateness_ms <= watermark:
            late += 1
            continue
        watermark = max(watermark, timestamp_ms)
        if (a, b) != (None, None):
            row = table[entity].setdefault(slot, [None, None])
            if complete and None not in row:
                continue  # it takes no more
            row[:] = [old if new is None else new for old, new in zip(row, (a, b), strict=True)]
    expected: dict[str, dict[int, Cells]] = {}
    for entity, read in table.items():
        rows = {slot: tuple(row) for slot, row in read.items()}
        closed = (watermark - lateness_ms) // 10
        ready = min(rows) + (shape.newcomer_slots if entity == "n" else shape.warmup_slots)
        while complete and closed >= ready and None not in rows.get(closed, GONE):
            closed += 1
        expected[entity] = {s: rows.get(s, GONE) for s in range(min(rows), closed)}
    assert {e: tape.values(e) for e in expected} == expected
    assert tape.buffer.placement.late == late
    assert tape.buffer.placement.placed == len(log) - late
    for (entity, slot), window in tape.windows.items():
        told = expected[entity]
        assert window == [told.get(s, GONE) for s in range(slot - 2, slot + 1)]


@pytest.mark.parametrize(
    ("keys", "ranks"),
    [([], []), ([5], [0]), ([7, 3, 7], [0, 0, 1]), ([1, 1, 1, 0, 1], [0, 1, 2, 0, 3])],
)
def test_rank_within_counts_equal_keys_before(keys: list[int], ranks: list[int]) -> None:
    assert _rank_within(np.array(keys, np.int64)).tolist() == ranks
