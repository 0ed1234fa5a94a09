# ruff: noqa: F722
"""Many small symmetric systems at once, in plain array operations.

XLA hands batched LAPACK calls to its thread pool one matrix at a time: on two cores a triangular
solve of 256 systems of rank 64 took half a second, and inside a loop it never came back (jaxlib
0.10). Here the batch is the innermost axis, so that every operation is one vector over windows.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

_PIVOT = 4
_TINY = 1e-6  # a pivot of a matrix that float32 can tell from a singular one is larger


def _invert_pivot(a: Float[Array, "q q B"]) -> Float[Array, "q q B"]:
    """Gauss-Jordan without pivoting (safe for positive definite matrices), unrolled."""
    size = a.shape[0]
    left = [[a[i, j] for j in range(size)] for i in range(size)]
    for p in range(size):
        inverse = 1.0 / jnp.maximum(left[p][p], _TINY)
        row = [inverse if j == p else left[p][j] * inverse for j in range(size)]
        for i in range(size):
            if i == p:
                continue
            factor = left[i][p]
            left[i] = [
                -factor * inverse if j == p else left[i][j] - factor * row[j] for j in range(size)
            ]
        left[p] = row
    return jnp.stack([jnp.stack(row) for row in left])


def invert(a: Float[Array, "K K B"]) -> Float[Array, "K K B"]:
    """Inverses of symmetric positive definite matrices: the sweep operator on blocks of pivots.

    Goodnight 1979 (The American Statistician 33), equation for the SWEEP operator. Sweeping every
    pivot turns A into -A^-1.
    """
    size, batch = a.shape[0], a.shape[-1]
    short = -size % _PIVOT
    if short:
        a = jnp.pad(a, ((0, short), (0, short), (0, 0)))
        index = jnp.arange(size, size + short)
        a = a.at[index, index].set(1.0)
    total = size + short

    def sweep(step: Array | int, swept: Array) -> Array:
        start = step * _PIVOT
        rows = jax.lax.dynamic_slice(swept, (start, 0, 0), (_PIVOT, total, batch))
        pivot = jax.lax.dynamic_slice(rows, (0, start, 0), (_PIVOT, _PIVOT, batch))
        inverse = _invert_pivot(pivot)
        scaled = jnp.zeros_like(rows)
        for q in range(_PIVOT):
            scaled = scaled + inverse[:, q, None] * rows[None, q]
        result = swept
        for q in range(_PIVOT):
            result = result - rows[q, :, None] * scaled[q, None, :]
        result = jax.lax.dynamic_update_slice(result, scaled, (start, 0, 0))
        result = jax.lax.dynamic_update_slice(result, scaled.transpose(1, 0, 2), (0, start, 0))
        return jax.lax.dynamic_update_slice(result, -inverse, (start, start, 0))

    swept: Array = jax.lax.fori_loop(0, total // _PIVOT, sweep, a)
    return -swept[:size, :size]
