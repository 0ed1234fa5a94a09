"""Plants whose channels hang together non-linearly, without faults.

A plant is a tank and the server that runs it. Its valve and pump go through hidden regimes, and the
tank is hot in just those two in which only one of them is on: an exclusive or, of which a
covariance says nothing. The server queues near saturation; a compressor goes round. Times are in
slots of a minute.

Axes: T slots, K knots.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PERIOD_MS = 60_000

CHANNELS: dict[str, str] = {
    "requests": "1/s",
    "workers": "",
    "queue": "",
    "latency": "ms",
    "hit_ratio": "",
    "pressure": "bar",
    "valve": "%",
    "flow": "m³/h",
    "power": "kW",
    "temperature": "°C",
    "current": "A",
    "vibration": "mm/s",
}
"""Name and unit of every channel."""

# Regimes and what is on in them. The tank is hot where exactly one is: heated and closed in, or
# filled with hot water that comes by its own weight.
IDLE, HEAT, RUN, DRAIN = range(4)
OPEN = np.array([False, False, True, True])
POWERED = np.array([False, True, True, False])
HOT = OPEN != POWERED
OPENING = (0.25, 0.95)  # shares; where the valve is open, each stay has its own
_SHORTEST_STAY = 15
_MEAN_STAY = 55

_DECISION = 15  # slots between two decisions about the number of workers
_SATURATION = 0.96  # above it the server turns requests away

# One cycle as phases and heights: of a compressor's current, and of its vibration.
_CURRENT = ((0.0, 0.1, 0.3, 0.45, 0.55, 0.7, 0.77, 0.88), (0, 0.9, 0.6, 1, 0.35, 0.3, 0.6, 0.05))
_VIBRATION = ((0.02, 0.14, 0.24, 0.5, 0.62, 0.72, 0.9), (0.2, 1, 0.3, 0.1, 0.65, 0.1, 0))


class Plant(NamedTuple):
    """What differs from plant to plant and does not change. `keep_` are shares kept each slot."""

    requests: float
    rhythm: float  # amplitude of the day, of the logarithm
    peak: float  # when the day is busiest, in rad
    service: float  # requests/s that a worker can serve
    network_ms: float
    hit_ratio: float
    pressure: float
    conductance: float  # m³/h through the open valve at 1 bar
    idle_kw: float
    heater_kw: float
    pump_kw: float  # for each bar and m³/h
    cold: float
    hot: float
    keep_heating: float
    keep_cooling: float
    cycle_slots: float
    current: tuple[Floats, Floats]  # phases and heights (K,), 0 to 1
    vibration: tuple[Floats, Floats]


class Stay(NamedTuple):
    """Slots `begin` to before `end` in one regime, and the regime `before` it."""

    begin: int
    end: int
    before: int
    regime: int


class Course(NamedTuple):
    """A plant without faults: its channels (T,) as measured, and what lies behind them."""

    plant: Plant
    stays: tuple[Stay, ...]
    regime: Ints
    phase: Floats
    tank: Floats
    channels: dict[str, Floats]


# -- relations ----------------------------------------------------------------------------------


def queue_length(load: ArrayLike) -> Floats:
    """Mean requests in an M/M/1 system: load / (1 - load), for a load below 1."""
    busy = np.asarray(load, np.float64)
    return np.asarray(busy / (1 - busy))


def latency_ms(plant: Plant, queue: Floats, requests: Floats) -> Floats:
    """Time in the system by Little's law, queue / requests, and the way there."""
    return plant.network_ms + 1000 * queue / requests


def flow_through(plant: Plant, opening: ArrayLike, pressure: Floats) -> Floats:
    """Turbulent flow: with the root of the pressure, and none where the valve is closed."""
    return plant.conductance * np.asarray(opening, np.float64) * np.sqrt(pressure)


def relax(start: float, target: Floats, keep: Floats) -> Floats:
    """Go from `start` to the target (T,) exponentially: y_t = keep_t y_(t-1) + (1-keep_t) x_t."""
    y = np.empty_like(target)
    last = start
    for slot, (x, kept) in enumerate(zip(target.tolist(), keep.tolist(), strict=True)):
        last = kept * last + (1 - kept) * x
        y[slot] = last
    return y


def tank_course(plant: Plant, hot: ArrayLike, start: float) -> Floats:
    """Temperature (T,) of a tank in °C, where it is heated (`hot`) or cools down."""
    target = np.where(hot, plant.hot, plant.cold)
    return relax(start, target, np.where(hot, plant.keep_heating, plant.keep_cooling))


def current_a(plant: Plant, phase: Floats) -> Floats:
    """Current of the compressor in A at a phase, which counts cycles."""
    return 5 + 20 * np.interp(phase, *plant.current, period=1.0)


def vibration_mm_s(plant: Plant, phase: Floats) -> Floats:
    """Vibration of the compressor in mm/s at the same phase."""
    return 1 + 6 * np.interp(phase, *plant.vibration, period=1.0)


# -- sound plants -------------------------------------------------------------------------------


def _wander(rng: np.random.Generator, slots: int, keep: float) -> Floats:
    """Draw AR(1) noise (T,) with mean 0, deviation 1, and `keep` from slot to slot."""
    noise = rng.standard_normal(slots) * np.sqrt((1 + keep) / (1 - keep))
    return relax(rng.standard_normal(), noise, np.full(slots, keep))


def _shape(
    rng: np.random.Generator, knots: tuple[Sequence[float], Sequence[float]]
) -> tuple[Floats, Floats]:
    """Vary a cycle's phases and heights (K,) a little; they stay in order, and within 0 to 1."""
    phases, heights = np.asarray(knots[0], np.float64), np.asarray(knots[1], np.float64)
    phases = phases + rng.uniform(-0.02, 0.02, phases.shape)
    return phases, np.clip(heights + rng.uniform(-0.08, 0.08, heights.shape), 0, 1)


def draw_plant(rng: np.random.Generator) -> Plant:
    """Draw what makes a plant differ from the others."""
    pressure, conductance = rng.uniform(2, 5), rng.uniform(8, 20)
    heater_kw = rng.uniform(20, 60)
    # With the valve at 0.6, pump and idling draw what the heater draws: power tells no regime.
    pump_kw = 0.85 * heater_kw / (pressure * conductance * 0.6 * np.sqrt(pressure))
    return Plant(
        requests=rng.uniform(80, 160),
        rhythm=rng.uniform(0.3, 0.5),
        peak=rng.uniform(0, 2 * np.pi),
        service=rng.uniform(20, 40),
        network_ms=rng.uniform(2, 8),
        hit_ratio=rng.uniform(0.8, 0.95),
        pressure=pressure,
        conductance=conductance,
        idle_kw=0.15 * heater_kw,
        heater_kw=0.85 * heater_kw,
        pump_kw=pump_kw,
        cold=rng.uniform(25, 35),
        hot=rng.uniform(60, 75),
        keep_heating=np.exp(-1 / rng.uniform(8, 14)),
        keep_cooling=np.exp(-1 / rng.uniform(14, 22)),
        cycle_slots=rng.uniform(20, 30),
        current=_shape(rng, _CURRENT),
        vibration=_shape(rng, _VIBRATION),
    )


def _stays(rng: np.random.Generator, slots: int) -> tuple[Stay, ...]:
    """Draw a hidden Markov chain of regimes, none of them shorter than a fault."""
    stays: list[Stay] = []
    begin, before, regime = 0, IDLE, RUN
    while begin < slots:
        end = begin + _SHORTEST_STAY + int(rng.geometric(1 / (_MEAN_STAY - _SHORTEST_STAY)))
        stays.append(Stay(begin, min(end, slots), before, regime))
        begin, before = end, regime
        regime = (regime + int(rng.integers(1, len(OPEN)))) % len(OPEN)
    return tuple(stays)


def run_plant(rng: np.random.Generator, slots: int) -> Course:
    """Run a plant without faults."""
    plant, stays = draw_plant(rng), _stays(rng, slots)
    regime = np.repeat([stay.regime for stay in stays], [stay.end - stay.begin for stay in stays])
    cycles = np.exp(0.05 * _wander(rng, slots, 0.98)) / plant.cycle_slots
    phase = rng.uniform() + np.cumsum(cycles)
    tank = tank_course(plant, HOT[regime], plant.cold)
    server = _serve(rng, plant, slots)
    channels = {
        **server,
        **_pump(rng, plant, stays, regime),
        "temperature": tank + 0.3 * rng.standard_normal(slots),
        "current": current_a(plant, phase) + 0.4 * rng.standard_normal(slots),
        "vibration": vibration_mm_s(plant, phase)
        * np.exp(0.08 * _wander(rng, slots, 0.99) + 0.03 * rng.standard_normal(slots)),
    }
    return Course(plant, stays, regime, phase, tank, {name: channels[name] for name in CHANNELS})


def _serve(rng: np.random.Generator, plant: Plant, slots: int) -> dict[str, Floats]:
    """Channels (T,) of the server: more requests than before wait for the next decision."""
    day = 2 * np.pi * np.arange(slots) * PERIOD_MS / 86_400_000 - plant.peak
    rhythm = np.exp(plant.rhythm * (np.cos(day) + 0.3 * np.cos(2 * day)))
    calm = np.exp(0.1 * _wander(rng, slots, 0.97) + 0.03 * rng.standard_normal(slots))
    requests = plant.requests * rhythm * calm
    level = relax(float(requests[0]), requests, np.full(slots, 0.8))
    decided = level[np.arange(slots) // _DECISION * _DECISION]
    workers = np.ceil(decided / (0.8 * plant.service))
    load = np.minimum(requests / (workers * plant.service), _SATURATION)
    queue = queue_length(load) * np.exp(0.04 * rng.standard_normal(slots))
    asked = rng.poisson(5 * requests)  # of five seconds: the ratio of two counters
    # The cache thrashes near saturation.
    hits = rng.binomial(asked, plant.hit_ratio * (1 - 0.4 * load**6))
    return {
        "requests": requests,
        "workers": workers,
        "queue": queue,
        "latency": latency_ms(plant, queue, requests) * np.exp(0.03 * rng.standard_normal(slots)),
        "hit_ratio": hits / np.maximum(asked, 1),
    }


def _pump(
    rng: np.random.Generator, plant: Plant, stays: Sequence[Stay], regime: Ints
) -> dict[str, Floats]:
    """Channels (T,) of the valve and the pump, each measured with an error of its own."""
    slots = len(regime)

    def error(size: float) -> Floats:
        return np.exp(size * rng.standard_normal(slots))

    lengths = [stay.end - stay.begin for stay in stays]
    opening = OPEN[regime] * np.repeat(rng.uniform(*OPENING, len(stays)), lengths)
    pressure = plant.pressure * np.exp(0.2 * _wander(rng, slots, 0.98)) * error(0.03)
    flow = flow_through(plant, opening, pressure)
    drawn = np.select(
        [regime == RUN, regime == HEAT], [plant.pump_kw * pressure * flow, plant.heater_kw], 0
    )
    leaked = 0.005 * plant.conductance * np.abs(rng.standard_normal(slots))
    return {
        "pressure": pressure * error(0.01),
        "valve": np.abs(100 * opening + 0.5 * rng.standard_normal(slots)),
        "flow": flow * error(0.04) + leaked,
        "power": (plant.idle_kw + drawn) * error(0.04),
    }
