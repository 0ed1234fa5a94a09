# ruff: noqa: F722
"""The slower scorers: the newest slot is hidden, and a denoiser is asked about its cells.

They are the reconstruction- and density-based readings of the literature, one by one, of the same
denoiser that the others read: `crps` is that of samples of the slot (reconstruction), `elbo`,
`score-norms` and `flow` are readings of its density (`tsdiff.evidence`). A bundle is calibrated for
them only where that was asked for, since each takes 7 to 30 times as long as the others.
"""

from collections.abc import Callable, Mapping
from typing import Final

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from tsdiff import evidence
from tsdiff.samplers import DPMSolver2M
from tsdiff.sde import EDM, karras_levels, log_snr_levels
from tsdiff.types import DenoiseFn

_PROCESS: Final = EDM()
_LEVELS: Final = 8
_SAMPLES: Final = 8

_Read = Callable[[DenoiseFn, Array, Array, Array], Array]
"""(denoise, x, conditioned, target), each (B, N) -> evidence of the cells (B, N)."""


def read(scorer: str, denoise: DenoiseFn, window: Float[Array, "B L D"]) -> Float[Array, "B D"]:
    """Evidence of the last slots' cells, 0 where they are missing (NaN).

    `denoise` sees windows as (B, L D).
    """
    batch, _, channels = window.shape
    x = window.reshape(batch, -1)
    target = jnp.broadcast_to(jnp.arange(x.shape[1]) >= x.shape[1] - channels, x.shape)
    conditioned = jnp.isfinite(x) & ~target
    return _READINGS[scorer](denoise, x, conditioned, target)[:, -channels:]


def _crps(denoise: DenoiseFn, x: Array, conditioned: Bool[Array, "B N"], target: Array) -> Array:
    key = jax.random.key(0)
    drawn = evidence.reconstruct(
        denoise,
        _PROCESS,
        DPMSolver2M(),
        x,
        conditioned,
        target,
        key,
        karras_levels(_PROCESS, _LEVELS),
        samples=_SAMPLES,
        start=jax.random.normal(key, (_SAMPLES, 1, x.shape[1])),
    )
    # The estimate for few samples may fall below 0.
    return jnp.maximum(drawn.evidence, 0.0)


def _elbo(denoise: DenoiseFn, x: Array, conditioned: Array, target: Array) -> Array:
    noise = evidence.antithetic(jax.random.key(0), 1, x.shape[1])
    levels = log_snr_levels(_PROCESS, _LEVELS)
    return evidence.denoising_bound(denoise, x, conditioned, target, noise, levels)


def _score_norms(denoise: DenoiseFn, x: Array, conditioned: Array, target: Array) -> Array:
    levels = log_snr_levels(_PROCESS, _LEVELS)
    return evidence.score_norms(denoise, x, conditioned, target, levels).mean(0)


def _flow(denoise: DenoiseFn, x: Array, conditioned: Array, target: Array) -> Array:
    probes = jax.random.rademacher(jax.random.key(0), (1, x.shape[1]), jnp.float32)
    levels = karras_levels(_PROCESS, _LEVELS)
    cells = evidence.surprisal(denoise, x, conditioned, target, probes, levels)
    # A density has no greatest value; the order is what counts. Missing cells say nothing.
    return jnp.where(target & jnp.isfinite(x), jax.nn.softplus(cells), 0.0)


_READINGS: Final[Mapping[str, _Read]] = {
    "crps": _crps,
    "elbo": _elbo,
    "score-norms": _score_norms,
    "flow": _flow,
}
