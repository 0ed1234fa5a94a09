"""Anchors from history: one for all entities, or one for each, as held-out data want it."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.config import TrainConfig
from train.data import Dataset, Moments, window_moments
from tsdiff.anchor import Anchor, fit_anchor, negative_log_likelihood
from tsdiff.config import ModelConfig
from tsdiff.types import DoubleArray, FloatArray
from tsdiff.windows import sliding

# Windows of the pooled moments that an entity's own lean on: a day or so of minutes.
LEANINGS = {"own": 0.0, "leaning": 2000.0}
_JUDGES = 8  # entities that the choice is made with
_WINDOWS = 256  # held-out windows of each
_WORTHWHILE = 0.01  # nats a cell by which own anchors must be better


class Anchors(NamedTuple):
    """Stacked float32 anchors (A, N), (A, N, K), (A, N): A is 1, or R + 1 with the pooled one last.

    `kind` is `pooled`, `own` or `leaning`; `losses` the held-out -log p of each in nats a cell.
    """

    parts: tuple[FloatArray, FloatArray, FloatArray]
    rank: int
    kind: str
    losses: dict[str, float]


def fit_anchors(dataset: Dataset, config: TrainConfig) -> Anchors:
    """Fit the pooled anchor, and one for each entity where that explains held-out windows better.

    Entities of one fleet may be alike or not, and have long histories or short ones; so an entity's
    moments stand alone or lean on those of all, whichever is likelier.
    """
    model = config.model
    length, floor = model.anchor_window, model.noise_floor
    fitting = [series[:at] for series, at in zip(dataset.series, dataset.split, strict=True)]
    everything = window_moments(fitting, length)
    several = 1 < len(fitting) <= config.most_anchors
    own = [window_moments([part], length) for part in fitting] if several else []
    # No more directions than the data can show: half the cells, an eighth of the windows.
    fewest = min([everything.number, *(moments.number for moments in own)])
    rank = max(1, min(model.rank, len(everything.mean) // 2, fewest // 8))

    def fit(moments: Moments) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
        return fit_anchor(moments.mean, moments.covariance, rank, floor)

    pooled = fit(everything)
    if not several:
        return Anchors(_stack([pooled]), rank, "pooled", {})
    judges = np.unique(np.linspace(0, len(own) - 1, min(len(own), _JUDGES)).round()).astype(int)

    @cache  # who judged need not be fitted again
    def fit_own(kind: str, row: int) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
        return fit(own[row].leaning_on(everything, LEANINGS[kind]))

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
        return Anchors(_stack([pooled]), rank, "pooled", losses)
    fitted = [fit_own(best, row) for row in range(len(own))]
    return Anchors(_stack([*fitted, pooled]), rank, best, losses)


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
    windows = sliding(series[at - model.anchor_window + 1 :], model.anchor_window)
    # A fixed number, spread over the held-out part: one compiled shape for all entities.
    chosen = windows[np.linspace(0, len(windows) - 1, _WINDOWS).astype(int)]
    flat = np.ascontiguousarray(chosen).reshape(_WINDOWS, -1)
    observed = np.isfinite(flat)
    anchor = Anchor(*(jnp.asarray(part, jnp.float32) for part in fitted))
    nats = _negative_log_likelihood(
        anchor, jnp.nan_to_num(flat), jnp.where(jnp.asarray(observed), 0.0, jnp.inf)
    )
    return float(np.asarray(nats).sum() / max(observed.sum(), 1))
