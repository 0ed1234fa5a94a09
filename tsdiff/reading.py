# ruff: noqa: F722
"""The bundle's arrays as a model, and spans of normalised slots read by it.

Shared by the detector and by training's calibration, so that the two cannot drift apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from tsdiff import scorers, slow
from tsdiff.anchor import (
    Anchor,
    Whitened,
    anchor_index,
    gram,
    latent_variance,
    masked_reading,
    posterior,
    solve,
    turn,
    whiten,
)
from tsdiff.bundle import Bundle
from tsdiff.calibration import SCORERS
from tsdiff.config import ModelConfig
from tsdiff.flags import Flags, sensors
from tsdiff.precondition import denoised
from tsdiff.scorers import Readings, Told
from tsdiff.types import DenoiseFn, DoubleArray
from tsdiff.windows import gather

_NETWORK = "network."
# Windows read at a time: their 16 x 38 cells and what is made of them stay in the cache. Slow
# scorers make some dozen copies of each.
_CHUNK, _SLOW_CHUNK = 256, 32


class NetworkFn(Protocol):
    """As `tsdiff.denoiser.Network`, which only a bundle with a network imports."""

    def __call__(
        self,
        params: Mapping[str, Array],
        x: Array,
        m: Array,
        conditioned: Array,
        hidden: Array,
        noisy: Array,
        sigma: Array,
        rows: Array,
    ) -> tuple[Array, Array]:
        """Residual and log-variance of every cell, under any mask and noise level."""
        ...

    def each(
        self,
        params: Mapping[str, Array],
        x: Array,
        m: Array,
        observed: Array,
        rows: Array,
    ) -> tuple[Array, Array]:
        """Residual and log-variance of every channel's last cell, with its own last ones hidden."""
        ...


class Whitenings(NamedTuple):
    """An anchor as it is read: at no noise, at the reading's noise level, and looking ahead.

    `clean` is at no noise, `products` its `anchor.gram`; `to_noisy` and `to_head` (K, K) turn its
    loadings to those of the reading's noise level, which does without flags, and of the slots that
    stay visible when the last ones are hidden.
    """

    clean: Whitened
    products: Float[Array, "h h D"]
    to_noisy: Float[Array, "K K"]
    to_head: Float[Array, "K K"]

    def noisy(self, sigma: float, flags: Flags) -> Whitened:
        """Return the anchor of all but the flags' cells at noise level `sigma`.

        They and it are those that it was made for.
        """
        scale = jnp.sqrt(self.clean.scale**2 + sigma**2)
        seen = sensors(flags, len(scale) // len(flags))
        weight = jnp.where(seen, self.clean.scale / scale, 0.0)
        return self.clean._replace(scale=scale, weight=weight, turn=self.to_noisy)

    def head(self, channels: int, hidden: int) -> Whitened:
        """Return the anchor of all but the last slots, whose cells say nothing."""
        cells = self.clean.mean.shape[0]
        visible = jnp.arange(cells) < cells - hidden * channels
        return self.clean._replace(weight=visible.astype(jnp.float32), turn=self.to_head)


class Model(NamedTuple):
    """A anchors (every field with a leading axis), and the network's parameters, if any."""

    anchors: Whitenings
    params: Mapping[str, Array] | None


def whitenings(
    mean: DoubleArray,
    loadings: DoubleArray,
    noise: DoubleArray,
    flags: Flags,
    config: ModelConfig,
) -> Whitenings:
    """Prepare one anchor (N,), (N, K), (N,) of D channels, some of them flags, for serving."""
    clean = whiten(mean, loadings, noise, 0.0)
    head = np.arange(len(mean)) < len(flags) * (config.window - config.hidden)
    return Whitenings(
        clean,
        gram(clean.loadings, len(flags), config.hidden),
        to_noisy=turn(loadings, noise, sensors(flags, config.window), config.sigma),
        to_head=turn(loadings, noise, head),
    )


def make_model(
    mean: DoubleArray,
    loadings: DoubleArray,
    noise: DoubleArray,
    flags: Flags,
    config: ModelConfig,
    params: Mapping[str, Array] | None = None,
) -> Model:
    """Prepare anchors (A, N), (A, N, K), (A, N) and a network for serving (in float64 first)."""
    parts = zip(mean, loadings, noise, strict=True)
    each = [whitenings(*part, flags=flags, config=config) for part in parts]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    arrays = None if params is None else {name: jnp.asarray(part) for name, part in params.items()}
    return Model(stacked, arrays)


@dataclass(frozen=True)
class Reader:
    """What is static of a model: compile once for each.

    `flags` are the channels that are on or off (`tsdiff.flags`). `network_weight` is the network's
    gate, `unexplained` the share of the anchor's held-out loss that is left with it. `slow` is the
    slow scorer whose evidence is the only stream; None: the streams of the fast ones.
    """

    config: ModelConfig
    flags: Flags
    network: NetworkFn | None = None
    network_weight: float = 0.0
    unexplained: float = 1.0
    slow: str | None = None

    @property
    def scorers(self) -> tuple[str, ...]:
        """Those that read it in this way, and so share tables (`Calibration`), in their order."""
        return SCORERS if self.slow is None else (self.slow,)


def build_model(bundle: Bundle, slow: str | None = None) -> tuple[Model, Reader]:
    """Prepare the bundle's model. Flax is imported only if the bundle has a network.

    Raises:
        KeyError: an array is missing.

    """
    manifest = bundle.manifest
    parts = [
        bundle.arrays[f"anchor.{name}"].astype(np.float64) for name in ("mean", "loadings", "noise")
    ]
    params, network = None, None
    if manifest.network is not None:
        params = {
            name.removeprefix(_NETWORK): jnp.asarray(array)
            for name, array in bundle.arrays.items()
            if name.startswith(_NETWORK)
        }
        network = import_module("tsdiff.denoiser").Network(
            len(bundle.channels), len(bundle.entities), manifest.model, manifest.network
        )
    model = make_model(parts[0], parts[1], parts[2], bundle.flags, manifest.model, params)
    return model, Reader(
        manifest.model,
        bundle.flags,
        network,
        manifest.network_weight,
        manifest.network_unexplained,
        slow,
    )


def read_spans(
    model: Model,
    z: Float[Array, "E M D"],
    rows: Int[Array, " E"],
    reader: Reader,
    *,
    missing: int | None,
) -> Readings:
    """Read the window ending at each of the last T = M - W + 1 slots, normalised, NaN missing.

    `missing` as in `anchor.solve`. Every field comes back as (E, T, ...). With one anchor for all,
    the windows of all entities are one batch; else each entity's are read by its own anchor.
    """
    count = model.anchors.clean.mean.shape[0]
    if count == 1:
        shared = jax.tree.map(lambda part: part[0], model.anchors)
        return _read(shared, model.params, z, rows, reader, missing)
    index = anchor_index(rows, count)
    own = jax.tree.map(lambda part: part[index], model.anchors)

    def one(anchor: Whitenings, z: Array, row: Array) -> Readings:
        found = _read(anchor, model.params, z[None], row[None], reader, missing)
        return Readings(*(part[0] for part in found))

    return Readings(*jax.vmap(one)(own, z, rows))


def _read(
    anchor: Whitenings,
    params: Mapping[str, Array] | None,
    z: Float[Array, "E M D"],
    rows: Int[Array, " E"],
    reader: Reader,
    missing: int | None,
) -> Readings:
    config = reader.config
    entities, slots, _ = z.shape
    span = slots - config.window + 1
    entity = jnp.repeat(jnp.arange(entities), span)
    end = jnp.tile(jnp.arange(span), entities) + config.window
    plain = None if reader.slow is None else anchor.clean.anchor()

    def read(index: tuple[Array, Array]) -> Readings:
        of, stop = index
        window = gather(z, of, stop - config.window, config.window)
        observed = jnp.isfinite(window)
        x = jnp.where(observed, window, 0.0)
        imputed = _impute(anchor, params, x, observed, rows[of], reader, missing)
        if reader.slow is not None and plain is not None:
            denoise = _denoiser(plain, params, rows[of], reader)
            cells = slow.read(reader.slow, denoise, window)
            return scorers.read_slow(cells, observed, imputed, reader.flags)
        forecast = _forecast(anchor, x, observed, config, missing)
        return scorers.read(
            anchor.noisy(config.sigma, reader.flags),
            x,
            observed,
            forecast,
            imputed,
            config.sigma,
            reader.unexplained,
            reader.flags,
            missing=missing,
        )

    total, chunk = entities * span, _CHUNK if reader.slow is None else _SLOW_CHUNK
    if total <= chunk:
        found = read((entity, end))
    else:
        short = -total % chunk
        padded = (jnp.pad(entity, (0, short)), jnp.pad(end, (0, short), mode="edge"))
        pieces = jax.lax.map(read, tuple(part.reshape(-1, chunk) for part in padded))
        found = Readings(*(part.reshape(-1, *part.shape[2:])[:total] for part in pieces))
    return Readings(*(part.reshape(entities, span, *part.shape[1:]) for part in found))


def _forecast(
    anchor: Whitenings,
    x: Float[Array, "B L D"],
    observed: Bool[Array, "B L D"],
    config: ModelConfig,
    missing: int | None,
) -> Told:
    """What the window says of the last slot with the last slots hidden, sigma to infinity."""
    batch, _, channels = x.shape
    flat, seen = x.reshape(batch, -1), observed.reshape(batch, -1)
    head = solve(anchor.head(channels, config.hidden), flat, seen, missing=missing)
    ahead = anchor.clean.last(channels) @ anchor.to_head
    mean, scale = anchor.clean.mean[-channels:], anchor.clean.scale[-channels:]
    told = mean + scale * (head.latent @ ahead.T)
    s = scale * jnp.sqrt(1.0 + latent_variance(head, ahead))
    return Told(told, jnp.broadcast_to(s, told.shape))


def _impute(
    anchor: Whitenings,
    params: Mapping[str, Array] | None,
    x: Float[Array, "B L D"],
    observed: Bool[Array, "B L D"],
    rows: Int[Array, " B"],
    reader: Reader,
    missing: int | None,
) -> Told:
    """What the window says of each channel's last cell with that channel's last cells hidden."""
    flat, seen = x.reshape(len(x), -1), observed.reshape(len(x), -1)
    solved = solve(anchor.clean, flat, seen, missing=missing)
    masked = masked_reading(anchor.clean, anchor.products, solved, seen)
    if reader.network is None or params is None:
        return Told(masked.expected, masked.sd)
    mean = anchor.clean.mean.reshape(x.shape[1:])
    about = masked.hidden - mean[-reader.config.hidden :].T
    residual, log_variance = reader.network.each(params, x - mean, about, observed, rows)
    return Told(
        *denoised(masked.expected, masked.sd, residual, log_variance, reader.network_weight)
    )


def make_denoiser(bundle: Bundle) -> DenoiseFn:
    """The bundle's denoiser for any mask and noise levels, of entities never seen.

    For samplers and for `evidence`: windows are (B, L D) in normalised units. Of noise levels
    above 0 and below infinity a window may have one.
    """
    model, reader = build_model(bundle)
    anchor = Anchor(
        # The last one is the pooled one.
        *(jnp.asarray(bundle.arrays[f"anchor.{name}"][-1], jnp.float32) for name in Anchor._fields)
    )
    return _denoiser(anchor, model.params, None, reader)


def _denoiser(
    anchor: Anchor,
    params: Mapping[str, Array] | None,
    rows: Int[Array, " B"] | None,
    reader: Reader,
) -> DenoiseFn:
    """As `make_denoiser` says; `rows` are those of the windows' entities, None: never seen."""
    channels = anchor.mean.shape[0] // reader.config.window
    shape = (-1, reader.config.window, channels)

    def denoise(
        x: Float[Array, "B N"], noise_variance: Float[Array, "B N"]
    ) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
        m, s = posterior(anchor, x, noise_variance)
        if reader.network is None or params is None:
            return m, s
        noisy = jnp.isfinite(noise_variance) & (noise_variance > 0)
        level = jnp.sqrt(jnp.where(noisy, noise_variance, 0.0).max(1))
        centred = (x - anchor.mean) / jnp.sqrt(anchor.noise + level[:, None] ** 2)
        residual, log_variance = reader.network(
            params,
            (x - anchor.mean).reshape(shape),
            (m - anchor.mean).reshape(shape),
            (noise_variance == 0).reshape(shape),
            (noise_variance > 0).reshape(shape),
            jnp.where(noisy, centred, 0.0).reshape(shape),
            # Without any noisy cell, the hidden ones say nothing.
            jnp.where(noisy.any(1), level, jnp.inf),
            jnp.full(len(x), -1) if rows is None else rows,
        )
        return denoised(
            m, s, residual.reshape(x.shape), log_variance.reshape(x.shape), reader.network_weight
        )

    return denoise
