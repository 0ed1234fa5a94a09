"""What is learned from the stream: by whom, from which slots, and what it changes."""

import math

import numpy as np
import pytest

from tests.train.simulated import ANCHOR_ONLY, PERIOD_MS, anchor_bundle, history, simulate
from train.loop import train
from tsdiff import adapt
from tsdiff.adapt import Adaptation, Full, Level
from tsdiff.anchor import fit_anchor, refit_anchor
from tsdiff.bundle import Bundle
from tsdiff.calibration import LAGS
from tsdiff.config import Adapt
from tsdiff.detector import Detector
from tsdiff.errors import ConfigError
from tsdiff.series import SHAPES, score_series


def learner(kind: Adapt, bundle: Bundle | None = None) -> Adaptation:
    found = Detector(bundle or anchor_bundle(), shapes=SHAPES, adapt=kind).adaptation
    assert found is not None
    return found


def block(adaptation: Adaptation, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """A block of an entity of the training and what comes before it; moved by `shift` scales."""
    detector = Detector(anchor_bundle(), shapes=SHAPES)
    _, scale = detector.statistics(0)
    length = adaptation.context + adaptation.block
    values = simulate(2000, 0)[1000 + seed * 300 :][:length]
    return np.asarray(values + np.float32(shift) * scale)


def taught(
    adaptation: Adaptation,
    values: np.ndarray,
    times: int,
    state: np.ndarray | None = None,
    calm: float = 1.0,
) -> np.ndarray:
    mean, scale = Detector(anchor_bundle(), shapes=SHAPES).statistics(0)
    weights = np.arange(len(values)) < adaptation.context + calm * adaptation.block
    weights[: adaptation.context] = False
    for _ in range(times):
        state = adaptation.learn(
            0, state, values, np.arange(len(values)), weights.astype(np.float32), mean, scale
        )
    assert state is not None
    return state


def test_levels_follow_the_readings_and_forget_by_half() -> None:
    level = learner("level")
    still = taught(level, block(level), 1)
    assert np.abs(still).max() < 0.05
    slots = round(adapt.HALF_LIFE / level.block)
    moved = taught(level, block(level, shift=2.0), slots) - taught(level, block(level), slots)
    np.testing.assert_allclose(moved[:-1], 1.0, atol=0.02)  # half of the way
    far = taught(level, block(level, shift=2.0), 20 * slots) - taught(
        level, block(level), 20 * slots
    )
    np.testing.assert_allclose(far[:-1], 2.0, atol=0.02)


def test_moments_become_those_of_the_readings() -> None:
    full = learner("full")
    assert isinstance(full, Full)
    values = block(full, shift=1.5)
    state = taught(full, values, 600)
    assert state.shape == (full.size,)
    mean, scale = Detector(anchor_bundle(), shapes=SHAPES).statistics(0)
    z = ((values - mean) / scale)[full.context :]
    known = full.moments_of(0, state)
    np.testing.assert_allclose(known.mean, z.mean(0), atol=0.01)
    np.testing.assert_allclose(known.lags[0], z.T @ z / len(z), atol=0.02)


@pytest.mark.parametrize("kind", ["level", "full"])
def test_only_calm_slots_teach(kind: Adapt) -> None:
    adaptation = learner(kind)
    values = block(adaptation)
    first = taught(adaptation, values, 1)
    wild = values.copy()
    wild[-adaptation.block // 2 :] += 1e6
    half = taught(adaptation, values, 1, calm=0.5)
    np.testing.assert_array_equal(taught(adaptation, wild, 1, calm=0.5), half)
    assert np.abs(half - first).max() > 0
    before = first.copy()
    same = taught(adaptation, values, 1, first, calm=0.0)
    np.testing.assert_allclose(same[:-1], first[:-1], atol=1e-6)
    np.testing.assert_array_equal(first, before)  # states are nobody's to change


@pytest.mark.parametrize("kind", ["level", "full"])
def test_missing_cells_teach_nothing(kind: Adapt) -> None:
    adaptation = learner(kind)
    start = taught(adaptation, block(adaptation), 1)
    silent = np.full_like(block(adaptation), np.nan)
    np.testing.assert_allclose(taught(adaptation, silent, 5, start), start, atol=1e-6)


def test_scattered_gaps_do_not_make_moments_contradict_one_another() -> None:
    """A pair seen half as often as its cells must not be remembered for longer than they are."""
    full = learner("full")
    assert isinstance(full, Full)
    values = block(full, shift=1.0)
    state = None
    for seed in range(40):
        gaps = np.random.default_rng(seed).random(values.shape) < 0.3
        state = taught(full, np.where(gaps, np.float32(np.nan), values), 1, state)
    whole = full.moments_of(0, taught(full, values, 40))
    holed = full.moments_of(0, state)
    np.testing.assert_allclose(holed.lags, whole.lags, atol=0.05)
    deviation = np.sqrt(np.diag(holed.covariance()))
    correlation = holed.covariance() / np.outer(deviation, deviation)
    assert np.abs(correlation).max() < 1.05


def test_calm_is_what_held_out_slots_were_and_what_is_stranger_teaches_less() -> None:
    adaptation = learner("full")
    knots = np.asarray(anchor_bundle().arrays["calibration.knots"])[:, 0, :, -1]
    times = np.array([0.5, 1.0, 1.03, 1.1, 1.5, 2.0, np.inf, np.nan], np.float32)
    weights = [1.0, 1.0, 0.5, 0.25, 2.0**-8, 0.0, 0.0, 0.0]
    # By either of two streams; the others are not asked.
    for stream, row in ((0, 0), (1, -1)):
        streams = np.zeros((1, len(times), knots.shape[1] // 2), np.float32)
        streams[..., 2:] = 1e6
        streams[0, :, stream] = knots[row, stream] * times
        found = adaptation.weights(streams, np.array([row], np.int32), [None])
        np.testing.assert_array_equal(found, [weights])


@pytest.mark.parametrize("kind", ["level", "full"])
def test_where_nothing_is_calm_its_limit_widens_and_then_narrows_again(kind: Adapt) -> None:
    adaptation = learner(kind)
    values, blocks = block(adaptation), round(4000 / adaptation.block)
    wide = taught(adaptation, values, blocks, calm=0.0)
    assert math.exp(wide[-1]) == pytest.approx(2.0, rel=0.03)
    knots = np.asarray(anchor_bundle().arrays["calibration.knots"])[:, 0, :, -1]
    streams = np.zeros((1, 2, knots.shape[1] // 2), np.float32)
    streams[0, :, 0] = knots[0, 0] * np.array([1.9, 2.1])
    row = np.array([0], np.int32)
    assert (adaptation.weights(streams, row, [wide]) == 1.0).tolist() == [[True, False]]
    assert adaptation.weights(streams, row, [None]).tolist() == [[2.0**-12, 0.0]]
    # A quarter of calm slots keeps it as it is, and with all of them it is soon what it was.
    assert taught(adaptation, values, 4, wide, calm=0.25)[-1] == pytest.approx(wide[-1], rel=1e-5)
    assert taught(adaptation, values, blocks // 3 + 1, wide)[-1] == 0.0


def test_blocks_of_entities_end_apart() -> None:
    full = learner("full")
    phases = [full.phase(f"host-{number}") for number in range(500)]
    assert all(0 <= phase < full.block for phase in phases)
    assert len(set(phases)) > 150
    assert phases[0] == full.phase("host-0")


def test_who_learns() -> None:
    full, level = learner("full"), learner("level")
    assert full.learns(0)
    assert not full.learns(-1)
    assert level.learns(-1)
    assert full.key != level.key
    assert isinstance(learner("auto"), Full)
    assert isinstance(level, Level)
    assert Detector(anchor_bundle(), shapes=SHAPES).adaptation is None


def test_auto_is_level_where_full_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapt, "MOST_FULL", 1)
    assert isinstance(learner("auto"), Level)
    assert learner("full").entity_bytes > 10 * learner("level").entity_bytes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapt": "much"}, "expected adapt of auto, none, level, full, got 'much'"),
        ({"lag": 2}, "expected a lag of 0, 3, 7, 15, got 2"),
    ],
)
def test_what_there_is_not_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Detector(anchor_bundle(), shapes=SHAPES, **settings)  # type: ignore[arg-type]


def test_refitting_from_nearby_finds_what_fitting_finds() -> None:
    rng = np.random.default_rng(3)
    loadings, noise = rng.normal(size=(40, 4)), rng.uniform(0.2, 1.0, 40)
    turned = loadings + 0.2 * rng.normal(size=loadings.shape)
    covariance = turned @ turned.T + np.diag(noise)
    _, found, left = fit_anchor(np.zeros(40), covariance, 4, 0.1, rounds=30)
    again, noise_again = refit_anchor(covariance, loadings, noise, 0.1, rounds=30)
    np.testing.assert_allclose(again @ again.T, found @ found.T, atol=1e-3)
    np.testing.assert_allclose(noise_again, left, atol=1e-3)
    few, _ = refit_anchor(covariance, loadings, noise, 0.1)
    assert np.abs(few @ few.T - found @ found.T).max() < 0.1


# -- in the detector ----------------------------------------------------------------------------


def scored(kind: Adapt, values: np.ndarray, lag: int = 0, start: int = 0) -> np.ndarray:
    detector = Detector(anchor_bundle(), shapes=SHAPES, adapt=kind, lag=lag)
    mean, scale = detector.statistics(0)
    numbers = np.arange(len(values))
    found = score_series(
        detector, "e0", values, mean=mean, scale=scale, numbers=numbers, first=8, start=start
    )
    return found.evidence


def drifting(slots: int = 4000) -> np.ndarray:
    """A channel that drifts, slowly enough not to be taken for a fault: learning is gated."""
    values = simulate(slots, 0)
    _, scale = Detector(anchor_bundle(), shapes=SHAPES).statistics(0)
    values[:, 1] += 0.6 * scale[1] * np.linspace(0, 1, slots, dtype=np.float32)
    return values


def test_a_slow_drift_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapt, "HALF_LIFE", 500.0)
    values = drifting()
    late = {kind: np.median(scored(kind, values)[-500:]) for kind in ("none", "level", "full")}
    assert late["none"] > 1.5
    assert late["level"] < 0.5 * late["none"]
    assert late["full"] < 0.5 * late["none"]


def test_a_normal_a_little_beyond_the_limit_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is what every slot is like: with a gate at the limit nothing would be learned any more."""
    monkeypatch.setattr(adapt, "HALF_LIFE", 200.0)
    monkeypatch.setattr(adapt, "_WIDENING", 0.0)
    values = simulate(8000, 0)
    _, scale = Detector(anchor_bundle(), shapes=SHAPES).statistics(0)
    values[1000:, 1] += 0.5 * scale[1]
    assert np.median(scored("full", values)[-500:]) < 1.0
    monkeypatch.setattr(adapt, "_DOUBT", 1e9)
    assert np.median(scored("full", values)[-500:]) > 2.0


@pytest.mark.parametrize("kind", ["level", "full"])
def test_a_new_normal_is_learned_in_the_end(kind: Adapt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings move at once, so far that no slot is calm any more, and stay there."""
    monkeypatch.setattr(adapt, "HALF_LIFE", 200.0)
    values = simulate(8000, 0)
    _, scale = Detector(anchor_bundle(), shapes=SHAPES).statistics(0)
    values[1000:, 1] += 5.0 * scale[1]
    late = {}
    for widening in (0.0, 0.02):
        monkeypatch.setattr(adapt, "_WIDENING", widening)
        late[widening] = np.median(scored(kind, values)[-500:])
    assert late[0.0] > 2.0
    assert late[0.02] < 1.0


@pytest.mark.parametrize("kind", ["none", "level", "full"])
@pytest.mark.parametrize("lag", LAGS)
def test_a_series_may_be_looked_at_from_anywhere(kind: Adapt, lag: int) -> None:
    values = drifting(900)
    whole, part = scored(kind, values, lag), scored(kind, values, lag, start=700)
    assert len(whole) == 900
    assert np.isfinite(whole[8:]).all()
    np.testing.assert_allclose(part, whole[700:], rtol=1e-3, atol=1e-3)


def test_a_state_that_is_given_up_leaves_nothing_behind() -> None:
    """The anchors that were made of states are a cache: what is asked with decides alone."""
    detector = Detector(anchor_bundle(), shapes=((1, 1),), adapt="full")
    full = detector.adaptation
    assert isinstance(full, Full)
    state = taught(full, block(full, shift=3.0), 40)
    mean, scale = detector.statistics(0)
    values = simulate(detector.window, 0)[None]
    history = np.full((1, detector.history, detector.streams), np.nan, np.float32)

    def streams(state: np.ndarray | None) -> np.ndarray:
        one, row = np.array([1]), np.array([0])
        slots = np.arange(detector.window)[None]
        statistics = mean[None], scale[None]
        return detector.detect(values, slots, one, *statistics, row, history, [state]).streams

    before, learned, after, copied = (
        streams(None),
        streams(state),
        streams(None),
        streams(state.copy()),
    )
    assert np.abs(learned - before).max() > 0.05
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(copied, learned)


def test_what_follows_counts_with_a_lag() -> None:
    values = simulate(900, 0)
    values[600:606] += 30.0
    causal, lagged = scored("none", values), scored("none", values, lag=7)
    np.testing.assert_allclose(causal[:599], scored("none", simulate(900, 0))[:599], atol=1e-4)
    assert lagged[597] > causal[597] + 1.0
    assert lagged[550] == pytest.approx(scored("none", simulate(900, 0), lag=7)[550], abs=1e-4)


@pytest.mark.parametrize("kind", ["level", "full"])
@pytest.mark.parametrize("entities", [1, 3])  # with the pooled anchor alone, and with their own
def test_learning_compiles_nothing(kind: Adapt, entities: int) -> None:
    bundle = train(history(entities=entities), ANCHOR_ONLY, period_ms=PERIOD_MS)
    detector = Detector(bundle, shapes=SHAPES, adapt=kind)
    detector.warm_up()
    compiled = detector.compilations
    mean, scale = detector.statistics(0)
    values = simulate(900, 0)
    score_series(detector, "e0", values, mean=mean, scale=scale, numbers=np.arange(900), first=8)
    assert detector.compilations == compiled
