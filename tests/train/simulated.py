"""Small histories with known structure, and the bundles trained on them."""

from functools import cache

import numpy as np

from train.config import TrainConfig
from train.loop import train
from tsdiff.bundle import Bundle
from tsdiff.config import ModelConfig, NetworkConfig
from tsdiff.history import EntityHistory, History

CHANNELS = 5
PERIOD_MS = 60_000
MODEL = ModelConfig(window=8, rank=8, smoothing=8)
SMALL = TrainConfig(
    model=MODEL,
    network=NetworkConfig(width=16, blocks=1),
    steps=40,
    batch=16,
    evaluate_every=10,
    min_held_out=200,
    network_weight=0.5,
)
ANCHOR_ONLY = TrainConfig(model=MODEL, network=None, min_held_out=200)


def simulate(length: int, seed: int, missing: float = 0.0) -> np.ndarray:
    """Two hidden rhythms seen by five channels of different units, with noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(length)
    hidden = np.stack([np.sin(time / 5.0 + seed), np.sin(time / 17.0)], 1)
    hidden = hidden + 0.1 * rng.normal(size=hidden.shape).cumsum(0) / np.sqrt(length)
    mixing = np.array([[1.0, 0.5, -1.0, 0.0, 0.8], [0.0, 1.0, 0.5, 1.0, -0.8]])
    values = hidden @ mixing + 0.1 * rng.normal(size=(length, CHANNELS))
    values = values * [1, 10, 0.01, 1e6, 1] + [0, 100, 1, 5e6, -3]
    values[rng.uniform(size=values.shape) < missing] = np.nan
    return np.asarray(values, np.float32)


def history(length: int = 900, entities: int = 2, missing: float = 0.0) -> History:
    return History(
        tuple(f"c{i}" for i in range(CHANNELS)),
        tuple(
            EntityHistory(
                f"e{i}",
                np.arange(length, dtype=np.int64) * PERIOD_MS,
                simulate(length, i, missing),
            )
            for i in range(entities)
        ),
        (),
    )


@cache
def anchor_bundle() -> Bundle:
    return train(history(), ANCHOR_ONLY, period_ms=PERIOD_MS)


@cache
def network_bundle() -> Bundle:
    return train(history(), SMALL, period_ms=PERIOD_MS)
