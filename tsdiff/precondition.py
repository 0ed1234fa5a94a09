# ruff: noqa: F722
"""The network's preconditioning: Karras et al. 2022 with the anchor in place of white data.

    D(x_sigma; sigma, mask) = m + s * F(...),    c_noise = log(sigma) / 4

where (m, s) is the anchor's posterior mean and standard deviation at (sigma, mask). For an anchor
without loadings, noise = sigma_data^2 and mean 0 this is EDM's preconditioner (table 1):

    m = sigma_data^2 / (sigma^2 + sigma_data^2) x_sigma             = c_skip x_sigma
    s = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)             = c_out
    (x_sigma - mean) / sqrt(noise + sigma^2)                        = c_in x_sigma

and the loss ((x - m) / s - F)^2 carries EDM's weight lambda = 1 / c_out^2. A network that says
nothing (F = 0, log-variance 0) is the anchor.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

# Beyond this a target cell says nothing: 80 is EDM's sigma_max, in units of the data's scale.
MAX_SIGMA = 80.0
MAX_LOG_VARIANCE = 4.0


def c_noise(sigma: Float[Array, " B"]) -> Float[Array, " B"]:
    """The noise level as the network sees it; infinity counts as `MAX_SIGMA`."""
    return jnp.log(jnp.clip(sigma, 1e-4, MAX_SIGMA)) / 4.0


def bounded(log_variance: Array) -> Array:
    """Keep a log-variance within +-`MAX_LOG_VARIANCE`, smoothly; near 0 it stays as it is."""
    return MAX_LOG_VARIANCE * jnp.tanh(log_variance / MAX_LOG_VARIANCE)


def denoised(
    m: Array, s: Array, residual: Array, log_variance: Array, weight: float | Array = 1.0
) -> tuple[Array, Array]:
    """D and its standard deviation; `weight` is the network's gate g (0: the anchor alone).

    A learned variance may widen the anchor's, not narrow it: what a quiet channel does within the
    anchor's noise floor is improbable and yet no fault, and judged by its likelihood it would
    drown the others (VUS-PR of the forecast alone: on drinking water .14 instead of .46, on servers
    .39 instead of .52).
    """
    wider = jnp.exp(0.5 * weight * widening(log_variance))
    return m + weight * s * residual, s * wider


def widening(log_variance: Array) -> Array:
    """What of a log-variance factor counts: see `denoised`. Training's loss sees the same."""
    return jnp.maximum(log_variance, 0.0)
