"""Metrics against closed forms, the public VUS, scikit-learn, and the service's alert rule."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy.stats import norm
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from stream.decide import AlertPolicy, AlertState, step
from train.metrics import (
    Cause,
    alarms,
    autocorrelation_period,
    average_precision,
    event_metrics,
    hit_rate,
    roc_auc,
    segments,
    slots_per_alarm,
    volumes,
    vus_pr,
)
from tsdiff.calibration import evidence_threshold

# Expected values are those of TSB-AD's `generate_curve` (version "opt", 250 thresholds) and
# `find_length_rank` (rank 1) at TheDatumOrg/TSB-AD commit 87630099ea8d.
GOLDEN: dict[str, list[dict[str, Any]]] = json.loads(
    Path(__file__).with_name("vus_golden.json").read_text()
)
MINUTE_MS = 60_000


def drawn(picture: str) -> np.ndarray:
    """A picture of rows: `#` is 1, `.` is 0."""
    return np.array([mark == "#" for mark in picture])


# -- volumes -----------------------------------------------------------------------------------


def golden_series(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(case["seed"])  # its stream never changes
    labels = np.zeros(case["rows"], np.int64)
    for start, end in case["segments"]:
        labels[start:end] = 1
    anomaly_score = random.normal(size=case["rows"]) + case["gain"] * labels
    match case["kind"]:
        case "quantised":
            anomaly_score = np.round(2 * anomaly_score) / 2
        case "equal":
            anomaly_score = np.zeros(case["rows"])
        case "binary":
            anomaly_score = (anomaly_score > 1.5).astype(float)
        case "perfect":
            anomaly_score = labels + 0.001 * random.uniform(size=case["rows"])
        case "inverted":
            anomaly_score = -anomaly_score
        case "shifted":
            anomaly_score = np.roll(anomaly_score, 7)
    return labels, anomaly_score


@pytest.mark.parametrize("case", GOLDEN["volumes"], ids=lambda case: case["name"])
def test_volumes_are_those_of_the_public_implementation(case: dict[str, Any]) -> None:
    found = volumes(*golden_series(case), case["buffer"])
    assert found.pr == pytest.approx(case["vus_pr"], abs=1e-9)
    assert found.roc == pytest.approx(case["vus_roc"], abs=1e-9)


def by_definition(labels: np.ndarray, anomaly_score: np.ndarray, buffer: int) -> float:
    """VUS-PR, threshold by threshold and row by row."""
    rows, runs = len(labels), [(a, b - 1) for a, b in segments(labels).tolist()]
    ordered = sorted(anomaly_score, reverse=True)
    thresholds = [ordered[int(place)] for place in np.linspace(0, rows - 1, 250)]
    total = 0.0
    for width in range(buffer + 1):
        sloped = labels.astype(float)
        for row in np.flatnonzero(labels == 0):
            distances = [max(a - row, row - b) for a, b in runs]
            sloped[row] = min(
                1.0, sum(math.sqrt(1 - d / width) for d in distances if d <= width // 2)
            )
        near: list[list[int]] = []
        for a, b in runs:
            if near and near[-1][1] >= a - width // 2:
                near[-1][1] = b + width // 2
            else:
                near.append([a - width // 2, b + width // 2])
        before = 0.0
        for threshold in thresholds:
            alarm = anomaly_score >= threshold
            hits = sloped[alarm].sum()
            slopes = sloped[alarm & (labels == 0)].sum()
            found = np.mean([alarm[max(a, 0) : b + 1].any() for a, b in near])
            recall = min(hits / (labels.sum() + slopes / 2), 1.0) * found
            total += (recall - before) * hits / alarm.sum()
            before = recall
    return float(total / (buffer + 1))


series = st.integers(5, 60).flatmap(
    lambda rows: st.tuples(
        st.lists(st.sampled_from([0, 0, 0, 1]), min_size=rows, max_size=rows).filter(
            lambda labels: 0 < sum(labels) < len(labels)
        ),
        st.lists(st.integers(-20, 20), min_size=rows, max_size=rows),
    )
)


@settings(max_examples=25, deadline=None)
@given(series, st.integers(0, 12))
def test_volumes_are_what_they_are_defined_to_be(
    case: tuple[list[int], list[int]], buffer: int
) -> None:
    labels, anomaly_score = np.array(case[0]), np.array(case[1], float)
    expected = by_definition(labels, anomaly_score, buffer)
    assert vus_pr(labels, anomaly_score, buffer) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(series, st.integers(0, 30))
def test_only_order_matters_and_time_may_run_backwards(
    case: tuple[list[int], list[int]], buffer: int
) -> None:
    labels, anomaly_score = np.array(case[0]), np.array(case[1], float)
    found = volumes(labels, anomaly_score, buffer)
    assert volumes(labels, np.arctan(anomaly_score) * 7 - 3, buffer) == found
    assert volumes(labels[::-1], anomaly_score[::-1], buffer) == pytest.approx(found)


@settings(max_examples=50, deadline=None)
@given(series)
def test_points_may_change_places_for_pointwise_metrics(case: tuple[list[int], list[int]]) -> None:
    labels, anomaly_score = np.array(case[0]), np.array(case[1], float)
    order = np.random.default_rng(0).permutation(len(labels))
    for metric, public in (
        (average_precision, average_precision_score),
        (roc_auc, roc_auc_score),
    ):
        found = metric(labels, anomaly_score)
        assert found == pytest.approx(public(labels, anomaly_score))
        assert metric(labels[order], anomaly_score[order]) == pytest.approx(found)


def test_a_perfect_score_is_worth_one_and_its_opposite_little() -> None:
    labels = drawn("....####......#.....####....")
    assert volumes(labels, labels.astype(float), 0) == pytest.approx((1.0, 1.0))
    assert vus_pr(labels, labels.astype(float), 6) > 0.9
    assert vus_pr(labels, -labels.astype(float), 0) < 0.4
    assert roc_auc(labels, -labels.astype(float)) == 0.0


def test_a_near_miss_is_worth_something_with_a_buffer_and_nothing_without() -> None:
    labels = drawn("..........####..........")
    near = drawn("......##................").astype(float)
    far = drawn(".#.#....................").astype(float)
    assert vus_pr(labels, near, 8) > vus_pr(labels, far, 8)
    assert vus_pr(labels, near, 0) == vus_pr(labels, far, 0)


@pytest.mark.parametrize("labels", ["......", "######"])
def test_with_one_class_there_is_nothing_to_measure(labels: str) -> None:
    anomaly_score = np.arange(6.0)
    assert all(math.isnan(value) for value in volumes(drawn(labels), anomaly_score, 3))
    assert math.isnan(roc_auc(drawn(labels), anomaly_score))


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        vus_pr(drawn(".#."), np.array([0.0, np.nan, 1.0]), 3)
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        average_precision(drawn(".#."), np.zeros(4))


def test_a_long_series_with_a_wide_buffer_takes_seconds() -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros(140_000, np.int64)
    for start in rng.integers(0, 139_900, 80):
        labels[start : start + 30] = 1
    begun = time.monotonic()
    assert 0 < vus_pr(labels, rng.normal(size=140_000) + labels, 300) < 1
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("case", GOLDEN["periods"], ids=lambda case: str(case["period"]))
def test_the_buffer_is_that_of_the_public_implementation(case: dict[str, Any]) -> None:
    row = np.arange(case["rows"])
    noise = np.random.RandomState(case["seed"]).normal(size=case["rows"])
    channel = case["noise"] * noise + case["trend"] * row
    if case["period"]:
        channel = channel + np.sin(2 * np.pi * row / case["period"])
    assert autocorrelation_period(channel) == case["buffer"]


@pytest.mark.parametrize("channel", [np.full(500, 3.0), np.arange(2.0), np.ones(1)])
def test_a_channel_without_a_rhythm(channel: np.ndarray) -> None:
    assert autocorrelation_period(channel) == 125


def test_segments_are_half_open_runs() -> None:
    assert segments(drawn("#..##.#")).tolist() == [[0, 1], [3, 5], [6, 7]]
    assert segments(drawn("...")).shape == (0, 2)


# -- alarms ------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.1, 0.6, 0.9, 1.5, 3.0, None]), min_size=1, max_size=60))
def test_alarms_are_those_of_the_service(anomaly_scores: list[float | None]) -> None:
    policy, state, silent, active = AlertPolicy(), AlertState("ok"), 0, []
    for slot, anomaly_score in enumerate(anomaly_scores):
        silent = 0 if anomaly_score is not None else silent + 1
        state = step(policy, state, slot, anomaly_score, silent_slots=silent)
        active.append(state.phase in ("firing", "recovering"))
    found = alarms(np.array(anomaly_scores, float))
    assert found.tolist() == active


def test_events_are_segments_that_an_alarm_touches() -> None:
    labels = drawn("..####......####....###.")
    alarm = drawn("....##.##.....####......")
    #               found   false  found      missed
    found = event_metrics(labels, alarm, MINUTE_MS)
    assert found.event_precision == pytest.approx(2 / 3)
    assert found.event_recall == pytest.approx(2 / 3)
    assert found.event_f1 == pytest.approx(2 / 3)
    assert found.delay_slots == 2.0
    assert found.false_alarms_per_entity_day == pytest.approx(1 / (13 / 1440))
    assert found.alarmed == pytest.approx(4 / 13)


def test_events_where_there_is_nothing_to_divide_by() -> None:
    silent = event_metrics(drawn(".##."), drawn("...."), MINUTE_MS)
    assert (silent.event_recall, silent.event_f1, silent.false_alarms_per_entity_day) == (0, 0, 0)
    assert math.isnan(silent.event_precision)
    assert math.isnan(silent.delay_slots)
    normal = event_metrics(drawn("...."), drawn(".##."), MINUTE_MS)
    assert math.isnan(normal.event_f1)
    assert normal.false_alarms_per_entity_day == 360.0
    assert math.isnan(event_metrics(drawn("##"), drawn("##"), MINUTE_MS).alarmed)


def test_slots_of_an_alarm_are_counted_and_lean_on_the_usual() -> None:
    calm, cluster = np.full(30, 0.5), np.full(12, 2.4)
    series = np.concatenate([calm, cluster] * 20)
    # 20 alarms of 12 slots beside 5 of 8; what goes on at the end is one, too.
    assert slots_per_alarm([series]) == pytest.approx((20 * 12 + 5 * 8) / 25)
    assert slots_per_alarm([series[:420], series[420:]]) == slots_per_alarm([series])
    assert slots_per_alarm([]) == slots_per_alarm([calm]) == 8.0


@pytest.mark.parametrize("memory", [0.5, 0.8, 0.95])
def test_alarms_of_normal_data_are_as_rare_as_was_asked_for(memory: float) -> None:
    def evidence(slots: int, seed: int) -> NDArray[np.float64]:
        """Of an autoregressive process, in which one slot is like the last."""
        noise = np.random.default_rng(seed).standard_normal(slots)
        values = np.convolve(noise, memory ** np.arange(200))[:slots] * math.sqrt(1 - memory**2)
        return -np.asarray(norm.logsf(values), np.float64) / math.log(10)

    held_out, stream = evidence(40_000, 1), evidence(1_000_000, 2)
    rate = 7.0
    threshold = evidence_threshold(rate, MINUTE_MS, slots_per_alarm([held_out]))
    weeks = len(stream) * MINUTE_MS / (7 * 24 * 3600 * 1000)
    asked, raised = rate * weeks, len(segments(alarms(stream / threshold)))
    assert 0.5 * asked < raised < 2 * asked
    # Slots taken for alarms, next to none would be raised.
    of_slots = evidence_threshold(rate, MINUTE_MS, 1.0)
    assert len(segments(alarms(stream / of_slots))) < 0.3 * asked


# -- root causes -------------------------------------------------------------------------------


def test_hit_rate_counts_true_channels_among_as_many_blamed() -> None:
    contribution = np.zeros((10, 4))
    contribution[2:4] = [[0.5, 0.3, 0.2, 0.0], [0.5, np.nan, 0.3, 0.0]]
    contribution[6:9] = [0.1, 0.2, 0.3, 0.4]
    first, second = Cause(2, 4, frozenset({0, 1})), Cause(6, 9, frozenset({3}))
    assert hit_rate(contribution, [first]) == 0.5  # blamed: 0 and 2
    assert hit_rate(contribution, [first], 1.5) == 1.0
    assert hit_rate(contribution, [first, second]) == 0.75
    assert math.isnan(hit_rate(contribution, []))
