# ruff: noqa: F722
"""The library's slower readings of a denoiser (`tsdiff.evidence`), judged as detectors.

They show what the families of the literature see by themselves, in the same harness: each hides
the newest slot of a window and asks a denoiser about it. There is no second time scale, no
learning while it scores, and no combination: those are the service's own scorers', which cost a
thousandth. The denoiser is the Gaussian anchor of the entity, exact for every mask and noise level.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from train.anchors import fit_to, rank_of, sums_of
from train.baselines import Baseline, Judged, trailing
from tsdiff import evidence
from tsdiff.anchor import Anchor, posterior
from tsdiff.config import ModelConfig
from tsdiff.samplers import DPMSolver2M
from tsdiff.sde import EDM, karras_levels, log_snr_levels
from tsdiff.types import DenoiseFn, FloatArray

_CHUNK: Final = 512
_PROCESS: Final = EDM()
_SAMPLES, _STEPS = 8, 8

Read = Callable[[DenoiseFn, Array, Array, Array], Array]
"""(denoise, x, conditioned, target), each (B, N) -> evidence of the cells (B, N)."""


class Reading:
    """One reading with the anchor of one entity."""

    seeded = False
    context = ModelConfig.window - 1

    def __init__(self, read: Read) -> None:
        self._read = read

    def fit(self, z: FloatArray, seed: int) -> None:
        """Fit the anchor, as `train.anchors` does; nothing is random."""
        del seed
        config = ModelConfig()
        parts = fit_to(sums_of(z, config).moments(), config, rank_of(config, z.shape[1], len(z)))
        denoise = partial(posterior, Anchor(*(jnp.asarray(p, jnp.float32) for p in parts)))
        self._of_windows = jax.jit(partial(_newest, self._read, denoise, z.shape[1]))

    def score(self, z: FloatArray) -> Judged:
        """Mean over the channels of each newest slot, and what each channel adds to it."""
        windows = trailing(z, self.context + 1)
        found = []
        for start in range(0, len(windows), _CHUNK):
            part = windows[start : start + _CHUNK]
            flat = np.zeros((_CHUNK, part[0].size), np.float32)
            flat[: len(part)] = part.reshape(len(part), -1)
            found.append(np.asarray(self._of_windows(flat))[: len(part)])
        cells = np.concatenate(found)
        return cells.mean(1), cells


def _newest(
    read: Read, denoise: DenoiseFn, channels: int, x: Float[Array, "B N"]
) -> Float[Array, "B D"]:
    target = jnp.broadcast_to(jnp.arange(x.shape[1]) >= x.shape[1] - channels, x.shape)
    return read(denoise, x, ~target, target)[:, -channels:]


def _crps(denoise: DenoiseFn, x: Array, conditioned: Bool[Array, "B N"], target: Array) -> Array:
    levels = karras_levels(_PROCESS, _STEPS)
    key = jax.random.key(0)
    drawn = evidence.reconstruct(
        denoise, _PROCESS, DPMSolver2M(), x, conditioned, target, key, levels, samples=_SAMPLES
    )
    # The estimate for few samples may fall below 0.
    return jnp.maximum(drawn.evidence, 0.0)


def _elbo(denoise: DenoiseFn, x: Array, conditioned: Array, target: Array) -> Array:
    noise = evidence.antithetic(jax.random.key(0), 1, x.shape[1])
    levels = log_snr_levels(_PROCESS, _STEPS)
    return evidence.denoising_bound(denoise, x, conditioned, target, noise, levels)


def _score_norms(denoise: DenoiseFn, x: Array, conditioned: Array, target: Array) -> Array:
    levels = log_snr_levels(_PROCESS, _STEPS)
    return evidence.score_norms(denoise, x, conditioned, target, levels).mean(0)


def _flow(denoise: DenoiseFn, x: Array, conditioned: Array, target: Array) -> Array:
    probes = jax.random.rademacher(jax.random.key(0), (1, x.shape[1]), jnp.float32)
    levels = karras_levels(_PROCESS, _STEPS)
    cells = evidence.surprisal(denoise, x, conditioned, target, probes, levels)
    # A density has no greatest value; the order is what counts.
    return jax.nn.softplus(cells)


READINGS: Final[dict[str, Callable[[], Baseline]]] = {
    "tsdiff-crps": lambda: Reading(_crps),
    "tsdiff-elbo": lambda: Reading(_elbo),
    "tsdiff-score-norms": lambda: Reading(_score_norms),
    "tsdiff-flow": lambda: Reading(_flow),
}
"""By the names of `tsdiff evaluate --detector`; run only when asked for, since they take long."""
