"""Whether entities get anchors of their own is what held-out windows say."""

from dataclasses import replace

import numpy as np
import pytest

from tests.train.simulated import ANCHOR_ONLY, CHANNELS, PERIOD_MS
from train.anchors import Anchors, fit_anchors
from train.data import Dataset, load
from tsdiff.history import EntityHistory, History


def dataset(loadings: list[np.ndarray], slots: int = 900) -> Dataset:
    """One hidden cause an entity, seen through the entity's own loadings (D,)."""
    entities = []
    for number, weights in enumerate(loadings):
        rng = np.random.default_rng(number)
        cause = rng.normal(size=(slots, 1))
        values = cause * weights + 0.3 * rng.normal(size=(slots, CHANNELS))
        times = np.arange(slots, dtype=np.int64) * PERIOD_MS
        entities.append(EntityHistory(f"e{number}", times, values.astype(np.float32)))
    names = tuple(f"c{i}" for i in range(CHANNELS))
    return load(History(names, tuple(entities), ()), PERIOD_MS, ANCHOR_ONLY)


ALIKE = [np.ones(CHANNELS)] * 4
# In half of the entities the channels move against one another.
DIFFERENT = [np.ones(CHANNELS), np.array([1, -1, 1, -1, 1.0])] * 2


def fitted(loadings: list[np.ndarray], most_anchors: int = 64) -> Anchors:
    return fit_anchors(dataset(loadings), replace(ANCHOR_ONLY, most_anchors=most_anchors))


def test_entities_that_differ_get_anchors_of_their_own() -> None:
    anchors = fitted(DIFFERENT)
    assert anchors.kind in ("own", "leaning")
    assert anchors.losses[anchors.kind] < anchors.losses["pooled"] - 0.1
    mean, loadings, noise = anchors.parts
    assert mean.shape == noise.shape == (len(DIFFERENT) + 1, 8 * CHANNELS)
    assert loadings.shape == (*mean.shape, anchors.rank)
    covariance = [each @ each.T for each in loadings]
    # Channels 0 and 1 of the newest slot; last comes the pooled anchor, which knows neither.
    cell = 7 * CHANNELS
    signs = [round(float(each[cell, cell + 1]), 1) for each in covariance]
    assert signs[0] > 0.5
    assert signs[1] < -0.5
    assert abs(signs[-1]) < 0.2


def test_entities_that_are_alike_share_one() -> None:
    anchors = fitted(ALIKE)
    assert anchors.kind == "pooled"
    assert len(anchors.parts[0]) == 1


@pytest.mark.parametrize(("loadings", "most"), [(DIFFERENT, 3), (DIFFERENT[:1], 64)])
def test_many_entities_or_a_lone_one_have_the_pooled_one(
    loadings: list[np.ndarray], most: int
) -> None:
    anchors = fitted(loadings, most)
    assert (anchors.kind, len(anchors.parts[0]), anchors.losses) == ("pooled", 1, {})


def test_the_moments_that_anchors_were_fitted_to_come_with_them() -> None:
    anchors = fitted(DIFFERENT)
    mean, lags = anchors.moments
    assert mean.shape == (len(DIFFERENT) + 1, CHANNELS)
    assert lags.shape == (len(DIFFERENT) + 1, 8, CHANNELS, CHANNELS)
    np.testing.assert_allclose(anchors.parts[0], np.tile(mean, 8), atol=1e-6)
    # Half of the entities pull the pooled moments one way, half the other.
    assert lags[0, 0, 0, 1] > 0.5
    assert lags[1, 0, 0, 1] < -0.5
    assert abs(lags[-1, 0, 0, 1]) < 0.1
