"""A look at one moment of history: scored, put into words and made ready to be drawn.

history -> series on the grid -> scores around the moment -> the stretch -> Event, Picture
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

import numpy as np
from numpy.typing import NDArray

from train.picture import Panel, Picture
from tsdiff.bundle import Bundle
from tsdiff.detector import Detector
from tsdiff.errors import ConfigError, HistoryError
from tsdiff.explain import NAMED, Deviation, Event, moment_text, paragraph
from tsdiff.history import STEP_LIMIT, EntityHistory, History
from tsdiff.series import score_series
from tsdiff.types import FloatArray
from tsdiff.windows import to_grid

# What the service does with its default settings, so that both say the same of the same data:
# its threshold, when an alert is over, and how long an entity never seen in training is watched.
_FALSE_ALARMS_PER_ENTITY_WEEK = 1.0
_GAP_SLOTS = 5
_NEWCOMER_SLOTS = 256
_REACH_SLOTS = 256  # how far to look around the moment at first; doubled while a stretch goes on
_LEAST_MARGIN, _MOST_DRAWN = 45, 4000  # slots
_FURTHEST = 10.0  # usual errors that count: one wild reading does not outweigh an hour
_NEARLY_ALL = 0.95
_SWINGS_SHARE = 0.25  # of the slots beyond the band, on the side where they are fewer


@dataclass(frozen=True)
class Series:
    """One entity on the grid: slot `numbers` (M,), raw `values` (M, D), NaN = missing.

    `mean`, `scale` (D,) are its statistics, `row` its row in the bundle; `first` is the position
    of the first slot that can be scored.
    """

    entity: str
    numbers: NDArray[np.int64]
    values: FloatArray
    mean: FloatArray
    scale: FloatArray
    row: int
    first: int
    steps: bool


@dataclass(frozen=True)
class Scores:
    """Slots `start` to before `stop` of a series, scored; where nothing arrived, the score is NaN.

    `evidence`, `anomaly_score` (T,); the rest as in `tsdiff.detector.Detection`, of one entity.
    """

    start: int
    stop: int
    evidence: FloatArray
    anomaly_score: FloatArray
    expected: FloatArray
    lower: FloatArray
    upper: FloatArray
    contribution: FloatArray


@dataclass(frozen=True)
class Inspection:
    """What `inspect_moment` found, in words and ready to be drawn."""

    event: Event
    text: str
    picture: Picture


# -- what is asked for -------------------------------------------------------------------------


def choose_entity(history: History, wanted: str | None) -> EntityHistory:
    """Find the entity by its name; without one there must be only one.

    Raises:
        ConfigError: there is none of that name, or the name is needed.

    """
    names = [entity.entity for entity in history.entities]
    if wanted is None:
        if len(names) == 1:
            return history.entities[0]
        raise ConfigError(f"expected --entity, the history holds {len(names)}: {_some(names)}")
    if wanted in names:
        return history.entities[names.index(wanted)]
    near = difflib.get_close_matches(wanted, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"the history holds {_some(names)}"
    raise ConfigError(f"expected an entity of the history for --entity, got {wanted!r}; {hint}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def parse_moment(text: str, period_ms: int) -> int:
    """Read RFC 3339 (UTC where no zone is given), epoch milliseconds or a step index, as ms.

    Integers are told apart as in history: below 10^11 they count periods.

    Raises:
        ConfigError: it is none of these.

    """
    if re.fullmatch(r"\d{1,15}", text.strip(), re.ASCII):
        number = int(text)
        return number if number >= STEP_LIMIT else number * period_ms
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ConfigError(
            "expected --at as RFC 3339 (2026-11-23T12:04:00Z), epoch milliseconds or, for step "
            f"timestamps, a step index, got {text!r}"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return math.floor(moment.timestamp() * 1000)


def series_of(detector: Detector, bundle: Bundle, history: EntityHistory) -> Series:
    """Put an entity's readings on the grid, with the statistics that the service would use."""
    # A silence longer than what is remembered is cut: no window sees across it.
    longest_gap = detector.window + detector.history
    numbers, values = to_grid(
        history.timestamps_ms, history.values, detector.period_ms, longest_gap
    )
    row = detector.row(history.entity)
    mean, scale = detector.statistics(row)
    first = bundle.manifest.model.window
    if row < 0:
        first = _NEWCOMER_SLOTS
        seen = values[:first].astype(np.float64)
        filled = np.nan_to_num(seen)
        count = np.isfinite(seen).sum(0).astype(np.float64)
        mean, scale = detector.fit_statistics(count, filled.sum(0), (filled**2).sum(0))
    steps = bool(history.timestamps_ms[-1] < STEP_LIMIT)
    return Series(history.entity, numbers, values, mean, scale, row, first, steps)


def position_of(series: Series, at_ms: int, period_ms: int) -> int:
    """Return the position of a moment's slot.

    Raises:
        ConfigError: it is outside of the history, in a long silence, or too early to be scored.

    """
    number = at_ms // period_ms
    told = partial(_told, series, period_ms=period_ms)
    if len(series.numbers) <= series.first:
        raise HistoryError(
            f"expected more than {series.first} slots of {series.entity} in the history, since the "
            f"first ones only fill the window, got {len(series.numbers)}; give more of it"
        )
    if not series.numbers[series.first] <= number <= series.numbers[-1]:
        early = series.numbers[0] <= number < series.numbers[series.first]
        why = f"; the first {series.first} slots of a history are not scored" if early else ""
        raise ConfigError(
            f"expected --at from {told(int(series.numbers[series.first]))} to "
            f"{told(int(series.numbers[-1]))}, the history of {series.entity}, got "
            f"{told(number)}{why}"
        )
    position = int(np.searchsorted(series.numbers, number))
    if series.numbers[position] != number:
        raise ConfigError(
            f"expected --at where {series.entity} has readings, got {told(number)} in a silence "
            f"that lasts until {told(int(series.numbers[position]))}"
        )
    return position


def _told(series: Series, number: int, period_ms: int) -> str:
    """Tell a slot's time."""
    return f"step {number}" if series.steps else f"{moment_text(number * period_ms)} UTC"


# -- scoring -----------------------------------------------------------------------------------


def score_stretch(detector: Detector, series: Series, start: int, stop: int) -> Scores:
    """Score the slots at positions `start` to before `stop`."""
    found = score_series(
        detector,
        series.entity,
        series.values[:stop],
        mean=series.mean,
        scale=series.scale,
        numbers=series.numbers[:stop],
        first=series.first,
        start=start,
    )
    heard = np.isfinite(series.values[start:stop]).any(axis=1)
    evidence = np.where(heard, found.evidence, np.nan).astype(np.float32)
    threshold = detector.threshold(_FALSE_ALARMS_PER_ENTITY_WEEK)
    return Scores(
        start=start,
        stop=stop,
        evidence=evidence,
        anomaly_score=(evidence / threshold).astype(np.float32),
        expected=found.expected,
        lower=found.lower,
        upper=found.upper,
        contribution=found.contribution,
    )


def stretches(anomaly_score: FloatArray) -> list[tuple[int, int]]:
    """Find the runs of slots above the threshold; calm of a few slots does not end one."""
    hot = np.flatnonzero(np.nan_to_num(anomaly_score) > 1)
    if len(hot) == 0:
        return []
    breaks = np.flatnonzero(np.diff(hot) > _GAP_SLOTS + 1)
    firsts = hot[np.r_[0, breaks + 1]].tolist()
    lasts = hot[np.r_[breaks, len(hot) - 1]].tolist()
    return [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]


def stretch_at(found: Sequence[tuple[int, int]], at: int) -> tuple[int, int] | None:
    """Return the stretch that `at` is in, or a few slots beside."""
    near = [(max(a - at, at - (b - 1), 0), (a, b)) for a, b in found]
    distance, stretch = min(near, default=(_GAP_SLOTS + 1, None))
    return stretch if distance <= _GAP_SLOTS else None


def look(detector: Detector, series: Series, at: int, reach: int) -> Scores:
    """Score around a position, at least `reach` slots each way, and all of the stretch it is in."""
    end = len(series.values)
    before = after = max(reach, _REACH_SLOTS)
    while True:
        start, stop = max(at - before, series.first), min(at + after + 1, end)
        scores = score_stretch(detector, series, start, stop)
        stretch = stretch_at(stretches(scores.anomaly_score), at - start)
        if stretch is None:
            return scores
        goes_back = start > series.first and stretch[0] <= _GAP_SLOTS
        goes_on = stop < end and stretch[1] >= stop - start - _GAP_SLOTS
        if not (goes_back or goes_on):
            return scores
        before, after = before * (1 + goes_back), after * (1 + goes_on)


# -- words and picture -------------------------------------------------------------------------


def inspect_moment(
    detector: Detector,
    bundle: Bundle,
    history: EntityHistory,
    at_ms: int,
    *,
    around_ms: int | None = None,
    channels: int = 4,
) -> Inspection:
    """Score an entity around a moment; say and show what happened there.

    `around_ms` is drawn on each side of the moment; without it, the stretch and some of the time
    around it. `channels` is how many of them are drawn.

    Raises:
        ConfigError: the moment is not one that can be scored.
        HistoryError: the history is too short.

    """
    period_ms = detector.period_ms
    series = series_of(detector, bundle, history)
    at = position_of(series, at_ms, period_ms)
    reach = _LEAST_MARGIN if around_ms is None else max(1, around_ms // period_ms)
    scores = look(detector, series, at, reach)
    found = stretches(scores.anomaly_score)
    here = at - scores.start
    stretch = stretch_at(found, here)
    told = partial(_told, series, period_ms=period_ms)
    span = (here, here + 1)
    if stretch is not None:
        span = without_echo(series, scores, stretch, detector.history)
    evidence = scores.evidence[slice(*(stretch or span))]
    highest = float(np.nanmax(evidence)) if np.isfinite(evidence).any() else 0.0
    event = _event(detector, series, scores, span, highest)
    text = paragraph(event)
    if stretch is not None and span != stretch:
        last = told(int(series.numbers[scores.start + stretch[1] - 1]))
        text += (
            f" The anomaly score, which remembers {detector.history + 1} slots, stayed above the "
            f"threshold until {last}."
        )
    if stretch is None and found:
        a, b = min(found, key=lambda ab: max(ab[0] - here, here - ab[1]))
        nearest = here if a <= here < b else (a if a > here else b - 1)
        when = told(int(series.numbers[scores.start + nearest]))
        text += f" The nearest anomalous slot is at {when}."
    if stretch is not None and around_ms is None:
        reach = max(_LEAST_MARGIN, (span[1] - span[0]) // 2)
        view = (min(span[0], here) - reach, max(span[1], here) + reach)
    else:
        view = (here - reach, here + reach + 1)
    # A picture is a thousand dots wide; of a very long stretch, the part around the moment.
    view = (max(view[0], here - _MOST_DRAWN, 0), min(view[1], here + _MOST_DRAWN))
    view = (view[0], min(view[1], scores.stop - scores.start))
    shaded = (max(span[0] - view[0], 0), min(span[1], view[1]) - view[0])
    shown = _panels(bundle, series, scores, span, view)[:channels]
    if stretch is None:
        # Of a calm slot, who deviates most of all that do not says nothing.
        shown = tuple(replace(panel, share=math.nan) for panel in shown)
    picture = Picture(
        title=f"{series.entity}, {told(event.start_ms // period_ms)}",
        text=text,
        panels=shown,
        numbers=series.numbers[scores.start + view[0] : scores.start + view[1]],
        anomaly_score=scores.anomaly_score[slice(*view)],
        stretch=None if stretch is None or shaded[0] >= shaded[1] else shaded,
        at=here - view[0],
        period_ms=period_ms,
        steps=series.steps,
    )
    return Inspection(event, text, picture)


def _off(series: Series, scores: Scores, part: slice) -> FloatArray:
    """Distance of readings from what was expected, in half widths of the band, (T, D)."""
    half = np.maximum((scores.upper[part] - scores.lower[part]) / 2, np.finfo(np.float32).tiny)
    observed = series.values[scores.start : scores.stop][part]
    return np.asarray((observed - scores.expected[part]) / half, np.float32)


def _weighed(series: Series, scores: Scores, part: slice) -> FloatArray:
    """What every slot and channel (T, D) adds to an anomaly: its share of the slot's deviation.

    A stretch is then judged by the slots that deviate most, and not by its calm ones, of whose
    next to nothing somebody has a large share, too.
    """
    size = np.minimum(np.abs(np.nan_to_num(_off(series, scores, part))), _FURTHEST)
    total = (size**2).sum(1, keepdims=True)
    return np.asarray(np.nan_to_num(scores.contribution[part]) * total, np.float32)


def _shares(series: Series, scores: Scores, part: slice) -> FloatArray:
    """Contribution of every channel (D,) over a stretch; they sum to 1."""
    shares = _weighed(series, scores, part).sum(0)
    total = shares.sum()
    return np.asarray(shares / total if total > 0 else shares, np.float32)


def without_echo(
    series: Series, scores: Scores, stretch: tuple[int, int], memory: int
) -> tuple[int, int]:
    """Cut off a stretch's end, where only the score's `memory` keeps it above the threshold.

    What is left ends with the slot by which nearly all of the guiltiest channels' deviation has
    come. An end of a few slots is kept: so much is not known so exactly.
    """
    weighed = _weighed(series, scores, slice(*stretch))
    order = np.argsort(-weighed.sum(0), kind="stable")[:NAMED]
    so_far = weighed[:, order].sum(1).cumsum()
    end = stretch[0] + int(np.searchsorted(so_far, _NEARLY_ALL * so_far[-1])) + 1
    end = max(end, stretch[1] - memory)
    return stretch if stretch[1] - end <= _GAP_SLOTS else (stretch[0], end)


def _event(
    detector: Detector, series: Series, scores: Scores, span: tuple[int, int], highest: float
) -> Event:
    bundle, period_ms = detector.bundle, detector.period_ms
    threshold = detector.threshold(_FALSE_ALARMS_PER_ENTITY_WEEK)
    part = slice(*span)
    begin, end = scores.start + span[0], scores.start + span[1]
    observed, before = series.values[begin:end], series.values[:begin]
    shares, off = _shares(series, scores, part), _off(series, scores, part)
    deviations = []
    for c, (name, unit) in enumerate(zip(bundle.channels, bundle.units, strict=True)):
        if not np.isfinite(series.values[:, c]).any():
            continue  # Never heard of: that it is silent now is no news.
        beyond = off[np.abs(np.nan_to_num(off[:, c])) > 1, c]
        above = float((beyond > 0).mean()) if len(beyond) else 0.5
        swings = _SWINGS_SHARE <= above <= 1 - _SWINGS_SHARE
        # The slot to tell of is on the side where the channel mostly was.
        size = np.abs(off[:, c]) if swings else off[:, c] * (1 if above > 0.5 else -1)
        worst = int(np.argmax(np.nan_to_num(size, nan=-np.inf)))
        reading = float(observed[worst, c])
        earlier = before[np.isfinite(before[:, c]), c]
        deviations.append(
            Deviation(
                channel=name,
                observed=reading if math.isfinite(reading) else None,
                expected=float(scores.expected[part][worst, c]),
                lower=float(scores.lower[part][worst, c]),
                upper=float(scores.upper[part][worst, c]),
                contribution=float(shares[c]),
                unit=unit,
                swings=swings and len(beyond) > 0,
                still=len(earlier) > 0 and bool(earlier.min() == earlier.max()),
            )
        )
    return Event(
        entity=series.entity,
        deviations=tuple(deviations),
        channels=len(bundle.channels),
        start_ms=int(series.numbers[begin]) * period_ms,
        end_ms=(int(series.numbers[end - 1]) + 1) * period_ms,
        # Whether it goes on behind the last slot, nobody knows yet.
        ongoing=highest > threshold and end == len(series.values),
        period_ms=period_ms,
        anomaly_score=highest / threshold,
        p_value=10.0**-highest,
        slots_per_alarm=detector.slots_per_alarm,
        steps=series.steps,
    )


def _panels(
    bundle: Bundle,
    series: Series,
    scores: Scores,
    span: tuple[int, int],
    view: tuple[int, int],
) -> tuple[Panel, ...]:
    """Every channel that has ever sent something, the guiltiest first, ties by position."""
    shares = _shares(series, scores, slice(*span))
    part = slice(*view)
    observed = series.values[scores.start : scores.stop][part]
    heard = np.isfinite(series.values).sum(axis=0) > 0
    order = np.argsort(-shares, kind="stable")
    return tuple(
        Panel(
            bundle.channels[c],
            bundle.units[c],
            observed[:, c],
            scores.expected[part, c],
            scores.lower[part, c],
            scores.upper[part, c],
            float(shares[c]),
        )
        for c in order[heard[order]].tolist()
    )
