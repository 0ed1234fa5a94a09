"""Where scores, alerts, dead letters and state go: Kafka, Parquet, or memory (tests).

`commit` is all or nothing: the outputs of a round and the offsets they came from.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from kafka import KafkaConsumer, KafkaProducer
from kafka.errors import (
    AuthorizationError,
    FencedInstanceIdError,
    KafkaConfigurationError,
    KafkaError,
    UnsupportedVersionError,
)
from kafka.partitioner.default import murmur2
from kafka.structs import OffsetAndMetadata, TopicPartition
from msgspec.structs import asdict

from stream.buffer import EntitySnapshot
from stream.clients import abandon, connect, deliver, end_transaction, within
from stream.codec import (
    CommitMetadata,
    encode_alert,
    encode_score,
    encode_snapshot,
    fit_dead_letter,
)
from stream.config import ServiceConfig
from stream.errors import RetryableError, StreamError
from stream.records import AlertEvent, DeadLetter, PartitionId, SlotScore
from stream.sources import name_taken, state_key

# A commit that takes longer than its transaction may last is waited for in vain: the broker has
# ended it. With a very short one, a busy broker still gets this long.
LEAST_COMMIT_TIMEOUT_S: Final = 5.0
# Headers and framing beside a dead letter's own bytes.
_FRAMING_BYTES: Final = 64 * 1024


class Position(NamedTuple):
    """The next offset to process, and what is needed to rebuild the windows before it."""

    offset: int
    metadata: CommitMetadata


@dataclass
class Round:
    """All that one turn of the loop produces."""

    scores: Sequence[SlotScore] = ()
    alerts: Sequence[AlertEvent] = ()
    dead_letters: list[DeadLetter] = field(default_factory=list)
    snapshots: list[tuple[PartitionId, EntitySnapshot]] = field(default_factory=list)
    gone: list[tuple[PartitionId, str]] = field(default_factory=list)
    positions: dict[PartitionId, Position] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.positions)


class Sink(Protocol):
    """Where a round of the loop goes."""

    def commit(self, round_: Round, generation: Any) -> None:  # noqa: ANN401 - opaque token
        """Write everything or nothing.

        Raises:
            RetryableError: nothing was written, or nobody will see it; read the batch again.

        """

    def reset(self) -> None:
        """Get ready again after a failed commit."""

    def close(self) -> None:
        """Flush and let go."""


@dataclass
class MemorySink:
    """Keeps everything, for tests."""

    rounds: list[Round] = field(default_factory=list)

    def commit(self, round_: Round, generation: Any) -> None:  # noqa: ANN401
        """Keep the round."""
        self.rounds.append(round_)

    def reset(self) -> None:
        """Nothing can have failed."""

    def close(self) -> None:
        """Nothing to let go of."""

    @property
    def scores(self) -> list[SlotScore]:
        """Every score so far."""
        return [score for round_ in self.rounds for score in round_.scores]

    @property
    def alerts(self) -> list[AlertEvent]:
        """Every alert so far."""
        return [alert for round_ in self.rounds for alert in round_.alerts]


class KafkaSink:
    """Outputs and offsets in one transaction, or flushed before the offsets are committed."""

    def __init__(
        self,
        config: ServiceConfig,
        consumer: KafkaConsumer,
        *,
        largest_dead_letter: int,
        client_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._config = config
        self._consumer = consumer
        self._largest = largest_dead_letter
        self._options = dict(client_options or {})
        # Without a name of its own the service gets a new id at every start: an unfinished
        # transaction of the previous one then ends by itself after transaction_timeout.
        name = config.input.instance_id or uuid.uuid4().hex
        self._transactional_id = f"{config.input.group}-{name}"
        self._exactly_once = config.delivery.mode == "exactly-once"
        timeout_s = config.delivery.transaction_timeout_ms / 1000
        self._timeout_s = max(LEAST_COMMIT_TIMEOUT_S, timeout_s)
        self._producer = self._connect()

    def _connect(self) -> KafkaProducer:
        kwargs = self._config.producer_kwargs(self._transactional_id)
        kwargs["max_request_size"] = self._largest + _FRAMING_BYTES
        # Larger batches than the 16 KiB default: a round is thousands of small records.
        kwargs |= {"batch_size": 256 * 1024, "linger_ms": 5}
        kwargs |= {"max_block_ms": int(self._timeout_s * 1000), **self._options}
        try:
            producer = connect(KafkaProducer, **kwargs)
            if self._exactly_once:
                try:
                    producer.init_transactions()
                except KafkaError:
                    abandon(producer)
                    raise
        except (AuthorizationError, UnsupportedVersionError, KafkaConfigurationError) as error:
            raise StreamError(f"the broker refuses to be written to: {error}") from error
        except KafkaError as error:
            raise RetryableError(f"no producer: {error!r}") from error
        return producer

    def commit(self, round_: Round, generation: Any) -> None:  # noqa: ANN401
        """Write one round; see `Sink.commit`."""
        offsets = {
            TopicPartition(*partition): OffsetAndMetadata(
                position.offset, position.metadata.encode(), -1
            )
            for partition, position in round_.positions.items()
        }
        try:
            if self._exactly_once:
                producer, limit = self._producer, self._timeout_s
                producer.begin_transaction()
                sent = self._send(round_)
                within(limit, lambda: end_transaction(producer, sent, offsets, generation, limit))
            else:
                deliver(self._producer, self._send(round_), self._timeout_s)
                self._consumer.commit(offsets, timeout_ms=int(self._timeout_s * 1000))
        except FencedInstanceIdError as error:
            raise name_taken(self._config) from error
        except (AuthorizationError, UnsupportedVersionError) as error:
            raise StreamError(f"the broker refuses to be written to: {error}") from error
        except KafkaError as error:
            raise RetryableError(f"a commit failed: {error!r}") from error

    def _send(self, round_: Round) -> list[Any]:
        names, send = self._config.outputs, self._producer.send
        scores = [(score.entity, encode_score(score)) for score in round_.scores]
        alerts = [(alert.entity, encode_alert(alert)) for alert in round_.alerts]
        futures = []
        for topic, records in ((names.scores, scores), (names.alerts, alerts)):
            count = len(self._producer.partitions_for(topic)) if records else 1
            futures += [
                send(topic, key=entity.encode(), value=value, partition=_hash_of(entity) % count)
                for entity, value in records
            ]
        futures += [self._send_dead_letter(letter) for letter in round_.dead_letters]
        group = self._config.input.group
        states = [(p, s.entity, encode_snapshot(s)) for p, s in round_.snapshots]
        states += [(p, entity, None) for p, entity in round_.gone]  # type: ignore[misc]
        numbers = {p.partition for p, _, _ in states}
        if numbers and numbers - self._producer.partitions_for(names.state):
            # They were added since; the next producer will know.
            raise RetryableError(f"{names.state} has grown beyond what the producer knows")
        futures += [
            send(names.state, key=state_key(group, entity), value=value, partition=p.partition)
            for p, entity, value in states
        ]
        return futures

    def _send_dead_letter(self, letter: DeadLetter) -> Any:  # noqa: ANN401 - kafka is untyped
        key, value, headers = fit_dead_letter(letter, self._largest)
        return self._producer.send(
            self._config.outputs.dead_letters, key=key, value=value, headers=headers
        )

    def reset(self) -> None:
        """Replace the producer: its transaction is over, one way or the other."""
        self._discard()
        self._producer = self._connect()

    def _discard(self) -> None:
        # No time to flush: what it still holds belongs to a round that will be done again.
        abandon(self._producer)

    def close(self) -> None:
        """Every commit has flushed already."""
        self._discard()


@lru_cache(maxsize=200_000)
def _hash_of(entity: str) -> int:
    """Hash by which Kafka's clients choose the partition of a key; in Python it takes a while."""
    return int(murmur2(entity.encode())) & 0x7FFFFFFF


_CHANNEL = pa.struct(
    [
        ("observed", pa.float64()),
        ("expected", pa.float64()),
        ("lower", pa.float64()),
        ("upper", pa.float64()),
        ("contribution", pa.float64()),
    ]
)
SCORES_SCHEMA: Final = pa.schema(
    [
        ("entity", pa.string()),
        ("timestamp", pa.timestamp("ms", tz="UTC")),
        ("anomaly_score", pa.float64()),
        ("p_value", pa.float64()),
        ("state", pa.string()),
        ("imputed_ratio", pa.float64()),
        ("model", pa.string()),
        ("faulty", pa.map_(pa.string(), pa.string())),
        ("channels", pa.map_(pa.string(), _CHANNEL)),
    ]
)


class ParquetSink:
    """Scores to one Parquet file, which appears under its name only when it is whole.

    Raises:
        StreamError: the file cannot be written.

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        if path.is_dir():
            raise StreamError(f"expected a file for the scores, got the folder {path}; name a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._partial, SCORES_SCHEMA, compression="zstd")
        except OSError as error:
            raise StreamError(
                f"cannot write scores to {path}: {error.strerror or error}; name another file"
            ) from error

    def commit(self, round_: Round, generation: Any) -> None:  # noqa: ANN401
        """Append the scores of a round as one row group."""
        if not round_.scores:
            return
        columns: dict[str, list[Any]] = {name: [] for name in SCORES_SCHEMA.names}
        for score in round_.scores:
            columns["entity"].append(score.entity)
            columns["timestamp"].append(score.timestamp_ms)
            columns["anomaly_score"].append(score.anomaly_score)
            columns["p_value"].append(score.p_value)
            columns["state"].append(score.state)
            columns["imputed_ratio"].append(score.imputed_ratio)
            columns["model"].append(score.model)
            columns["faulty"].append(list(score.faulty.items()))
            columns["channels"].append([(n, asdict(c)) for n, c in score.channels.items()])
        self._writer.write_table(pa.table(columns, schema=SCORES_SCHEMA))

    def reset(self) -> None:
        """Nothing can have failed."""

    def close(self) -> None:
        """Finish the file and give it its name."""
        self._writer.close()
        os.replace(self._partial, self._path)

    def abandon(self) -> None:
        """Remove what was written: the run did not come to its end."""
        self._writer.close()
        self._partial.unlink(missing_ok=True)
