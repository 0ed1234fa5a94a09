# ruff: noqa: F722
"""The Flax network on the anchor's residuals. The only file of the library that imports Flax.

A mixer (Tolstikhin et al. 2021) over tokens of several slots, modulated by noise level and entity
(adaLN; Peebles & Xie 2023). Values enter relative to the mean of what was observed of the window,
since levels drift and are the anchor's business. Parameters are a flat mapping from names to
arrays, in training, in checkpoints and in the bundle.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from tsdiff.config import ModelConfig, NetworkConfig
from tsdiff.errors import ConfigError
from tsdiff.precondition import bounded, c_noise

Params = Mapping[str, Array]


class _Block(nnx.Module):
    """Mix tokens, then features; scales and shifts come from the condition."""

    def __init__(self, tokens: int, config: NetworkConfig, rngs: nnx.Rngs) -> None:
        width, wide = config.width, config.width * config.expand
        zeros = nnx.initializers.zeros_init()
        self.modulation = nnx.Linear(width, 4 * width, kernel_init=zeros, rngs=rngs)
        self.norm_tokens = nnx.LayerNorm(width, use_bias=False, use_scale=False, rngs=rngs)
        self.norm_features = nnx.LayerNorm(width, use_bias=False, use_scale=False, rngs=rngs)
        self.tokens_in = nnx.Linear(tokens, tokens * config.expand, rngs=rngs)
        self.tokens_out = nnx.Linear(tokens * config.expand, tokens, rngs=rngs)
        self.features_in = nnx.Linear(width, wide, rngs=rngs)
        self.features_out = nnx.Linear(wide, width, rngs=rngs)

    def __call__(self, h: Float[Array, "B T F"], condition: Float[Array, "B F"]) -> Array:
        scale_t, shift_t, scale_f, shift_f = jnp.split(self.modulation(condition)[:, None], 4, -1)
        mixed = (self.norm_tokens(h) * (1.0 + scale_t) + shift_t).transpose(0, 2, 1)
        h = h + self.tokens_out(nnx.gelu(self.tokens_in(mixed))).transpose(0, 2, 1)
        mixed = self.norm_features(h) * (1.0 + scale_f) + shift_f
        return h + self.features_out(nnx.gelu(self.features_in(mixed)))


class _Mixer(nnx.Module):
    """Windows -> residual and log-variance factor per cell of the last slots."""

    def __init__(
        self, channels: int, rows: int, model: ModelConfig, config: NetworkConfig, rngs: nnx.Rngs
    ) -> None:
        self.patch = config.patch
        cells = config.patch * channels
        width = config.width
        zeros = nnx.initializers.zeros_init()
        self.embed = nnx.Linear(2 * cells, width, rngs=rngs)
        self.embed_noisy = nnx.Linear(cells, width, use_bias=False, kernel_init=zeros, rngs=rngs)
        self.entity = nnx.Embed(rows, config.entity_width, rngs=rngs)
        self.condition = nnx.Linear(config.entity_width + 3, width, rngs=rngs)
        tokens = model.window // config.patch
        self.blocks = nnx.List([_Block(tokens, config, rngs) for _ in range(config.blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        # Zero at first: training starts at the anchor.
        self.head = nnx.Linear(width, 2 * cells, kernel_init=zeros, rngs=rngs)

    def __call__(
        self,
        values: Float[Array, "B L D"],
        conditioned: Bool[Array, "B L D"],
        noisy: Float[Array, "B L D"] | None,
        sigma: Float[Array, " B"],
        rows: Int[Array, " B"],
        last: int,
    ) -> tuple[Float[Array, "B last D"], Float[Array, "B last D"]]:
        batch, _, channels = values.shape

        def tokens(x: Array) -> Array:
            return x.reshape(batch, -1, self.patch * channels)

        known = conditioned.astype(values.dtype)
        h = self.embed(jnp.concatenate([tokens(values), tokens(known)], -1))
        if noisy is not None:
            h = h + self.embed_noisy(tokens(noisy))
        level = c_noise(sigma)
        noise = jnp.stack([level, jnp.sin(3.0 * level), jnp.cos(3.0 * level)], -1)
        condition = nnx.gelu(self.condition(jnp.concatenate([self.entity(rows), noise], -1)))
        for block in self.blocks:
            h = block(h, condition)
        out = self.head(self.norm(h[:, -(last // self.patch) :]))
        residual, log_variance = jnp.split(out, 2, -1)
        shape = (batch, last, channels)
        return residual.reshape(shape), bounded(log_variance.reshape(shape))


@dataclass(frozen=True)
class Network:
    """The network's shape; `initialize` makes parameters, calling it applies them."""

    channels: int
    entities: int
    model: ModelConfig
    config: NetworkConfig

    def __post_init__(self) -> None:
        patch = self.config.patch
        for name in ("window", "anchor_window", "hidden"):
            if getattr(self.model, name) % patch:
                raise ConfigError(
                    f"expected {name} to be a multiple of the network's patch of {patch} slots, "
                    f"got {getattr(self.model, name)}"
                )

    def _module(self, seed: int) -> _Mixer:
        return _Mixer(self.channels, self.entities + 1, self.model, self.config, nnx.Rngs(seed))

    def initialize(self, seed: int) -> dict[str, Array]:
        """Return parameters; the same seed gives the same."""
        state = nnx.state(self._module(seed), nnx.Param)
        leaves, _ = jax.tree_util.tree_flatten_with_path(state)
        return {_name(path): leaf for path, leaf in leaves}

    def __call__(
        self,
        params: Params,
        x: Float[Array, "B L D"],
        m: Float[Array, "B A D"],
        conditioned: Bool[Array, "B L D"],
        noisy: Float[Array, "B L D"] | None,
        sigma: Float[Array, " B"],
        rows: Int[Array, " B"],
        *,
        last: int,
    ) -> tuple[Float[Array, "B last D"], Float[Array, "B last D"]]:
        """F's residual and log-variance for the last `last` slots, in units of the anchor's s.

        `x` are the conditioned values (ignored elsewhere), `m` the anchor's posterior mean of the
        last A slots, which stands in for what is not conditioned; `noisy` is c_in times the noisy
        targets (None: sigma is infinite everywhere). `rows`: -1 or the entity's row.
        """
        count = conditioned.sum(1, keepdims=True)
        level = jnp.where(conditioned, x, 0.0).sum(1, keepdims=True) / jnp.maximum(count, 1)
        inside = m.shape[1]
        stand_in = jnp.pad(m - level, ((0, 0), (x.shape[1] - inside, 0), (0, 0)))
        values = jnp.where(conditioned, x - level, stand_in)
        graph, abstract = nnx.split(nnx.eval_shape(lambda: self._module(0)), nnx.Param)
        leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
        state = jax.tree_util.tree_unflatten(tree, [params[_name(path)] for path, _ in leaves])
        mixer = nnx.merge(graph, state)
        known = jnp.where(rows < 0, self.entities, rows)
        return mixer(values, conditioned, noisy, sigma, known, last)


def _name(path: tuple[object, ...]) -> str:
    """`blocks.0.tokens_in.kernel` from a path of the state."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
