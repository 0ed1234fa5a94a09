"""The service as its users run it: a process of its own, watched through the topics it writes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from kafka.structs import TopicPartition

from stream.replay import PRODUCER_KWARGS, replay
from tsdiff.history import History

Scores = dict[tuple[str, str], dict[str, Any]]


class Worker:
    """One `tsdiff run` process."""

    def __init__(
        self,
        log: Path,
        settings: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        config: Path | None = None,
    ) -> None:
        self.log = log
        arguments = [] if config is None else [f"--config={config}"]
        arguments += [f"--set={key}={value}" for key, value in settings.items()]
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tsdiff.cli", "run", *arguments],
                stderr=out,
                stdout=out,
                env={
                    **os.environ,
                    "TSDIFF_LOG__FORMAT": "json",
                    "PYTHONFAULTHANDLER": "1",  # for `abort`
                    **(environment or {}),
                },
            )

    def events(self) -> list[dict[str, Any]]:
        """The lines logged so far."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def said(self, event: str) -> bool:
        return any(event in line.get("event", "") for line in self.events())

    def wait_for(self, event: str, seconds: float = 60.0) -> None:
        wait_until(lambda: self.said(event), f"{event!r} in the log:\n{self.log}", seconds, self)

    def tail(self, characters: int = 1500) -> str:
        """What it said last."""
        return f"\n{self.log}:\n{self.log.read_text()[-characters:]}"

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def abort(self) -> str:
        """End one that hangs; returns where each of its threads was."""
        self.process.send_signal(signal.SIGABRT)
        self.process.wait()
        return self.tail(12_000)

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def wait_until(
    condition: Any,  # noqa: ANN401
    what: str,
    seconds: float = 60.0,
    worker: Worker | None = None,
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if worker is not None and worker.process.poll() is not None:
            raise AssertionError(f"the worker ended; {worker.log.read_text()[-4000:]}")
        if time.monotonic() > deadline:
            tail = worker.log.read_text()[-4000:] if worker else ""
            raise AssertionError(f"not within {seconds:g} s: {what}\n{tail}")
        time.sleep(0.1)


class Reader:
    """Reads a whole topic, again and again, each time only what is new."""

    def __init__(self, servers: str, topic: str) -> None:
        self.servers, self.topic = servers, topic
        self.found: list[Any] = []
        self._consumer: KafkaConsumer | None = None
        self._positions: dict[TopicPartition, int] = {}

    def records(self) -> list[Any]:
        """Every record so far that is not of an open or aborted transaction."""
        consumer = self._consumer
        if consumer is None:
            consumer = self._consumer = KafkaConsumer(
                bootstrap_servers=self.servers,
                isolation_level="read_committed",
                enable_auto_commit=False,
                auto_offset_reset="earliest",
            )
        if not consumer.assignment():
            numbers = consumer.partitions_for_topic(self.topic) or ()
            consumer.assign([TopicPartition(self.topic, number) for number in numbers])
            for partition, position in self._positions.items():
                consumer.seek(partition, position)
        partitions = list(consumer.assignment())
        if not partitions:
            return []
        ends = consumer.end_offsets(partitions)  # the last stable offsets
        while any(consumer.position(p) < ends[p] for p in partitions):
            for records in consumer.poll(timeout_ms=500).values():
                self.found.extend(records)
        self._positions = {p: consumer.position(p) for p in partitions}
        return list(self.found)

    def close(self) -> None:
        """Let go of the broker; the next look goes on where this one ended."""
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None


def difference(score: Mapping[str, Any], expected: Mapping[str, Any], coarser: float = 1.0) -> str:
    """In what a live score differs from backfill's, beyond float32's rounding; "" = in nothing.

    `coarser` is how many times as far apart as usual they may be.
    """
    for name in ("state", "model"):
        if score[name] != expected[name]:
            return f"{name}: {expected[name]!r} expected, got {score[name]!r}"
    # Float32 rounds differently in batches of other shapes; it shows most where nothing is
    # unusual, where held-out streams are dense and p is around a half.
    for name, grain in (("anomaly_score", 5e-5), ("p_value", 2e-4), ("imputed_ratio", 1e-6)):
        if not _close(score[name], expected[name], rel=1e-6, grain=coarser * grain):
            return f"{name}: {expected[name]} expected, got {score[name]}"
    channels = dict(expected["channels"])
    if score["channels"].keys() != channels.keys() and score["state"] != "ok":
        return f"channels: {[*channels]} expected, got {[*score['channels']]}"
    for name in score["channels"].keys() & channels.keys():
        for field, value in score["channels"][name].items():
            if not _close(value, channels[name][field], rel=coarser * 1e-4, grain=coarser * 1e-4):
                return f"{name}.{field}: {channels[name][field]} expected, got {value}"
    return ""


def _close(value: float | None, wanted: float | None, *, rel: float, grain: float) -> bool:
    if value is None or wanted is None:
        return value is wanted
    return math.isclose(value, wanted, rel_tol=rel, abs_tol=grain)


class Deployment:
    """Names of topics and group that nobody else uses, and workers that all end with the test."""

    def __init__(self, servers: str, topic: str, bundle: Path, folder: Path) -> None:
        self.servers, self.topic, self.folder = servers, topic, folder
        self.scores, self.alerts = f"{topic}.scores", f"{topic}.alerts"
        self.dead_letters = f"{topic}.dead"
        self.workers: list[Worker] = []
        self.environment: dict[str, str] = {}
        self.config: Path | None = None
        self.readers: dict[str, Reader] = {}
        self.settings: dict[str, Any] = {
            "model.path": bundle,
            "input.bootstrap_servers": servers,
            "input.topic": topic,
            "input.group": f"{topic}.group",
            # Brokers allow no less by default; a killed worker's partitions move after this.
            "input.session_timeout": "6s",
            "delivery.transaction_timeout": "5s",
            "grid.lateness": "0s",
            "outputs.scores": self.scores,
            "outputs.alerts": self.alerts,
            "outputs.dead_letters": self.dead_letters,
            "outputs.state": f"{topic}.state",
            "metrics.listen": "",
        }

    def start(self, **settings: Any) -> Worker:  # noqa: ANN401
        """Start one more worker; `input__topic=x` overrides `input.topic`."""
        changed = {key.replace("__", "."): value for key, value in settings.items()}
        log = self.folder / f"worker-{len(self.workers)}.log"
        worker = Worker(log, {**self.settings, **changed}, self.environment, self.config)
        self.workers.append(worker)
        return worker

    def end(self) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()
        self.close_readers()

    def close_readers(self) -> None:
        """Let go of the broker; the next look at a topic goes on where the last one ended."""
        for reader in self.readers.values():
            reader.close()

    def send(self, history: History, period_ms: int) -> int:
        """Write a history to the input topic, at full speed."""
        with KafkaProducer(bootstrap_servers=self.servers, **PRODUCER_KWARGS) as producer:
            return replay(history, producer, self.topic, period_ms=period_ms, speed=None).messages

    def wait_for_scores(self, count: int, worker: Worker | None, seconds: float = 90.0) -> None:
        wait_until(
            lambda: len(self.records(self.scores)) >= count, f"{count} scores", seconds, worker
        )

    def records(self, topic: str) -> list[Any]:
        """Every record of a topic that a `read_committed` reader sees now."""
        if topic not in self.readers:
            # One reader a topic, not one a look: kafka-python 3.0.12 leaks the socket of a client
            # that is closed while a request waits to be written.
            self.readers[topic] = Reader(self.servers, topic)
        return self.readers[topic].records()

    def read_scores(self) -> Scores:
        """Scores by entity and timestamp; fails on the first one that is there twice."""
        scores: Scores = {}
        for record in self.records(self.scores):
            score = json.loads(record.value)
            key = (score["entity"], score["timestamp"])
            assert record.key == score["entity"].encode()
            assert key not in scores, f"{key} is there twice"
            scores[key] = score
        return scores


@contextmanager
def deployment(servers: str, topic: str, bundle: Path, folder: Path) -> Iterator[Deployment]:
    """A deployment whose workers are gone afterwards, whatever happened."""
    deployed = Deployment(servers, topic, bundle, folder)
    try:
        yield deployed
    finally:
        deployed.end()
