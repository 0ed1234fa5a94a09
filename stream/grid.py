"""The shape of event time: slots of a period, which are open, and how far back one looks."""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tsdiff.history import RATE_LOOKBACK

# A partition without any reading has no watermark yet.
NO_WATERMARK = -(2**62)

_Times = TypeVar("_Times", int, NDArray[np.int64])


@dataclass(frozen=True)
class Grid:
    """The shape of time: all counts are grid slots."""

    period_ms: int
    channels: int
    window: int
    history: int
    streams: int
    lateness_ms: int = 0
    warmup_slots: int = 16
    """Slots an entity of the training set spends in `warming`: its first window fills up."""
    newcomer_slots: int = 256
    """The same for an entity never seen in training: its statistics are collected meanwhile."""
    stale_after_slots: int = 5
    ttl_slots: int = 1440
    decision_slots: int = 8
    """How many past scores the alert rule looks back on; they are rebuilt by priming."""
    snapshot_slots: int = 64
    span: int = 16
    """At most so many slots of an entity are closed at a time, which bounds the ring."""
    lag: int = 0
    """Slots that must have closed after a slot before it is scored."""
    block: int = 0
    """Slots that entities learn from at a time, 0: they do not."""
    context: int = 0
    """Slots before a block that learning needs besides."""
    counters: tuple[int, ...] = ()
    """Channels that are read as counters and scored as rates per second."""
    close_complete: bool = False
    """Whether an entity's slot closes, ahead of the others', once all its channels are read."""

    def __post_init__(self) -> None:
        """Refuse what the bookkeeping of learning cannot follow."""
        if 0 < self.block < self.span:
            raise ValueError(f"expected blocks of at least {self.span} slots, got {self.block}")

    @property
    def lateness_slots(self) -> int:
        """Open slots behind the watermark's own."""
        return -(-self.lateness_ms // self.period_ms)

    @property
    def reach(self) -> int:
        """Slots kept before those being scored: the window's, or the block's to learn from."""
        return max(self.window - 1, self.block + self.context - 1 - self.lag, self.lookback)

    @property
    def lookback(self) -> int:
        """Slots before a slot that the rates of its counters need."""
        return RATE_LOOKBACK if self.counters else 0

    @property
    def ring(self) -> int:
        """Slots kept per entity: what reaches back, a span being scored, and what is still open."""
        return self.reach + self.span + self.lag + self.lateness_slots + 2

    @property
    def settling_slots(self) -> int:
        """How far back a slot's streams and its alert state look."""
        return self.history + self.decision_slots

    @property
    def replay_slots(self) -> int:
        """How far back the log must be read so that priming rebuilds everything exactly."""
        scores = self.window - 1 + self.settling_slots
        snapshot = self.lag + self.snapshot_slots + self.span + 1
        if self.block:
            # What a snapshot holds was learned before all this, up to a block ago.
            return snapshot + self.settling_slots + self.block + self.window + self.lookback
        return max(scores, snapshot) + self.lookback

    def closed_before(self, watermark_ms: _Times) -> _Times:
        """The first slot that is still open at this watermark, or at each of many."""
        return (watermark_ms - self.lateness_ms) // self.period_ms

    def watermark_before(self, slot: int) -> int:
        """The least watermark at which all slots before this one are closed."""
        return slot * self.period_ms + self.lateness_ms

    def last_scored(self, watermark_ms: int) -> int:
        """The last slot that has been scored at this watermark."""
        return self.closed_before(watermark_ms) - self.lag - 1


class ReplayPoint(NamedTuple):
    """Where reading must start again, and the watermark just before that offset."""

    offset: int
    watermark_ms: int
