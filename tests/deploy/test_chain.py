"""From a reading to a person: Kafka, the service, Prometheus, Alertmanager and a webhook, for real.

The rules and settings are those of `deploy/`, copied with every duration divided by 60, so that
"for a minute" is a second; nothing else is changed but addresses.
"""

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka import KafkaProducer

from stream.simulate import CHANNELS, Fleet, simulate_fleet
from tests.conftest import MakeTopic
from tests.deploy.chain import Chain, chain
from tests.stream.workers import Deployment, deployment
from train.config import TrainConfig
from train.loop import train
from tsdiff.bundle import save_bundle

pytestmark = pytest.mark.timeout(180)

TRAINED, PAST = 2400, 200
FAULTY = ("latency_p95", "queue_depth")


class Feed:
    """Sends the fleet's readings slot by slot, with a fault in `faulty` entities."""

    def __init__(self, servers: str, topic: str, fleet: Fleet) -> None:
        self.faulty: frozenset[str] = frozenset()
        self._topic, self._fleet = topic, fleet
        self._producer = KafkaProducer(bootstrap_servers=servers, linger_ms=5)
        self._slot = TRAINED
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def send(self) -> None:
        """One slot of all entities."""
        fleet, slot = self._fleet, self._slot
        self._slot += 1
        for row, entity in enumerate(fleet.entities):
            values = dict(
                zip(fleet.channels, (float(v) for v in fleet.values[row, slot]), strict=True)
            )
            for channel in FAULTY if entity in self.faulty else ():
                values[channel] = 5 * values[channel] + 50
            timestamp = int(fleet.timestamps_ms[slot])
            message = {"entity": entity, "timestamp": timestamp, "values": values}
            self._producer.send(self._topic, json.dumps(message).encode(), entity.encode())

    def begin(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        # Several slots between two scrapes, as nobody has: what counts is told all the same.
        while not self._ending.wait(0.15):
            self.send()

    def end(self) -> None:
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        self._producer.close()


@pytest.fixture
def fleet() -> Fleet:
    fleet = simulate_fleet(6, 12, slots=TRAINED + PAST + 1500, seed=5, missing=0.0)
    assert set(FAULTY) <= CHANNELS.keys()
    return fleet


@pytest.fixture
def deployed(
    kafka: str, make_topic: MakeTopic, fleet: Fleet, tmp_path: Path
) -> Iterator[Deployment]:
    bundle = train(
        fleet.history(0, TRAINED), TrainConfig(name="chain", network=None), period_ms=60_000
    )
    save_bundle(bundle, tmp_path / "bundle")
    topic = make_topic(name="telemetry")
    with deployment(kafka, topic, tmp_path / "bundle", tmp_path) as deployed:
        yield deployed


def channels_told(description: str) -> dict[str, tuple[float, float]]:
    """Expected and observed by channel, as the alert says them."""
    found = re.findall(r"(\S+) \([\d.]+% of it\): expected (\S+), observed (\S+)\.", description)
    return {channel: (float(expected), float(observed)) for channel, expected, observed in found}


def test_an_anomaly_is_told_once_with_its_channels_and_a_fleet_of_them_as_one(
    deployed: Deployment, fleet: Fleet, tmp_path: Path
) -> None:
    worker = deployed.start(metrics__listen="127.0.0.1:0")
    worker.wait_for("metrics")
    url = next(e["url"] for e in worker.events() if e["event"] == "metrics")
    feed = Feed(deployed.servers, deployed.topic, fleet)
    try:
        for _ in range(PAST):
            feed.send()
        # The newest slots stay open.
        deployed.wait_for_scores((PAST - 2) * len(fleet.entities), worker)
        feed.begin()
        with chain(tmp_path, url.removeprefix("http://")) as told:
            watch(told, feed, fleet, deployed, worker.log)
    finally:
        feed.end()
    assert worker.stop() == 0


def watch(told: Chain, feed: Feed, fleet: Fleet, deployed: Deployment, log: Path) -> None:
    calm = "count(tsdiff_alert_active == 0) == 6 and on () tsdiff_ready == 1"
    told.wait_until(lambda: told.query(calm), "six calm entities", [log])
    assert told.query("process_resident_memory_bytes / tsdiff_memory_limit_bytes < 1")
    assert told.receiver.notifications == []

    # One entity, one notification.
    feed.faulty = frozenset({"web-2"})
    told.wait_until(lambda: told.told("firing", "TsdiffEntityAnomalous"), "a notification", [log])
    time.sleep(2)  # another one would come within group_wait
    feed.faulty = frozenset()
    told.wait_until(
        lambda: told.told("resolved", "TsdiffEntityAnomalous"), "it being resolved", [log]
    )
    (path, firing), (_, resolved) = told.receiver.notifications
    assert path == "/page"
    (alert,) = firing["alerts"]
    assert firing["groupLabels"] == {
        "alertname": "TsdiffEntityAnomalous",
        "entity": "web-2",
        "job": "tsdiff",
    }
    assert alert["labels"]["severity"] == "critical"
    assert alert["annotations"]["summary"] == "web-2 behaves as it seldom does."
    assert alert["annotations"]["runbook_url"].endswith("/TsdiffEntityAnomalous.md")
    assert_as_scored(alert["annotations"]["description"], deployed)
    assert [a["labels"]["entity"] for a in resolved["alerts"]] == ["web-2"]

    # Many at once, one notification; the entities' own alerts fire, and are held back.
    feed.faulty = frozenset(fleet.entities)
    told.wait_until(
        lambda: len(told.suppressed()) == 6 and told.told("firing", "TsdiffFleetAnomalous"),
        "an alert of the fleet, and none of its entities",
        [log],
    )
    assert set(told.suppressed().values()) == {"TsdiffEntityAnomalous"}
    time.sleep(2)
    (path, of_all), *others = told.receiver.notifications[2:]
    assert others == []
    assert path == "/page"
    assert of_all["commonLabels"]["alertname"] == "TsdiffFleetAnomalous"
    assert any(channel in of_all["commonAnnotations"]["description"] for channel in FAULTY)


def assert_as_scored(description: str, deployed: Deployment) -> None:
    """The alert blames the faulty channels, with numbers of one of the slots' scores."""
    channels = channels_told(description)
    assert set(FAULTY) & channels.keys(), description
    assert "web-2" in description
    scores: list[dict[str, Any]] = [json.loads(r.value) for r in deployed.records(deployed.scores)]
    slots = [s["channels"] for s in scores if s["entity"] == "web-2"]
    for channel, pair in channels.items():
        known = [(s[channel]["expected"], s[channel]["observed"]) for s in slots if channel in s]
        assert np.isclose(pair, known, rtol=1e-4).all(-1).any(), (channel, pair)
