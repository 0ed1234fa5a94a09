"""What `tsdiff doctor` finds on a real broker, and what it says about samples of all kinds."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
from kafka import KafkaProducer

from stream.compose import Model
from stream.config import load_config
from stream.doctor import Finding, Sample, Sampled, examine, judge_sample
from stream.formats import Decoded
from tests.conftest import MakeTopic
from tests.stream.conftest import SmallBundle

pytestmark = pytest.mark.timeout(120)
NOW = 1_800_000_000.0
CONFIG = load_config(None, {"model.path": "b", "input.topic": "telemetry"})


@dataclass(frozen=True)
class FakeDetector:
    """What the checks read of a detector."""

    channels: tuple[str, ...] = ("cpu", "mem")
    period_ms: int = 60_000


@dataclass(frozen=True)
class FakeModel:
    """What the checks read of a model."""

    detector: FakeDetector = FakeDetector()


def healthy() -> Sample:
    """Two entities, a reading a minute, each in a partition of its own."""
    sample = Sample(partitions=2)
    for n in range(20):
        at = int(NOW * 1000) - (20 - n) * 60_000
        for number, entity in enumerate("ab"):
            held = Decoded(entity, at, {"cpu": 1.0, "mem": None})
            sample.messages.append(Sampled(number, True, at + 1000, (held,)))
    return sample


def judged(sample: Sample) -> dict[str, Finding]:
    model = cast(Model, FakeModel())
    return {found.check: found for found in judge_sample(sample, CONFIG, model, NOW)}


def test_a_healthy_sample_is_all_well() -> None:
    found = judged(healthy())
    assert {f.status for f in found.values()} == {"ok"}
    assert found.keys() == {"format", "keys", "clocks", "channels", "period"}


def changed(number: int, **changes: Any) -> Sample:  # noqa: ANN401
    sample = healthy()
    sample.messages[number] = replace(sample.messages[number], **changes)
    return sample


def with_readings(change: Any) -> Sample:  # noqa: ANN401
    sample = healthy()
    sample.messages = [
        replace(m, readings=tuple(change(reading) for reading in m.readings))
        for m in sample.messages
    ]
    return sample


AT = int(NOW * 1000)


@pytest.mark.parametrize(
    ("check", "said", "sample"),
    [
        ("format", "1 of 40 messages cannot be read: 1 not_json", changed(3, reason="not_json")),
        ("keys", "1 of 2 entities are in several partitions, as 'a'", changed(4, partition=1)),
        ("keys", "1 of 40 messages have no key", changed(5, keyed=False)),
        ("clocks", "appended 3600 s in the future", changed(6, appended_ms=AT + 3_600_000)),
        (
            "clocks",
            "1 entities are ahead of Kafka's clock, 'a' by 3600 s",
            changed(8, readings=(Decoded("a", healthy().messages[8].appended_ms + 3_600_000, {}),)),
        ),
        (
            "channels",
            "1 of the bundle's 2 channels do not arrive: mem; 1 that it does not know",
            with_readings(lambda r: replace(r, values={"cpu": 1.0, "disk": 2.0})),
        ),
        (
            "period",
            "readings come every 300 s, the bundle's period is 60 s",
            with_readings(lambda r: replace(r, timestamp_ms=r.timestamp_ms // 300_000 * 300_000)),
        ),
    ],
)
def test_what_is_wrong_with_a_sample_is_said(check: str, said: str, sample: Sample) -> None:
    found = judged(sample)
    assert found[check].status == "wrong"
    assert said in found[check].said
    assert found[check].mend
    assert [f.check for f in found.values() if f.status == "wrong"] == [check]


def test_an_empty_topic_is_not_wrong() -> None:
    assert judged(Sample(2))["sample"].status == "skipped"


def settings(servers: str, topic: str, bundle: object) -> dict[str, Any]:
    outputs = {name: f"{topic}.{name}" for name in ("scores", "alerts", "state", "dead_letters")}
    return {
        "model.path": str(bundle),
        "input.topic": topic,
        "input.bootstrap_servers": servers,
        "input.group": topic,
        "outputs": outputs,
    }


def test_on_a_real_broker(kafka: str, make_topic: MakeTopic, small_bundle: SmallBundle) -> None:
    topic = make_topic(partitions=2)
    given = settings(kafka, topic, small_bundle.path)
    found = {f.check: f for f in examine(None, given)}
    assert {f.status for f in found.values()} <= {"ok", "skipped"}, found
    assert found["sample"].said.startswith("not tried: the input topic is empty")
    assert "will create it" in found["topic of outputs.state"].said
    # An entity in both partitions, alerts that are not compacted, retention of a minute.
    short = make_topic(partitions=2, config={"retention.ms": "60000"})
    alerts = make_topic(partitions=2)
    values = dict.fromkeys(small_bundle.trained.channels, 1.0)
    with KafkaProducer(bootstrap_servers=kafka) as producer:
        for number in range(4):
            message = {"entity": "web-1", "timestamp": 60_000 * number, "values": values}
            producer.send(short, json.dumps(message).encode(), partition=number % 2)
    given = settings(kafka, short, small_bundle.path)
    given["outputs"]["alerts"] = alerts
    found = {f.check: f for f in examine(None, given)}
    wrong = {check for check, f in found.items() if f.status == "wrong"}
    assert wrong == {"keys", "topic of outputs.alerts", "retention"}, found
    assert f"{alerts} is not compacted, but delete" in found["topic of outputs.alerts"].said
    assert found["format"].said == "4 messages read as native"
    assert found["transactions"].status == "ok"


def test_what_cannot_be_had_is_said_and_the_rest_is_tried(kafka: str) -> None:
    found = {f.check: f for f in examine(None, settings(kafka, "nowhere", "no-bundle"))}
    assert found["bundle"].status == found["input topic"].status == "wrong"
    assert found["transactions"].status == "ok"
    (wrong,) = examine(None, {"model.path": "b"})
    assert (wrong.check, wrong.status) == ("config", "wrong")


def test_the_command_exits_1_and_tells_machines(small_bundle: SmallBundle) -> None:
    command = [sys.executable, "-m", "tsdiff.cli", "doctor"]
    given = [f"--set=model.path={small_bundle.path}", "--set=input.topic=t"]
    given.append("--set=input.bootstrap_servers=127.0.0.1:9")
    # Before jaxlib 0.10.2, XLA takes its own cached programs for foreign on some processors.
    alone = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command += given
    done = subprocess.run(
        [*command, "--json"], check=False, capture_output=True, text=True, env=alone
    )
    assert (done.returncode, done.stderr) == (1, "")
    told = json.loads(done.stdout)
    assert told["ok"] is False
    status = {f["check"]: f["status"] for f in told["findings"]}
    assert status == {"config": "ok", "bundle": "ok", "broker": "wrong", "topics": "skipped"}
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "WRONG broker: no broker answers" in done.stdout
    assert "to mend it: start it" in done.stdout
