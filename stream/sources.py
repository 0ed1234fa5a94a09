"""Where readings come from: Kafka, Parquet history, or memory (tests).

A source yields batches per partition and says where a partition begins: `Resume` carries the
committed offset, what its commit metadata knew, and the snapshots of its entities.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import structlog
from kafka import KafkaConsumer
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.coordinator.base import MemberState
from kafka.errors import (
    AuthorizationError,
    FencedInstanceIdError,
    KafkaConfigurationError,
    KafkaError,
    LogTruncationError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)
from kafka.structs import TopicPartition

from stream.buffer import UNKNOWN_OFFSET, EntitySnapshot
from stream.clients import connect
from stream.codec import Columns, CommitMetadata, decode_snapshot
from stream.config import ServiceConfig
from stream.errors import DecodeError, RetryableError, StreamError
from stream.formats import Decoded, Decoder
from stream.grid import Grid
from stream.records import DeadLetter, PartitionId, ReadingBatch
from stream.stall import StallWatch
from stream.topics import grow_state
from tsdiff.history import History

_log = structlog.get_logger("tsdiff.source")

# Between attempts to reach a broker or a topic that is not there (yet).
RETRY_SECONDS: Final = 2.0
# Most time one poll waits for readings; it bounds the reaction to signals and rebalances.
POLL_MS: Final = 200
# The state topic is read in one go at each assignment.
STATE_TIMEOUT_S: Final = 60.0
# The broker has so long to say where a partition was committed; SIGTERM waits for it as well.
_COMMITTED_MS: Final = 10_000
# A look at whether partitions stall may hold up the loop no longer than this.
_LOOK_MS: Final = 2_000


Loss = Literal["readings", "replay", "metadata", "log", "offsets", "partitions"]
LOSSES: Final[Mapping[Loss, str]] = {
    "readings": "readings are gone that were not processed yet; the entities of this partition "
    "warm up again",
    "replay": "readings are gone from which windows are rebuilt; the entities of this partition "
    "warm up again",
    "metadata": "commit metadata is missing, of another version or another period; this partition "
    "begins at its committed offset, and its entities anew",
    "log": "the partition is shorter than what was committed, as if the topic had been created "
    "again; it begins at its start, and its entities anew",
    "offsets": "there is state but no committed offset, as if the topic had been created again or "
    "the group's offsets had expired; the partition begins where input.auto_offset_reset says, and "
    "its entities anew",
    "partitions": "a partition was added to the topic; the entities that move into it warm up "
    "again, and go stale in the one they left",
}
"""What a partition cannot go on with as it was, and what is done about it."""


@dataclass(frozen=True)
class Resume:
    """How a partition begins."""

    next_offset: int | None = None
    """First offset that was not processed yet; `None` = nothing was committed."""
    metadata: CommitMetadata | None = None
    snapshots: tuple[EntitySnapshot, ...] = ()
    lost: Loss | None = None
    """Why not all can be rebuilt as it was at the commit."""


@dataclass
class Polled:
    """What one poll brought."""

    batches: list[ReadingBatch] = field(default_factory=list)
    assigned: dict[PartitionId, Resume] = field(default_factory=dict)
    revoked: set[PartitionId] = field(default_factory=set)
    generation: Any = None
    """Whom the group took us for when these readings were read: it fences late commits."""
    stalled: int = 0
    """Partitions that were not read on, and are begun again."""
    ended: bool = False


class Source(Protocol):
    """Where batches of readings come from."""

    def poll(self) -> Polled:
        """Return what has arrived; wait a moment for it where it is live."""

    def rewind(self) -> None:
        """Forget what was read since the last commit; the next poll assigns everything anew."""

    def hold(self, partitions: Set[PartitionId]) -> None:
        """Read no more of these, and of all others again."""

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
        self._held: Set[PartitionId] = frozenset()

    def poll(self) -> Polled:
        """Return the next batch."""
        if self._waiting and self._waiting[0].partition in self._held:
            return Polled()
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

    def hold(self, partitions: Set[PartitionId]) -> None:
        """Keep what is next, if it is of these."""
        self._held = frozenset(partitions)

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
        self._held = False
        self.done = 0
        """Readings polled so far."""

    def poll(self) -> Polled:
        """Return the next batch, and tell how many readings are done before it."""
        if self._held:
            return Polled()
        self._progress(self.done)
        batch = next(self._batches, None)
        if batch is None:
            return Polled(ended=True)
        assigned = {} if self.done else {batch.partition: Resume()}
        self.done += len(batch.entities)
        return Polled(batches=[batch], assigned=assigned)

    def rewind(self) -> None:
        """History has no commits to go back to; a backfill that fails begins anew."""
        raise StreamError("a backfill cannot go back; start it again")

    def hold(self, partitions: Set[PartitionId]) -> None:
        """Keep what is next until its only partition is not held any more."""
        self._held = bool(partitions)

    def lag(self) -> Mapping[PartitionId, int]:
        """Readings not yet polled."""
        return {PARQUET_PARTITION: self.total - self.done}

    def close(self) -> None:
        """Nothing to let go of."""


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Writes down what the group decided; it is called on kafka-python's own thread."""

    def __init__(
        self, events: deque[tuple[str, list[TopicPartition]]], assignor: CooperativeStickyAssignor
    ) -> None:
        self._events = events
        self._assignor = assignor

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self._events.append(("revoked", list(revoked)))

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._events.append(("assigned", list(assigned)))

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self.on_partitions_revoked(lost)
        # kafka-python 3.0.12 would join again as their owner, and know of none. Where the group
        # waits for it to give them to another member, it would never do so (KIP-429).
        self._assignor.member_assignment = None


def _join_once(coordinator: Any) -> None:  # noqa: ANN401 - kafka-python is untyped
    """Have a join count that ends between two polls.

    kafka-python 3.0.12 throws its outcome away and joins again, and so must the whole group: with
    two members that are slow to poll, again and again. Or, where it was new partitions that the
    leader joined for, it takes the join for done, and is a member without heartbeats for ever.
    """
    join = coordinator._do_join_and_sync_async
    ended: tuple[Any, bytes] | None = None

    async def join_once() -> bytes:
        nonlocal ended
        unclaimed, ended = ended, None
        waiting = coordinator.state is MemberState.REBALANCING
        if unclaimed and waiting and unclaimed[0] is coordinator._generation:
            return unclaimed[1]
        assignment: bytes = await join()
        ended = coordinator._generation, assignment
        # Until somebody takes it; which takes this back as well.
        coordinator.request_rejoin()
        return assignment

    coordinator._do_join_and_sync_async = join_once


def _tell_of_fencing(coordinator: Any, tell: Callable[[], None]) -> None:  # noqa: ANN401
    """Have `tell` called once the group has given our place to a namesake.

    kafka-python 3.0.12 stops its heartbeats then, and says so in its log alone: without a commit,
    or while it joins, it would be idle for ever.
    """
    send = coordinator._send_heartbeat_request

    async def send_and_tell() -> None:
        try:
            await send()
        except FencedInstanceIdError:
            tell()
            raise

    coordinator._send_heartbeat_request = send_and_tell


class KafkaSource:
    """A member of a consumer group that decodes messages itself, so that none can stop it."""

    def __init__(
        self,
        config: ServiceConfig,
        channels: Sequence[str],
        decoder: Decoder,
        grid: Grid,
        *,
        client_options: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
        beat: Callable[[], None] = lambda: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._clock = clock
        self._beat = beat
        self._stopping = stopping
        self._channels = tuple(channels)
        self._decoder = decoder
        self._grid = grid
        self._options = dict(client_options or {})
        self._events: deque[tuple[str, list[TopicPartition]]] = deque()
        # Partitions that replay an earlier part of the log, and up to which offset.
        self._replaying: dict[TopicPartition, int] = {}
        # The next offset of each partition, as far as we have come.
        self._positions: dict[TopicPartition, int] = {}
        self._held: set[TopicPartition] = set()
        self._partition_count = 0
        # Under which name the group knows us; one that it has thrown out gets another.
        self._member_id = ""
        self._rewind = False
        self._stalls = StallWatch(config.input.stall_after_ms / 1000)
        self._idle_since = time.monotonic()
        assignor = CooperativeStickyAssignor()
        try:
            self._consumer = connect(
                KafkaConsumer,
                **config.input.consumer_kwargs(),
                partition_assignment_strategy=[assignor],
                **self._options,
            )
        except KafkaConfigurationError as error:
            raise StreamError(f"kafka-python refuses the settings of input: {error}") from error
        except KafkaError as error:
            raise RetryableError(f"no consumer: {error!r}") from error
        _join_once(self._consumer._coordinator)
        self._fenced = threading.Event()
        _tell_of_fencing(self._consumer._coordinator, self._fenced.set)
        self._consumer.subscribe([config.input.topic], listener=_Listener(self._events, assignor))

    @property
    def consumer(self) -> KafkaConsumer:
        """For committing offsets in at-least-once mode."""
        return self._consumer

    def poll(self) -> Polled:
        """Fetch, decode, and follow the group's decisions.

        Raises:
            RetryableError: the broker did not answer while a partition was being resumed.
            StreamError: the broker does not let us read, or somebody else has our name.

        """
        polled = Polled()
        fetched = self._fetch()
        if self._fenced.is_set():
            raise name_taken(self._config)
        # Taken before the events are read: what the group decides after this has a later
        # generation, and the broker refuses a commit under an earlier one.
        polled.generation = self._consumer.group_metadata()
        if polled.generation.generation_id < 0 or polled.generation.member_id != self._member_id:
            # The broker has thrown us out, as after a long sleep; others may have had our
            # partitions, and kafka-python, joining again, may keep them without a word. What was
            # read until now is not ours, and assigned anew it is read again. A commit in nobody's
            # name the broker would take for that of an old client, and not refuse (KIP-447).
            fetched = {}
            polled.revoked |= {PartitionId(*p) for p in self._positions}
            self._positions.clear()
            self._replaying.clear()
            self._member_id = polled.generation.member_id
        try:
            self._notice_stalls(polled)
            self._follow_group(polled)
            self._take(fetched, polled)
            self._ask_for_our_place(polled)
        except FencedInstanceIdError as error:
            raise name_taken(self._config) from error
        except KafkaError as error:
            self._rewind = True
            raise RetryableError(f"resuming partitions failed: {error!r}") from error
        return polled

    def _take(self, fetched: Mapping[TopicPartition, list[Any]], polled: Polled) -> None:
        for partition, records in fetched.items():
            # What was fetched before we knew where to begin is not ours to use.
            begun = partition in self._positions
            if not begun or PartitionId(*partition) in polled.assigned.keys() | polled.revoked:
                continue
            polled.batches.append(self._decode(partition, records))
            self._positions[partition] = records[-1].offset + 1
            if records[-1].offset + 1 >= self._replaying.get(partition, 0):
                self._replaying.pop(partition, None)
        for partition, until in list(self._replaying.items()):
            # What was to be replayed may be gone (retention), or be nothing but markers.
            # Once more for a partition in `fetched` would be a second batch of it in this poll.
            if partition not in fetched and self._consumer.position(partition) >= until:
                del self._replaying[partition]
                self._positions[partition] = until
                polled.batches.append(self._decode(partition, [], until))

    def _ask_for_our_place(self, polled: Polled) -> None:
        """Have an idle service with a name commit where it stands, once in a session.

        To one whose place was given to a namesake the broker refuses heartbeats and commits.
        kafka-python 3.0.12 keeps the first to itself: without a commit it would be idle for ever.
        """
        now = time.monotonic()
        if polled.batches:
            self._idle_since = now
        due = now - self._idle_since >= self._config.input.session_timeout_ms / 1000
        # Nobody's commit would not be refused: see `poll`.
        named = self._config.input.instance_id and polled.generation.generation_id >= 0
        if named and self._positions and due and not self._replaying:
            self._idle_since = now
            partition = min(self._positions)
            polled.batches.append(self._decode(partition, [], self._positions[partition]))

    def _fetch(self) -> dict[TopicPartition, list[Any]]:
        try:
            # While something is held there is work to go on with.
            wait_ms = 0 if self._held else POLL_MS
            fetched: dict[TopicPartition, list[Any]] = self._consumer.poll(timeout_ms=wait_ms)
        except FencedInstanceIdError as error:
            raise name_taken(self._config) from error
        except AuthorizationError as error:
            raise StreamError(f"the broker refuses to be read from: {error}") from error
        except NoOffsetForPartitionError:
            return {}  # newly assigned; `_resume_all` says where to begin
        except (OffsetOutOfRangeError, LogTruncationError) as error:
            # Retention was quicker than we, or the topic is another one by now.
            _log.warning("reading on is not possible; going back to the commit", error=str(error))
            self._rewind = True
            return {}
        except KafkaError as error:
            raise RetryableError(f"fetching failed: {error!r}") from error
        return fetched

    def _notice_stalls(self, polled: Polled) -> None:
        """Begin again, and in the end give up, where nothing is read of what there is to read."""
        if not self._stalls.due(time.monotonic()):
            return
        # What is held is not read on, and there is work to do.
        read = self._consumer.assignment() - self._held
        partitions = sorted(self._positions.keys() & read)
        try:
            ends = self._consumer.end_offsets(partitions, timeout_ms=_LOOK_MS)
            positions = {p: self._consumer.position(p, timeout_ms=_LOOK_MS) for p in partitions}
        except KafkaError:
            return  # a broker that does not answer is no stall, and is waited for elsewhere
        stalled = self._stalls.look(positions, ends, time.monotonic())
        for partition, again in stalled.items():
            where = (
                f"{partition.topic} partition {partition.partition} stands at offset "
                f"{positions[partition]} while its end has grown to {ends[partition]}, for "
                f"{self._stalls.after_s:g} s (input.stall_after)"
            )
            if again:
                raise StreamError(
                    f"expected readings, {where}, also after beginning again from the commit; "
                    "start the service again, and look at the broker's log"
                )
            _log.warning(f"beginning again from the commit: {where}", reason="stall")
            polled.stalled += 1
            self._rewind = True

    def _follow_group(self, polled: Polled) -> None:
        assigned: set[TopicPartition] = set()
        again, self._rewind = self._rewind, False
        if again:
            assigned |= set(self._consumer.assignment())
        while self._events:
            kind, partitions = self._events.popleft()
            if kind == "revoked":
                polled.revoked |= {PartitionId(*p) for p in partitions}
                assigned -= set(partitions)
                for partition in partitions:
                    self._replaying.pop(partition, None)
                    self._positions.pop(partition, None)
            else:
                assigned |= set(partitions)
        owned = set(self._consumer.assignment())
        if polled.generation.state is MemberState.STABLE:
            # kafka-python may join again without a word of what we have let go of in between.
            assigned |= owned - self._positions.keys()
        assigned &= owned
        if assigned:
            self._resume_all(sorted(assigned), polled, again=again)

    def _resume_all(self, partitions: list[TopicPartition], polled: Polled, *, again: bool) -> None:
        known = len(self._consumer.partitions_for_topic(self._config.input.topic) or ())
        before, self._partition_count = self._partition_count or known, known
        if known > before:
            grow_state(self._config, known, self._options)
        # Offsets first: those are of transactions that have ended. State read before them could
        # be older than what they say.
        committed = {p: self._committed(p) for p in partitions}
        if again and self._config.input.instance_id:
            # Perhaps a namesake has our place, and took the transactional id for its commits. The
            # group alone knows; without asking, the two would take it from one another for long.
            self._consumer.commit({p: c for p, c in committed.items() if c}, _COMMITTED_MS)
        metadata = {
            p: CommitMetadata.decode((c and c.metadata) or "") for p, c in committed.items()
        }
        snapshots = read_snapshots(
            self._config,
            {
                p.partition: None
                if m is None
                else Commit(committed[p].offset, self._grid.last_scored(m.watermark_ms))
                for p, m in metadata.items()
            },
            self._options,
            self._beat,
            self._stopping,
        )
        begins = self._consumer.beginning_offsets(partitions)
        ends = self._consumer.end_offsets(partitions)
        for partition in partitions:
            start, resume = where_to_resume(
                None if (c := committed[partition]) is None else c.offset,
                metadata[partition],
                tuple(snapshots[partition.partition]),
                begin=begins[partition],
                end=ends[partition],
                period_ms=self._grid.period_ms,
                latest=self._config.input.auto_offset_reset == "latest",
            )
            if resume == Resume() and partition.partition >= before:
                # From its first reading on, whatever is set: nobody could have read it before.
                start, resume = begins[partition], Resume(lost="partitions")
            self._begin(partition, start, resume)
            polled.assigned[PartitionId(*partition)] = resume

    def _committed(self, partition: TopicPartition) -> Any:  # noqa: ANN401
        # The first answer may be that to an earlier question which was given up: kafka-python
        # 3.0.12 keeps it until it is asked again, and others may have committed since.
        self._consumer.committed(partition, timeout_ms=_COMMITTED_MS)
        found = self._consumer.committed(partition, metadata=True, timeout_ms=_COMMITTED_MS)
        return None if found is None or found.offset < 0 else found

    def _begin(self, partition: TopicPartition, start: int, resume: Resume) -> None:
        self._consumer.seek(partition, start)
        self._positions[partition] = start
        self._replaying.pop(partition, None)
        if resume.metadata is not None and resume.next_offset is not None:
            self._replaying[partition] = resume.next_offset
        where = {
            "topic": partition.topic,
            "partition": partition.partition,
            "committed": resume.next_offset,
            "replay_from": start,
            "entities": len(resume.snapshots),
        }
        if resume.lost is not None:
            _log.warning(LOSSES[resume.lost], reason=resume.lost, **where)
        _log.info("partition assigned", **where)

    def _decode(
        self, partition: TopicPartition, records: Sequence[Any], next_offset: int | None = None
    ) -> ReadingBatch:
        columns = Columns(self._channels, self._grid.counters)
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
            unkeyed=sum(r.key is None for r in records) if self._partition_count > 1 else 0,
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
        # The log's own time, so that a replay decides the same again; but a message has its time
        # from its sender, unless the topic says otherwise, and a clock that is wrong is wrong there
        # as well. So ours has a say where it is behind.
        now = int(self._clock() * 1000)
        written = now if record.timestamp < 0 else min(record.timestamp, now)
        # A reading may be stamped with the end of its slot.
        ahead = max(self._config.grid.max_ahead_ms, self._grid.period_ms)
        for reading in readings:
            if reading.timestamp_ms > written + ahead:
                raise DecodeError(
                    "future_timestamp",
                    f"expected a timestamp at most {ahead / 1000:g} s after its message was "
                    f"written ({written}), got {reading.timestamp_ms}; check the sender's clock or "
                    "raise grid.max_ahead",
                )
        return readings

    def rewind(self) -> None:
        """Resume every partition from its last commit with the next poll."""
        self._rewind = True
        # Where nothing was committed yet, committing where we stand is how a namesake is found.
        self._idle_since = -math.inf

    def hold(self, partitions: Set[PartitionId]) -> None:
        """Read no more of these, and of all others again (back pressure)."""
        before, self._held = self._held, {TopicPartition(*p) for p in partitions}
        for partition in before ^ self._held:
            change = self._consumer.pause if partition in self._held else self._consumer.resume
            with suppress(KeyError):  # the group may have taken it at any moment
                change(partition)

    def lag(self) -> Mapping[PartitionId, int]:
        """Records between the position and the end of each partition, as far as known."""
        ends = {p: self._consumer.highwater(p) for p in self._positions.keys() - self._replaying}
        return {
            PartitionId(*p): max(0, end - self._positions[p])
            for p, end in ends.items()
            if end is not None
        }

    def close(self) -> None:
        """Leave the group at once, so that the others take over without waiting."""
        self._consumer.close(autocommit=False, timeout_ms=10_000)


def where_to_resume(
    committed: int | None,
    metadata: CommitMetadata | None,
    snapshots: tuple[EntitySnapshot, ...],
    *,
    begin: int,
    end: int,
    period_ms: int,
    latest: bool,
) -> tuple[int, Resume]:
    """From which offset to read a partition that now holds [begin, end), and how to take it."""
    lost: Loss | None
    if committed is None:
        lost = "offsets" if snapshots else None
        return end if latest else begin, Resume(snapshots=snapshots, lost=lost)
    if committed > end:
        return begin, Resume(begin, snapshots=snapshots, lost="log")
    next_offset = max(committed, begin)
    if metadata is None or metadata.period_ms != period_ms:
        return next_offset, Resume(next_offset, snapshots=snapshots, lost="metadata")
    lost = None
    if begin > metadata.replay_offset:
        lost = "readings" if begin > committed else "replay"
    return max(metadata.replay_offset, begin), Resume(next_offset, metadata, snapshots, lost)


def name_taken(config: ServiceConfig) -> StreamError:
    """What to say when the broker has given our place in the group to a namesake."""
    return StreamError(
        f"expected to be the only service of group {config.input.group} with input.instance_id "
        f"{config.input.instance_id}, another one has begun with that name since; give each "
        "running service its own"
    )


def state_key(group: str, entity: str) -> bytes:
    """Key of an entity in the state topic; services of several groups may share the topic."""
    return f"{group}\x00{entity}".encode()


class Commit(NamedTuple):
    """Where a partition was committed: the next offset, and which slot was scored last of all."""

    offset: int
    last_slot: int


def read_snapshots(
    config: ServiceConfig,
    wanted: Mapping[int, Commit | None],
    client_options: Mapping[str, Any],
    beat: Callable[[], None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[int, list[EntitySnapshot]]:
    """Read state partitions to their ends: of each entity the newest snapshot.

    `wanted` says where each partition was committed (None: unknown). Snapshots from beyond that are
    passed over: a service that wrote them without a transaction, at-least-once, died before it
    committed, or it was set back by hand. So are older ones that such a service wrote late. There
    may be gigabytes to read: `beat` is called as reading comes on, for who watches over the loop,
    and `stopping` all the time.

    Raises:
        RetryableError: the end was not reached, and nothing more came for `STATE_TIMEOUT_S`, or
            somebody asked to stop.

    """
    partitions = [TopicPartition(config.outputs.state, number) for number in wanted]
    latest: dict[int, dict[bytes, EntitySnapshot]] = {number: {} for number in wanted}
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
        there = plain.partitions_for_topic(config.outputs.state) or set()
        if missing := wanted.keys() - there:
            raise RetryableError(
                f"{config.outputs.state} has no partition {min(missing)} yet; waiting for it"
            )
        ends = plain.end_offsets(partitions)
    with connect(KafkaConsumer, **options, isolation_level="read_committed") as consumer:
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        before, came_on_at = -1, 0.0
        while any(consumer.position(p) < ends[p] for p in partitions):
            if stopping():
                raise RetryableError(f"asked to stop while {config.outputs.state} was being read")
            if (at := sum(map(consumer.position, partitions))) > before:
                before, came_on_at = at, time.monotonic()
                beat()
            elif time.monotonic() > came_on_at + STATE_TIMEOUT_S:
                raise RetryableError(
                    f"the end of {config.outputs.state} was not reached, and nothing more of it "
                    f"came in {STATE_TIMEOUT_S:g} s; is a transaction of another service open?"
                )
            for partition, records in consumer.poll(timeout_ms=POLL_MS).items():
                number = partition.partition
                for record in records:
                    if record.key is not None and record.key.startswith(prefix):
                        _keep_newest(latest[number], record, wanted[number])
    return {number: list(found.values()) for number, found in latest.items()}


def _keep_newest(
    found: dict[bytes, EntitySnapshot],
    record: Any,  # noqa: ANN401 - kafka-python is untyped
    commit: Commit | None,
) -> None:
    if record.value is None:
        found.pop(record.key, None)
        return
    snapshot = decode_snapshot(record.value)
    if snapshot is None:
        found.pop(record.key, None)
        return
    if commit is not None and _beyond(snapshot, commit):
        return
    before = found.get(record.key)
    if before is None or commit is None or snapshot.slot >= before.slot:
        found[record.key] = snapshot


def _beyond(snapshot: EntitySnapshot, commit: Commit) -> bool:
    if snapshot.offset == UNKNOWN_OFFSET:
        return snapshot.slot > commit.last_slot
    return snapshot.offset > commit.offset
