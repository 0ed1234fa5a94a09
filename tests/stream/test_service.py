"""The loop in memory: all or nothing, again from the last commit, and only what is true is told."""

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from stream import service as service_module
from stream.buffer import EntitySnapshot
from stream.errors import RetryableError, StreamError
from stream.http import Health
from stream.metrics import ServiceMetrics
from stream.recent import Layout, Recent
from stream.records import (
    ChannelScore,
    DeadLetter,
    PartitionId,
    ReadingBatch,
    SlotScore,
)
from stream.service import MOST_CLOSED, Service
from stream.sinks import MemorySink, ParquetSink, Round, Sink
from stream.sources import HistorySource, MemorySource, Polled, Resume, Source
from tests.stream.fakes import POLICY, SCORING, FakeScorer, Reading, batch, grid
from tsdiff.history import EntityHistory, History

OTHER = PartitionId("in", 1)


@dataclass
class FailingSink(MemorySink):
    """Refuses the commits of these numbers (counted from 0), and these resets."""

    failing: Sequence[int] = ()
    failing_resets: int = 0
    commits: int = 0
    resets: int = 0
    error: Callable[[str], Exception] = RetryableError

    def commit(self, round_: Round, generation: object) -> None:
        number, self.commits = self.commits, self.commits + 1
        if number in self.failing:
            raise self.error("the broker is away")
        super().commit(round_, generation)

    def reset(self) -> None:
        self.resets += 1
        if self.failing_resets:
            self.failing_resets -= 1
            raise RetryableError("the broker is still away")

    def resume(self, partition: PartitionId) -> Resume:
        """What Kafka would say: the last position, and the latest snapshot of every entity."""
        position = None
        snapshots: dict[str, EntitySnapshot] = {}
        for round_ in self.rounds:
            position = round_.positions.get(partition, position)
            for owner, name in round_.gone:
                if owner == partition:
                    snapshots.pop(name)
            for owner, snapshot in round_.snapshots:
                if owner == partition:
                    snapshots[snapshot.entity] = snapshot
        if position is None:
            return Resume()
        return Resume(position.offset, position.metadata, tuple(snapshots.values()))


class ScriptedSource(MemorySource):
    """Says what it is told to say, poll by poll."""

    def __init__(self, polls: Sequence[Polled]) -> None:
        super().__init__([])
        self._polls = list(polls)
        self.behind: dict[PartitionId, int] = {}

    def poll(self) -> Polled:
        return self._polls.pop(0) if self._polls else Polled(ended=True)

    def lag(self) -> dict[PartitionId, int]:
        return self.behind


@dataclass
class Bench:
    """A service with everything that can be looked at from outside."""

    source: Source
    sink: Sink
    scorer: FakeScorer = field(default_factory=FakeScorer)
    now: float = 1_000.0
    slept: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.registry = CollectorRegistry()
        self.health = Health()
        layout = Layout(("a", "b"), ("", ""), 10, settle_slots=5)
        self.recent = Recent(layout, POLICY, max_entities=9, ttl_s=1e9, clock=lambda: self.now)
        self.service = Service(
            self.source,
            self.sink,
            self.scorer,
            grid(lateness_ms=0),
            SCORING,
            ServiceMetrics(
                self.registry, channels=("a", "b"), max_entities=9, top_channels=2, entity_ttl_s=9
            ),
            self.health,
            recent=self.recent,
            idle_after_s=60.0,
            clock=lambda: self.now,
            sleep=self.slept.append,
        )

    def step(self, seconds: float = 2.0) -> bool:
        self.now += seconds
        return self.service.step()

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"tsdiff_{name}", labels)


def log() -> list[Reading]:
    """A newcomer, an anomaly, an entity that leaves for good, late and repeated readings."""
    readings: list[Reading] = []
    for slot in range(60):
        readings.append(("a", slot * 10, 1.0, 30.0 if 20 <= slot < 25 else 1.0))
        readings.append(("new", slot * 10 + 3, float(slot % 3), None))
        if slot < 10:
            readings.append(("b", slot * 10 + 5, 1.0, 1.0))
        if slot % 9 == 5:
            readings.append(("a", slot * 10 - 20, 9.0, 9.0))
            readings.append(("a", slot * 10 + 1, 1.0, None))
    return readings


def batches(size: int = 7, partition: PartitionId | None = None) -> list[ReadingBatch]:
    """The log in batches, with a dead letter and an unknown channel in every third."""
    readings, found = log(), []
    for number, begin in enumerate(range(0, len(readings), size)):
        made = batch(readings[begin : begin + size], begin)
        made = replace(made, partition=partition or made.partition, received_at=1.0)
        if number % 3 == 0:
            letter = DeadLetter("in", 0, begin, "not_json", "expected JSON", None, b"{")
            made = replace(made, dead_letters=(letter,), unknown_channels=2)
        found.append(made)
    return found


def counted(bench: Bench) -> dict[str, float | None]:
    names = ("readings", "late_readings", "duplicate_readings", "unknown_channels", "scores")
    totals = {name: bench.metric(f"{name}_total") for name in names}
    totals["dead"] = bench.metric("dead_letters_total", reason="not_json")
    totals["latencies"] = bench.metric("end_to_end_latency_seconds_count")
    return totals


def undisturbed(size: int = 7) -> tuple[MemorySink, dict[str, float | None]]:
    sink = MemorySink()
    bench = Bench(MemorySource(batches(size)), sink)
    bench.service.run()
    return sink, counted(bench)


# -- failing commits ---------------------------------------------------------------------------


def test_everything_of_an_undisturbed_run_is_there_once() -> None:
    sink, totals = undisturbed()
    readings = len(log())
    assert totals == {
        "readings": readings,
        "late_readings": 7,
        "duplicate_readings": 7,
        "unknown_channels": 2 * 7,
        "scores": len(sink.scores),
        "dead": 7,
        "latencies": readings - 7,
    }
    keys = [(s.entity, s.timestamp_ms) for s in sink.scores]
    assert len(set(keys)) == len(keys)
    # Slots 0 to 58 of a and new; b until 30 silent slots after its last reading.
    assert len(keys) == 59 + 59 + 40
    assert [a.state for a in sink.alerts if a.entity == "a"] == [
        "pending",
        "firing",
        "recovering",
        "ok",
    ]
    assert [name for r in sink.rounds for _, name in r.gone] == ["b"]


@given(
    failing=st.sets(st.integers(0, 45), max_size=8),
    size=st.sampled_from([1, 7, 40]),
    most=st.sampled_from([3, MOST_CLOSED]),
)
@settings(max_examples=40, deadline=None)
def test_failed_commits_lose_nothing_and_repeat_nothing(
    failing: set[int], size: int, most: int
) -> None:
    expected, totals = undisturbed(size)
    sink = FailingSink(failing=tuple(failing))
    bench = Bench(MemorySource(batches(size), sink.resume), sink)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service_module, "MOST_CLOSED", most)
        bench.service.run()
    calm = Bench(MemorySource(batches(size)), MemorySink())
    calm.service.run()
    assert told(sink) == told(expected)
    assert [a.summary for a in sink.alerts] == [a.summary for a in expected.alerts]
    assert letters(sink) == letters(expected)
    # What was undone is not counted.
    assert counted(bench) == totals
    assert on_the_page(bench, "a") == on_the_page(calm, "a")
    failed = len([number for number in failing if number < sink.commits])
    assert sink.resets == failed
    assert bench.metric("recoveries_total", reason="commit") == (failed or None)


def on_the_page(bench: Bench, entity: str) -> list[object]:
    """Scores, states, and what was observed and expected, of the slots that are kept."""
    past = bench.recent.past(entity)
    assert past is not None
    assert past.cells is not None
    arrays = (past.slots, past.scores, past.states, past.cells)
    return [np.nan_to_num(array).round(4).tolist() for array in arrays]


def told(sink: MemorySink) -> list[SlotScore]:
    """Scores to the grain of float32: sums differ beyond it with the size of the parts."""

    def rounded(number: float | None) -> float | None:
        return None if number is None else round(number, 4)

    return [
        replace(s, anomaly_score=rounded(s.anomaly_score), p_value=rounded(s.p_value))
        for s in sink.scores
    ]


def letters(sink: MemorySink) -> list[int]:
    return [letter.offset for round_ in sink.rounds for letter in round_.dead_letters]


def test_what_an_outage_left_is_told_in_rounds_of_some_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    #  slot  0 .. 9          (nobody sends)          30 31 .. 39
    readings: list[Reading] = [
        (name, slot * 10, 1.0, 1.0) for slot in (*range(10), *range(30, 40)) for name in "ac"
    ]
    expected, sink = MemorySink(), MemorySink()
    Bench(MemorySource([batch(readings)]), expected).service.run()
    assert [len(round_.scores) for round_ in expected.rounds] == [2 * 39]
    monkeypatch.setattr(service_module, "MOST_CLOSED", 8)
    bench = Bench(MemorySource([replace(batch(readings), received_at=900.0)]), sink)
    bench.service.run(stopping=lambda: len(sink.scores) > 30)
    # Asked to stop in the middle of it, it does, and what is committed is whole.
    assert 30 < len(sink.scores) <= 38
    bench.step()
    # Readings of 10 slots wait, the first of which was appended at 900.
    assert bench.metric("consumer_lag_records", topic="in", partition="0") == 20
    assert bench.metric("consumer_lag_seconds") == bench.now - 900
    bench.service.run()
    bench.step()
    assert bench.metric("consumer_lag_seconds") == 0
    assert max(len(round_.scores) for round_ in sink.rounds) == 8
    assert told(sink) == told(expected)
    assert bench.metric("readings_total") == len(readings)


def test_several_failures_in_a_row_are_sat_out() -> None:
    sink = FailingSink(failing=(3, 4, 5), failing_resets=4)
    bench = Bench(MemorySource(batches(), sink.resume), sink)
    bench.service.run()
    assert sink.scores == undisturbed()[0].scores
    # Three failed commits, with a pause before the second and third are tried again; four resets
    # that failed, with a pause after each.
    assert sink.resets == 3 + 4
    assert bench.slept == [2.0] * (2 + 4)


def test_a_failure_that_cannot_be_retried_ends_the_service() -> None:
    sink = FailingSink(failing=(2,), error=StreamError)
    bench = Bench(MemorySource(batches(), sink.resume), sink)
    with pytest.raises(StreamError, match="away"):
        bench.service.run()
    assert len(sink.rounds) == 2
    assert sink.resets == 0


def test_nothing_is_shown_of_a_round_that_failed() -> None:
    sink = FailingSink(failing=(0,))
    bench = Bench(MemorySource(batches(), sink.resume), sink)
    with pytest.raises(RetryableError):
        bench.step()
    assert counted(bench)["scores"] == counted(bench)["dead"] == 0
    assert counted(bench)["unknown_channels"] == counted(bench)["readings"] == 0
    assert bench.metric("anomaly_score", entity="a") is None


def test_two_partitions_recover_each_from_its_own_commit() -> None:
    def interleaved() -> Iterator[ReadingBatch]:
        for one, other in zip(batches(7), batches(7, OTHER), strict=True):
            yield one
            yield other

    expected = MemorySink()
    Bench(MemorySource(interleaved()), expected).service.run()
    sink = FailingSink(failing=(5, 6, 20))
    Bench(MemorySource(interleaved(), sink.resume), sink).service.run()
    assert sink.scores == expected.scores
    assert len(sink.scores) == 2 * len(undisturbed()[0].scores)


def test_snapshots_of_another_model_are_left_out() -> None:
    sink = FailingSink()
    Bench(MemorySource(batches()), sink).service.run()
    (partition,) = sink.rounds[-1].positions
    resume = sink.resume(partition)
    other_model = replace(resume.snapshots[0], entity="other", sums=np.zeros((3, 5)))
    resume = replace(resume, snapshots=(*resume.snapshots, other_model))
    again = MemorySink()
    bench = Bench(MemorySource(batches(), lambda _: resume), again)
    bench.service.run()
    assert again.scores == []
    bench.step()
    assert bench.metric("entities", state="ok") == 2


# -- partitions --------------------------------------------------------------------------------


def piece(readings: list[Reading], partition: PartitionId, first_offset: int = 0) -> ReadingBatch:
    return replace(batch(readings, first_offset), partition=partition)


def test_an_entity_in_two_partitions_is_counted() -> None:
    mine, theirs = PartitionId("in", 0), OTHER
    alone: list[Reading] = [("a", slot * 10, 1.0, 1.0) for slot in range(4)]
    spread: list[Reading] = [("b", slot * 10, 1.0, 1.0) for slot in range(4)]
    first = [piece([*alone, *spread], mine), replace(piece(spread[:2], theirs), unkeyed=2)]
    source = ScriptedSource(
        [
            Polled([first[0]], assigned={mine: Resume(), theirs: Resume()}),
            Polled([first[1]]),
            Polled([piece([("a", 40, 1.0, 1.0), ("b", 40, 1.0, 1.0)], mine, 8)]),
        ]
    )
    bench = Bench(source, MemorySink())
    bench.step()
    assert bench.metric("misplaced_readings_total", reason="two_partitions") == 0
    bench.step()
    bench.step()
    # Two of the second partition, and from then on those of the first as well.
    assert bench.metric("misplaced_readings_total", reason="two_partitions") == 3
    assert bench.metric("misplaced_readings_total", reason="no_key") == 2


def test_a_revoked_partition_is_forgotten() -> None:
    mine, theirs = PartitionId("in", 0), OTHER
    steady: list[Reading] = [("a", slot * 10, 1.0, 1.0) for slot in range(8)]
    moving: list[Reading] = [("b", slot * 10, 1.0, 1.0) for slot in range(8)]
    sink = MemorySink()
    source = ScriptedSource(
        [
            Polled(
                [piece(steady, mine), piece(moving, theirs)],
                assigned={mine: Resume(), theirs: Resume()},
            ),
            Polled(revoked={theirs}),
            Polled([piece([("a", 80, 1.0, 1.0)], mine, 8)]),
            Polled([piece(moving, theirs)], assigned={theirs: Resume()}),
        ]
    )
    bench = Bench(source, sink)
    bench.step()
    assert bench.metric("anomaly_score", entity="b") is not None
    assert bench.metric("entities", state="ok") == 2
    bench.step()
    assert bench.metric("anomaly_score", entity="b") is None
    assert bench.metric("anomaly_score", entity="a") is not None
    assert bench.recent.past("b") is None
    assert bench.recent.past("a") is not None
    assert bench.metric("entities", state="ok") == 1
    assert bench.metric("rebalances_total") == 2
    bench.step()
    assert set(sink.rounds[-1].positions) == {mine}
    # When it comes back it begins as it is told to, not with what was in memory.
    bench.step()
    assert [s.timestamp_ms for s in sink.rounds[-1].scores if s.entity == "b"] == list(
        range(0, 70, 10)
    )


def test_a_poll_of_nothing_commits_nothing() -> None:
    sink = MemorySink()
    bench = Bench(ScriptedSource([Polled(), Polled()]), sink)
    assert bench.step()
    assert bench.step()
    assert not bench.step()
    assert sink.rounds == []


def test_a_batch_of_dead_letters_alone_is_committed() -> None:
    letter = DeadLetter("in", 0, 0, "empty", "expected a message", None, None)
    only = replace(batch([]), dead_letters=(letter,), next_offset=1)
    sink = MemorySink()
    bench = Bench(MemorySource([only]), sink)
    bench.service.run()
    ((round_,)) = sink.rounds
    assert round_.dead_letters == [letter]
    assert [position.offset for position in round_.positions.values()] == [1]
    assert bench.metric("dead_letters_total", reason="empty") == 1


def test_the_generation_of_the_poll_goes_with_its_commit() -> None:
    given: list[object] = []

    class Fenced(MemorySink):
        def commit(self, round_: Round, generation: object) -> None:
            given.append(generation)

    polls = [
        Polled([piece([("a", slot, 1.0, 1.0)], OTHER, slot)], generation=f"g{slot}")
        for slot in range(2)
    ]
    polls[0].assigned[OTHER] = Resume()
    bench = Bench(ScriptedSource(polls), Fenced())
    bench.service.run()
    assert given == ["g0", "g1"]


# -- what it says of itself --------------------------------------------------------------------


def test_health_says_what_is_waited_for() -> None:
    sink = FailingSink(failing=(2,))
    resume: dict[PartitionId, Resume] = {}
    partition = PartitionId("in", 0)
    source = ScriptedSource(
        [
            Polled(),
            Polled([piece(log()[:20], partition)], assigned={partition: Resume()}),
            Polled([piece(log()[20:40], partition, 20)]),
            Polled([piece(log()[40:60], partition, 40)]),
        ]
    )
    bench = Bench(source, sink)
    assert bench.health.unready() == "starting"
    bench.step()
    assert bench.health.unready() == "no partitions are assigned yet"
    bench.step()
    assert bench.health.unready() is None
    bench.step()
    reasons: list[str | None] = []

    class Watching(ScriptedSource):
        def poll(self) -> Polled:
            reasons.append(bench.health.unready())
            bench.now += 2
            return super().poll()

    resume[partition] = sink.resume(partition)
    bench.service._source = Watching(
        [
            Polled([piece(log()[40:60], partition, 40)]),
            Polled([piece(log()[:20], partition)], assigned=resume),
            Polled([piece(log()[20:50], partition, 20)]),
        ]
    )
    bench.service.run()
    assert [reason for reason, _ in groupby(reasons)] == [
        None,
        "the broker is away",
        "windows of 1 partitions are being rebuilt",
        None,
    ]


def test_a_silent_partition_is_stale_by_the_clock_until_it_speaks() -> None:
    partition = PartitionId("in", 0)
    source = ScriptedSource(
        [
            Polled([piece(log()[:20], partition)], assigned={partition: Resume()}),
            Polled(),
            Polled(),
            Polled([piece(log()[20:22], partition, 20)]),
        ]
    )
    bench = Bench(source, MemorySink())
    bench.step()
    assert bench.metric("entities", state="stale") == 0
    bench.step(59)
    assert bench.metric("entities", state="stale") == 0
    bench.step(2)
    assert bench.metric("entities", state="stale") == 3
    bench.step()
    assert bench.metric("entities", state="stale") == 0


def test_lag_is_told_in_records_and_in_seconds() -> None:
    partition = PartitionId("in", 0)
    first = replace(piece(log()[:20], partition), received_at=990.0)
    source = ScriptedSource([Polled([first], assigned={partition: Resume()}), Polled()])
    bench = Bench(source, MemorySink())
    source.behind = {partition: 17}
    bench.step(10)  # it is 1010 now
    assert bench.metric("consumer_lag_records", topic="in", partition="0") == 17
    assert bench.metric("consumer_lag_seconds") == 20
    source.behind = {partition: 0}
    bench.step(10)
    assert bench.metric("consumer_lag_seconds") == 0


# -- stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_request_to_stop_is_honoured_after_the_round(rounds: int) -> None:
    sink = MemorySink()
    bench = Bench(MemorySource(batches()), sink)
    bench.service.run(lambda: len(sink.rounds) >= rounds)
    assert len(sink.rounds) == rounds


def test_a_request_to_stop_is_honoured_while_the_broker_is_away() -> None:
    sink = FailingSink(failing=(1,), failing_resets=10**9)
    bench = Bench(MemorySource(batches(), sink.resume), sink)
    bench.service.run(lambda: len(bench.slept) >= 3)
    assert len(bench.slept) == 3
    assert len(sink.rounds) == 1
    assert bench.health.unready() == "the broker is away"


def test_only_the_service_commits() -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(service_module)))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "commit"
    ]
    assert len(calls) == 1


# -- contracts ---------------------------------------------------------------------------------


def history(entities: str = "ab", rows: int = 5000) -> History:
    return History(
        ("a", "b"),
        tuple(
            EntityHistory(
                name,
                np.arange(rows, dtype=np.int64) * 10 + i,
                np.full((rows, 2), i, np.float32),
            )
            for i, name in enumerate(entities)
        ),
        (),
    )


def sources() -> dict[str, Callable[[], Source]]:
    return {
        "memory": lambda: MemorySource(batches()),
        "history": lambda: HistorySource(history(), lambda _: None),
    }


@pytest.mark.parametrize("name", sources())
def test_every_source_reads_everything_once_and_in_order(name: str) -> None:
    source = sources()[name]()
    total = sum(source.lag().values())
    known: set[PartitionId] = set()
    next_offset, readings = 0, 0
    while not (polled := source.poll()).ended:
        assert not known & polled.assigned.keys()
        known |= polled.assigned.keys()
        for fed in polled.batches:
            assert fed.partition in known
            count = len(fed.entities)
            assert fed.values.shape == (count, 2)
            assert fed.values.dtype == np.float32
            assert fed.timestamps_ms.dtype == np.int64
            assert fed.offsets.tolist() == list(range(next_offset, next_offset + count))
            next_offset = fed.next_offset
            readings += count
        assert sum(source.lag().values()) == total - readings
    assert readings == total
    assert sum(source.lag().values()) == 0
    assert source.poll().ended
    source.close()


def test_memory_can_be_read_again_and_history_says_that_it_cannot() -> None:
    memory = sources()["memory"]()
    first = memory.poll()
    memory.rewind()
    again = memory.poll()
    assert again.batches == first.batches
    assert again.assigned.keys() == first.assigned.keys()
    with pytest.raises(StreamError, match="start it again"):
        sources()["history"]().rewind()


def test_history_is_merged_in_the_order_of_time() -> None:
    done: list[int] = []
    source = HistorySource(history("ab", 3000), done.append)
    first, second = source.poll().batches + source.poll().batches
    assert first.entities[:4] == ["a", "b", "a", "b"]
    times = np.concatenate([first.timestamps_ms, second.timestamps_ms])
    assert np.all(np.diff(times) >= 0)
    assert source.poll().ended
    assert done == [0, len(first.entities), 6000]


def scored(entity: str, slot: int, channels: int = 2) -> SlotScore:
    told = {f"c{i}": ChannelScore(None if i else 1.0, 2.0, 1.5, 2.5, 0.5) for i in range(channels)}
    return SlotScore(entity, slot * 10, None if slot == 0 else 0.5, 0.01, "ok", 0.5, "m@0", told)


@pytest.mark.parametrize("name", ["memory", "parquet"])
def test_every_sink_keeps_what_is_committed_in_order(name: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "scores.parquet"
    sink = MemorySink() if name == "memory" else ParquetSink(path)
    rounds = [
        Round(scores=[scored("a", 0), scored("b", 0, 0)]),
        Round(),
        Round(scores=[scored("a", 1)]),
    ]
    for round_ in rounds:
        sink.commit(round_, None)
    sink.reset()
    sink.close()
    expected = [(s.entity, s.timestamp_ms, s.anomaly_score) for r in rounds for s in r.scores]
    if isinstance(sink, MemorySink):
        assert [(s.entity, s.timestamp_ms, s.anomaly_score) for s in sink.scores] == expected
        return
    rows = pq.read_table(path).to_pylist()
    found = [
        (r["entity"], round(r["timestamp"].timestamp() * 1000), r["anomaly_score"]) for r in rows
    ]
    assert found == expected
    assert dict(rows[0]["channels"])["c1"] == {
        "observed": None,
        "expected": 2.0,
        "lower": 1.5,
        "upper": 2.5,
        "contribution": 0.5,
    }
    assert rows[1]["channels"] == []
    assert list(path.parent.iterdir()) == [path]


def test_a_parquet_file_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    path.write_bytes(b"the one of yesterday")
    sink = ParquetSink(path)
    sink.commit(Round(scores=[scored("a", 1)]), None)
    assert path.read_bytes() == b"the one of yesterday"
    sink.abandon()
    assert list(tmp_path.iterdir()) == [path]
