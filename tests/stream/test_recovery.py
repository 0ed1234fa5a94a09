"""However the log is cut into batches and wherever the service dies, the scores are the same.

The log is a Python list; commits are kept in memory exactly as Kafka keeps them: the offset, its
metadata as text, and the latest snapshot of each entity as bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.buffer import PartitionBuffer
from stream.codec import CommitMetadata, decode_snapshot, encode_snapshot
from stream.records import AlertEvent, ReadingBatch, SlotScore
from stream.scoring import Verdicts, score_rounds
from tests.stream.fakes import SCORING, FakeLearner, FakeScorer, Reading, batch


@dataclass
class Committed:
    """What outlives a crash."""

    offset: int = 0
    metadata: str = ""
    state: dict[str, bytes] = field(default_factory=dict)
    scores: list[SlotScore] = field(default_factory=list)
    alerts: list[AlertEvent] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """How slots are scored: with what is learned on the way, and with what follows."""

    learns: bool
    lag: int
    complete: bool = False
    """Whether complete slots are closed at once."""

    def scorer(self) -> FakeScorer:
        learner = FakeLearner() if self.learns else None
        return FakeScorer(lag=self.lag, adaptation=learner, longest=1)


PLAIN = Kind(learns=False, lag=0)
KINDS = tuple(
    Kind(learns=learns, lag=lag, complete=complete)
    for complete in (False, True)
    for lag in (0, 2)
    for learns in (False, True)
)


def work(
    log: list[Reading],
    cuts: list[int],
    committed: Committed,
    kind: Kind = PLAIN,
    *,
    most: int = 10**9,
    rounds: int = 10**9,
) -> None:
    """Process the log from the last commit to the last cut, committing at every cut.

    What would close more than `most` slots is done in parts, with a commit after each; after so
    many `rounds` all but what was committed is lost.
    """
    scorer = kind.scorer()
    shape = scorer.grid(close_complete=kind.complete)
    metadata = CommitMetadata.decode(committed.metadata)
    buffer = PartitionBuffer(shape, scorer)
    at = committed.offset
    if metadata is not None:
        at = metadata.replay_offset
        buffer = PartitionBuffer(
            shape,
            scorer,
            watermark_ms=metadata.replay_watermark_ms,
            prime_until=committed.offset,
            prime_watermark_ms=metadata.watermark_ms,
            prime_complete=metadata.close_complete,
            complete_changes=metadata.complete_changes,
        )
        snapshots = [decode_snapshot(value) for value in committed.state.values()]
        buffer.restore([s for s in snapshots if s is not None])
    for cut in [at, *(cut for cut in cuts if cut > at)]:
        rest: ReadingBatch | None = batch(log[at:cut], at)
        at = cut
        while rest is not None:
            now, rest = buffer.divide(rest, most)
            verdicts = score_rounds([(buffer, buffer.advance(now))], scorer, SCORING)
            if not buffer.priming:
                commit(buffer, now.next_offset, verdicts, committed)
            rounds -= 1
            if not rounds:
                return


def commit(buffer: PartitionBuffer, at: int, verdicts: Verdicts, committed: Committed) -> None:
    committed.scores += verdicts.scores
    committed.alerts += verdicts.alerts
    due, gone = buffer.snapshots()
    for name in gone:
        committed.state.pop(name, None)
    for snapshot in due:
        committed.state[snapshot.entity] = encode_snapshot(snapshot)
    replay = buffer.replay_point(at)
    committed.offset = at
    committed.metadata = CommitMetadata(
        replay.offset,
        replay.watermark_ms,
        buffer.watermark_ms,
        10,
        close_complete=buffer.grid.close_complete,
        complete_changes=buffer.changes_after(replay.offset),
    ).encode()


def told(committed: Committed) -> list[tuple[object, ...]]:
    """Scores in an order that does not depend on rows or batches, rounded to float32's grain."""
    return sorted(
        (
            s.entity,
            s.timestamp_ms,
            None if s.anomaly_score is None else round(s.anomaly_score, 4),
            s.state,
            round(s.imputed_ratio, 4),
            tuple(s.faulty.items()),
        )
        for s in committed.scores
    )


def changes(committed: Committed) -> list[tuple[object, ...]]:
    return sorted(
        (a.entity, a.timestamp_ms, a.state, a.previous, tuple(a.faulty.items()), a.summary)
        for a in committed.alerts
    )


@st.composite
def logs(draw: st.DrawFn) -> list[Reading]:
    """Readings in a plausible order: late ones, duplicates, gaps, jumps, entities come and go."""
    log: list[Reading] = []
    now = draw(st.integers(0, 1000))
    value = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 4.0, 9.0, 30.0]))
    for _ in range(draw(st.integers(1, 60))):
        now += draw(st.sampled_from([0, 0, 0, 3, 5, 10, 10, 10, 40, 90, 500]))
        shift = draw(st.sampled_from([0, 0, 0, 0, -5, -10, -15, -40]))
        entity = draw(st.sampled_from(["a", "b", "new", "other"]))
        log.append((entity, max(0, now + shift), draw(value), draw(value)))
    return log


# How many slots a part may close: one of each entity, some, or as many as there are.
parts = st.sampled_from([1, 7, 40, 10**9])


@given(data=st.data(), log=logs(), kind=st.sampled_from(KINDS))
@settings(max_examples=120, deadline=None)
def test_batching_does_not_change_the_scores(
    data: st.DataObject, log: list[Reading], kind: Kind
) -> None:
    one_by_one, cut = Committed(), Committed()
    work(log, list(range(1, len(log) + 1)), one_by_one, kind)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(log)))))
    work(log, [*cuts, len(log)], cut, kind, most=data.draw(parts))
    assert told(cut) == told(one_by_one)
    assert changes(cut) == changes(one_by_one)


@given(data=st.data(), log=logs(), kind=st.sampled_from(KINDS))
@settings(max_examples=200, deadline=None)
def test_crashes_do_not_change_the_scores(
    data: st.DataObject, log: list[Reading], kind: Kind
) -> None:
    undisturbed, crashing = Committed(), Committed()
    work(log, list(range(1, len(log) + 1)), undisturbed, kind)
    crashes = sorted(data.draw(st.sets(st.integers(1, len(log)), max_size=6)))
    for crash in crashes:
        cuts = sorted(data.draw(st.sets(st.integers(1, crash))))
        most, rounds = data.draw(parts), data.draw(st.integers(1, 40))
        work(log, [*cuts, crash], crashing, kind, most=most, rounds=rounds)
    work(log, [len(log)], crashing, kind, most=data.draw(parts))
    assert told(crashing) == told(undisturbed)
    assert changes(crashing) == changes(undisturbed)


@given(data=st.data(), log=logs(), learns=st.booleans(), lag=st.sampled_from([0, 2]))
@settings(max_examples=100, deadline=None)
def test_who_changes_when_slots_close_loses_and_repeats_none(
    data: st.DataObject, log: list[Reading], learns: bool, lag: int
) -> None:
    late, eager = (Kind(learns=learns, lag=lag, complete=complete) for complete in (False, True))
    changing = Committed()
    stops = sorted(data.draw(st.sets(st.integers(1, len(log)), max_size=6)))
    for stop in stops:
        kind, most = data.draw(st.sampled_from([late, eager])), data.draw(parts)
        work(log, [stop], changing, kind, most=most, rounds=data.draw(st.integers(1, 40)))
    work(log, [len(log)], changing, data.draw(st.sampled_from([late, eager])))
    slots = [(s.entity, s.timestamp_ms) for s in changing.scores]
    assert len(set(slots)) == len(slots)
    fewest, more = Committed(), Committed()
    work(log, [len(log)], fewest, late)
    work(log, [len(log)], more, eager)
    assert {(s.entity, s.timestamp_ms) for s in fewest.scores} <= set(slots)
    assert {(s.entity, s.timestamp_ms) for s in more.scores} >= set(slots)


def test_a_rule_that_changes_to_and_fro_tells_what_is_complete_once() -> None:
    #  slot   0         3(complete)   4            5
    #  rule   late |    at once     | late | at once
    log: list[Reading] = [("a", 0, None, 0.0), ("a", 35, 0.0, 0.0)]
    log += [("a", t, None, None) for t in (40, 40, 40, 60)]
    changing = Committed()
    for stop, complete in [(1, False), (3, True), (4, False), (5, True), (6, False)]:
        work(log, [stop], changing, Kind(learns=False, lag=0, complete=complete))
    assert [s.timestamp_ms for s in changing.scores] == [0, 10, 20, 30, 40]


def test_silence_is_counted_across_a_crash() -> None:
    # Readings without a value still move the watermark, and with it the silence of their entity.
    log: list[Reading] = [("a", 0, None, 0.0), *[("a", t, None, None) for t in (90, 100, 140)]]
    log.append(("a", 640, None, None))
    undisturbed, crashing = Committed(), Committed()
    work(log, [len(log)], undisturbed)
    for crash in (2, 4, len(log)):
        work(log, [crash], crashing)
    assert told(crashing) == told(undisturbed)
    assert max(s.timestamp_ms for s in undisturbed.scores) == 300


def long_log() -> Iterator[Reading]:
    """Long enough for snapshots to age, a newcomer to settle and an entity to be forgotten."""
    for slot in range(120):
        wobble = float(slot % 3)
        yield ("a", slot * 10, wobble, 20.0 if 60 <= slot < 70 else 1.0)
        yield ("new", slot * 10 + 1, wobble, None if slot % 5 else 2.0)
        if slot < 20 or slot > 100:
            yield ("b", slot * 10 + 2, 1.0, 1.0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("every", [1, 7, 50])
def test_a_crash_at_every_commit(every: int, kind: Kind) -> None:
    log = list(long_log())
    undisturbed, crashing = Committed(), Committed()
    work(log, [len(log)], undisturbed, kind)
    for at in [*range(every, len(log), every), len(log)]:
        work(log, [at], crashing, kind)
    assert told(crashing) == told(undisturbed)
    assert changes(crashing) == changes(undisturbed)
    # It is not the empty list that is equal: the fault was seen, the absent one was forgotten.
    assert ("a", "firing") in {(entity, state) for entity, _, state, *_ in changes(undisturbed)}
    assert {s.state for s in undisturbed.scores} >= {"warming", "ok", "firing", "stale"}
    slots_of_b = [s.timestamp_ms for s in undisturbed.scores if s.entity == "b"]
    assert 490 in slots_of_b
    assert 510 not in slots_of_b
    assert 1010 in slots_of_b
