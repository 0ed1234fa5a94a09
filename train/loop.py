"""History -> bundle: the anchor, the network beside it, the calibration."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from train.anchors import Anchors, fit_anchors
from train.calibrate import calibrate
from train.config import TrainConfig
from train.data import Dataset, HistoryLike, load
from train.state import Checkpoints, TrainState
from train.step import WEIGHTS, Training, held_out_losses, train_step, windows_of
from tsdiff.anchor import Anchor
from tsdiff.bundle import Bundle, Manifest, make_bundle
from tsdiff.config import ModelConfig
from tsdiff.denoiser import Network, Params
from tsdiff.reading import Reader, make_model

# The network must be better than the anchor by this much (nats a cell) to be worth its cost: gains
# of .01 to .08 on held-out data found no more, or less, on four labelled sets and a simulated one
# (tests/benchmarks/README.md).
_WORTHWHILE = 0.1


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
    model_config = replace(config.model, rank=anchors.rank)
    trained = None
    if config.network is not None:
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
    return _assemble(dataset, config, model_config, anchors, trained, period_ms)


class _Trained(NamedTuple):
    network: Network
    params: Params
    weight: float
    losses: tuple[float, ...]
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
    anchor = Anchor(*(jnp.asarray(part) for part in anchors.parts))
    fitting = windows_of(dataset, run.model.window, held_out=False)
    held_out = windows_of(dataset, run.model.window, held_out=True)
    state = run.start()
    if store is not None:
        state = store.restore(state) or state
    deadline = None if config.max_minutes is None else clock() + 60.0 * config.max_minutes
    losses: tuple[float, ...] | None = None
    while int(state.step) < config.steps and int(state.bad) < config.patience:
        state, value = train_step(run, state, fitting, anchor)
        number = int(state.step)
        if number % config.evaluate_every == 0 or number == config.steps:
            losses = tuple(float(x) for x in held_out_losses(run, state.ema, held_out, anchor))
            state = _keep_best(state, min(losses))
            if store is not None:
                store.save(state)
        if number % 10 == 0 or losses is not None:
            best = None if losses is None else float(state.best_loss)
            base = None if losses is None else losses[0]
            report(Progress(number, config.steps, float(value), best, base))
        if deadline is not None and clock() > deadline:
            state = _keep_best(
                state, min(float(x) for x in held_out_losses(run, state.ema, held_out, anchor))
            )
            break
    losses = tuple(float(x) for x in held_out_losses(run, state.best, held_out, anchor))
    best = int(np.argmin(losses))
    weight = WEIGHTS[best] if losses[best] < losses[0] - _WORTHWHILE else 0.0
    if config.network_weight is not None:
        weight = config.network_weight
    return _Trained(run.network, state.best, weight, losses, int(state.step))


def _keep_best(state: TrainState, loss: float) -> TrainState:
    if loss < float(state.best_loss):
        return state._replace(
            best=state.ema, best_loss=jnp.asarray(loss, jnp.float32), bad=jnp.zeros_like(state.bad)
        )
    return state._replace(bad=state.bad + 1)


def _assemble(
    dataset: Dataset,
    config: TrainConfig,
    model_config: ModelConfig,
    anchors: Anchors,
    trained: _Trained | None,
    period_ms: int,
) -> Bundle:
    """Calibrate the model on the held-out part and put the bundle together."""
    mean, loadings, noise = (part.astype(np.float64) for part in anchors.parts)
    kept = trained if trained is not None and trained.weight > 0 else None
    params = None if kept is None else kept.params
    reader = (
        Reader(model_config) if kept is None else Reader(model_config, kept.network, kept.weight)
    )
    model = make_model(mean, loadings, noise, model_config, params)
    fitted = calibrate(model, dataset, reader)
    arrays: dict[str, np.ndarray] = dict(
        zip(("anchor.mean", "anchor.loadings", "anchor.noise"), anchors.parts, strict=True)
    )
    arrays.update(zip(("moments.mean", "moments.lags"), anchors.moments, strict=True))
    for name in ("mean", "scale", "spread"):
        arrays[f"statistics.{name}"] = getattr(dataset.statistics, name)
    for name, table in fitted.calibration._asdict().items():
        arrays[f"calibration.{name}"] = np.asarray(table, np.float32)
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
        metrics["forecast_loss_anchor"] = trained.losses[0]
        metrics["forecast_loss_network"] = min(trained.losses)
    manifest = Manifest(
        name=config.name,
        period_ms=period_ms,
        channels=dataset.channels,
        units=config.units or ("",) * len(dataset.channels),
        entities=dataset.entities,
        model=model_config,
        network=None if kept is None else config.network,
        network_weight=0.0 if kept is None else kept.weight,
        training=training,
        fingerprint=dataset.fingerprint,
        metrics=metrics,
        files={},
    )
    return make_bundle(manifest, arrays)
