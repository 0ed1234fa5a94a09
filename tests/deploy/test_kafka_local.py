"""The local Kafka node: it answers, survives what it is meant to survive, and explains itself."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kafka_node
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import TopicAlreadyExistsError
from kafka_node import KafkaLocal, KafkaLocalError, answers

from tests.conftest import ROOT, MakeTopic, unavailable

SCRIPT = ROOT / "deploy" / "kafka-local" / "kafka_local.py"


def produce(servers: str, topic: str, *values: bytes) -> None:
    with contextlib.closing(KafkaProducer(bootstrap_servers=servers, acks="all")) as producer:
        for sent in [producer.send(topic, value, partition=0) for value in values]:
            sent.get(timeout=30)


def read_all(servers: str, topic: str) -> list[bytes]:
    place = TopicPartition(topic, 0)
    with contextlib.closing(KafkaConsumer(bootstrap_servers=servers)) as consumer:
        consumer.assign([place])
        consumer.seek_to_beginning(place)
        end = consumer.end_offsets([place])[place]
        values: list[bytes] = []
        while consumer.position(place) < end:
            for records in consumer.poll(timeout_ms=1000).values():
                values += [record.value for record in records]
        return values


@pytest.fixture(scope="module")
def own_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaLocal]:
    node = KafkaLocal(port=0, data=tmp_path_factory.mktemp("kafka"))
    try:
        node.start()
    except KafkaLocalError as error:
        unavailable(f"no local Kafka: {error}")
    try:
        yield node
    finally:
        node.stop()


@pytest.fixture
def kept_topic(own_node: KafkaLocal) -> str:
    with (
        contextlib.closing(KafkaAdminClient(bootstrap_servers=own_node.bootstrap_servers)) as admin,
        contextlib.suppress(TopicAlreadyExistsError),
    ):
        admin.create_topics({"kept": {"num_partitions": 1}}, wait_for_metadata=True)
    return "kept"


def run_script(*arguments: str, state: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "XDG_STATE_HOME": str(state)},
    )


def test_what_is_produced_comes_back(kafka: str, make_topic: MakeTopic) -> None:
    topic = make_topic(partitions=1, config={"max.message.bytes": "1000"})
    produce(kafka, topic, *(b"%d" % number for number in range(100)))
    assert read_all(kafka, topic) == [b"%d" % number for number in range(100)]


def test_ten_megabytes_fit_in_a_message(own_node: KafkaLocal, kept_topic: str) -> None:
    size = 10 * 1024 * 1024
    producer = KafkaProducer(
        bootstrap_servers=own_node.bootstrap_servers,
        max_request_size=2 * size,
    )
    with contextlib.closing(producer):
        assert producer.send(kept_topic, bytes(size)).get(timeout=30).offset >= 0


def test_log_and_port_survive_stop_and_kill(own_node: KafkaLocal, kept_topic: str) -> None:
    servers = own_node.bootstrap_servers
    before = len(read_all(servers, kept_topic))
    produce(servers, kept_topic, b"first")
    own_node.restart()
    produce(servers, kept_topic, b"second")
    own_node.kill()
    assert not own_node.running
    assert not answers(own_node.port)
    own_node.restart()
    assert own_node.bootstrap_servers == servers
    assert read_all(servers, kept_topic)[before:] == [b"first", b"second"]


def test_a_paused_node_is_there_but_silent(own_node: KafkaLocal) -> None:
    own_node.pause()
    try:
        assert own_node.running
        assert not answers(own_node.port, timeout_seconds=0.3)
    finally:
        own_node.resume()
    assert any(answers(own_node.port) for _ in range(20))


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = run_script("start", "--port", str(port), "--detach", state=tmp_path)
    if "no java" in answer.stderr or "no mvn" in answer.stderr:
        unavailable(answer.stderr.strip())
    assert answer.returncode == 1
    assert f"error: cannot listen on 127.0.0.1:{port}" in answer.stderr
    assert "--port 0" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_two_nodes_never_share_their_data(own_node: KafkaLocal) -> None:
    second = KafkaLocal(port=0, data=own_node.folder)
    with pytest.raises(KafkaLocalError, match="another node runs on"):
        second.start()
    assert not second.running
    assert answers(own_node.port)


def test_start_status_stop_from_the_command_line(own_node: KafkaLocal, tmp_path: Path) -> None:
    assert run_script("status", state=tmp_path).returncode == 1
    started = run_script("start", "--port", "0", "--detach", state=tmp_path)
    try:
        assert started.returncode == 0, started.stderr
        servers = started.stdout.strip()
        port = servers.removeprefix("127.0.0.1:")
        status = run_script("status", "--port", port, state=tmp_path)
        assert status.returncode == 0
        assert status.stdout.startswith(f"{servers} answers")
        folder = Path(status.stdout.rpartition("folder ")[2].strip().rstrip(")"))
        assert (folder / "kafka.log").is_file()
    finally:
        stopped = run_script("stop", state=tmp_path)
    assert stopped.returncode == 0
    assert not folder.exists()
    assert run_script("stop", state=tmp_path).returncode == 1


@pytest.mark.parametrize("arguments", [(), ("start", "--port", "70000"), ("begin",)])
def test_wrong_usage_is_status_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    answer = run_script(*arguments, state=tmp_path)
    assert answer.returncode == 2
    assert "usage:" in answer.stderr


def test_help_names_every_command(tmp_path: Path) -> None:
    answer = run_script("--help", state=tmp_path)
    assert answer.returncode == 0
    for command in ("start", "status", "stop"):
        assert command in answer.stdout


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
    path.chmod(0o755)


def test_no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(KafkaLocalError, match="no java found"):
        KafkaLocal().start()


def test_old_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_program(tmp_path / "java", """echo 'openjdk version "11.0.2" 2019' >&2""")
    monkeypatch.setenv("PATH", f"{tmp_path}")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(KafkaLocalError, match=r"needs Java 17 or newer.*11\.0\.2"):
        KafkaLocal().start()


def test_no_maven_and_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KafkaLocalError, match="no mvn found"):
        kafka_node.find_jars()


def test_failed_download_leaves_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_program(tmp_path / "mvn", "echo '[ERROR] Could not resolve kafka'; exit 1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KafkaLocalError, match="Could not resolve kafka"):
        kafka_node.find_jars()
    assert not kafka_node.cache_dir().exists()


@pytest.fixture
def fake_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Put a Java first in the path that formats anything and then runs `broker`, a script."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    write_program(
        bin_dir / "java",
        f"""case "$*" in
          -version) echo 'openjdk version "21.0.1"' >&2;;
          *StorageTool*) ;;
          *) exec /bin/sh {tmp_path / "broker"};;
        esac""",
    )
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kafka_node.cache_dir().mkdir(parents=True)
    return tmp_path / "broker"


def test_the_dying_broker_s_own_reason_is_passed_on(fake_java: Path) -> None:
    fake_java.write_text("echo 'noon [ERROR] the disk is made of cheese'; exit 3", "utf-8")
    node = KafkaLocal()
    with pytest.raises(KafkaLocalError, match=r"died \(status 3\): noon.*made of cheese"):
        node.start()
    assert not node.running


def test_a_silent_broker_is_given_up(fake_java: Path) -> None:
    fake_java.write_text("exec sleep 60", "utf-8")
    node = KafkaLocal()
    with pytest.raises(KafkaLocalError, match="does not answer after 1 s; it logged nothing"):
        node.start(timeout_seconds=1.0)
    assert not node.running


def test_signals_need_a_running_node() -> None:
    node = KafkaLocal()
    with pytest.raises(KafkaLocalError, match="not running"):
        node.pause()
    node.stop()
