"""History -> series on the grid, split in time, with statistics.

Takes any object shaped like `tsdiff.history.History`, so that a demo can train from memory.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from train.config import TrainConfig
from tsdiff.config import ModelConfig
from tsdiff.errors import HistoryError
from tsdiff.flags import Flags, find_flags
from tsdiff.normalize import Statistics, fit_statistics, normalize
from tsdiff.runs import Counts, longest_runs
from tsdiff.season import fit_season, harmonics, means_of_slots, season
from tsdiff.types import FloatArray
from tsdiff.windows import to_grid


class EntitySeries(Protocol):
    """One entity's history, as `tsdiff.history.EntityHistory`."""

    @property
    def entity(self) -> str:
        """Its name."""
        ...

    @property
    def timestamps_ms(self) -> NDArray[np.int64]:
        """Event times (N,), ascending."""
        ...

    @property
    def values(self) -> FloatArray:
        """Raw readings (N, D), NaN missing."""
        ...


class HistoryLike(Protocol):
    """Channels and entities, as `tsdiff.history.History`."""

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels."""
        ...

    @property
    def entities(self) -> Sequence[EntitySeries]:
        """One series an entity."""
        ...


@dataclass(frozen=True)
class Dataset:
    """Series of all entities in normalised units (N_e, D) float32, NaN missing.

    Rows before `split[e]` are for fitting, the rest are held out. `season` (R+1, K, D) are the
    weights of what the hour of day says (`tsdiff.season`), which `series` are without; the last row
    is the mean of all. `longest` (R+1, 2, D) are the longest gaps and standstills of each entity,
    and in the last row of all; `flags` are the channels that are on or off.
    """

    channels: tuple[str, ...]
    entities: tuple[str, ...]
    series: tuple[FloatArray, ...]
    slots: tuple[NDArray[np.int64], ...]
    period_ms: int
    split: tuple[int, ...]
    statistics: Statistics
    season: FloatArray
    longest: Counts
    fingerprint: str
    flags: Flags

    def as_unknown(self, row: int) -> FloatArray:
        """The series of an entity as it would be read were it unknown: less the pooled season."""
        basis = harmonics(self.slots[row], self.period_ms, self.season.shape[1])
        differs = self.season[row] - self.season[-1]
        return np.asarray(self.series[row] + season(differs, basis), np.float32)


def fewest_rows(model: ModelConfig) -> int:
    """Slots an entity must have so that there is something to fit and something to hold out."""
    return 12 * model.window


def held_out_slots(length: int, config: TrainConfig) -> int:
    """Slots at the end that are held out: the configured share, more where that is too few."""
    return max(round(config.held_out * length), min(config.min_held_out, length // 3))


def load(history: HistoryLike, period_ms: int, config: TrainConfig) -> Dataset:
    """Put history on the grid, split it and normalise it with the fitting part's statistics.

    Raises:
        HistoryError: no entity, or one with too few slots or without any reading.

    """
    if not history.entities:
        raise HistoryError("expected history of at least one entity, got none")
    needed = fewest_rows(config.model)
    grids: list[FloatArray] = []
    numbers: list[NDArray[np.int64]] = []
    digest = hashlib.sha256(repr((tuple(history.channels), period_ms)).encode())
    for entity in history.entities:
        slots, grid = to_grid(entity.timestamps_ms, entity.values, period_ms, config.model.window)
        grid = np.where(np.isfinite(grid), grid, np.nan).astype(np.float32)
        if len(grid) < needed:
            raise HistoryError(
                f"expected at least {needed} slots of {period_ms / 1000:g} s per entity "
                f"(12 windows of {config.model.window}), {entity.entity} has {len(grid)}; give "
                "longer history, a shorter --period, a smaller --window, or leave it out: an "
                "entity never seen in training is scored with the pooled statistics"
            )
        digest.update(entity.entity.encode())
        digest.update(slots.astype("<i8").tobytes())
        digest.update(grid.astype("<f4").tobytes())
        grids.append(grid)
        numbers.append(slots)
    split = tuple(len(grid) - held_out_slots(len(grid), config) for grid in grids)
    fitting = [grid[:at] for grid, at in zip(grids, split, strict=True)]
    if not any(np.isfinite(part).any() for part in fitting):
        raise HistoryError("expected readings in the history, every cell of it is missing")
    statistics = fit_statistics(fitting, config.model.scale_floor)
    longest = np.stack([longest_runs(grid) for grid in grids])

    def normalized(row: int, weights: FloatArray) -> FloatArray:
        scale = statistics.scale[row]
        basis = harmonics(numbers[row], period_ms, len(weights))
        mean = means_of_slots(statistics.mean[row], scale, weights, basis)
        return np.asarray(normalize(grids[row], mean, scale, config.model.clip), np.float32)

    rows = range(len(grids))
    none = np.zeros((0, len(history.channels)), np.float32)
    seasons = _with_their_mean(
        [fit_season(normalized(row, none), numbers[row], split[row], period_ms) for row in rows]
    )
    return Dataset(
        channels=tuple(history.channels),
        entities=tuple(entity.entity for entity in history.entities),
        series=tuple(normalized(row, seasons[row]) for row in rows),
        slots=tuple(numbers),
        period_ms=period_ms,
        split=split,
        statistics=statistics,
        season=seasons,
        longest=np.concatenate([longest, longest.max(0, keepdims=True)]),
        fingerprint=digest.hexdigest(),
        flags=find_flags(grids),
    )


def _with_their_mean(seasons: Sequence[FloatArray]) -> FloatArray:
    """Weights of all entities and their mean, (R+1, K, D); K = 0 where no channel has a season."""
    found = {row: own for row, own in enumerate(seasons) if own.any()}
    terms = len(next(iter(found.values()), ()))
    weights = np.zeros((len(seasons) + 1, terms, seasons[0].shape[1]), np.float32)
    for row, own in found.items():
        weights[row] = own
    weights[-1] = weights[:-1].mean(0)
    return weights
