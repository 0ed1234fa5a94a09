"""What the hour of day says: found where there is something to find, and taken out everywhere."""

import re
from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.simulated import ANCHOR_ONLY
from train.cli import describe
from train.data import load
from train.loop import train
from tsdiff.bundle import Bundle
from tsdiff.config import Adapt
from tsdiff.detector import Detector
from tsdiff.history import EntityHistory, History
from tsdiff.season import DAY_MS, fit_season, harmonics, season
from tsdiff.series import SHAPES, score_series

PERIOD_MS = 900_000  # 96 slots a day
DAY = DAY_MS // PERIOD_MS
FIRST = 1_900_000 * DAY // 96 + 17  # in the middle of some day


def slots_of(days: float) -> np.ndarray:
    return FIRST + np.arange(round(days * DAY))


def hour_of(slots: np.ndarray) -> np.ndarray:
    """Share of the day, as angle."""
    return np.asarray(2 * np.pi * (slots % DAY) / DAY)


def daily(slots: np.ndarray) -> np.ndarray:
    """One wave a day, and a third of it three times as fast."""
    angle = hour_of(slots)
    return np.asarray(np.sin(angle + 1.0) + 0.3 * np.cos(3 * angle))


def noise(slots: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=len(slots))


def fitted(z: np.ndarray, days: float, held_out: float = 2.0) -> np.ndarray:
    slots = slots_of(days)
    split = len(slots) - round(held_out * DAY)
    return fit_season(z.astype(np.float32).reshape(len(slots), -1), slots, split, PERIOD_MS)


def test_a_season_is_found_between_noise_gaps_and_wild_readings() -> None:
    slots = slots_of(14)
    z = daily(slots) + 0.3 * noise(slots)
    z[::7] = np.nan
    z[100], z[200] = 1e6, -np.inf
    weights = fitted(np.where(np.isfinite(z), z, np.nan), 14)
    later = slots + 40 * DAY
    found = season(weights, harmonics(later, PERIOD_MS, len(weights)))
    np.testing.assert_allclose(found[:, 0], daily(later), atol=0.1)


@pytest.mark.parametrize(
    "kind", ["noise", "a day of its own each", "steady", "nothing by night", "empty", "not again"]
)
def test_where_the_hour_says_nothing_there_is_no_season(kind: str) -> None:
    slots = slots_of(14)
    z = noise(slots)
    if kind == "a day of its own each":
        z = np.sin(hour_of(slots) + 2.4 * (slots // DAY))
    elif kind == "steady":
        z = np.full(len(slots), 0.5)
    elif kind == "nothing by night":
        z = np.where(np.abs(hour_of(slots) - np.pi) < 1.5, daily(slots), np.nan)
    elif kind == "empty":
        z = np.full(len(slots), np.nan)
    elif kind == "not again":
        z = np.where(np.arange(len(slots)) < 11 * DAY, daily(slots), -daily(slots))
    weights = fitted(np.stack([z, daily(slots)], 1), 14)
    assert weights.shape == (12, 2)
    assert not weights[:, 0].any()
    assert weights[:, 1].any()


@pytest.mark.parametrize(("days", "held_out"), [(3.9, 1.0), (6.0, 0.9), (0.5, 0.2)])
def test_a_few_days_are_too_few(days: float, held_out: float) -> None:
    assert fitted(daily(slots_of(days)), days, held_out).shape == (0, 1)


@pytest.mark.parametrize(("period_ms", "terms"), [(3_600_000, 12), (6 * 3_600_000, 2), (DAY_MS, 0)])
def test_no_more_harmonics_than_slots_can_show(period_ms: int, terms: int) -> None:
    slots = np.arange(60 * DAY_MS // period_ms)
    z = np.sin(2 * np.pi * slots * period_ms / DAY_MS)[:, None].astype(np.float32)
    assert fit_season(z, slots, len(z) // 2, period_ms).shape[0] == terms


def test_jax_and_numpy_and_any_cut_agree() -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 12, 4)).astype(np.float32)
    slots = FIRST + np.arange(40) + np.array([[0], [5], [70]])
    basis = harmonics(slots, PERIOD_MS, 12)
    whole = season(weights, basis)
    np.testing.assert_array_equal(
        season(weights, harmonics(slots[:, 7:9], PERIOD_MS, 12)), whole[:, 7:9]
    )
    np.testing.assert_allclose(season(jnp.asarray(weights), jnp.asarray(basis)), whole, atol=1e-5)
    plain = np.einsum("emk,ekd->emd", basis, weights)
    np.testing.assert_allclose(whole, plain, atol=1e-5)
    np.testing.assert_allclose(basis[..., 4], np.cos(3 * hour_of(slots)), atol=1e-6)


# -- in the detector ---------------------------------------------------------------------------

DAYS = 16


def readings(slots: np.ndarray, seed: int, amplitude: float = 1.0) -> np.ndarray:
    """Three channels: two follow the day, by their own units, and share a slow wander."""
    shared = 0.3 * np.convolve(noise(slots, seed), np.ones(4) / 2, "same")
    each = [shared + 0.2 * noise(slots, seed + 10 * k) for k in (1, 2, 3)]
    day = amplitude * daily(slots)
    return np.stack([100 + 20 * (day + each[0]), -5 * (day + each[1]), each[2]], 1).astype(
        np.float32
    )


@cache
def bundle(amplitude: float = 1.0) -> Bundle:
    slots = slots_of(DAYS)
    entities = tuple(
        EntityHistory(f"e{i}", slots * PERIOD_MS, readings(slots, i, amplitude)) for i in range(3)
    )
    history = History(("a", "b", "c"), entities, ())
    return train(history, replace(ANCHOR_ONLY, held_out=0.2), period_ms=PERIOD_MS)


@cache
def detector(adapt: Adapt = "none") -> Detector:
    return Detector(bundle(), shapes=SHAPES, adapt=adapt)


def test_series_are_without_their_season_and_the_unknown_lack_the_mean() -> None:
    slots = slots_of(DAYS)
    waves = (1.0, 0.0)
    entities = tuple(
        EntityHistory(f"e{i}", slots * PERIOD_MS, readings(slots, i, wave))
        for i, wave in enumerate(waves)
    )
    dataset = load(History(("a", "b", "c"), entities, ()), PERIOD_MS, ANCHOR_ONLY)
    assert dataset.season.shape == (3, 12, 3)
    np.testing.assert_allclose(dataset.season[-1], dataset.season[:2].mean(0), atol=1e-6)
    assert not dataset.season[1].any()
    assert not dataset.season[0, :, 2].any()
    angle = hour_of(slots)

    def wave(series: np.ndarray) -> float:
        return float(np.abs((series[:, 0] * np.exp(1j * angle)).mean()))

    assert wave(dataset.series[0]) < 0.03
    assert wave(dataset.as_unknown(0)) == pytest.approx(wave(dataset.as_unknown(1)), rel=0.2)
    assert wave(dataset.as_unknown(1)) > 0.1


def test_without_a_season_a_bundle_keeps_none() -> None:
    assert bundle(0.0).arrays["season"].shape == (4, 0, 3)
    assert re.search(r"^daily +no channel", describe(bundle(0.0)), re.MULTILINE)
    assert re.search(r"^daily +2: a, b$", describe(bundle()), re.MULTILINE)


@pytest.mark.parametrize("adapt", ["none", "level", "full"])
def test_noon_at_midnight_is_strange(adapt: Adapt) -> None:
    slots = slots_of(DAYS + 4)
    values = readings(slots, 0)
    start = DAYS * DAY + 60
    strange = values.copy()
    # The same readings as half a day later.
    strange[start : start + 12, :2] = values[start + DAY // 2 : start + DAY // 2 + 12, :2]
    found = {}
    for name, series in {"calm": values, "strange": strange}.items():
        mean, scale = detector(adapt).statistics(0)
        found[name] = score_series(
            detector(adapt), "e0", series, mean=mean, scale=scale, numbers=slots, first=8
        )
    assert np.quantile(found["calm"].evidence[DAYS * DAY :], 0.99) < 3.5
    assert found["strange"].evidence[start + 2 : start + 12].min() > 4.0
    # What is expected follows the day, in the channel's own unit.
    expected, truth = found["calm"].expected[DAYS * DAY :, 0], 100 + 20 * daily(slots[DAYS * DAY :])
    assert np.abs(expected - truth).mean() < 8.0
    lower, upper = (part[DAYS * DAY :] for part in (found["calm"].lower, found["calm"].upper))
    own = values[DAYS * DAY :]
    assert 0.8 < ((lower <= own) & (own <= upper)).mean() < 0.97


def test_the_hour_is_no_drift() -> None:
    """Who only ever learns in the evening does not take evenings for a new level."""
    level = detector("level").adaptation
    assert level is not None
    mean, scale = detector().statistics(0)
    slots = slots_of(DAYS)
    values = readings(slots, 0)
    evening = np.argmax(daily(slots[:DAY])) - level.block // 8
    state = None
    for day in range(DAYS):
        part = slice(evening + day * DAY, evening + day * DAY + level.block)
        calm = (np.arange(level.block) < level.block // 4).astype(np.float32)
        state = level.learn(0, state, values[part], slots[part], calm, mean, scale)
    assert state is not None
    # 256 slots of half a life of 5,000, one standard deviation above the mean, would be 0.035.
    assert np.abs(state).max() < 0.01


def test_a_newcomer_gets_the_mean_season() -> None:
    slots = slots_of(DAYS)
    values = readings(slots, 7)
    mean, scale = detector().statistics(-1)
    found = score_series(detector(), "new", values, mean=mean, scale=scale, numbers=slots, first=8)
    assert np.quantile(found.evidence[8:], 0.98) < 3.0
