"""Closed slots become verdicts: which model calls, which records, which channels in them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stream.buffer import PartitionBuffer
from stream.records import SlotScore
from stream.scoring import ScoringConfig, Verdicts, score_rounds
from tests.stream.fakes import SCORING, FakeDetection, FakeScorer, Float32, Reading, batch, grid

CHANNELS = ("a", "b", "c", "d")


class Scripted(FakeScorer):
    """Evidence is channel `a` of the slot; what the others contribute is told beforehand.

    Expected is 0 with a band of -1 to 1, so that a deviation is the value itself.
    """

    channels: tuple[str, ...] = CHANNELS  # type: ignore[assignment]

    def __init__(self, contribution: Sequence[float] = (0.1, 0.4, 0.4, 0.1)) -> None:
        super().__init__()
        self.contribution = np.array(contribution, np.float32)

    def statistics(self, row: int) -> tuple[Float32, Float32]:
        return np.zeros(4, np.float32), np.ones(4, np.float32)

    def longest_runs(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        return np.full((len(rows), 2, 4), 2**20, np.int32)

    def detect(
        self,
        values: Float32,
        slots: NDArray[np.int64],
        lengths: NDArray[np.int32],
        mean: Float32,
        scale: Float32,
        rows: NDArray[np.int32],
        history: Float32,
        states: Sequence[Float32 | None] | None = None,
    ) -> FakeDetection:
        self.calls.append(values.shape)
        read = values[:, self.window - 1 :]
        zero = np.zeros_like(read)
        return FakeDetection(
            read[:, :, 0], read[:, :, :1], zero, zero - 1, zero + 1, zero + self.contribution
        )


def config(**changes: object) -> ScoringConfig:
    return replace(SCORING, **{"threshold": 10.0, "top_channels": 2, **changes})  # type: ignore[arg-type]


def score(
    cells: Sequence[tuple[float, ...] | None],
    settings: ScoringConfig | None = None,
    scorer: Scripted | None = None,
) -> Verdicts:
    """Score slots 0, 1, ... of entity `a`, whose first two slots are its warm-up."""
    scorer = scorer or Scripted()
    buffer = PartitionBuffer(grid(channels=4, lateness_ms=0), scorer)
    fed = batch([("a", 10 * slot, 0.0, 0.0) for slot in range(len(cells) + 1)])
    values = np.full((len(cells) + 1, 4), np.nan, np.float32)
    for slot, row in enumerate(cells):
        if row is not None:
            values[slot] = (*row, *[0.0] * (4 - len(row)))
    fed = replace(fed, values=values)
    return score_rounds([(buffer, buffer.advance(fed))], scorer, settings or config())


def quiet(slots: int) -> list[tuple[float, ...] | None]:
    return [(0.0,)] * slots


def last(verdicts: Verdicts) -> SlotScore:
    return verdicts.scores[-1]


# -- numbers -----------------------------------------------------------------------------------


def test_the_score_is_evidence_over_the_threshold_and_p_its_power_of_ten() -> None:
    scored = last(score([*quiet(4), (3.0, 0.5)]))
    assert scored.entity == "a"
    assert scored.timestamp_ms == 40
    assert scored.anomaly_score == 0.3
    assert scored.p_value == pytest.approx(1e-3)
    assert scored.imputed_ratio == 0
    assert scored.model == SCORING.model
    assert scored.state == "ok"


def test_warming_slots_are_told_without_a_score() -> None:
    scores = score([(99.0,), (99.0,), (1.0,)]).scores
    assert [s.state for s in scores] == ["warming", "warming", "ok"]
    assert [s.anomaly_score for s in scores] == [None, None, 0.1]
    assert [s.p_value for s in scores] == [None, None, pytest.approx(0.1)]
    assert [len(s.channels) for s in scores] == [0, 0, 2]


def test_evidence_of_nothing_never_alerts() -> None:
    nothing = (np.nan, 50.0, 50.0, 50.0)
    verdicts = score([*quiet(3), *[nothing] * 5])
    assert {s.state for s in verdicts.scores[3:]} == {"ok"}
    assert {s.anomaly_score for s in verdicts.scores[3:]} == {None}
    assert verdicts.alerts == []


def test_evidence_of_nothing_does_not_end_an_alert() -> None:
    hot = (50.0, 9.0)
    nothing = (np.nan, 0.5, 0.5, 0.5)
    for settings in (config(), config(minimum_deviation=2.0)):
        verdicts = score([*quiet(3), hot, hot, hot, hot, *[nothing] * 4], settings)
        assert [s.state for s in verdicts.scores[-4:]] == ["firing"] * 4


def test_a_slot_without_readings_is_scored_but_neither_hot_nor_calm() -> None:
    class Suspicious(Scripted):
        def detect(self, values: Float32, *rest: Any) -> FakeDetection:  # noqa: ANN401
            found = super().detect(values, *rest)
            return found._replace(evidence=np.nan_to_num(found.evidence, nan=50.0))

    verdicts = score([*quiet(4), None, (0.0,), None, (0.0,)], scorer=Suspicious())
    silent = [s for s in verdicts.scores if s.imputed_ratio == 1.0]
    assert [s.timestamp_ms for s in silent] == [40, 60]
    assert [s.anomaly_score for s in silent] == [5.0, 5.0]
    assert {s.state for s in verdicts.scores[2:]} == {"ok"}


def test_missing_cells_are_a_share_and_none() -> None:
    scored = last(score([*quiet(4), (2.0, np.nan, 0.0, 0.0)], config(channels="all")))
    assert scored.imputed_ratio == 0.25
    assert scored.channels["b"].observed is None
    assert scored.channels["b"].expected == 0.0
    assert scored.channels["a"].observed == 2.0


# -- channels ----------------------------------------------------------------------------------


def test_the_guiltiest_channels_come_first_and_equals_in_their_order() -> None:
    scored = last(score(quiet(4), config(channels="all")))
    assert list(scored.channels) == ["b", "c", "a", "d"]
    assert [c.contribution for c in scored.channels.values()] == pytest.approx([0.4, 0.4, 0.1, 0.1])
    backwards = last(score(quiet(4), config(channels="all"), Scripted((0.1, 0.2, 0.3, 0.4))))
    assert list(backwards.channels) == ["d", "c", "b", "a"]


def test_a_channel_without_contribution_comes_last() -> None:
    scored = last(score(quiet(4), config(channels="all"), Scripted((np.nan, 0.3, 0.0, 0.7))))
    assert list(scored.channels) == ["d", "b", "a", "c"]
    assert scored.channels["a"].contribution == 0.0


@pytest.mark.parametrize(
    ("channels", "told"),
    # ok, pending, firing
    [("top", [2, 4, 4]), ("all", [4, 4, 4]), ("alerting", [0, 4, 4])],
)
def test_how_many_channels_are_told(channels: str, told: list[int]) -> None:
    verdicts = score([*quiet(4), (50.0,), (50.0,)], config(channels=channels))
    assert [s.state for s in verdicts.scores[3:]] == ["ok", "pending", "firing"]
    assert [len(s.channels) for s in verdicts.scores[3:]] == told
    assert [len(alert.channels) for alert in verdicts.alerts] == [4, 4]


@pytest.mark.parametrize(("top", "names"), [(0, []), (1, ["b"]), (9, ["b", "c", "a", "d"])])
def test_top_may_be_none_or_more_than_there_are(top: int, names: list[str]) -> None:
    assert list(last(score(quiet(4), config(top_channels=top))).channels) == names


# -- what counts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("minimum", "direction", "deviations", "state"),
    [
        (0.0, "both", (0.0, 0.0), "firing"),
        (3.0, "both", (2.9, -2.9), "ok"),
        (3.0, "both", (3.0, 0.0), "firing"),
        (3.0, "both", (0.0, -3.1), "firing"),
        (3.0, "up", (0.0, 3.1), "firing"),
        (3.0, "up", (2.0, -9.0), "ok"),
        (3.0, "down", (0.0, -3.1), "firing"),
        (3.0, "down", (9.0, 9.0), "ok"),
        # A direction alone asks for a channel beyond its band on that side.
        (0.0, "up", (1.0, -9.0), "firing"),
        (0.0, "up", (0.9, -9.0), "ok"),
        (0.0, "down", (-1.0, 9.0), "firing"),
        (0.0, "down", (-0.9, 9.0), "ok"),
        # A channel without reading deviates from nothing.
        (3.0, "both", (np.nan, np.nan), "ok"),
    ],
)
def test_a_slot_counts_when_a_channel_is_far_enough_on_the_right_side(
    minimum: float, direction: str, deviations: tuple[float, float], state: str
) -> None:
    # Evidence is channel a's value, which deviates by itself: take it out of the way.
    class Elsewhere(Scripted):
        def detect(self, values: Float32, *rest: Any) -> FakeDetection:  # noqa: ANN401
            found = super().detect(values, *rest)
            centre = np.zeros_like(found.expected)
            centre[:, :, 0] = np.nan_to_num(values[:, self.window - 1 :, 0])
            return found._replace(expected=centre, lower=centre - 1, upper=centre + 1)

    settings = config(minimum_deviation=minimum, direction=direction)
    hot = (50.0, *deviations)
    verdicts = score([*quiet(4), hot, hot, hot], settings, Elsewhere())
    assert last(verdicts).state == state
    # The score itself is told as it is.
    assert last(verdicts).anomaly_score == 5.0


# -- alerts ------------------------------------------------------------------------------------


def test_every_change_is_an_alert_event_but_the_end_of_the_warm_up() -> None:
    verdicts = score([*quiet(3), (50.0,), (50.0,), (50.0,), *quiet(3)])
    assert [(a.timestamp_ms, a.previous, a.state, a.since_ms) for a in verdicts.alerts] == [
        (30, "ok", "pending", 20),
        (40, "pending", "firing", 30),
        (60, "firing", "recovering", 40),
        (70, "recovering", "ok", 60),
    ]
    assert [a.anomaly_score for a in verdicts.alerts] == [5.0, 5.0, 0.0, 0.0]
    assert verdicts.alerts[0].channels == verdicts.scores[3].channels


def test_an_alert_straight_after_the_warm_up_dates_it_from_the_first_slot() -> None:
    scorer = Scripted()
    buffer = PartitionBuffer(grid(channels=4, lateness_ms=0), scorer)
    fed = batch([("a", 10 * slot, 0.0, 0.0) for slot in range(100, 105)])
    fed = replace(fed, values=np.full((5, 4), 50.0, np.float32))
    verdicts = score_rounds([(buffer, buffer.advance(fed))], scorer, config())
    assert [(a.previous, a.state, a.since_ms) for a in verdicts.alerts] == [
        ("warming", "pending", 1000),
        ("pending", "firing", 1020),
    ]


def test_a_change_of_state_asks_for_a_snapshot() -> None:
    scorer = Scripted()
    buffer = PartitionBuffer(grid(channels=4, lateness_ms=0, snapshot_slots=1000), scorer)
    seen = []
    for slot, value in enumerate([0.0, 0.0, 0.0, 0.0, 0.0, 50.0, 0.0, 0.0]):
        fed = batch([("a", 10 * slot, 0.0, 0.0)], slot)
        fed = replace(fed, values=np.full((1, 4), value, np.float32))
        score_rounds([(buffer, buffer.advance(fed))], scorer, config())
        seen += [(s.slot, s.alert.phase) for s in buffer.snapshots()[0]]
    # At birth, at the end of the warm-up, and at once when it is pending.
    assert [at for at in seen if at[0] != 0] == [(-1, "warming"), (2, "ok"), (5, "pending")]


# -- calls -------------------------------------------------------------------------------------


def partitions(*logs: list[Reading]) -> tuple[FakeScorer, list[PartitionBuffer], Verdicts]:
    scorer = FakeScorer(known={name: i for i, name in enumerate("abcdefgh")})
    buffers = [PartitionBuffer(grid(lateness_ms=0), scorer) for _ in logs]
    turns = [(b, b.advance(batch(log))) for b, log in zip(buffers, logs, strict=True)]
    return scorer, buffers, score_rounds(turns, scorer, SCORING)


def log(names: str, slots: range) -> list[Reading]:
    return [(name, 10 * slot, float(slot), 1.0) for slot in slots for name in names]


def alone(names: str, slots: range) -> list[SlotScore]:
    return partitions(log(names, slots))[2].scores


def test_partitions_share_a_call_of_the_model() -> None:
    scorer, _, verdicts = partitions(log("ab", range(5)), log("cde", range(5)))
    # Two warming slots, then a span of two of all five entities.
    assert scorer.calls == [(5, 4, 2)]
    assert {(s.entity, s.timestamp_ms) for s in verdicts.scores} == {
        (name, 10 * slot) for name in "abcde" for slot in range(4)
    }


def test_sharing_a_call_changes_no_score() -> None:
    _, _, together = partitions(log("ab", range(9)), log("c", range(3, 12)), log("de", range(2, 7)))
    apart = [*alone("ab", range(9)), *alone("c", range(3, 12)), *alone("de", range(2, 7))]
    key = {(s.entity, s.timestamp_ms): s for s in together.scores}
    assert len(key) == len(together.scores) == len(apart)
    assert key == {(s.entity, s.timestamp_ms): s for s in apart}


def test_spans_that_start_at_different_slots_are_scored_apart_and_put_in_their_place() -> None:
    #  slot   0    1    2    3         warm-up of two slots each
    #    a    w    w    x    x         a span of two: a
    #    b         w    w    x         a span of one: b
    readings = log("a", range(1)) + log("ab", range(1, 5))
    scorer, _, verdicts = partitions(readings)
    assert sorted(scorer.calls) == [(1, 3, 2), (1, 4, 2)]
    scored = {(s.entity, s.timestamp_ms // 10): s.anomaly_score for s in verdicts.scores}
    assert [scored["a", slot] is None for slot in range(4)] == [True, True, False, False]
    assert [scored["b", slot] is None for slot in range(1, 4)] == [True, True, False]
    expected = {(s.entity, s.timestamp_ms // 10): s.anomaly_score for s in alone("b", range(1, 5))}
    assert scored["b", 3] == expected["b", 3]


def test_spans_of_one_width_from_different_partitions_go_to_their_own_slots() -> None:
    #  Partition 0 closes slots 2..3, partition 1 slots 102..103: same width, other slots.
    scorer, _, verdicts = partitions(log("a", range(5)), log("b", range(100, 105)))
    assert scorer.calls == [(2, 4, 2)]
    assert [s.timestamp_ms for s in verdicts.scores if s.entity == "b"] == [1000, 1010, 1020, 1030]


def test_a_long_backlog_is_told_of_every_round() -> None:
    scorer = FakeScorer()
    buffer = PartitionBuffer(grid(lateness_ms=0), scorer)
    beats: list[int] = []
    score_rounds(
        [(buffer, buffer.advance(batch(log("a", range(41)))))],
        scorer,
        SCORING,
        lambda: beats.append(len(scorer.calls)),
    )
    assert len(beats) >= 40 / buffer.grid.span
    assert beats == sorted(beats)
    assert max(shape[1] for shape in scorer.calls) == scorer.window - 1 + buffer.grid.span


def test_nothing_to_close_is_no_call() -> None:
    scorer, _, verdicts = partitions([], log("a", range(1)))
    assert scorer.calls == []
    assert (verdicts.scores, verdicts.alerts) == ([], [])
