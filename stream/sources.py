"""Where readings come from: Kafka, Parquet history, or memory (tests).

A source yields batches per partition and says where a partition begins: `Resume` carries the
committed offset, what its commit metadata knew, and the snapshots of its entities.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import structlog
from kafka import KafkaConsumer
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaConfigurationError, KafkaError
from kafka.structs import TopicPartition

from stream.buffer import EntitySnapshot
from stream.clients import connect
from stream.codec import Columns, CommitMetadata, decode_snapshot
from stream.config import ServiceConfig
from stream.errors import DecodeError, RetryableError, StreamError
from stream.formats import Decoded, Decoder
from stream.records import DeadLetter, PartitionId, ReadingBatch
from tsdiff.history import History

_log = structlog.get_logger("tsdiff.source")

# Between attempts to reach a broker or a topic that is not there (yet).
RETRY_SECONDS: Final = 2.0
# Most time one poll waits for readings; it bounds the reaction to signals and rebalances.
POLL_MS: Final = 200
# The state topic is read in one go at each assignment.
STATE_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True)
class Resume:
    """How a partition begins."""

    next_offset: int | None = None
    """First offset that was not processed yet; `None` = nothing was committed."""
    metadata: CommitMetadata | None = None
    snapshots: tuple[EntitySnapshot, ...] = ()


@dataclass
class Polled:
    """What one poll brought."""

    batches: list[ReadingBatch] = field(default_factory=list)
    assigned: dict[PartitionId, Resume] = field(default_factory=dict)
    revoked: set[PartitionId] = field(default_factory=set)
    generation: Any = None
    """Whom the group took us for when these readings were read: it fences late commits."""
    ended: bool = False


class Source(Protocol):
    """Where batches of readings come from."""

    def poll(self) -> Polled:
        """Return what has arrived; wait a moment for it where it is live."""

    def rewind(self) -> None:
        """Forget what was read since the last commit; the next poll assigns everything anew."""

    def lag(self) -> Mapping[PartitionId, int]:
        """Records between the position and the end of each partition."""

    def close(self) -> None:
        """Let go of the partitions."""


class MemorySource:
    """Batches given beforehand, for tests and for the shape of the protocol."""

    def __init__(
        self,
        batches: Iterable[ReadingBatch],
        resume: Callable[[PartitionId], Resume] = lambda _: Resume(),
    ) -> None:
        self._all = list(batches)
        self._resume = resume
        self._waiting = deque(self._all)
        self._known: set[PartitionId] = set()

    def poll(self) -> Polled:
        """Return the next batch."""
        if not self._waiting:
            return Polled(ended=True)
        batch = self._waiting.popleft()
        assigned = {}
        if batch.partition not in self._known:
            self._known.add(batch.partition)
            assigned[batch.partition] = self._resume(batch.partition)
        return Polled(batches=[batch], assigned=assigned)

    def rewind(self) -> None:
        """Start from the first batch again."""
        self._waiting = deque(self._all)
        self._known.clear()

    def lag(self) -> Mapping[PartitionId, int]:
        """Readings not yet polled."""
        lag: dict[PartitionId, int] = {}
        for batch in self._waiting:
            lag[batch.partition] = lag.get(batch.partition, 0) + len(batch.entities)
        return lag

    def close(self) -> None:
        """Nothing to let go of."""


PARQUET_PARTITION: Final = PartitionId("parquet", 0)
# Readings a batch of history: enough to fill the model's batches, little enough to see progress.
_HISTORY_BATCH: Final = 4096


def history_batches(history: History) -> Iterator[ReadingBatch]:
    """All entities of a history merged in the order of time, as one partition."""
    names = [entity.entity for entity in history.entities]
    timestamps = np.concatenate([e.timestamps_ms for e in history.entities])
    owner = np.repeat(np.arange(len(names)), [len(e.timestamps_ms) for e in history.entities])
    row = np.concatenate([np.arange(len(e.timestamps_ms)) for e in history.entities])
    # Stable: entities keep their order within one instant.
    order = np.argsort(timestamps, kind="stable")
    for begin in range(0, len(order), _HISTORY_BATCH):
        chosen = order[begin : begin + _HISTORY_BATCH]
        pairs = list(zip(owner[chosen].tolist(), row[chosen].tolist(), strict=True))
        counters = [e.counters for e in history.entities if e.counters is not None]
        yield ReadingBatch(
            partition=PARQUET_PARTITION,
            entities=[names[e] for e in owner[chosen]],
            timestamps_ms=timestamps[chosen],
            values=np.stack([history.entities[e].values[r] for e, r in pairs]),
            offsets=np.arange(begin, begin + len(chosen)),
            next_offset=begin + len(chosen),
            counters=np.stack([counters[e][r] for e, r in pairs]) if counters else None,
        )


class HistorySource:
    """History read once, from its first reading to its last."""

    def __init__(self, history: History, progress: Callable[[int], None]) -> None:
        self.total = sum(len(e.timestamps_ms) for e in history.entities)
        self._batches = history_batches(history)
        self._progress = progress
        self._done = 0

    def poll(self) -> Polled:
        """Return the next batch, and tell how many readings are done before it."""
        self._progress(self._done)
        batch = next(self._batches, None)
        if batch is None:
            return Polled(ended=True)
        assigned = {} if self._done else {batch.partition: Resume()}
        self._done += len(batch.entities)
        return Polled(batches=[batch], assigned=assigned)

    def rewind(self) -> None:
        """History has no commits to go back to; a backfill that fails begins anew."""
        raise StreamError("a backfill cannot go back; start it again")

    def lag(self) -> Mapping[PartitionId, int]:
        """Readings not yet polled."""
        return {PARQUET_PARTITION: self.total - self._done}

    def close(self) -> None:
        """Nothing to let go of."""


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Writes down what the group decided; it is called on kafka-python's own thread."""

    def __init__(self, events: deque[tuple[str, list[TopicPartition]]]) -> None:
        self._events = events

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self._events.append(("revoked", list(revoked)))

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._events.append(("assigned", list(assigned)))

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self._events.append(("revoked", list(lost)))


class KafkaSource:
    """A member of a consumer group that decodes messages itself, so that none can stop it."""

    def __init__(
        self,
        config: ServiceConfig,
        channels: Sequence[str],
        decoder: Decoder,
        period_ms: int,
        *,
        counters: Sequence[int] = (),
        client_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._config = config
        self._channels = tuple(channels)
        self._decoder = decoder
        self._period_ms = period_ms
        self._counters = tuple(counters)
        self._options = dict(client_options or {})
        self._events: deque[tuple[str, list[TopicPartition]]] = deque()
        # Partitions that replay an earlier part of the log, and up to which offset.
        self._replaying: dict[TopicPartition, int] = {}
        self._rewind = False
        try:
            self._consumer = connect(
                KafkaConsumer,
                **config.input.consumer_kwargs(),
                partition_assignment_strategy=[CooperativeStickyAssignor],
                **self._options,
            )
        except KafkaConfigurationError as error:
            raise StreamError(f"kafka-python refuses the settings of input: {error}") from error
        except KafkaError as error:
            raise RetryableError(f"no consumer: {error!r}") from error
        self._consumer.subscribe([config.input.topic], listener=_Listener(self._events))

    @property
    def consumer(self) -> KafkaConsumer:
        """For committing offsets in at-least-once mode."""
        return self._consumer

    def poll(self) -> Polled:
        """Fetch, decode, and follow the group's decisions.

        Raises:
            RetryableError: the broker did not answer while a partition was being resumed.

        """
        polled = Polled()
        fetched = self._consumer.poll(timeout_ms=POLL_MS)
        # Taken before the events are read: what the group decides after this has a later
        # generation, and the broker refuses a commit under an earlier one.
        polled.generation = self._consumer.group_metadata()
        try:
            self._follow_group(polled)
        except KafkaError as error:
            self._rewind = True
            raise RetryableError(f"resuming partitions failed: {error!r}") from error
        for partition, records in fetched.items():
            if PartitionId(*partition) in polled.assigned:
                # Fetched before we knew where to begin; where nothing was committed, here.
                if polled.assigned[PartitionId(*partition)].next_offset is None:
                    self._consumer.seek(partition, records[0].offset)
                continue
            if PartitionId(*partition) in polled.revoked:
                continue
            polled.batches.append(self._decode(partition, records))
            if records[-1].offset + 1 >= self._replaying.get(partition, 0):
                self._replaying.pop(partition, None)
        for partition, until in list(self._replaying.items()):
            # What was to be replayed may be gone (retention), or be nothing but markers.
            # Once more for a partition in `fetched` would be a second batch of it in this poll.
            if partition not in fetched and self._consumer.position(partition) >= until:
                del self._replaying[partition]
                polled.batches.append(self._decode(partition, [], until))
        return polled

    def _follow_group(self, polled: Polled) -> None:
        assigned: set[TopicPartition] = set()
        if self._rewind:
            assigned |= set(self._consumer.assignment())
            self._rewind = False
        while self._events:
            kind, partitions = self._events.popleft()
            if kind == "revoked":
                polled.revoked |= {PartitionId(*p) for p in partitions}
                assigned -= set(partitions)
                for partition in partitions:
                    self._replaying.pop(partition, None)
            else:
                assigned |= set(partitions)
        assigned &= set(self._consumer.assignment())
        if not assigned:
            return
        snapshots = read_snapshots(self._config, sorted(assigned), self._options)
        for partition in sorted(assigned):
            resume = self._resume(partition, snapshots[partition.partition])
            polled.assigned[PartitionId(*partition)] = resume

    def _resume(self, partition: TopicPartition, snapshots: list[EntitySnapshot]) -> Resume:
        committed = self._consumer.committed(partition, metadata=True, timeout_ms=30_000)
        if committed is None or committed.offset < 0:
            _log.info("partition assigned", partition=partition.partition, committed=None)
            return Resume()
        metadata = CommitMetadata.decode(committed.metadata or "")
        if metadata is None or metadata.period_ms != self._period_ms:
            _log.warning(
                "commit metadata is missing, of another version or another period: the entities "
                "of this partition warm up again",
                topic=partition.topic,
                partition=partition.partition,
                offset=committed.offset,
            )
            self._consumer.seek(partition, committed.offset)
            return Resume(committed.offset)
        self._consumer.seek(partition, metadata.replay_offset)
        self._replaying[partition] = committed.offset
        _log.info(
            "partition assigned",
            partition=partition.partition,
            committed=committed.offset,
            replay_from=metadata.replay_offset,
            entities=len(snapshots),
        )
        return Resume(committed.offset, metadata, tuple(snapshots))

    def _decode(
        self, partition: TopicPartition, records: Sequence[Any], next_offset: int | None = None
    ) -> ReadingBatch:
        columns = Columns(self._channels, self._counters)
        letters = []
        for record in records:
            try:
                for reading in self._readings(record):
                    columns.add(reading, record.offset)
            except DecodeError as error:
                _log.warning(
                    "dead letter",
                    reason=error.reason,
                    error=str(error),
                    topic=record.topic,
                    partition=record.partition,
                    offset=record.offset,
                )
                letters.append(
                    DeadLetter(
                        record.topic,
                        record.partition,
                        record.offset,
                        error.reason,
                        str(error),
                        record.key,
                        record.value,
                        # A header may have no value at all, but cannot be written so again.
                        tuple((name, content or b"") for name, content in record.headers),
                    )
                )
        return ReadingBatch(
            partition=PartitionId(*partition),
            entities=columns.entities,
            timestamps_ms=np.array(columns.timestamps_ms, np.int64),
            values=columns.values(),
            offsets=np.array(columns.offsets, np.int64),
            next_offset=records[-1].offset + 1 if next_offset is None else next_offset,
            dead_letters=tuple(letters),
            unknown_channels=columns.unknown_channels,
            counters=columns.counters(),
            received_at=records[0].timestamp / 1000 if records else 0.0,
        )

    def _readings(self, record: Any) -> Sequence[Decoded]:  # noqa: ANN401 - kafka-python is untyped
        value: bytes | None = record.value
        if not value:
            raise DecodeError("empty", "expected a message, got a record without a value")
        limit = self._config.input.max_message_bytes
        if len(value) > limit:
            raise DecodeError(
                "too_large",
                f"expected at most {limit} bytes, got {len(value)}; raise input.max_message_bytes",
            )
        readings = self._decoder(value)
        # The log's own time, not the wall clock: a replay must decide the same again.
        newest = record.timestamp + self._config.grid.max_ahead_ms
        for reading in readings:
            if record.timestamp >= 0 and reading.timestamp_ms > newest:
                raise DecodeError(
                    "future_timestamp",
                    f"expected a timestamp at most {self._config.grid.max_ahead_ms / 1000:g} s "
                    f"after the message's own ({record.timestamp}), got {reading.timestamp_ms}; "
                    "check the sender's clock or raise grid.max_ahead",
                )
        return readings

    def rewind(self) -> None:
        """Resume every partition from its last commit with the next poll."""
        self._rewind = True

    def lag(self) -> Mapping[PartitionId, int]:
        """Records between the position and the end of each partition, as far as known."""
        lag = {}
        for partition in self._consumer.assignment():
            end = self._consumer.highwater(partition)
            if end is not None and partition not in self._replaying:
                lag[PartitionId(*partition)] = max(0, end - self._consumer.position(partition))
        return lag

    def close(self) -> None:
        """Leave the group at once, so that the others take over without waiting."""
        self._consumer.close(autocommit=False, timeout_ms=10_000)


def state_key(group: str, entity: str) -> bytes:
    """Key of an entity in the state topic; services of several groups may share the topic."""
    return f"{group}\x00{entity}".encode()


def read_snapshots(
    config: ServiceConfig,
    partitions: Sequence[TopicPartition],
    client_options: Mapping[str, Any],
) -> dict[int, list[EntitySnapshot]]:
    """Read the state topic's partitions that belong to these input partitions, to their ends.

    Raises:
        RetryableError: the end was not reached in time.

    """
    wanted = [TopicPartition(config.outputs.state, p.partition) for p in partitions]
    latest: dict[int, dict[bytes, EntitySnapshot]] = {p.partition: {} for p in partitions}
    prefix = state_key(config.input.group, "")
    options = {
        **config.input.client_kwargs(),
        "allow_auto_create_topics": False,
        "enable_auto_commit": False,
        **client_options,
    }
    # The very end, not the last stable offset: a transaction of the previous owner whose offsets
    # we have already seen committed may still lack its marker here.
    with connect(KafkaConsumer, **options) as plain:
        ends = plain.end_offsets(wanted)
    with connect(KafkaConsumer, **options, isolation_level="read_committed") as consumer:
        consumer.assign(wanted)
        consumer.seek_to_beginning(*wanted)
        deadline = time.monotonic() + STATE_TIMEOUT_S
        while any(consumer.position(p) < ends[p] for p in wanted):
            if time.monotonic() > deadline:
                raise RetryableError(
                    f"the end of {config.outputs.state} was not reached in {STATE_TIMEOUT_S:.0f} s"
                )
            for partition, records in consumer.poll(timeout_ms=POLL_MS).items():
                found = latest[partition.partition]
                for record in records:
                    if record.key is None or not record.key.startswith(prefix):
                        continue
                    found.pop(record.key, None)
                    snapshot = None if record.value is None else decode_snapshot(record.value)
                    if snapshot is not None:
                        found[record.key] = snapshot
    return {partition: list(found.values()) for partition, found in latest.items()}
