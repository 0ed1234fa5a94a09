"""The service on a real broker: processes that start, stop, crash and share the work.

Backfill of the same readings is the reference: whatever happens to the workers, a
`read_committed` reader of the scores finds every (entity, slot) once, with the same numbers.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from kafka import KafkaProducer
from kafka_node import KafkaLocal

from stream.backfill import backfill
from stream.codec import rfc3339
from stream.compose import load_model
from stream.config import load_config
from tests.conftest import MakeTopic
from tests.stream.conftest import SmallBundle
from tests.stream.workers import Deployment, Scores, deployment, difference, wait_until
from tsdiff.detector import HISTORY_SHAPES

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="session")
def reference(small_bundle: SmallBundle, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """What an undisturbed run over the same readings says, from `tsdiff backfill`'s own code."""
    path = tmp_path_factory.mktemp("backfill") / "scores.parquet"
    config = load_config(
        None, {"model.path": small_bundle.path, "input.topic": "t", "grid.lateness": "0s"}
    )
    backfill(small_bundle.live, load_model(small_bundle.path, HISTORY_SHAPES), config, path)
    return {
        (row["entity"], rfc3339(int(row["timestamp"].timestamp() * 1000))): row
        for row in pq.read_table(path).to_pylist()
    }


@pytest.fixture
def deployed(
    kafka: str, make_topic: MakeTopic, small_bundle: SmallBundle, tmp_path: Path
) -> Iterator[Deployment]:
    topic = make_topic(partitions=2, name="telemetry")
    with deployment(kafka, topic, small_bundle.path, tmp_path) as deployed:
        yield deployed


def assert_same(live: Scores, reference: Scores) -> None:
    """Same entities, slots and states; scores, p and channels equal to float32's rounding."""
    assert live.keys() == reference.keys()
    for key, expected in reference.items():
        assert not difference(live[key], expected), (key, difference(live[key], expected))


def test_live_and_backfill_say_the_same(
    deployed: Deployment, small_bundle: SmallBundle, reference: Scores
) -> None:
    worker = deployed.start()
    sent = deployed.send(small_bundle.live, small_bundle.period_ms)
    deployed.wait_for_scores(len(reference), worker)
    assert worker.stop() == 0
    assert_same(deployed.read_scores(), reference)
    # Nothing was lost on the way in either: every reading but those of the open slot is scored.
    observed = sum(score["imputed_ratio"] < 1 for score in reference.values())
    assert sent - len(small_bundle.live.entities) <= observed <= sent
    states = {score["state"] for score in reference.values()}
    assert {"warming", "ok", "firing", "recovering"} <= states


def test_kill_9_loses_and_repeats_nothing(
    deployed: Deployment, small_bundle: SmallBundle, reference: Scores
) -> None:
    deployed.send(small_bundle.live, small_bundle.period_ms)
    # Small rounds, so that every kill falls into the middle of the work.
    for share in (0.2, 0.5, 0.8):
        worker = deployed.start(input__max_poll_records=20)
        deployed.wait_for_scores(int(share * len(reference)), worker)
        worker.kill()
        done = len(deployed.read_scores())
        assert done < len(reference), "the worker was done before it could be killed"
    last = deployed.start()
    deployed.wait_for_scores(len(reference), last)
    assert last.stop() == 0
    assert_same(deployed.read_scores(), reference)
    assert last.said("partition assigned")
    assert any(event.get("replay_from", 0) > 0 for event in last.events())


def test_workers_that_join_and_leave_share_the_work(
    deployed: Deployment, small_bundle: SmallBundle, reference: Scores
) -> None:
    first = deployed.start(input__max_poll_records=40)
    first.wait_for("partition assigned")
    deployed.send(small_bundle.live, small_bundle.period_ms)
    deployed.wait_for_scores(1000, first)
    second = deployed.start(input__max_poll_records=40)
    second.wait_for("partition assigned")
    assert first.stop() == 0
    deployed.wait_for_scores(len(reference), second)
    assert second.stop() == 0
    assert_same(deployed.read_scores(), reference)


def test_at_least_once_loses_nothing(
    deployed: Deployment, small_bundle: SmallBundle, reference: Scores
) -> None:
    deployed.settings["delivery.mode"] = "at-least-once"
    deployed.send(small_bundle.live, small_bundle.period_ms)
    worker = deployed.start(input__max_poll_records=60)
    deployed.wait_for_scores(1000, worker)
    worker.kill()
    worker = deployed.start()

    def keys() -> set[tuple[str, str]]:
        records = [json.loads(r.value) for r in deployed.records(deployed.scores)]
        return {(r["entity"], r["timestamp"]) for r in records}

    wait_until(lambda: keys() == reference.keys(), "every slot at least once", 60, worker)
    assert worker.stop() == 0


@pytest.mark.slow
def test_a_broker_that_goes_away_and_comes_back(
    small_bundle: SmallBundle, reference: Scores, tmp_path: Path, kafka: str
) -> None:
    # A broker of its own, since the others share theirs; `kafka` has shown that one can be had.
    broker = KafkaLocal(port=0, data=tmp_path / "kafka")
    broker.start()
    try:
        admin_create(broker.bootstrap_servers, "telemetry")
        with deployment(
            broker.bootstrap_servers, "telemetry", small_bundle.path, tmp_path
        ) as deployed:
            deployed.send(small_bundle.live, small_bundle.period_ms)
            worker = deployed.start(input__max_poll_records=20)
            other = deployed.start(input__max_poll_records=20)
            deployed.wait_for_scores(1000, worker)
            # kafka-python 3.0.12 leaks a socket with every connection that is refused.
            deployed.close_readers()
            broker.kill()
            time.sleep(8)  # longer than the session and the transaction may last
            # Who is asked to stop does not wait for the broker, which kafka-python does for 30 s.
            assert other.stop(15) == 0
            broker.restart()
            deployed.wait_for_scores(len(reference), worker, 120)
            assert worker.stop() == 0
            assert_same(deployed.read_scores(), reference)
    finally:
        broker.stop()


@pytest.mark.parametrize("idle", [False, True])
def test_the_older_of_two_services_with_one_name_ends_and_says_why(
    deployed: Deployment, small_bundle: SmallBundle, idle: bool
) -> None:
    first = deployed.start(input__instance_id="pod-0")
    first.wait_for("partition assigned")
    second = deployed.start(input__instance_id="pod-0")
    second.wait_for("partition assigned")
    if not idle:  # it learns of it when it has something to commit, or a session later
        deployed.send(small_bundle.live, small_bundle.period_ms)
    assert first.process.wait(60) == 1
    assert "expected to be the only service of group" in first.log.read_text()
    assert "Traceback" not in first.log.read_text()
    assert second.stop() == 0


def admin_create(servers: str, topic: str) -> None:
    from kafka import KafkaAdminClient

    admin = KafkaAdminClient(bootstrap_servers=servers)
    admin.create_topics({topic: {"num_partitions": 2}})
    admin.close()


class NotUtf8(str):
    """A header's name as another client may write it."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        del encoding, errors
        return b"tr\xff\xfe\xfde"


def test_bad_messages_become_dead_letters_and_stop_nothing(
    deployed: Deployment, small_bundle: SmallBundle
) -> None:
    start = 1_767_571_200_000
    entity = small_bundle.trained.entities[0].entity
    values = dict.fromkeys(small_bundle.trained.channels, 1.0)

    def good(slot: int, **changes: object) -> bytes:
        timestamp = start + slot * small_bundle.period_ms
        message = {"entity": entity, "timestamp": timestamp, "values": values, **changes}
        return json.dumps(message).encode()

    far_ahead = int(time.time() * 1000) + 7 * 24 * 3600 * 1000
    bad: dict[bytes | None, str] = {
        b"{not json": "not_json",
        b"\xff\xfe": "not_json",
        b"": "empty",
        b"[1, 2]": "wrong_type",
        good(1, entity=5): "wrong_type",
        good(2, values={"cpu_usage": "high"}): "wrong_type",
        good(3, entity=""): "missing_field",
        json.dumps({"timestamp": start, "values": {}}).encode(): "missing_field",
        json.dumps({"entity": entity, "values": {}}).encode(): "missing_field",
        good(4, timestamp="yesterday"): "bad_timestamp",
        good(5, timestamp=far_ahead): "future_timestamp",
        b'{"entity": "' + b"x" * 10_000_000 + b'"}': "too_large",
    }
    readings = [
        good(10),
        good(11, values={**values, "unheard_of": 3.0}),
        good(11),  # the same slot again
        good(12, values={**values, "cpu_usage": float("nan"), "load_1m": float("inf")}),
        good(13, values={}),
        good(14),
        good(15),
    ]
    # Such a name is no reason to refuse a reading; of a dead letter it is told as far as it goes.
    odd = [(NotUtf8("trace"), b"1"), ("é", b"")]
    with KafkaProducer(bootstrap_servers=deployed.servers, max_request_size=12_000_000) as producer:
        for value in [*bad, *readings]:
            producer.send(deployed.topic, value=value, key=b"k", partition=0, headers=odd).get(
                timeout=30
            )
        producer.send(deployed.topic, value=None, key=b"k", partition=0).get(timeout=30)
    worker = deployed.start()
    deployed.wait_for_scores(5, worker)
    wait_until(
        lambda: len(deployed.records(deployed.dead_letters)) > len(bad), "dead letters", 30, worker
    )
    assert worker.stop() == 0
    letters = {r.value: dict(r.headers) for r in deployed.records(deployed.dead_letters)}
    assert {v: h["reason"].decode() for v, h in letters.items()} == {**bad, None: "empty"}
    for number, value in enumerate(bad):
        headers = letters[value]
        assert headers["topic"].decode() == deployed.topic
        assert (headers["partition"], headers["offset"]) == (b"0", str(number).encode())
        assert headers["error"]
        assert {*headers} >= {"tr???e", "??"}
    scores = deployed.read_scores()
    slots = sorted(stamp for _, stamp in scores)
    assert slots == [rfc3339(start + n * small_bundle.period_ms) for n in range(10, 15)]
    imputed = [scores[(entity, stamp)]["imputed_ratio"] for stamp in slots]
    assert imputed == pytest.approx([0, 0, 2 / 12, 1, 0])


def test_a_topic_that_does_not_exist_yet_is_waited_for(
    kafka: str, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    topic = f"later-{time.time_ns()}"
    with deployment(kafka, topic, small_bundle.path, tmp_path) as deployed:
        worker = deployed.start()
        worker.wait_for("waiting")
        waiting = next(e for e in worker.events() if e["event"] == "waiting")
        assert f"topic {topic} (input.topic) does not exist" in waiting["error"]
        admin_create(kafka, topic)
        worker.wait_for("partition assigned")
        # An empty topic is no reason to say or to do anything.
        assert deployed.records(deployed.scores) == []
        assert worker.stop() == 0


def test_a_broker_that_is_down_at_start_is_waited_for(
    small_bundle: SmallBundle, tmp_path: Path
) -> None:
    with deployment("127.0.0.1:9", "t", small_bundle.path, tmp_path) as deployed:
        worker = deployed.start()
        worker.wait_for("waiting")
        waiting = next(e for e in worker.events() if e["event"] == "waiting")
        assert "no broker answers at 127.0.0.1:9 (input.bootstrap_servers)" in waiting["error"]
        assert worker.stop() == 0
