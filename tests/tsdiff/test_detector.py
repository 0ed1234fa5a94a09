"""The detector: same numbers however slots are cut, finite whatever is missing, compiled once."""

from typing import Any

import numpy as np
import pytest

from tests.train.simulated import CHANNELS, anchor_bundle, network_bundle, simulate
from tsdiff.bundle import Bundle
from tsdiff.detector import Detection, Detector, cut_span

SPAN = 24


@pytest.fixture(scope="module", params=["anchor", "network"])
def detector(request: pytest.FixtureRequest) -> Detector:
    bundle: Bundle = anchor_bundle() if request.param == "anchor" else network_bundle()
    return Detector(bundle, shapes=((8, 1), (2, SPAN)))


def arguments(
    detector: Detector, values: np.ndarray, rows: tuple[int, ...] | None = None, first: int = 0
) -> dict[str, Any]:
    """Arguments of `detect` for values (E, W-1+T, D), every entity in full length."""
    entities = len(values)
    chosen = np.array(rows if rows is not None else [i % 2 for i in range(entities)], np.int32)
    statistics = [detector.statistics(row) for row in chosen]
    return {
        "values": values,
        "slots": np.tile(first + np.arange(values.shape[1]), (entities, 1)),
        "lengths": np.full(entities, values.shape[1] - detector.window + 1, np.int32),
        "mean": np.stack([mean for mean, _ in statistics]),
        "scale": np.stack([scale for _, scale in statistics]),
        "rows": chosen,
        "history": np.full((entities, detector.history, detector.streams), np.nan, np.float32),
    }


def series(detector: Detector, entities: int, span: int, missing: float = 0.0) -> np.ndarray:
    length = detector.window - 1 + span
    return np.stack([simulate(length, i % 2, missing) for i in range(entities)])


@pytest.mark.parametrize("missing", [0.0, 0.02, 0.4])
def test_one_span_or_slot_by_slot_is_the_same(detector: Detector, missing: float) -> None:
    values = series(detector, 3, SPAN, missing)
    whole = detector.detect(**arguments(detector, values))
    history = arguments(detector, values)["history"]
    for slot in range(SPAN):
        piece = arguments(detector, values[:, slot : slot + detector.window], first=slot)
        piece["history"] = history
        found = detector.detect(**piece)
        for name, one in found._asdict().items():
            # Evidence is what live and backfill must agree on; bands and shares are for reading.
            grain = 5e-5 if name == "evidence" else 2e-4
            np.testing.assert_allclose(
                one[:, 0], getattr(whole, name)[:, slot], rtol=grain, atol=grain, err_msg=name
            )
        history = np.concatenate([history, found.streams], 1)[:, 1:]


def test_the_company_in_a_batch_does_not_matter(detector: Detector) -> None:
    values = series(detector, 7, 3)
    values[::2, -5, 1] = np.nan
    together = detector.detect(**arguments(detector, values))
    for entity in range(7):
        alone = detector.detect(
            **arguments(detector, values[entity : entity + 1], rows=(entity % 2,))
        )
        np.testing.assert_allclose(alone.evidence[0], together.evidence[entity], rtol=1e-4)


def test_warm_up_compiles_everything(detector: Detector) -> None:
    detector.warm_up()
    compiled = detector.compilations
    rng = np.random.default_rng(0)
    for entities, span in [(1, 1), (2, 2), (3, 5), (9, 1), (17, 30), (8, 49), (1, 0 + SPAN)]:
        for missing in (0.0, 0.02, 0.9):
            values = series(detector, entities, span, missing)
            call = arguments(detector, values)
            call["lengths"] = rng.integers(0, span + 1, entities).astype(np.int32)
            detector.detect(**call)
    assert detector.compilations == compiled


@pytest.mark.parametrize(
    ("entities", "slots", "pieces"),
    [
        (1, 1, [(0, 1, 1)]),
        (1, 5, [(0, 5, 16)]),
        (8, 5, [(0, 5, 16)]),
        (1000, 5, [(slot, 1, 1) for slot in range(5)]),
        (1000, 16, [(0, 16, 16)]),
        (64, 16, [(0, 16, 16)]),
        (100, 34, [(0, 16, 16), (16, 16, 16), (32, 1, 1), (33, 1, 1)]),
    ],
)
def test_spans_are_cut_so_that_little_is_padded(
    entities: int, slots: int, pieces: list[tuple[int, int, int]]
) -> None:
    """64 entities of one slot, or 4 of 16, are one call, and cost the same."""
    assert list(cut_span(entities, slots, {1: 64, 16: 4})) == pieces


def test_no_entities(detector: Detector) -> None:
    found = detector.detect(
        np.zeros((0, detector.window, CHANNELS), np.float32),
        np.zeros((0, detector.window), np.int64),
        np.zeros(0, np.int32),
        np.zeros((0, CHANNELS), np.float32),
        np.zeros((0, CHANNELS), np.float32),
        np.zeros(0, np.int32),
        np.zeros((0, detector.history, detector.streams), np.float32),
    )
    assert found.evidence.shape == (0, 1)


def check_sane(found: Detection, observed: np.ndarray) -> None:
    """Everything finite; bands around what was expected; shares sum to 1."""
    for name, part in found._asdict().items():
        assert np.isfinite(part).all(), name
    assert (found.evidence >= 0).all()
    assert (found.lower <= found.expected).all() and (found.expected <= found.upper).all()
    total = found.contribution.sum(-1)
    np.testing.assert_allclose(total[observed.any(-1)], 1.0, atol=1e-4)
    assert (found.contribution[~observed] == 0).all()
    np.testing.assert_allclose(found.imputed_ratio, 1 - observed.mean(-1), atol=1e-6)


def test_everything_missing_at_the_end(detector: Detector) -> None:
    values = series(detector, 2, SPAN)
    values[0, detector.window :] = np.nan
    values[1] = np.nan
    found = detector.detect(**arguments(detector, values))
    check_sane(found, np.isfinite(values[:, detector.window - 1 :]))
    # An entity of which nothing is known is not strange.
    assert found.evidence[1].max() < 2.0


@pytest.mark.parametrize("wild", [1e30, -1e30, np.inf])
def test_wild_readings_stay_finite(detector: Detector, wild: float) -> None:
    values = series(detector, 2, SPAN, 0.01)
    values[:, detector.window + 3, 2] = wild
    found = detector.detect(**arguments(detector, values))
    check_sane(found, np.isfinite(values[:, detector.window - 1 :]))


def test_shorter_spans_are_padded_and_masked(detector: Detector) -> None:
    values = series(detector, 2, SPAN)
    call = arguments(detector, values)
    whole = detector.detect(**call)
    call["values"] = values.copy()
    call["values"][1, detector.window - 1 + 5 :] = np.nan
    call["lengths"] = np.array([SPAN, 5], np.int32)
    found = detector.detect(**call)
    np.testing.assert_allclose(found.evidence[0], whole.evidence[0], rtol=1e-4)
    np.testing.assert_allclose(found.evidence[1, :5], whole.evidence[1, :5], rtol=1e-4)
    for part in found:
        assert np.isnan(part[1, 5:]).all()


def test_a_broken_correlation_is_found_and_blamed(detector: Detector) -> None:
    """Channel 3 goes its own way, within its usual range."""
    span = 3 * SPAN
    values = series(detector, 2, span)
    normal = detector.detect(**arguments(detector, values))
    broken = values.copy()
    begin = detector.window - 1 + SPAN
    broken[0, begin : begin + 12, 3] = 2 * 5e6 - broken[0, begin : begin + 12, 3]
    found = detector.detect(**arguments(detector, broken))
    fault = slice(SPAN + 1, SPAN + 12)
    assert np.median(found.evidence[0, fault]) > 3.0
    assert np.median(found.evidence[0, fault]) > np.quantile(normal.evidence, 0.99)
    assert np.median(found.contribution[0, fault, 3]) > 0.5
    np.testing.assert_allclose(found.evidence[1], normal.evidence[1], rtol=1e-4)


def test_the_band_covers_what_it_says(detector: Detector) -> None:
    values = np.stack([simulate(2000, i)[900:] for i in range(2)])
    found = detector.detect(**arguments(detector, values))
    own = values[:, detector.window - 1 :]
    inside = ((own >= found.lower) & (own <= found.upper)).mean()
    assert 0.8 < inside < 0.97


def test_rows_and_statistics(detector: Detector) -> None:
    assert (detector.row("e0"), detector.row("e1"), detector.row("new")) == (0, 1, -1)
    mean, scale = detector.statistics(-1)
    zero = np.zeros(CHANNELS)
    np.testing.assert_allclose(detector.fit_statistics(zero, zero, zero), (mean, scale), rtol=1e-5)


def test_wrong_shapes_are_named(detector: Detector) -> None:
    call = arguments(detector, series(detector, 2, 1))
    with pytest.raises(ValueError, match=r"expected mean of shape \(2, 5\)"):
        detector.detect(**(call | {"mean": np.zeros((2, 4), np.float32)}))
    with pytest.raises(ValueError, match="expected values of shape"):
        detector.detect(**(call | {"values": call["values"][:, 1:]}))
