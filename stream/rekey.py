"""The messages of a topic once more in another one, keyed by entity, so that each stays together.

One process reads all partitions and writes what it read in the order of event time, since a
backlog that came partition by partition would make most of it late. Messages and offsets go in
one transaction: a crash neither loses nor repeats a message, and the next start goes on.

    partition 0   09:01 a   09:03 b           |
    partition 1   09:02 b   09:04 a           |  -> 09:01 a, 09:02 b, 09:03 b, 09:04 a
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import structlog
from kafka import KafkaConsumer, KafkaProducer
from kafka.errors import AuthorizationError, KafkaError
from kafka.structs import OffsetAndMetadata, TopicPartition

from stream.clients import abandon, connect, end_transaction, within
from stream.compose import decoder_of
from stream.config import ServiceConfig
from stream.errors import DecodeError, RetryableError, StreamError
from stream.formats import Decoder
from stream.sources import RETRY_SECONDS

_log = structlog.get_logger("tsdiff.rekey")

# Messages of a partition that wait for the others to come as far.
MOST_WAITING: Final = 5000
POLL_MS: Final = 200


@dataclass
class RekeySummary:
    """What was written, and what had no entity to be keyed by."""

    messages: int = 0
    unread: int = 0
    """Could not be decoded: written with the key it had; the service dead-letters it."""
    mixed: int = 0
    """Readings of several entities: written with the key it had."""


@dataclass(frozen=True)
class _Message:
    record: Any
    key: bytes | None
    timestamp_ms: int
    unread: bool = False
    mixed: bool = False


def keyed(record: Any, decoder: Decoder) -> _Message:  # noqa: ANN401 - kafka-python is untyped
    """Find the entity, which is the new key, and the event time of one message."""
    try:
        readings = decoder(record.value or b"")
    except DecodeError:
        return _Message(record, record.key, record.timestamp, unread=True)
    if not readings:
        return _Message(record, record.key, record.timestamp)
    entities = {reading.entity for reading in readings}
    timestamp_ms = min(reading.timestamp_ms for reading in readings)
    if len(entities) > 1:
        return _Message(record, record.key, timestamp_ms, mixed=True)
    return _Message(record, entities.pop().encode(), timestamp_ms)


def rekey(
    config: ServiceConfig,
    to: str,
    *,
    stopping: Callable[[], bool],
    until_end: bool = False,
) -> RekeySummary:
    """Work until asked to stop, or with `until_end` until all that is there now is written.

    Raises:
        StreamError: the broker does not allow it.

    """
    summary = RekeySummary()
    while not stopping():
        try:
            with _Stage(config, to) as stage:
                while not stopping():
                    stage.step(summary)
                    if until_end and stage.done:
                        return summary
        except AuthorizationError as error:
            raise StreamError(
                f"the broker refuses to be read from or written to: {error}"
            ) from error
        except (KafkaError, RetryableError) as error:
            _log.warning("going back to the last commit", error=repr(error))
            time.sleep(RETRY_SECONDS)
    return summary


class _Stage:
    """A consumer of all partitions and a transactional producer, until one of them fails."""

    def __init__(self, config: ServiceConfig, to: str) -> None:
        self._to = to
        self._decoder = decoder_of(config)
        group = f"{config.input.group}-rekey"
        self._timeout_s = max(5.0, config.delivery.transaction_timeout_ms / 1000)
        self._consumer = connect(
            KafkaConsumer,
            **{
                **config.input.consumer_kwargs(),
                "group_id": group,
                "group_instance_id": None,
                "auto_offset_reset": "earliest",
            },
        )
        try:
            # One name: the broker fences an earlier process that still breathes.
            exactly_once = config.model_copy(
                update={"delivery": config.delivery.model_copy(update={"mode": "exactly-once"})}
            )
            self._producer = connect(
                KafkaProducer,
                **{**exactly_once.producer_kwargs(group), "linger_ms": 5, "batch_size": 256 * 1024},
                max_block_ms=int(self._timeout_s * 1000),
            )
            self._producer.init_transactions()
            numbers = self._consumer.partitions_for_topic(config.input.topic) or ()
            self._waiting = {
                TopicPartition(config.input.topic, n): deque[_Message]() for n in numbers
            }
            self._consumer.assign(list(self._waiting))
            self._ends = self._consumer.end_offsets(list(self._waiting))
            self._until = dict(self._ends)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "_Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of both clients; what is not committed is done again."""
        self._consumer.close(autocommit=False, timeout_ms=5_000)
        if hasattr(self, "_producer"):
            abandon(self._producer)

    @property
    def done(self) -> bool:
        """Whether all is written that was there at the start."""
        return all(self._next(p) >= until for p, until in self._until.items())

    def _next(self, partition: TopicPartition) -> int:
        waiting = self._waiting[partition]
        return int(waiting[0].record.offset if waiting else self._consumer.position(partition))

    def step(self, summary: RekeySummary) -> None:
        """Read some messages, and write those that no other partition can still come before."""
        for partition, records in self._consumer.poll(timeout_ms=POLL_MS).items():
            self._waiting[partition].extend(keyed(record, self._decoder) for record in records)
        for partition, waiting in self._waiting.items():
            self._ends[partition] = max(
                self._ends[partition], self._consumer.highwater(partition) or 0
            )
            if len(waiting) >= MOST_WAITING:
                self._consumer.pause(partition)
            else:
                self._consumer.resume(partition)
        ready = self._ready()
        if not ready:
            return
        self._producer.begin_transaction()
        sent = [
            self._producer.send(
                self._to,
                value=message.record.value,
                key=message.key,
                headers=list(message.record.headers),
                timestamp_ms=message.record.timestamp if message.record.timestamp >= 0 else None,
            )
            for message in ready
        ]
        offsets = {p: OffsetAndMetadata(self._next(p), "", -1) for p in self._waiting}
        producer, group, limit = self._producer, self._consumer.group_metadata(), self._timeout_s
        within(limit, lambda: end_transaction(producer, sent, offsets, group, limit))
        summary.messages += len(ready)
        summary.unread += sum(message.unread for message in ready)
        summary.mixed += sum(message.mixed for message in ready)

    def _ready(self) -> list[_Message]:
        """Take the oldest messages for as long as every partition has one, or is at its end."""
        open_ends = {p for p in self._waiting if self._consumer.position(p) < self._ends[p]}
        ready: list[_Message] = []
        while all(self._waiting[p] for p in open_ends):
            heads = [waiting for waiting in self._waiting.values() if waiting]
            if not heads:
                break
            ready.append(min(heads, key=lambda waiting: waiting[0].timestamp_ms).popleft())
        return ready
