"""A small real model and the history it is to score."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from stream.simulate import inject_faults, simulate_fleet
from train.config import TrainConfig
from train.loop import train
from tsdiff.bundle import save_bundle
from tsdiff.history import History


@dataclass(frozen=True)
class SmallBundle:
    """A bundle on disk; `live` holds faults and one entity more than it was trained with."""

    path: Path
    version: str
    trained: History
    live: History
    period_ms: int = 60_000


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> SmallBundle:
    """Train the Gaussian anchor on five simulated servers; a sixth is a newcomer."""
    fleet = inject_faults(
        simulate_fleet(6, 12, slots=3400, seed=1), seed=1, start_slot=2500, end_slot=3300
    )
    everything = fleet.history(0, 2400)
    trained = replace(everything, entities=everything.entities[:5])
    bundle = train(trained, TrainConfig(name="small", network=None), period_ms=60_000)
    path = tmp_path_factory.mktemp("model") / "bundle"
    version = save_bundle(bundle, path)
    return SmallBundle(path, version, trained, fleet.history(2400, 3400))
