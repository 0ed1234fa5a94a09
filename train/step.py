# ruff: noqa: F722
"""One step of training, pure: the batch is a function of (seed, step) and nothing else."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax import Array
from jaxtyping import Float, Int

from train.config import TrainConfig
from train.data import Dataset
from train.state import TrainState
from tsdiff.anchor import Anchor, Whitened
from tsdiff.config import ModelConfig
from tsdiff.denoiser import Network, Params
from tsdiff.loss import denoising_loss, imputation_losses, pose, pose_imputation

_HELD_OUT_WINDOWS = 1024
_EVALUATED_AT_ONCE = 128
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Weight of the loss over all masks and noise levels, beside that of the reading that is served.
_DENOISING = 0.25
_NEVER_SEEN = 0.15  # how often a window's entity is not told


class Windows(NamedTuple):
    """All series end to end (N, D), and where windows may begin: `first` (M,), `row` (M,)."""

    series: Array
    first: Array
    row: Array


def windows_of(dataset: Dataset, length: int, *, held_out: bool) -> Windows:
    """Windows within the fitting parts, or those that end in the held-out parts (at most 1024)."""
    first, row = [], []
    offset = 0
    for number, (series, at) in enumerate(zip(dataset.series, dataset.split, strict=True)):
        start = np.arange(max(at - length + 1, 0), len(series) - length + 1)
        if not held_out:
            start = np.arange(at - length + 1)
        first.append(offset + start)
        row.append(np.full(len(start), number))
        offset += len(series)
    firsts, rows = np.concatenate(first), np.concatenate(row)
    if held_out and len(firsts) > _HELD_OUT_WINDOWS:
        chosen = np.linspace(0, len(firsts) - 1, _HELD_OUT_WINDOWS).astype(np.int64)
        firsts, rows = firsts[chosen], rows[chosen]
    return Windows(
        jnp.asarray(np.concatenate(dataset.series)),
        jnp.asarray(firsts, jnp.int32),
        jnp.asarray(rows, jnp.int32),
    )


class Anchored(NamedTuple):
    """A stacked anchors, and the same at noise level 0 for serving's reading."""

    anchor: Anchor
    clean: Whitened


def _cut(windows: Windows, chosen: Int[Array, " B"], length: int) -> Float[Array, "B L D"]:
    return windows.series[windows.first[chosen][:, None] + jnp.arange(length)]


@dataclass(frozen=True)
class Training:
    """Everything static about a run."""

    network: Network
    model: ModelConfig
    config: TrainConfig

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW on a one-cycle schedule, gradients clipped: heavy tails are the rule here."""
        schedule = optax.cosine_onecycle_schedule(self.config.steps, self.config.learning_rate)
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(schedule, weight_decay=self.config.weight_decay),
        )

    def start(self) -> TrainState:
        """Return the state before the first step."""
        params = self.network.initialize(self.config.seed)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=params,
            optimizer=self.optimizer.init(params),
            best=params,
            best_loss=jnp.full((), jnp.inf, jnp.float32),
            bad=jnp.zeros((), jnp.int32),
        )


@partial(jax.jit, static_argnums=0)
def train_step(
    training: Training, state: TrainState, windows: Windows, anchored: Anchored
) -> tuple[TrainState, Array]:
    """One step: the next state and this batch's loss. Compiled once for each `training`."""
    config, model = training.config, training.model
    # XLA's own generator: threefry would take longer to compile than all the rest of the step.
    key = jax.random.fold_in(jax.random.key(config.seed, impl="rbg"), state.step)
    key_window, key_problem, key_entity = jax.random.split(key, 3)
    chosen = jax.random.randint(key_window, (config.batch,), 0, windows.first.shape[0])
    # Sometimes an entity is not told, so that new ones have a row.
    unseen = jax.random.bernoulli(key_entity, _NEVER_SEEN, (config.batch,))
    rows = jnp.where(unseen, -1, windows.row[chosen])
    cut = _cut(windows, chosen, model.window)
    problem = pose(key_problem, anchored.anchor, cut, rows, model, config.diffusion)
    served = pose_imputation(anchored.clean, cut, rows, model.hidden)

    def loss(params: Params) -> Array:
        imputing = jnp.nanmean(imputation_losses(training.network, params, served))
        return imputing + _DENOISING * denoising_loss(training.network, params, problem)

    value, gradient = jax.value_and_grad(loss)(state.params)
    updates, optimizer = training.optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    # Young averages forget faster, or the start would weigh on them for hundreds of steps.
    decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, params)
    return state._replace(step=state.step + 1, params=params, ema=ema, optimizer=optimizer), value


@partial(jax.jit, static_argnums=0)
def held_out_losses(
    training: Training, params: Params, windows: Windows, anchored: Anchored
) -> Array:
    """Mean negative log-likelihood per cell of what serving reads, (G, D), a row a weight."""
    model = training.model
    total = windows.first.shape[0]
    size = min(_EVALUATED_AT_ONCE, total)
    index = jnp.arange(total - total % size).reshape(-1, size)

    def one(chosen: Array) -> Array:
        problem = pose_imputation(
            anchored.clean,
            _cut(windows, chosen, model.window),
            windows.row[chosen],
            model.hidden,
        )
        return imputation_losses(training.network, params, problem, WEIGHTS)

    losses: Array = jax.lax.map(one, index)
    return jnp.nan_to_num(jnp.nanmean(losses, axis=(0, 2)))
