"""Held-out normal data -> tails, bands and the held-out metrics that go into the bundle."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from train.data import Dataset
from train.metrics import count_alarms, slots_per_alarm
from tsdiff import calibration, scorers
from tsdiff.calibration import WEEK_MS, Calibration
from tsdiff.detector import history_slots
from tsdiff.reading import Model, Reader, read_spans
from tsdiff.scorers import Readings, Scales
from tsdiff.types import DoubleArray, FloatArray

_SPAN = 512
_Z90 = 1.645
# Held-out cells that weigh as much as the pooled band scale in an entity's own.
_PRIOR_CELLS = 200.0


# Samples are padded to a multiple of so many slots: each length would be compiled for once more.
_PADDED = 2048

_read = jax.jit(read_spans, static_argnames=("reader", "missing"))
_joint = jax.jit(calibration.joint_evidence)


def _padded(sample: FloatArray) -> FloatArray:
    widths = [(0, -len(sample) % _PADDED)] + [(0, 0)] * (sample.ndim - 1)
    return np.pad(sample, widths, mode="edge")


_settle = jax.jit(scorers.settle)
_at_scales = jax.jit(scorers.at_scales, static_argnames="by")


@partial(jax.jit, static_argnames="reader")
def _combined(sample: Array, knots: Array, slope: Array, reader: Reader) -> Array:
    """Combine the evidence of streams (N, C) as each scorer does, (J, N - CUSUM_BEHIND)."""
    evidence = calibration.stream_evidence(sample[None], knots[None], slope[None])
    network = reader.network is not None
    combined = [calibration.combine(evidence, name, network=network) for name in reader.scorers]
    return calibration.add_cusum(jnp.concatenate(combined))


class Fitted(NamedTuple):
    """Calibration tables, band scale (R+1, D), and metrics on the held-out part."""

    calibration: Calibration
    band_scale: FloatArray
    metrics: dict[str, float]


class _HeldOut(NamedTuple):
    readings: Readings  # every field (N, ...)
    z: FloatArray


def read_held_out(
    model: Model, dataset: Dataset, reader: Reader, *, as_unknown: bool = False
) -> list[_HeldOut]:
    """Read every held-out slot of every entity, and those before that its evidence remembers.

    `as_unknown`: by what an entity that training never saw is read with. What would be before an
    entity's first slot counts as missing.
    """
    config = reader.config
    reach = history_slots(config, lag=0) + config.window - 1
    result = []
    for row, at in enumerate(dataset.split):
        series = dataset.as_unknown(row) if as_unknown else dataset.series[row]
        short = max(reach - at, 0)
        series = np.pad(series[max(at - reach, 0) :], ((short, 0), (0, 0)), constant_values=np.nan)
        pieces = []
        for start in range(0, len(series) - config.window + 1, _SPAN):
            piece = np.full((config.window - 1 + _SPAN, series.shape[1]), np.nan, np.float32)
            part = series[start : start + config.window - 1 + _SPAN]
            piece[: len(part)] = part
            # A slow scorer costs the same either way: compile once.
            missing = 0 if reader.slow is None and np.isfinite(part).all() else None
            of = jnp.asarray([-1 if as_unknown else row])
            found = _read(model, piece[None], of, reader, missing=missing)
            kept = len(part) - config.window + 1
            pieces.append([np.asarray(field[0, :kept]) for field in found])
        fields = [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
        readings = Readings(*(jnp.asarray(field) for field in fields))
        result.append(_HeldOut(readings, series[config.window - 1 :]))
    return result


def calibrate(model: Model, dataset: Dataset, reader: Reader) -> Fitted:
    """Fit the tails of every stream and of their combination, lag by lag, row by row and pooled."""
    config = reader.config
    held_out = read_held_out(model, dataset, reader)
    several = model.anchors.clean.mean.shape[0] > 1
    unknown = read_held_out(model, dataset, reader, as_unknown=True) if several else held_out
    before = history_slots(config, lag=0)  # read, but not calibrated on
    medians = [np.median(_covered(part, before), 0) for part in held_out]
    of_all = np.median(np.concatenate([_covered(part, before) for part in unknown]), 0)
    neutral = np.stack([*medians, of_all]).astype(np.float32)

    def settled(part: _HeldOut, row: int) -> FloatArray:
        streams, coverage = (_padded(np.asarray(each)) for each in part.readings[:2])
        return np.asarray(_settle(streams, coverage, neutral[row]))[: len(part.z)]

    own = [settled(part, row) for row, part in enumerate(held_out)]
    pooled = [settled(part, -1) for part in unknown] if several else own

    def at_scales(streams: FloatArray, row: int, usual: FloatArray, by: Scales) -> FloatArray:
        """Streams at all time scales, (CUSUM_BEHIND + N, C), of slots with all neighbours."""
        known = _padded(streams)[None], neutral[row][None], usual[None]
        return np.asarray(_at_scales(*known, by=by))[0, : len(streams) - by.behind - by.ahead]

    def usual(streams: Sequence[FloatArray], by: Scales) -> FloatArray:
        """98th percentiles (S,), as the short scale's last knots will have them."""
        sample = np.concatenate([each[before : len(each) - by.ahead] for each in streams])
        return np.stack([calibration.fit_knots(column)[-1] for column in sample.T])

    def tails(by: Scales) -> tuple[_Tails, list[FloatArray]]:
        of_own = [at_scales(part, row, usual([part], by), by) for row, part in enumerate(own)]
        of_all = of_own
        if several:
            limit = usual(pooled, by)
            of_all = [at_scales(part, -1, limit, by) for part in pooled]
        return _fit_tails(of_own, of_all, reader)

    each = [tails(scorers.scales(config, lag)) for lag in calibration.LAGS]
    widest = max(found.slope.shape[1] for found, _ in each)
    *rows, slots = zip(*(_widened(found, widest) for found, _ in each), strict=True)
    knots, slope, joint_knots, joint_slope = (jnp.stack(parts, 1) for parts in rows)
    tables = Calibration(
        jnp.asarray(neutral), knots, slope, joint_knots, joint_slope, jnp.stack(slots)
    )
    own_evidence = [of_scorers[0] for of_scorers in each[0][1]]
    evidence = np.concatenate(own_evidence)
    weeks = len(evidence) * dataset.period_ms / WEEK_MS
    line = calibration.evidence_threshold(1.0, dataset.period_ms, float(slots[0][0]))
    band_scale, coverage = _fit_bands(held_out, before)
    metrics = {
        "held_out_slots": float(len(evidence)),
        "band_coverage": coverage,
        "share_above_evidence_3": float((evidence > 3.0).mean()),
        "largest_evidence": float(evidence.max()),
        "alarms_per_entity_week": count_alarms(own_evidence, line) / weeks,
    }
    return Fitted(tables, band_scale, metrics)


class _Tails(NamedTuple):
    """Of one lag: (R+1, C, Q), (R+1, C), (R+1, J, Q), (R+1, J), (J,)."""

    knots: FloatArray
    slope: FloatArray
    joint_knots: FloatArray
    joint_slope: FloatArray
    slots_per_alarm: FloatArray


def _widened(found: _Tails, columns: int) -> _Tails:
    """Tables for as many scales as the lag with most of them has; what is filled up is not read."""
    more = (0, columns - found.slope.shape[1])
    return found._replace(
        knots=np.pad(found.knots, ((0, 0), more, (0, 0)), mode="edge"),
        slope=np.pad(found.slope, ((0, 0), more), mode="edge"),
    )


def _fit_tails(
    own: Sequence[FloatArray], unknown: Sequence[FloatArray], reader: Reader
) -> tuple[_Tails, list[FloatArray]]:
    """Tails of samples (CUSUM_BEHIND + N, C), and the evidence (J, N) of `own` ones.

    `own` are entities read as themselves, `unknown` as never-seen ones; the first CUSUM_BEHIND
    slots of each are not calibrated on.
    """
    skip = calibration.CUSUM_BEHIND
    pooled = np.concatenate([each[skip:] for each in unknown])
    samples = [*(each[skip:] for each in own), pooled]
    knots = np.stack([[calibration.fit_knots(column) for column in each.T] for each in samples])
    # A row's own exceedances are few: its tail's exponent leans on all rows' together.
    of_all = _slopes(pooled, knots[-1])
    of_own = [_slopes(each, knots[row], of_all) for row, each in enumerate(samples[:-1])]
    slope = np.array([*of_own, of_all], np.float32)

    def combined(sample: FloatArray, row: int) -> FloatArray:
        found = _combined(_padded(sample), knots[row], slope[row], reader)
        return np.asarray(found)[:, : len(sample) - skip]

    joint = [combined(each, row) for row, each in enumerate(own)]
    joint.append(np.concatenate([combined(each, -1) for each in unknown], 1))
    joint_knots = np.stack([[calibration.fit_knots(sample) for sample in row] for row in joint])
    joint_slope = np.array(
        [
            [
                calibration.fit_joint_slope(sample, last)
                for sample, last in zip(row, rest[:, -1], strict=True)
            ]
            for row, rest in zip(joint, joint_knots, strict=True)
        ],
        np.float32,
    )
    padded = (
        np.asarray(_joint(_padded(each.T).T, joint_knots[row], joint_slope[row]))
        for row, each in enumerate(joint[:-1])
    )
    found = [each[:, : len(sample) - skip] for each, sample in zip(padded, own, strict=True)]
    of_scorers = zip(*found, strict=True)
    slots = np.array([slots_per_alarm(evidence) for evidence in of_scorers], np.float32)
    return _Tails(knots, slope, joint_knots, joint_slope, slots), found


def _slopes(
    sample: FloatArray, knots: FloatArray, of_all: Sequence[float] | None = None
) -> list[float]:
    """Slopes of a sample's columns (N, C) with their knots (C, Q), leaning on those of all rows."""
    leaning = [None] * len(knots) if of_all is None else of_all
    each = zip(sample.T, knots[:, -1], leaning, strict=True)
    return [calibration.fit_slope(column, last, every) for column, last, every in each]


def _covered(part: _HeldOut, skip: int) -> FloatArray:
    """Streams of the slots in which at least half of the usual cells were observed."""
    coverage = np.asarray(part.readings.coverage)[skip:].min(-1)
    kept = coverage >= 0.5 * np.median(coverage)
    streams = np.asarray(part.readings.streams)[skip:]
    return streams[kept & (coverage > 0)] if coverage.any() else streams


def _fit_bands(held_out: Sequence[_HeldOut], skip: int) -> tuple[FloatArray, float]:
    """Scale of the masked reading's sd, (R+1, D), so that 90 % of held-out cells lie in the band.

    An entity with few readings of a channel leans on the pooled scale, that of the mean entity: one
    with a long history has no more say in it. Returns the share of cells that the bands cover, too.
    """
    ratios = [
        np.abs(part.z - np.asarray(part.readings.expected))[skip:]
        / np.asarray(part.readings.sd)[skip:]
        for part in held_out
    ]
    seen = np.stack([np.isfinite(ratio).sum(0) for ratio in ratios])
    own = np.stack([_quantile(ratio) for ratio in ratios])
    said = np.minimum(seen, _PRIOR_CELLS)
    # A Gaussian's, where nothing was ever seen.
    pooled = np.where(said.any(0), (said * own).sum(0) / np.maximum(said.sum(0), 1.0), _Z90)
    rows = (seen * own + _PRIOR_CELLS * pooled) / (seen + _PRIOR_CELLS)
    inside = sum(int((ratio <= scale).sum()) for ratio, scale in zip(ratios, rows, strict=True))
    # A channel that never moves must not get a band of no width: its first rounding error would
    # take all the blame.
    scales = np.clip(np.stack([*rows, pooled]) / _Z90, 0.1, 100.0)
    return scales.astype(np.float32), inside / max(int(seen.sum()), 1)


def _quantile(ratio: FloatArray) -> DoubleArray:
    """90th percentile of each channel's finite entries, 0 where there is none."""
    finite = (column[np.isfinite(column)] for column in ratio.T)
    return np.array([np.quantile(column, 0.9) if len(column) else 0.0 for column in finite])
