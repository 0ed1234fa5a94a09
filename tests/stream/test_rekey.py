"""Messages spread over partitions come together in another topic: none lost, none twice."""

import json
import random
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka.errors import KafkaTimeoutError

from stream import rekey as rekey_module
from stream.clients import end_transaction
from stream.config import ServiceConfig, load_config
from stream.formats.native import decode_native
from stream.rekey import RekeySummary, keyed, rekey
from tests.conftest import MakeTopic
from tests.stream.workers import Reader

pytestmark = pytest.mark.timeout(120)


def reading(entity: str, timestamp: int) -> bytes:
    return json.dumps({"entity": entity, "timestamp": timestamp, "values": {"a": 1.5}}).encode()


def config(servers: str, topic: str) -> ServiceConfig:
    settings = {
        "model.path": "none",
        "input.topic": topic,
        "input.bootstrap_servers": servers,
        "input.group": f"{topic}.group",
    }
    return load_config(None, settings)


def spread(servers: str, topic: str) -> list[bytes]:
    """Three entities, sent without a key to three partitions in turn, and two bad messages."""
    sent = [reading(f"e{n % 3}", 1000 * n) for n in range(300)]
    with KafkaProducer(bootstrap_servers=servers) as producer:
        for n, value in enumerate(sent):
            header = [("n", str(n).encode())]
            producer.send(topic, value, partition=random.Random(n).randrange(3), headers=header)  # noqa: S311
        producer.send(topic, b"{not json", key=b"k", partition=0)
        producer.send(topic, None, key=b"k", partition=1)
        producer.flush()
    return sent


def never() -> bool:
    return False


def test_rekey_brings_each_entity_into_one_partition(kafka: str, make_topic: MakeTopic) -> None:
    topic, to = make_topic(partitions=3), make_topic(partitions=3)
    sent = spread(kafka, topic)
    summary = rekey(config(kafka, topic), to, stopping=never, until_end=True)
    assert summary == RekeySummary(messages=302, unread=2, mixed=0)
    reader = Reader(kafka, to)
    records = reader.records()
    reader.close()
    by_entity, homes = defaultdict(list), defaultdict(set)
    for record in records:
        if record.key != b"k":
            by_entity[record.key].append(record)
            homes[record.key].add(record.partition)
    assert {len(where) for where in homes.values()} == {1}
    for n in range(3):
        mine = by_entity[f"e{n}".encode()]
        # The same bytes in the order of their time, though they came from three partitions.
        assert [record.value for record in mine] == sent[n::3]
        assert [dict(record.headers)["n"] for record in mine] == [
            str(i).encode() for i in range(n, 300, 3)
        ]
    assert sorted(r.value or b"" for r in records if r.key == b"k") == [b"", b"{not json"]
    # Done is done: it goes on where it ended.
    assert rekey(config(kafka, topic), to, stopping=never, until_end=True).messages == 0


def test_rekey_repeats_nothing_when_a_commit_fails(
    kafka: str, make_topic: MakeTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, to = make_topic(partitions=3), make_topic(partitions=3)
    spread(kafka, topic)
    failures = [True]

    def fail_once(producer: KafkaProducer, *given: Any) -> None:  # noqa: ANN401
        if failures:
            failures.pop()
            producer.flush()
            raise KafkaTimeoutError("after everything was sent")
        end_transaction(producer, *given)

    monkeypatch.setattr(rekey_module, "end_transaction", fail_once)
    rekey(config(kafka, topic), to, stopping=never, until_end=True)
    reader = Reader(kafka, to)
    records = reader.records()
    reader.close()
    assert len(records) == 302
    assert len({(r.key, r.value) for r in records}) == 302


def test_a_message_of_several_entities_keeps_its_key() -> None:
    record = SimpleNamespace(value=b"x", key=b"old", timestamp=5, headers=[])

    def decode(_: bytes) -> list[object]:
        return [SimpleNamespace(entity=name, timestamp_ms=7) for name in ("a", "b")]

    found = keyed(record, decode)  # type: ignore[arg-type]
    assert (found.key, found.mixed, found.timestamp_ms) == (b"old", True, 7)
    record.value = reading("web", 9)
    found = keyed(record, decode_native)
    assert (found.key, found.mixed, found.timestamp_ms) == (b"web", False, 9)


def test_the_command_says_what_is_missing(kafka: str, make_topic: MakeTopic) -> None:
    topic = make_topic()
    settings = [f"--set=input.topic={topic}", f"--set=input.bootstrap_servers={kafka}"]
    for to, error in ((topic, "expected another topic"), ("nowhere", "expected topic nowhere")):
        done = subprocess.run(
            [sys.executable, "-m", "tsdiff.cli", "rekey", f"--to={to}", *settings],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode in (1, 2)
        assert error in done.stderr
        assert len(done.stderr.splitlines()) == 1
