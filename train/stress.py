"""Ways in which real telemetry is worse than a labelled set. Each is drawn from a seed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from train.labelled import LONGEST_GAP, Entity, LabelledSet
from train.metrics import segments
from tsdiff.types import DoubleArray, FloatArray
from tsdiff.windows import to_grid

CONTAMINATED: Final = "contaminated"
_SHARE = 0.05  # of training rows
_MISSING = 0.3  # of test cells
_CLIP = 10.0  # standard deviations: a donor's steady channel must not become thousands of them


def _moments(values: FloatArray) -> tuple[DoubleArray, DoubleArray]:
    """Mean and standard deviation of each channel, 0 and 0 where it is empty."""
    seen = np.isfinite(values)
    count = np.maximum(seen.sum(0), 1)
    mean = np.where(seen, values, 0.0).sum(0) / count
    return mean, np.sqrt((np.where(seen, values - mean, 0.0) ** 2).sum(0) / count)


def _events(entity: Entity) -> list[DoubleArray]:
    """Readings during each labelled segment, in training standard deviations."""
    if entity.test is None:
        return []
    mean, sd = _moments(entity.history.values)
    z = np.clip((entity.test.values - mean) / np.where(sd > 0, sd, 1.0), -_CLIP, _CLIP)
    return [z[entity.test.slots[start:end]] for start, end in segments(entity.test.labels)]


def contaminate(labelled: LabelledSet, seed: int) -> LabelledSet:
    """Replace 5 % of every entity's training rows by other entities' labelled anomalies.

    By its own where it is the only one that has any. They are carried over in units of each
    channel's training standard deviation, since entities differ in level.
    """
    events = [_events(entity) for entity in labelled.entities]
    entities = []
    for place, entity in enumerate(labelled.entities):
        others = [event for at, own in enumerate(events) if at != place for event in own]
        donors = others or events[place]
        rng = np.random.default_rng((seed, place))
        entities.append(_splice(entity, donors, labelled.period_ms, rng) if donors else entity)
    return replace(labelled, entities=tuple(entities))


def _splice(
    entity: Entity, donors: Sequence[DoubleArray], period_ms: int, rng: np.random.Generator
) -> Entity:
    values = entity.history.values.copy()
    mean, sd = _moments(values)
    spoiled = np.zeros(len(values), np.bool_)
    wanted = round(_SHARE * len(values))
    while (left := wanted - int(spoiled.sum())) > 0:
        event = donors[int(rng.integers(len(donors)))][:left]
        start = int(rng.integers(max(len(values) - len(event), 0) + 1))
        values[start : start + len(event)] = mean + sd * event
        spoiled[start : start + len(event)] = True
    history = replace(entity.history, values=values)
    # Timestamps are the same, so the grid has the same slots as before.
    grid = to_grid(history.timestamps_ms, values, period_ms, LONGEST_GAP)[1]
    return replace(entity, history=history, past=grid)


def _with_missing(entity: Entity, values: FloatArray, rng: np.random.Generator) -> FloatArray:
    return np.where(rng.uniform(size=values.shape) < _MISSING, np.float32(np.nan), values)


def _with_dead(entity: Entity, values: FloatArray, rng: np.random.Generator) -> FloatArray:
    channels = values.shape[1]
    dead = values.copy()
    dead[:, rng.permutation(channels)[: max(channels // 4, 1)]] = np.nan
    return dead


def _with_drift(entity: Entity, values: FloatArray, rng: np.random.Generator) -> FloatArray:
    channels = values.shape[1]
    _, sd = _moments(entity.history.values)
    sd[rng.permutation(channels)[channels // 2 :]] = 0.0
    ramp = np.linspace(0.0, 1.0, len(values))[:, None]
    return np.asarray(values + ramp * sd, np.float32)


WORSE: Final[dict[str, Callable[[Entity, FloatArray, np.random.Generator], FloatArray]]] = {
    "missing": _with_missing,
    "dead": _with_dead,
    "drift": _with_drift,
}
"""What happens to a test part: 30 % of the cells are missing at random, a quarter of the channels
is silent, half of the channels climb by one training standard deviation from begin to end."""


def worsen(kind: str, entity: Entity, values: FloatArray, seed: int) -> FloatArray:
    """Return the test part's values (T, D), spoiled; the same for every detector."""
    # By the name, so that an entity is spoiled alike alone and in its set.
    return WORSE[kind](entity, values, np.random.default_rng([seed, *entity.name.encode()]))
