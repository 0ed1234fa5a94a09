# ruff: noqa: F722
"""Windows -> evidence streams: reconstruction, density and forecast.

A stream is one non-negative number per slot, larger = stranger, that the calibration turns into
a tail probability. Each is read from the window that ends at the slot, and at two time scales: as
it is, and as a moving average whose weights halve in a few slots, to both sides with a lag.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from tsdiff import anchor
from tsdiff.anchor import Whitened
from tsdiff.config import ModelConfig

STREAMS = ("reconstruction", "density", "forecast")
"""Names of the streams, in their order along S."""


class Readings(NamedTuple):
    """What a batch of windows says about its last slots.

    `streams` (B, S) raw values, in the order of `STREAMS`; `coverage` (B, S) the share of the
    cells behind each that were observed (0: the value means nothing); `expected` and `sd` (B, D)
    in normalised units, from the masked reading; `surprise` (B, D) how many of its standard
    deviations each reading is from the forecast, 0 where missing.
    """

    streams: Float[Array, "B S"]
    coverage: Float[Array, "B S"]
    expected: Float[Array, "B D"]
    sd: Float[Array, "B D"]
    surprise: Float[Array, "B D"]


def read_anchor(
    noisy: Whitened,
    clean: Whitened,
    x: Float[Array, "B L D"],
    observed: Bool[Array, "B L D"],
    config: ModelConfig,
    *,
    missing: int | None,
) -> Readings:
    """Reconstruction and density at `config.sigma` (`noisy`), the masked reading at 0 (`clean`).

    `x` is normalised, 0 where missing; `missing` as in `anchor.solve`.
    """
    batch, _, channels = x.shape
    flat, seen = x.reshape(batch, -1), observed.reshape(batch, -1)
    solved = anchor.solve(noisy, flat, seen, missing=missing)
    streams = jnp.stack(
        [
            _reconstruction(noisy, solved, channels, config.sigma, seen),
            anchor.mahalanobis(solved) / jnp.maximum(seen.sum(-1), 1),
        ],
        axis=-1,
    )
    coverage = jnp.stack([seen[:, -channels:].mean(-1), seen.mean(-1)], axis=-1)
    # A slot in which nothing arrived says nothing, whatever the slots before it said.
    coverage = jnp.where(coverage[:, :1] > 0, coverage, 0.0)
    solved = anchor.solve(clean, flat, seen, missing=missing)
    masked = anchor.masked_reading(clean, solved, seen, channels, config.hidden)
    return Readings(streams, coverage, masked.expected, masked.sd, jnp.zeros_like(masked.expected))


def _reconstruction(
    noisy: Whitened,
    solved: anchor.Solved,
    channels: int,
    sigma: float,
    observed: Bool[Array, "B N"],
) -> Float[Array, " B"]:
    """Mean over the last slot's observed channels of |x - D(x; sigma)| / s, nothing masked.

    D is the anchor's posterior mean with noise level sigma and the noise itself at its mean, 0.
    In whitened units x - D = sigma^2 v^-1/2 e and s^2 = sigma^2 / v (noise + sigma^2 g), with e
    the residual, v = noise + sigma^2 and g the cell's variance through the latent variables.
    """
    rows = noisy.loadings[-channels:]
    seen = observed[:, -channels:]
    residual = solved.residual[:, -channels:] - solved.latent @ rows.T
    through_latent = anchor.latent_variance(solved, rows)
    noise = noisy.scale[-channels:] ** 2 - sigma**2
    error = jnp.abs(residual) * sigma / jnp.sqrt(noise + sigma**2 * through_latent)
    return (error * seen).sum(-1) / jnp.maximum(seen.sum(-1), 1)


def with_forecast(
    readings: Readings,
    x: Float[Array, "B D"],
    observed: Bool[Array, "B D"],
    expected: Float[Array, "B D"],
    sd: Float[Array, "B D"],
) -> Readings:
    """Add the stream of the hidden last slots: mean over observed channels of |x - D| / s.

    What was forecast did not see the other channels of the slot: a fault of one does not spill over
    into those that go with it, so these errors tell best whose fault it is.
    """
    error = jnp.where(observed, jnp.abs(x - expected) / sd, 0.0)
    stream = error.sum(-1) / jnp.maximum(observed.sum(-1), 1)
    return readings._replace(
        streams=jnp.concatenate([readings.streams, stream[:, None]], -1),
        coverage=jnp.concatenate([readings.coverage, observed.mean(-1, keepdims=True)], -1),
        surprise=error,
    )


def settle(
    streams: Float[Array, "*n S"], coverage: Float[Array, "*n S"], neutral: Float[Array, "*#n S"]
) -> Float[Array, "*n S"]:
    """Draw streams that rest on few cells towards their `neutral` value.

    The mean of n cells scatters as n^-1/2; without this, sparse windows would look strange only
    for being sparse. Where nothing was observed the neutral value itself remains.
    """
    return jnp.where(coverage > 0, neutral + (streams - neutral) * jnp.sqrt(coverage), neutral)


def smooth(
    streams: Float[Array, "E M S"],
    neutral: Float[Array, "E S"],
    half_life: float,
    behind: int,
    ahead: int,
) -> Float[Array, "E T S"]:
    """Moving average of T = M - behind - ahead slots over so many before and after each.

    Weights halve every `half_life` slots of distance: a long event adds up, a short one is soon
    forgotten. NaN counts as neutral.
    """
    known = jnp.where(jnp.isnan(streams), neutral[:, None, :], streams)
    weight = 0.5 ** (np.abs(np.arange(-behind, ahead + 1)) / half_life)
    weight /= weight.sum()
    span = streams.shape[1] - behind - ahead
    return sum(
        (float(kept) * known[:, at : at + span] for at, kept in enumerate(weight)),
        start=jnp.zeros_like(known[:, :span]),
    )
