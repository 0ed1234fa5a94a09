"""Anchors from history: one for all entities, or one for each, as held-out data want it."""

from collections.abc import Sequence
from functools import cache, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.config import TrainConfig
from train.data import Dataset
from tsdiff.anchor import Anchor, fit_anchor, negative_log_likelihood
from tsdiff.config import ModelConfig
from tsdiff.moments import Moments, Sums, lag_sums
from tsdiff.types import DoubleArray, FloatArray
from tsdiff.windows import sliding

# Slots of the pooled moments that an entity's own lean on: a day or so of minutes.
LEANINGS = {"own": 0.0, "leaning": 2000.0}
_JUDGES = 8  # entities that the choice is made with
_WINDOWS = 256  # held-out windows of each
_WORTHWHILE = 0.01  # nats a cell by which own anchors must be better


class Anchors(NamedTuple):
    """Stacked float32 anchors (A, N), (A, N, K), (A, N): A is 1, or R + 1 with the pooled one last.

    `moments` are what each was fitted to: means (A, D) and lags (A, L, D, D). `kind` is `pooled`,
    `own` or `leaning`; `losses` the held-out -log p of each in nats a cell.
    """

    parts: tuple[FloatArray, FloatArray, FloatArray]
    moments: tuple[FloatArray, FloatArray]
    rank: int
    kind: str
    losses: dict[str, float]


def rank_of(model: ModelConfig, channels: int, slots: int) -> int:
    """No more directions than the data can show: half the cells, an eighth of the slots."""
    return max(1, min(model.rank, model.window * channels // 2, slots // 8))


def sums_of(series: FloatArray, model: ModelConfig) -> Sums:
    """What a series (N, D) adds to the moments, all of its slots alike."""
    return lag_sums(series, model.window, np.ones(len(series), np.float32))


def fit_to(
    moments: Moments, model: ModelConfig, rank: int
) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
    """Mean, loadings and noise of the anchor with these moments."""
    mean = np.tile(moments.mean, model.window)
    return fit_anchor(mean, moments.covariance(), rank, model.noise_floor)


def fit_anchors(dataset: Dataset, config: TrainConfig) -> Anchors:
    """Fit the pooled anchor, and one for each entity where that explains held-out windows better.

    Entities of one fleet may be alike or not, and have long histories or short ones; so an entity's
    moments stand alone or lean on those of all, whichever is likelier.
    """
    model = config.model
    fitting = [series[:at] for series, at in zip(dataset.series, dataset.split, strict=True)]
    several = 1 < len(fitting) <= config.most_anchors
    sums = [sums_of(part, model) for part in fitting]
    own = [each.moments() for each in sums] if several else []
    everything = reduce(Sums.plus, sums).moments()
    slots = [len(part) for part in fitting]
    rank = rank_of(model, len(dataset.channels), min(slots) if several else sum(slots))

    def fit(moments: Moments) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
        return fit_to(moments, model, rank)

    pooled = fit(everything)
    if not several:
        return Anchors(_stack([pooled]), _moments([everything]), rank, "pooled", {})
    judges = np.unique(np.linspace(0, len(own) - 1, min(len(own), _JUDGES)).round()).astype(int)

    def moments_of(kind: str, row: int) -> Moments:
        leaning = LEANINGS[kind]
        return own[row].leaning_on(everything, leaning / (slots[row] + leaning))

    @cache  # who judged need not be fitted again
    def fit_own(kind: str, row: int) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
        return fit(moments_of(kind, row))

    losses = {
        kind: float(
            np.mean(
                [
                    _loss(pooled if kind == "pooled" else fit_own(kind, row), dataset, row, model)
                    for row in judges.tolist()
                ]
            )
        )
        for kind in ("pooled", *LEANINGS)
    }
    best = min(losses, key=lambda kind: losses[kind])
    if losses[best] > losses["pooled"] - _WORTHWHILE:
        return Anchors(_stack([pooled]), _moments([everything]), rank, "pooled", losses)
    rows = range(len(own))
    return Anchors(
        _stack([*(fit_own(best, row) for row in rows), pooled]),
        _moments([*(moments_of(best, row) for row in rows), everything]),
        rank,
        best,
        losses,
    )


def _moments(each: Sequence[Moments]) -> tuple[FloatArray, FloatArray]:
    mean, lags = (np.stack(parts).astype(np.float32) for parts in zip(*each, strict=True))
    return mean, lags


def _stack(
    fitted: list[tuple[DoubleArray, DoubleArray, DoubleArray]],
) -> tuple[FloatArray, FloatArray, FloatArray]:
    mean, loadings, noise = (
        np.stack(parts).astype(np.float32) for parts in zip(*fitted, strict=True)
    )
    return mean, loadings, noise


_negative_log_likelihood = jax.jit(negative_log_likelihood)


def _loss(
    fitted: tuple[DoubleArray, DoubleArray, DoubleArray],
    dataset: Dataset,
    row: int,
    model: ModelConfig,
) -> float:
    """Held-out -log p in nats an observed cell."""
    series, at = dataset.series[row], dataset.split[row]
    windows = sliding(series[at - model.window + 1 :], model.window)
    # A fixed number, spread over the held-out part: one compiled shape for all entities.
    chosen = windows[np.linspace(0, len(windows) - 1, _WINDOWS).astype(int)]
    flat = np.ascontiguousarray(chosen).reshape(_WINDOWS, -1)
    observed = np.isfinite(flat)
    anchor = Anchor(*(jnp.asarray(part, jnp.float32) for part in fitted))
    nats = _negative_log_likelihood(
        anchor, jnp.nan_to_num(flat), jnp.where(jnp.asarray(observed), 0.0, jnp.inf)
    )
    return float(np.asarray(nats).sum() / max(observed.sum(), 1))
