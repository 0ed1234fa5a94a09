"""A forecasting network, the one baseline that is trained by gradients; see `train.baselines`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax import Array

from tsdiff.types import FloatArray
from tsdiff.windows import sliding

_CHUNK = 4096

Weights = dict[str, Array]


class CNN:
    """The squared error of a small convolutional network's forecast from the last 50 slots.

    DeepAnT (Munir et al. 2019) with TSB-AD-M's numbers: kernels of 3, 32 and 40 filters, each with
    ReLU and maximum pooling by 2, a dense layer of 40; Adam at 8e-4, batches of 128, the last
    fifth of the data to stop early. At most 3,000 steps.
    """

    seeded = True
    _steps, _every, _patience, _batch = 3000, 250, 3, 128

    def __init__(self, window: int = 50, filters: tuple[int, int] = (32, 40)) -> None:
        self.context, self._filters = window, filters
        self._weights: Weights = {}

    def fit(self, z: FloatArray, seed: int) -> None:
        """Train until the last fifth's error grows."""
        key_start, key_batches = jax.random.split(jax.random.key(seed))
        at = int(0.8 * len(z))
        series, held_out = jnp.asarray(z[:at]), z[at - self.context :]
        weights = self._start(key_start, z.shape[1])
        optimizer = optax.adam(optax.exponential_decay(8e-4, self._every, 0.9))
        state = optimizer.init(weights)

        @jax.jit
        def some_steps(weights: Weights, state: Any, key: Array) -> tuple[Weights, Any]:  # noqa: ANN401
            def step(carry: tuple[Weights, Any], key: Array) -> tuple[tuple[Weights, Any], None]:
                weights, state = carry
                first = jax.random.randint(key, (self._batch,), 0, len(series) - self.context)
                windows = series[first[:, None] + jnp.arange(self.context + 1)]
                slope = jax.grad(_squared_error)(weights, windows)
                updates, state = optimizer.update(slope, state)
                return (optax.apply_updates(weights, updates), state), None

            carry, _ = jax.lax.scan(step, (weights, state), jax.random.split(key, self._every))
            return carry

        best, self._weights, bad = np.inf, weights, 0
        for key in jax.random.split(key_batches, self._steps // self._every):
            weights, state = some_steps(weights, state, key)
            error = float(self._errors(weights, held_out).mean())
            bad = 0 if error < best else bad + 1
            if error < best:
                best, self._weights = error, weights
            elif bad >= self._patience:
                break

    def _start(self, key: Array, channels: int) -> Weights:
        pooled = ((self.context - 2) // 2 - 2) // 2
        one, two = self._filters
        shapes = {
            "first": (3 * channels, one),
            "second": (3 * one, two),
            "dense": (pooled * two, 40),
            "last": (40, channels),
        }
        keys = jax.random.split(key, len(shapes))
        weights: Weights = {}
        for (name, shape), own in zip(shapes.items(), keys, strict=True):
            weights[name] = jax.random.normal(own, shape) * (2.0 / shape[0]) ** 0.5
            weights[name + "_bias"] = jnp.zeros(shape[1])
        return weights

    def _errors(self, weights: Weights, z: FloatArray) -> FloatArray:
        """Squared errors (N - context, D) of the slots that have a whole context."""
        windows = sliding(z, self.context + 1)
        parts = []
        for start in range(0, len(windows), _CHUNK):
            part = windows[start : start + _CHUNK]
            # One shape, compiled once.
            padded = np.pad(part, ((0, _CHUNK - len(part)), (0, 0), (0, 0)))
            parts.append(np.asarray(_errors(weights, padded))[: len(part)])
        return np.concatenate(parts)

    def score(self, z: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Take the mean over channels of the forecast's squared errors."""
        padded = np.concatenate([np.repeat(z[:1], self.context, 0), z])
        squares = self._errors(self._weights, padded)
        return squares.mean(1), squares


def _forecast(weights: Weights, x: Array) -> Array:
    """Forecast the slot after each window (B, L, D)."""
    for name in ("first", "second"):
        # A convolution as a product: inside a loop XLA has no fast one for this kind of machine.
        taps = jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], -1)
        x = jax.nn.relu(taps @ weights[name] + weights[name + "_bias"][None, None])
        x = x[:, : x.shape[1] // 2 * 2].reshape(len(x), -1, 2, x.shape[2]).max(2)
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ weights["dense"] + weights["dense_bias"][None])
    return jnp.asarray(x @ weights["last"] + weights["last_bias"][None])


@jax.jit
def _errors(weights: Weights, windows: Array) -> Array:
    error = _forecast(weights, windows[:, :-1]) - windows[:, -1]
    return jnp.square(error)


def _squared_error(weights: Weights, windows: Array) -> Array:
    return jnp.mean(_errors(weights, windows))
