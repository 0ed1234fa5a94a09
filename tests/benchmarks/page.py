"""What the page costs: `python -m tests.benchmarks.page`, a minute on one core.

the loop      share of it that goes to keeping what the page shows, 1,000 entities x 38 channels
the overview  of 10,000 entities: milliseconds, bytes, and bytes packed
an entity     of 38 channels: the same
"""

import gzip
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from prometheus_client import CollectorRegistry

from stream.bench import pin_to_one_core, tiny_bundle
from stream.buffer import PartitionBuffer
from stream.compose import grid_of, load_model, recent_of, scoring_of
from stream.config import load_config
from stream.decide import AlertPolicy
from stream.metrics import ServiceMetrics
from stream.recent import Layout, Recent
from stream.records import ChannelScore, PartitionId, ReadingBatch, SlotScore
from stream.scoring import score_rounds
from stream.shown import entity, overview
from train.config import TrainConfig
from train.loop import train
from tsdiff.bundle import Bundle, save_bundle
from tsdiff.history import History

ENTITIES, CHANNELS, SLOTS, MANY = 1000, 38, 60, 10_000


def trainer(history: History, *, period_ms: int, **settings: Any) -> Bundle:  # noqa: ANN401
    return train(history, TrainConfig(**settings), period_ms=period_ms)


def loop(folder: Path) -> None:
    """Tell how much of a round is the page's."""
    save_bundle(tiny_bundle(trainer, CHANNELS), folder / "bundle")
    model = load_model(folder / "bundle")
    settings = load_config(None, {"model.path": folder / "bundle", "input.topic": "t"})
    recent = recent_of(model, settings)
    assert recent is not None
    model.detector.warm_up()
    metrics = ServiceMetrics(
        CollectorRegistry(), channels=(), max_entities=ENTITIES, top_channels=5, entity_ttl_s=900
    )
    grid, scoring = grid_of(model, settings), scoring_of(model, settings)
    buffer = PartitionBuffer(grid, model.detector)
    names = [f"host-{i}" for i in range(ENTITIES)]
    # Known to the model, so that they are scored after a window and not after 256 slots.
    known = model.bundle.manifest.entities
    names[: len(known)] = known
    random = np.random.default_rng(0)
    mean, scale = model.detector.statistics(-1)
    total, kept = [], []
    for slot in range(300 + SLOTS):
        values = mean + scale * random.standard_normal((ENTITIES, CHANNELS))
        batch = ReadingBatch(
            PartitionId("t", 0),
            names,
            np.full(ENTITIES, 60_000 * slot, np.int64),
            values.astype(np.float32),
            np.arange(ENTITIES) + ENTITIES * slot,
            ENTITIES * (slot + 1),
        )
        spent = 0.0

        def timed(call: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
            nonlocal spent
            begun = time.perf_counter()
            call(*arguments)
            spent += time.perf_counter() - begun

        begun = time.perf_counter()
        verdicts = score_rounds(
            [(buffer, buffer.advance(batch))],
            model.detector,
            scoring,
            watcher=lambda detail: timed(recent.take, detail),
        )
        timed(recent.observe, verdicts.scores, verdicts.alerts)
        # It holds the same records: letting go of the old ones is its business, page or not.
        metrics.observe_scores(verdicts.scores)
        if slot >= 300:
            total.append(time.perf_counter() - begun)
            kept.append(spent)
    print(
        f"a round of {ENTITIES} x {CHANNELS}: {1e3 * median(total):.1f} ms scored, of which "
        f"{1e3 * median(kept):.2f} ms for the page, {100 * sum(kept) / sum(total):.1f} %"
    )
    tell("an entity", lambda: entity(recent, names[0]))


def many() -> None:
    """Tell how long the list of a large fleet takes."""
    names = tuple(f"c{i}" for i in range(CHANNELS))
    layout = Layout(names, ("",) * CHANNELS, 60_000)
    recent = Recent(layout, AlertPolicy(), max_entities=MANY, ttl_s=900.0)
    random = np.random.default_rng(0)
    cells = {name: ChannelScore(1.0, 1.0, 0.0, 2.0, 0.2) for name in names[:5]}
    for slot in range(400):
        numbers = random.exponential(0.2, MANY).tolist()
        recent.observe(
            [
                SlotScore(f"host-{i}", 60_000 * slot, x, 0.1, "ok", 0.0, "m@0", cells)
                for i, x in enumerate(numbers)
            ]
        )
    tell(f"the overview of {MANY} entities", lambda: overview(recent))
    tell(f"a search among {MANY} entities", lambda: overview(recent, "99", 200))


def tell(what: str, ask: Callable[[], Any]) -> None:
    seconds = []
    for _ in range(20):
        begun = time.perf_counter()
        body = msgspec.json.encode(ask())
        seconds.append(time.perf_counter() - begun)
    packed = gzip.compress(body, 1)
    print(
        f"{what}: {1e3 * median(seconds):.1f} ms, {len(body) / 1e3:.0f} KB, "
        f"{len(packed) / 1e3:.0f} KB packed"
    )


if __name__ == "__main__":
    pin_to_one_core()
    with tempfile.TemporaryDirectory() as made:
        loop(Path(made))
    many()
