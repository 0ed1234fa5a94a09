# ruff: noqa: F722
"""Windows -> evidence streams: reconstruction, density, forecast and imputation.

A stream is one non-negative number per slot, larger = stranger, that the calibration turns into
a tail probability. Each is read from the window that ends at the slot, and at several time scales:
as it is, as a moving average of the slots before it and, with a lag, of those after it.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from tsdiff import anchor
from tsdiff.anchor import Whitened
from tsdiff.config import ModelConfig
from tsdiff.flags import Flags, sensors, weights

STREAMS = ("reconstruction", "density", "forecast", "imputation")
"""Names of the streams, in their order along S."""


class Readings(NamedTuple):
    """What a batch of windows says about its last slots.

    `streams` (B, S) raw values, in the order of `STREAMS`, or a slow scorer's one; `coverage`
    (B, S) the share of the cells behind each that were observed (0: the value means nothing);
    `expected` and `sd` (B, D) in normalised units, from the masked reading; `surprise` (B, D) how
    many standard deviations each reading is from what was forecast or, with a network, imputed,
    times the channel's weight, 0 where missing.
    """

    streams: Float[Array, "B S"]
    coverage: Float[Array, "B S"]
    expected: Float[Array, "B D"]
    sd: Float[Array, "B D"]
    surprise: Float[Array, "B D"]


class Told(NamedTuple):
    """What is said of cells that were not seen: mean and standard deviation, (B, D)."""

    mean: Float[Array, "B D"]
    sd: Float[Array, "B D"]

    def error(self, x: Float[Array, "B D"], observed: Bool[Array, "B D"]) -> Float[Array, "B D"]:
        """Standard deviations between `x` and the mean, 0 where nothing was observed."""
        return jnp.where(observed, jnp.abs(x - self.mean) / self.sd, 0.0)


def read(
    noisy: Whitened,
    x: Float[Array, "B L D"],
    observed: Bool[Array, "B L D"],
    forecast: Told,
    imputed: Told,
    sigma: float,
    unexplained: float,
    flags: Flags,
    *,
    missing: int | None,
) -> Readings:
    """Put all streams of windows together.

    `noisy` is the anchor of all but the `flags` at noise level `sigma`, which reads with nothing
    masked; `forecast` what was said of the last slot with the last slots hidden, `imputed` of each
    channel with its own last cells hidden. `x` is normalised, 0 where missing; `missing` as in
    `anchor.solve`.

    A forecast did not see the other channels of the slot: a fault of one does not spill over into
    those that go with it, so its errors tell best whose fault it is. Where a network knows better
    than the anchor, they count by the share that it leaves `unexplained`, and its own by the rest.
    """
    batch, _, channels = x.shape
    flat, seen = x.reshape(batch, -1), observed.reshape(batch, -1)
    solved = anchor.solve(noisy, flat, seen, missing=missing)
    sensing = sensors(flags, x.shape[1])
    judged = seen & sensing
    last, arrived = x[:, -1], observed[:, -1]
    weight = _weights(arrived, flags)
    ahead, aside = forecast.error(last, arrived), imputed.error(last, arrived)
    surprise = jnp.sqrt(unexplained * ahead**2 + (1.0 - unexplained) * aside**2)
    streams = (
        _reconstruction(noisy, solved, channels, sigma, judged),
        anchor.mahalanobis(noisy, solved, judged) / jnp.maximum(judged.sum(-1), 1),
        _mean(ahead, weight),
        _mean(aside, weight),
    )
    of_slot = weight.sum(-1) / weights(flags).sum()
    of_sensors = judged[:, -channels:].sum(-1) / sensing[-channels:].sum()
    # A slot in which nothing arrived says nothing, whatever the slots before it said.
    of_window = jnp.where(of_sensors > 0, judged.sum(-1) / sensing.sum(), 0.0)
    coverage = (of_sensors, of_window, of_slot, of_slot)
    return Readings(
        jnp.stack(streams, -1), jnp.stack(coverage, -1), imputed.mean, imputed.sd, surprise * weight
    )


def _weights(arrived: Bool[Array, "B D"], flags: Flags) -> Float[Array, "B D"]:
    """How much the readings of a slot count, 0 where there is none."""
    return jnp.where(arrived, weights(flags), 0.0)


def _mean(cells: Float[Array, "B D"], weight: Float[Array, "B D"]) -> Float[Array, " B"]:
    """Weighted mean over channels, 0 where nothing arrived."""
    total = weight.sum(-1)
    return (cells * weight).sum(-1) / jnp.where(total > 0, total, 1.0)


def read_slow(
    cells: Float[Array, "B D"], observed: Bool[Array, "B L D"], imputed: Told, flags: Flags
) -> Readings:
    """Put a slow scorer's evidence of the last slots' `cells` in the place of all streams.

    It says whose fault it is, too: `surprise` is the root, since shares are of squares.
    """
    weight = _weights(observed[:, -1], flags)
    stream, coverage = _mean(cells, weight), weight.sum(-1) / weights(flags).sum()
    surprise = jnp.sqrt(cells) * weight
    return Readings(stream[:, None], coverage[:, None], imputed.mean, imputed.sd, surprise)


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
    rows = noisy.last(channels)
    seen = observed[:, -channels:]
    residual = solved.residual[:, -channels:] - solved.latent @ rows.T
    through_latent = anchor.latent_variance(solved, rows)
    noise = noisy.scale[-channels:] ** 2 - sigma**2
    error = jnp.abs(residual) * sigma / jnp.sqrt(noise + sigma**2 * through_latent)
    return (error * seen).sum(-1) / jnp.maximum(seen.sum(-1), 1)


def settle(
    streams: Float[Array, "*n S"], coverage: Float[Array, "*n S"], neutral: Float[Array, "*#n S"]
) -> Float[Array, "*n S"]:
    """Draw streams that rest on few cells towards their `neutral` value.

    The mean of n cells scatters as n^-1/2; without this, sparse windows would look strange only
    for being sparse. Where nothing was observed the neutral value itself remains.
    """
    return jnp.where(coverage > 0, neutral + (streams - neutral) * jnp.sqrt(coverage), neutral)


class Smoothing(NamedTuple):
    """How a long time scale is made: of which slots beside a slot itself, and their weights.

    Weights halve every `half_life` slots of distance, and no slot counts as more than `ceiling`
    times what is usual: a long event adds up, a short one is soon forgotten, however wild.
    """

    behind: int
    ahead: int
    half_life: float
    ceiling: float


class Scales(NamedTuple):
    """The long time scales of which a slot has evidence, beside its streams as they are."""

    each: tuple[Smoothing, ...]

    @property
    def behind(self) -> int:
        """The most slots before it that any of them needs."""
        return max(by.behind for by in self.each)

    @property
    def ahead(self) -> int:
        """The most slots after it that any of them needs."""
        return max(by.ahead for by in self.each)


def scales(config: ModelConfig, lag: int) -> Scales:
    """Return the long scales where `lag` slots after a slot may be seen.

    One of the slots before it, one of those to come: both together would smear what they say, since
    a window looks back as it is, and is strange for as long as it holds what was.
    """
    ceiling = config.smoothing_ceiling
    before = Smoothing(config.smoothing - 1, 0, config.smoothing_half_life, ceiling)
    after = Smoothing(0, lag, config.smoothing_half_life_ahead, ceiling)
    return Scales((before, after) if lag else (before,))


def at_scales(
    streams: Float[Array, "E M S"],
    neutral: Float[Array, "E S"],
    usual: Float[Array, "E S"],
    by: Scales,
) -> Float[Array, "E T C"]:
    """Streams as they are, then each long scale, of the T = M - behind - ahead slots with all.

    NaN counts as `neutral`; `usual` as in `smooth`.
    """
    known = jnp.where(jnp.isnan(streams), neutral[:, None, :], streams)
    last = known.shape[1] - by.ahead
    long = [
        smooth(known[:, by.behind - one.behind : last + one.ahead], usual, one) for one in by.each
    ]
    return jnp.concatenate([known[:, by.behind : last], *long], -1)


def smooth(
    streams: Float[Array, "E M S"], usual: Float[Array, "E S"], by: Smoothing
) -> Float[Array, "E T S"]:
    """Moving average of T = M - behind - ahead slots.

    `usual` is the limit of usual values: the streams' 98th percentiles.
    """
    known = jnp.minimum(streams, by.ceiling * usual[:, None, :])
    weight = 0.5 ** (np.abs(np.arange(-by.behind, by.ahead + 1)) / by.half_life)
    weight /= weight.sum()
    span = streams.shape[1] - by.behind - by.ahead
    return sum(
        (float(kept) * known[:, at : at + span] for at, kept in enumerate(weight)),
        start=jnp.zeros_like(known[:, :span]),
    )
