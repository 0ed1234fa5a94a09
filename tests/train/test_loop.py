"""Training: repeatable, resumable, refusing what it cannot use."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.train.simulated import (
    ANCHOR_ONLY,
    PERIOD_MS,
    SMALL,
    anchor_bundle,
    history,
    network_bundle,
    simulate,
)
from train.config import TrainConfig
from train.loop import Progress, _unexplained, train
from train.state import Checkpoints, remove_checkpoints
from tsdiff.config import ModelConfig
from tsdiff.errors import ConfigError, HistoryError
from tsdiff.history import History


def test_same_seed_same_bundle() -> None:
    again = train(history(), SMALL, period_ms=PERIOD_MS)
    assert again.version == network_bundle().version
    other = train(history(), replace(SMALL, seed=1), period_ms=PERIOD_MS)
    assert other.version != network_bundle().version


class Killed(Exception):
    """Stands for kill -9: nothing after it runs."""


def test_a_resumed_run_is_an_undisturbed_one(tmp_path: Path) -> None:
    def kill(state: Progress) -> None:
        if state.step == 30:
            raise Killed

    with pytest.raises(Killed):
        train(history(), SMALL, period_ms=PERIOD_MS, checkpoints=tmp_path / "c", report=kill)
    steps: list[int] = []
    resumed = train(
        history(),
        SMALL,
        period_ms=PERIOD_MS,
        checkpoints=tmp_path / "c",
        resume=True,
        report=lambda state: steps.append(state.step),
    )
    assert min(steps) > 30
    assert resumed.version == network_bundle().version


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    short = replace(SMALL, steps=10)
    train(history(), short, period_ms=PERIOD_MS, checkpoints=tmp_path / "c")
    with pytest.raises(ConfigError, match="found another run's; train without --resume"):
        train(
            history(),
            replace(short, seed=5),
            period_ms=PERIOD_MS,
            checkpoints=tmp_path / "c",
            resume=True,
        )


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"training checkpoints only, found 'thesis\.tex'"):
        remove_checkpoints(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        Checkpoints(tmp_path / "c", "00").clear()


def test_training_stops_when_time_is_up() -> None:
    ticks = iter(range(10_000))
    config = replace(SMALL, max_minutes=5 / 60)
    bundle = train(history(), config, period_ms=PERIOD_MS, clock=lambda: float(next(ticks)))
    assert int(bundle.manifest.training["steps"]) < 10


def test_a_network_that_does_not_help_is_dropped() -> None:
    config = replace(SMALL, steps=1, learning_rate=1e-9, network_weight=None)
    bundle = train(history(), config, period_ms=PERIOD_MS)
    assert bundle.manifest.network is None
    assert not any(name.startswith("network.") for name in bundle.arrays)


def test_flags_and_still_channels_have_no_say_in_whether_a_network_is_kept() -> None:
    anchor = np.array([1.0, 0.5, 0.0, 0.0, 0.2, 0.2], np.float32)
    network = np.array([0.9, 0.4, 0.0, -0.1, 0.001, 0.001], np.float32)
    flags = (False, False, False, False, True, True)
    assert _unexplained(anchor, network, flags) == pytest.approx(0.85)
    assert _unexplained(anchor, network, (True,) * 6) == 1.0


def test_missing_cells_in_history() -> None:
    bundle = train(history(missing=0.2), ANCHOR_ONLY, period_ms=PERIOD_MS)
    assert all(np.isfinite(array).all() for array in bundle.arrays.values())
    assert 0.85 < bundle.manifest.metrics["band_coverage"] < 0.95


def test_an_empty_channel_is_carried_along() -> None:
    whole = history()
    for entity in whole.entities:
        entity.values[:, 4] = np.nan
    bundle = train(whole, ANCHOR_ONLY, period_ms=PERIOD_MS)
    assert all(np.isfinite(array).all() for array in bundle.arrays.values())


def test_short_history_is_refused_with_numbers() -> None:
    with pytest.raises(HistoryError, match=r"at least 96 slots of 60 s .* e0 has 40; give longer"):
        train(history(length=40), ANCHOR_ONLY, period_ms=PERIOD_MS)


def test_empty_history_is_refused() -> None:
    with pytest.raises(HistoryError, match="at least one entity"):
        train(History(("a",), (), ()), ANCHOR_ONLY, period_ms=PERIOD_MS)
    empty = history()
    for entity in empty.entities:
        entity.values[:] = np.nan
    with pytest.raises(HistoryError, match="every cell of it is missing"):
        train(empty, ANCHOR_ONLY, period_ms=PERIOD_MS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrainConfig(held_out=0.9),
        lambda: TrainConfig(steps=0),
        lambda: ModelConfig(window=4),
        lambda: ModelConfig(rank=0),
    ],
)
def test_impossible_settings(make: type) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make()


def test_held_out_metrics_are_in_the_bundle() -> None:
    metrics = anchor_bundle().manifest.metrics
    assert metrics["held_out_slots"] == 400
    assert 0.85 < metrics["band_coverage"] < 0.95
    alarms = metrics["alarms_per_entity_week"] * 400 * PERIOD_MS / (7 * 24 * 3600 * 1000)
    assert alarms == pytest.approx(round(alarms))
    assert alarms <= 2  # a hundredth was asked for in so short a time
    assert simulate(10, 0).shape == (10, 5)
