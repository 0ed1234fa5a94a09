# ruff: noqa: F722
"""Masked denoising score matching over the mask bank, as a Gaussian likelihood.

A batch is a pure function of its key. Cells are conditioned (clean), targets (noisy at sigma, or
saying nothing at sigma to infinity) or missing (never either).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from tsdiff import masks
from tsdiff.anchor import (
    Anchor,
    Masked,
    Whitened,
    anchor_index,
    gram,
    masked_reading,
    posterior,
    solve,
)
from tsdiff.config import DiffusionConfig, ModelConfig
from tsdiff.denoiser import Network, Params
from tsdiff.precondition import widening

# How often each mask is drawn. What serving reads has a loss of its own (`Imputation`).
_SHARES = {
    "none": 0.2,
    "last": 0.2,
    "last_some": 0.2,
    "grating": 0.15,
    "group": 0.15,
    "random": 0.1,
}
_FURTHEST = 10.0  # standard deviations of the anchor


class Problem(NamedTuple):
    """A batch ready for the network: what it sees, and what it should have said, (B, L, D).

    `x` normalised, 0 where missing; `m`, `s` the anchor's posterior and `mean` its mean;
    `conditioned`, `hidden` and `target` (hidden and observed) masks; `noisy` c_in times the noisy
    targets; `sigma` (B,); `rows` (B,).
    """

    x: Array
    m: Array
    s: Array
    mean: Array
    conditioned: Array
    hidden: Array
    target: Array
    noisy: Array
    sigma: Array
    rows: Array


class Imputation(NamedTuple):
    """What serving asks: each channel's last cell, its own last `hidden` cells hidden.

    `x`, `observed`, `mean` (B, L, D); `m` (B, D, h), `s` (B, D) the anchor's; `rows` (B,).
    """

    x: Array
    observed: Array
    mean: Array
    m: Array
    s: Array
    rows: Array


def draw_masks(key: PRNGKeyArray, batch: int, channels: int, config: ModelConfig) -> Array:
    """Draw the hidden cells of each window, (B, L, D)."""
    length, hidden = config.window, config.hidden
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
    key_mask, key_sigma, key_infinite, key_noise = jax.random.split(key, 4)
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
    noise = jax.random.normal(key_noise, hidden.shape)
    return _pose(anchor, window, hidden, sigma, noise, rows)


def pose_imputation(
    clean: Whitened, window: Float[Array, "B L D"], rows: Int[Array, " B"], hidden: int
) -> Imputation:
    """The problem that serving poses; `clean` holds A stacked anchors at noise level 0."""
    observed = jnp.isfinite(window)
    x = jnp.where(observed, window, 0.0)
    own = jax.tree.map(lambda part: part[anchor_index(rows, clean.mean.shape[0])], clean)

    def one(anchor: Whitened, x: Array, observed: Array) -> Masked:
        flat, seen = x.reshape(1, -1), observed.reshape(1, -1)
        solved = solve(anchor, flat, seen, missing=None)
        return masked_reading(anchor, gram(anchor.loadings, x.shape[-1], hidden), solved, seen)

    masked = Masked(*(part[:, 0] for part in jax.vmap(one)(own, x, observed)))
    return Imputation(x, observed, own.mean.reshape(x.shape), masked.hidden, masked.sd, rows)


def _pose(
    anchor: Anchor,
    window: Float[Array, "B L D"],
    hidden: Bool[Array, "B L D"],
    sigma: Float[Array, " B"],
    noise: Float[Array, "B L D"],
    rows: Int[Array, " B"],
) -> Problem:
    observed = jnp.isfinite(window)
    x = jnp.where(observed, window, 0.0)
    target = observed & hidden
    level = jnp.where(jnp.isfinite(sigma), sigma, 0.0)[:, None, None]
    noisy = x + level * noise
    variance = jnp.where(hidden, (sigma**2)[:, None, None], 0.0)
    variance = jnp.where(observed, variance, jnp.inf)
    given = jnp.where(target, noisy, x)
    flat = (len(x), -1)
    own = Anchor(*(part[anchor_index(rows, anchor.mean.shape[0])] for part in anchor))
    m, s = posterior(own, given.reshape(flat), variance.reshape(flat))
    mean = own.mean.reshape(x.shape)
    centred = (noisy - mean) / jnp.sqrt(own.noise.reshape(x.shape) + level**2)
    shown = target & jnp.isfinite(sigma)[:, None, None]
    return Problem(
        x,
        m.reshape(x.shape),
        s.reshape(x.shape),
        mean,
        observed & ~hidden,
        hidden,
        target,
        jnp.where(shown, centred, 0.0),
        sigma,
        rows,
    )


def _negative_log_likelihood(
    error: Array, residual: Array, log_variance: Array, weight: float | Array = 1.0
) -> Array:
    """-log N(x; D, sd^2) of every cell, less the constant and log s.

    `error` is (x - m) / s: half its square is the anchor's.
    """
    spread = weight * widening(log_variance)
    return 0.5 * ((error - weight * residual) ** 2 * jnp.exp(-spread) + spread)


def denoising_loss(network: Network, params: Params, problem: Problem) -> Float[Array, ""]:
    """Denoising score matching, mean over target cells.

    With (m, s) as preconditioner its weight is EDM's lambda = 1 / s^2.
    """
    residual, log_variance = network(
        params,
        problem.x - problem.mean,
        problem.m - problem.mean,
        problem.conditioned,
        problem.hidden,
        problem.noisy,
        problem.sigma,
        problem.rows,
    )
    error = _bounded((problem.x - problem.m) / jnp.maximum(problem.s, 1e-4))
    cell = _negative_log_likelihood(error, residual, log_variance)
    return jnp.where(problem.target, cell, 0.0).sum() / jnp.maximum(problem.target.sum(), 1)


def imputation_losses(
    network: Network, params: Params, problem: Imputation, weights: Sequence[float] = (1.0,)
) -> Float[Array, "G B D"]:
    """The same of what serving reads, cell by cell, one for each weight; NaN where missing."""
    hidden = problem.m.shape[-1]
    about = problem.m - problem.mean[:, -hidden:].swapaxes(1, 2)
    residual, log_variance = network.each(
        params, problem.x - problem.mean, about, problem.observed, problem.rows
    )
    error = _bounded((problem.x[:, -1] - problem.m[..., -1]) / jnp.maximum(problem.s, 1e-4))
    cells = jnp.stack(
        [_negative_log_likelihood(error, residual, log_variance, weight) for weight in weights]
    )
    return jnp.where(problem.observed[:, -1], cells, jnp.nan)


def _bounded(error: Array) -> Array:
    """Errors of the anchor as the network is taught: one wild cell must not rule a batch."""
    return jnp.clip(error, -_FURTHEST, _FURTHEST)
