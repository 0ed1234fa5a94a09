# ruff: noqa: F722
"""What goes on learning from the stream: an entity's levels, or all of its second moments.

`learn` turns the state of one entity and a block of its slots into its next state. States are
float32 vectors that nobody changes, None before the first block; so the same blocks give the same
states, live, in a backfill and after a restart. Calm slots teach, others next to nothing, and what
was taught fades by half in `HALF_LIFE` of them (exponential forgetting).

Calm is what is as usual as most of the held-out slots were. Beyond this limit a slot counts for
less the stranger it is, as in M-estimation: Huber's weight, limit / evidence (Huber 1964, Annals of
Mathematical Statistics 35), to the power of `_DOUBT`. So a fault teaches nothing, and a normal that
is a little stranger than it was is learned at once.

Where hardly anything is calm any more, normal has changed by more, and who waited for the old one
to come back would never learn the new one. So the limit widens while fewer than `_CALM_SHARE` of
the slots are calm, and narrows while more are, down to where it began: the online update of
adaptive conformal inference (Gibbs & Candes 2021, arXiv:2106.00170, eq. 2), in its logarithm.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from tsdiff.anchor import refit_anchor
from tsdiff.bundle import Bundle
from tsdiff.calibration import SCORERS, tables_of
from tsdiff.config import MOST_FULL, SLOW_SCORERS, Adapt
from tsdiff.moments import Moments, lag_sums
from tsdiff.normalize import normalize
from tsdiff.reading import Model, Whitenings, whitenings
from tsdiff.season import harmonics, means_of_slots
from tsdiff.types import DoubleArray, FloatArray, IntArray

# Beside `MOST_FULL` entities, so many channels: 640 KB of state alone.
_MOST_CHANNELS = 100
HALF_LIFE = 5000.0
_SELDOM = 0.1  # share of the calm slots below which a pair of cells was hardly seen
_DOUBT = 12.0  # beyond the limit a slot counts for half with every sixteenth
_CALM_SHARE = 0.25
# Of the limit's logarithm, a slot: where nothing is calm it doubles in 4,000 slots. In half of that
# faults of half a day were learned (SMD).
_WIDENING = 0.0007
# Levels are a mean: it may not be drawn far by what was taken for calm, but is not.
_FURTHEST = 10.0


class Adaptation(ABC):
    """How entities learn.

    Attributes:
        block: slots that are learned from at a time.
        context: slots before them that are needed besides.
        size: length of a state, float32; the last number is the logarithm of how much wider than at
            first the limit of calm slots is.
        key: names the bundle and the kind of state; another's states mean nothing.

    """

    block: ClassVar[int]
    context: int
    size: int

    def __init__(self, bundle: Bundle, scorer: str) -> None:
        fitted = tables_of(bundle.arrays, scorer)
        # The 98th percentiles of reconstruction and density (or a slow scorer's own), without lag,
        # as they are.
        self._usual = np.asarray(fitted.knots[:, 0, : min(fitted.neutral.shape[1], 2), -1])
        # What is calm depends on whose streams are asked.
        asked = f":{scorer}" if scorer in SLOW_SCORERS else ""
        self.key = f"{type(self).__name__.lower()}:{bundle.version}{asked}"
        self._clip = bundle.manifest.model.clip
        self._mean = np.asarray(bundle.arrays["moments.mean"], np.float32)
        self._season = np.asarray(bundle.arrays["season"], np.float32)
        self._period_ms = bundle.period_ms

    @property
    def entity_bytes(self) -> int:
        """Memory of an entity that has learned: its newest two states."""
        return 2 * 4 * self.size

    def start(self, model: Model) -> Model:
        """Return the model as `prepare` will give it back: what to compile for."""
        return model

    def learns(self, row: int) -> bool:
        """Whether an entity of that row of the bundle (-1: never seen) goes on learning."""
        return True

    def phase(self, entity: str) -> int:
        """Where an entity's blocks begin, so that not all of a fleet learns in the same slot.

        Block k holds the slots from `k * block - phase` to before `(k + 1) * block - phase`.
        """
        return zlib.crc32(entity.encode("utf-8", "surrogatepass")) % self.block

    def weights(
        self,
        streams: Float[FloatArray, "E T S"],
        rows: IntArray,
        states: Sequence[FloatArray | None],
    ) -> Float[FloatArray, "E T"]:
        """How much each slot teaches: 1 where it is calm, less beyond the limit, 0 from twice on.

        In powers of two, so that the last bit of an evidence hardly ever changes what is learned.
        """
        wider = np.array([0.0 if state is None else state[-1] for state in states], np.float32)
        usual = (self._usual[rows] * np.exp(wider)[:, None])[:, None, :]
        # Not a number: nothing was read.
        evidence = np.nan_to_num(streams[..., : usual.shape[-1]], nan=np.inf)
        share = np.divide(usual, evidence, out=np.ones_like(evidence), where=evidence > usual)
        least = share.min(-1)
        halvings = np.ceil(-_DOUBT * np.log2(np.maximum(least, 0.5)))
        return np.where(least > 0.5, np.exp2(-halvings), 0.0).astype(np.float32)

    def learn(
        self,
        row: int,
        state: FloatArray | None,
        values: Float[FloatArray, "M D"],
        slots: Int[NDArray[np.int64], " M"],
        weights: Float[FloatArray, " M"],
        mean: Float[FloatArray, " D"],
        scale: Float[FloatArray, " D"],
    ) -> FloatArray:
        """Return the state after M - `context` slots of raw `values`, NaN = missing.

        The `context` slots before them come first, and have no weight.
        """
        season = self._season[row]
        basis = harmonics(slots, self._period_ms, len(season))
        centre = means_of_slots(mean, scale, season, basis)
        z = np.asarray(normalize(values, centre, scale, self._clip), np.float32)
        seen = np.count_nonzero(np.isfinite(z[self.context :]).any(1))
        wider = 0.0 if state is None else float(state[-1])
        wider += _WIDENING * (_CALM_SHARE * seen - np.count_nonzero(weights == 1.0))
        learned = self._learn(row, None if state is None else state[:-1], z, weights)
        return np.append(learned, np.float32(max(wider, 0.0)))

    @abstractmethod
    def _learn(
        self, row: int, state: FloatArray | None, z: FloatArray, weights: FloatArray
    ) -> FloatArray:
        """Return the next state; neither has the last number."""

    @abstractmethod
    def prepare(
        self,
        model: Model,
        rows: IntArray,
        mean: FloatArray,
        scale: FloatArray,
        states: Sequence[FloatArray | None],
    ) -> tuple[Model, FloatArray]:
        """Return the model and the means (E, D) that E entities in these states are read with."""

    def _anchor_row(self, row: int) -> int:
        return row if row < len(self._mean) - 1 else -1


class Level(Adaptation):
    """A drifting mean per channel: the state holds how far each (D,) has drifted, normalised."""

    block = 64

    def __init__(self, bundle: Bundle, scorer: str) -> None:
        super().__init__(bundle, scorer)
        self.context, self.size = 0, len(bundle.channels) + 1

    def _learn(
        self, row: int, state: FloatArray | None, z: FloatArray, weights: FloatArray
    ) -> FloatArray:
        before = np.zeros(self.size - 1, np.float32) if state is None else state
        off = z - self._mean[self._anchor_row(row)] - before
        weight = np.where(np.isfinite(off), weights[:, None], 0.0)
        count = weight.sum(0)
        off = np.clip(np.nan_to_num(off), -_FURTHEST, _FURTHEST)
        step = (weight * off).sum(0) / np.where(count > 0, count, 1.0)
        return np.asarray(before + (1.0 - 0.5 ** (count / HALF_LIFE)) * step, np.float32)

    def prepare(
        self,
        model: Model,
        rows: IntArray,
        mean: FloatArray,
        scale: FloatArray,
        states: Sequence[FloatArray | None],
    ) -> tuple[Model, FloatArray]:
        """Move the means."""
        drift = np.zeros_like(mean)
        for i, state in enumerate(states):
            if state is not None:
                drift[i] = state[:-1]
        return model, mean + scale * drift


class Full(Adaptation):
    """Second moments by lag: the state holds the mean (D,) and lags (L, D, D), flattened.

    Entities of the training data get an anchor of their own, refitted after every block. One that
    the training never saw keeps the pooled one: so memory is bounded by what the bundle knows.
    """

    block = 256

    def __init__(self, bundle: Bundle, model: Model, scorer: str) -> None:
        super().__init__(bundle, scorer)
        self._config = bundle.manifest.model
        self._channels = len(bundle.channels)
        self._flags = bundle.flags
        self.context = self._config.window - 1
        self.size = self._channels * (1 + self._config.window * self._channels) + 1
        self._lags = np.asarray(bundle.arrays["moments.lags"], np.float32)
        self._fitted = [
            np.asarray(bundle.arrays[f"anchor.{name}"], np.float64)
            for name in ("mean", "loadings", "noise")
        ]
        rows = np.minimum(np.arange(len(bundle.entities) + 1), len(self._mean) - 1)
        # A cache of what states say, one row an entity: whose anchor is in it is checked each time.
        self._table: Whitenings = jax.tree.map(lambda part: part[rows], model.anchors)
        self._held: list[FloatArray | None] = [None] * len(bundle.entities)
        one = jax.tree.map(lambda part: part[0], self._table)
        # Now, since nothing may be compiled once scoring goes on.
        self._put = _put.lower(self._table, np.int32(0), one).compile()

    @property
    def entity_bytes(self) -> int:
        """The newest two states, and the anchor made of one."""
        table = sum(int(part.nbytes) for part in jax.tree.leaves(self._table))
        return super().entity_bytes + table // (len(self._held) + 1)

    def start(self, model: Model) -> Model:
        """With an anchor for each entity."""
        return model._replace(anchors=self._table)

    def learns(self, row: int) -> bool:
        """Those that the training has seen."""
        return row >= 0

    def moments_of(self, row: int, state: FloatArray | None) -> Moments:
        """Return what an entity knows: before the first block, what its training says."""
        if state is None:
            anchor = self._anchor_row(row)
            return Moments(*(p[anchor].astype(np.float64) for p in (self._mean, self._lags)))
        wide = state[: self.size - 1].astype(np.float64)
        lags = wide[self._channels :].reshape(-1, self._channels, self._channels)
        return Moments(wide[: self._channels], lags)

    def _learn(
        self, row: int, state: FloatArray | None, z: FloatArray, weights: FloatArray
    ) -> FloatArray:
        old, sums = self.moments_of(row, state), lag_sums(z, self._config.window, weights)
        taught = float(weights.sum(dtype=np.float64))
        mean = _mixed(old.mean, sums.total, sums.number, taught)
        lags = _mixed(old.lags, sums.products, sums.pairs, taught)
        return np.concatenate([mean, lags.ravel()]).astype(np.float32)

    def prepare(
        self,
        model: Model,
        rows: IntArray,
        mean: FloatArray,
        scale: FloatArray,
        states: Sequence[FloatArray | None],
    ) -> tuple[Model, FloatArray]:
        """Refit the anchors of those whose state has changed since they were last seen."""
        for row, state in zip(rows.tolist(), states, strict=True):
            if row >= 0 and self._held[row] is not state:
                self._table = self._put(self._table, np.int32(row), self._anchor(row, state))
                self._held[row] = state
        return self.start(model), mean

    def _anchor(self, row: int, state: FloatArray | None) -> Whitenings:
        # Always from the bundle's loadings: what came before may not matter after a restart.
        mean, loadings, noise = (part[self._anchor_row(row)] for part in self._fitted)
        if state is not None:
            moments = self.moments_of(row, state)
            floor = self._config.noise_floor
            mean = np.tile(moments.mean, self._config.window)
            loadings, noise = refit_anchor(moments.covariance(), loadings, noise, floor)
        return whitenings(mean, loadings, noise, self._flags, self._config)


@partial(jax.jit, donate_argnums=0)  # in place: the table may be large
def _put(table: Whitenings, row: int, anchor: Whitenings) -> Whitenings:
    put: Whitenings = jax.tree.map(lambda whole, part: whole.at[row].set(part), table, anchor)
    return put


def _mixed(old: DoubleArray, total: DoubleArray, number: DoubleArray, slots: float) -> DoubleArray:
    """Forget what is `old` as `slots` of them have it, and put the new means in its place.

    All at one rate, however often each was seen: moments of different ages contradict one another.
    Only what was hardly seen in this block is kept longer, and what was not seen altogether.
    """
    new = 1.0 - 0.5 ** (slots / HALF_LIFE)
    weight = new * np.minimum(number / max(_SELDOM * slots, 1.0), 1.0)
    return np.asarray((1.0 - weight) * old + weight * total / np.where(number > 0, number, 1.0))


def make_adaptation(
    adapt: Adapt, bundle: Bundle, model: Model, scorer: str = SCORERS[0]
) -> Adaptation | None:
    """Return how entities learn, None where they do not; `auto` is `full` for all but large fleets.

    `scorer` is the one whose streams say which slots are calm.

    Raises:
        KeyError: the bundle lacks an array.

    """
    small = len(bundle.entities) <= MOST_FULL and len(bundle.channels) <= _MOST_CHANNELS
    if adapt == "full" or (adapt == "auto" and small):
        return Full(bundle, model, scorer)
    return None if adapt == "none" else Level(bundle, scorer)
