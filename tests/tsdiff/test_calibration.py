"""Calibration on data whose tails are known."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from tsdiff import calibration
from tsdiff.calibration import CUSUM_BEHIND, MAX_EVIDENCE, evidence_threshold


def fitted(sample: np.ndarray) -> tuple[jnp.ndarray, jnp.ndarray]:
    knots = calibration.fit_knots(sample.astype(np.float32))
    slope = calibration.fit_slope(sample.astype(np.float32), float(knots[-1]))
    return jnp.asarray(knots)[None, None], jnp.asarray([[slope]], jnp.float32)


def evidence(sample: np.ndarray, values: np.ndarray) -> np.ndarray:
    knots, slope = fitted(sample)
    found = calibration.stream_evidence(
        jnp.asarray(values, jnp.float32)[None, :, None], knots, slope
    )
    cells: np.ndarray = np.asarray(found)
    return np.asarray(cells[0, :, 0])


def test_evidence_is_the_tail_probability_of_a_power_law() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.pareto(4.0, 20_000) + 1.0, rng.pareto(4.0, 200_000) + 1.0
    found = evidence(train, test)
    for wanted in (0.5, 1.0, 2.0, 3.0, 4.0):
        share = (found > wanted).mean()
        assert share == pytest.approx(10.0**-wanted, rel=0.35), wanted


def test_p_values_of_normal_data_are_uniform() -> None:
    rng = np.random.default_rng(1)
    p = 10.0 ** -evidence(rng.gamma(2.0, size=20_000), rng.gamma(2.0, size=20_000))
    uniform = np.linspace(0, 1, len(p))
    distance = np.abs(np.sort(p) - uniform)
    # Knots are even in evidence, hence sparse among the commonest values, where nobody looks.
    assert distance.max() < 0.04
    assert distance[uniform < 0.5].max() < 0.015


@pytest.mark.parametrize("constant", [False, True])
def test_evidence_is_monotone_and_finite(constant: bool) -> None:
    sample = np.full(500, 0.3) if constant else np.random.default_rng(2).gamma(2.0, size=500)
    values = np.concatenate([[0.0], np.geomspace(1e-8, 1e30, 2000)])
    found = evidence(sample, values)
    assert np.isfinite(found).all()
    assert (np.diff(found) >= 0).all()
    assert found[0] == 0.0
    assert found[-1] <= MAX_EVIDENCE


def test_evidence_has_no_jump_at_the_last_knot() -> None:
    sample = np.random.default_rng(3).gamma(2.0, size=5000)
    edge = float(calibration.fit_knots(sample.astype(np.float32))[-1])
    below, above = evidence(sample, np.array([edge * (1 - 1e-5), edge * (1 + 1e-5)]))
    assert above - below < 1e-3
    assert below == pytest.approx(-math.log10(calibration.TAIL), abs=1e-3)


def test_a_few_exceedances_lean_on_what_all_rows_have() -> None:
    rng = np.random.default_rng(5)
    everybody = 6.0
    few, many = (rng.pareto(2.0, size).astype(np.float32) + 1.0 for size in (500, 500_000))
    own = [
        calibration.fit_slope(part, float(np.quantile(part, 0.98)), everybody)
        for part in (few, many)
    ]
    # Ten exceedances say little against a hundred, ten thousand nearly all.
    assert own[0] == pytest.approx(everybody, rel=0.3)
    assert own[1] == pytest.approx(2.0 / math.log(10.0), rel=0.05)


def test_the_combination_is_calibrated_once_more() -> None:
    """Independent evidences together are too large; after that they are right again."""
    rng = np.random.default_rng(4)

    def combined(size: int) -> np.ndarray:
        parts = -np.log10(rng.uniform(size=(1, size, 6)))
        found: np.ndarray = np.asarray(
            calibration.combine(jnp.asarray(parts, jnp.float32), "hybrid")
        )
        return np.asarray(found[0])

    train, test = combined(50_000), combined(200_000)
    knots = calibration.fit_knots(train)
    slope = calibration.fit_joint_slope(train, float(knots[-1]))
    found = calibration.joint_evidence(
        jnp.asarray(test)[None], jnp.asarray(knots)[None], jnp.asarray([slope], jnp.float32)
    )
    assert (test > 3.0).mean() > 0.003
    for wanted, within in ((1.0, 0.3), (2.0, 0.3), (3.0, 0.3), (4.0, 0.5)):
        # Sums of evidence have a tail that is not quite exponential: on the safe side of it.
        assert (np.asarray(found) > wanted).mean() == pytest.approx(10.0**-wanted, rel=within)


@pytest.mark.parametrize(
    ("scorer", "wanted"),
    [
        ("hybrid", 2.0 + 4.0),
        ("reconstruction", 1.0 + 4.0),
        ("density", 2.0),
    ],
)
def test_scorers_combine_their_streams(scorer: str, wanted: float) -> None:
    """Columns: reconstruction, density, forecast, imputation, then their long versions."""
    parts = jnp.asarray([[[1.0, 2.0, 0.5, 8.0, 0.0, 1.0, 4.0, 7.0]]])
    assert float(calibration.combine(parts, scorer)[0, 0]) == wanted


@pytest.mark.parametrize(("imputation", "wanted"), [(8.0, 8.0), (1.0, 0.4 * (2.0 + 4.0))])
def test_with_a_network_the_surer_one_counts(imputation: float, wanted: float) -> None:
    parts = jnp.asarray([[[1.0, 2.0, 0.5, imputation, 0.0, 1.0, 4.0, 0.5]]])
    found = calibration.combine(parts, "hybrid", network=True)
    assert float(found[0, 0]) == pytest.approx(wanted)


def piled(combined: np.ndarray) -> np.ndarray:
    """What one entity's combined evidence (M,) becomes, (M - CUSUM_BEHIND,)."""
    found: np.ndarray = np.asarray(calibration.add_cusum(jnp.asarray(combined, jnp.float32)[None]))
    return np.asarray(found[0])


def test_what_lasts_piles_up() -> None:
    combined = np.zeros(CUSUM_BEHIND + 40)
    combined[CUSUM_BEHIND + 10 : CUSUM_BEHIND + 14] = 3.0
    added = piled(combined) - combined[CUSUM_BEHIND:]
    # A quarter of what is beyond 2, which then goes as it came, two in a slot.
    assert added[10:16] == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.5, 0.0])
    assert not added[:10].any()
    assert not added[16:].any()


def test_one_slot_however_wild_piles_up_to_a_limit() -> None:
    combined = np.zeros(CUSUM_BEHIND + 40)
    combined[CUSUM_BEHIND + 10] = 30.0
    found = piled(combined)
    assert found[10] == pytest.approx(30.0 + 0.25 * 5.0)
    assert found[11:].max() <= 0.25 * 5.0


def test_what_has_piled_up_depends_on_the_newest_slots_alone() -> None:
    combined = np.random.default_rng(7).exponential(2.0, size=200)
    whole = piled(combined)
    for start in (0, 1, 50, 199 - CUSUM_BEHIND):
        assert piled(combined[start:]).tolist() == whole[start:].tolist()
    # The largest sum of the slots up to one, as Page has it.
    beyond = combined.astype(np.float32) - np.float32(2.0)
    largest = [
        max(beyond[at - back : at + 1].sum() for back in range(CUSUM_BEHIND + 1))
        for at in range(CUSUM_BEHIND, len(combined))
    ]
    wanted = combined[CUSUM_BEHIND:] + 0.25 * np.clip(largest, 0.0, 5.0)
    assert whole == pytest.approx(wanted, rel=1e-4)


def test_threshold_is_the_asked_rate() -> None:
    assert evidence_threshold(1.0, 60_000, 1.0) == pytest.approx(math.log10(7 * 24 * 60))
    # Half of the alarms, each of four slots: twice the slots.
    assert evidence_threshold(0.5, 60_000, 4.0) == pytest.approx(math.log10(7 * 24 * 60 / 2))
    assert evidence_threshold(1e9, 60_000, 1.0) == pytest.approx(-math.log10(0.5))
    # With slots of hours alarms are not told from one another any more.
    assert evidence_threshold(1.0, 6 * 3600_000, 8.0) == pytest.approx(-math.log10(0.05))
    assert evidence_threshold(1.0, 24 * 3600_000, 8.0) == pytest.approx(math.log10(7))


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_threshold_refuses_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(ValueError, match="positive rate of false alarms"):
        evidence_threshold(rate, 60_000, 1.0)


def test_samples_that_happen_to_lie_close_do_not_make_a_cliff() -> None:
    sample = np.random.default_rng(2).gamma(20.0, size=2000)
    # As a few hundred held-out slots have it: a tenth of them in a thousandth of their width.
    middle = np.argsort(sample)[1000:1200]
    sample[middle] = np.linspace(sample[middle[0]], sample[middle[0]] + 0.01, len(middle))
    gaps = np.diff(calibration.fit_knots(sample.astype(np.float32)))
    assert gaps.min() > 0.09 * np.median(gaps)
    values = np.linspace(sample.min(), sample.max(), 5000)
    apart = np.abs(evidence(sample, values * (1 + 1e-6)) - evidence(sample, values))
    assert apart.max() < 1e-3
