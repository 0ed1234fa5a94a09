"""History -> bundle: the anchor, the network beside it, the calibration."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from train.anchors import Anchors, fit_anchors
from train.calibrate import calibrate
from train.config import TrainConfig
from train.data import Dataset, HistoryLike, load
from train.state import Checkpoints, TrainState
from train.step import WEIGHTS, Anchored, Training, held_out_losses, train_step, windows_of
from tsdiff.anchor import Anchor
from tsdiff.bundle import Bundle, Manifest, make_bundle
from tsdiff.calibration import SCORERS, array_name
from tsdiff.config import ModelConfig
from tsdiff.denoiser import Network, Params
from tsdiff.flags import Flags, sensors
from tsdiff.reading import Reader, make_model
from tsdiff.types import FloatArray

# Share of a typical channel's held-out loss that the network may leave, to be worth its cost: where
# it leaves .29 to .93 (servers, spacecraft, water, pumps), it finds no more faults, or fewer; where
# .15 to .18 (fleets of non-linear relations), more (tests/benchmarks/README.md).
_WORTHWHILE = 0.22
_TINY_LOSS = 1e-3


class Progress(NamedTuple):
    """Where training stands; losses in nats a cell, `held_out` None before the first one."""

    step: int
    steps: int
    loss: float
    held_out: float | None
    anchor: float | None


Report = Callable[[Progress], None]


def _nothing(_: Progress) -> None:
    """Report to nobody."""


def train(
    history: HistoryLike,
    config: TrainConfig,
    *,
    period_ms: int,
    checkpoints: Path | None = None,
    resume: bool = False,
    report: Report = _nothing,
    clock: Callable[[], float] = time.monotonic,
) -> Bundle:
    """Make a bundle. The same history, settings and seed give the same bundle, resumed or not.

    `checkpoints` is a folder for the network's training state (None: keep none); it is emptied
    first unless `resume`. `clock` (seconds) is asked only if `config.max_minutes` is set.

    Raises:
        HistoryError: the history is too short or empty.
        ConfigError: `resume` with checkpoints of another run.

    """
    dataset = load(history, period_ms, config)
    anchors = fit_anchors(dataset, config)
    trained = None
    if config.network is not None:
        model_config = _ranked(config, anchors)
        network = Network(
            len(dataset.channels), len(dataset.entities), model_config, config.network
        )
        run = Training(network, model_config, config)
        store = None
        if checkpoints is not None:
            store = Checkpoints(checkpoints, _identity(dataset, config))
            if not resume:
                store.clear()
        try:
            trained = _train_network(run, dataset, anchors, store, report, clock)
        finally:
            if store is not None:
                store.close()
    return _assemble(dataset, config, anchors, trained, period_ms)


def _ranked(config: TrainConfig, anchors: Anchors) -> ModelConfig:
    """The model, of the rank that its anchors have."""
    return replace(config.model, rank=anchors.rank)


class _Trained(NamedTuple):
    network: Network
    params: Params
    weight: float
    unexplained: float
    losses: dict[str, float]
    steps: int


def _identity(dataset: Dataset, config: TrainConfig) -> str:
    """What a checkpoint belongs to; a time limit may differ from run to run."""
    settings = repr(sorted(asdict(replace(config, max_minutes=None)).items()))
    return hashlib.sha256((dataset.fingerprint + settings).encode()).hexdigest()


def _train_network(
    run: Training,
    dataset: Dataset,
    anchors: Anchors,
    store: Checkpoints | None,
    report: Report,
    clock: Callable[[], float],
) -> _Trained:
    config = run.config
    mean, loadings, noise = (part.astype(np.float64) for part in anchors.parts)
    anchored = Anchored(
        Anchor(*(jnp.asarray(part) for part in anchors.parts)),
        make_model(mean, loadings, noise, dataset.flags, run.model).anchors.clean,
    )
    fitting = windows_of(dataset, run.model.window, held_out=False)
    held_out = windows_of(dataset, run.model.window, held_out=True)
    state = run.start()
    if store is not None:
        state = store.restore(state) or state
    deadline = None if config.max_minutes is None else clock() + 60.0 * config.max_minutes
    losses: FloatArray | None = None
    while int(state.step) < config.steps and int(state.bad) < config.patience:
        state, value = train_step(run, state, fitting, anchored)
        number = int(state.step)
        if number % config.evaluate_every == 0 or number == config.steps:
            losses = np.asarray(held_out_losses(run, state.ema, held_out, anchored)).mean(1)
            state = _keep_best(state, float(losses.min()))
            if store is not None:
                store.save(state)
        if number % 10 == 0 or losses is not None:
            best = None if losses is None else float(state.best_loss)
            base = None if losses is None else float(losses[0])
            report(Progress(number, config.steps, float(value), best, base))
        if deadline is not None and clock() > deadline:
            losses = np.asarray(held_out_losses(run, state.ema, held_out, anchored)).mean(1)
            state = _keep_best(state, float(losses.min()))
            break
    of_channels = np.asarray(held_out_losses(run, state.best, held_out, anchored))
    losses = of_channels.mean(1)
    best = int(np.argmin(losses))
    unexplained = _unexplained(of_channels[0], of_channels[best], dataset.flags)
    weight = WEIGHTS[best] if unexplained < _WORTHWHILE else 0.0
    if config.network_weight is not None:
        weight = config.network_weight
    found = {"anchor": float(losses[0]), "network": float(losses[best]), "ratio": unexplained}
    return _Trained(run.network, state.best, weight, min(unexplained, 1.0), found, int(state.step))


def _unexplained(anchor: FloatArray, network: FloatArray, flags: Flags) -> float:
    """Share of the anchor's loss that the network leaves of the typical channel.

    Not of all together: a few that the anchor fits badly are no reason to judge all anew. Nor are
    flags, or channels of which nothing was left to explain.
    """
    judged = sensors(flags) & (anchor > _TINY_LOSS)
    return float(np.median(network[judged] / anchor[judged])) if judged.any() else 1.0


def _keep_best(state: TrainState, loss: float) -> TrainState:
    if loss < float(state.best_loss):
        return state._replace(
            best=state.ema, best_loss=jnp.asarray(loss, jnp.float32), bad=jnp.zeros_like(state.bad)
        )
    return state._replace(bad=state.bad + 1)


def _assemble(
    dataset: Dataset,
    config: TrainConfig,
    anchors: Anchors,
    trained: _Trained | None,
    period_ms: int,
) -> Bundle:
    """Calibrate the model on the held-out part and put the bundle together."""
    model_config = _ranked(config, anchors)
    mean, loadings, noise = (part.astype(np.float64) for part in anchors.parts)
    kept = trained if trained is not None and trained.weight > 0 else None
    params = None if kept is None else kept.params
    reader = (
        Reader(model_config, dataset.flags)
        if kept is None
        else Reader(model_config, dataset.flags, kept.network, kept.weight, kept.unexplained)
    )
    model = make_model(mean, loadings, noise, dataset.flags, model_config, params)
    fitted = calibrate(model, dataset, reader)
    arrays: dict[str, np.ndarray] = dict(
        zip(("anchor.mean", "anchor.loadings", "anchor.noise"), anchors.parts, strict=True)
    )
    arrays.update(zip(("moments.mean", "moments.lags"), anchors.moments, strict=True))
    for name in ("mean", "scale", "spread"):
        arrays[f"statistics.{name}"] = getattr(dataset.statistics, name)
    arrays["season"] = dataset.season
    arrays["runs.longest"] = dataset.longest
    tables = {SCORERS[0]: fitted.calibration}
    slow = tuple(dict.fromkeys(config.slow_scorers))
    for scorer in slow:
        tables[scorer] = calibrate(model, dataset, replace(reader, slow=scorer)).calibration
    for scorer, found in tables.items():
        for name, table in found._asdict().items():
            arrays[array_name(scorer, name)] = np.asarray(table, np.float32)
    arrays["band_scale"] = fitted.band_scale
    for name, array in (params or {}).items():
        arrays[f"network.{name}"] = np.asarray(array, np.float32)
    metrics = dict(fitted.metrics)
    training: dict[str, int | float | str | bool] = {
        "seed": config.seed,
        "held_out": config.held_out,
        "anchor": anchors.kind,
    }
    metrics.update({f"anchor_loss_{kind}": loss for kind, loss in anchors.losses.items()})
    if trained is not None:
        training["steps"] = trained.steps
        metrics.update({f"imputation_loss_{name}": loss for name, loss in trained.losses.items()})
    manifest = Manifest(
        name=config.name,
        period_ms=period_ms,
        channels=dataset.channels,
        units=config.units or ("",) * len(dataset.channels),
        entities=dataset.entities,
        flags=tuple(compress(dataset.channels, dataset.flags)),
        model=model_config,
        network=None if kept is None else config.network,
        network_weight=reader.network_weight,
        network_unexplained=reader.unexplained,
        scorers=(*SCORERS, *slow),
        training=training,
        fingerprint=dataset.fingerprint,
        metrics=metrics,
        files={},
    )
    return make_bundle(manifest, arrays)
