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

from tsdiff.anchor import (
    Whitened,
    anchor_index,
    latent_variance,
    solve,
    whiten,
    whiten_with_basis,
)
from tsdiff.bundle import Bundle
from tsdiff.config import ModelConfig
from tsdiff.precondition import denoised
from tsdiff.scorers import Readings, read_anchor, with_forecast
from tsdiff.types import DoubleArray
from tsdiff.windows import gather

_NETWORK = "network."
# Windows read at a time: their 16 x 38 cells and what is made of them stay in the cache.
_CHUNK = 256


class NetworkFn(Protocol):
    """The network's residual and log-variance for the last slots (`tsdiff.denoiser.Network`)."""

    def __call__(
        self,
        params: Mapping[str, Array],
        x: Array,
        m: Array,
        conditioned: Array,
        noisy: Array | None,
        sigma: Array,
        rows: Array,
        *,
        last: int,
    ) -> tuple[Array, Array]:
        """Apply it."""
        ...


class Forecaster(NamedTuple):
    """The anchor of the slots that stay visible when the last ones are hidden.

    `head` is the anchor of all but the last `hidden` slots, `ahead` (C, K) the loadings of the
    hidden cells in its basis, `mean`, `noise` (C,) theirs.
    """

    head: Whitened
    ahead: Float[Array, "C K"]
    mean: Float[Array, " C"]
    noise: Float[Array, " C"]


class Whitenings(NamedTuple):
    """An anchor as it is read: at the reading's noise level, at none, and looking ahead."""

    noisy: Whitened
    clean: Whitened
    forecaster: Forecaster


class Model(NamedTuple):
    """A anchors (every field with a leading axis), and the network's parameters, if any."""

    anchors: Whitenings
    params: Mapping[str, Array] | None


def whitenings(
    mean: DoubleArray, loadings: DoubleArray, noise: DoubleArray, config: ModelConfig
) -> Whitenings:
    """Prepare one anchor (N,), (N, K), (N,) for serving."""
    visible = len(mean) * (config.anchor_window - config.hidden) // config.anchor_window
    head, basis = whiten_with_basis(mean[:visible], loadings[:visible], noise[:visible], sigma=0.0)
    return Whitenings(
        noisy=whiten(mean, loadings, noise, config.sigma),
        clean=whiten(mean, loadings, noise, 0.0),
        forecaster=Forecaster(
            head,
            jnp.asarray(loadings[visible:] @ basis, jnp.float32),
            jnp.asarray(mean[visible:], jnp.float32),
            jnp.asarray(noise[visible:], jnp.float32),
        ),
    )


def make_model(
    mean: DoubleArray,
    loadings: DoubleArray,
    noise: DoubleArray,
    config: ModelConfig,
    params: Mapping[str, Array] | None = None,
) -> Model:
    """Prepare anchors (A, N), (A, N, K), (A, N) and a network for serving (in float64 first)."""
    each = [whitenings(*parts, config=config) for parts in zip(mean, loadings, noise, strict=True)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    arrays = None if params is None else {name: jnp.asarray(part) for name, part in params.items()}
    return Model(stacked, arrays)


@dataclass(frozen=True)
class Reader:
    """What is static of a model: compile once for each."""

    config: ModelConfig
    network: NetworkFn | None = None
    network_weight: float = 0.0


def build_model(bundle: Bundle) -> tuple[Model, Reader]:
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
    model = make_model(parts[0], parts[1], parts[2], manifest.model, params)
    return model, Reader(manifest.model, network, manifest.network_weight)


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
    count = model.anchors.noisy.mean.shape[0]
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

    def read(index: tuple[Array, Array]) -> Readings:
        of, stop = index
        length = config.anchor_window if reader.network is None else config.window
        window = gather(z, of, stop - length, length)
        observed = jnp.isfinite(window)
        x = jnp.where(observed, window, 0.0)
        inside, seen = x[:, -config.anchor_window :], observed[:, -config.anchor_window :]
        found = read_anchor(anchor.noisy, anchor.clean, inside, seen, config, missing=missing)
        expected, sd = _forecast(anchor.forecaster, params, x, observed, rows[of], reader, missing)
        return with_forecast(found, x[:, -1], observed[:, -1], expected, sd)

    total = entities * span
    if total <= _CHUNK:
        found = read((entity, end))
    else:
        short = -total % _CHUNK
        padded = (jnp.pad(entity, (0, short)), jnp.pad(end, (0, short), mode="edge"))
        pieces = jax.lax.map(read, tuple(part.reshape(-1, _CHUNK) for part in padded))
        found = Readings(*(part.reshape(-1, *part.shape[2:])[:total] for part in pieces))
    return Readings(*(part.reshape(entities, span, *part.shape[1:]) for part in found))


def _forecast(
    forecaster: Forecaster,
    params: Mapping[str, Array] | None,
    x: Float[Array, "B L D"],
    observed: Bool[Array, "B L D"],
    rows: Int[Array, " B"],
    reader: Reader,
    missing: int | None,
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """Mean and sd of the last slot with the last slots hidden, sigma to infinity, in one step."""
    config = reader.config
    batch, _, channels = x.shape
    inside = slice(-config.anchor_window, -config.hidden)
    head = solve(
        forecaster.head,
        x[:, inside].reshape(batch, -1),
        observed[:, inside].reshape(batch, -1),
        missing=missing,
    )
    hidden = (forecaster.mean + head.latent @ forecaster.ahead.T).reshape(batch, -1, channels)
    spread = latent_variance(head, forecaster.ahead[-channels:])
    s = jnp.sqrt(forecaster.noise[-channels:] + spread)
    if reader.network is None or params is None:
        return hidden[:, -1], jnp.broadcast_to(s, hidden[:, -1].shape)
    m = jnp.concatenate([jnp.where(observed[:, inside], x[:, inside], 0.0), hidden], 1)
    visible = jnp.arange(config.window) < config.window - config.hidden
    conditioned = observed & visible[:, None]
    residual, log_variance = reader.network(
        params,
        x,
        m,
        conditioned,
        None,
        jnp.full(batch, jnp.inf),
        rows,
        last=config.hidden,
    )
    return denoised(hidden[:, -1], s, residual[:, -1], log_variance[:, -1], reader.network_weight)
