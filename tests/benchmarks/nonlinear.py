"""A labelled fleet of plants (see `plants.py`), each fault of which breaks a non-linear relation.

    python -m tests.benchmarks.nonlinear OUT [--seed N] [--entities N]

writes `OUT/nonlinear/<entity>/{train,test}.parquet` and `interpretation.json`. A faulty channel
stays within the range of its training part, so that neither a limit nor a linear model sees much.

Axes: T slots, D channels.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tests.benchmarks.plants import (
    CHANNELS,
    HOT,
    OPEN,
    PERIOD_MS,
    POWERED,
    Course,
    Floats,
    Plant,
    current_a,
    flow_through,
    run_plant,
    tank_course,
    vibration_mm_s,
)

SET = "nonlinear"
ENTITIES = 8
TRAIN_SLOTS = 6_000  # four days: what a daily pattern needs
TEST_SLOTS = 6_000
START_MS = 1_767_571_200_000  # a Monday

FaultKind = Literal[
    "leak",
    "blocked",
    "latency_apart",
    "temperature_unmoved",
    "switch_ignored",
    "wave_shape",
    "phase_slip",
    "frozen_variation",
]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)

LONGEST = 60
SHORTEST: dict[FaultKind, int] = {
    "leak": 10,
    "blocked": 10,
    "latency_apart": 15,
    "temperature_unmoved": 15,  # a temperature needs time to go where it should not
    "switch_ignored": 10,
    "wave_shape": 25,  # about one cycle, for less has no shape
    "phase_slip": 25,
    "frozen_variation": 20,
}
"""Durations in slots; those that depend on a regime end with it."""
GAP = 60  # sound slots before each fault and after it: by then a tank has all but forgotten it
PLACE = {name: place for place, name in enumerate(CHANNELS)}
_SLIP_RAMP = 3  # slots in which a phase goes off, and comes back


class Fault(NamedTuple):
    """Rows `start` to before `end` of the test part in which `channel` breaks a relation."""

    kind: FaultKind
    channel: str
    start: int
    end: int


class Simulated(NamedTuple):
    """An entity: `train` and `test` (T, D), and the faults in the latter in order of time."""

    plant: Plant
    train: NDArray[np.float32]
    test: NDArray[np.float32]
    faults: tuple[Fault, ...]

    @property
    def labels(self) -> NDArray[np.int8]:
        """1 (T,) in rows of the test part that are in a fault."""
        labels = np.zeros(len(self.test), np.int8)
        for fault in self.faults:
            labels[fault.start : fault.end] = 1
        return labels


# -- faults -------------------------------------------------------------------------------------

# Each returns the channel it is in and that channel's values from slot `begin` on: of the fault's
# slots, and of later ones where what went wrong takes time to be over.
_Break = Callable[[np.random.Generator, Course, int, int], tuple[str, Floats]]


def _leak(rng: np.random.Generator, course: Course, begin: int, end: int) -> tuple[str, Floats]:
    """Let flow through the closed valve what one that is open by a part would let through."""
    opening, pressure = rng.uniform(0.25, 0.5), course.channels["pressure"][begin:end]
    flow = flow_through(course.plant, opening, pressure)
    return "flow", flow * np.exp(0.04 * rng.standard_normal(end - begin))


def _blocked(rng: np.random.Generator, course: Course, begin: int, end: int) -> tuple[str, Floats]:
    """Let nothing through the open valve."""
    closed = ~OPEN[course.regime[:TRAIN_SLOTS]]
    return "flow", rng.choice(course.channels["flow"][:TRAIN_SLOTS][closed], end - begin)


def _latency_apart(
    rng: np.random.Generator, course: Course, begin: int, end: int
) -> tuple[str, Floats]:
    """Take the latency of another time: of many the one that differs most."""
    latency, length = course.channels["latency"], end - begin
    starts = rng.integers(0, TRAIN_SLOTS - length + 1, 64)
    others = latency[starts[:, None] + np.arange(length)]
    away = np.abs(np.log(others / latency[begin:end])).mean(axis=1)
    return "latency", others[int(np.argmax(away))]


def _temperature_unmoved(
    rng: np.random.Generator, course: Course, begin: int, end: int
) -> tuple[str, Floats]:
    """Go on as if the regime had not switched; after it, follow the regime from there."""
    hot = HOT[course.regime[begin:]].copy()
    hot[: end - begin] = HOT[course.regime[begin - 1]]
    noise = course.channels["temperature"] - course.tank
    tank = tank_course(course.plant, hot, float(course.tank[begin - 1]))
    return "temperature", tank + noise[begin:]


def _switch_ignored(
    rng: np.random.Generator, course: Course, begin: int, end: int
) -> tuple[str, Floats]:
    """Show the valve, or the power, as it was before the switch."""
    before, after = course.regime[begin - 1], course.regime[begin]
    switched = [
        name for name, on in (("valve", OPEN), ("power", POWERED)) if on[before] != on[after]
    ]
    channel = str(rng.choice(switched))
    return channel, rng.choice(course.channels[channel][begin - 10 : begin], end - begin)


def _waved(course: Course, channel: str, begin: int, end: int, phase: Floats) -> tuple[str, Floats]:
    """Put another phase (T,) into a wave, at the same height and with the same noise."""
    plant, values = course.plant, course.channels[channel][begin:end]
    sound = course.phase[begin:end]
    if channel == "current":
        return channel, values + current_a(plant, phase) - current_a(plant, sound)
    return channel, values * vibration_mm_s(plant, phase) / vibration_mm_s(plant, sound)


def _wave_shape(
    rng: np.random.Generator, course: Course, begin: int, end: int
) -> tuple[str, Floats]:
    """Run a cycle, or each half of it, backwards: the same heights, nearly the same spectrum."""
    phase = course.phase[begin:end] % 1
    halves = np.where(phase < 0.5, 0.5 - phase, 1.5 - phase)
    phase = halves if rng.random() < 0.5 else 1 - phase
    return _waved(course, str(rng.choice(["current", "vibration"])), begin, end, phase)


def _phase_slip(
    rng: np.random.Generator, course: Course, begin: int, end: int
) -> tuple[str, Floats]:
    """Let one wave go ahead of the other by a part of a cycle."""
    slots = np.arange(end - begin)
    off = np.minimum(1, np.minimum(slots + 1, slots[::-1] + 1) / _SLIP_RAMP)
    phase = course.phase[begin:end] + rng.uniform(0.3, 0.5) * off
    return _waved(course, str(rng.choice(["current", "vibration"])), begin, end, phase)


def _frozen_variation(
    rng: np.random.Generator, course: Course, begin: int, end: int
) -> tuple[str, Floats]:
    """Keep the level, half an hour's mean, and lose nearly all of what varies about it."""
    channel = str(rng.choice(["pressure", "hit_ratio"]))
    values, reach = course.channels[channel], 15
    around = np.clip(np.arange(begin, end)[:, None] + np.arange(-reach, reach + 1), 0, None)
    level = values[np.minimum(around, len(values) - 1)].mean(axis=1)
    return channel, level + 0.05 * (values[begin:end] - level)


_BREAKS: dict[FaultKind, _Break] = {
    "leak": _leak,
    "blocked": _blocked,
    "latency_apart": _latency_apart,
    "temperature_unmoved": _temperature_unmoved,
    "switch_ignored": _switch_ignored,
    "wave_shape": _wave_shape,
    "phase_slip": _phase_slip,
    "frozen_variation": _frozen_variation,
}


def _candidates(
    rng: np.random.Generator, kind: FaultKind, course: Course
) -> Iterator[tuple[int, int]]:
    """Yield spans of slots in which a fault of this kind can be, in random order."""
    shortest = SHORTEST[kind]
    for place in rng.permutation(len(course.stays)):
        stay = course.stays[int(place)]
        duration = int(rng.integers(shortest, LONGEST + 1))
        begin = stay.begin
        if kind in ("leak", "blocked"):
            possible = OPEN[stay.regime] == (kind == "blocked")
            begin += int(rng.integers(0, max(stay.end - begin - shortest, 1)))
        elif kind == "temperature_unmoved":
            possible = HOT[stay.before] != HOT[stay.regime]
        else:
            possible = True
        if kind in ("leak", "blocked", "temperature_unmoved", "switch_ignored"):
            duration = min(duration, stay.end - begin)
        if possible and duration >= shortest:
            yield begin, begin + duration


def _place(
    rng: np.random.Generator, kind: FaultKind, course: Course, taken: Sequence[Fault]
) -> tuple[int, int]:
    """Choose a span in the test part, in rows of it, with a gap to those that are taken."""
    for begin, end in _candidates(rng, kind, course):
        start, stop = begin - TRAIN_SLOTS, end - TRAIN_SLOTS
        clear = all(stop + GAP <= other.start or other.end + GAP <= start for other in taken)
        if clear and start >= GAP and stop <= TEST_SLOTS:
            return start, stop
    raise ValueError(
        f"expected room for a fault {kind!r} beside {len(taken)} others in {TEST_SLOTS} slots, "
        "found none; take another seed"
    )


def simulate(seed: int, number: int) -> Simulated:
    """Simulate entity `number` of a fleet, with one fault of each kind in its test part.

    Raises:
        ValueError: a regime that a fault needs does not come often enough.

    """
    rng = np.random.default_rng([seed, number])
    course = run_plant(rng, TRAIN_SLOTS + TEST_SLOTS)
    values = np.stack(list(course.channels.values()), axis=-1)
    lowest, highest = np.quantile(values[:TRAIN_SLOTS], [0.001, 0.999], axis=0)
    faults: list[Fault] = []
    for kind in rng.permutation(np.array(FAULT_KINDS)).tolist():
        start, stop = _place(rng, kind, course, faults)
        begin, end = TRAIN_SLOTS + start, TRAIN_SLOTS + stop
        channel, broken = _BREAKS[kind](rng, course, begin, end)
        place = PLACE[channel]
        values[begin : begin + len(broken), place] = broken
        # Not one value that the training part would call extreme.
        values[begin:end, place] = np.clip(broken[: end - begin], lowest[place], highest[place])
        faults.append(Fault(kind, channel, start, stop))
    readings = values.astype(np.float32)
    return Simulated(
        course.plant,
        readings[:TRAIN_SLOTS],
        readings[TRAIN_SLOTS:],
        tuple(sorted(faults, key=lambda fault: fault.start)),
    )


# -- files --------------------------------------------------------------------------------------


def write(out: Path, seed: int = 0, entities: int = ENTITIES) -> tuple[Simulated, ...]:
    """Simulate a fleet and write it to `out`/nonlinear.

    Raises:
        FileExistsError: the folder is there already.
        ValueError: a plant has no room for a fault.

    """
    folder = out / SET
    if folder.exists():
        raise FileExistsError(
            f"expected a folder that is to be made, got {folder}, which exists and whose entities "
            "would mix with the new ones; remove it or give another OUT"
        )
    fleet = tuple(simulate(seed, number) for number in range(entities))
    for number, entity in enumerate(fleet):
        _write_entity(folder / f"plant-{number + 1}", entity)
    return fleet


def _write_entity(folder: Path, entity: Simulated) -> None:
    folder.mkdir(parents=True)
    times_ms = START_MS + PERIOD_MS * np.arange(TRAIN_SLOTS + TEST_SLOTS, dtype=np.int64)
    train = dict(zip(CHANNELS, entity.train.T, strict=True))
    test = dict(zip(CHANNELS, entity.test.T, strict=True))
    for part, columns in (
        ("train", {"timestamp": times_ms[:TRAIN_SLOTS], **train}),
        ("test", {"timestamp": times_ms[TRAIN_SLOTS:], **test, "label": entity.labels}),
    ):
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")
    segments = [
        {
            "start": fault.start,
            "end": fault.end,
            "channels": [fault.channel],
            "type": fault.kind,
        }
        for fault in entity.faults
    ]
    text = json.dumps({"segments": segments}, indent=1)
    (folder / "interpretation.json").write_text(text + "\n", "utf-8")


def _whole(minimum: int) -> Callable[[str], int]:
    """Read a whole number that is not below `minimum`, or say that it is none."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {minimum}, got {text!r}"
            )
        return int(text)

    return read


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a fleet as the command line says."""
    parser = argparse.ArgumentParser(description="Write a labelled fleet with non-linear faults.")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write the set into")
    parser.add_argument("--seed", type=_whole(0), default=0, help="another one gives another fleet")
    parser.add_argument("--entities", type=_whole(1), default=ENTITIES, help="how many plants")
    options = parser.parse_args(arguments)
    try:
        fleet = write(options.out, options.seed, options.entities)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    faults = sum(len(entity.faults) for entity in fleet)
    share = np.mean([entity.labels for entity in fleet])
    print(f"{options.out / SET}: {len(fleet)} entities, {faults} faults, {share:.1%} of test rows")


if __name__ == "__main__":
    main()
