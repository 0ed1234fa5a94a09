"""The records that flow through the loop: readings in, scores and alerts out."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

State = Literal["ok", "pending", "firing", "recovering", "warming", "stale"]
STATES: tuple[State, ...] = ("ok", "pending", "firing", "recovering", "warming", "stale")
ALERTING: frozenset[State] = frozenset({"firing", "recovering"})
"""An alert is on: somebody was told, and not yet that it is over."""
UNSETTLED: frozenset[State] = ALERTING | {"pending"}
"""An alert is on, or may be soon: all channels are worth telling."""


ChannelState = Literal["dead", "stuck"]
CHANNEL_STATES: tuple[ChannelState, ...] = ("dead", "stuck")
"""A dead channel has no readings, a stuck one always the same; for longer than training saw."""


class PartitionId(NamedTuple):
    """One partition of the input: the unit of order, of work and of recovery."""

    topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that could not be read, unchanged, and why."""

    topic: str
    partition: int
    offset: int
    reason: str
    error: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    """Those of the message itself."""


@dataclass(frozen=True, slots=True)
class ReadingBatch:
    """Readings of one partition in the order of the log, column by column.

    `timestamps_ms` (N,) is event time, `values` (N, D) raw units with NaN for missing, `offsets`
    (N,) the offset of the message that held the reading (several readings may share one).
    `next_offset` is where the log goes on: it counts messages that held no reading as well.
    """

    partition: PartitionId
    entities: list[str]
    timestamps_ms: NDArray[np.int64]
    values: NDArray[np.float32]
    offsets: NDArray[np.int64]
    next_offset: int
    dead_letters: tuple[DeadLetter, ...] = ()
    unknown_channels: int = 0
    counters: NDArray[np.float64] | None = None
    """The values (N, K) of the channels that are counters, exact."""
    unkeyed: int = 0
    """Messages without a key in a topic of several partitions: those are spread at random."""
    received_at: float = 0.0
    """When the oldest message of the batch was appended, in epoch seconds; 0 = unknown."""
    until_ms: int | None = None
    """Only in parts (`PartitionBuffer.divide`): the event time at their end, where that is not what
    their readings say."""

    def cut(self, at: int, offset: int) -> tuple["ReadingBatch", "ReadingBatch"]:
        """Cut before reading number `at`; messages from `offset` on are in the second part."""

        def part(chosen: slice) -> dict[str, Any]:
            return {
                "entities": self.entities[chosen],
                "timestamps_ms": self.timestamps_ms[chosen],
                "values": self.values[chosen],
                "offsets": self.offsets[chosen],
                "counters": None if self.counters is None else self.counters[chosen],
            }

        letters = self.dead_letters
        return (
            replace(
                self,
                **part(slice(at)),
                next_offset=offset,
                dead_letters=tuple(d for d in letters if d.offset < offset),
            ),
            replace(
                self,
                **part(slice(at, None)),
                dead_letters=tuple(d for d in letters if d.offset >= offset),
                # Counted with the first part.
                unknown_channels=0,
                unkeyed=0,
            ),
        )


class ChannelScore(msgspec.Struct, frozen=True, gc=False):
    """One channel of one scored slot, in the channel's own units; `None` = no reading.

    There are some of these for every score, and they are written as they are.
    """

    observed: float | None
    expected: float | None
    lower: float | None
    upper: float | None
    contribution: float


@dataclass(frozen=True, slots=True)
class SlotScore:
    """The verdict on one grid slot of one entity: the score record of the outputs topic."""

    entity: str
    timestamp_ms: int
    anomaly_score: float | None
    p_value: float | None
    state: State
    imputed_ratio: float
    model: str
    channels: dict[str, ChannelScore] = field(default_factory=dict)
    faulty: Mapping[str, ChannelState] = field(default_factory=dict)
    """Channels that are dead or stuck; a channel that is neither is not in it."""


@dataclass(frozen=True, slots=True)
class AlertEvent:
    """A change of an entity's alert state, or of its `faulty` channels (`state` may stay)."""

    entity: str
    timestamp_ms: int
    state: State
    previous: State
    since_ms: int
    anomaly_score: float | None
    channels: dict[str, ChannelScore]
    model: str
    faulty: Mapping[str, ChannelState] = field(default_factory=dict)
    summary: str = ""
    """What happened, in one plain sentence for people (`stream.words`)."""
