# ruff: noqa: F722
"""The Flax network on the anchor's residuals. The only file of the library that imports Flax.

A residual perceptron over all cells of a window, modulated by noise level and entity (adaLN;
Peebles & Xie 2023). Its first layer is linear in the cells, so what it would see with one channel's
newest slots hidden is what it sees of the whole window less that channel's share: all D channels
are judged by all others in one pass, as a blind-spot network judges pixels (Laine et al. 2019,
arXiv:1901.10277). Parameters are a flat mapping from names to arrays, in training, in checkpoints
and in the bundle.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from tsdiff.config import ModelConfig, NetworkConfig
from tsdiff.precondition import bounded, c_noise

Params = Mapping[str, Array]
# Inputs in normalised units, beyond which another number says no more.
_FURTHEST = 8.0


class _Block(nnx.Module):
    """A residual step over features; scale and shift come from the condition."""

    def __init__(self, config: NetworkConfig, rngs: nnx.Rngs) -> None:
        width, wide = config.width, config.width * config.expand
        zeros = nnx.initializers.zeros_init()
        self.modulation = nnx.Linear(width, 2 * width, kernel_init=zeros, rngs=rngs)
        self.norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, rngs=rngs)
        self.widen = nnx.Linear(width, wide, rngs=rngs)
        self.narrow = nnx.Linear(wide, width, rngs=rngs)

    def __call__(self, h: Float[Array, "B *n F"], condition: Float[Array, "B F"]) -> Array:
        extra = (1,) * (h.ndim - condition.ndim)
        shape = (len(condition), *extra, -1)
        scale, shift = jnp.split(self.modulation(condition).reshape(shape), 2, -1)
        mixed = self.norm(h) * (1.0 + scale) + shift
        return h + self.narrow(nnx.gelu(self.widen(mixed)))


class _Perceptron(nnx.Module):
    """Windows -> residual and log-variance factor per cell."""

    def __init__(
        self, channels: int, rows: int, model: ModelConfig, config: NetworkConfig, rngs: nnx.Rngs
    ) -> None:
        cells, width = model.window * channels, config.width
        zeros = nnx.initializers.zeros_init()
        self.shape = (model.window, channels)
        self.values = nnx.Linear(cells, width, rngs=rngs)
        # Whose cells are hidden is told by what is not known: a few cells must make a difference.
        loud = nnx.initializers.normal(0.15)
        self.known = nnx.Linear(cells, width, use_bias=False, kernel_init=loud, rngs=rngs)
        self.stand_in = nnx.Linear(cells, width, use_bias=False, kernel_init=loud, rngs=rngs)
        self.noisy = nnx.Linear(cells, width, use_bias=False, kernel_init=zeros, rngs=rngs)
        self.entity = nnx.Embed(rows, config.entity_width, rngs=rngs)
        self.condition = nnx.Linear(config.entity_width + 3, width, rngs=rngs)
        self.blocks = nnx.List([_Block(config, rngs) for _ in range(config.blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        # Zero at first: training starts at the anchor.
        self.head = nnx.Linear(width, 2 * cells, kernel_init=zeros, rngs=rngs)

    def seen(self, values: Float[Array, "B L D"], known: Float[Array, "B L D"]) -> Array:
        """The first layer of what is conditioned, (B, F)."""
        flat = (len(values), -1)
        return self.values(values.reshape(flat)) + self.known(known.reshape(flat))

    def features(
        self, h: Float[Array, "B *n F"], sigma: Float[Array, " B"], rows: Int[Array, " B"]
    ) -> Array:
        """All but the first and the last layer."""
        level = c_noise(sigma)
        noise = jnp.stack([level, jnp.sin(3.0 * level), jnp.cos(3.0 * level)], -1)
        condition = nnx.gelu(self.condition(jnp.concatenate([self.entity(rows), noise], -1)))
        h = nnx.gelu(h)
        for block in self.blocks:
            h = block(h, condition)
        return jnp.asarray(self.norm(h))

    def newest(self, layer: nnx.Linear, last: int) -> Float[Array, "last D F"]:
        """Rows of a first layer for the newest slots."""
        return jnp.asarray(layer.kernel[...]).reshape(*self.shape, -1)[-last:]

    def __call__(
        self,
        values: Float[Array, "B L D"],
        known: Float[Array, "B L D"],
        stand_in: Float[Array, "B L D"],
        noisy: Float[Array, "B L D"],
        sigma: Float[Array, " B"],
        rows: Int[Array, " B"],
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        flat = (len(values), -1)
        h = self.seen(values, known) + self.stand_in(stand_in.reshape(flat))
        h = h + self.noisy(noisy.reshape(flat))
        out = self.head(self.features(h, sigma, rows)).reshape(-1, 2, *self.shape)
        return out[:, 0], bounded(out[:, 1])

    def each(
        self,
        values: Float[Array, "B L D"],
        known: Float[Array, "B L D"],
        stand_in: Float[Array, "B D h"],
        rows: Int[Array, " B"],
    ) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
        hidden = stand_in.shape[-1]
        h = self.seen(values, known)[:, None]
        # Terms one by one: as products of matrices, 4 cells long, they would take six times longer.
        for at in range(-hidden, 0):
            h = h - values[:, at, :, None] * self.newest(self.values, -at)[0]
            h = h - known[:, at, :, None] * self.newest(self.known, -at)[0]
            h = h + stand_in[:, :, at, None] * self.newest(self.stand_in, -at)[0]
        h = self.features(h, jnp.full(len(values), jnp.inf), rows)
        # Of each channel's features, the head for that channel's newest cell.
        head = jnp.asarray(self.head.kernel[...]).reshape(-1, 2, *self.shape)[:, :, -1]
        assert self.head.bias is not None  # noqa: S101 - as it was built
        bias = jnp.asarray(self.head.bias[...]).reshape(2, *self.shape)[:, -1]
        out = jnp.einsum("bdf,fkd->bkd", h, head) + bias
        return out[:, 0], bounded(out[:, 1])


@dataclass(frozen=True)
class Network:
    """The network's shape; `initialize` makes parameters, calling it applies them.

    Residuals and log-variances are in units of the anchor's s. `x` and `m` are relative to the
    anchor's mean: levels drift, and are the anchor's business. `rows`: -1 or the entity's row.
    """

    channels: int
    entities: int
    model: ModelConfig
    config: NetworkConfig

    def _module(self, seed: int) -> _Perceptron:
        return _Perceptron(
            self.channels, self.entities + 1, self.model, self.config, nnx.Rngs(seed)
        )

    def initialize(self, seed: int) -> dict[str, Array]:
        """Return parameters; the same seed gives the same."""
        state = nnx.state(self._module(seed), nnx.Param)
        leaves, _ = jax.tree_util.tree_flatten_with_path(state)
        return {_name(path): leaf for path, leaf in leaves}

    def _with(self, params: Params) -> _Perceptron:
        graph, abstract = nnx.split(nnx.eval_shape(lambda: self._module(0)), nnx.Param)
        leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
        state = jax.tree_util.tree_unflatten(tree, [params[_name(path)] for path, _ in leaves])
        return nnx.merge(graph, state)

    def _rows(self, rows: Int[Array, " B"]) -> Int[Array, " B"]:
        return jnp.where(rows < 0, self.entities, rows)

    def __call__(
        self,
        params: Params,
        x: Float[Array, "B L D"],
        m: Float[Array, "B L D"],
        conditioned: Bool[Array, "B L D"],
        hidden: Bool[Array, "B L D"],
        noisy: Float[Array, "B L D"],
        sigma: Float[Array, " B"],
        rows: Int[Array, " B"],
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """F's residual and log-variance for every cell, under any mask and noise level.

        `x` counts where `conditioned`; where `hidden`, the anchor's posterior mean `m` stands in
        and `noisy` is c_in times the noisy targets (0 where sigma is infinite).
        """
        return self._with(params)(
            jnp.where(conditioned, _bounded(x), 0.0),
            conditioned.astype(x.dtype),
            jnp.where(hidden, _bounded(m), 0.0),
            noisy,
            sigma,
            self._rows(rows),
        )

    def each(
        self,
        params: Params,
        x: Float[Array, "B L D"],
        m: Float[Array, "B D h"],
        observed: Bool[Array, "B L D"],
        rows: Int[Array, " B"],
    ) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
        """As calling it D times, each time with one channel's last h cells hidden, sigma infinite.

        `m` is the anchor's posterior mean of these cells. Returns every channel's last cell.
        """
        values = jnp.where(observed, _bounded(x), 0.0)
        known = observed.astype(x.dtype)
        return self._with(params).each(values, known, _bounded(m), self._rows(rows))


def _bounded(x: Array) -> Array:
    return jnp.clip(x, -_FURTHEST, _FURTHEST)


def _name(path: tuple[object, ...]) -> str:
    """`blocks.0.widen.kernel` from a path of the state."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
