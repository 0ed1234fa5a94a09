"""The slow scorers as detectors: they find what is broken, and whose it is, however it is cut."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from tests.train.simulated import (
    ANCHOR_ONLY,
    PERIOD_MS,
    SMALL,
    anchor_bundle,
    history,
    simulate,
)
from train.config import TrainConfig
from train.loop import train
from tsdiff.adapt import make_adaptation
from tsdiff.bundle import Bundle
from tsdiff.config import SLOW_SCORERS
from tsdiff.detector import Detection, Detector
from tsdiff.errors import ConfigError
from tsdiff.reading import build_model
from tsdiff.series import score_series
from tsdiff.types import FloatArray

LENGTH, BROKEN, CHANNEL = 160, 130, 2
SCORERS = SLOW_SCORERS
OF_NETWORK = ("elbo",)
CASES = [*((scorer, False) for scorer in SCORERS), *((scorer, True) for scorer in OF_NETWORK)]


@cache
def bundle(*, network: bool) -> Bundle:
    config, scorers = (SMALL, OF_NETWORK) if network else (ANCHOR_ONLY, SCORERS)
    return train(history(), replace(config, slow_scorers=scorers), period_ms=PERIOD_MS)


@cache
def detector(scorer: str, *, network: bool) -> Detector:
    return Detector(bundle(network=network), shapes=((2, 16),), scorer=scorer)


def scored(scorer: str, values: FloatArray, *, network: bool, start: int = 0) -> Detection:
    by = detector(scorer, network=network)
    mean, scale = by.statistics(0)
    numbers = np.arange(len(values))
    return score_series(by, "e0", values, mean=mean, scale=scale, numbers=numbers, start=start)


@pytest.mark.parametrize(("scorer", "network"), CASES)
def test_a_broken_reading_is_strangest_and_its_channel_is_blamed(
    scorer: str, network: bool
) -> None:
    values = simulate(LENGTH, 0)
    deviation = values[:, CHANNEL].std()
    values[BROKEN, CHANNEL] += 3.0 * deviation
    found = scored(scorer, values, network=network)
    usual = found.evidence[20 : BROKEN - 1]
    assert np.isfinite(found.evidence).all()
    assert found.evidence[BROKEN] > 2.0 > np.median(usual)
    assert found.streams[BROKEN, 0] == found.streams[20:].max()
    assert (found.streams >= 0).all()
    assert np.argmax(found.contribution[BROKEN]) == CHANNEL
    assert found.contribution[BROKEN].sum() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("scorer", "network"), CASES)
def test_neither_the_cut_nor_what_comes_later_changes_anything(scorer: str, network: bool) -> None:
    values = simulate(LENGTH, 0, missing=0.05)
    whole = scored(scorer, values, network=network)
    # Other pieces of other lengths, in other places of a batch, and nothing after them.
    cut = scored(scorer, values[:BROKEN], network=network, start=BROKEN - 21)
    for name in ("streams", "evidence"):
        part = getattr(whole, name)[BROKEN - 21 : BROKEN]
        np.testing.assert_allclose(getattr(cut, name), part, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("scorer", SCORERS)
def test_what_is_missing_has_no_evidence_and_a_silent_slot_says_nothing(scorer: str) -> None:
    values = simulate(LENGTH, 0)
    values[BROKEN, CHANNEL] = np.nan
    values[BROKEN + 9] = np.nan
    found = scored(scorer, values, network=False)
    assert found.contribution[BROKEN, CHANNEL] == 0.0
    neutral = np.median(found.streams[20:, 0])
    assert found.streams[BROKEN + 9, 0] == pytest.approx(neutral, rel=0.5)


def test_bound_and_flow_of_a_gaussian_rank_alike() -> None:
    """Both are the likelihood then, but for the hidden cells' dependence on one another."""
    values = simulate(LENGTH, 0)
    bound, flow = (
        np.argsort(np.argsort(scored(name, values, network=False).streams[20:, 0]))
        for name in ("elbo", "flow")
    )
    assert np.corrcoef(bound, flow)[0, 1] > 0.9


def test_the_denoiser_is_the_bundles_own() -> None:
    """The serving form of an anchor is turned and whitened; the slow scorers read the plain one."""
    made = anchor_bundle()
    model, _ = build_model(made)
    served = jax.tree.map(lambda part: part[-1], model.anchors.clean)
    for name, part in served.anchor()._asdict().items():
        given = made.arrays[f"anchor.{name}"][-1]
        np.testing.assert_allclose(part, given, rtol=2e-4, atol=2e-4, err_msg=name)


def test_entities_learn_from_what_the_scorer_finds_usual() -> None:
    made = bundle(network=False)
    by = Detector(made, shapes=((1, 16),), scorer="elbo", adapt="full")
    assert by.adaptation is not None
    streams = scored("elbo", simulate(900, 0), network=False).streams
    weights = by.adaptation.weights(streams[None, 700:], np.array([0], np.int32), [None])
    assert 0.8 < (weights == 1.0).mean() < 1.0
    fast = make_adaptation("full", made, by._model)
    assert fast is not None
    assert by.adaptation.key != fast.key


def test_a_bundle_without_the_scorer_says_how_to_get_it() -> None:
    with pytest.raises(ConfigError, match=r"calibrated for \(hybrid, .*train --scorer crps"):
        Detector(anchor_bundle(), scorer="crps")


def test_only_slow_scorers_are_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"expected slow scorers of crps, .*got 'hybrid'"):
        TrainConfig(slow_scorers=("hybrid",))
