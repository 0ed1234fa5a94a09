"""`tsdiff bench --kafka`: the service as its users run it, on a real broker, measured from outside.

    producer (librdkafka) -> topic, two partitions -> `tsdiff run`, one or more -> their four topics
       warm-up and a backlog, sent before they start     their /metrics, asked now and then
       then readings at a steady rate

Broker, producer and services share the cores of one machine; what is measured is what is left to
the services. Everything goes to topics of a random name, which are deleted at the end.
"""

import math
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import msgspec
import numpy as np
from kafka import KafkaAdminClient
from kafka.admin import NewTopic
from kafka.errors import KafkaError
from prometheus_client.parser import text_string_to_metric_families

from stream.clients import connect
from stream.embedded import missing_extra
from stream.errors import StreamError
from stream.memory import peak_memory_bytes
from stream.metrics import STAGES
from stream.topics import await_topics
from tsdiff.bundle import Bundle, load_bundle
from tsdiff.config import MOST_FULL
from tsdiff.errors import TsdiffError

Record = dict[str, Any]

_PARTITIONS: Final = 2
_WARMUP_SLOTS: Final = 16
"""Slots that statistics are collected from: newcomers are not scored before, which is cheaper."""
_START_S: Final = 120.0
# Nothing more is read for so long: it is over, or something is wrong.
_SILENCE_S: Final = 60.0
_VARIANTS: Final = 64
_STEP_S: Final = 0.02
# Looking may cost the service a twentieth of its time.
_SCRAPE_SHARE: Final = 0.05
_SCRAPE_S: Final = 1.0
_PROMETHEUS_EVERY_S: Final = 15.0
"""Between two scrapes of everything, as a Prometheus would: a thousand entities take .2 s."""


def run_kafka_bench(
    model: Path,
    servers: str,
    *,
    services: int,
    entities: int,
    backlog: int,
    rate: float,
    seconds: float,
    say: Callable[[str], None],
) -> Record:
    """Measure readings/s of a backlog, and latencies at a steady rate.

    Args:
        model: the bundle.
        servers: the broker, host:port.
        services: how many share the work.
        entities: how many there are; the model knows none of them.
        backlog: readings that are waiting when the services start, beside those of the warm-up.
        rate: readings a second afterwards.
        seconds: for how long.
        say: told what is being done.

    Raises:
        TsdiffError: the broker does not answer, confluent-kafka is not installed, a service
            ended or stood still, or the backlog is too small to be measured.

    """
    bundle = load_bundle(model)
    name = f"tsdiff-bench-{uuid.uuid4().hex[:8]}"
    with (
        _topics(servers, name, max(_PARTITIONS, services)),
        tempfile.TemporaryDirectory(prefix="tsdiff-bench-") as folder,
    ):
        slots = _WARMUP_SLOTS + -(-backlog // entities)
        steady = math.ceil(rate * seconds / entities)
        feeder = _Feeder(servers, name, bundle, entities, slots + steady)
        say(f"sending a backlog of {slots * entities:,} readings of {entities:,} entities")
        feeder.send_slots(slots)
        say(f"starting {services} service{'' if services == 1 else 's'}")
        with _group(services, model, servers, name, entities, Path(folder)) as group:
            behind = _work_off(group, _WARMUP_SLOTS * entities, slots * entities)
            say(f"sending {rate:,.0f} readings/s for {seconds:g} s")
            before = group.scrape()
            sent = feeder.send_rate(rate, seconds)
            group.until(slots * entities + sent)
            after = group.scrape()
            taken = after["tsdiff_readings_total"] - before["tsdiff_readings_total"]
            return {
                **behind,
                "services": services,
                "entities": entities,
                "backlog": backlog,
                "rate": rate,
                "rate_seconds": seconds,
                "rate_readings": taken,
                "rate_share_kept": min(1.0, feeder.kept),
                "latency_p50_seconds": quantile(0.5, before, after),
                "latency_p99_seconds": quantile(0.99, before, after),
                "lag_at_end_seconds": after[_BEHIND],
                "peak_service_memory_bytes": group.peak_memory_bytes(),
                "late_readings": after["tsdiff_late_readings_total"],
                "dead_letters": after["tsdiff_dead_letters_total"],
            }


def _work_off(group: "_Group", warmup: int, total: int) -> Record:
    """Wait until the backlog is read; the rate is that of what came after the warm-up."""
    begun = group.until(warmup, all_by=total)
    at = time.monotonic()
    ended = group.until(total)
    took = time.monotonic() - at
    stages = {stage: ended[_stage_sum(stage)] - begun[_stage_sum(stage)] for stage in STAGES}
    read = ended["tsdiff_readings_total"] - begun["tsdiff_readings_total"]
    if not read:
        raise TsdiffError(
            "expected a backlog that takes a while, it was gone after one look; give more readings "
            "with --backlog"
        )
    return {
        "readings_per_second": read / took,
        "lag_recovery_seconds": took,
        "stage_share": {
            stage: spent / took / len(group.services) for stage, spent in stages.items()
        },
    }


def _stage_sum(stage: str) -> str:
    return f'tsdiff_batch_duration_seconds_sum{{stage="{stage}"}}'


_BEHIND: Final = "tsdiff_consumer_lag_seconds"
_LATENCY: Final = "tsdiff_end_to_end_latency_seconds_bucket{"
_READ: Final = (
    "tsdiff_batch_duration_seconds_sum",
    _BEHIND,
    "tsdiff_dead_letters_total",
    "tsdiff_end_to_end_latency_seconds_bucket",
    "tsdiff_late_readings_total",
    "tsdiff_readings_total",
)
"""What of the metrics is asked for; collecting all of them would take cores from the service."""


def quantile(share: float, before: Record, after: Record) -> float | None:
    """Latency below which `share` of the batches between two scrapes are, as Prometheus' own
    `histogram_quantile` has it; None where there were none.
    """  # noqa: D205 - the name says it
    bounds, counts = [], []
    for name, value in after.items():
        if name.startswith(_LATENCY):
            bounds.append(float(name.split('le="')[1].split('"')[0]))
            counts.append(value - before.get(name, 0.0))
    order = np.argsort(bounds)
    upper, cumulative = np.array(bounds)[order], np.array(counts)[order]
    if not len(cumulative) or cumulative[-1] <= 0:
        return None
    wanted = share * cumulative[-1]
    bucket = int(np.searchsorted(cumulative, wanted))
    if not np.isfinite(upper[bucket]):
        return float(upper[bucket - 1])
    lower, below = (upper[bucket - 1], cumulative[bucket - 1]) if bucket else (0.0, 0.0)
    inside = cumulative[bucket] - below
    return float(lower + (upper[bucket] - lower) * (wanted - below) / inside)


# -- what is sent ------------------------------------------------------------------------------


class _Feeder:
    """Sends one slot of all entities after the other, keyed by entity."""

    def __init__(self, servers: str, topic: str, bundle: Bundle, entities: int, slots: int) -> None:
        try:
            from confluent_kafka import Producer  # noqa: PLC0415 - optional
        except ModuleNotFoundError:
            raise missing_extra("confluent-kafka", "tsdiff bench --kafka") from None
        # kafka-python would take more of the cores than the service under test.
        self._producer: Any = Producer(
            {
                "bootstrap.servers": servers,
                "linger.ms": 5,
                "queue.buffering.max.messages": 200_000,
                # What is sent again would come after what was sent later, and be too late.
                "enable.idempotence": True,
                "log_level": 0,
            }
        )
        self._topic = topic
        self._period_ms = period_ms = bundle.period_ms
        self._values = _calm_values(bundle)
        names = [f"host-{number:06d}" for number in range(entities)]
        self._names = [name.encode() for name in names]
        # Far enough in the past that no slot to come lies in the future.
        self._time_ms = (int(time.time() * 1000) // period_ms - slots - 1) * period_ms
        self._next = 0
        self.kept = 1.0
        """Share of the rate that was asked for that this machine could send."""

    def send_slots(self, slots: int) -> None:
        """Send as fast as the broker takes it."""
        for _ in range(slots * len(self._names)):
            self._send()
        self._producer.flush(60)

    def send_rate(self, rate: float, seconds: float) -> int:
        """Send steadily; return how many were sent."""
        begun, sent = time.monotonic(), 0
        while (elapsed := time.monotonic() - begun) < seconds:
            for _ in range(int(elapsed * rate) - sent):
                self._send()
            sent = max(sent, int(elapsed * rate))
            self._producer.poll(0)
            time.sleep(_STEP_S)
        self._producer.flush(60)
        self.kept = sent / (rate * (time.monotonic() - begun))
        return sent

    def _send(self) -> None:
        row, slot = self._next % len(self._names), self._next // len(self._names)
        name = self._names[row]
        values = self._values[(row + 7 * slot) % _VARIANTS]
        stamp = b"%d" % (self._time_ms + slot * self._period_ms)
        message = b'{"entity":"%s","timestamp":%s,"values":%s}' % (name, stamp, values)
        while True:
            try:
                self._producer.produce(self._topic, message, key=name)
                break
            except BufferError:  # its queue is full: that is as fast as the broker is
                self._producer.poll(0.05)
        self._next += 1
        if self._next % 1000 == 0:
            self._producer.poll(0)


def _calm_values(bundle: Bundle) -> list[bytes]:
    """Readings as JSON, made once, since encoding them is not what is measured.

    Close to each channel's mean: a fleet is quiet most of the time, and of quiet entities less is
    told than of others.
    """
    mean, scale = (bundle.arrays[f"statistics.{name}"][-1] for name in ("mean", "scale"))
    noise = np.random.default_rng(0).standard_normal((_VARIANTS, len(mean)))
    rows = (mean + 0.1 * scale * noise).tolist()
    return [msgspec.json.encode(dict(zip(bundle.channels, row, strict=True))) for row in rows]


@contextmanager
def _topics(servers: str, name: str, partitions: int) -> Iterator[None]:
    """The input topic; it and what the service makes are deleted at the end."""
    try:
        admin = connect(
            KafkaAdminClient, bootstrap_servers=servers.split(","), bootstrap_timeout_ms=5_000
        )
    except KafkaError as error:
        raise StreamError(f"expected a broker at {servers} (--kafka), got {error!r}") from error
    try:
        try:
            admin.create_topics([NewTopic(name, partitions, 1)])
            await_topics(admin, [name])
        except KafkaError as error:
            raise StreamError(f"creating topic {name} at {servers} failed: {error!r}") from error
        yield
        made = [found["name"] for found in admin.describe_topics()]
        admin.delete_topics([topic for topic in made if topic.startswith(name)])
    finally:
        admin.close()


# -- the services ------------------------------------------------------------------------------


class _Service:
    """A `tsdiff run` process, seen through its metrics."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self._url = ""
        self._scraped_at = time.monotonic()

    def scrape(self) -> Record:
        """Return all samples by name and labels; counters of one name are summed as well.

        Raises:
            TsdiffError: the service has ended.

        """
        deadline = time.monotonic() + _START_S
        while True:
            if self._process.poll() is not None:
                raise TsdiffError(
                    f"expected the service to run, it ended with status "
                    f"{self._process.returncode}: {self.last_line()}"
                )
            try:
                if time.monotonic() - self._scraped_at > _PROMETHEUS_EVERY_S:
                    self._scraped_at = time.monotonic()
                    self._ask("")
                return _samples(self._ask("?" + urlencode([("name[]", name) for name in _READ])))
            except (OSError, LookupError) as error:
                if time.monotonic() > deadline:
                    raise TsdiffError(f"the service does not answer: {error}") from error
                time.sleep(0.1)

    def _ask(self, query: str) -> str:
        with urllib.request.urlopen(self._address() + query, timeout=30) as answer:  # noqa: S310
            text: str = answer.read().decode()
        return text

    def _address(self) -> str:
        if not self._url:
            for line in self._log.read_text().splitlines():
                event = msgspec.json.decode(line) if line.startswith("{") else {}
                self._url = event.get("url", self._url)
        if not self._url:
            raise LookupError("no address of its metrics yet")
        return f"{self._url}/metrics"

    def last_line(self) -> str:
        """Return what it said last."""
        return (self._log.read_text().strip().splitlines() or ["it said nothing"])[-1]

    def peak_memory_bytes(self) -> int | None:
        """Return the most memory it held; None where the system does not tell (not Linux)."""
        return peak_memory_bytes(self._process.pid)


class _Group:
    """Services that share the work, seen as one."""

    def __init__(self, services: Sequence[_Service]) -> None:
        self.services = services

    def scrape(self) -> Record:
        """Return what they say together; see `_Service.scrape`."""
        return together([service.scrape() for service in self.services])

    def until(self, readings: int, *, all_by: int = 0) -> Record:
        """Wait until so many readings were taken, and return the scrape that says so.

        And until each service has taken some, or `all_by` were taken without one.

        Raises:
            TsdiffError: nothing moved for a long time.

        """
        moved_at, last = time.monotonic(), -1.0
        while True:
            asked_at = time.monotonic()
            found = [service.scrape() for service in self.services]
            answered_after = time.monotonic() - asked_at
            each = [one.get("tsdiff_readings_total", 0.0) for one in found]
            taken = sum(each)
            if taken >= readings and (all(each) or taken >= all_by):
                return together(found)
            if taken != last:
                moved_at, last = time.monotonic(), taken
            if time.monotonic() - moved_at > _SILENCE_S + (_START_S if last <= 0 else 0.0):
                said = "; ".join(service.last_line() for service in self.services)
                raise TsdiffError(
                    f"expected {readings} readings to be taken, {taken:.0f} were and no more come; "
                    f"said last: {said}"
                )
            time.sleep(min(max(_STEP_S, answered_after / _SCRAPE_SHARE), _SCRAPE_S))

    def peak_memory_bytes(self) -> int | None:
        """Return the most memory they held in all; None where the system does not tell."""
        held = [service.peak_memory_bytes() for service in self.services]
        return None if None in held else sum(peak or 0 for peak in held)


def together(scrapes: Sequence[Record]) -> Record:
    """Sum scrapes by sample; of how far each is behind, the furthest."""
    found: Record = {}
    for name in {name for one in scrapes for name in one}:
        values = [one.get(name, 0.0) for one in scrapes]
        found[name] = max(values) if name == _BEHIND else sum(values)
    return found


def _samples(text: str) -> Record:
    found: Record = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
            if sample.labels:
                labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


@contextmanager
def _group(
    services: int, model: Path, servers: str, name: str, entities: int, folder: Path
) -> Iterator[_Group]:
    """So many services of one group; they are asked to stop at the end."""
    settings = {
        "model.path": model.resolve(),
        "input.bootstrap_servers": servers,
        "input.topic": name,
        "input.group": name,
        "detect.warmup_slots": _WARMUP_SLOTS,
        # By the fleet that sends, not by the few entities of the bundle.
        "detect.adapt": "full" if entities <= MOST_FULL else "level",
        "grid.lateness": "0s",
        **{f"outputs.{key}": f"{name}.{key}" for key in ("scores", "alerts", "state")},
        "outputs.dead_letters": f"{name}.dead-letters",
        "metrics.listen": "127.0.0.1:0",
        "log.format": "json",
    }
    command = [
        *(sys.executable, "-m", "tsdiff.cli", "run"),
        *(f"--set={key}={value}" for key, value in settings.items()),
    ]
    with ExitStack() as running:
        begun = [
            running.enter_context(_service(command, folder / f"service-{number}.log"))
            for number in range(services)
        ]
        for service in begun:
            service.scrape()  # answers as soon as it runs
        yield _Group(begun)


@contextmanager
def _service(command: Sequence[str], log: Path) -> Iterator[_Service]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)  # noqa: S603 - ourselves
    try:
        yield _Service(process, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
