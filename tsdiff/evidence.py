# ruff: noqa: F722
"""Slower, richer readings of the denoiser: how strange each target cell is, given the others.

| reading           | evidence of a cell                  | unit | calls of the denoiser    |
| ----------------- | ----------------------------------- | ---- | ------------------------ |
| `reconstruct`     | CRPS of samples drawn for it        | as x | samples x sampler's      |
| `denoising_bound` | its share of the negative ELBO      | nats | draws x levels           |
| `score_norms`     | (sigma score)^2 at each noise level | -    | levels                   |
| `surprisal`       | its share of -log p                 | nats | 4 (1 + probes) x levels  |

Each is larger where stranger, 0 in cells that were not observed or are no target, and as good as
the denoiser: exact for an exact one. A denoiser on N cells sees windows as (B, N); evidence
reshapes to (B, L, D).

Masks are as in `samplers.sample`, `x` in normalised units. A target whose x is NaN counts as
missing: nothing is read from it, and it gets no evidence. `levels` are noise levels that fall and
stay positive. Noise and probes are arguments, drawn once and the same for all windows: evidence
neither depends on a window's neighbours in the batch nor wavers from one call to the next. Only
the samples of `reconstruct` differ from window to window, unless it is told what to start from.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, PRNGKeyArray

from tsdiff.errors import ConfigError
from tsdiff.samplers import Method, cell_log_likelihood, conditional, sample
from tsdiff.sde import Process
from tsdiff.types import DenoiseFn

_TAIL = 0.05  # on either side of a 90 % band


class Reconstruction(NamedTuple):
    """What the conditioned cells make of the targets.

    `evidence` the CRPS; `expected`, `lower` and `upper` the mean and the 90 % band, which in cells
    that are no target are x itself.
    """

    evidence: Float[Array, "B N"]
    expected: Float[Array, "B N"]
    lower: Float[Array, "B N"]
    upper: Float[Array, "B N"]


def reconstruct(
    denoise: DenoiseFn,
    process: Process,
    method: Method,
    x: Float[Array, "B N"],
    conditioned: Bool[Array, "B N"],
    target: Bool[Array, "B N"],
    key: PRNGKeyArray,
    levels: Float[Array, " n"],
    *,
    samples: int,
    start: Float[Array, "S _ N"] | None = None,
) -> Reconstruction:
    """Draw the targets, missing ones too, and compare what was observed with the draws.

    `start` as in `samplers.sample`: where it is the same for all windows and `method` adds no noise
    of its own, a window's draws do not depend on its neighbours.

    With fewer than 19 samples the band runs from the least to the greatest and holds less than
    90 %: (samples - 1) / (samples + 1). Few steps make it narrow, too: DPM-Solver++(2M) from sigma
    80 to 0.05 leaves its ends off by up to .2 standard deviations after 8 levels, .05 after 24.
    """
    if samples < 2:
        raise ConfigError(
            f"expected at least 2 samples, as their spread is part of the CRPS, got {samples}"
        )
    drawn = sample(
        denoise, process, method, x, conditioned, target, key, levels, samples=samples, start=start
    )
    ordered = jnp.sort(drawn, axis=0)
    return Reconstruction(
        evidence=jnp.where(_judged(x, conditioned, target), fair_crps(ordered, x), 0.0),
        expected=drawn.mean(0),
        lower=_quantile(ordered, _TAIL),
        upper=_quantile(ordered, 1.0 - _TAIL),
    )


def fair_crps(ordered: Float[Array, "S B N"], x: Float[Array, "B N"]) -> Float[Array, "B N"]:
    """Continuous ranked probability score of x against S samples in ascending order.

    E|X - x| - E|X - X'| / 2 (Gneiting & Raftery 2007, eq. 21, its sign reversed), with X and X'
    different samples. So its mean does not depend on their number (Ferro 2014, "fair"), though by
    chance it may fall below 0.
    """
    count = ordered.shape[0]
    # Of the differences between pairs, the i-th of S samples is in i - 1 with + and S - i with -.
    rank = 2.0 * jnp.arange(count, dtype=ordered.dtype) - (count - 1)
    error = ordered - x
    spread = jnp.tensordot(rank, error, 1, precision="highest") / (count * (count - 1))
    return jnp.abs(error).mean(0) - spread


def _quantile(ordered: Float[Array, "S B N"], share: float) -> Float[Array, "B N"]:
    """Between the order statistics around share (S + 1): the i-th has i / (S + 1) below it.

    Hyndman & Fan 1996, definition 6. The more common definition 7 is too narrow for few samples.
    """
    count = ordered.shape[0]
    position = min(max(share * (count + 1) - 1.0, 0.0), count - 1.0)
    below = min(int(position), count - 2)
    return ordered[below] + (position - below) * (ordered[below + 1] - ordered[below])


def denoising_bound(
    denoise: DenoiseFn,
    x: Float[Array, "B N"],
    conditioned: Bool[Array, "B N"],
    target: Bool[Array, "B N"],
    noise: Float[Array, "E N"],
    levels: Float[Array, " n"],
) -> Float[Array, "B N"]:
    """Return each cell's share of the negative ELBO of the targets given the conditioned cells.

    Kingma et al. 2021 (arXiv:2107.00630), section 5.1: half the integral of E|x - D|^2 over the
    signal-to-noise ratio 1 / sigma^2, by the trapezoidal rule in log sigma; and, from
    `levels[0]` up, the divergence x^2 / (2 sigma^2) of y from noise alone. Weighted by other than
    the ratio it would be the loss of Ho et al. 2020 (eq. 14).

    For n targets and s = `levels[-1]`, n log(2 pi e s^2) / 2 completes it to a bound:

        -log p(x; sqrt(2) s)  <=  -E log p(x + s n; s)  =  sum of evidence + n log(2 pi e s^2) / 2

    with equality on the right for the ideal denoiser, exact levels and noise. Left out, the
    constant leaves a divergence of s-noisy x from its prediction: evidence that is not negative.
    Antithetic noise (`antithetic`) removes what is odd in the noise. For Gaussian data nothing
    then remains but what all windows of one mask have in common.
    """
    error = denoising_errors(denoise, x, conditioned, target, noise, levels)
    prior = jnp.where(_judged(x, conditioned, target), 0.5 * (x / levels[0]) ** 2, 0.0)
    # d(1 / sigma^2) / 2 = -d(log sigma) / sigma^2
    return jnp.trapezoid(error, -jnp.log(levels)[:, None, None], axis=0) + prior


def score_norms(
    denoise: DenoiseFn,
    x: Float[Array, "B N"],
    conditioned: Bool[Array, "B N"],
    target: Bool[Array, "B N"],
    levels: Float[Array, " n"],
) -> Float[Array, "n B N"]:
    """Return (sigma d log p(x; sigma) / dx)^2 for each cell, one evidence per noise level.

    Mahmood et al. 2021 (arXiv:2010.13132): read at x itself, as if x were noisy. With D - x =
    sigma^2 score it is the denoising error at noise 0.
    """
    none = jnp.zeros((1, x.shape[-1]), x.dtype)
    return denoising_errors(denoise, x, conditioned, target, none, levels)


def denoising_errors(
    denoise: DenoiseFn,
    x: Float[Array, "B N"],
    conditioned: Bool[Array, "B N"],
    target: Bool[Array, "B N"],
    noise: Float[Array, "E N"],
    levels: Float[Array, " n"],
) -> Float[Array, "n B N"]:
    """((x - D(x + sigma n; sigma)) / sigma)^2 at each level, mean over the draws n of `noise`."""
    judged = _judged(x, conditioned, target)
    given = jax.vmap(conditional(denoise, x, conditioned, judged), (0, None))

    def at_level(sigma: Float[Array, ""]) -> Float[Array, "B N"]:
        error = (x - given(x + sigma * noise[:, None], sigma)) / sigma
        return jnp.where(judged, (error**2).mean(0), 0.0)

    errors: Array = jax.lax.map(at_level, levels)
    return errors


def surprisal(
    denoise: DenoiseFn,
    x: Float[Array, "B N"],
    conditioned: Bool[Array, "B N"],
    target: Bool[Array, "B N"],
    probes: Float[Array, "P N"],
    levels: Float[Array, " n"],
) -> Float[Array, "B N"]:
    """Return each cell's share of -log p(targets | conditioned cells), by the flow of probability.

    See `samplers.cell_log_likelihood`. A density has no greatest value: shares may be negative.
    """
    judged = _judged(x, conditioned, target)
    shared = jnp.broadcast_to(probes[:, None], (len(probes), *x.shape))
    return -cell_log_likelihood(denoise, x, conditioned, judged, shared, levels)


def antithetic(key: PRNGKeyArray, pairs: int, cells: int) -> Float[Array, "E N"]:
    """Standard normal noise in pairs n, -n (Hammersley & Morton 1956)."""
    half = jax.random.normal(key, (pairs, cells))
    return jnp.concatenate([half, -half])


def _judged(x: Array, conditioned: Array, target: Array) -> Array:
    """Targets that were observed: the only cells with evidence."""
    return target & ~conditioned & jnp.isfinite(x)
