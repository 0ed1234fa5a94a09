"""The simulated fleet: believable when sound, and faulty exactly where it says so."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stream.simulate import (
    CHANNELS,
    DURATION_SLOTS,
    FAULT_KINDS,
    Fault,
    FaultKind,
    Fleet,
    delivery_order,
    inject_faults,
    simulate_fleet,
)
from tsdiff.errors import ConfigError

DAY = 1440  # slots of a minute
SEEDS = st.integers(0, 2**32 - 1)

some = settings(max_examples=8, deadline=None)


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return simulate_fleet(seed=1)


def complete(fleet: Fleet, row: int) -> NDArray[np.float64]:
    """Return the readings (n, D) of an entity in which nothing is missing."""
    values: NDArray[np.float64] = fleet.values[row].astype(np.float64)
    return values[np.isfinite(values).all(axis=-1)]


def faulty(fleet: Fleet, kind: FaultKind, seed: int = 0) -> tuple[Fleet, Fault, int]:
    """Return the fleet with one fault from its fourth day on, that fault, and its channel."""
    broken = inject_faults(fleet, seed=seed, kinds=[kind], start_slot=3 * DAY)
    (fault,) = broken.faults
    return broken, fault, fleet.channels.index(fault.channels[0])


def span(fleet: Fleet, fault: Fault) -> NDArray[np.float64]:
    """Return the readings (t, D) of the faulty entity while the fault lasts."""
    row = fleet.entities.index(fault.entity)
    return fleet.values[row, fault.start_slot : fault.end_slot].astype(np.float64)


# -- the sound fleet ---------------------------------------------------------------------------


def test_shape_and_names(fleet: Fleet) -> None:
    assert fleet.values.shape == (8, 7 * DAY, 12)
    assert fleet.values.dtype == np.float32
    assert fleet.channels == tuple(CHANNELS)
    assert len(set(fleet.entities)) == 8
    assert np.all(np.diff(fleet.timestamps_ms) == fleet.period_ms)


@some
@given(seed=SEEDS, entities=st.integers(1, 5), channels=st.integers(1, 12))
def test_values_stay_within_their_units(seed: int, entities: int, channels: int) -> None:
    fleet = simulate_fleet(entities, channels, slots=500, seed=seed)
    assert fleet.values.shape == (entities, 500, channels)
    assert np.nanmin(fleet.values) >= 0
    for place, unit in enumerate(fleet.units):
        if unit == "%":
            assert np.nanmax(fleet.values[..., place]) <= 100
    assert np.all(np.nanstd(fleet.values, axis=1) > 0)


def test_the_same_seed_gives_the_same_fleet(fleet: Fleet) -> None:
    np.testing.assert_array_equal(simulate_fleet(seed=1).values, fleet.values)
    assert not np.array_equal(simulate_fleet(seed=2).values, fleet.values, equal_nan=True)


def test_channels_belong_together(fleet: Fleet) -> None:
    place = {name: number for number, name in enumerate(fleet.channels)}
    for row in range(len(fleet.entities)):
        correlation = np.asarray(np.corrcoef(complete(fleet, row).T))
        for one, other in (
            ("cpu_usage", "load_1m"),
            ("requests", "net_out"),
            ("requests", "cpu_usage"),
            ("cpu_usage", "temperature"),
            ("disk_read", "disk_write"),
        ):
            assert correlation[place[one], place[other]] > 0.7, (one, other)


def test_days_are_alike_and_weekends_are_quiet(fleet: Fleet) -> None:
    requests = np.nan_to_num(fleet.values[..., fleet.channels.index("requests")].astype(float))
    for series in requests:
        assert np.corrcoef(series[:-DAY], series[DAY:])[0, 1] > 0.5
        assert np.corrcoef(series[: -DAY // 2], series[DAY // 2 :])[0, 1] < 0
        days = series.reshape(7, DAY).mean(axis=1)
        assert days[5:].mean() < 0.95 * days[1:4].mean()


def test_entities_differ_in_level_and_share_their_moods(fleet: Fleet) -> None:
    cpu = fleet.values[..., fleet.channels.index("cpu_usage")]
    levels = np.nanmean(cpu, axis=1)
    assert np.ptp(levels) > 3
    peaks = np.argmax(np.nanmean(cpu.reshape(8, 7, 24, 60), axis=(1, 3)), axis=1)
    assert set(peaks) <= set(range(10, 18))


def test_noise_remembers_the_slot_before(fleet: Fleet) -> None:
    latency = fleet.values[0, :, fleet.channels.index("latency_p95")].astype(float)
    latency = np.log(latency[np.isfinite(latency)])
    assert 0.3 < np.corrcoef(latency[:-1], latency[1:])[0, 1] < 0.99


def test_about_one_per_cent_is_missing(fleet: Fleet) -> None:
    absent = np.isnan(fleet.values)
    assert absent.mean() == pytest.approx(0.01, abs=0.002)
    whole = np.asarray(absent.all(axis=-1))
    assert whole.mean() == pytest.approx(0.003, abs=0.001)
    assert (absent & ~whole[..., None]).mean() == pytest.approx(0.007, abs=0.002)
    assert not np.isnan(simulate_fleet(slots=100, missing=0).values).any()


def test_history_leaves_out_what_was_not_sent(fleet: Fleet) -> None:
    history = fleet.history(DAY, 2 * DAY)
    assert history.channels == fleet.channels
    assert [entity.entity for entity in history.entities] == list(fleet.entities)
    for row, entity in enumerate(history.entities):
        sent = np.isfinite(fleet.values[row, DAY : 2 * DAY]).any(axis=-1)
        assert entity.values.shape == (sent.sum(), 12)
        np.testing.assert_array_equal(
            entity.timestamps_ms, fleet.timestamps_ms[DAY : 2 * DAY][sent]
        )


@pytest.mark.parametrize(
    "wrong", [{"entities": 0}, {"channels": 13}, {"channels": 0}, {"slots": 0}, {"missing": 1.0}]
)
def test_impossible_fleets_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        simulate_fleet(**wrong)


# -- faults ------------------------------------------------------------------------------------


@some
@given(seed=SEEDS, rounds=st.integers(1, 3))
def test_only_what_is_named_is_touched(seed: int, rounds: int) -> None:
    fleet = simulate_fleet(4, slots=2000, seed=3)
    kinds = FAULT_KINDS * rounds
    broken = inject_faults(fleet, seed=seed, kinds=kinds, start_slot=200)
    assert sorted(fault.kind for fault in broken.faults) == sorted(kinds)
    expected = np.zeros(fleet.values.shape, bool)
    for fault in broken.faults:
        assert fault.end_slot - fault.start_slot == DURATION_SLOTS[fault.kind]
        assert 200 <= fault.start_slot < fault.end_slot <= 2000
        assert fault.start_ms == fleet.timestamps_ms[fault.start_slot]
        row = fleet.entities.index(fault.entity)
        lead = max(0, fault.start_slot - 60)
        assert not expected[row, lead : fault.end_slot].any()
        place = [fleet.channels.index(name) for name in fault.channels]
        expected[row, fault.start_slot : fault.end_slot, place] = True
    changed = ~np.isclose(fleet.values, broken.values, equal_nan=True, rtol=1e-6)
    assert not (changed & ~expected).any()
    assert changed[expected].mean() > 0.9
    # What was missing still is, and nothing leaves the range of its unit.
    assert np.isnan(broken.values[np.isnan(fleet.values)]).all()
    assert np.nanmin(broken.values) >= 0
    percent = [unit == "%" for unit in fleet.units]
    assert np.nanmax(broken.values[..., percent]) <= 100


def test_faults_are_reproducible_and_leave_the_fleet_alone(fleet: Fleet) -> None:
    before = fleet.values.copy()
    one, same, other = (inject_faults(fleet, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(fleet.values, before)
    np.testing.assert_array_equal(one.values, same.values)
    assert one.faults == same.faults
    assert one.faults != other.faults
    assert list(one.faults) == sorted(one.faults, key=lambda fault: fault.start_slot)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("kind", "at_least"), [("spike", 7.5), ("level_shift", 3.9), ("slow_drift", 4.5)]
)
def test_additive_faults_are_as_large_as_said(
    fleet: Fleet, kind: FaultKind, at_least: float, seed: int
) -> None:
    broken, fault, place = faulty(fleet, kind, seed)
    added = (span(broken, fault) - span(fleet, fault))[:, place]
    size = np.nanstd(fleet.values[fleet.entities.index(fault.entity), :, place].astype(float))
    assert np.nanmax(added) / size >= at_least
    assert np.nanmin(added) >= -1e-3
    if kind == "slow_drift":
        assert np.all(np.diff(added[np.isfinite(added)]) > -1e-3)
        assert added[0] == pytest.approx(0, abs=1e-3) or np.isnan(added[0])


def test_a_stuck_sensor_repeats_its_last_value(fleet: Fleet) -> None:
    broken, fault, place = faulty(fleet, "stuck")
    held = span(broken, fault)[:, place]
    assert len(set(held[np.isfinite(held)])) == 1
    sound = span(fleet, fault)[:, place]
    assert np.nanstd(sound) > 0


def test_a_dying_channel_is_zero_or_missing(fleet: Fleet) -> None:
    broken, fault, place = faulty(fleet, "dead")
    assert np.nanmax(span(broken, fault)[:, place]) == 0
    assert np.nanmin(span(fleet, fault)[:, place]) > 0
    broken, fault, place = faulty(fleet, "missing")
    assert np.isnan(span(broken, fault)[:, place]).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_broken_correlation_shows_in_no_channel_alone(fleet: Fleet, seed: int) -> None:
    broken, fault, place = faulty(fleet, "broken_correlation", seed)
    row = fleet.entities.index(fault.entity)
    sound = complete(fleet, row)
    during = span(broken, fault)
    during = during[np.isfinite(during).all(axis=-1)]
    # Every channel is within the range of its sound readings ...
    assert np.all(during >= sound.min(axis=0) - 1e-3)
    assert np.all(during <= sound.max(axis=0) + 1e-3)
    # ... but the faulty one is no longer what the others say it must be.
    others = np.delete(np.arange(sound.shape[1]), place)
    design = np.column_stack([sound[:, others], np.ones(len(sound))])
    weights, *_ = np.linalg.lstsq(design, sound[:, place], rcond=None)
    usual = np.std(sound[:, place] - design @ weights)
    now = during[:, place] - np.column_stack([during[:, others], np.ones(len(during))]) @ weights
    assert np.mean(np.abs(now)) > 4 * usual


def test_faults_fit_into_fewer_channels() -> None:
    fleet = simulate_fleet(2, 2, slots=3000)
    broken = inject_faults(fleet)
    assert len(broken.faults) == len(FAULT_KINDS)
    assert {name for fault in broken.faults for name in fault.channels} <= set(fleet.channels)


def test_durations_can_be_chosen(fleet: Fleet) -> None:
    (fault,) = inject_faults(fleet, kinds=["stuck"], durations={"stuck": 7}).faults
    assert fault.end_slot - fault.start_slot == 7


def test_too_short_a_span_is_refused(fleet: Fleet) -> None:
    with pytest.raises(ConfigError, match="room for 7 faults in 8 entities"):
        inject_faults(fleet, start_slot=len(fleet.timestamps_ms) - 100)
    with pytest.raises(ConfigError, match="room for"):
        inject_faults(fleet, start_slot=-1)
    assert inject_faults(fleet, kinds=[]).faults == ()


# -- arrival -----------------------------------------------------------------------------------


@some
@given(seed=SEEDS, late_share=st.floats(0, 1), max_late_slots=st.integers(0, 4))
def test_every_reading_arrives_once_and_in_time(
    seed: int, late_share: float, max_late_slots: int
) -> None:
    fleet = simulate_fleet(3, 4, slots=300, seed=7, missing=0.1)
    arrivals = delivery_order(
        fleet, late_share=late_share, max_late_slots=max_late_slots, seed=seed
    )
    assert np.all(np.diff(arrivals.arrival_ms) >= 0)
    delay = arrivals.arrival_ms - arrivals.timestamps_ms
    assert delay.min() >= 0
    assert delay.max() <= max(0.5, max_late_slots) * fleet.period_ms
    slots = (arrivals.timestamps_ms - fleet.timestamps_ms[0]) // fleet.period_ms
    again = np.full(fleet.values.shape, np.nan, np.float32)
    again[arrivals.rows, slots] = arrivals.values
    np.testing.assert_array_equal(again, fleet.values)
    assert len(slots) == np.isfinite(fleet.values).any(axis=-1).sum()


def test_some_readings_come_behind_younger_ones(fleet: Fleet) -> None:
    arrivals = delivery_order(fleet, late_share=0.02, max_late_slots=3)
    delay = arrivals.arrival_ms - arrivals.timestamps_ms
    assert np.mean(delay > fleet.period_ms / 2) == pytest.approx(0.02, abs=0.005)
    behind = 0
    for row in range(len(fleet.entities)):
        times = arrivals.timestamps_ms[arrivals.rows == row]
        behind += int(np.count_nonzero(times < np.maximum.accumulate(times)))
    assert 0.005 < behind / len(delay) < 0.02
    on_time = delivery_order(fleet, late_share=0)
    for row in range(len(fleet.entities)):
        assert np.all(np.diff(on_time.timestamps_ms[on_time.rows == row]) > 0)


def test_arrival_is_reproducible(fleet: Fleet) -> None:
    one, same, other = (delivery_order(fleet, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.arrival_ms, same.arrival_ms)
    assert not np.array_equal(one.arrival_ms, other.arrival_ms)
