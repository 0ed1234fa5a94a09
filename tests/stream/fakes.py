"""A model small enough to follow by hand, and helpers that make readings."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.decide import AlertPolicy
from stream.grid import Grid
from stream.records import PartitionId, ReadingBatch
from stream.scoring import ScoringConfig

PARTITION = PartitionId("in", 0)
Float32 = NDArray[np.float32]


class FakeDetection(NamedTuple):
    """As `tsdiff.detector.Detection`, without what nobody reads here."""

    evidence: Float32
    streams: Float32
    expected: Float32
    lower: Float32
    upper: Float32
    contribution: Float32


class FakeLearner:
    """The state is a level, and how far neighbours go together.

    Slots of evidence below 3 and a bit of the level teach, others half as much.
    """

    block = 6
    context = 1
    size = 2
    key = "fake"
    entity_bytes = 16

    def learns(self, row: int) -> bool:
        return row != 1

    def phase(self, entity: str) -> int:
        return len(entity) % self.block

    def weights(
        self, streams: Float32, rows: NDArray[np.int32], states: Sequence[Float32 | None]
    ) -> Float32:
        assert streams.shape[0] == len(rows) == len(states)
        levels = [0.0 if state is None else float(state[0]) for state in states]
        evidence = streams[..., 0]
        usual = evidence < 3 + 0.1 * np.array(levels)[:, None]
        return np.where(np.isnan(evidence), 0.0, np.where(usual, 1.0, 0.5)).astype(np.float32)

    def learn(
        self,
        row: int,
        state: Float32 | None,
        values: Float32,
        slots: NDArray[np.int64],
        weights: Float32,
        mean: Float32,
        scale: Float32,
    ) -> Float32:
        assert values.shape == (self.block + self.context, 2)
        assert not weights[: self.context].any()
        assert (np.diff(slots) == 1).all()
        known = np.nan_to_num((values - mean) / scale - _season(slots)).mean(1)
        level = (weights * known).sum()
        together = (weights[1:] * known[1:] * known[:-1]).sum()
        before = np.zeros(2, np.float32) if state is None else state
        return np.asarray(0.5 * before + 0.1 * np.array([level, together]) + row, np.float32)


def _season(slots: NDArray[np.int64]) -> Float32:
    """What depends on the slots' own numbers, one column."""
    return np.asarray((slots % 5)[..., None] * 0.01, np.float32)


class FakeScorer:
    """Evidence is the mean of some slots' mean |x - mean| / scale; window of 3 slots.

    It reads the whole window (each slot's deviation is weighted), the statistics, the state, the
    history and what follows, so that any of them that is not what it should be changes the
    evidence: the streams of four slots up to the scored one, and of `lag` after it.
    """

    channels = ("a", "b")
    window = 3
    streams = 1
    compilations = 0

    def __init__(
        self,
        known: dict[str, int] | None = None,
        *,
        lag: int = 0,
        adaptation: FakeLearner | None = None,
        longest: int = 2**20,
    ) -> None:
        self.known = known if known is not None else {"a": 0, "b": 1, "c": 2}
        self.lag, self.history, self.adaptation = lag, 3 + lag, adaptation
        self.longest = longest
        self.calls: list[tuple[int, ...]] = []

    def grid(self, **changes: int) -> Grid:
        """The grid of `grid`, as this scorer needs it."""
        learner = self.adaptation
        learning = {"block": learner.block, "context": learner.context} if learner else {}
        return grid(history=self.history, lag=self.lag, **learning, **changes)

    def row(self, entity: str) -> int:
        return self.known.get(entity, -1)

    def statistics(self, row: int) -> tuple[Float32, Float32]:
        return np.full(2, max(row, 0), np.float32), np.full(2, 2, np.float32)

    def longest_runs(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        return np.full((len(rows), 2, 2), self.longest, np.int32)

    def fit_statistics(
        self, count: NDArray[np.float64], total: NDArray[np.float64], total_sq: NDArray[np.float64]
    ) -> tuple[Float32, Float32]:
        n = np.maximum(count, 1)
        variance = total_sq / n - (total / n) ** 2
        return (total / n).astype(np.float32), (1 + np.sqrt(np.abs(variance))).astype(np.float32)

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
        entities, width, channels = values.shape
        assert slots.shape == values.shape[:2]
        span = width - self.window + 1 - self.lag
        beyond = np.arange(span) >= lengths[:, None]
        assert lengths.max() == span
        drift = np.zeros((entities, channels), np.float32)
        for i, state in enumerate(states or ()):
            drift[i] = 0 if state is None else state
        centre = mean + drift * scale
        off = (values - centre[:, None]) / scale[:, None] - _season(slots)
        deviation = np.nan_to_num(np.abs(off)).mean(2)
        deviation = deviation[:, self.lag :]
        stream = np.stack(
            [deviation[:, t : t + self.window] @ [0.25, 0.5, 1.0] for t in range(span)], 1
        )
        joined = np.concatenate([np.nan_to_num(history[:, :, 0]), stream], 1)
        reach = 4 + self.lag
        evidence = np.stack([joined[:, t : t + reach].mean(1) for t in range(span)], 1)
        evidence[beyond] = stream[beyond] = np.nan
        cells = np.zeros((entities, span, channels), np.float32)
        return FakeDetection(
            evidence.astype(np.float32),
            stream[:, :, None].astype(np.float32),
            cells,
            cells - 1,
            cells + 1,
            cells + np.float32(1 / channels),
        )


def grid(**changes: Any) -> Grid:  # noqa: ANN401 - as Grid
    """Slots of 10 ms, one late slot allowed, short memories."""
    settings: dict[str, Any] = {
        "period_ms": 10,
        "channels": 2,
        "window": 3,
        "history": 3,
        "streams": 1,
        "lateness_ms": 10,
        "warmup_slots": 2,
        "newcomer_slots": 5,
        "stale_after_slots": 2,
        "ttl_slots": 30,
        "decision_slots": POLICY.memory_slots,
        "snapshot_slots": 7,
        "span": 4,
    }
    return Grid(**{**settings, **changes})


POLICY = AlertPolicy(
    trigger=1.0, recovery=0.8, m=2, n=3, recovery_slots=2, minimum_slots=2, stale_after_slots=2
)
SCORING = ScoringConfig(model="fake@0", period_ms=10, threshold=2.0, policy=POLICY)

Reading = tuple[str, int, float | None, float | None]


def batch(readings: list[Reading], first_offset: int = 0) -> ReadingBatch:
    """Readings (entity, timestamp_ms, a, b) of one partition, one message each."""
    values = np.array([[r[2], r[3]] for r in readings], np.float32).reshape(len(readings), 2)
    return ReadingBatch(
        partition=PARTITION,
        entities=[r[0] for r in readings],
        timestamps_ms=np.array([r[1] for r in readings], np.int64),
        values=values,
        offsets=np.arange(first_offset, first_offset + len(readings)),
        next_offset=first_offset + len(readings),
    )
