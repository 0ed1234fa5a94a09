"""The loop: source -> windows -> detect -> decide -> sinks -> commit.

The only place that commits offsets. Live and backfill run this same code with other sources and
sinks. Every round is all or nothing: when a commit fails, the windows are thrown away and rebuilt
from the last one that did not.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np
import structlog

from stream.buffer import Closing, EntitySnapshot, PartitionBuffer
from stream.codec import CommitMetadata
from stream.errors import RetryableError
from stream.grid import Grid
from stream.http import Health
from stream.metrics import Misplaced, ServiceMetrics
from stream.recent import Recent
from stream.records import ChannelState, PartitionId, ReadingBatch, State
from stream.scoring import Scorer, ScoringConfig, score_rounds
from stream.sinks import Position, Round, Sink
from stream.sources import RETRY_SECONDS, Resume, Source

_log = structlog.get_logger("tsdiff.service")

# Lag and entity counts are for people and dashboards; more often would only cost.
GAUGES_EVERY_S: Final = 1.0
MOST_CLOSED: Final = 20_000
"""Slots of entities that a round closes, where several would do: two seconds of work, and some ten
megabytes of scores. All slots of an outage at once would be millions."""
SPREAD_EVERY_S: Final = 60.0
"""Between two lines about messages that are not keyed by entity; all are counted."""


class Service:
    """A source, a model and a sink, put together; `step` is one turn of the loop."""

    def __init__(
        self,
        source: Source,
        sink: Sink,
        scorer: Scorer,
        grid: Grid,
        scoring: ScoringConfig,
        metrics: ServiceMetrics,
        health: Health,
        *,
        recent: Recent | None = None,
        idle_after_s: float = 300.0,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._source = source
        self._sink = sink
        self._scorer = scorer
        self._grid = grid
        self._scoring = scoring
        self._metrics = metrics
        self._health = health
        self._recent = recent
        self._idle_after_s = idle_after_s
        self._clock = clock
        self._sleep = sleep
        self._buffers: dict[PartitionId, PartitionBuffer] = {}
        self._waiting: dict[PartitionId, deque[ReadingBatch]] = {}
        """What was read and is not processed yet; no more is read of these partitions meanwhile."""
        self._heard_at: dict[PartitionId, float] = {}
        self._appended_at: dict[PartitionId, float] = {}
        self._gauges_at = 0.0
        self._spread_at = -SPREAD_EVERY_S
        self._compiled_before = 0
        """Compilations of the models that ran before this one."""
        self._failures = 0
        """Rounds that failed since the last one that was committed."""

    def run(
        self,
        stopping: Callable[[], bool] = lambda: False,
        between: Callable[[], None] = lambda: None,
    ) -> bool:
        """Work until the source ends or somebody asks to stop; what was begun is finished.

        `between` is called before each round, when all is committed. False where the last round
        failed, and was not committed.
        """
        while not stopping():
            between()
            try:
                if not self.step():
                    break
            except RetryableError as error:
                if not self._recover(error, stopping):
                    return False
        return True

    def swap(self, scorer: Scorer, grid: Grid, scoring: ScoringConfig) -> None:
        """Go on with another model or other settings, of the same channels and period.

        What is in force is what a restart with them would find: where windows or alerts may
        differ, partitions are read again from their last commit, without telling anything twice.
        """
        told_alike = replace(scoring, top_channels=self._scoring.top_channels) == self._scoring
        same = scorer is self._scorer and grid == self._grid and told_alike
        if scorer is not self._scorer:
            self._compiled_before += self._scorer.compilations
        self._scorer, self._grid, self._scoring = scorer, grid, scoring
        if not same:
            # The series of entities stay: they are still ours.
            self._buffers.clear()
            self._waiting.clear()
            self._source.rewind()

    def step(self) -> bool:
        """Run one round; False once the source has ended.

        Raises:
            RetryableError: nothing of this round was committed.

        """
        self._health.beat()
        with self._metrics.stage("fetch"):
            polled = self._source.poll()
        if polled.revoked or polled.assigned:
            self._metrics.rebalance()
        for _ in range(polled.stalled):
            self._metrics.recovery("stall")
        for partition in polled.revoked:
            if self._recent is not None and partition in self._buffers:
                # After a failed commit it is kept: what was committed is still true.
                self._recent.forget(self._buffers[partition].names)
            self._forget(partition)
        for partition, resume in polled.assigned.items():
            self._buffers[partition] = self._resume(partition, resume)
            self._waiting.pop(partition, None)
            self._heard_at[partition] = self._clock()
        for batch in polled.batches:
            self._waiting.setdefault(batch.partition, deque()).append(batch)
        batches = [self._part(partition) for partition in list(self._waiting)]
        self._source.hold(self._waiting.keys())
        round_ = Round()
        turns = [self._begin(batch, round_) for batch in batches]
        with self._metrics.stage("score"):
            watcher = self._recent.take if self._recent is not None else None
            verdicts = score_rounds(turns, self._scorer, self._scoring, self._health.beat, watcher)
        round_.scores, round_.alerts = verdicts.scores, verdicts.alerts
        for batch in batches:
            self._finish(batch, round_)
        if round_:
            with self._metrics.stage("commit"):
                self._sink.commit(round_, polled.generation)
            self._failures = 0
            self._told(round_, batches)
        self._watch()
        return bool(self._waiting) or not polled.ended

    # -- partitions ----------------------------------------------------------------------------

    def _resume(self, partition: PartitionId, resume: Resume) -> PartitionBuffer:
        if resume.lost is not None:
            self._metrics.recovery(resume.lost)
        metadata = resume.metadata
        if metadata is None or resume.next_offset is None:
            buffer = PartitionBuffer(self._grid, self._scorer)
            buffer.disown(s.entity for s in resume.snapshots)
            return buffer
        buffer = PartitionBuffer(
            self._grid,
            self._scorer,
            watermark_ms=metadata.replay_watermark_ms,
            prime_until=resume.next_offset,
            prime_watermark_ms=metadata.watermark_ms,
            prime_complete=metadata.close_complete,
            complete_changes=metadata.complete_changes,
            warm_again=resume.lost is not None,
        )
        fitting = [s for s in resume.snapshots if self._fits(s)]
        if len(fitting) < len(resume.snapshots):
            _log.warning(
                "snapshots of a model with other channels are left out",
                partition=partition.partition,
                count=len(resume.snapshots) - len(fitting),
            )
        buffer.restore(fitting)
        return buffer

    def _fits(self, snapshot: EntitySnapshot) -> bool:
        depth = len(self._scorer.channels)
        runs = snapshot.runs and snapshot.runs.last
        arrays = (snapshot.sums, snapshot.statistics, runs)
        return all(a is None or a.shape[-1] == depth for a in arrays)

    def _forget(self, partition: PartitionId) -> None:
        buffer = self._buffers.pop(partition, None)
        if buffer is not None:
            self._metrics.forget(buffer.names)
        self._waiting.pop(partition, None)
        self._heard_at.pop(partition, None)
        self._appended_at.pop(partition, None)

    def _part(self, partition: PartitionId) -> ReadingBatch:
        """Take of what waits as much as a round should close."""
        waiting = self._waiting[partition]
        now, rest = self._buffers[partition].divide(waiting.popleft(), MOST_CLOSED)
        if rest is not None:
            waiting.appendleft(rest)
        if not waiting:
            del self._waiting[partition]
        return now

    def _begin(
        self, batch: ReadingBatch, round_: Round
    ) -> tuple[PartitionBuffer, Iterator[Closing]]:
        buffer = self._buffers[batch.partition]
        fresh = [d for d in batch.dead_letters if d.offset >= buffer.prime_until]
        round_.dead_letters.extend(fresh)
        if not buffer.priming:
            buffer.placement.unknown_channels += batch.unknown_channels
        return buffer, buffer.advance(batch)

    def _finish(self, batch: ReadingBatch, round_: Round) -> None:
        partition, buffer = batch.partition, self._buffers[batch.partition]
        if batch.entities:
            self._heard_at[partition] = self._clock()
            self._appended_at[partition] = batch.received_at
        if buffer.priming:
            return
        snapshots, gone = buffer.snapshots()
        round_.snapshots.extend((partition, snapshot) for snapshot in snapshots)
        round_.gone.extend((partition, name) for name in gone)
        replay = buffer.replay_point(batch.next_offset)
        round_.positions[partition] = Position(
            batch.next_offset,
            CommitMetadata(
                replay_offset=replay.offset,
                replay_watermark_ms=replay.watermark_ms,
                watermark_ms=buffer.watermark_ms,
                period_ms=self._grid.period_ms,
                close_complete=self._grid.close_complete,
                complete_changes=buffer.changes_after(replay.offset),
            ),
        )

    # -- telling -------------------------------------------------------------------------------

    def _told(self, round_: Round, batches: list[ReadingBatch]) -> None:
        """Count what is committed now; nothing is counted that may be done again."""
        metrics = self._metrics
        for batch in batches:
            buffer = self._buffers[batch.partition]
            placement, buffer.placement = buffer.placement, type(buffer.placement)()
            metrics.readings(placement.placed + placement.late)
            metrics.late(placement.late)
            metrics.duplicate_readings(placement.duplicates)
            metrics.unknown_channels(placement.unknown_channels)
            if batch.received_at and placement.placed:
                # Per reading: a few slow rounds are many readings that waited.
                latency = self._clock() - batch.received_at
                metrics.end_to_end_latency(np.full(placement.placed, latency))
            self._notice_spread(batch)
        for letter in round_.dead_letters:
            metrics.dead_letter(letter.reason)
        metrics.scores(len(round_.scores))
        metrics.observe_scores(round_.scores)
        if self._recent is not None:
            self._recent.observe(round_.scores, round_.alerts)
        for alert in round_.alerts:
            # An alert of the same state is about its faulty channels.
            if alert.state == alert.previous or "firing" in (alert.state, alert.previous):
                _log.info(
                    "alert",
                    entity=alert.entity,
                    state=alert.state,
                    previous=alert.previous,
                    anomaly_score=alert.anomaly_score,
                    summary=alert.summary,
                    faulty=dict(alert.faulty),
                    channels=list(alert.channels)[: self._scoring.top_channels],
                )

    def _notice_spread(self, batch: ReadingBatch) -> None:
        """Count readings of entities that are in several partitions, or soon will be."""
        others = [b.names for p, b in self._buffers.items() if p != batch.partition]
        names = self._buffers[batch.partition].names
        spread = {n for n in set(batch.entities) & names.keys() if any(n in o for o in others)}
        found: dict[Misplaced, int] = {
            "no_key": batch.unkeyed,
            "two_partitions": sum(name in spread for name in batch.entities) if spread else 0,
        }
        for reason, count in found.items():
            self._metrics.misplaced(reason, count)
        if any(found.values()) and self._clock() - self._spread_at >= SPREAD_EVERY_S:
            self._spread_at = self._clock()
            _log.warning(
                "messages are not keyed by entity: what is spread over partitions is scored twice, "
                "each time from a part of it; see tsdiff doctor and tsdiff rekey",
                partition=batch.partition.partition,
                entity=min(spread, default=None),
                **found,
            )

    def _watch(self) -> None:
        """Readiness, lag and silence, once a second."""
        now = self._clock()
        if now - self._gauges_at < GAUGES_EVERY_S:
            return
        self._gauges_at = now
        priming = [p for p, buffer in self._buffers.items() if buffer.priming]
        if not self._buffers:
            self._health.set_ready("no partitions are assigned yet")
        elif priming:
            self._health.set_ready(f"windows of {len(priming)} partitions are being rebuilt")
        else:
            self._health.set_ready(None)
        lag = dict(self._source.lag())
        for partition, waiting in self._waiting.items():
            lag[partition] = lag.get(partition, 0) + sum(len(batch.entities) for batch in waiting)
        self._metrics.consumer_lag(
            lag, max((self._behind_s(p, n) for p, n in lag.items()), default=0.0)
        )
        self._metrics.compilations(self._compiled_before + self._scorer.compilations)
        self._metrics.entities(self._states(now))
        self._metrics.channels(self._faulty_channels())

    def _behind_s(self, partition: PartitionId, records: int) -> float:
        """How long ago the newest message taken was appended, while there are newer ones.

        Where some wait, the oldest of them: the one before may be from before an outage.
        """
        waiting = self._waiting.get(partition)
        appended = waiting[0].received_at if waiting else self._appended_at.get(partition)
        return max(0.0, self._clock() - appended) if records and appended else 0.0

    def _states(self, now: float) -> Counter[State]:
        """Entities by state; those of a partition that has gone silent are stale by wall clock.

        That is said here only: a slot that readings may still fill is not used up by the clock.
        """
        states: Counter[State] = Counter()
        for partition, buffer in self._buffers.items():
            if now - self._heard_at[partition] > self._idle_after_s:
                states["stale"] += len(buffer.names)
            else:
                states.update(buffer.entity(row).alert.phase for row in buffer.names.values())
        return states

    def _faulty_channels(self) -> Counter[ChannelState]:
        """Channels that are dead or stuck, of all entities."""
        faulty: Counter[ChannelState] = Counter()
        for buffer in self._buffers.values():
            for row in buffer.names.values():
                found = buffer.entity(row).faulty
                if found:
                    faulty.update(found.values())
        return faulty

    # -- faults --------------------------------------------------------------------------------

    def _recover(self, error: RetryableError, stopping: Callable[[], bool]) -> bool:
        """Go back to the last commit as soon as the broker lets us; False if asked to stop."""
        _log.warning("going back to the last commit", error=str(error))
        self._metrics.recovery("commit")
        self._health.set_ready(str(error))
        for partition in list(self._buffers):
            self._forget(partition)
        if self._failures:
            # The broker takes us back but not our work; without a pause we would spin.
            self._sleep(RETRY_SECONDS)
        self._failures += 1
        while not stopping():
            self._health.beat()
            try:
                self._sink.reset()
            except RetryableError as again:
                _log.warning("the broker is still away", error=str(again))
                self._sleep(RETRY_SECONDS)
                continue
            self._source.rewind()
            return True
        return False
