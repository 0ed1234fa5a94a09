# ruff: noqa: F722
"""The mask bank: which cells of a window are hidden, the same in training and in scoring.

A mask is True where a cell is hidden (a target); `conditioned = observed & ~hidden`. In pictures
(rows are channels, time runs to the right, # is hidden):

    none     last-k   grating A  grating B  group    random
    ......   ....##   ##..##     ..##..     ######   .#...#
    ......   ....##   ##..##     ..##..     ......   #..#..
    ......   ....##   ##..##     ..##..     ######   ...#.#
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, PRNGKeyArray

NAMES = ("none", "last", "grating_a", "grating_b", "group", "random")


def none(length: int, channels: int) -> Bool[Array, "L D"]:
    """Hide nothing: every cell is a noisy target."""
    return jnp.zeros((length, channels), bool)


def last(length: int, channels: int, hidden: int) -> Bool[Array, "L D"]:
    """Hide the last `hidden` slots of every channel: forecasting."""
    return jnp.broadcast_to((jnp.arange(length) >= length - hidden)[:, None], (length, channels))


def grating(length: int, channels: int, stripe: int, phase: int) -> Bool[Array, "L D"]:
    """Hide stripes of `stripe` slots; phases 0 and 1 complement one another.

    The newest stripe is hidden in phase 0.
    """
    from_end = length - 1 - jnp.arange(length)
    return jnp.broadcast_to(((from_end // stripe) % 2 == phase)[:, None], (length, channels))


def group(key: PRNGKeyArray, length: int, channels: int) -> Bool[Array, "L D"]:
    """Hide a random half of the channels, all the time: cross-channel imputation."""
    chosen = jax.random.bernoulli(key, 0.5, (channels,))
    return jnp.broadcast_to(chosen[None, :], (length, channels))


def random_cells(key: PRNGKeyArray, length: int, channels: int) -> Bool[Array, "L D"]:
    """Hide a random fifth of the cells."""
    return jax.random.bernoulli(key, 0.2, (length, channels))
