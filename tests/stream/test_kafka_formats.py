"""Several formats through the service on a real broker, and what was poison sent once more."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from confluent_kafka import Producer as ConfluentProducer
from kafka import KafkaProducer
from prometheus_client import CollectorRegistry

from stream.compose import Model, load_model, run_service
from stream.config import load_config
from stream.dead_letters import ResendSummary, resend
from stream.errors import StreamError
from stream.stop import Stop
from tests.conftest import MakeTopic
from tests.stream.conftest import SmallBundle
from tests.stream.workers import Deployment, Scores, deployment, wait_until
from train.config import TrainConfig
from train.loop import train
from tsdiff.bundle import save_bundle
from tsdiff.history import History

Messages = Iterator[tuple[str, bytes]]


def cells(history: History) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Entity, time and known values of each reading, in the order of time."""
    for at in range(len(history.entities[0].timestamps_ms)):
        for entity in history.entities:
            values = zip(history.channels, entity.values[at].tolist(), strict=True)
            known = {name: value for name, value in values if not np.isnan(value)}
            yield entity.entity, int(entity.timestamps_ms[at]), known


def native(history: History) -> Messages:
    for entity, timestamp, values in cells(history):
        message = {"entity": entity, "timestamp": timestamp, "values": values}
        yield entity, msgspec.json.encode(message)


def one_line_a_channel(history: History) -> Messages:
    for entity, timestamp, values in cells(history):
        for channel, value in values.items():
            name, field = channel.split(".")
            yield entity, f"{name},host={entity} {field}={value} {timestamp * 10**6}\n".encode()


def otlp(history: History) -> Messages:
    from google.protobuf.json_format import ParseDict
    from opentelemetry.proto.metrics.v1.metrics_pb2 import MetricsData

    for entity, timestamp, values in cells(history):
        time = str(timestamp * 10**6)
        metrics = [
            {"name": name, "gauge": {"dataPoints": [{"asDouble": value, "timeUnixNano": time}]}}
            for name, value in values.items()
        ]
        resource = {"attributes": [{"key": "host.name", "value": {"stringValue": entity}}]}
        message = {
            "resourceMetrics": [{"resource": resource, "scopeMetrics": [{"metrics": metrics}]}]
        }
        yield entity, ParseDict(message, MetricsData()).SerializeToString()


@pytest.fixture
def model(small_bundle: SmallBundle, tmp_path: Path) -> Model:
    """A model whose channels are called as Telegraf would call them."""
    channels = tuple(f"web.{name}" for name in small_bundle.trained.channels)
    few = tuple(
        replace(e, timestamps_ms=e.timestamps_ms[:1200], values=e.values[:1200])
        for e in small_bundle.trained.entities[:2]
    )
    history = History(channels, few, ())
    bundle = train(history, TrainConfig(name="formats", network=None), period_ms=60_000)
    save_bundle(bundle, tmp_path / "bundle")
    return load_model(tmp_path / "bundle")


def test_all_formats_give_the_same_scores_and_poison_is_sent_again(
    kafka: str, make_topic: MakeTopic, model: Model, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    history = History(
        model.detector.channels,
        tuple(
            replace(e, timestamps_ms=e.timestamps_ms[:40], values=e.values[:40])
            for e in small_bundle.live.entities[:2]
        ),
        (),
    )
    # The newest slot stays open where something is missing.
    slots = sum(40 - int(np.isnan(e.values[-1]).any()) for e in history.entities)
    formats: dict[str, Callable[[History], Messages]] = {
        "native": native,
        "telegraf-influx": one_line_a_channel,
        "otlp-proto": otlp,
    }
    found: dict[str, Scores] = {}
    for name, messages in formats.items():
        topic = make_topic(partitions=2, name=name)
        with deployment(kafka, topic, tmp_path / "bundle", tmp_path) as deployed:
            deployed.settings["input.format"] = name
            with KafkaProducer(bootstrap_servers=kafka) as producer:
                poison = {"key": b"k", "headers": [("topic", b"theirs"), ("trace", b"\xff")]}
                producer.send(topic, value=b"\xffpoison", partition=1, **poison)
                send_nothing(kafka, topic)
                for key, message in messages(history):
                    producer.send(topic, key=key.encode(), value=message)
                producer.flush()
            run(model, deployed, slots)
            found[name] = deployed.read_scores()
            assert_sent_again(deployed)
    assert len(found["native"]) == slots
    assert {s["state"] for s in found["native"].values()} > {"warming"}
    for other in ("telegraf-influx", "otlp-proto"):
        assert found[other].keys() == found["native"].keys()
        for at, score in found["native"].items():
            assert found[other][at]["imputed_ratio"] == score["imputed_ratio"]
            expected = score["anomaly_score"]
            if expected is not None:
                expected = pytest.approx(expected, abs=5e-5)
            assert found[other][at]["anomaly_score"] == expected


def send_nothing(servers: str, topic: str) -> None:
    """Send a record of neither key nor value, which kafka-python itself does not write."""
    producer = ConfluentProducer({"bootstrap.servers": servers})
    producer.produce(topic, partition=0, headers=[("empty", None)])
    assert producer.flush(30) == 0


def run(model: Model, deployed: Deployment, scores: int) -> None:
    """Run the service in this process until it has written so many scores."""
    stop, failed = Stop(), list[BaseException]()

    def work() -> None:
        try:
            config = load_config(None, deployed.settings)
            run_service(config, model, stop, registry=CollectorRegistry())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        wait_until(
            lambda: failed or len(deployed.records(deployed.scores)) >= scores,
            f"{scores} scores",
            120,
        )
    finally:
        stop.request()
        thread.join(60)
    assert not failed


def assert_sent_again(deployed: Deployment) -> None:
    config = load_config(None, deployed.settings)
    letters = {r.value: r for r in deployed.records(deployed.dead_letters)}
    assert letters.keys() == {b"", b"\xffpoison"}
    assert letters[b"\xffpoison"].key == b"k"
    nothing = dict(letters[b""].headers)
    assert (letters[b""].key, nothing["reason"], nothing["empty"]) == (None, b"empty", b"")
    before = deployed.records(deployed.topic)
    progress: list[tuple[int, int]] = []
    assert resend(config, lambda *at: progress.append(at)) == ResendSummary(2, 0)
    assert progress[-1][0] == 2
    # A commit is answered before its markers are written, and only then may others read it.
    wait_until(lambda: len(deployed.records(deployed.topic)) >= len(before) + 2, "both again", 30)
    found = deployed.records(deployed.topic)[len(before) :]
    assert sorted(record.partition for record in found) == [0, 1]
    (again,) = (record for record in found if record.value)
    assert (again.key, again.value, again.partition) == (b"k", b"\xffpoison", 1)
    assert again.headers == [("topic", b"theirs"), ("trace", b"\xff")]
    # Once is enough, and what is not ours stays where it is.
    assert resend(config) == ResendSummary(0, 0)
    with KafkaProducer(bootstrap_servers=deployed.servers) as producer:
        producer.send(deployed.dead_letters, value=b"no headers").get(timeout=30)
    assert resend(config) == ResendSummary(0, 1)


def test_dead_letters_without_a_topic(kafka: str) -> None:
    settings: dict[str, Any] = {
        "model.path": "bundle",
        "input.topic": "t",
        "input.bootstrap_servers": kafka,
        "outputs.dead_letters": "nowhere",
    }
    with pytest.raises(StreamError, match=r"expected topic nowhere .*there is nothing to send"):
        resend(load_config(None, settings))
