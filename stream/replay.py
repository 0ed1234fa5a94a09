"""Parquet history sent to Kafka as if it happened now: for drills, tests and demos.

Readings of all entities are merged by time, so the topic looks as it would have at the time, and
each message is keyed by its entity, so an entity stays within one partition.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.errors import StreamError
from tsdiff.errors import ConfigError
from tsdiff.history import History

StartAt = Literal["original", "now"]

# kafka-python bounds neither the messages nor the bytes that wait to be sent. Two to the 14th of
# 38 channels are 15 MB, and keep batches full.
MAX_IN_FLIGHT = 16_384
# kafka-python's own limit for a delivery is 120 s; past it a message will never have an answer.
DELIVERY_TIMEOUT_S = 130.0
_PROGRESS_INTERVAL_S = 0.2

# What a producer for a replay should be given beside its servers: with kafka-python's own defaults
# (no linger, 16 KiB batches) a full-speed replay is three to four times slower.
PRODUCER_KWARGS: Mapping[str, Any] = MappingProxyType(
    {"acks": "all", "linger_ms": 20, "batch_size": 256 * 1024, "max_request_size": 4 * 1024 * 1024}
)


class SendResult(Protocol):
    """The pending answer to one message, as kafka-python's future."""

    is_done: bool

    def get(self, timeout: float | None = None) -> Any:  # noqa: ANN401
        """Wait for the answer; raises what went wrong."""
        ...


class Producer(Protocol):
    """The part of `kafka.KafkaProducer` that a replay uses."""

    def send(self, topic: str, value: bytes, key: bytes) -> SendResult:
        """Hand over one message."""
        ...

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every message has its answer."""
        ...


@dataclass(frozen=True)
class ReplayProgress:
    """How far a replay has come; `timestamp_ms` is that of the last reading, as it was sent."""

    sent: int
    total: int
    timestamp_ms: int


@dataclass(frozen=True)
class ReplaySummary:
    """What a replay did; times are those of the readings, as they were sent (None: no reading)."""

    messages: int
    entities: int
    bytes: int
    first_timestamp_ms: int | None
    last_timestamp_ms: int | None
    seconds: float


def replay(
    history: History,
    producer: Producer,
    topic: str,
    *,
    period_ms: int,
    speed: float | None = 1.0,
    start_at: StartAt = "original",
    progress: Callable[[ReplayProgress], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> ReplaySummary:
    """Send a history's readings as native messages, in order of time; returns once all are stored.

    Args:
        history: what `tsdiff.history.load_history` gives.
        producer: a `kafka.KafkaProducer`, best made with `PRODUCER_KWARGS`; it stays open.
        topic: where the readings go.
        period_ms: length of a grid slot; "now" moves readings by whole slots.
        speed: how many times faster than it happened; None = as fast as it goes.
        start_at: "original" leaves the times as they are. "now" moves them so that no reading is
            ahead of the wall clock when it is sent: in real time or slower the first reading is
            from now; faster, the last one will be.
        progress: called some five times a second, and at the end.
        sleep: waits for seconds.
        clock: wall time in seconds since the epoch.

    Raises:
        ConfigError: `speed` or `period_ms` is not above 0.
        StreamError: a message was not stored; nothing is lost without this.

    """
    if speed is not None and not (speed > 0 and math.isfinite(speed)):
        raise ConfigError(f"replay: expected a speed above 0 such as 1 or 600, got {speed:g}")
    if period_ms <= 0:
        raise ConfigError(f"replay: expected a period above 0 ms, got {period_ms}")
    timestamps_ms, entity_of, row_of = _merge(history)
    total = len(timestamps_ms)
    begun = clock()
    if total == 0:
        return ReplaySummary(0, 0, 0, None, None, 0.0)
    first_ms, last_ms = int(timestamps_ms[0]), int(timestamps_ms[-1])
    shift_ms = 0
    if start_at == "now":
        shift_ms = _shift_to_now_ms(first_ms, last_ms, begun, speed, period_ms)
    pending = _Pending(producer, topic)
    encode = msgspec.json.Encoder().encode
    names = [entity.entity for entity in history.entities]
    keys = [name.encode() for name in names]
    values = [entity.values for entity in history.entities]
    channels = history.channels
    sent_bytes = 0
    told_at = begun
    for begin, end in _groups(timestamps_ms):
        original_ms = int(timestamps_ms[begin])
        now = clock()
        if speed is not None:
            wait_s = begun + (original_ms - first_ms) / 1000 / speed - now
            if wait_s > 0:
                pending.check()  # a long sleep is no reason to hide a failure
                sleep(wait_s)
                now = clock()
        timestamp_ms = original_ms + shift_ms
        for entity, row in zip(
            entity_of[begin:end].tolist(), row_of[begin:end].tolist(), strict=True
        ):
            reading = dict(zip(channels, values[entity][row].tolist(), strict=True))
            message = encode(
                {"entity": names[entity], "timestamp": timestamp_ms, "values": reading}
            )
            sent_bytes += len(message)
            pending.send(message, keys[entity])
        if progress is not None and now - told_at >= _PROGRESS_INTERVAL_S:
            told_at = now
            progress(ReplayProgress(end, total, timestamp_ms))
    pending.finish()
    if progress is not None:
        progress(ReplayProgress(total, total, last_ms + shift_ms))
    return ReplaySummary(
        messages=total,
        entities=sum(len(entity.timestamps_ms) > 0 for entity in history.entities),
        bytes=sent_bytes,
        first_timestamp_ms=first_ms + shift_ms,
        last_timestamp_ms=last_ms + shift_ms,
        seconds=max(0.0, clock() - begun),
    )


def _merge(
    history: History,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Order all readings by time, and by entity where times are equal: (time, entity, row)."""
    lengths = [len(entity.timestamps_ms) for entity in history.entities]
    if not sum(lengths):
        return np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64)
    timestamps_ms = np.concatenate([entity.timestamps_ms for entity in history.entities])
    entity_of = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    row_of = np.concatenate([np.arange(length) for length in lengths])
    order = np.argsort(timestamps_ms, kind="stable")
    return timestamps_ms[order], entity_of[order], row_of[order]


def _groups(timestamps_ms: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut ascending times into runs of equal ones: (begin, end) of each."""
    bounds = np.flatnonzero(np.diff(timestamps_ms)) + 1
    edges = [0, *bounds.tolist(), len(timestamps_ms)]
    return pairwise(edges)


def _shift_to_now_ms(
    first_ms: int, last_ms: int, now_s: float, speed: float | None, period_ms: int
) -> int:
    """Whole slots to move by so that no reading is ahead of the clock when it is sent."""
    span_ms = last_ms - first_ms
    duration_ms = 0.0 if speed is None else span_ms / speed
    # Faster than it happened, the history has to begin in the past to end in the present.
    first_shown_ms = now_s * 1000 - max(0.0, span_ms - duration_ms)
    # Whole slots, so that what shared a slot still does; down, never into the future.
    return math.floor((first_shown_ms - first_ms) / period_ms) * period_ms


class _Pending:
    """Messages handed over and not yet stored; none is let go before its answer was seen."""

    def __init__(self, producer: Producer, topic: str) -> None:
        self._producer = producer
        self._topic = topic
        self._results: deque[SendResult] = deque()
        self._stored = 0

    def send(self, message: bytes, key: bytes) -> None:
        try:
            self._results.append(self._producer.send(self._topic, value=message, key=key))
        except Exception as error:
            raise self._failure(error) from error
        if len(self._results) >= MAX_IN_FLIGHT:
            # Half at once: to wait for one at a time would send one at a time.
            for _ in range(MAX_IN_FLIGHT // 2):
                self._take()

    def check(self) -> None:
        """Look at the answers that have come."""
        while self._results and self._results[0].is_done:
            self._take()

    def finish(self) -> None:
        """Wait for all answers."""
        try:
            self._producer.flush(DELIVERY_TIMEOUT_S)
        except Exception as error:
            raise self._failure(error) from error
        while self._results:
            self._take()

    def _take(self) -> None:
        try:
            self._results.popleft().get(DELIVERY_TIMEOUT_S)
        except Exception as error:
            raise self._failure(error) from error
        self._stored += 1

    def _failure(self, error: Exception) -> StreamError:
        return StreamError(
            f"replay: expected every reading to be stored in {self._topic}, got "
            f"{type(error).__name__}: {' '.join(str(error).split())} "
            f"after {self._stored} stored readings"
        )
