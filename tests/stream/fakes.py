"""A model small enough to follow by hand, and helpers that make readings."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.buffer import Grid
from stream.decide import AlertPolicy
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


class FakeScorer:
    """Evidence is the mean of the last four slots' mean |x - mean| / scale; window of 3 slots.

    It reads the whole window (each slot's deviation is weighted), the statistics and the history,
    so that a window, a statistic or a history that is not what it should be changes the evidence.
    """

    channels = ("a", "b")
    window = 3
    history = 3
    streams = 1
    compilations = 0

    def __init__(self, known: dict[str, int] | None = None) -> None:
        self.known = known if known is not None else {"a": 0, "b": 1, "c": 2}
        self.calls: list[tuple[int, ...]] = []

    def row(self, entity: str) -> int:
        return self.known.get(entity, -1)

    def statistics(self, row: int) -> tuple[Float32, Float32]:
        return np.full(2, max(row, 0), np.float32), np.full(2, 2, np.float32)

    def fit_statistics(
        self, count: NDArray[np.float64], total: NDArray[np.float64], total_sq: NDArray[np.float64]
    ) -> tuple[Float32, Float32]:
        n = np.maximum(count, 1)
        variance = total_sq / n - (total / n) ** 2
        return (total / n).astype(np.float32), (1 + np.sqrt(np.abs(variance))).astype(np.float32)

    def detect(
        self,
        values: Float32,
        lengths: NDArray[np.int32],
        mean: Float32,
        scale: Float32,
        rows: NDArray[np.int32],
        history: Float32,
    ) -> FakeDetection:
        self.calls.append(values.shape)
        entities, width, channels = values.shape
        slots = width - self.window + 1
        assert (lengths == slots).all()
        deviation = np.nan_to_num(np.abs(values - mean[:, None]) / scale[:, None]).mean(2)
        stream = np.stack(
            [deviation[:, t : t + self.window] @ [0.25, 0.5, 1.0] for t in range(slots)], 1
        )
        joined = np.concatenate([np.nan_to_num(history[:, :, 0]), stream], 1)
        evidence = np.stack([joined[:, t : t + 4].mean(1) for t in range(slots)], 1)
        cells = np.zeros((entities, slots, channels), np.float32)
        return FakeDetection(
            evidence.astype(np.float32),
            stream[:, :, None].astype(np.float32),
            cells,
            cells - 1,
            cells + 1,
            cells + np.float32(1 / channels),
        )


def grid(**changes: int) -> Grid:
    """Slots of 10 ms, one late slot allowed, short memories."""
    settings = {
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
