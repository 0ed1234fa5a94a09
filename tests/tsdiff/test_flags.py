"""Channels that are on or off: what is one, and what one counts for."""

import numpy as np
import pytest

from tests.train.simulated import ANCHOR_ONLY, PERIOD_MS
from train.cli import describe
from train.evaluate import score_ours
from train.loop import train
from tsdiff.detector import Detector
from tsdiff.flags import find_flags, sensors, weights
from tsdiff.history import EntityHistory, History
from tsdiff.series import SHAPES

NAN = np.nan


@pytest.mark.parametrize(
    ("columns", "flags"),
    [
        pytest.param([[0, 1, 0, 1], [1, 2, 3, 4]], [True, False], id="two values"),
        pytest.param([[7, 7.5, NAN, 7], [1, 2, 3, NAN]], [True, False], id="any two, some missing"),
        pytest.param([[0, 0, 0, 0], [1, 2, 3, 4]], [False, False], id="never moved"),
        pytest.param([[0, 1, 2, 1], [1, 2, 3, 4]], [False, False], id="three values"),
        pytest.param([[NAN] * 4, [1, 2, 3, 4]], [False, False], id="never read"),
        pytest.param([[0, 1, 1, 1], [5, 5, 9, 9]], [False, False], id="nothing but flags"),
        pytest.param([[0, 1, 1, 1], [5, 5, 5, 5]], [False, False], id="and what never moved"),
    ],
)
def test_what_is_a_flag(columns: list[list[float]], flags: list[bool]) -> None:
    whole = np.array(columns, np.float32).T
    assert find_flags([whole]) == tuple(flags)
    assert find_flags([whole[:2], whole[2:]]) == tuple(flags)


def test_values_of_all_entities_count() -> None:
    moving = np.arange(4.0)
    one = np.stack([np.array([0, 1, 0, 1]), moving], 1).astype(np.float32)
    other = np.stack([np.array([0, 2, 0, 2]), moving], 1).astype(np.float32)
    still = np.stack([np.zeros(4), moving], 1).astype(np.float32)
    assert find_flags([one, other]) == (False, False)
    assert find_flags([one, still]) == (True, False)


def test_flags_together_count_as_one_channel() -> None:
    assert weights((True, False, True, False)).tolist() == [0.5, 1.0, 0.5, 1.0]
    assert weights((False, False)).tolist() == [1.0, 1.0]
    assert sensors((True, False), 2).tolist() == [False, True, False, True]


LENGTH = 1600
COMMANDS = 12
FAULT = slice(300, 330)


def telemetry(seed: int) -> np.ndarray:
    """A sensor, rare commands that do nothing to it, and a valve that goes on and off evenly."""
    rng = np.random.default_rng(seed)
    time = np.arange(LENGTH)
    sensor = np.sin(time / 6.0) + 0.1 * rng.normal(size=LENGTH)
    commands = rng.random((LENGTH, COMMANDS)) < 0.01
    valve = (time // 5) % 2
    return np.column_stack([sensor, commands, valve]).astype(np.float32)


CHANNELS = ("sensor", *(f"command{i}" for i in range(COMMANDS)), "valve")


def trained_on(channels: tuple[int, ...]) -> Detector:
    times = np.arange(LENGTH, dtype=np.int64) * PERIOD_MS
    values = telemetry(0)[:, channels]
    names = tuple(CHANNELS[channel] for channel in channels)
    history = History(names, (EntityHistory("rover", times, values),), ())
    bundle = train(history, ANCHOR_ONLY, period_ms=PERIOD_MS)
    assert bundle.manifest.flags == names[1:]
    assert f"on or off  {len(names) - 1}: {names[1]}" in describe(bundle)
    return Detector(bundle, shapes=SHAPES)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return trained_on(tuple(range(len(CHANNELS))))


def faulty() -> np.ndarray:
    """The sensor's wave is three times as fast for a while; commands come and go as ever."""
    values = telemetry(1)[:600]
    values[FAULT, 0] = np.sin(np.arange(FAULT.stop - FAULT.start) / 2.0)
    return values


def found(detector: Detector, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Evidence (T,) and which channel is blamed (T,)."""
    scored = score_ours(detector, "rover", None, values, np.arange(len(values)))
    assert scored.contribution is not None
    return scored.evidence, scored.contribution.argmax(1)


def test_commands_do_not_drown_a_sensor(detector: Detector) -> None:
    evidence, blamed = found(detector, faulty())
    settled = slice(FAULT.start + 10, FAULT.stop)
    quiet = np.r_[evidence[50 : FAULT.start], evidence[FAULT.stop + 40 :]]
    assert np.median(evidence[settled]) > quiet.max()
    assert np.mean(blamed[settled] == 0) > 0.9


def test_a_flag_that_breaks_its_rhythm_is_found() -> None:
    channels = (0, COMMANDS + 1)
    values = telemetry(1)[:600]
    values[FAULT, -1] = 1.0
    evidence, blamed = found(trained_on(channels), values[:, channels])
    stopped = slice(FAULT.start + 5, FAULT.stop)
    assert evidence[stopped].max() > evidence[50 : FAULT.start].max()
    assert np.mean(blamed[stopped] == 1) > 0.5


def test_flags_that_are_missing_leave_the_sensor_to_be_judged(detector: Detector) -> None:
    values = faulty()
    values[:, 1 : COMMANDS + 1] = np.nan
    evidence, _ = found(detector, values)
    assert np.median(evidence[FAULT]) > evidence[50 : FAULT.start].max()
