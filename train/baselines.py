"""Simple detectors to be better than. Every one is causal: a slot's score looks at no later slot.

All see the same input: z-scores by the fitting part's statistics, cut at ±10, gaps filled with the
last reading (before the first: the mean). None is tuned here; each says where its settings come
from. "TSB-AD-M" is the best setting of that benchmark's multivariate board (Liu & Paparrizos 2024).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from train.cnn import CNN
from train.metrics import slots_per_alarm
from tsdiff import calibration
from tsdiff.config import ModelConfig
from tsdiff.errors import HistoryError, TsdiffError
from tsdiff.normalize import fit_statistics
from tsdiff.types import FloatArray
from tsdiff.windows import sliding

CLIP = 10.0
_MOST_WINDOWS = 40_000  # that anything is fitted to
_CHUNK = 4096


Judged = tuple[FloatArray, FloatArray | None]
"""How far each slot is from normal (N,), not negative; what each channel adds to it (N, D)."""


class Baseline(Protocol):
    """A detector of one entity. `z` (N, D) is finite; results have its length."""

    context: int
    """Earlier slots that a slot's score looks at."""
    seeded: bool
    """Whether another seed gives another result."""

    def fit(self, z: FloatArray, seed: int) -> None:
        """Learn what is normal."""
        ...

    def score(self, z: FloatArray) -> Judged:
        """Judge every slot; no channels where the method cannot tell them apart."""
        ...


class Scored(NamedTuple):
    """A test series judged: `anomaly_score` (T,) for its order, `evidence` (T,) as calibrated.

    `slots_per_alarm` as `metrics.slots_per_alarm` of held-out data.
    """

    anomaly_score: FloatArray
    evidence: FloatArray
    contribution: FloatArray | None
    slots_per_alarm: float


Scorer = Callable[[FloatArray], Scored]
"""Scores a test series (T, D) in raw units, NaN missing."""


def fit(baseline: Baseline, past: FloatArray, held_out: int, seed: int, goes_on: bool) -> Scorer:
    """Fit to `past` (N, D) but its last `held_out` slots, and calibrate on these.

    With `goes_on` the test series begins where `past` ends, so its first windows reach into it.

    Raises:
        HistoryError: too few slots for the baseline's windows.

    """
    at = len(past) - held_out
    needed = 2 * (baseline.context + 1)
    if at < needed:
        raise HistoryError(
            f"expected at least {needed} slots to fit to, beside the {held_out} held out, "
            f"got {max(at, 0)}; give longer history or leave this detector out with --detector"
        )
    statistics = fit_statistics([past[:at]], ModelConfig.scale_floor)
    mean, scale = statistics.mean[0], statistics.scale[0]

    def prepare(values: FloatArray) -> FloatArray:
        z = np.clip((forward_fill(values) - mean) / scale, -CLIP, CLIP)
        return np.asarray(np.nan_to_num(z), np.float32)

    z = prepare(past)
    baseline.fit(z[:at], seed)
    sample = baseline.score(z[max(at - baseline.context, 0) :])[0][-held_out:]
    knots = calibration.fit_knots(sample)
    slope = calibration.fit_slope(sample, float(knots[-1]))
    slots = slots_per_alarm([_evidence(sample, knots, slope)])

    def score(test: FloatArray) -> Scored:
        # One slot more than the context, to fill the first gaps from.
        before = past[len(past) - min(len(past), baseline.context + 1) :] if goes_on else past[:0]
        deviation, contribution = baseline.score(prepare(np.concatenate([before, test])))
        deviation = deviation[len(before) :]
        if contribution is not None:
            contribution = contribution[len(before) :]
        return Scored(deviation, _evidence(deviation, knots, slope), contribution, slots)

    return score


def _evidence(deviation: FloatArray, knots: FloatArray, slope: float) -> FloatArray:
    """-log10 of the tail probability of each deviation (T,), in pieces of one compiled shape."""
    pieces = np.pad(deviation, (0, -len(deviation) % _CHUNK)).reshape(-1, 1, _CHUNK, 1)
    tail = jnp.asarray(knots)[None, None], jnp.full((1, 1), slope)
    evidence = [calibration.stream_evidence(jnp.asarray(piece), *tail) for piece in pieces]
    return np.concatenate([np.ravel(piece) for piece in evidence])[: len(deviation)]


def forward_fill(values: FloatArray) -> FloatArray:
    """Repeat the last reading of a channel (N, D) where one is missing; NaN before the first."""
    row = np.where(np.isnan(values), 0, np.arange(len(values))[:, None])
    return np.asarray(np.take_along_axis(values, np.maximum.accumulate(row, 0), 0))


def trailing(z: FloatArray, length: int) -> FloatArray:
    """The window that ends at each slot (N, length, D); the first row stands for earlier ones."""
    return sliding(np.concatenate([np.repeat(z[:1], length - 1, 0), z]), length)


def _pick(z: FloatArray, length: int) -> FloatArray:
    """Windows to fit to, flattened (W, length * D): all whole ones, thinned where too many."""
    windows = sliding(z, length)
    windows = windows[:: -(-len(windows) // _MOST_WINDOWS)]
    return np.ascontiguousarray(windows).reshape(len(windows), -1)


def _chunks(z: FloatArray, length: int) -> Iterator[FloatArray]:
    """Windows that end at each slot, some at a time, flattened."""
    windows = trailing(z, length)
    for start in range(0, len(windows), _CHUNK):
        part = windows[start : start + _CHUNK]
        yield np.ascontiguousarray(part).reshape(len(part), -1)


@contextmanager
def _extra() -> Iterator[None]:
    """Say what to install where an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise TsdiffError(
            "the baselines kmeansad, kmeansad16 and iforest need scikit-learn, which is not "
            "installed; install it with: pip install 'tsdiff[eval]', or choose others with "
            "--detector"
        ) from error


class L2:
    """The mean square of the last 16 slots: how far they are from the training mean."""

    seeded = False

    def __init__(self, window: int = 16) -> None:
        self.context = window - 1

    def fit(self, z: FloatArray, seed: int) -> None:
        """Learn nothing: the z-scores are the model."""

    def score(self, z: FloatArray) -> Judged:
        """Take the trailing mean of the slots' mean squares; rank channels by |z|."""
        squares = z**2
        return trailing(squares.mean(1, keepdims=True), self.context + 1).mean((1, 2)), squares


class PCA:
    """What the principal components of 16-slot windows leave unexplained, its mean square.

    Components for 90 % of the variance: the usual choice for the squared prediction error
    (Jackson & Mudholkar 1979).
    """

    seeded = False

    def __init__(self, window: int = 16, explained: float = 0.9) -> None:
        self.context, self._explained = window - 1, explained
        self._mean = self._axes = np.empty(0, np.float32)

    def fit(self, z: FloatArray, seed: int) -> None:
        """Find the components."""
        windows = _pick(z, self.context + 1)
        self._mean = windows.mean(0)
        centred = windows - self._mean
        variances, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
        share = np.cumsum(np.maximum(variances[::-1], 0.0))
        count = int(np.searchsorted(share, self._explained * share[-1])) + 1
        self._axes = axes[:, ::-1][:, :count].astype(np.float32)

    def score(self, z: FloatArray) -> Judged:
        """Take the mean square of each window's residual, of channels that of its last slot."""
        deviation, contribution = [], []
        for windows in _chunks(z, self.context + 1):
            centred = windows - self._mean
            squares = (centred - (centred @ self._axes) @ self._axes.T) ** 2
            deviation.append(squares.mean(1))
            contribution.append(squares[:, -z.shape[1] :])
        return np.concatenate(deviation), np.concatenate(contribution)


class KMeansAD:
    """The distance of the last 40 slots from the nearest of 10 typical windows.

    Yairi et al. 2001; both numbers are TSB-AD-M's. There a slot gets the mean over all windows
    that hold it, later ones too; here, that of the window that ends at it.
    """

    seeded = True

    def __init__(self, window: int = 40, clusters: int = 10) -> None:
        self.context, self._clusters = window - 1, clusters
        self._centres = np.empty((0, 0), np.float32)

    def fit(self, z: FloatArray, seed: int) -> None:
        """Find the typical windows."""
        windows = _pick(z, self.context + 1)
        clusters = min(self._clusters, len(windows))
        with _extra():
            from sklearn.cluster import KMeans  # noqa: PLC0415  (an extra)
        model = KMeans(clusters, n_init=1, random_state=seed)
        self._centres = np.asarray(model.fit(windows).cluster_centers_, np.float32)

    def score(self, z: FloatArray) -> Judged:
        """Take the distance from the nearest centre, of channels their part of its square."""
        deviation, contribution = [], []
        for windows in _chunks(z, self.context + 1):
            # ||w - c||^2 but for ||w||^2, which does not matter to which is nearest.
            distance = (self._centres**2).sum(1) - 2.0 * windows @ self._centres.T
            squares = (windows - self._centres[distance.argmin(1)]) ** 2
            deviation.append(np.sqrt(squares.sum(1)))
            contribution.append(squares.reshape(len(squares), -1, z.shape[1]).sum(1))
        return np.concatenate(deviation), np.concatenate(contribution)


class IForest:
    """How soon random cuts isolate a slot (Liu et al. 2008).

    25 trees on 0.8 of the channels, as TSB-AD-M.
    """

    seeded = True

    def __init__(self, window: int = 1, trees: int = 25, features: float = 0.8) -> None:
        self.context, self._trees, self._features = window - 1, trees, features
        self._model: Any = None

    def fit(self, z: FloatArray, seed: int) -> None:
        """Grow the trees."""
        with _extra():
            from sklearn.ensemble import IsolationForest  # noqa: PLC0415  (an extra)
        self._model = IsolationForest(
            n_estimators=self._trees, max_features=self._features, random_state=seed
        )
        self._model.fit(_pick(z, self.context + 1))

    def score(self, z: FloatArray) -> Judged:
        """Take the forest's own score, 0 to 1; it knows nothing about channels."""
        parts = [-self._model.score_samples(part) for part in _chunks(z, self.context + 1)]
        return np.concatenate(parts).astype(np.float32), None


class OLS:
    """The residual of a linear autoregression of every channel on the last 8 slots of all.

    Residuals count in their own standard deviations on the fitting part (at least 0.1 of the
    channel's). A ridge of 1 % of a unit variance a feature; both numbers are ours.
    """

    seeded = False

    def __init__(self, order: int = 8, ridge: float = 0.01) -> None:
        self.context, self._ridge = order, ridge
        self._weights = self._sd = np.empty(0, np.float32)

    def fit(self, z: FloatArray, seed: int) -> None:
        """Solve the normal equations."""
        channels = z.shape[1]
        size = self.context * channels + 1
        gram, products = np.zeros((size, size)), np.zeros((size, channels))
        total, rows = np.zeros(channels), 0
        for features, target in self._rows(z[self.context :], z):
            gram += features.T @ features
            products += features.T @ target
            rows += len(target)
        penalty = self._ridge * rows * np.eye(size)
        penalty[-1, -1] = 1e-9 * rows  # the intercept is free
        self._weights = np.linalg.solve(gram + penalty, products).astype(np.float32)
        for features, target in self._rows(z[self.context :], z):
            total += ((target - features @ self._weights) ** 2).sum(0)
        self._sd = np.maximum(np.sqrt(total / rows), 0.1).astype(np.float32)

    def _rows(self, target: FloatArray, z: FloatArray) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Past slots with a one behind, and the slot that follows them."""
        windows = sliding(z[:-1], self.context)
        for start in range(0, len(windows), _CHUNK):
            part = windows[start : start + _CHUNK].reshape(-1, self.context * z.shape[1])
            one = np.ones((len(part), 1), np.float32)
            yield np.concatenate([part, one], 1), target[start : start + _CHUNK]

    def score(self, z: FloatArray) -> Judged:
        """Take the mean over channels of the squared residuals, in variances."""
        padded = np.concatenate([np.repeat(z[:1], self.context, 0), z])
        parts = [target - features @ self._weights for features, target in self._rows(z, padded)]
        squares = (np.concatenate(parts) / self._sd) ** 2
        return squares.mean(1), np.asarray(squares, np.float32)


BASELINES: dict[str, Callable[[], Baseline]] = {
    "l2": L2,
    "pca": PCA,
    "kmeansad": KMeansAD,
    "kmeansad16": partial(KMeansAD, window=16),  # as long as the windows of the others
    "iforest": IForest,
    "ols": OLS,
    "cnn": CNN,
}
