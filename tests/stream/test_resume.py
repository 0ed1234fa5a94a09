"""What a partition that cannot go on as it was does instead, on a real broker.

The service runs in this process with a model that needs no compilation; one entity, "a", sends a
reading a slot, of which one may be late, so that of n slots all but the last two are scored.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.consumer.group import ConsumerGroupMetadata
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaTimeoutError
from kafka.structs import OffsetAndMetadata, TopicPartition
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from stream import service as service_module
from stream import sources
from stream.buffer import UNKNOWN_OFFSET, EntitySnapshot
from stream.codec import CommitMetadata, encode_snapshot
from stream.config import ServiceConfig, load_config
from stream.decide import AlertState
from stream.errors import RetryableError, StreamError
from stream.formats.native import decode_native
from stream.grid import Grid
from stream.http import Health
from stream.metrics import ServiceMetrics
from stream.records import PartitionId
from stream.service import Service
from stream.sinks import KafkaSink
from stream.sources import (
    LOSSES,
    Commit,
    KafkaSource,
    Resume,
    _keep_newest,
    read_snapshots,
    state_key,
    where_to_resume,
)
from stream.stall import StallWatch
from stream.topics import partition_count, prepare_topics
from tests.conftest import MakeTopic
from tests.stream.fakes import SCORING, FakeScorer
from tests.stream.workers import Reader, wait_until

pytestmark = pytest.mark.timeout(120)
SCORER = FakeScorer()
GRID = SCORER.grid()
WARMING = GRID.warmup_slots


class Live:
    """A service on a real broker, turned by hand."""

    def __init__(self, config: ServiceConfig, grid: Grid) -> None:
        self.registry = CollectorRegistry()
        metrics = ServiceMetrics(
            self.registry, channels=("a", "b"), max_entities=9, top_channels=1, entity_ttl_s=60
        )
        # Added partitions are noticed within this time, by default within five minutes.
        options = {"metadata_max_age_ms": 1000}
        largest = prepare_topics(config)
        self.source = KafkaSource(
            config, SCORER.channels, decode_native, grid, client_options=options
        )
        self.sink = KafkaSink(config, self.source.consumer, largest_dead_letter=largest)
        self.service = Service(self.source, self.sink, SCORER, grid, SCORING, metrics, Health())

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"tsdiff_{name}_total", labels) or 0.0

    def lost(self) -> dict[str, float]:
        """Partitions that could not go on, by reason."""
        counts = {reason: self.count("recoveries", reason=reason) for reason in LOSSES}
        return {reason: count for reason, count in counts.items() if count}

    def until(self, condition: Callable[[], bool], seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        self.service.run(lambda: condition() or time.monotonic() > deadline)
        assert condition()

    def score(self, slots: int) -> None:
        """Work until so many slots more are scored."""
        wanted = self.count("scores") + slots
        self.until(lambda: self.count("scores") >= wanted)

    def close(self) -> None:
        self.source.close()
        self.sink.close()


class Bench:
    """A topic, a producer to it, and services one after the other."""

    def __init__(self, servers: str, topic: str) -> None:
        self.servers, self.topic = servers, topic
        self.grid = GRID
        self.partition = TopicPartition(topic, 0)
        self.config = self.configured()
        self.producer = KafkaProducer(bootstrap_servers=servers)
        self.admin = KafkaAdminClient(bootstrap_servers=servers)
        self.scores = Reader(servers, f"{topic}.scores")
        self.lives: list[Live] = []

    def configured(self, **settings: Any) -> ServiceConfig:  # noqa: ANN401
        outputs = {name: f"{self.topic}.{name}" for name in ("scores", "alerts", "state")}
        return load_config(
            None,
            {
                "model.path": "bundle",
                "input.bootstrap_servers": self.servers,
                "input.topic": self.topic,
                "input.group": f"{self.topic}.group",
                "outputs": {**outputs, "dead_letters": f"{self.topic}.dead"},
                "delivery.transaction_timeout": "5s",
                **settings,
            },
        )

    def send(self, slots: range, entity: str = "a", partition: int = 0) -> None:
        for slot in slots:
            message = {"entity": entity, "timestamp": slot * 10, "values": {"a": 1.0, "b": 1.0}}
            value = json.dumps(message).encode()
            self.producer.send(self.topic, key=entity.encode(), value=value, partition=partition)
        self.producer.flush()

    def keep(self, producer: KafkaProducer, entity: str) -> Any:  # noqa: ANN401
        """A snapshot of an entity, as a service writes it."""
        snapshot = EntitySnapshot(entity, 1, 0, 0, AlertState("ok"))
        key, value = state_key(self.config.input.group, entity), encode_snapshot(snapshot)
        return producer.send(self.config.outputs.state, key=key, value=value, partition=0)

    def start(self) -> Live:
        self.lives.append(Live(self.config, self.grid))
        return self.lives[-1]

    def first_life(self) -> None:
        """Slots 0 to 58 are scored and committed, 59 and 60 are open."""
        self.send(range(61))
        live = self.start()
        live.score(59)
        live.close()

    def second_life(self) -> Live:
        """One that has gone on after the first: to slot 68, with 69 and 70 open."""
        self.first_life()
        live = self.start()
        self.send(range(61, 71))
        live.score(10)
        return live

    def forget(self, before: int) -> None:
        """What retention does: the log begins later."""
        self.admin.delete_records({self.partition: before})

    def commit(self, offset: int, metadata: str) -> None:
        """Set the group to an offset, as kafka-consumer-groups does it."""
        consumer = KafkaConsumer(
            bootstrap_servers=self.servers,
            group_id=self.config.input.group,
            enable_auto_commit=False,
        )
        consumer.assign([self.partition])
        consumer.commit({self.partition: OffsetAndMetadata(offset, metadata, -1)})
        consumer.close()

    def committed(self) -> int | None:
        consumer = KafkaConsumer(
            bootstrap_servers=self.servers,
            group_id=self.config.input.group,
            enable_auto_commit=False,
        )
        offset: int | None = consumer.committed(self.partition)
        consumer.close()
        return offset

    def states(self, entity: str = "a") -> list[tuple[int, str]]:
        """Slot and state of every score of an entity, in order."""
        told = [json.loads(record.value) for record in self.scores.records()]
        found = []
        for score in told:
            if score["entity"] == entity:
                stamp = score["timestamp"]  # 1970-01-01T00:00:00.590Z
                found.append((round(float(stamp[17:-1]) * 100), score["state"]))
        return sorted(found)

    def end(self) -> None:
        for live in self.lives:
            live.close()
        self.scores.close()
        self.producer.close()
        outputs = self.config.outputs
        names = (outputs.scores, outputs.alerts, outputs.dead_letters, outputs.state)
        self.admin.delete_topics(list(names), raise_errors=False)
        self.admin.close()


@pytest.fixture
def bench(kafka: str, make_topic: MakeTopic) -> Iterator[Bench]:
    made = Bench(kafka, make_topic(name="resume"))
    try:
        yield made
    finally:
        made.end()


def slots(*states: tuple[range, str]) -> list[tuple[int, str]]:
    return [(slot, state) for some, state in states for slot in some]


FIRST_LIFE = [(range(WARMING), "warming"), (range(WARMING, 59), "ok")]


def test_an_orderly_restart_loses_nothing(bench: Bench) -> None:
    bench.first_life()
    bench.send(range(61, 81))
    live = bench.start()
    live.score(20)
    assert bench.states() == slots(*FIRST_LIFE, (range(59, 79), "ok"))
    assert not live.lost()


def test_what_an_outage_left_is_told_in_parts_and_a_restart_goes_on_within(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    #  slot  0 .. 60       (nobody sends)       400 401 402     400 closes 340 slots at once
    monkeypatch.setattr(service_module, "MOST_CLOSED", 25)
    bench.grid = replace(GRID, ttl_slots=1000)
    bench.first_life()
    bench.send(range(400, 403))
    for slots_more in (60, 130):
        live = bench.start()
        live.score(slots_more)
        # No more is read meanwhile.
        assert live.source.consumer.paused() == {bench.partition}
        assert live.count("readings") == 0
        live.close()
    live = bench.start()
    live.until(lambda: live.count("readings") == 3)
    found = bench.states()
    assert found[:61] == slots(*FIRST_LIFE, (range(59, 61), "ok"))
    assert [slot for slot, _ in found] == [*range(401)]
    assert [live.count("recoveries", reason=reason) for reason in ("commit", "stall")] == [0, 0]
    live.until(lambda: not live.source.consumer.paused())


def test_what_is_held_does_not_stall_and_is_read_on_when_it_is_let_go(bench: Bench) -> None:
    bench.config = bench.configured(**{"input.stall_after": "1s"})
    live = bench.start()
    bench.send(range(5))
    live.until(lambda: live.count("readings") == 5)
    partition = PartitionId(*bench.partition)
    live.source.hold({partition})
    until = time.monotonic() + 4
    while time.monotonic() < until:
        bench.send(range(5, 6))
        polled = live.source.poll()
        assert not polled.batches
        assert not polled.stalled
        time.sleep(0.1)
    live.source.hold(set())
    live.until(lambda: live.count("readings") > 5)


def test_a_replay_offset_below_retention_warms_up_again(bench: Bench) -> None:
    bench.first_life()
    bench.forget(58)
    bench.send(range(61, 81))
    with capture_logs() as logs:
        live = bench.start()
        live.score(20)
    assert bench.states() == slots(
        *FIRST_LIFE, (range(59, 59 + WARMING), "warming"), (range(59 + WARMING, 79), "ok")
    )
    assert live.lost() == {"replay": 1}
    (said,) = [entry for entry in logs if entry.get("reason") == "replay"]
    assert said["event"] == LOSSES["replay"]
    assert (said["log_level"], said["committed"], said["replay_from"]) == ("warning", 61, 58)


def test_readings_below_retention_are_counted_and_every_slot_is_told(bench: Bench) -> None:
    bench.first_life()
    bench.send(range(61, 81))
    bench.forget(65)
    live = bench.start()
    live.score(20)
    found = bench.states()
    assert [slot for slot, _ in found] == [*range(79)]
    assert found[59 : 59 + WARMING] == slots((range(59, 59 + WARMING), "warming"))
    assert dict(found)[78] == "ok"
    assert live.lost() == {"readings": 1}


def test_complete_slots_below_retention_are_told_at_least_once(bench: Bench) -> None:
    # 59 and 60 were told ahead of the watermark, and nothing is left that says so.
    bench.grid = replace(GRID, close_complete=True)
    bench.first_life()
    bench.send(range(61, 81))
    bench.forget(65)
    live = bench.start()
    live.score(22)
    found = [slot for slot, _ in bench.states()]
    assert sorted(set(found)) == [*range(81)]
    assert sorted(found) == sorted([*range(81), 59, 60])
    assert live.lost() == {"readings": 1}


def test_a_partition_that_loses_what_it_was_to_read_next_goes_on(bench: Bench) -> None:
    bench.send(range(20))
    live = bench.start()
    live.score(18)
    # Not so much as a moment for the service to read them.
    bench.send(range(20, 40))
    bench.forget(30)
    bench.send(range(40, 60))
    live.until(lambda: live.count("scores") >= 58)
    assert [slot for slot, _ in bench.states()] == [*range(58)]
    assert live.lost() == {"readings": 1}


@pytest.mark.parametrize(
    "metadata",
    ["", '{"replay_offset":40,"replay_watermark_ms":1,"watermark_ms":1,"period_ms":10,"format":0}'],
    ids=["missing", "older version"],
)
def test_commit_metadata_that_says_nothing_begins_anew(bench: Bench, metadata: str) -> None:
    bench.send(range(30, 32), entity="gone")
    bench.send(range(61))
    live = bench.start()
    live.until(lambda: ("a", 58) in {("a", slot) for slot, _ in bench.states()})
    live.close()
    bench.commit(63, metadata)
    bench.send(range(61, 81))
    live = bench.start()
    live.until(lambda: bench.states()[-1][0] == 79 - 1)
    assert [pair for pair in bench.states() if pair[0] > 58] == slots(
        (range(61, 61 + WARMING), "warming"), (range(61 + WARMING, 79), "ok")
    )
    assert live.lost() == {"metadata": 1}
    # What was known of others is let go of: they do not come back with the next restart.
    known = read_snapshots(bench.config, {0: None}, {})[0]
    assert [snapshot.entity for snapshot in known] == ["a"]


def test_a_topic_that_was_created_again_while_the_service_was_down(bench: Bench) -> None:
    bench.first_life()
    bench.admin.delete_topics([bench.topic])
    bench.admin.create_topics({bench.topic: {"num_partitions": 1}}, wait_for_metadata=True)
    # Apache Kafka forgets the group's offsets with the topic; if it had not, see below.
    assert bench.committed() is None
    bench.send(range(100, 121))
    live = bench.start()
    live.score(19)
    assert live.lost() == {"offsets": 1}
    assert [pair for pair in bench.states() if pair[0] > 58] == slots(
        (range(100, 100 + WARMING), "warming"), (range(100 + WARMING, 119), "ok")
    )


def test_a_topic_that_is_created_again_while_the_service_runs(bench: Bench) -> None:
    bench.send(range(61))
    live = bench.start()
    live.score(59)
    bench.admin.delete_topics([bench.topic])
    bench.admin.create_topics({bench.topic: {"num_partitions": 1}}, wait_for_metadata=True)
    bench.producer.close()
    bench.producer = KafkaProducer(bootstrap_servers=bench.servers)
    bench.send(range(100, 121))
    live.until(lambda: bool(live.lost()) and bench.states()[-1][0] == 118, 60)
    assert live.lost().keys() <= {"offsets", "log"}
    assert [pair for pair in bench.states() if pair[0] > 99] == slots(
        (range(100, 100 + WARMING), "warming"), (range(100 + WARMING, 119), "ok")
    )


def test_a_partition_shorter_than_what_was_committed_begins_at_its_start(bench: Bench) -> None:
    bench.first_life()
    metadata = CommitMetadata(400, 10, 10, 10)
    bench.commit(500, metadata.encode())
    live = bench.start()
    live.score(59)
    assert live.lost() == {"log": 1}
    assert bench.states() == sorted(2 * slots(*FIRST_LIFE))


def test_added_partitions_are_taken_while_the_service_runs(bench: Bench) -> None:
    bench.send(range(61))
    live = bench.start()
    live.score(59)
    bench.admin.create_partitions({bench.topic: 2})
    bench.admin.wait_for_topics([bench.topic])
    bench.producer.close()
    bench.producer = KafkaProducer(bootstrap_servers=bench.servers)
    bench.send(range(61, 81), entity="b", partition=1)
    live.until(lambda: len(bench.states("b")) >= 18, 60)
    assert live.lost() == {"partitions": 1}
    assert partition_count(bench.admin, bench.config.outputs.state) == 2
    assert bench.states("b")[:3] == slots((range(61, 63), "warming"), (range(63, 64), "ok"))


def test_a_transaction_that_the_broker_gave_up_before_its_records_came_is_done_again(
    bench: Bench,
) -> None:
    bench.config = bench.configured(**{"delivery.transaction_timeout": "1s"})
    bench.first_life()
    live = bench.start()
    live.sink._options["linger_ms"] = 60_000  # sent when it is flushed
    live.sink.reset()
    add_offsets = live.sink._producer.send_offsets_to_transaction

    def sleep_over_it(*given: object) -> None:
        add_offsets(*given)
        # The broker looks for what is overdue once a second, and ends it under another epoch.
        time.sleep(3)

    live.sink._producer.send_offsets_to_transaction = sleep_over_it
    bench.send(range(61, 71))
    with pytest.raises(RetryableError, match="InvalidProducerEpoch"):
        while True:
            live.service.step()
    bench.send(range(71, 81))
    live.until(lambda: live.count("scores") >= 20)
    assert bench.states() == slots(*FIRST_LIFE, (range(59, 79), "ok"))


@pytest.mark.parametrize("complete", [False, True])
def test_at_least_once_snapshots_of_a_round_that_was_not_committed_are_passed_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, complete: bool
) -> None:
    bench.grid = replace(GRID, close_complete=complete)
    bench.config = bench.configured(**{"delivery.mode": "at-least-once"})
    bench.first_life()
    bench.send(range(61, 81))
    live = bench.start()

    def fail(*_: object, **__: object) -> None:
        raise KafkaTimeoutError("the broker is gone between the flush and the commit")

    monkeypatch.setattr(live.source.consumer, "commit", fail)
    with pytest.raises(RetryableError, match="between the flush"):
        while True:
            live.service.step()
    live.close()
    live = bench.start()
    live.score(20)
    found = bench.states()
    told = 81 if complete else 79
    assert len(found) == told + 20  # the round that was not committed is there twice
    assert sorted(set(found)) == slots(*FIRST_LIFE, (range(59, told), "ok"))
    assert not live.lost()


def test_state_that_takes_long_to_read_is_waited_for_as_long_as_it_comes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_topics(bench.config)
    names = [f"e{number}" for number in range(8)]
    for name in names:
        bench.keep(bench.producer, name)
    bench.producer.flush()
    monkeypatch.setattr(sources, "STATE_TIMEOUT_S", 2.0)
    beats = []

    def slowly() -> None:
        beats.append(time.monotonic())
        time.sleep(0.5)

    found = read_snapshots(bench.config, {0: None}, {"max_poll_records": 1}, slowly)
    assert [snapshot.entity for snapshot in found[0]] == names
    assert len(beats) == len(names)
    assert beats[-1] - beats[0] > sources.STATE_TIMEOUT_S


def test_state_behind_an_open_transaction_is_not_waited_for_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_topics(bench.config)
    monkeypatch.setattr(sources, "STATE_TIMEOUT_S", 1.0)
    with KafkaProducer(bootstrap_servers=bench.servers, transactional_id=bench.topic) as other:
        other.init_transactions()
        other.begin_transaction()
        bench.keep(other, "a").get(10)
        with pytest.raises(
            RetryableError, match="in 1 s; is a transaction of another service open"
        ):
            read_snapshots(bench.config, {0: None}, {})
        # Nor by who was asked to stop, however long it might be.
        monkeypatch.setattr(sources, "STATE_TIMEOUT_S", 60.0)
        asked_at = time.monotonic() + 1.0
        with pytest.raises(RetryableError, match=r"asked to stop while .* was being read"):
            read_snapshots(
                bench.config, {0: None}, {}, stopping=lambda: time.monotonic() > asked_at
            )
        assert time.monotonic() < asked_at + 10
        other.commit_transaction()
    assert [snapshot.entity for snapshot in read_snapshots(bench.config, {0: None}, {})[0]] == ["a"]


def test_a_snapshot_from_beyond_the_commit_is_known_by_its_offset_or_else_its_slot() -> None:
    def kept(*snapshots: EntitySnapshot) -> list[int]:
        found: dict[bytes, EntitySnapshot] = {}
        for snapshot in snapshots:
            record = SimpleNamespace(key=b"k", value=encode_snapshot(snapshot))
            _keep_newest(found, record, Commit(offset=100, last_slot=50))
        return [snapshot.slot for snapshot in found.values()]

    def taken(slot: int, offset: int) -> EntitySnapshot:
        return EntitySnapshot("a", slot, 0, 0, AlertState("ok"), offset=offset)

    # An entity may be ahead of the slots that are closed for all.
    assert kept(taken(40, 90), taken(52, 100), taken(53, 101)) == [52]
    assert kept(taken(40, 90), taken(49, UNKNOWN_OFFSET), taken(51, UNKNOWN_OFFSET)) == [49]


@pytest.mark.parametrize("heals", [True, False])
def test_a_partition_that_stalls_is_begun_again_and_then_given_up(
    heals: bool, bench: Bench
) -> None:
    bench.first_life()
    bench.config = bench.config.model_copy(
        update={"input": bench.config.input.model_copy(update={"stall_after_ms": 2000})}
    )
    live = bench.start()
    bench.send(range(61, 71))
    live.score(10)
    # What a client that has lost track of a partition looks like: nothing comes, nothing fails.
    live.source.consumer.pause(bench.partition)

    def stalled() -> bool:
        bench.send(range(71, 72))
        return live.count("recoveries", reason="stall") > 0

    live.until(stalled)
    if heals:
        live.source.consumer.resume(bench.partition)
        bench.send(range(72, 75))
        live.score(4)
        assert bench.states() == slots(*FIRST_LIFE, (range(59, 73), "ok"))
        return

    def never() -> bool:
        bench.send(range(72, 73))
        return False

    with pytest.raises(StreamError, match=r"also after beginning again from the commit; start"):
        live.until(never)


@pytest.mark.parametrize("ahead_s", [3000, 86_400])
def test_a_clock_that_is_ahead_closes_nobodys_slots(ahead_s: int, bench: Bench) -> None:
    bench.first_life()
    # The sender's Kafka client has the same wrong clock; a day ahead a broker would not believe.
    wrong = int(time.time() + ahead_s) * 1000
    message = {"entity": "b", "timestamp": wrong, "values": {"a": 1.0, "b": 1.0}}
    stamp = wrong if ahead_s < 3600 else None
    value = json.dumps(message).encode()
    bench.producer.send(bench.topic, key=b"b", value=value, partition=0, timestamp_ms=stamp)
    bench.send(range(61, 71))
    live = bench.start()
    live.score(10)
    assert bench.states() == slots(*FIRST_LIFE, (range(59, 69), "ok"))
    assert live.count("dead_letters", reason="future_timestamp") == 1
    assert not live.count("late_readings")


def test_who_is_no_longer_in_the_group_commits_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = bench.second_life()
    before = bench.committed()
    bench.send(range(71, 81))
    consumer = live.source.consumer
    # Between the heartbeat that learns it and the next attempt to join.
    nobody = ConsumerGroupMetadata(bench.config.input.group)
    with monkeypatch.context() as patch:
        patch.setattr(consumer, "group_metadata", lambda: nobody)
        for _ in range(10):
            live.service.step()
    assert bench.committed() == before
    consumer._coordinator.reset_generation()
    live.score(10)
    assert bench.states() == slots(*FIRST_LIFE, (range(59, 79), "ok"))


def test_who_loses_and_gets_its_partitions_while_it_rebuilds_begins_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.first_life()
    live = bench.start()
    live.until(lambda: bool(live.source._replaying))
    bench.send(range(61, 71))
    # Long enough for one poll to see both, and what comes after them.
    monkeypatch.setattr("stream.sources.POLL_MS", 20_000)
    live.source.consumer._coordinator.reset_generation()
    live.service.step()
    monkeypatch.undo()
    live.score(10)
    assert bench.states() == slots(*FIRST_LIFE, (range(59, 69), "ok"))


def test_who_joins_again_unawares_goes_on_where_the_others_came(bench: Bench) -> None:
    live = bench.second_life()
    # Thrown out between two attempts to join: kafka-python keeps its partitions, and does not tell.
    coordinator = live.source.consumer._coordinator
    coordinator.rejoining = True
    coordinator.maybe_leave_group()
    bench.send(range(71, 81))
    other = bench.start()
    other.score(10)
    other.close()
    bench.send(range(81, 91))
    live.score(10)
    assert bench.states() == slots(*FIRST_LIFE, (range(59, 89), "ok"))


@pytest.mark.parametrize("why", ["asked to", "partitions were added"])
def test_a_join_that_ends_between_two_polls_counts_and_is_not_repeated(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    live = bench.second_life()
    coordinator = live.source.consumer._coordinator
    before = coordinator._generation.generation_id
    if why == "asked to":
        coordinator.request_rejoin()
    else:
        # As by a leader that knew of no partitions when it last shared them out.
        coordinator._assignment_snapshot = {}
    with monkeypatch.context() as patch:
        patch.setattr("stream.sources.POLL_MS", 0)
        live.service.step()
    wait_until(lambda: coordinator._join_task.is_done, "the join has ended", 20)
    live.until(coordinator.stable)
    assert coordinator._generation.generation_id == before + 1
    bench.send(range(71, 81))
    live.score(10)
    assert bench.states() == slots(*FIRST_LIFE, (range(59, 79), "ok"))


def test_who_was_thrown_out_does_not_keep_from_the_others_what_it_had(bench: Bench) -> None:
    bench.admin.create_partitions({bench.topic: 3})
    bench.admin.wait_for_topics([bench.topic])
    live = bench.start()
    live.until(lambda: len(live.source._positions) == 3)
    coordinator = live.source.consumer._coordinator
    # Holds the group's decision up until all have asked to join.
    with KafkaConsumer(
        bench.topic,
        bootstrap_servers=bench.servers,
        group_id=bench.config.input.group,
        partition_assignment_strategy=[CooperativeStickyAssignor],
        enable_auto_commit=False,
    ) as gate:

        def shared() -> bool:
            gate.poll(100)
            both = len(live.source._positions) == 2 and len(gate.assignment()) == 1
            return both and coordinator.stable()

        live.until(shared)
        coordinator.maybe_leave_group()
        other = bench.start()
        for _ in range(10):
            live.service.step()
            other.service.step()
        other.until(
            lambda: not gate.poll(100) and live.service.step() and bool(other.source._positions),
            20,
        )
    assert not live.source._positions.keys() & other.source._positions.keys()


def test_a_namesake_that_rebuilds_its_windows_gives_way_at_its_first_failed_commit(
    bench: Bench,
) -> None:
    bench.config = bench.configured(**{"input.instance_id": "pod-0"})
    older = bench.second_life()
    newer = bench.start()
    newer.until(lambda: bool(newer.source._positions))
    # Each takes the transactional id from the other, and the older one rebuilds its windows.
    older.sink.reset()
    older.source.rewind()
    with pytest.raises(StreamError, match="only service of group"):
        older.service.step()
    bench.send(range(71, 81))
    newer.score(10)
    assert bench.states() == slots(*FIRST_LIFE, (range(59, 79), "ok"))


def test_a_namesake_whose_heartbeats_are_refused_ends_without_a_commit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"input.instance_id": "pod-0", "input.session_timeout": "6s"}
    bench.config = bench.configured(**settings)
    older = bench.second_life()
    newer = bench.start()
    newer.until(lambda: bool(newer.source._positions))
    # As while it joins: there is nothing that it could commit.
    monkeypatch.setattr(older.source, "_ask_for_our_place", lambda polled: None)
    until = time.monotonic() + 20
    with pytest.raises(StreamError, match="only service of group"):
        while time.monotonic() < until:
            older.service.step()


def test_what_was_committed_is_not_what_an_earlier_question_is_answered_with(bench: Bench) -> None:
    live = bench.second_life()
    with pytest.raises(KafkaTimeoutError):
        live.source.consumer.committed(bench.partition, timeout_ms=0)
    bench.send(range(71, 81))
    live.score(10)
    live.source.rewind()
    bench.send(range(81, 91))
    live.score(10)
    assert bench.states() == slots(*FIRST_LIFE, (range(59, 89), "ok"))


def test_only_what_stands_still_while_it_could_go_on_stalls() -> None:
    one, two = TopicPartition("t", 0), TopicPartition("t", 1)
    watch = StallWatch(after_s=10)
    assert watch.due(0)
    assert not watch.due(2)
    assert watch.due(2.5)
    assert watch.look({one: 5, two: 5}, {one: 9, two: 5}, 0) == {}
    # The first one's end does not grow, the second is where there is nothing more to read.
    assert watch.look({one: 5, two: 5}, {one: 9, two: 5}, 20) == {}
    # They grew, but the second one was read to its end a moment ago.
    assert watch.look({one: 5, two: 5}, {one: 10, two: 9}, 21) == {one: False}
    # Begun again, it stands elsewhere: that is no progress yet.
    assert watch.look({one: 3, two: 9}, {one: 11, two: 9}, 22) == {}
    assert watch.look({one: 3, two: 9}, {one: 12, two: 9}, 31) == {}
    assert watch.look({one: 3, two: 9}, {one: 12, two: 9}, 32) == {one: True}
    # It moved: all is forgotten.
    assert watch.look({one: 4}, {one: 13}, 33) == {}
    assert watch.look({one: 5}, {one: 14}, 34) == {}
    assert watch.look({one: 5}, {one: 15}, 44) == {one: False}


METADATA = CommitMetadata(replay_offset=40, replay_watermark_ms=1, watermark_ms=2, period_ms=10)


@pytest.mark.parametrize(
    ("committed", "metadata", "log", "start", "resume"),
    [
        (None, None, (5, 90), 5, Resume()),
        (60, METADATA, (0, 90), 40, Resume(60, METADATA)),
        (60, METADATA, (40, 60), 40, Resume(60, METADATA)),
        (60, METADATA, (41, 90), 41, Resume(60, METADATA, lost="replay")),
        (60, METADATA, (60, 90), 60, Resume(60, METADATA, lost="replay")),
        (60, METADATA, (61, 90), 61, Resume(61, METADATA, lost="readings")),
        (60, METADATA, (0, 59), 0, Resume(0, lost="log")),
        (60, None, (0, 90), 60, Resume(60, lost="metadata")),
        (60, None, (70, 90), 70, Resume(70, lost="metadata")),
        (60, CommitMetadata(40, 1, 2, 99), (0, 90), 60, Resume(60, lost="metadata")),
    ],
)
def test_where_a_partition_is_resumed(
    committed: int | None,
    metadata: CommitMetadata | None,
    log: tuple[int, int],
    start: int,
    resume: Resume,
) -> None:
    begin, end = log
    found = where_to_resume(
        committed, metadata, (), begin=begin, end=end, period_ms=10, latest=False
    )
    assert found == (start, resume)
