# ruff: noqa: F722  (jaxtyping's shapes are strings, not forward references)
"""Array aliases and the functions that parts of the model pass to one another.

Axes: B windows, L slots of a window, D channels, N = L*D cells of a flattened window (slot-major:
cell = slot * D + channel), K rank of the anchor, E entities, T slots of a span, S streams.
"""

from typing import Protocol

import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
DoubleArray = NDArray[np.float64]
IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


class DenoiseFn(Protocol):
    """E[x | x_sigma] and its standard deviation, per cell: the conditional denoiser."""

    def __call__(
        self, x: Float[Array, "B N"], noise_variance: Float[Array, "B N"]
    ) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
        """Denoise `x`; `noise_variance` is 0 for conditioned cells, inf where nothing is known."""
        ...


class ScoreFn(Protocol):
    """The gradient of log p(x; sigma) with respect to x."""

    def __call__(self, x: Float[Array, "B N"], sigma: Float[Array, " B"]) -> Float[Array, "B N"]:
        """Return the score at `x`."""
        ...
