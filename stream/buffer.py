"""Readings of one partition, placed on the event-time grid, become windows ready to be scored.

Pure bookkeeping: no clock, no Kafka, no model. A slot is `timestamp_ms // period_ms`. The
watermark is the largest event time accepted so far; a slot closes when `watermark - lateness`
reaches its end, so what closes depends on the log alone and not on when or how it was read.

                 closed (scored once)      open
    slots   ... | 41 | 42 | 43 | 44 || 45 | 46 |
                  <--- window of 43 --->          ^ watermark (in 46), lateness 1 slot

With a lag, a slot is scored when as many later ones have closed, too.

Where `close_complete` is set, an entity's oldest open slot also closes as soon as it is complete,
that is, holds a value of every channel that training saw. A complete slot takes no more readings,
so this, too, depends on the log alone.

After a crash the next owner restores the per-entity snapshots, starts again at `replay_point()`
and runs the same code with `emit` off up to the committed offset ("priming").
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from stream.decide import AlertState
from stream.grid import NO_WATERMARK, Grid, ReplayPoint
from stream.learning import Learned, Learner, Pupil
from stream.records import ChannelState, ReadingBatch
from tsdiff.history import counter_rates
from tsdiff.runs import Counts, Runs, ever_read, follow, too_long

Float32 = NDArray[np.float32]
Rows = NDArray[np.intp]

# Snapshots of versions that did not say.
UNKNOWN_OFFSET = -1


class Profiles(Protocol):
    """What the buffer asks of the model about entities (`tsdiff.detector.Detector`)."""

    @property
    def adaptation(self) -> Learner | None:
        """How they go on learning."""

    def row(self, entity: str) -> int:
        """Row of an entity seen in training; -1 for one never seen."""

    def statistics(self, row: int) -> tuple[Float32, Float32]:
        """Mean and scale (D,) of that row; of all entities together for -1."""

    def longest_runs(self, rows: NDArray[np.int32]) -> Counts:
        """Longest gaps and standstills (n, 2, D) that training saw in these rows."""

    def fit_statistics(
        self, count: NDArray[np.float64], total: NDArray[np.float64], total_sq: NDArray[np.float64]
    ) -> tuple[Float32, Float32]:
        """Mean and scale (D,) from running sums (D,) of one entity's readings."""


@dataclass(frozen=True, slots=True)
class EntitySnapshot:
    """What of an entity outlives the replayed part of the log; as of the end of slot `slot`."""

    entity: str
    slot: int
    first_slot: int
    silent: int
    alert: AlertState
    sums: NDArray[np.float64] | None = None
    """(3, D) count, sum and sum of squares while a newcomer's statistics are collected."""
    statistics: Float32 | None = None
    """(2, D) mean and scale of an entity that the model has never seen."""
    learned: Learned | None = None
    """What it had learned when all that is looked back on began."""
    learned_by: str = ""
    """`Learner.key`: only the same model can go on from there."""
    runs: Runs | None = None
    """How long its channels have been silent or stood still, (D,) each."""
    offset: int = UNKNOWN_OFFSET
    """The log was read up to here."""


class Span(NamedTuple):
    """G entities with up to T consecutive slots each, ready for `Detector.detect`.

    `slots` (G, W - 1 + T + lag) number the rows of `values`.
    """

    rows: Rows
    first_slot: int
    lengths: NDArray[np.int32]
    values: Float32
    slots: NDArray[np.int64]
    mean: Float32
    scale: Float32
    model_rows: NDArray[np.int32]
    history: Float32
    states: tuple[Float32 | None, ...]

    @property
    def width(self) -> int:
        """W - 1 + T + lag: the window's earlier slots come first in `values`."""
        return int(self.values.shape[1])


class Closing(NamedTuple):
    """T consecutive slots that have just closed, for n entities. False/NaN where not `present`."""

    first_slot: int
    rows: Rows
    present: NDArray[np.bool_]
    warming: NDArray[np.bool_]
    silent: NDArray[np.int64]
    faulty: NDArray[np.int8]
    """(n, T, D): 0 = neither, else 1 + the place in `CHANNEL_STATES`."""
    values: Float32
    emit: bool
    spans: tuple[Span, ...]
    """What to score first; the buffer has the `rest`."""


@dataclass
class Placement:
    """What happened to the readings of one batch; merged into metrics by the service."""

    placed: int = 0
    late: int = 0
    duplicates: int = 0
    unknown_channels: int = 0


@dataclass
class _Entity:
    name: str
    alert: AlertState
    sums: NDArray[np.float64] | None = None
    pupil: Pupil | None = None
    faulty: Mapping[str, ChannelState] = field(default_factory=dict)


@dataclass
class PartitionBuffer:
    """All open windows of one partition."""

    grid: Grid
    profiles: Profiles
    watermark_ms: int = NO_WATERMARK
    prime_until: int = 0
    """Offsets below this were committed before: they rebuild state and emit nothing."""
    prime_watermark_ms: int = NO_WATERMARK
    prime_complete: bool = False
    """Whether complete slots were closed at once when that was committed (`close_complete`)."""
    complete_changes: tuple[int, ...] = ()
    """Offsets at which that changed, in order: a replay must close what was closed."""
    warm_again: bool = False
    """What there is to rebuild from is not whole: entities warm up again afterwards."""
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        """Allocate for a few entities; the arrays double when they are full."""
        self.names: dict[str, int] = {}
        self.entities: list[_Entity | None] = []
        self._free: list[int] = []
        self._dirty: set[int] = set()
        self._newcomers: set[int] = set()
        self._gone: list[str] = []
        self._slot_offsets: dict[int, ReplayPoint] = {}
        self._closed = self.grid.closed_before(self.watermark_ms)
        self._read_to = UNKNOWN_OFFSET
        if self.priming and self.prime_complete != self.grid.close_complete:
            self.complete_changes += (self.prime_until,)
        # The rule where the replay begins.
        self._close_complete = self.grid.close_complete ^ (len(self.complete_changes) % 2 == 1)
        ends = {self.prime_until} if self.priming else set()
        self._turns = sorted({*self.complete_changes, *ends})
        self._allocate(8)

    @property
    def priming(self) -> bool:
        """Whether the buffer is still being rebuilt."""
        return self.prime_until > 0

    @property
    def next_slot(self) -> int:
        """The oldest slot that is not closed for all."""
        return self._closed

    def _open(self, rows: Rows) -> NDArray[np.int64]:
        """Each row's oldest open slot."""
        return np.maximum(self._ahead[rows], self._closed)

    # -- entities ------------------------------------------------------------------------------

    def _allocate(self, capacity: int) -> None:
        grid = self.grid

        def grown(name: str, shape: tuple[int, ...], dtype: type, fill: float) -> None:
            array: NDArray[Any] = np.full((capacity, *shape), fill, dtype)
            old = getattr(self, name, None)
            if old is not None:
                array[: len(old)] = old
            setattr(self, name, array)

        start = len(self.entities)
        grown("_ring", (grid.ring, grid.channels), np.float32, np.nan)
        grown("_counters", (grid.ring, len(grid.counters)), np.float64, np.nan)
        grown("_weights", (grid.ring if grid.block else 0,), np.float32, 0.0)
        grown("_history", (grid.history, grid.streams), np.float32, np.nan)
        grown("_mean", (grid.channels,), np.float32, 0.0)
        grown("_scale", (grid.channels,), np.float32, 1.0)
        grown("_gap", (grid.channels,), np.int32, 0)
        grown("_still", (grid.channels,), np.int32, 0)
        grown("_last", (grid.channels,), np.float32, np.nan)
        grown("_awaited", (grid.channels,), np.bool_, True)
        grown("_model_row", (), np.int32, -1)
        grown("_first", (), np.int64, 0)
        grown("_ready", (), np.int64, 0)
        grown("_silent", (), np.int64, 0)
        grown("_ahead", (), np.int64, -(2**62))
        grown("_restored", (), np.int64, -(2**62))
        grown("_snapshot", (), np.int64, -(2**62))
        grown("_scored_from", (), np.int64, -(2**62))
        grown("_alive", (), np.bool_, False)
        self.entities.extend([None] * (capacity - start))
        self._free.extend(range(capacity - 1, start - 1, -1))

    _ring: Float32 = field(init=False, repr=False)
    # Counters as they were read; in `_ring` they are rates as soon as their slot closes.
    _counters: NDArray[np.float64] = field(init=False, repr=False)
    # How much the slots by ring position teach.
    _weights: Float32 = field(init=False, repr=False)
    _history: Float32 = field(init=False, repr=False)
    _mean: Float32 = field(init=False, repr=False)
    _scale: Float32 = field(init=False, repr=False)
    _gap: Counts = field(init=False, repr=False)
    _still: Counts = field(init=False, repr=False)
    _last: Float32 = field(init=False, repr=False)
    # Channels without which a slot is not complete.
    _awaited: NDArray[np.bool_] = field(init=False, repr=False)
    _model_row: NDArray[np.int32] = field(init=False, repr=False)
    _first: NDArray[np.int64] = field(init=False, repr=False)
    _ready: NDArray[np.int64] = field(init=False, repr=False)
    _silent: NDArray[np.int64] = field(init=False, repr=False)
    # The oldest open slot of rows whose complete slots were closed before those of others.
    _ahead: NDArray[np.int64] = field(init=False, repr=False)
    # Slots up to this one are in the snapshot already; priming must not count them again.
    _restored: NDArray[np.int64] = field(init=False, repr=False)
    _snapshot: NDArray[np.int64] = field(init=False, repr=False)
    # Earlier slots are replayed for their readings alone: nothing looks back on their scores.
    _scored_from: NDArray[np.int64] = field(init=False, repr=False)
    _alive: NDArray[np.bool_] = field(init=False, repr=False)

    def _add(self, name: str, first_slot: int) -> int:
        if not self._free:
            self._allocate(2 * len(self.entities))
        row = self._free.pop()
        model_row = self.profiles.row(name)
        known = model_row >= 0
        self._ring[row] = np.nan
        self._counters[row] = np.nan
        self._weights[row] = 0.0
        self._history[row] = np.nan
        self._mean[row], self._scale[row] = self.profiles.statistics(model_row)
        self._gap[row] = self._still[row] = 0
        self._last[row] = np.nan
        self._model_row[row] = model_row
        self._awaited[row] = ever_read(self.profiles.longest_runs(np.array([model_row], np.int32)))
        self._first[row] = first_slot
        self._ready[row] = first_slot + (
            self.grid.warmup_slots if known else self.grid.newcomer_slots
        )
        self._silent[row] = 0
        self._ahead[row] = self._restored[row] = self._scored_from[row] = -(2**62)
        self._snapshot[row] = first_slot
        self._alive[row] = True
        sums = None if known else np.zeros((3, self.grid.channels))
        learner, pupil = self.profiles.adaptation, None
        if learner is not None and learner.learns(model_row):
            pupil = Pupil(learner, learner.phase(name))
        self.entities[row] = _Entity(name, AlertState(since_slot=first_slot), sums, pupil)
        if not known:
            self._newcomers.add(row)
        self.names[name] = row
        self._dirty.add(row)
        return row

    def _remove(self, row: int) -> None:
        entity = self.entity(row)
        del self.names[entity.name]
        self._alive[row] = False
        self.entities[row] = None
        self._free.append(row)
        self._dirty.discard(row)
        self._newcomers.discard(row)
        self._gone.append(entity.name)

    def entity(self, row: int) -> _Entity:
        """The record of one live row."""
        entity = self.entities[row]
        if entity is None:
            raise KeyError(f"row {row} holds no entity")
        return entity

    def restore(self, snapshots: list[EntitySnapshot]) -> None:
        """Bring back the entities of a partition as they were when it was last committed."""
        for snapshot in snapshots:
            row = self._add(snapshot.entity, snapshot.first_slot)
            entity = self.entity(row)
            entity.alert = snapshot.alert
            self._silent[row] = snapshot.silent
            self._restored[row] = self._snapshot[row] = snapshot.slot
            if snapshot.runs is not None:
                self._gap[row], self._still[row], self._last[row] = snapshot.runs
            pupil, learned = entity.pupil, snapshot.learned
            if pupil and learned and snapshot.learned_by == pupil.learner.key:
                pupil.states = [learned]
                # The next block is learned from as a whole; its state is a settled one.
                self._scored_from[row] = learned.slot + 1
            elif not pupil:
                self._scored_from[row] = snapshot.slot + 1 - self.grid.settling_slots
            if self._model_row[row] >= 0:
                continue
            if snapshot.statistics is not None:
                self._mean[row], self._scale[row] = snapshot.statistics
                entity.sums = None
                self._newcomers.discard(row)
            elif snapshot.sums is not None:
                entity.sums = snapshot.sums.copy()
            else:
                # The model that knew this entity was exchanged for one that does not.
                self._first[row] = snapshot.slot + 1
                self._ready[row] = snapshot.slot + 1 + self.grid.newcomer_slots
        self._dirty.clear()

    def disown(self, names: Iterable[str]) -> None:
        """Let go of entities of an earlier life: their snapshots go with the next commit."""
        self._gone.extend(names)

    def snapshots(self) -> tuple[list[EntitySnapshot], list[str]]:
        """Snapshots that are due since the last call, and the names of entities that are gone."""
        due = []
        rows = sorted(self._dirty)
        lasts = self._open(np.array(rows, np.intp)) - self.grid.lag - 1
        for row, last in zip(rows, lasts.tolist(), strict=True):
            entity = self.entity(row)
            self._snapshot[row] = last
            never_seen = self._model_row[row] < 0
            fitted = never_seen and entity.sums is None
            pupil = entity.pupil
            learned = pupil and pupil.settled(last - self.grid.settling_slots)
            due.append(
                EntitySnapshot(
                    entity=entity.name,
                    slot=last,
                    first_slot=int(self._first[row]),
                    silent=int(self._silent[row]),
                    alert=entity.alert,
                    sums=None if entity.sums is None else entity.sums.copy(),
                    statistics=np.stack([self._mean[row], self._scale[row]]) if fitted else None,
                    learned=learned if learned and learned.state is not None else None,
                    learned_by=pupil.learner.key if pupil else "",
                    runs=Runs(*(part[row].copy() for part in (self._gap, self._still, self._last))),
                    offset=self._read_to,
                )
            )
        gone = [name for name in self._gone if name not in self.names]
        self._dirty.clear()
        self._gone.clear()
        return due, gone

    def mark_dirty(self, row: int) -> None:
        """Ask for a snapshot of this entity with the next commit (its alert state changed)."""
        self._dirty.add(row)

    def replay_point(self, next_offset: int) -> ReplayPoint:
        """Where to start reading again so that every window open now can be rebuilt."""
        oldest = self._closed - self.grid.replay_slots
        for slot in [s for s in self._slot_offsets if s < oldest]:
            del self._slot_offsets[slot]
        here = ReplayPoint(next_offset, self.watermark_ms)
        return min(self._slot_offsets.values(), key=lambda p: p.offset, default=here)

    def changes_after(self, offset: int) -> tuple[int, ...]:
        """What a replay from there must know of `complete_changes`."""
        return tuple(change for change in self.complete_changes if change > offset)

    # -- readings ------------------------------------------------------------------------------

    def advance(self, batch: ReadingBatch) -> Iterator[Closing]:
        """Place the readings of a batch; yield the slots they close, oldest first.

        The caller scores each closing's spans, hands the streams to `keep_streams`, does the same
        with the `rest`, and asks only then for the next closing, whose history needs them.
        """
        start = 0
        while self._turns and self._turns[0] <= batch.next_offset:
            stop = int(np.searchsorted(batch.offsets, self._turns[0]))
            yield from self._advance(batch, start, stop)
            start = stop
            if self._turns[0] == self.prime_until and batch.until_ms is not None:
                break  # what was closed by then is not all closed yet
            yield from self._turn(self._turns.pop(0))
        yield from self._advance(batch, start, len(batch.entities))
        self._read_to = batch.next_offset
        if batch.until_ms is not None and batch.until_ms > self.watermark_ms:
            # A replay that is to close these slots again must begin here, and at this time.
            point = ReplayPoint(batch.next_offset, self.watermark_ms)
            self._slot_offsets.setdefault(batch.until_ms // self.grid.period_ms, point)
            self.watermark_ms = batch.until_ms
            yield from self._close(self.grid.closed_before(self.watermark_ms))

    def divide(self, batch: ReadingBatch, most: int) -> tuple[ReadingBatch, ReadingBatch | None]:
        """Part what may be taken now, closing some `most` slots of entities, from the rest.

        Parts end between messages, as commits do. What a single one closes, as after an outage of
        all its senders, is closed before it is taken, in parts without readings that end at a time
        of their own. A part closes one slot of every entity at the least.
        """
        grid, times, end = self.grid, batch.timestamps_ms, -1
        if self.priming and batch.next_offset >= self.prime_until:
            # Here what was closed at the commit is closed, as if a reading said so.
            end = int(np.searchsorted(batch.offsets, self.prime_until))
            times = np.insert(times, end, self.prime_watermark_ms)
        if self.priming:
            replayed = np.arange(len(times)) < (end if end >= 0 else len(times))
            times = np.where(replayed & (times > self.prime_watermark_ms), NO_WATERMARK, times)
        watermarks = np.maximum.accumulate(np.maximum(times, self.watermark_ms))
        limit = self._limit(watermarks, batch, most)
        far = grid.closed_before(watermarks) > limit
        if not far.any():
            return batch, None
        first = int(np.argmax(far))
        if first == 0:
            now, rest = batch.cut(0, self.prime_until if end == 0 else int(batch.offsets[0]))
            return replace(now, until_ms=grid.watermark_before(limit)), rest
        at = end
        if first != end:
            # The message of the reading that is far begins here.
            number = first - 1 if 0 <= end < first else first
            at = int(np.searchsorted(batch.offsets, batch.offsets[number]))
        if at == end:
            now, rest = batch.cut(at, self.prime_until)
            # Where it is the end of priming that is far, it is not reached in this part.
            return (replace(now, until_ms=NO_WATERMARK) if first == end else now), rest
        # The readings of one message stay together.
        at = at or int(np.searchsorted(batch.offsets, batch.offsets[0], side="right"))
        return (batch, None) if at == len(batch.entities) else batch.cut(at, int(batch.offsets[at]))

    def _limit(self, watermarks: NDArray[np.int64], batch: ReadingBatch, most: int) -> int:
        """The slot before which a part may close all."""
        begin = self._closed
        if self.watermark_ms == NO_WATERMARK or not self.names:
            # Nobody is waiting: time begins with the first reading.
            known = watermarks[watermarks > NO_WATERMARK]
            begin = max(begin, self.grid.closed_before(int(known[0])) if len(known) else begin)
        entities = len(self.names) + len(set(batch.entities) - self.names.keys())
        return begin + max(1, most // max(1, entities))

    def _turn(self, offset: int) -> Iterator[Closing]:
        """Before the message at `offset` priming ended, or another rule began to close slots."""
        if offset == self.prime_until:
            yield from self._end_priming()
        self._close_complete ^= self.complete_changes.count(offset) % 2 == 1
        yield from self._close_runs(np.flatnonzero(self._alive))

    def _end_priming(self) -> Iterator[Closing]:
        """What was closed at the commit is closed now, silently."""
        if self.watermark_ms == NO_WATERMARK:
            self._skip_to(self.grid.closed_before(self.prime_watermark_ms))
        self.watermark_ms = max(self.watermark_ms, self.prime_watermark_ms)
        yield from self._close(self.grid.closed_before(self.watermark_ms))
        self.prime_until = 0
        if self.warm_again:
            self._warm_up_again()
            self.warm_again = False

    def _warm_up_again(self) -> None:
        """Have a first window filled anew; what entities learned before that stays."""
        start = self._closed - self.grid.lag
        rows = np.flatnonzero(self._alive)
        later = np.maximum(0, start + self.grid.warmup_slots - self._ready[rows])
        self._ready[rows] += later
        # Snapshots keep the first slot, and the end of the warm-up with it; no slot is left out.
        first = self._first[rows]
        self._first[rows] = np.maximum(first, np.minimum(first + later, start))
        self._history[rows] = np.nan
        self._dirty.update(rows.tolist())

    def _advance(self, batch: ReadingBatch, start: int, stop: int) -> Iterator[Closing]:
        if start == stop:
            return
        grid = self.grid
        timestamps = batch.timestamps_ms[start:stop]
        timely = np.ones(len(timestamps), bool)
        if self.priming:
            # Nothing accepted before the commit was newer than its watermark.
            timely = timestamps <= self.prime_watermark_ms
        accepted = np.where(timely, timestamps, NO_WATERMARK)
        watermarks = np.maximum.accumulate(np.maximum(accepted, self.watermark_ms))
        before = np.concatenate([[self.watermark_ms], watermarks[:-1]])
        slots = timestamps // grid.period_ms
        late = slots < grid.closed_before(before)
        timely &= ~late
        # A reading without any value moves the watermark and says nothing else.
        keep = timely & ~np.isnan(batch.values[start:stop]).all(axis=1)
        if self.priming:
            # Who is unknown now was gone at the commit, or never got past being late.
            keep &= np.array([e in self.names for e in batch.entities[start:stop]])
        else:
            self.placement.late += int(np.sum(late))
            self.placement.placed += int(np.sum(timely))
        # A message may hold several readings: replaying it starts before its first one.
        offsets = batch.offsets[start:stop]
        before = before[np.searchsorted(offsets, offsets)]

        newest = watermarks // grid.period_ms
        index = 0
        while index < len(timestamps):
            if newest[index] == NO_WATERMARK // grid.period_ms:
                index += 1  # nothing accepted yet at all
                continue
            if self.watermark_ms == NO_WATERMARK or not self.names:
                # Nobody is waiting: skip straight to the present instead of closing empty slots.
                self._skip_to(grid.closed_before(int(watermarks[index])))
            # What fits into the ring beside the windows of the slots that are still open.
            limit = self._closed + grid.span + grid.lateness_slots
            end = index + int(np.searchsorted(newest[index:], limit, side="right"))
            if end > index:
                on_time = np.flatnonzero(timely[index:end]) + index
                self._note_offsets(slots[on_time], offsets[on_time], before[on_time])
                chosen = np.flatnonzero(keep[index:end]) + index
                rows = self._place(batch, start, chosen, slots[chosen])
                self.watermark_ms = int(watermarks[end - 1])
                yield from self._close_runs(np.unique(rows))
                yield from self._close(grid.closed_before(self.watermark_ms))
                index = end
            else:
                # One reading jumps ahead of the ring; all behind it is closed before it is placed.
                yield from self._close(grid.closed_before(int(watermarks[index])))

    def _skip_to(self, slot: int) -> None:
        self._closed = max(slot, self._closed)
        self._slot_offsets = {s: p for s, p in self._slot_offsets.items() if s >= slot}

    def _note_offsets(
        self, slots: NDArray[np.int64], offsets: NDArray[np.int64], before: NDArray[np.int64]
    ) -> None:
        """Remember where each slot's first reading is, and the watermark `before` it.

        Every reading that moves the watermark counts, even one that says nothing else: a replay
        that began later than the watermark's way through the slots would not close them again.
        """
        for i in np.unique(slots, return_index=True)[1].tolist():
            point = ReplayPoint(int(offsets[i]), int(before[i]))
            self._slot_offsets.setdefault(int(slots[i]), point)

    def _place(self, batch: ReadingBatch, start: int, chosen: Rows, at: NDArray[np.int64]) -> Rows:
        """Write readings into their slots; return their rows."""
        names = self.names
        rows = np.empty(len(chosen), np.intp)
        for i, j in enumerate(chosen.tolist()):
            name = batch.entities[start + j]
            row = names.get(name)
            rows[i] = self._add(name, int(at[i])) if row is None else row
        # A newcomer's readings may arrive out of order while its first slots are open.
        earlier = at < self._first[rows]
        for row, slot in zip(rows[earlier].tolist(), at[earlier].tolist(), strict=True):
            if slot < self._first[row] and self._closed <= slot:
                shift = int(self._first[row]) - slot
                self._first[row] -= shift
                self._ready[row] -= shift
                self._dirty.add(row)
        positions = at % self.grid.ring
        values = batch.values[start + chosen]
        key = rows.astype(np.int64) * self.grid.ring + positions
        rank = _rank_within(key)
        for turn in range(int(rank.max(initial=-1)) + 1):
            now = rank == turn
            row, position = rows[now], positions[now]
            old, new = self._ring[row, position], values[now]
            given = ~np.isnan(new)
            repeated = (given & ~np.isnan(old)).any(axis=1)
            done = at[now] < self._ahead[row]
            if self._close_complete:
                done[self._complete(row, old)] = True
            if not self.priming:
                self.placement.duplicates += int(np.sum(repeated | done))
            given &= ~done[:, None]
            self._ring[row, position] = np.where(given, new, old)
            if self.grid.counters and batch.counters is not None:
                exact = batch.counters[start + chosen[now]]
                before = self._counters[row, position]
                kept = np.where(np.isnan(exact) | done[:, None], before, exact)
                self._counters[row, position] = kept
        return rows

    def _complete(self, rows: Rows, cells: Float32) -> NDArray[np.bool_]:
        """Whether all that is awaited of n rows is in an open slot's cells (n, D)."""
        return np.asarray(~(np.isnan(cells) & self._awaited[rows]).any(axis=1), bool)

    # -- closing -------------------------------------------------------------------------------

    def _close(self, until: int) -> Iterator[Closing]:
        """Close all slots before `until`, and what follows them and is complete."""
        if self._closed >= until:
            return
        lag = self.grid.lag
        while self._closed < until:
            if not self.names:
                self._skip_to(until)
                return
            first = self._closed - lag
            stop = min(until, self._closed + self.grid.span)
            rows = np.flatnonzero(self._alive)
            # An entity's end always ends a span, so that it does not depend on the batching.
            expiry = first + self.grid.ttl_slots - int(self._silent[rows].max())
            # It may be past already: the time to live was shortened between two runs.
            stop = max(min(stop, expiry + 1 + lag), self._closed + 1)
            begins = self._open(rows)
            for begin in np.unique(begins[begins < stop]).tolist():
                yield from self._close_rows(rows[begins == begin], begin, stop)
            self._closed = stop
            self._retire(rows, first)
        # Whose next slot waited, complete, for the one before it.
        yield from self._close_runs(np.flatnonzero(self._alive))

    def _close_runs(self, rows: Rows) -> Iterator[Closing]:
        """Close the complete slots with which the open ones of these rows begin."""
        grid = self.grid
        newest = self.watermark_ms // grid.period_ms
        while self._close_complete and len(rows):
            begins = self._open(rows)
            # Warm-ups, and silences that may end an entity, are the watermark's business.
            runs = begins - grid.lag >= self._ready[rows]
            runs &= self._silent[rows] + grid.lag <= grid.ttl_slots
            stops = begins.copy()
            for _ in range(grid.span):
                runs &= stops <= newest
                on = np.flatnonzero(runs)
                cells = self._ring[rows[on], stops[on] % grid.ring]
                runs[on] = self._complete(rows[on], cells)
                stops += runs
                if not runs.any():
                    break
            bounds = np.stack([begins, stops], 1)[stops > begins]
            rows = rows[stops > begins]
            for begin, stop in np.unique(bounds, axis=0).tolist():
                yield from self._close_rows(rows[(bounds == (begin, stop)).all(1)], begin, stop)

    def _close_rows(self, rows: Rows, begin: int, stop: int) -> Iterator[Closing]:
        """Close the slots of rows whose oldest open one is `begin`."""
        lag = self.grid.lag
        self._take_rates(rows, begin, stop)
        self._ahead[rows] = stop
        born = rows[self._first[rows] < stop - lag]
        if len(born):
            yield self._close_span(born, begin - lag, stop - lag)

    def _take_rates(self, rows: Rows, begin: int, stop: int) -> None:
        """Turn the counters of the slots that close now into rates."""
        grid = self.grid
        if not grid.counters:
            return
        slots = np.arange(begin - grid.lookback, stop)
        rates = counter_rates(self._counters[rows[:, None], slots % grid.ring], grid.period_ms)
        at = slots[grid.lookback :] % grid.ring
        self._ring[rows[:, None, None], at[:, None], np.array(grid.counters)] = rates[
            :, grid.lookback :
        ]

    def _close_span(self, rows: Rows, start: int, stop: int) -> Closing:
        grid = self.grid
        slots = np.arange(start, stop)
        values = self._ring[rows[:, None], slots % grid.ring]
        counted = slots[None, :] > self._restored[rows][:, None]
        born = slots[None, :] >= self._first[rows][:, None]
        heard = np.asarray(~np.isnan(values).all(axis=2), bool)
        silent = _running_silence(self._silent[rows], heard, counted & born)
        present = born & (silent <= grid.ttl_slots)
        self._silent[rows] = silent[:, -1]
        self._collect_statistics(rows, values, present & counted, slots)
        warming = present & (slots[None, :] < self._ready[rows][:, None])
        begins = np.maximum(np.maximum(self._ready[rows], self._scored_from[rows]), start)
        closing = Closing(
            first_slot=start,
            rows=rows,
            present=present,
            warming=warming,
            silent=silent,
            faulty=np.where(
                (present & ~warming)[..., None],
                self._follow_channels(rows, values, counted & born),
                np.int8(0),
            ),
            values=values,
            emit=not self.priming,
            spans=tuple(self._spans(rows, begins, stop)),
        )
        # Spread over slots by row; the age matters after a restart, when rows are dealt anew.
        due = (slots[None, :] + rows[:, None]) % grid.snapshot_slots == 0
        due |= slots[None, :] - self._snapshot[rows][:, None] >= grid.snapshot_slots
        if not self.priming:
            self._dirty.update(rows[(due & present).any(axis=1)].tolist())
        return closing

    def _follow_channels(
        self, rows: Rows, values: Float32, counted: NDArray[np.bool_]
    ) -> NDArray[np.int8]:
        """Which channels are dead or stuck after each of the slots, as `Closing.faulty`."""
        known = self._model_row[rows] >= 0
        limits = too_long(
            self.profiles.longest_runs(self._model_row[rows]), self.grid.stale_after_slots
        )
        runs = Runs(self._gap[rows], self._still[rows], self._last[rows])
        faulty = np.empty(values.shape, np.int8)
        for t in range(values.shape[1]):
            # What is not counted is in the runs already.
            new = np.where(counted[:, t, None], values[:, t], np.nan)
            runs = follow(runs, new, known[:, None])
            faulty[:, t] = np.where(
                runs.gap >= limits[:, 0], 1, np.where(runs.still >= limits[:, 1], 2, 0)
            )
        self._gap[rows], self._still[rows], self._last[rows] = runs
        return faulty

    def _collect_statistics(
        self, rows: Rows, values: Float32, counted: NDArray[np.bool_], slots: NDArray[np.int64]
    ) -> None:
        for row in sorted(self._newcomers.intersection(rows.tolist())):
            entity = self.entity(row)
            if entity.sums is None:
                continue
            i = int(np.searchsorted(rows, row))
            mine = values[i][counted[i] & (slots < self._ready[row])].astype(np.float64)
            seen = ~np.isnan(mine)
            filled = np.where(seen, mine, 0.0)
            entity.sums += np.stack([seen.sum(0), filled.sum(0), (filled**2).sum(0)])
            if slots[-1] >= self._ready[row] - 1:
                self._mean[row], self._scale[row] = self.profiles.fit_statistics(*entity.sums)
                entity.sums = None
                self._newcomers.discard(row)
                self._dirty.add(row)

    def _spans(self, rows: Rows, begins: NDArray[np.int64], stop: int) -> Iterator[Span]:
        """Slots from `begins` (n,) on, of each row up to the end of its block or `stop`."""
        grid = self.grid
        # Entities that get ready inside this span start later; mostly there is one group.
        for begin in np.unique(begins[begins < stop]).tolist():
            group = rows[begins == begin]
            ends = np.full(len(group), stop - 1)
            states: list[Float32 | None] = [None] * len(group)
            for i, row in enumerate(group.tolist() if grid.block else ()):
                pupil = self.entity(row).pupil
                if pupil is not None:
                    ends[i], states[i] = pupil.block_end(begin, stop), pupil.state
            lengths = (ends + 1 - begin).astype(np.int32)
            slots = np.arange(begin - grid.window + 1, begin + int(lengths.max()) + grid.lag)
            yield Span(
                rows=group,
                first_slot=begin,
                lengths=lengths,
                values=self._ring[group[:, None], slots % grid.ring],
                slots=np.broadcast_to(slots, (len(group), len(slots))),
                mean=self._mean[group],
                scale=self._scale[group],
                model_rows=self._model_row[group],
                history=self._history[group],
                states=tuple(states),
            )

    def keep_streams(self, span: Span, streams: Float32) -> None:
        """Remember the streams (G, T, S) of a span, as history and to learn from."""
        grid = self.grid
        joined = np.concatenate([span.history, streams], axis=1)
        kept = span.lengths[:, None] + np.arange(grid.history)
        self._history[span.rows] = np.take_along_axis(joined, kept[..., None], axis=1)
        learner = self.profiles.adaptation
        if learner is None:
            return
        at = (span.first_slot + grid.lag + np.arange(streams.shape[1])) % grid.ring
        # Past a row's own length streams are NaN, which teaches nothing; the rest will say more.
        found = learner.weights(streams, span.model_rows, span.states)
        self._weights[span.rows[:, None], at] = found
        for row, length in zip(span.rows.tolist(), span.lengths.tolist(), strict=True):
            self._learn(row, span.first_slot + length - 1)

    def _learn(self, row: int, slot: int) -> None:
        """Let an entity learn from what is known once `slot` is scored, if its block ends so."""
        grid, pupil = self.grid, self.entity(row).pupil
        if pupil is None or not pupil.ends_block(slot):
            return
        newest = slot + grid.lag
        slots = np.arange(newest - grid.block - grid.context + 1, newest + 1)
        at = slots % grid.ring
        weights = self._weights[row, at]
        weights[: grid.context] = 0.0
        state = pupil.learner.learn(
            int(self._model_row[row]),
            pupil.state,
            self._ring[row, at],
            slots,
            weights,
            self._mean[row],
            self._scale[row],
        )
        pupil.states.append(Learned(slot, state))
        # Snapshots may be far apart; what none of them will ask for any more is let go here.
        pupil.settled(slot - grid.settling_slots)

    def rest(self, closing: Closing) -> tuple[Span, ...]:
        """What is left of a closing once its spans are scored: slots after the end of a block."""
        if not self.grid.block:
            return ()
        begins = {
            row: span.first_slot + length
            for span in closing.spans
            for row, length in zip(span.rows.tolist(), span.lengths.tolist(), strict=True)
        }
        stop = closing.first_slot + closing.present.shape[1]
        late = {row: begin for row, begin in begins.items() if begin < stop}
        return tuple(self._spans(np.array([*late], np.intp), np.array([*late.values()]), stop))

    def _retire(self, rows: Rows, first: int) -> None:
        """Free the slots that no window needs any more, and entities past their time to live.

        Slots from `first` on have just been scored.
        """
        grid = self.grid
        next_slot = self._closed - grid.lag
        old = np.arange(first - grid.reach, next_slot - grid.reach) % grid.ring
        self._ring[:, old] = np.nan
        self._counters[:, old] = np.nan
        if grid.block:
            self._weights[:, old] = 0.0
        for row in rows[self._silent[rows] > grid.ttl_slots].tolist():
            name, ring = self.entity(row).name, self._ring[row].copy()
            counters = self._counters[row].copy()
            self._remove(row)
            still_open = np.arange(next_slot, next_slot + grid.ring - grid.reach)
            heard = still_open[~np.isnan(ring[still_open % grid.ring]).all(axis=1)]
            if len(heard):  # it is back already, as somebody new
                again = self._add(name, int(heard[0]))
                self._ring[again, heard % grid.ring] = ring[heard % grid.ring]
                self._counters[again, heard % grid.ring] = counters[heard % grid.ring]


def _rank_within(key: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many equal keys come before each: `[7, 3, 7] -> [0, 0, 1]`."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    starts = np.r_[True, ordered[1:] != ordered[:-1]]
    first = np.maximum.accumulate(np.where(starts, np.arange(len(key)), 0))
    rank = np.empty(len(key), np.int64)
    rank[order] = np.arange(len(key)) - first
    return rank


def _running_silence(
    before: NDArray[np.int64], heard: NDArray[np.bool_], counted: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Consecutive silent slots (n, T) after each slot, continuing `before` (n,)."""
    silent = np.empty(heard.shape, np.int64)
    run = before.copy()
    for t in range(heard.shape[1]):
        run = np.where(counted[:, t], np.where(heard[:, t], 0, run + 1), run)
        silent[:, t] = run
    return silent
