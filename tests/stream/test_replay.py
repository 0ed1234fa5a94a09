"""History sent to Kafka: in order, at its pace, without losing a reading silently."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from stream import replay as replay_module
from stream.errors import StreamError
from stream.replay import PRODUCER_KWARGS, ReplayProgress, replay
from tests.conftest import MakeTopic
from tsdiff.errors import ConfigError
from tsdiff.history import EntityHistory, History


class _Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


@dataclass
class _Result:
    error: Exception | None
    is_done: bool = True

    def get(self, timeout: float | None = None) -> int:
        assert timeout is not None
        self.is_done = True
        if self.error:
            raise self.error
        return 0


@dataclass
class _Producer:
    clock: _Clock
    fails_at: int = -1
    refuses_at: int = -1
    done_at_once: bool = True
    sent: list[tuple[float, str, bytes, bytes]] = field(default_factory=list)
    flushes: int = 0

    def send(self, topic: str, value: bytes, key: bytes) -> _Result:
        index = len(self.sent)
        if index == self.refuses_at:
            raise RuntimeError("too\nlarge")
        self.sent.append((self.clock.now, topic, key, value))
        return _Result(OSError("gone") if index == self.fails_at else None, self.done_at_once)

    def flush(self, timeout: float | None = None) -> None:
        assert timeout is not None
        self.flushes += 1

    @property
    def readings(self) -> list[dict[str, Any]]:
        return [json.loads(value) for _, _, _, value in self.sent]


NAN = float("nan")


def entity(name: str, timestamps_ms: list[int], values: list[list[float]]) -> EntityHistory:
    array = np.asarray(values, np.float32).reshape(len(timestamps_ms), 2)
    return EntityHistory(name, np.asarray(timestamps_ms, np.int64), array)


HISTORY = History(
    ("cpu", "mem"),
    (
        entity("web-1", [60_000, 120_000, 240_000], [[0.5, 1.0], [0.25, NAN], [NAN, NAN]]),
        entity("web-2", [61_000, 120_000], [[4.0, 5.0], [6.0, 7.0]]),
    ),
    (),
)


def run(producer: _Producer, history: History = HISTORY, **options: Any) -> Any:  # noqa: ANN401
    clock = producer.clock
    options = {"period_ms": 60_000, "speed": None, **options}
    return replay(history, producer, "telemetry", clock=clock, sleep=clock.sleep, **options)


def test_entities_are_merged_by_time_and_keyed() -> None:
    producer = _Producer(_Clock())
    summary = run(producer)
    assert producer.readings == [
        {"entity": "web-1", "timestamp": 60_000, "values": {"cpu": 0.5, "mem": 1.0}},
        {"entity": "web-2", "timestamp": 61_000, "values": {"cpu": 4.0, "mem": 5.0}},
        {"entity": "web-1", "timestamp": 120_000, "values": {"cpu": 0.25, "mem": None}},
        {"entity": "web-2", "timestamp": 120_000, "values": {"cpu": 6.0, "mem": 7.0}},
        {"entity": "web-1", "timestamp": 240_000, "values": {"cpu": None, "mem": None}},
    ]
    assert [key for _, _, key, _ in producer.sent] == [
        b"web-1", b"web-2", b"web-1", b"web-2", b"web-1",
    ]  # fmt: skip
    assert {topic for _, topic, _, _ in producer.sent} == {"telemetry"}
    assert (summary.messages, summary.entities, producer.flushes) == (5, 2, 1)
    assert (summary.first_timestamp_ms, summary.last_timestamp_ms) == (60_000, 240_000)
    assert summary.bytes == sum(len(value) for *_, value in producer.sent)
    assert producer.clock.slept == []


@pytest.mark.parametrize("speed", [1.0, 60.0, 0.5])
def test_readings_are_sent_at_their_pace(speed: float) -> None:
    producer = _Producer(_Clock())
    begun = producer.clock.now
    summary = run(producer, speed=speed)
    after = [at - begun for at, *_ in producer.sent]
    assert after == pytest.approx([0, 1 / speed, 60 / speed, 60 / speed, 180 / speed])
    assert summary.seconds == pytest.approx(180 / speed)


def test_a_sender_behind_its_pace_catches_up() -> None:
    clock = _Clock()
    producer = _Producer(clock)
    slow = producer.send

    def send(topic: str, value: bytes, key: bytes) -> _Result:
        clock.now += 50  # the broker takes its time
        return slow(topic, value, key)

    producer.send = send  # type: ignore[method-assign]
    summary = run(producer, speed=1.0)
    assert clock.slept == []
    assert summary.seconds == 250


@pytest.mark.parametrize("speed", [None, 600.0, 1.0, 0.5])
def test_now_never_sends_a_reading_from_the_future(speed: float | None) -> None:
    producer = _Producer(_Clock(1_000_123.4))
    summary = run(producer, speed=speed, start_at="now")
    behind = [
        at - reading["timestamp"] / 1000
        for (at, *_), reading in zip(producer.sent, producer.readings, strict=True)
    ]
    assert min(behind) >= 0
    # Within a slot of the present, where it can be.
    nearest = behind[-1] if speed is None or speed >= 1 else behind[0]
    assert nearest < 60
    # Slots keep what they held.
    assert (summary.first_timestamp_ms - 60_000) % 60_000 == 0


def test_progress_is_told_now_and_then_and_at_the_end() -> None:
    told: list[ReplayProgress] = []
    run(_Producer(_Clock()), speed=10.0, progress=told.append)
    assert told == [
        ReplayProgress(4, 5, 120_000),
        ReplayProgress(5, 5, 240_000),
        ReplayProgress(5, 5, 240_000),
    ]


@pytest.mark.parametrize("index", range(5))
def test_a_message_that_is_not_stored_is_an_error(index: int) -> None:
    with pytest.raises(StreamError) as caught:
        run(_Producer(_Clock(), fails_at=index))
    assert str(caught.value) == (
        "replay: expected every reading to be stored in telemetry, got OSError: gone "
        f"after {index} stored readings"
    )


def test_a_message_that_is_not_taken_is_an_error() -> None:
    with pytest.raises(StreamError, match="RuntimeError: too large after 0 stored readings"):
        run(_Producer(_Clock(), refuses_at=2))


def test_a_flush_that_fails_is_an_error() -> None:
    producer = _Producer(_Clock())

    def flush(timeout: float | None = None) -> None:
        raise TimeoutError("no broker")

    producer.flush = flush  # type: ignore[method-assign]
    with pytest.raises(StreamError, match="TimeoutError: no broker"):
        run(producer)


def test_a_failure_is_seen_before_a_long_sleep() -> None:
    producer = _Producer(_Clock(), fails_at=0)
    with pytest.raises(StreamError):
        run(producer, speed=1.0)
    assert producer.clock.slept == []


def test_messages_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "MAX_IN_FLIGHT", 4)
    producer = _Producer(_Clock(), done_at_once=False, fails_at=0)
    with pytest.raises(StreamError):
        run(producer)
    assert len(producer.sent) == 4


@pytest.mark.parametrize(
    "history", [History((), (), ()), History(("a", "b"), (entity("e", [], []),), ())]
)
def test_an_empty_history_sends_nothing(history: History) -> None:
    summary = run(_Producer(_Clock()), history)
    assert (summary.messages, summary.first_timestamp_ms) == (0, None)


@pytest.mark.parametrize("speed", [0.0, -1.0, NAN, float("inf")])
def test_a_speed_has_to_be_above_nothing(speed: float) -> None:
    with pytest.raises(ConfigError, match="expected a speed above 0"):
        run(_Producer(_Clock()), speed=speed)


def test_a_period_has_to_be_above_nothing() -> None:
    with pytest.raises(ConfigError, match="expected a period above 0"):
        run(_Producer(_Clock()), period_ms=0)


@pytest.mark.kafka
def test_a_real_broker_stores_every_reading_in_order(kafka: str, make_topic: MakeTopic) -> None:
    from kafka import KafkaConsumer, KafkaProducer, TopicPartition

    from stream.formats.native import decode_native

    topic = make_topic(partitions=3)
    channels = tuple(f"channel_{i}" for i in range(38))
    values = np.random.default_rng(0).normal(size=(2000, 38)).astype(np.float32)
    values[7] = np.nan
    timestamps_ms = np.arange(2000, dtype=np.int64) * 60_000
    names = [f"host-{i}" for i in range(6)]
    history = History(
        channels, tuple(EntityHistory(name, timestamps_ms, values) for name in names), ()
    )
    producer = KafkaProducer(bootstrap_servers=kafka, **PRODUCER_KWARGS)
    try:
        begin = time.perf_counter()
        summary = replay(history, producer, topic, period_ms=60_000, speed=None)
        rate = summary.messages / (time.perf_counter() - begin)
    finally:
        producer.close()
    assert summary.messages == 12_000
    # Some 30,000/s on a core of its own; far less only when it waits for each message.
    assert rate > 3_000
    consumer = KafkaConsumer(bootstrap_servers=kafka)
    try:
        partitions = [TopicPartition(topic, p) for p in range(3)]
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        seen: dict[str, list[int]] = {name: [] for name in names}
        places: dict[str, set[int]] = {name: set() for name in names}
        deadline = time.monotonic() + 60
        while sum(map(len, seen.values())) < 12_000 and time.monotonic() < deadline:
            for batch in consumer.poll(timeout_ms=1000, max_records=5000).values():
                for record in batch:
                    (reading,) = decode_native(record.value)
                    assert record.key == reading.entity.encode()
                    row = len(seen[reading.entity])
                    seen[reading.entity].append(reading.timestamp_ms)
                    places[reading.entity].add(record.partition)
                    if row == 7:
                        assert set(reading.values.values()) == {None}
                    elif row < 20:
                        assert list(reading.values.values()) == values[row].tolist()
    finally:
        consumer.close()
    assert all(times == timestamps_ms.tolist() for times in seen.values())
    assert all(len(place) == 1 for place in places.values())
