"""Dead letters sent again, to where they came from, once what was wrong with them is mended.

How far this has come is committed for the consumer group `<input.group>.dead-letters`, in one
transaction with the messages, so that each is sent again once however often this is run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from kafka import KafkaConsumer, KafkaProducer
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata, TopicPartition

from stream.clients import connect, deliver, end_transaction
from stream.codec import Origin, origin_of
from stream.config import ServiceConfig
from stream.errors import StreamError, TopicError
from stream.topics import connect_admin

_log = structlog.get_logger("tsdiff.replay")

_POLL_MS: Final = 500
_TIMEOUT_S: Final = 60.0
# More than any topic made by the service takes, key and headers included.
_LARGEST_BYTES: Final = 32 * 1024 * 1024


@dataclass(frozen=True)
class ResendSummary:
    """What became of the dead letters that were there."""

    sent: int
    left: int
    """Not sent: cut short when they were written, or not written by tsdiff at all."""


def resend(
    config: ServiceConfig, progress: Callable[[int, int], None] = lambda _done, _all: None
) -> ResendSummary:
    """Send every dead letter that was not sent again before; returns once all are stored.

    Key, value and headers are those of the original message, and so are topic and partition.

    Raises:
        StreamError: the broker or a topic is not there, or a message was refused; what has not
            been committed is sent again by the next run.

    """
    letters = config.outputs.dead_letters
    try:
        counts = _partition_counts(config)
        if letters not in counts:
            raise TopicError(
                f"expected topic {letters} (outputs.dead_letters), it does not exist; there is "
                "nothing to send again"
            )
        return _resend(config, letters, counts, progress)
    except KafkaError as error:
        raise StreamError(
            f"sending dead letters of {letters} again failed: {error!r}; run it again, it goes on "
            "where it was"
        ) from error


def _partition_counts(config: ServiceConfig) -> dict[str, int]:
    admin = connect_admin(config, {})
    try:
        return {found["name"]: len(found["partitions"]) for found in admin.describe_topics()}
    finally:
        admin.close()


def _resend(
    config: ServiceConfig,
    letters: str,
    counts: Mapping[str, int],
    progress: Callable[[int, int], None],
) -> ResendSummary:
    group = f"{config.input.group}.dead-letters"
    partitions = [TopicPartition(letters, number) for number in range(counts[letters])]
    consumer_kwargs = config.input.consumer_kwargs() | {
        "group_id": group,
        "group_instance_id": None,
        "auto_offset_reset": "earliest",
    }
    # The group's name as the transactional id: a second run at the same time ends the first one.
    producer_kwargs = config.producer_kwargs(group) | {"max_request_size": _LARGEST_BYTES}
    sent = left = 0
    with (
        connect(KafkaConsumer, **consumer_kwargs) as consumer,
        connect(KafkaProducer, **producer_kwargs) as producer,
    ):
        exactly_once = config.delivery.mode == "exactly-once"
        if exactly_once:
            producer.init_transactions()
        consumer.assign(partitions)
        # Up to here: what fails once more comes behind, and would go round for ever.
        ends = consumer.end_offsets(partitions)
        total = sum(max(0, ends[p] - consumer.position(p)) for p in partitions)
        while any(consumer.position(p) < ends[p] for p in partitions):
            batch = [
                record
                for records in consumer.poll(timeout_ms=_POLL_MS).values()
                for record in records
                if record.offset < ends[TopicPartition(record.topic, record.partition)]
            ]
            origins = [_origin(record) for record in batch]
            for origin in origins:
                if origin is not None and origin.topic not in counts:
                    raise TopicError(
                        f"expected topic {origin.topic}, where a dead letter came from, it does "
                        "not exist; create it"
                    )
            position = {p: OffsetAndMetadata(consumer.position(p), "", -1) for p in partitions}
            if exactly_once:
                producer.begin_transaction()
            futures = _send(producer, batch, origins, counts)
            if exactly_once:
                end_transaction(producer, futures, position, group, _TIMEOUT_S)
            else:
                deliver(producer, futures, _TIMEOUT_S)
                consumer.commit(position, timeout_ms=int(_TIMEOUT_S * 1000))
            sent += len(futures)
            left += len(batch) - len(futures)
            progress(sent + left, total)
    return ResendSummary(sent, left)


def _origin(record: Any) -> Origin | None:  # noqa: ANN401 - kafka-python is untyped
    origin = origin_of(record.headers)
    if origin is None or origin.truncated:
        _log.warning(
            "this dead letter cannot be sent again",
            why="it was cut short" if origin else "it was not written by tsdiff",
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
        )
        return None
    return origin


def _send(
    producer: KafkaProducer,
    batch: Sequence[Any],
    origins: Sequence[Origin | None],
    counts: Mapping[str, int],
) -> list[Any]:
    return [
        producer.send(
            origin.topic,
            key=record.key,
            value=record.value,
            headers=list(origin.headers),
            # Its producer may place keys in another way than ours does.
            partition=origin.partition if origin.partition < counts[origin.topic] else None,
        )
        for record, origin in zip(batch, origins, strict=True)
        if origin is not None
    ]
