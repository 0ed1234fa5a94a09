# ruff: noqa: F722
"""Streams -> tail probability on held-out normal data -> evidence, and the operator's threshold.

Evidence is -log10 of the probability that normal data reach such a value. A stream's tail is
empirical up to the 98th percentile (interpolated knots) and a power law beyond, that is,
exponential in the stream's logarithm (Hill 1975). What several streams add up to, in a slot and
those before it, is no tail probability of its own; it is calibrated once more the same way, its
tail exponential.
"""

import math
from collections.abc import Mapping
from functools import reduce
from typing import NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.typing import NDArray

from tsdiff.config import SLOW_SCORERS, FastScorer
from tsdiff.types import FloatArray

SCORERS = get_args(FastScorer)
"""Those that share their streams and tables, which every bundle has; the first is the default."""
LAGS = (0, 3, 7, 15)
"""Lags in slots that a bundle is calibrated for: how much of what follows a slot may be seen."""
KNOTS = 33
_LEAST_GAP = 0.1  # between two knots, of the usual one
TAIL = 0.02  # probability beyond the last knot: with a day of minutes, 30 exceedances to fit
_TAIL_EVIDENCE = -math.log10(TAIL)
MAX_EVIDENCE = 30.0  # 1e-30 per slot: once in longer than the world has stood
MIN_STREAM = 1e-6
# Exceedances that a sample must have before its own tail outweighs the usual one, or a row's that
# of all rows together, which says more: half of held-out data has the greatest likelihood with what
# the other half makes of 60 to 200.
_PRIOR_EXCEEDANCES = 20.0
_POOLED_EXCEEDANCES = 100.0
_PRIOR_LOG_EXCESS = 0.2  # a power law of exponent 5, heavy enough for telemetry
CUSUM_BEHIND = 31
"""Slots before the judged one that `add_cusum` looks back on."""
# Combined evidence that normal slots seldom reach; how much counts at most, lest one event outweigh
# whatever comes after it; and the part of it that is added.
_ALLOWANCE = 2.0
_CUSUM_CAP = 5.0
_CUSUM_SHARE = 0.25
_ANCHOR_SHARE = 0.4  # of the anchor's two pieces of evidence, against the network's one
_LN10 = math.log(10.0)
_MOST_ALARMED = 0.05  # of the slots, for the sake of alarms
WEEK_MS = 7 * 24 * 3600 * 1000


def evidence_threshold(
    false_alarms_per_entity_week: float, period_ms: int, slots_per_alarm: float
) -> float:
    """Return -log10 of the per-slot probability that the asked rate of false alarms allows.

    Slots above a line come in clusters, of which each is one alarm of `slots_per_alarm` slots (the
    inverse of the extremal index, Leadbetter 1983). The anomaly score is evidence divided by this,
    so that alarms at 1 are as rare as was asked for.
    """
    if not (math.isfinite(false_alarms_per_entity_week) and false_alarms_per_entity_week > 0):
        raise ValueError(
            "expected a positive rate of false alarms per entity and week, "
            f"got {false_alarms_per_entity_week}"
        )
    of_slots = false_alarms_per_entity_week * period_ms / WEEK_MS
    # Clusters above a line as low as one slot in twenty run into one another, and the alarm never
    # ends: with slots of hours, slots are what is counted.
    of_alarms = min(of_slots * slots_per_alarm, _MOST_ALARMED)
    # More than one alarm in two slots is no threshold at all.
    return -math.log10(min(max(of_slots, of_alarms), 0.5))


class Calibration(NamedTuple):
    """Tails per row (R entities, then the pooled row) and stream at each of `scorers.scales`.

    Without a lag there is a scale less, and the columns that are left are not read.
    `neutral` (R+1, S) median of each stream; for each of the V `LAGS`: `knots` (R+1, V, C, Q)
    values at evenly spaced evidence from 0 to that of the 98th percentile; `slope` (R+1, V, C)
    evidence per log of the stream beyond; `joint_knots` (R+1, V, J, Q) and `joint_slope`
    (R+1, V, J) the same for what each of the J `SCORERS` combines and piles up, `slots_per_alarm`
    (V, J) how many slots above a line make one alarm. A slow scorer has tables of its own, with
    J = 1.
    """

    neutral: Array
    knots: Array
    slope: Array
    joint_knots: Array
    joint_slope: Array
    slots_per_alarm: Array


def array_name(scorer: str, table: str) -> str:
    """Name of a scorer's table, one of `Calibration`'s fields, among the arrays of a bundle."""
    return f"calibration.{scorer}.{table}" if scorer in SLOW_SCORERS else f"calibration.{table}"


def tables_of(arrays: Mapping[str, NDArray[np.generic]], scorer: str) -> Calibration:
    """Return a scorer's tables from the arrays of a bundle.

    Raises:
        KeyError: one is missing.

    """
    each = (arrays[array_name(scorer, table)] for table in Calibration._fields)
    return Calibration(*(jnp.asarray(table, jnp.float32) for table in each))


def knot_levels() -> FloatArray:
    """Evidence at the knots."""
    return np.linspace(0.0, _TAIL_EVIDENCE, KNOTS, dtype=np.float32)


def fit_knots(sample: FloatArray) -> FloatArray:
    """Quantiles of `sample` (N,) at the knots' evidence, strictly increasing, (Q,)."""
    levels = 1.0 - 10.0 ** -np.linspace(0.0, _TAIL_EVIDENCE, KNOTS)
    knots = np.quantile(sample.astype(np.float64), levels)
    # Where samples happen to lie close, float32's rounding of a stream would be seen in its
    # evidence; ties (a stream that never moves) would make the inverse jump.
    least = max(
        _LEAST_GAP * float(np.median(np.diff(knots))), 1e-5 * max(abs(float(knots[-1])), MIN_STREAM)
    )
    steps = least * np.arange(KNOTS)
    return np.asarray(np.maximum.accumulate(knots - steps) + steps, np.float32)


def _excess_mean(excess: FloatArray, prior: float, weight: float = _PRIOR_EXCEEDANCES) -> float:
    """Mean of exponential excesses, shrunk to `prior` while there are fewer than `weight`."""
    total = float(excess.sum(dtype=np.float64))
    return (total + weight * prior) / (len(excess) + weight)


def fit_slope(sample: FloatArray, last_knot: float, pooled: float | None = None) -> float:
    """Evidence per unit of log(stream) beyond the last knot; `pooled` is that of all rows."""
    edge = max(last_knot, MIN_STREAM)
    excess = np.log(sample[sample > edge] / edge)
    if pooled is None:
        mean = _excess_mean(excess, _PRIOR_LOG_EXCESS)
    else:
        mean = _excess_mean(excess, 1.0 / (_LN10 * pooled), _POOLED_EXCEEDANCES)
    return 1.0 / (_LN10 * max(mean, 1e-3))


def fit_joint_slope(sample: FloatArray, last_knot: float) -> float:
    """Evidence per unit of combined evidence beyond the last knot: near 1 when tails were right."""
    beyond = sample[sample > last_knot]
    return 1.0 / (_LN10 * max(_excess_mean(beyond - last_knot, 1.0 / _LN10), 1e-3))


def _interpolate(values: Array, knots: Array) -> tuple[Array, Array]:
    """Evidence up to the last knot, and whether a value lies beyond it.

    That is how many gaps between knots lie below a value, and the part of its own: a sum, since
    looking the gap up takes XLA three times as long.
    """
    left, right = knots[..., :-1], knots[..., 1:]
    below = jnp.clip((values[..., None] - left) / (right - left), 0.0, 1.0).sum(-1)
    return below * (_TAIL_EVIDENCE / (KNOTS - 1)), values > knots[..., -1]


def stream_evidence(
    values: Float[Array, "E T C"], knots: Float[Array, "E C Q"], slope: Float[Array, "E C"]
) -> Float[Array, "E T C"]:
    """-log10 of each stream's tail probability: monotone, finite, at most `MAX_EVIDENCE`."""
    inside, beyond = _interpolate(values, knots[:, None])
    edge = jnp.maximum(knots[:, None, :, -1], MIN_STREAM)
    tail = _TAIL_EVIDENCE + slope[:, None] * jnp.log(jnp.maximum(values, edge) / edge)
    return jnp.minimum(jnp.where(beyond, tail, inside), MAX_EVIDENCE)


def combine(
    evidence: Float[Array, "E T C"], scorer: str, *, network: bool = False
) -> Float[Array, "E T"]:
    """Combine the streams (`scorers.STREAMS`, at all scales) of a scorer.

    `reconstruction` adds what is off with the cells seen and with the newest slots hidden; `hybrid`
    also asks how dense normal data are here. The forecast's evidence is added, since it did not see
    the cells it judges: a maximum over all would only pay for more chances of a false alarm. All
    that is the anchor's. Where there is a `network`, its imputation says more, and the anchor
    counts only where it is surer by far. A slow scorer has one stream, and a time scale says more
    than another where it is surer.
    """
    if scorer in SLOW_SCORERS:
        return evidence.max(-1)
    largest = reduce(jnp.maximum, jnp.split(evidence, evidence.shape[-1] // 4, -1))
    reconstruction, density, forecast, imputation = (largest[..., stream] for stream in range(4))
    if scorer == "density":
        return density
    if scorer == "hybrid":
        reconstruction = jnp.maximum(reconstruction, density)
    anchor = reconstruction + forecast
    return jnp.maximum(_ANCHOR_SHARE * anchor, imputation) if network else anchor


def add_cusum(combined: Float[Array, "E M"]) -> Float[Array, "E T"]:
    """Add to each slot's combined evidence a part of what has piled up, T = M - CUSUM_BEHIND.

    That is Page's cumulative sum, C_t = max(C_(t-1) + x_t - allowance, 0) (Page 1954, Biometrika
    41), which finds a small change that lasts. It begins from 0 anew for each slot: so it forgets,
    and is the same wherever series are cut.
    """
    span = combined.shape[1] - CUSUM_BEHIND
    total = jnp.zeros_like(combined[:, :span])
    for at in range(CUSUM_BEHIND + 1):
        total = jnp.maximum(total + combined[:, at : at + span] - _ALLOWANCE, 0.0)
    return combined[:, CUSUM_BEHIND:] + _CUSUM_SHARE * jnp.minimum(total, _CUSUM_CAP)


def joint_evidence(
    combined: Float[Array, "E T"], knots: Float[Array, "E Q"], slope: Float[Array, " E"]
) -> Float[Array, "E T"]:
    """-log10 of the combination's own tail probability."""
    inside, beyond = _interpolate(combined, knots[:, None])
    last = knots[:, None, -1]
    tail = _TAIL_EVIDENCE + slope[:, None] * jnp.maximum(combined - last, 0.0)
    return jnp.minimum(jnp.where(beyond, tail, inside), MAX_EVIDENCE)
