"""The last hours of every entity, kept in memory for the page; a restart fills some of it again.

    closings ──take──> cells: observed, expected, lower, upper of each channel, for as many entities
                              as a fixed number of bytes holds: those looked at, alerting or worst
    commits ──observe──> scores and states of up to `max_entities` entities, alerts of late

Rings by slot number: slot s is at s % ring. What was not committed yet may be in the cells, but is
not shown: an entity is shown up to its last committed slot.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.decide import AlertPolicy
from stream.records import STATES, UNSETTLED, AlertEvent, SlotScore
from stream.scoring import Detail

Float32 = NDArray[np.float32]
Rows = NDArray[np.intp]

HOURS_SHOWN: Final = 6
# Enough to see something where slots are minutes, and not too much to draw where they are seconds.
LEAST_SLOTS, MOST_SLOTS = 240, 720
CELL_BYTES: Final = 32 * 2**20
_EVENTS_KEPT = 500
# Slots that may be written and not be committed yet, without touching those that are shown.
_MARGIN = 64
_NEVER = -(2**62)
_STEADY_SLOTS = 10
"""Entities are ranked by the worst of so many slots, so that the list does not dance."""
_LOOKED_AT_S = 600.0
_UPKEEP_S = 1.0
UNKNOWN: Final = -1
"""Code of a slot's state that nobody told; else its place in `STATES`."""
# How bad a state is by itself, in the order of STATES; a faulty channel is a bit less than pending.
_RANK = np.array(
    [{"firing": 5, "recovering": 4, "pending": 3, "stale": 1}.get(s, 0) for s in STATES]
)
_FAULTY_RANK = 2
_CODES: Final = {state: code for code, state in enumerate(STATES)}


@dataclass(frozen=True)
class Layout:
    """What is the same for all entities."""

    channels: tuple[str, ...]
    units: tuple[str, ...]
    period_ms: int
    settle_slots: int = 0
    """Slots that a rebuilt entity needs until its scores are what they were."""

    @property
    def slots(self) -> int:
        """How many slots are shown."""
        wanted = HOURS_SHOWN * 3_600_000 // self.period_ms
        return int(min(max(wanted, LEAST_SLOTS), MOST_SLOTS))


class Past(NamedTuple):
    """The last T slots of an entity, as numbers; NaN and `UNKNOWN` where nothing was told."""

    record: SlotScore
    slots: NDArray[np.int64]
    scores: Float32
    states: NDArray[np.int8]
    events: Sequence[AlertEvent] = ()
    cells: Float32 | None = None
    """Observed, expected, lower and upper (T, 4, D); `None` where it has no cells."""


class Listed(NamedTuple):
    """Of so many kept, so many match, and these are the worst; and all alerts of late."""

    kept: int
    matching: int
    pasts: list[Past]
    events: list[AlertEvent]


class Recent:
    """What the page shows of entities; the loop tells it, HTTP threads ask."""

    def __init__(
        self,
        layout: Layout,
        policy: AlertPolicy,
        *,
        max_entities: int,
        ttl_s: float,
        slots_per_alarm: float = 1.0,
        cell_bytes: int = CELL_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout = layout
        self.policy = policy
        self.slots_per_alarm = slots_per_alarm
        self._max_entities = max_entities
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._ring = layout.slots + _MARGIN
        self._names: dict[str, int] = {}
        self._free: list[int] = []
        self._records: list[SlotScore | None] = []
        self._events: deque[AlertEvent] = deque(maxlen=_EVENTS_KEPT)
        self._upkeep_at = clock()
        depth = len(layout.channels)
        held = max(1, cell_bytes // (16 * self._ring * max(1, depth)))
        # Not touched before it is used, so an idle page costs no memory.
        self._cells: Float32 = np.empty((held, self._ring, 4, depth), np.float32)
        self._written = np.full(held, _NEVER)
        self._spare = list(range(held - 1, -1, -1))
        self._grow(64)

    def _grow(self, capacity: int) -> None:
        start = len(self._records)

        def grown(name: str, shape: tuple[int, ...], dtype: type, fill: float) -> None:
            array: NDArray[Any] = np.full((capacity, *shape), fill, dtype)
            if start:
                array[:start] = getattr(self, name)
            setattr(self, name, array)

        grown("_scores", (self._ring,), np.float32, np.nan)
        grown("_states", (self._ring,), np.int8, UNKNOWN)
        grown("_first", (), np.int64, _NEVER)
        grown("_last", (), np.int64, _NEVER)
        grown("_seen", (), np.float64, -np.inf)
        grown("_looked", (), np.float64, -np.inf)
        grown("_faulty", (), np.bool_, False)
        grown("_cell", (), np.intp, -1)
        self._records.extend([None] * (capacity - start))
        self._free.extend(range(capacity - 1, start - 1, -1))

    _scores: Float32
    _states: NDArray[np.int8]
    _first: NDArray[np.int64]
    _last: NDArray[np.int64]
    _seen: NDArray[np.float64]
    _looked: NDArray[np.float64]
    _faulty: NDArray[np.bool_]
    _cell: Rows

    # -- the loop tells ------------------------------------------------------------------------

    def take(self, detail: Detail) -> None:
        """Keep what was just scored of each channel; what is rebuilt, of scores as well."""
        slots = detail.first_slot + np.arange(detail.observed.shape[1])
        with self._lock:
            rows = self._rows(detail.entities, [False] * len(detail.entities))
            known = np.flatnonzero(rows >= 0)
            told = np.ones((len(known), len(slots)), np.bool_)
            if not detail.emit:
                told = self._settled(rows[known], slots)
                fresh = told & np.isfinite(detail.anomaly_score[known])
                i, t = np.nonzero(fresh & (slots > self._last[rows[known]][:, None]))
                self._write(rows[known][i], slots[t], detail.anomaly_score[known][i, t], None)
            self._put(detail, self._cell[rows[known]], known, told, slots)

    def _settled(self, rows: Rows, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which slots of what is rebuilt are told as they were told at first."""
        first = np.where(self._first[rows] == _NEVER, slots[0], self._first[rows])
        self._first[rows] = first
        return slots >= first[:, None] + self.layout.settle_slots

    def _put(
        self,
        detail: Detail,
        cells: Rows,
        source: Rows,
        told: NDArray[np.bool_],
        slots: NDArray[np.int64],
    ) -> None:
        """Copy `source` rows of the detail to their cells; what a cell knows it keeps."""
        holding = cells >= 0
        cells, source = cells[holding], source[holding]
        if not len(cells):
            return
        self._written[cells[self._written[cells] - self._ring >= slots[-1]]] = _NEVER
        for cell in cells[self._written[cells] + 1 < slots[0]].tolist():
            gap = _between(self._written[cell] + 1, slots[0], self._ring)
            self._cells[cell, gap] = np.nan
        told = told[holding] & (slots > self._written[cells][:, None])
        told &= slots > slots[-1] - self._ring  # of a long closing the end is enough
        i, t = np.nonzero(told)
        at = slots[t] % self._ring
        for part, values in enumerate(
            (detail.observed, detail.expected, detail.lower, detail.upper)
        ):
            self._cells[cells[i], at, part] = values[source[i], t]
        self._written[cells] = np.maximum(self._written[cells], slots[-1])

    def observe(self, scores: Sequence[SlotScore], alerts: Iterable[AlertEvent] = ()) -> None:
        """Add what was committed; of one entity, the last is its present."""
        if not scores:
            return
        period_ms = self.layout.period_ms
        with self._lock:
            urgent = [_urgent(score) for score in scores]
            rows = self._rows([s.entity for s in scores], urgent)
            slots = np.array([s.timestamp_ms for s in scores]) // period_ms
            values = np.array([s.anomaly_score for s in scores], np.float32)  # None is NaN
            states = np.array([_CODES[s.state] for s in scores], np.int8)
            records = self._records
            for row, score in zip(rows.tolist(), scores, strict=True):
                if row >= 0:
                    records[row] = score
            kept = rows >= 0
            if not kept.all():
                rows, slots, values, states = rows[kept], slots[kept], values[kept], states[kept]
            self._write(rows, slots, values, states)
            self._seen[rows] = self._clock()
            self._faulty[rows] = [bool(s.faulty) for s, k in zip(scores, kept, strict=True) if k]
            self._events.extend(replace(alert, channels={}) for alert in alerts)
            if self._clock() - self._upkeep_at >= _UPKEEP_S:
                self._upkeep_at = self._clock()
                self._expire()
                self._deal_cells()

    def forget(self, entities: Iterable[str]) -> None:
        """Let go of entities that are no longer ours."""
        with self._lock:
            for name in entities:
                self._remove(name)

    def budget(self, max_entities: int) -> None:
        """Change how many entities are kept; the worst stay."""
        with self._lock:
            self._max_entities = max_entities
            for name in self._ranked()[max_entities:]:
                self._remove(name)

    # -- rows ----------------------------------------------------------------------------------

    def _rows(self, names: Sequence[str], urgent: Sequence[bool]) -> Rows:
        """Row of each entity, -1 without; who is new comes in where there is room."""
        get = self._names.get
        found = [get(name, -1) for name in names]
        if -1 not in found:
            return np.array(found, np.intp)
        calm: list[str] | None = None
        for name, needed in zip(names, urgent, strict=True):
            if name in self._names:
                continue
            if len(self._names) >= self._max_entities and needed:
                if calm is None:
                    # Best last: they are taken from the end.
                    calm = [n for n in self._ranked() if not _urgent(self._records[self._names[n]])]
                if calm:
                    self._remove(calm.pop())
            if len(self._names) < self._max_entities:
                self._add(name)
        # A row that was dealt anew in between is somebody else's by now.
        return np.array([get(name, -1) for name in names], np.intp)

    def _add(self, name: str) -> int:
        if not self._free:
            self._grow(2 * len(self._records))
        row = self._free.pop()
        self._scores[row], self._states[row] = np.nan, UNKNOWN
        self._first[row] = self._last[row] = _NEVER
        self._seen[row], self._looked[row] = self._clock(), -np.inf
        self._faulty[row], self._cell[row] = False, -1
        self._names[name] = row
        if self._spare:
            self._give_cell(row)
        return row

    def _remove(self, name: str) -> None:
        row = self._names.pop(name, None)
        if row is None:
            return
        if self._cell[row] >= 0:
            self._spare.append(int(self._cell[row]))
            self._cell[row] = -1
        self._records[row] = None
        self._free.append(row)

    def _expire(self) -> None:
        oldest = self._clock() - self._ttl_s
        for name in [n for n, row in self._names.items() if self._seen[row] < oldest]:
            self._remove(name)

    def _write(
        self,
        rows: Rows,
        slots: NDArray[np.int64],
        values: Float32,
        states: NDArray[np.int8] | None,
    ) -> None:
        """Put scores into the rings; slots that were left out in between are unknown."""
        if not len(rows):
            return
        first = np.full(len(self._records), 2**62)
        newest = np.full(len(self._records), _NEVER)
        np.minimum.at(first, rows, slots)
        np.maximum.at(newest, rows, slots)
        touched = np.unique(rows)
        last = self._last[touched]
        # A clock that went back by more than is kept begins anew, too.
        apart = (first[touched] > last + 1) | (newest[touched] <= last - self._ring)
        for row in touched[apart].tolist():
            begin = self._last[row] + 1 if first[row] > self._last[row] else _NEVER
            gap = _between(begin, first[row], self._ring)
            self._scores[row, gap], self._states[row, gap] = np.nan, UNKNOWN
            if begin == _NEVER:
                self._last[row] = _NEVER
        self._last[touched] = np.maximum(self._last[touched], newest[touched])
        shown = slots > self._last[rows] - self._ring
        at = (rows[shown], slots[shown] % self._ring)
        self._scores[at] = values[shown]
        if states is not None:
            self._states[at] = states[shown]

    # -- who has cells -------------------------------------------------------------------------

    def _give_cell(self, row: int) -> None:
        cell = self._spare.pop()
        self._cells[cell] = np.nan
        self._written[cell] = _NEVER
        self._cell[row] = cell

    def _deal_cells(self) -> None:
        """Let those keep or get cells who are looked at, alerting, or worst."""
        held = len(self._written)
        if len(self._names) <= held:
            return
        rows = np.fromiter(self._names.values(), np.intp, len(self._names))
        looked = self._clock() - self._looked[rows] < _LOOKED_AT_S
        wish = 10.0 * looked + self._badness(rows)
        # Somebody has to be clearly worse to take the place of another, whose past is then lost.
        wish += 0.25 * (self._cell[rows] >= 0)
        chosen = rows[np.argsort(-wish, kind="stable")[:held]]
        lost = np.setdiff1d(rows[self._cell[rows] >= 0], chosen)
        self._spare += self._cell[lost].tolist()
        self._cell[lost] = -1
        for row in chosen[self._cell[chosen] < 0].tolist():
            self._give_cell(row)

    def _badness(self, rows: Rows) -> NDArray[np.float64]:
        """State first, then the score of late; what is far above the threshold is all the same."""
        peak = self._peak(rows)
        return self._state_rank(rows) + np.minimum(peak, 10.0) / 10.01

    def _state_rank(self, rows: Rows) -> NDArray[np.float64]:
        codes = self._states[rows, self._last[rows] % self._ring]
        rank = np.where(codes == UNKNOWN, 0, _RANK[codes])
        worst: NDArray[np.float64] = np.maximum(rank, _FAULTY_RANK * self._faulty[rows]) * 1.0
        return worst

    def _peak(self, rows: Rows) -> NDArray[np.float64]:
        late = (self._last[rows, None] - np.arange(_STEADY_SLOTS)) % self._ring
        peak: NDArray[np.float64] = np.nan_to_num(self._scores[rows[:, None], late]).max(1) * 1.0
        return peak

    def _ranked(self, match: str = "") -> list[str]:
        """Names of those that have a score, the worst first."""
        wanted = match.casefold()
        names = [
            name
            for name, row in self._names.items()
            if self._records[row] is not None and wanted in name.casefold()
        ]
        rows = np.array([self._names[name] for name in names], np.intp)
        order = np.lexsort((-self._peak(rows), -self._state_rank(rows)))
        return [names[i] for i in order.tolist()]

    # -- the page asks -------------------------------------------------------------------------

    def worst(self, match: str, most: int) -> Listed:
        """The worst entities whose name holds `match`, without their channels."""
        with self._lock:
            self._expire()
            names = self._ranked(match)
            pasts = [past for name in names[:most] if (past := self._past(name))]
            return Listed(len(self._names), len(names), pasts, list(self._events))

    def past(self, name: str) -> Past | None:
        """All that is kept of an entity, which somebody looks at."""
        with self._lock:
            past = self._past(name)
            if past is None:
                return None
            row = self._names[name]
            self._looked[row] = self._clock()
            past = past._replace(events=[e for e in self._events if e.entity == name])
            cell = int(self._cell[row])
            if cell < 0:
                return past
            cells = self._cells[cell][past.slots % self._ring]
            cells[past.slots > self._written[cell]] = np.nan
            return past._replace(cells=cells)

    def newest_ms(self, name: str) -> int | None:
        """When the newest slot was of an entity, which somebody looks at."""
        with self._lock:
            row = self._names.get(name)
            record = None if row is None else self._records[row]
            if row is None or record is None:
                return None
            self._looked[row] = self._clock()
            return record.timestamp_ms

    def _past(self, name: str) -> Past | None:
        row = self._names.get(name)
        record = None if row is None else self._records[row]
        if row is None or record is None:
            return None
        last = int(self._last[row])
        slots = np.arange(last - self.layout.slots + 1, last + 1)
        at = slots % self._ring
        return Past(record, slots, self._scores[row, at], self._states[row, at])


def _urgent(record: SlotScore | None) -> bool:
    """Whether an entity with this last record comes before others that are calm."""
    return record is not None and (record.state in UNSETTLED or bool(record.faulty))


def _between(begin: int, end: int, ring: int) -> NDArray[np.int64]:
    """Places of the slots from `begin` to before `end`, each once."""
    return np.arange(max(begin, end - ring), end) % ring
