"""A simulated fleet of servers for `tsdiff demo`: twelve channels that belong together.

Three causes drive everything: the demand on each server, its background jobs, and the warmth of the
room they share. Faults are then written into the readings, so that what should be found is known.

Axes: E entities, T slots, D channels, N readings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tsdiff.errors import ConfigError
from tsdiff.history import EntityHistory, History

Floats = NDArray[np.float64]

CHANNELS: dict[str, str] = {
    "cpu_usage": "%",
    "load_1m": "",
    "memory_used": "%",
    "net_in": "MB/s",
    "net_out": "MB/s",
    "disk_read": "MB/s",
    "disk_write": "MB/s",
    "requests": "1/s",
    "latency_p95": "ms",
    "errors": "1/s",
    "queue_depth": "",
    "temperature": "°C",
}
"""Name and unit of every channel; none can be negative, and "%" ends at 100."""

FaultKind = Literal[
    "spike", "level_shift", "slow_drift", "stuck", "broken_correlation", "dead", "missing"
]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)

DURATION_SLOTS: dict[FaultKind, int] = {
    "spike": 3,
    "level_shift": 30,
    "slow_drift": 60,
    "stuck": 40,
    "broken_correlation": 40,
    "dead": 30,
    "missing": 30,
}

# Channels in which each fault is plausible, and visible: a stuck error counter at night is not.
_SUSPECTS: dict[FaultKind, tuple[str, ...]] = {
    "spike": ("latency_p95", "errors", "queue_depth", "net_in"),
    "level_shift": ("latency_p95", "disk_write", "temperature", "load_1m"),
    "slow_drift": ("memory_used", "temperature"),
    "stuck": ("requests", "cpu_usage", "net_out"),
    "broken_correlation": ("cpu_usage", "net_out", "requests", "temperature"),
    "dead": ("requests", "net_in", "disk_read"),
    "missing": ("temperature", "disk_write", "memory_used"),
}

_DAY_MS = 86_400_000
_CELL_SHARE = 0.7  # of what is missing: single cells; the rest are whole readings


@dataclass(frozen=True)
class Fault:
    """One fault: slots `start_slot` to before `end_slot`, and the same in event time."""

    entity: str
    kind: FaultKind
    channels: tuple[str, ...]
    start_slot: int
    end_slot: int
    start_ms: int
    end_ms: int


@dataclass(frozen=True)
class Fleet:
    """Readings of all entities: `timestamps_ms` (T,), `values` (E, T, D), NaN = missing."""

    entities: tuple[str, ...]
    channels: tuple[str, ...]
    units: tuple[str, ...]
    period_ms: int
    timestamps_ms: NDArray[np.int64]
    values: NDArray[np.float32]
    faults: tuple[Fault, ...] = ()

    def history(self, start_slot: int = 0, end_slot: int | None = None) -> History:
        """Return a span of the readings as training wants them."""
        timestamps_ms = self.timestamps_ms[start_slot:end_slot]
        entities = []
        for name, values in zip(self.entities, self.values[:, start_slot:end_slot], strict=True):
            sent = np.isfinite(values).any(axis=-1)
            entities.append(EntityHistory(name, timestamps_ms[sent], values[sent]))
        return History(self.channels, tuple(entities), ())


@dataclass(frozen=True)
class Arrivals:
    """Readings in the order in which they arrive, which is not that of their time.

    `rows` (N,) says which entity, `timestamps_ms` (N,) when it was measured, `arrival_ms` (N,),
    ascending, when it came in, and `values` (N, D) what it holds; readings without any value are
    not sent.
    """

    rows: NDArray[np.int64]
    timestamps_ms: NDArray[np.int64]
    arrival_ms: NDArray[np.int64]
    values: NDArray[np.float32]


def _leaky(x: Floats, keep: float) -> Floats:
    """Average over the past, y_t = keep * y_(t-1) + (1 - keep) * x_t, along the last axis.

    By FFT, since NumPy has no recursive filter: with the zeros behind it nothing wraps around.
    """
    slots = x.shape[-1]
    # Below 1e-12 the past does not matter; nor can more of it be had than there is.
    reach = min(slots, int(np.ceil(np.log(1e-12) / np.log(keep))))
    kernel = (1 - keep) * keep ** np.arange(reach)
    size = slots + reach
    product = np.fft.rfft(x, size) * np.fft.rfft(kernel, size)
    return np.asarray(np.fft.irfft(product, size)[..., :slots], np.float64)


def _wander(rng: np.random.Generator, shape: tuple[int, ...], slots: int, keep: float) -> Floats:
    """Draw AR(1) noise (*shape, T) with mean 0, deviation 1, and `keep` from slot to slot."""
    warm = int(np.ceil(10 / (1 - keep)))
    noise = rng.standard_normal((*shape, warm + slots))
    return _leaky(noise, keep)[..., warm:] * float(np.sqrt((1 + keep) / (1 - keep)))


def _with_past(x: Floats, keep: float) -> Floats:
    """Average as `_leaky`, as if the first value had held since ever."""
    return _leaky(x - x[..., :1], keep) + x[..., :1]


def simulate_fleet(
    entities: int = 8,
    channels: int = 12,
    *,
    period_ms: int = 60_000,
    slots: int = 10_080,
    start_ms: int = 1_767_571_200_000,
    seed: int = 0,
    missing: float = 0.01,
) -> Fleet:
    """Simulate `slots` readings of each entity, `period_ms` apart, from `start_ms` on.

    The first `channels` of `CHANNELS` are kept. `missing` is the share of cells without a value.
    The same arguments give the same fleet. The default start is a Monday, the span a week.

    Raises:
        ConfigError: an argument is out of its range.

    """
    if not (entities >= 1 and slots >= 1 and period_ms >= 1 and 1 <= channels <= len(CHANNELS)):
        raise ConfigError(
            f"expected at least one entity and slot, and 1 to {len(CHANNELS)} channels, "
            f"got {entities}, {slots} and {channels}"
        )
    if not 0 <= missing < 1:
        raise ConfigError(f"expected a share of missing cells from 0 to below 1, got {missing}")
    rng = np.random.default_rng(seed)
    timestamps_ms = start_ms + period_ms * np.arange(slots, dtype=np.int64)
    all_channels = _measure(rng, entities, timestamps_ms)
    values = np.stack([all_channels[name] for name in CHANNELS], axis=-1)[..., :channels]
    # A sensor's own error: the last per cent that nothing else explains.
    values *= 1 + 0.01 * rng.standard_normal(values.shape)
    units = tuple(CHANNELS.values())[:channels]
    readings = _bounded(values, units).astype(np.float32)
    readings[rng.random(readings.shape) < missing * _CELL_SHARE] = np.nan
    readings[rng.random(readings.shape[:2]) < missing * (1 - _CELL_SHARE)] = np.nan
    names = tuple(f"web-{number + 1}" for number in range(entities))
    return Fleet(names, tuple(CHANNELS)[:channels], units, period_ms, timestamps_ms, readings)


def _measure(
    rng: np.random.Generator, entities: int, timestamps_ms: NDArray[np.int64]
) -> dict[str, Floats]:
    """Derive every channel (E, T) from demand, background jobs and the room's warmth."""
    slots = len(timestamps_ms)

    def trait(low: float, high: float) -> Floats:
        return rng.uniform(low, high, (entities, 1))

    def wander(keep: float) -> Floats:
        return _wander(rng, (entities,), slots, keep)

    day = 2 * np.pi * (timestamps_ms % _DAY_MS) / _DAY_MS
    # The epoch began on a Thursday; 0 here is noon of Wednesday, the busiest day.
    week = 2 * np.pi * ((timestamps_ms / _DAY_MS + 0.5) % 7) / 7

    peak = trait(0.53, 0.63) * 2 * np.pi  # 12:45 to 15:00 UTC
    rhythm = np.cos(day - peak) + 0.25 * np.cos(2 * (day - peak))
    shared = _wander(rng, (1,), slots, 0.98)  # what all of them feel: a campaign, a holiday
    pressure = trait(-0.9, -0.1) + trait(0.7, 1.1) * rhythm + 0.3 * np.cos(week)
    demand = 1 / (1 + np.exp(-(pressure + 0.15 * shared + 0.2 * wander(0.95))))

    backup = np.angle(np.exp(1j * (day - trait(0.05, 0.2) * 2 * np.pi)))  # 01:00 to 05:00 UTC
    jobs = (0.5 + 1.5 * np.exp(-((backup / 0.15) ** 2))) * np.exp(0.3 * wander(0.9))
    room = 22 + 1.5 * np.cos(day - 1.2 * np.pi) + 0.5 * _wander(rng, (1,), slots, 0.99)

    requests = trait(150, 600) * demand * np.exp(0.03 * wander(0.7))
    cpu = np.clip(4 + trait(60, 80) * demand + 5 * jobs + wander(0.8), 0, 98)
    busy = np.minimum(cpu / 100, 0.95)
    queue = (0.3 + 4 * busy**2 / (1 - busy)) * np.exp(0.12 * wander(0.6))
    return {
        "cpu_usage": cpu,
        "load_1m": trait(4, 16) * 1.1 * _with_past(busy, 0.4) * np.exp(0.03 * wander(0.5)),
        "memory_used": trait(35, 55) + 18 * _with_past(demand, 0.98) + 0.8 * wander(0.995),
        "net_in": 0.008 * requests * trait(0.7, 1.4) * np.exp(0.04 * wander(0.6)) + 0.1,
        "net_out": 0.06 * requests * trait(0.7, 1.4) * np.exp(0.04 * wander(0.6)) + 0.2,
        "disk_read": 2 + 0.03 * requests + 8 * jobs * np.exp(0.1 * wander(0.5)),
        "disk_write": 1 + 0.01 * requests + 12 * jobs * np.exp(0.1 * wander(0.5)),
        "requests": requests,
        "latency_p95": trait(20, 60) * (1 + 0.12 * queue) * np.exp(0.05 * wander(0.6)),
        "errors": 0.002 * requests * np.exp(0.2 * wander(0.7)),
        "queue_depth": queue,
        "temperature": room + trait(8, 14) + 30 * _with_past(busy, 0.9) + 0.2 * wander(0.9),
    }


def _bounded(values: Floats, units: Sequence[str]) -> Floats:
    """Keep values (..., D) within what their units allow."""
    return np.clip(values, 0, [100.0 if unit == "%" else np.inf for unit in units])


def inject_faults(
    fleet: Fleet,
    *,
    seed: int = 0,
    kinds: Sequence[FaultKind] = FAULT_KINDS,
    start_slot: int = 0,
    end_slot: int | None = None,
    gap_slots: int = 60,
    durations: Mapping[FaultKind, int] | None = None,
) -> Fleet:
    """Write one fault of each of `kinds` into a copy of `fleet`; a kind may be given repeatedly.

    They fall between `start_slot` and `end_slot`, spread over time and entities, with at least
    `gap_slots` untouched slots before each in its entity. `durations` (slots) replaces those of
    `DURATION_SLOTS`. Missing readings stay missing.

    Raises:
        ConfigError: the span is too short for them.

    """
    lasts = {**DURATION_SLOTS, **(durations or {})}
    rng = np.random.default_rng(seed)
    end_slot = len(fleet.timestamps_ms) if end_slot is None else end_slot
    entities = len(fleet.entities)
    # Entities are lanes: each gets one fault per round, so faults of one never touch.
    rounds = -(-len(kinds) // entities)
    room = (end_slot - start_slot) // max(rounds, 1)
    needed = gap_slots + max((lasts[kind] for kind in kinds), default=0)
    if start_slot < 0 or end_slot > len(fleet.timestamps_ms) or room < needed:
        raise ConfigError(
            f"expected room for {len(kinds)} faults in {entities} entities within the fleet's "
            f"{len(fleet.timestamps_ms)} slots, {rounds * needed} slots at least, got slots "
            f"{start_slot} to {end_slot}"
        )
    lanes = rng.permutation(entities)
    order = rng.permutation(len(kinds))
    values = fleet.values.copy()
    faults = []
    for turn, kind in enumerate(kinds[int(i)] for i in order):
        share = (turn % entities + rng.random()) / min(entities, len(kinds))
        slack = room - gap_slots - lasts[kind]
        begin = start_slot + turn // entities * room + gap_slots + int(slack * min(share, 1.0))
        row = int(lanes[turn % entities])
        faults.append(_inject(rng, fleet, values[row], kind, row, begin, begin + lasts[kind]))
    faults.sort(key=lambda fault: fault.start_slot)
    return replace(fleet, values=values, faults=(*fleet.faults, *faults))


def _inject(
    rng: np.random.Generator,
    fleet: Fleet,
    values: NDArray[np.float32],
    kind: FaultKind,
    row: int,
    begin: int,
    end: int,
) -> Fault:
    """Write one fault into `values` (T, D) of one entity, in place."""
    suspects = [name for name in _SUSPECTS[kind] if name in fleet.channels]
    chosen = str(rng.choice(suspects or fleet.channels))
    place = fleet.channels.index(chosen)
    column = fleet.values[row, :, place].astype(np.float64)
    present = np.isfinite(column[begin:end])
    fault = _SHAPES[kind](rng, column, begin, end)
    fault = _bounded(fault[:, None], [fleet.units[place]])[:, 0]
    values[begin:end, place] = np.where(present, fault, np.nan)
    start_ms = int(fleet.timestamps_ms[0]) + begin * fleet.period_ms
    end_ms = start_ms + (end - begin) * fleet.period_ms
    return Fault(fleet.entities[row], kind, (chosen,), begin, end, start_ms, end_ms)


# Each shape returns the faulty values of slots `begin` to `end` of a channel (T,), given its
# sound ones. Sizes count in the channel's own standard deviations.
_Shape = Callable[[np.random.Generator, Floats, int, int], Floats]


def _spike(rng: np.random.Generator, column: Floats, begin: int, end: int) -> Floats:
    size = rng.uniform(8, 12) * np.nanstd(column)
    return column[begin:end] + size * np.hanning(end - begin + 2)[1:-1]


def _level_shift(rng: np.random.Generator, column: Floats, begin: int, end: int) -> Floats:
    return column[begin:end] + rng.uniform(4, 6) * np.nanstd(column)


def _slow_drift(rng: np.random.Generator, column: Floats, begin: int, end: int) -> Floats:
    return column[begin:end] + rng.uniform(5, 7) * np.nanstd(column) * np.linspace(
        0, 1, end - begin
    )


def _stuck(_: np.random.Generator, column: Floats, begin: int, end: int) -> Floats:
    before = column[: begin + 1]
    seen = before[np.isfinite(before)]
    return np.full(end - begin, seen[-1] if seen.size else 0.0)


def _broken_correlation(rng: np.random.Generator, column: Floats, begin: int, end: int) -> Floats:
    """Take the channel's own values from another time: in range, but not what the others say."""
    length = end - begin
    starts = rng.integers(0, len(column) - length + 1, 64)
    others = column[starts[:, None] + np.arange(length)]
    # Of many other times the one that differs most: at the same hour nothing would be broken.
    away = np.abs(np.nan_to_num(others - column[begin:end])).mean(axis=1)
    found: Floats = others[int(np.argmax(away))]
    return np.where(np.isfinite(found), found, np.nanmedian(found))


def _dead(_: np.random.Generator, _column: Floats, begin: int, end: int) -> Floats:
    return np.zeros(end - begin)


def _missing(_: np.random.Generator, _column: Floats, begin: int, end: int) -> Floats:
    return np.full(end - begin, np.nan)


_SHAPES: dict[FaultKind, _Shape] = {
    "spike": _spike,
    "level_shift": _level_shift,
    "slow_drift": _slow_drift,
    "stuck": _stuck,
    "broken_correlation": _broken_correlation,
    "dead": _dead,
    "missing": _missing,
}


def delivery_order(
    fleet: Fleet, *, late_share: float = 0.02, max_late_slots: int = 2, seed: int = 0
) -> Arrivals:
    """Say in which order, and when, the readings of `fleet` arrive.

    Most arrive within half a period, in a random order of the entities; a share of `late_share`
    up to `max_late_slots` periods later, and so behind younger ones of the same entity.
    """
    rng = np.random.default_rng(seed)
    rows, slots = np.nonzero(np.isfinite(fleet.values).any(axis=-1))
    timestamps_ms = fleet.timestamps_ms[slots]
    delay = 0.5 * rng.random(len(rows))
    if max_late_slots > 0:
        late = rng.random(len(rows)) < late_share
        delay = np.where(late, rng.uniform(0.5, max_late_slots, len(rows)), delay)
    arrival_ms = timestamps_ms + (delay * fleet.period_ms).astype(np.int64)
    order = np.argsort(arrival_ms, kind="stable")
    return Arrivals(
        rows[order].astype(np.int64),
        timestamps_ms[order],
        arrival_ms[order],
        fleet.values[rows[order], slots[order]],
    )
