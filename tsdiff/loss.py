# ruff: noqa: F722
"""Masked denoising score matching over the mask bank, as a Gaussian likelihood.

A batch is a pure function of its key. Cells are conditioned (clean), targets (noisy at sigma, or
saying nothing at sigma to infinity) or missing (never either).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from tsdiff import masks
from tsdiff.anchor import Anchor, anchor_index, posterior
from tsdiff.config import DiffusionConfig, ModelConfig
from tsdiff.denoiser import Network, Params
from tsdiff.precondition import widening

# How often each mask is drawn. Forecasting is what is read in serving, half of the time with some
# channels shown, so that the network learns how channels go together as well.
_SHARES = {
    "none": 0.08,
    "last": 0.36,
    "last_some": 0.3,
    "grating": 0.1,
    "group": 0.1,
    "random": 0.06,
}
_NEVER_SEEN = 0.15  # how often a window's entity is hidden, so that new entities have a row


class Problem(NamedTuple):
    """A batch ready for the network: what it sees, and what it should have said.

    `x` (B, L, D) normalised, 0 where missing; `m`, `s` (B, A, D) the anchor's posterior;
    `conditioned` (B, L, D); `target` (B, A, D); `noisy` (B, L, D); `sigma` (B,); `rows` (B,).
    """

    x: Array
    m: Array
    s: Array
    conditioned: Array
    target: Array
    noisy: Array
    sigma: Array
    rows: Array


def draw_masks(key: PRNGKeyArray, batch: int, channels: int, config: ModelConfig) -> Array:
    """Draw the hidden cells of the anchor's part of each window, (B, A, D)."""
    length, hidden = config.anchor_window, config.hidden
    key_kind, key_phase, key_rest = jax.random.split(key, 3)
    shares = jnp.asarray(list(_SHARES.values()))
    kind = jax.random.categorical(key_kind, jnp.log(shares), shape=(batch,))
    phase = jax.random.bernoulli(key_phase, 0.5, (batch,))

    def one(kind: Array, phase: Array, key: Array) -> Array:
        last = masks.last(length, channels, hidden)
        group = masks.group(key, length, channels)
        bank = jnp.stack(
            [
                masks.none(length, channels),
                last,
                last & group,
                jnp.where(
                    phase,
                    masks.grating(length, channels, hidden, 0),
                    masks.grating(length, channels, hidden, 1),
                ),
                group,
                masks.random_cells(key, length, channels),
            ]
        )
        return bank[kind]

    return jax.vmap(one)(kind, phase, jax.random.split(key_rest, batch))


def pose(
    key: PRNGKeyArray,
    anchor: Anchor,
    window: Float[Array, "B L D"],
    rows: Int[Array, " B"],
    model: ModelConfig,
    diffusion: DiffusionConfig,
) -> Problem:
    """Draw masks and noise for windows (normalised, NaN missing); `anchor` holds A stacked ones."""
    key_mask, key_sigma, key_infinite, key_noise, key_entity = jax.random.split(key, 5)
    batch, _, channels = window.shape
    hidden = draw_masks(key_mask, batch, channels, model)
    # With nothing hidden every cell is a noisy target (and infinity would leave nothing to see).
    nothing = ~hidden.any((1, 2))
    hidden = hidden | nothing[:, None, None]
    log_sigma = diffusion.log_sigma_mean + diffusion.log_sigma_std * jax.random.normal(
        key_sigma, (batch,)
    )
    infinite = jax.random.bernoulli(key_infinite, diffusion.infinite_share, (batch,)) & ~nothing
    sigma = jnp.where(infinite, jnp.inf, jnp.exp(log_sigma))
    unseen = jax.random.bernoulli(key_entity, _NEVER_SEEN, (batch,))
    noise = jax.random.normal(key_noise, hidden.shape)
    return _pose(anchor, window, hidden, sigma, noise, jnp.where(unseen, -1, rows))


def pose_forecast(
    anchor: Anchor, window: Float[Array, "B L D"], rows: Int[Array, " B"], model: ModelConfig
) -> Problem:
    """The problem that serving poses: the last slots hidden, sigma to infinity."""
    batch, _, channels = window.shape
    hidden = jnp.broadcast_to(
        masks.last(model.anchor_window, channels, model.hidden),
        (batch, model.anchor_window, channels),
    )
    sigma = jnp.full(batch, jnp.inf)
    return _pose(anchor, window, hidden, sigma, jnp.zeros(hidden.shape), rows)


def _pose(
    anchor: Anchor,
    window: Float[Array, "B L D"],
    hidden: Bool[Array, "B A D"],
    sigma: Float[Array, " B"],
    noise: Float[Array, "B A D"],
    rows: Int[Array, " B"],
) -> Problem:
    batch, length, channels = window.shape
    inside = hidden.shape[1]
    observed = jnp.isfinite(window)
    x = jnp.where(observed, window, 0.0)
    seen = observed[:, -inside:]
    target = seen & hidden
    level = jnp.where(jnp.isfinite(sigma), sigma, 0.0)[:, None, None]
    noisy = x[:, -inside:] + level * noise
    variance = jnp.where(hidden, (sigma**2)[:, None, None], 0.0)
    variance = jnp.where(seen, variance, jnp.inf)
    given = jnp.where(target, noisy, x[:, -inside:])
    flat = (batch, inside * channels)
    anchor = Anchor(*(part[anchor_index(rows, anchor.mean.shape[0])] for part in anchor))
    m, s = posterior(anchor, given.reshape(flat), variance.reshape(flat))
    m, s = m.reshape(hidden.shape), s.reshape(hidden.shape)
    spread = jnp.sqrt(anchor.noise.reshape(hidden.shape) + level**2)
    centred = (noisy - anchor.mean.reshape(hidden.shape)) / spread
    shown = target & jnp.isfinite(sigma)[:, None, None]
    before = ((0, 0), (length - inside, 0), (0, 0))
    conditioned = observed & ~jnp.pad(hidden, before)
    return Problem(
        x, m, s, conditioned, target, jnp.pad(jnp.where(shown, centred, 0.0), before), sigma, rows
    )


def negative_log_likelihood(
    problem: Problem, residual: Array, log_variance: Array, weight: float | Array = 1.0
) -> Float[Array, ""]:
    """Mean over target cells of -log N(x; D, sd^2), less the constant and log s.

    0.5 E[y^2] for the anchor. `residual`, `log_variance` cover the last slots, or all of the
    anchor's.
    """
    last = residual.shape[1]
    target = problem.target[:, -last:]
    s = jnp.maximum(problem.s[:, -last:], 1e-4)
    y = (problem.x[:, -last:] - problem.m[:, -last:]) / s
    spread = weight * widening(log_variance)
    cell = 0.5 * ((y - weight * residual) ** 2 * jnp.exp(-spread) + spread)
    return jnp.where(target, cell, 0.0).sum() / jnp.maximum(target.sum(), 1)


def loss(network: Network, params: Params, problem: Problem) -> Float[Array, ""]:
    """The training loss: with (m, s) as preconditioner its weight is EDM's lambda = 1 / s^2."""
    residual, log_variance = network(
        params,
        problem.x,
        problem.m,
        problem.conditioned,
        problem.noisy,
        problem.sigma,
        problem.rows,
        last=problem.m.shape[1],
    )
    return negative_log_likelihood(problem, residual, log_variance)
