"""The topics of the service: checked, and where allowed created, before it starts."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import structlog
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType, OffsetSpec
from kafka.errors import InvalidPartitionsError, KafkaError, TopicAlreadyExistsError
from kafka.structs import TopicPartition

from stream.clients import connect
from stream.config import ServiceConfig
from stream.errors import RetryableError, StreamError, TopicError

_log = structlog.get_logger("tsdiff.topics")

# The broker's default for message.max.bytes, where it will not say.
_DEFAULT_MAX_BYTES: Final = 1_048_588
# A dead letter is as large as the message it keeps; topics made here take up to this.
_DEAD_LETTER_MAX_BYTES: Final = 16 * 1024 * 1024


def connect_admin(config: ServiceConfig, client_options: Mapping[str, Any]) -> KafkaAdminClient:
    """Connect an admin client, or raise `RetryableError` naming the servers that were tried."""
    try:
        return connect(
            KafkaAdminClient,
            **config.input.client_kwargs(),
            **client_options,
        )
    except KafkaError as error:
        servers = ",".join(config.input.bootstrap_servers)
        raise RetryableError(
            f"no broker answers at {servers} (input.bootstrap_servers): {error!r}"
        ) from error


def expect_topic(client: Mapping[str, Any], topic: str) -> None:
    """Say within seconds that there is no broker or no such topic; a producer waits a minute.

    Raises:
        StreamError: there is not.

    """
    servers = ",".join(client["bootstrap_servers"])
    try:
        admin = connect(KafkaAdminClient, **client)
    except KafkaError as error:
        raise StreamError(
            f"expected a broker at {servers}, got {error!r}; start it, or name another one with "
            "--bootstrap-servers"
        ) from error
    try:
        if partition_count(admin, topic) is None:
            raise TopicError(
                f"expected topic {topic} at {servers}, it does not exist; create it, or name "
                "another one"
            )
    except KafkaError as error:
        raise StreamError(f"looking for topic {topic} at {servers} failed: {error!r}") from error
    finally:
        admin.close()


def partition_count(admin: KafkaAdminClient, topic: str) -> int | None:
    """Partitions of a topic, or `None` where there is no such topic."""
    # All topics: asking for one by name would let some brokers create it.
    for found in admin.describe_topics():
        if found["name"] == topic:
            return len(found["partitions"])
    return None


def prepare_topics(config: ServiceConfig, client_options: Mapping[str, Any] | None = None) -> int:
    """Make sure that every topic is there; return how many bytes a dead letter may have.

    Raises:
        RetryableError: no broker answers, or the input topic does not exist (yet).
        TopicError: an output topic is missing and may not be created, or is unfit.

    """
    admin = connect_admin(config, client_options or {})
    try:
        partitions = partition_count(admin, config.input.topic)
        if partitions is None:
            raise RetryableError(
                f"topic {config.input.topic} (input.topic) does not exist on "
                f"{','.join(config.input.bootstrap_servers)}; waiting for it"
            )
        _ensure_outputs(admin, config, partitions)
        return _largest_dead_letter(admin, config)
    except KafkaError as error:
        if error.retriable:
            raise RetryableError(f"looking at the topics failed: {error!r}") from error
        raise TopicError(
            f"expected to find or create the topics of outputs, the broker refuses: {error!r}; "
            "create them by hand, or change outputs or the service's rights"
        ) from error
    finally:
        admin.close()


def _ensure_outputs(admin: KafkaAdminClient, config: ServiceConfig, partitions: int) -> None:
    names = config.outputs
    compact = {"cleanup.policy": "compact"}
    wanted: dict[str, dict[str, str]] = {
        names.scores: {},
        names.alerts: compact,
        names.dead_letters: {"max.message.bytes": str(_DEAD_LETTER_MAX_BYTES)},
        # Small segments: compaction leaves the newest one alone, and all of it is read at start.
        names.state: {**compact, "segment.bytes": str(16 * 1024 * 1024)},
    }
    missing = wanted.keys() - {found["name"] for found in admin.describe_topics()}
    if missing and not names.create_topics:
        raise TopicError(
            f"expected topics {', '.join(sorted(missing))}, which do not exist; create them with "
            f"{partitions} partitions or set outputs.create_topics"
        )
    for name in sorted(missing):
        options: dict[str, Any] = {"num_partitions": partitions, "configs": wanted[name]}
        if names.replication_factor is not None:
            options["replication_factor"] = names.replication_factor
        try:
            admin.create_topics({name: options})
            _log.info("topic created", topic=name, partitions=partitions)
        except TopicAlreadyExistsError:
            continue  # another worker was quicker
    await_topics(admin, sorted(wanted))
    _grow_state(admin, config, partitions)


def await_topics(admin: KafkaAdminClient, names: Sequence[str]) -> None:
    """Wait until every partition of topics that were created just now can be written to.

    A broker names itself as the leader of a new partition before it takes anything for it. Of
    several requests in flight the first may be refused then, and come after the others
    (KAFKA-15591).

    Raises:
        KafkaError: they did not get there in time.

    """
    admin.wait_for_topics(names)
    partitions = [
        TopicPartition(topic["name"], partition["partition_index"])
        for topic in admin.describe_topics(names)
        for partition in topic["partitions"]
    ]
    # Only who leads a partition answers; kafka-python asks until somebody does.
    admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST))


def _grow_state(admin: KafkaAdminClient, config: ServiceConfig, partitions: int) -> None:
    name = config.outputs.state
    if (partition_count(admin, name) or 0) < partitions:
        # State partition i belongs to input partition i.
        try:
            admin.create_partitions({name: partitions})
        except InvalidPartitionsError:
            return  # another worker was quicker
        _log.info("state topic grown to the input's partitions", topic=name, partitions=partitions)


def grow_state(
    config: ServiceConfig, partitions: int, client_options: Mapping[str, Any] | None = None
) -> None:
    """Give the state topic as many partitions as the input has now.

    Raises:
        KafkaError: the broker did not do it.
        RetryableError: no broker answers.

    """
    admin = connect_admin(config, client_options or {})
    try:
        _grow_state(admin, config, partitions)
        admin.wait_for_topics([config.outputs.state])
    finally:
        admin.close()


def _largest_dead_letter(admin: KafkaAdminClient, config: ServiceConfig) -> int:
    resource = ConfigResource(ConfigResourceType.TOPIC, config.outputs.dead_letters)
    try:
        found = admin.describe_configs([resource], config_filter="all")
        value = found["topic"][config.outputs.dead_letters]["max.message.bytes"]
        limit = int(value["value"] if isinstance(value, dict) else value)
    except (KafkaError, KeyError, TypeError, ValueError) as error:
        _log.warning("dead-letter topic's max.message.bytes is unknown", error=repr(error))
        limit = _DEFAULT_MAX_BYTES
    # Room for headers, key and the batch's own framing.
    return max(1024, limit - 16 * 1024)
