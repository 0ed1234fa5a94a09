"""The topics of the service on a real broker: what it makes, what it grows, what it refuses."""

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType

from stream.config import ServiceConfig, load_config
from stream.errors import RetryableError, TopicError
from stream.topics import expect_topic, partition_count, prepare_topics
from tests.conftest import MakeTopic

pytestmark = pytest.mark.timeout(60)
OUTPUTS = ("scores", "alerts", "dead_letters", "state")


@pytest.fixture(scope="module")
def admin(kafka: str) -> Iterator[KafkaAdminClient]:
    client = KafkaAdminClient(bootstrap_servers=kafka)
    yield client
    client.close()


def config(servers: str, topic: str, **outputs: object) -> ServiceConfig:
    named = {name: f"{topic}.{name}" for name in OUTPUTS}
    return load_config(
        None,
        {
            "model.path": "bundle",
            "input.topic": topic,
            "input.bootstrap_servers": servers,
            "outputs": {**named, **outputs},
        },
    )


def settings_of(admin: KafkaAdminClient, topic: str) -> dict[str, str]:
    resource = ConfigResource(ConfigResourceType.TOPIC, topic)
    found = admin.describe_configs([resource], config_filter="all")["topic"][topic]
    return {
        name: value["value"] if isinstance(value, dict) else value for name, value in found.items()
    }


@pytest.fixture
def made(kafka: str, make_topic: MakeTopic, admin: KafkaAdminClient) -> Iterator[ServiceConfig]:
    """Settings for an input topic of three partitions; what is made of them is deleted."""
    given = config(kafka, make_topic(3))
    yield given
    names = [getattr(given.outputs, name) for name in OUTPUTS]
    admin.delete_topics(
        [name for name in names if partition_count(admin, name)], raise_errors=False
    )


def test_outputs_have_the_partitions_of_the_input_and_the_right_cleanup(
    made: ServiceConfig, admin: KafkaAdminClient
) -> None:
    prepare_topics(made)
    outputs = made.outputs
    for name in OUTPUTS:
        assert partition_count(admin, getattr(outputs, name)) == 3
    cleanup = {
        name: settings_of(admin, getattr(outputs, name))["cleanup.policy"] for name in OUTPUTS
    }
    assert cleanup == {
        "scores": "delete",
        "alerts": "compact",
        "dead_letters": "delete",
        "state": "compact",
    }
    # All of the state is read at each assignment: compaction must not wait for a gigabyte.
    assert int(settings_of(admin, outputs.state)["segment.bytes"]) <= 16 * 1024 * 1024


def test_topics_that_are_there_are_left_as_they_are(
    made: ServiceConfig, admin: KafkaAdminClient
) -> None:
    outputs = made.outputs
    admin.create_topics(
        {outputs.scores: {"num_partitions": 1, "configs": {"retention.ms": "1234567"}}},
        wait_for_metadata=True,
    )
    prepare_topics(made)
    prepare_topics(made)
    assert partition_count(admin, outputs.scores) == 1
    assert settings_of(admin, outputs.scores)["retention.ms"] == "1234567"
    assert partition_count(admin, outputs.alerts) == 3


def test_the_state_topic_grows_with_the_input(made: ServiceConfig, admin: KafkaAdminClient) -> None:
    admin.create_topics({made.outputs.state: {"num_partitions": 2}}, wait_for_metadata=True)
    prepare_topics(made)
    assert partition_count(admin, made.outputs.state) == 3
    admin.create_partitions({made.input.topic: 5})
    for _ in range(100):
        if partition_count(admin, made.input.topic) == 5:
            break
    prepare_topics(made)
    for _ in range(100):
        if partition_count(admin, made.outputs.state) == 5:
            break
    assert partition_count(admin, made.outputs.state) == 5
    # The others hold records by key; a changed number of partitions would scatter them.
    assert partition_count(admin, made.outputs.alerts) == 3


def test_without_leave_to_create_it_says_what_to_create(
    made: ServiceConfig, admin: KafkaAdminClient, kafka: str
) -> None:
    forbidden = config(kafka, made.input.topic, create_topics=False)
    with pytest.raises(TopicError) as refusal:
        prepare_topics(forbidden)
    text = str(refusal.value)
    for name in OUTPUTS:
        assert getattr(made.outputs, name) in text
    assert "create them with 3 partitions or set outputs.create_topics" in text
    assert partition_count(admin, made.outputs.scores) is None
    # With the topics there, leave is not needed.
    prepare_topics(made)
    prepare_topics(forbidden)


def test_a_missing_input_topic_is_waited_for_and_not_created(
    kafka: str, admin: KafkaAdminClient
) -> None:
    with pytest.raises(RetryableError, match=rf"topic no-such \(input.topic\).*on {kafka}"):
        prepare_topics(config(kafka, "no-such"))
    assert partition_count(admin, "no-such") is None
    assert partition_count(admin, "no-such.scores") is None


def test_a_replication_that_the_brokers_cannot_give_is_said(
    made: ServiceConfig, kafka: str, admin: KafkaAdminClient
) -> None:
    asked = config(kafka, made.input.topic, replication_factor=3)
    with pytest.raises(TopicError, match="InvalidReplicationFactor"):
        prepare_topics(asked)
    assert partition_count(admin, made.outputs.scores) is None


LEFT_BEHIND = """
import gc, kafka, logging, os, sys, threading
from stream.clients import connect
logging.disable()

def attempt():
    try:
        connect(getattr(kafka, sys.argv[1]), bootstrap_servers=[sys.argv[2]],
                bootstrap_timeout_ms=100)
    except kafka.errors.KafkaError:
        gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd"))

first = attempt()
for _ in range(3):
    assert attempt() == first, (attempt(), first)
"""


@pytest.mark.parametrize("client", ["KafkaAdminClient", "KafkaConsumer", "KafkaProducer"])
def test_a_client_that_cannot_connect_leaves_no_thread_and_no_file_behind(client: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        servers = f"127.0.0.1:{probe.getsockname()[1]}"
        # In a process of its own, where nobody else opens and closes anything.
        answer = subprocess.run(
            [sys.executable, "-c", LEFT_BEHIND, client, servers],
            capture_output=True,
            text=True,
            check=False,
        )
    assert answer.returncode == 0, answer.stderr


def test_expect_topic_is_content_with_a_topic_and_creates_none(
    kafka: str, make_topic: MakeTopic, admin: KafkaAdminClient
) -> None:
    expect_topic({"bootstrap_servers": [kafka]}, make_topic())
    with pytest.raises(TopicError, match=f"expected topic no-such at {kafka}.*create it"):
        expect_topic({"bootstrap_servers": [kafka]}, "no-such")
    assert partition_count(admin, "no-such") is None


def test_who_waited_for_a_new_topic_can_write_to_all_of_it(
    make_topic: MakeTopic, kafka: str
) -> None:
    # It takes the broker a second to begin to lead so many, of which it tells at once.
    last = 299
    once = {"retries": 0, "enable_idempotence": False, "acks": "all"}
    with KafkaProducer(bootstrap_servers=kafka, **once) as producer:
        topic = make_topic(last + 1)  # waits with `await_topics`
        assert producer.send(topic, b"x", partition=last).get(timeout=20).offset == 0


@pytest.mark.parametrize("limit", [None, 100_000, 2_000_000])
def test_the_largest_dead_letter_is_what_its_topic_takes(
    made: ServiceConfig, admin: KafkaAdminClient, kafka: str, limit: int | None
) -> None:
    letters = made.outputs.dead_letters
    if limit is not None:
        options = {"num_partitions": 1, "configs": {"max.message.bytes": str(limit)}}
        admin.create_topics({letters: options}, wait_for_metadata=True)
    largest = prepare_topics(made)
    taken = int(settings_of(admin, letters)["max.message.bytes"])
    assert taken == (limit or 16 * 1024 * 1024)
    assert 0.8 * taken < largest < taken
    # With its headers and key it is really taken.
    headers = [("error", b"e" * 1000), ("reason", b"too_large")]
    with KafkaProducer(bootstrap_servers=kafka, max_request_size=2 * taken) as producer:
        sent = producer.send(letters, key=b"k" * 512, value=b"v" * largest, headers=headers)
        assert sent.get(timeout=20).offset == 0
