"""How well anomaly scores find labelled events. NumPy only; nothing here looks at values.

A score says nothing but order until a threshold is calibrated: `volumes`, `average_precision` and
`roc_auc` judge the order, `event_metrics` the alarms. There is no point adjustment anywhere.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tsdiff.types import BoolArray, DoubleArray

Integers = NDArray[np.int64]

# As TSB-AD: thresholds of the volume; autocorrelation lags and rows that its buffer is sought in.
THRESHOLDS = 250
_LAGS, _FIRST_LAG, _LONGEST_BUFFER, _NO_PERIOD = 400, 3, 300, 125
_PERIOD_ROWS = 20_000


def segments(labels: NDArray[np.generic]) -> Integers:
    """Runs of non-zero labels (T,) as half-open row ranges (K, 2)."""
    edges = np.diff(np.concatenate([[0], np.asarray(labels) != 0, [0]]).astype(np.int8))
    return np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)], 1)


# -- order --------------------------------------------------------------------------------------


def _check(labels: NDArray[np.generic], anomaly_score: NDArray[np.floating]) -> BoolArray:
    labels = np.asarray(labels)
    if labels.shape != anomaly_score.shape or labels.ndim != 1:
        raise ValueError(
            f"expected labels and scores of one shape (T,), got {labels.shape} and "
            f"{anomaly_score.shape}"
        )
    if not np.isfinite(anomaly_score).all():
        raise ValueError("expected finite scores: every row is judged, or none")
    return np.asarray(labels != 0)


def _counts(labels: BoolArray, anomaly_score: NDArray[np.floating]) -> tuple[Integers, Integers]:
    """True and false positives at every distinct threshold, highest first."""
    order = np.argsort(-anomaly_score, kind="stable")
    ordered, truth = anomaly_score[order], labels[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    true_positives = np.cumsum(truth)[last]
    return true_positives, last + 1 - true_positives


def average_precision(labels: NDArray[np.generic], anomaly_score: NDArray[np.floating]) -> float:
    """Area under precision and recall, point by point; NaN where nothing is labelled."""
    truth = _check(labels, anomaly_score)
    if not truth.any():
        return math.nan
    hits, false = _counts(truth, anomaly_score)
    gained = np.diff(hits, prepend=0) / hits[-1]
    return float(np.sum(gained * hits / (hits + false)))


def roc_auc(labels: NDArray[np.generic], anomaly_score: NDArray[np.floating]) -> float:
    """Share of (anomalous, normal) pairs of rows in the right order; NaN where a class is empty."""
    truth = _check(labels, anomaly_score)
    if not truth.any() or truth.all():
        return math.nan
    hits, false = (np.concatenate([[0], part]) for part in _counts(truth, anomaly_score))
    return float(np.sum(np.diff(false) * (hits[1:] + hits[:-1])) / (2.0 * hits[-1] * false[-1]))


class Volumes(NamedTuple):
    """Volumes under the surfaces of range-based precision and recall, and of range-based ROC."""

    pr: float
    roc: float


def vus_pr(labels: NDArray[np.generic], anomaly_score: NDArray[np.floating], buffer: int) -> float:
    """Volume under the surface of range-based precision and recall, see `volumes`."""
    return volumes(labels, anomaly_score, buffer).pr


def volumes(
    labels: NDArray[np.generic], anomaly_score: NDArray[np.floating], buffer: int
) -> Volumes:
    """VUS-PR and VUS-ROC with buffers of 0 to `buffer` slots; NaN where a class is empty.

    Paparrizos et al. 2022 (PVLDB 15(11)), in the form that the TSB-AD benchmark
    computes ("opt", 250 thresholds): labels slope from 1 to sqrt(1/2) over half a buffer to both
    sides of every segment, a hit counts by its label, and recall is weighted by the share of
    segments that were hit at all. Segments whose slopes meet are one.

    A row enters at the first threshold it reaches, its *level*; so all thresholds are one
    cumulative sum, and segments are hit at the lowest level near them.
    """
    truth = _check(labels, anomaly_score)
    if not truth.any() or truth.all():
        return Volumes(math.nan, math.nan)
    rows = len(truth)
    descending = -np.sort(-anomaly_score)
    thresholds = descending[np.linspace(0, rows - 1, THRESHOLDS).astype(int)]
    level = np.searchsorted(-thresholds, -anomaly_score, side="left")
    alarmed = np.cumsum(np.bincount(level, minlength=THRESHOLDS)).astype(np.float64)
    inside = np.cumsum(np.bincount(level[truth], minlength=THRESHOLDS)).astype(np.float64)
    runs = segments(truth)
    starts, last = runs[:, 0], runs[:, 1] - 1
    row, distance = _slopes(truth, starts, last, buffer // 2)
    places, place = np.unique(row, return_inverse=True)
    reach = np.searchsorted(distance, np.arange(buffer // 2 + 1), side="right")
    hit = np.minimum.reduceat(np.append(level, THRESHOLDS), runs.ravel())[::2]
    surface_pr = surface_roc = 0.0
    existence = np.zeros(THRESHOLDS)
    for width in range(buffer + 1):
        half = width // 2
        if width % 2 == 0:  # Only then do segments reach further than before.
            hit = np.minimum(
                hit,
                np.minimum(
                    level[np.maximum(starts - half, 0)], level[np.minimum(last + half, rows - 1)]
                ),
            )
            apart = np.flatnonzero(starts[1:] - last[:-1] > 2 * half) + 1
            groups = np.minimum.reduceat(hit, np.concatenate([[0], apart]))
            existence = np.cumsum(np.bincount(groups, minlength=THRESHOLDS)) / len(groups)
        slope = np.sqrt(1.0 - distance[: reach[half]] / max(width, 1))
        weight = np.minimum(np.bincount(place[: reach[half]], slope, len(places)), 1.0)
        sloped = np.cumsum(np.bincount(level[places], weight, THRESHOLDS)).astype(np.float64)
        pr, roc = _areas(rows, float(inside[-1]), inside, sloped, alarmed, existence)
        surface_pr += pr
        surface_roc += roc
    return Volumes(surface_pr / (buffer + 1), surface_roc / (buffer + 1))


def _slopes(
    truth: BoolArray, starts: Integers, last: Integers, half: int
) -> tuple[Integers, Integers]:
    """Every unlabelled row near a segment, and how far it is from it, nearest first."""
    distance = np.arange(1, half + 1)
    row = np.concatenate([starts[None] - distance[:, None], last[None] + distance[:, None]], 1)
    away = np.broadcast_to(distance[:, None], row.shape)
    kept = (row >= 0) & (row < len(truth))
    kept[kept] = ~truth[row[kept]]
    return row[kept], away[kept]


def _areas(
    rows: int,
    positives: float,
    inside: DoubleArray,
    sloped: DoubleArray,
    alarmed: DoubleArray,
    existence: DoubleArray,
) -> tuple[float, float]:
    """Areas under one slice of the surfaces; the arrays are per threshold."""
    hits = inside + sloped
    # TSB-AD counts as positive half of what is labelled with slopes, half of what is without.
    expected = positives + sloped / 2.0
    recall = np.minimum(hits / expected, 1.0) * existence
    false = (alarmed - hits) / (rows - expected)
    pr = float(np.sum(np.diff(recall, prepend=0.0) * hits / alarmed))
    recall = np.concatenate([[0.0], recall, [1.0]])
    false = np.concatenate([[0.0], false, [1.0]])
    return pr, float(np.sum(np.diff(false) * (recall[1:] + recall[:-1])) / 2.0)


def autocorrelation_period(channel: NDArray[np.floating]) -> int:
    """The lag of the highest peak of the autocorrelation: TSB-AD's buffer, its `find_length_rank`.

    Of the first 20,000 rows (N,), finite; 125 where there is no peak between 6 and 303 slots.
    """
    head = np.asarray(channel, np.float64)[:_PERIOD_ROWS]
    centred = head - head.mean()
    size = 1 << (2 * len(centred)).bit_length()
    spectrum = np.abs(np.fft.rfft(centred, size)) ** 2
    correlation = np.fft.irfft(spectrum, size)[: min(_LAGS + 1, len(centred))]
    if correlation[0] <= 0:
        return _NO_PERIOD
    part = (correlation / correlation[0])[_FIRST_LAG:]
    peaks = np.flatnonzero((part[1:-1] > part[:-2]) & (part[1:-1] > part[2:])) + 1
    if len(peaks) == 0:
        return _NO_PERIOD
    best = int(peaks[len(peaks) - 1 - np.argmax(part[peaks][::-1])])
    return best + _FIRST_LAG if _FIRST_LAG <= best <= _LONGEST_BUFFER else _NO_PERIOD


# -- alarms -------------------------------------------------------------------------------------

# The alert rule that the service has by default; a test holds the two together.
_TRIGGER, _RECOVERY = 1.0, 0.7
_M, _N, _RECOVERY_SLOTS, _STALE_SLOTS = 2, 3, 5, 5


def alarms(anomaly_score: NDArray[np.floating]) -> BoolArray:
    """Slots (T,) in which the service would have an alert firing or recovering.

    It begins when 2 of 3 slots are above 1, and ends with the 5th slot below 0.7 or after 5 slots
    without any reading, which are NaN here and otherwise say nothing.
    """
    slot = np.arange(len(anomaly_score))
    silent = np.isnan(anomaly_score)
    hot, calm = anomaly_score > _TRIGGER, anomaly_score < _RECOVERY
    recent = np.convolve(hot, np.ones(_N))[: len(slot)]
    begins = hot & (recent >= _M - 0.5)
    ends = (calm & (_run(calm, ~silent & ~calm) >= _RECOVERY_SLOTS)) | (
        silent & (_run(silent, ~silent) >= _STALE_SLOTS)
    )
    began, ended = (np.maximum.accumulate(np.where(at, slot, -1)) for at in (begins, ends))
    return np.asarray(began > ended)


def count_alarms(evidence: Sequence[NDArray[np.floating]], line: float) -> int:
    """How many alarms series (T,) of evidence raise where an anomaly score of 1 is at `line`."""
    return sum(len(segments(alarms(each / line))) for each in evidence)


# Evidence that one of 200 normal slots has: held-out parts have some dozen alarms at it, at what is
# asked for none or one. And what telemetry was seen to have there, for parts with few.
_CLUSTER_EVIDENCE = 2.3
_USUAL_SLOTS, _USUAL_ALARMS = 8.0, 5


def slots_per_alarm(evidence: Sequence[NDArray[np.floating]]) -> float:
    """Return how many slots above a line make one alarm in normal series, each (T,).

    Shrunk to what is usual where there are few: 8 slots of five server and water sets.
    """
    above = sum(int((each > _CLUSTER_EVIDENCE).sum()) for each in evidence)
    count = count_alarms(evidence, _CLUSTER_EVIDENCE)
    return (above + _USUAL_SLOTS * _USUAL_ALARMS) / (count + _USUAL_ALARMS)


def _run(counted: BoolArray, resets: BoolArray) -> Integers:
    """How many slots have counted since the last that resets."""
    total = np.cumsum(counted)
    return np.asarray(total - np.maximum.accumulate(np.where(resets, total, 0)))


class Events(NamedTuple):
    """Alarms against labelled segments; an alarm that touches a segment has found it.

    `delay_slots` is the median from a found segment's start to its first alarmed row;
    `false_alarms_per_entity_day` counts alarms that touch no segment per day of unlabelled rows;
    `alarmed` is the share of those rows that lie in an alarm: a detector that always rings finds
    everything and is never wrong about an event. NaN where there is nothing to divide by.
    """

    event_precision: float
    event_recall: float
    event_f1: float
    delay_slots: float
    false_alarms_per_entity_day: float
    alarmed: float


def event_metrics(labels: NDArray[np.generic], alarm: BoolArray, period_ms: float) -> Events:
    """Judge alarms (T,) by segments of `labels` (T,)."""
    truth = np.asarray(labels) != 0
    events, rings = segments(truth), segments(alarm)
    true_rings = _any_within(truth, rings)
    delays = [int(np.argmax(alarm[start:end])) for start, end in events if alarm[start:end].any()]
    quiet_days = float(np.count_nonzero(~truth)) * period_ms / 86_400_000.0
    precision = _ratio(true_rings, len(rings))
    recall = _ratio(len(delays), len(events))
    return Events(
        event_precision=precision,
        event_recall=recall,
        # Two counts of different things, as in range-based scores: their harmonic mean.
        event_f1=0.0 if recall == 0 else 2 * precision * recall / (precision + recall),
        delay_slots=float(np.median(delays)) if delays else math.nan,
        false_alarms_per_entity_day=_ratio(len(rings) - true_rings, quiet_days),
        alarmed=_ratio(float((alarm & ~truth).sum()), float((~truth).sum())),
    )


def _any_within(rows: BoolArray, ranges: Integers) -> int:
    """How many half-open ranges hold a true row."""
    total = np.concatenate([[0], np.cumsum(rows)])
    return int(np.count_nonzero(total[ranges[:, 1]] > total[ranges[:, 0]]))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


# -- root causes --------------------------------------------------------------------------------


class Cause(NamedTuple):
    """Rows of a fault (half-open) and the channels (numbers) that caused it."""

    start: int
    end: int
    channels: frozenset[int]


def hit_rate(
    contribution: NDArray[np.floating], causes: Sequence[Cause], share: float = 1.0
) -> float:
    """HitRate@P% of Su et al. 2019 (OmniAnomaly), mean over faults; P = `share`.

    Channels are ranked by their mean contribution (T, D) over a fault's rows; of its k true ones,
    the share that is among the first P * k (rounded). NaN without faults.
    """
    rates = []
    for start, end, channels in causes:
        if channels and end > start:
            blame = np.nan_to_num(contribution[start:end]).mean(0)
            first = np.argsort(-blame, kind="stable")[: round(share * len(channels))]
            rates.append(len(channels.intersection(first.tolist())) / len(channels))
    return float(np.mean(rates)) if rates else math.nan
