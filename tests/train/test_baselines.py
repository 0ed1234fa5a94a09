"""Baselines find what is obvious, never look ahead, and say what they lack."""

import sys
from functools import cache

import numpy as np
import pytest

from tests.train.simulated import simulate
from train.baselines import BASELINES, CLIP, Scored, Scorer, fit, forward_fill, trailing
from train.cnn import CNN
from tsdiff.errors import HistoryError, TsdiffError

HELD_OUT = 200
FAULT = slice(200, 230)


@cache
def series() -> tuple[np.ndarray, np.ndarray]:
    values = simulate(1300, 0, missing=0.03)
    return values[:900], values[900:]


@cache
def fitted(name: str) -> Scorer:
    return fit(BASELINES[name](), series()[0], HELD_OUT, seed=0, goes_on=True)


@cache
def clean(name: str) -> Scored:
    return fitted(name)(series()[1])


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CNN, "_steps", 250)


@pytest.mark.parametrize("name", BASELINES)
def test_an_obvious_fault_is_found(name: str) -> None:
    test = series()[1].copy()
    test[FAULT] += [3, 30, 0.03, 3e6, 0]  # about three standard deviations, all but one channel
    found = fitted(name)(test)
    usual = np.quantile(clean(name).anomaly_score, 0.99)
    assert found.anomaly_score[FAULT].max() > usual
    assert np.argmax(found.anomaly_score) in range(FAULT.start, FAULT.stop + 40)
    assert found.evidence[FAULT].max() > 2.0
    assert np.isfinite(found.anomaly_score).all()


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "iforest"])
def test_the_channel_that_fails_is_blamed(name: str) -> None:
    test = series()[1].copy()
    test[FAULT, 1] += 500.0
    found = fitted(name)(test).contribution
    assert found is not None
    assert found[FAULT.start].argmax() == 1


@pytest.mark.parametrize("name", BASELINES)
def test_the_future_changes_nothing(name: str) -> None:
    test = series()[1].copy()
    test[250:] *= -3
    test[260:] = np.nan
    whole, other = clean(name), fitted(name)(test)
    short = fitted(name)(series()[1][:250])
    for changed in (other, short):
        for field in ("anomaly_score", "evidence", "contribution"):
            if getattr(whole, field) is not None:
                np.testing.assert_allclose(
                    getattr(changed, field)[:250], getattr(whole, field)[:250], rtol=1e-4, atol=1e-5
                )
    assert not np.allclose(other.anomaly_score[250:], whole.anomaly_score[250:])


@pytest.mark.parametrize("name", ["l2", "pca", "kmeansad", "ols"])
def test_windows_reach_into_the_past_only_where_it_goes_on(name: str) -> None:
    past, test = series()
    cold = fit(BASELINES[name](), past, HELD_OUT, seed=0, goes_on=False)(test)
    context = BASELINES[name]().context
    warm = clean(name)
    assert not np.allclose(cold.anomaly_score[:context], warm.anomaly_score[:context])
    # 30 slots more: a channel that is missing at first is the mean until it is seen.
    after = slice(context + 30, None)
    np.testing.assert_allclose(cold.anomaly_score[after], warm.anomaly_score[after], rtol=1e-3)


@pytest.mark.parametrize("name", BASELINES)
def test_held_out_evidence_is_a_tail_probability(name: str) -> None:
    """On data like the calibrating one, evidence 1 is reached by about one slot in ten."""
    past, _ = series()
    found = fit(BASELINES[name](), past, HELD_OUT, seed=0, goes_on=False)(past[-HELD_OUT:])
    assert 0.03 < (found.evidence[60:] > 1.0).mean() < 0.25


def test_the_same_seed_gives_the_same_scores() -> None:
    past, test = series()
    for name, make in BASELINES.items():
        if make().seeded and name != "cnn":
            again = fit(make(), past, HELD_OUT, seed=0, goes_on=True)(test)
            other = fit(make(), past, HELD_OUT, seed=1, goes_on=True)(test)
            np.testing.assert_allclose(again.anomaly_score, clean(name).anomaly_score, rtol=1e-5)
            assert not np.allclose(other.anomaly_score, again.anomaly_score)


def test_constant_and_empty_channels_and_silence() -> None:
    past, test = (part.copy() for part in series())
    past[:, 0], past[:, 2] = 7.0, np.nan
    test[:, 0], test[40:60] = 7.0, np.nan
    for name in ("l2", "pca", "kmeansad", "iforest", "ols"):
        found = fit(BASELINES[name](), past, HELD_OUT, seed=0, goes_on=True)(test)
        assert np.isfinite(found.anomaly_score).all(), name
        assert np.isfinite(found.evidence).all(), name


def test_short_history_is_refused_with_numbers() -> None:
    with pytest.raises(HistoryError, match=r"at least 80 slots .* beside the 20 held out, got 50"):
        fit(BASELINES["kmeansad"](), series()[0][:70], 20, seed=0, goes_on=True)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(TsdiffError, match=r"scikit-learn.*pip install 'tsdiff\[eval\]'"):
        fit(BASELINES["iforest"](), series()[0], HELD_OUT, seed=0, goes_on=True)


def test_gaps_take_the_last_reading() -> None:
    values = np.array([[np.nan, 1], [2, np.nan], [np.nan, np.nan], [3, 4]])
    filled = [[np.nan, 1], [2, 1], [2, 1], [3, 4]]
    np.testing.assert_array_equal(forward_fill(values.astype(np.float32)), filled)


def test_a_window_ends_at_its_slot() -> None:
    z = np.arange(4, dtype=np.float32)[:, None]
    assert trailing(z, 3)[..., 0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]
    assert CLIP == 10.0
