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
from tsdiff.anchor import Anchor
from tsdiff.config import ModelConfig
from tsdiff.denoiser import Network, Params
from tsdiff.loss import loss, negative_log_likelihood, pose, pose_forecast

_HELD_OUT_WINDOWS = 1024
_EVALUATED_AT_ONCE = 128
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


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
    training: Training, state: TrainState, windows: Windows, anchor: Anchor
) -> tuple[TrainState, Array]:
    """One step: the next state and this batch's loss. Compiled once for each `training`."""
    config, model = training.config, training.model
    # XLA's own generator: threefry would take longer to compile than all the rest of the step.
    key = jax.random.fold_in(jax.random.key(config.seed, impl="rbg"), state.step)
    key_window, key_problem = jax.random.split(key)
    chosen = jax.random.randint(key_window, (config.batch,), 0, windows.first.shape[0])
    problem = pose(
        key_problem,
        anchor,
        _cut(windows, chosen, model.window),
        windows.row[chosen],
        model,
        config.diffusion,
    )
    value, gradient = jax.value_and_grad(loss, argnums=1)(training.network, state.params, problem)
    updates, optimizer = training.optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    # Young averages forget faster, or the start would weigh on them for hundreds of steps.
    decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, params)
    return state._replace(step=state.step + 1, params=params, ema=ema, optimizer=optimizer), value


@partial(jax.jit, static_argnums=0)
def held_out_losses(training: Training, params: Params, windows: Windows, anchor: Anchor) -> Array:
    """Mean negative log-likelihood per cell of the forecast, (G,), one for each weight."""
    model = training.model
    total = windows.first.shape[0]
    size = min(_EVALUATED_AT_ONCE, total)
    index = jnp.arange(total - total % size).reshape(-1, size)

    def one(chosen: Array) -> Array:
        problem = pose_forecast(
            anchor, _cut(windows, chosen, model.window), windows.row[chosen], model
        )
        residual, log_variance = training.network(
            params,
            problem.x,
            problem.m,
            problem.conditioned,
            None,
            problem.sigma,
            problem.rows,
            last=model.hidden,
        )
        return jnp.stack(
            [negative_log_likelihood(problem, residual, log_variance, weight) for weight in WEIGHTS]
        )

    losses: Array = jax.lax.map(one, index)
    return losses.mean(0)
