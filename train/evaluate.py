"""Every detector over labelled sets, by one causal protocol.

Fit on the training part, calibrate on its last 15 %, score the test part once and in order.
Nothing looks at the test part's statistics or labels; there is no point adjustment.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from train import baselines, stress
from train.baselines import BASELINES, Scored
from train.config import TrainConfig
from train.data import held_out_slots
from train.labelled import Entity, LabelledSet, Trial
from train.loop import train
from train.metrics import (
    alarms,
    average_precision,
    event_metrics,
    hit_rate,
    roc_auc,
    volumes,
)
from tsdiff.bundle import Bundle
from tsdiff.calibration import SCORERS, evidence_threshold
from tsdiff.config import SLOW_SCORERS, Adapt, NetworkConfig
from tsdiff.detector import Detector
from tsdiff.errors import ConfigError
from tsdiff.history import History
from tsdiff.series import SHAPES, score_series
from tsdiff.types import FloatArray
from tsdiff.windows import extended

SLOW = {f"tsdiff-{name}": name for name in SLOW_SCORERS}
"""Our slow scorers, run by name only."""
_FAST = {"tsdiff": SCORERS[0], **{f"tsdiff-{name}": name for name in SCORERS[1:]}}
OURS = {**_FAST, **SLOW}
"""Our scorers: the default one, then `tsdiff-<scorer>`."""
DETECTORS = (*_FAST, *BASELINES)
"""Run where nothing is asked for."""
CLEAN = "clean"
STRESSES = (*stress.WORSE, stress.CONTAMINATED)


@dataclass(frozen=True)
class Settings:
    """What is run. `shared`: one model of ours for all entities of a set, else one for each."""

    detectors: tuple[str, ...] = DETECTORS
    seeds: int = 1
    shared: bool = True
    network: bool = True
    stress: bool = False
    adapt: Adapt = "auto"
    lag: int = 0
    false_alarms_per_entity_week: float = 1.0

    def __post_init__(self) -> None:
        for name in self.detectors:
            if name not in (known := (*OURS, *BASELINES)):
                raise ConfigError(f"expected a detector of {', '.join(known)}, got {name!r}")
        if self.seeds < 1:
            raise ConfigError(f"expected at least one seed, got {self.seeds}")
        if not 0 < self.false_alarms_per_entity_week < math.inf:
            raise ConfigError(
                "expected a positive rate of false alarms per entity and week, got "
                f"{self.false_alarms_per_entity_week}"
            )


class Result(NamedTuple):
    """One detector on one entity with one seed; `stress` says what was made worse."""

    set: str
    entity: str
    detector: str
    seed: int
    stress: str
    metrics: dict[str, float]


Find = Callable[[Entity, Trial], Scored]
"""A fitted detector: scores a test part."""


# -- fitting and scoring ------------------------------------------------------------------------


def score_ours(
    detector: Detector,
    entity: str,
    past: FloatArray | None,
    values: FloatArray,
    numbers: NDArray[np.int64],
) -> Scored:
    """Score a series (T, D) on the grid, in order; `past` (N, D) is what precedes it.

    `numbers` (T,) are the slots' own.
    The window and the stream history of the first slots come from `past`; without one they are
    empty, as when the service meets an entity for the first time.
    """
    before = values[:0] if past is None else past
    # What fills the first window and the first smoothed value.
    before = before[max(len(before) - detector.window + 1 - detector.history, 0) :]
    series = np.concatenate([before, values])
    mean, scale = detector.statistics(detector.row(entity))
    found = score_series(
        detector,
        entity,
        series,
        mean=mean,
        scale=scale,
        numbers=extended(numbers, len(before)),
        first=max(len(before) - detector.history, 0),
        start=len(before),
    )
    evidence = np.nan_to_num(found.evidence)
    # Over a fault, slots weigh as much as they say, and shares are those of errors, not of squares:
    # one wild channel does not decide it.
    errors = np.sqrt(found.contribution)
    shares = errors / np.maximum(errors.sum(1, keepdims=True), np.finfo(np.float32).tiny)
    blame = (shares * evidence[:, None]).astype(np.float32)
    return Scored(evidence, evidence, blame, detector.slots_per_alarm)


@lru_cache(maxsize=4)
def _bundles(labelled: LabelledSet, settings: Settings, seed: int) -> Mapping[str, Bundle]:
    """Train one bundle for all entities, or one for each; all scorers read the same."""
    config = TrainConfig(
        seed=seed,
        network=NetworkConfig() if settings.network else None,
        slow_scorers=tuple(SLOW[name] for name in settings.detectors if name in SLOW),
    )

    def fit(entities: Sequence[Entity]) -> Bundle:
        history = History(labelled.channels, tuple(each.history for each in entities), ())
        return train(history, config, period_ms=labelled.period_ms)

    groups = [labelled.entities] if settings.shared else [(each,) for each in _judged(labelled)]
    of_entity: dict[str, Bundle] = {}
    for group in groups:
        of_entity.update(dict.fromkeys((entity.name for entity in group), fit(group)))
    return of_entity


def _fit_ours(name: str, labelled: LabelledSet, settings: Settings, seed: int) -> Find:
    bundles = _bundles(labelled, settings, seed)
    detectors = {
        version: Detector(
            bundle, shapes=SHAPES, scorer=OURS[name], lag=settings.lag, adapt=settings.adapt
        )
        for version, bundle in {each.version: each for each in bundles.values()}.items()
    }

    def find(entity: Entity, test: Trial) -> Scored:
        past = entity.past if test.goes_on else None
        # The names in a bundle are those of the history it was trained on.
        detector = detectors[bundles[entity.name].version]
        return score_ours(detector, entity.history.entity, past, test.values, test.numbers)

    return find


def _fit_baseline(name: str, labelled: LabelledSet, settings: Settings, seed: int) -> Find:
    config = TrainConfig()
    fitted = {}
    for entity in _judged(labelled):
        held_out = held_out_slots(len(entity.past), config)
        goes_on = entity.test is not None and entity.test.goes_on
        baseline = BASELINES[name]()
        fitted[entity.name] = baselines.fit(baseline, entity.past, held_out, seed, goes_on)
    return lambda entity, test: fitted[entity.name](test.values)


def _fit(name: str, labelled: LabelledSet, settings: Settings, seed: int) -> Find:
    fit = _fit_ours if name in OURS else _fit_baseline
    return fit(name, labelled, settings, seed)


def _judged(labelled: LabelledSet) -> list[Entity]:
    return [entity for entity in labelled.entities if entity.test is not None]


def _seeded(name: str, settings: Settings) -> bool:
    return settings.network if name in OURS else BASELINES[name]().seeded


# -- judging ------------------------------------------------------------------------------------


def judge(
    test: Trial, scored: Scored, period_ms: int, false_alarms_per_entity_week: float
) -> dict[str, float]:
    """Compute all metrics of a scored test part; NaN where one does not apply."""
    threshold = evidence_threshold(false_alarms_per_entity_week, period_ms, scored.slots_per_alarm)
    labels, slots = test.labels, test.slots
    order = scored.anomaly_score[slots]
    volume = volumes(labels, order, test.buffer)
    silent = ~np.isfinite(test.values).any(1)
    alarm = alarms(np.where(silent, np.nan, scored.evidence / threshold))[slots]
    metrics = {
        "vus_pr": volume.pr,
        "auc_pr": average_precision(labels, order),
        "vus_roc": volume.roc,
        "auc_roc": roc_auc(labels, order),
        **event_metrics(labels, alarm, period_ms)._asdict(),
        "root_cause_hit_rate": math.nan,
        "root_cause_hit_rate_150": math.nan,
    }
    if scored.contribution is not None:
        blame = scored.contribution[slots]
        metrics["root_cause_hit_rate"] = hit_rate(blame, test.causes)
        metrics["root_cause_hit_rate_150"] = hit_rate(blame, test.causes, 1.5)
    return metrics


def evaluate(
    sets: Sequence[LabelledSet], settings: Settings, report: Callable[[str], None]
) -> Iterator[Result]:
    """Run everything; results come as they are made, and `report` gets a line per detector.

    Raises:
        TsdiffError: history that a detector cannot be fitted to.

    """
    for labelled in sets:
        for name in settings.detectors:
            chance = settings.stress or _seeded(name, settings)
            for seed in range(settings.seeds if chance else 1):
                begun = time.monotonic()
                results = []
                for result in _run(name, labelled, settings, seed):
                    results.append(result)
                    yield result
                clean = [each.metrics["vus_pr"] for each in results if each.stress == CLEAN]
                report(
                    f"{labelled.name}  {name}  seed {seed}: VUS-PR {_mean(clean):.3f}, "
                    f"{time.monotonic() - begun:.1f} s"
                )


def _run(name: str, labelled: LabelledSet, settings: Settings, seed: int) -> Iterator[Result]:
    rate = settings.false_alarms_per_entity_week

    def judged(find: Find, entity: Entity, kind: str) -> Iterator[Result]:
        test = entity.test
        if test is None:
            return
        if kind in stress.WORSE:
            test = test._replace(values=stress.worsen(kind, entity, test.values, seed))
        scored = find(entity, test)
        metrics = judge(test, scored, labelled.period_ms, rate)
        yield Result(labelled.name, entity.name, name, seed, kind, metrics)

    find = _fit(name, labelled, settings, seed)
    for entity in labelled.entities:
        for kind in (CLEAN, *stress.WORSE) if settings.stress else (CLEAN,):
            yield from judged(find, entity, kind)
    if settings.stress:
        spoiled = stress.contaminate(labelled, seed)
        find = _fit(name, spoiled, settings, seed)
        for entity in spoiled.entities:
            yield from judged(find, entity, stress.CONTAMINATED)


# -- summing up ---------------------------------------------------------------------------------

Summary = dict[str, float]


def _mean(values: Sequence[float]) -> float:
    """Mean of what there is; NaN where there is nothing."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _means(results: Sequence[Mapping[str, float]]) -> Summary:
    names = results[0].keys() if results else ()
    return {name: _mean([metrics[name] for metrics in results]) for name in names}


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """Mean over seeds for each entity, over entities for each set; as `--json` prints it.

    A set's `vus_pr_spread` is the standard deviation of its mean between seeds, and `stress` the
    share of the clean VUS-PR that is kept (mean over entities by mean over entities).
    """
    clean = [result for result in results if result.stress == CLEAN]
    entities: dict[str, dict[str, Summary]] = {}
    sets: dict[str, dict[str, Summary]] = {}
    for key, group in _grouped(clean, lambda each: (each.set, each.entity, each.detector)):
        own = _means([each.metrics for each in group])
        entities.setdefault("/".join(key[:2]), {})[key[2]] = own
    for (name, detector), group in _grouped(clean, lambda each: (each.set, each.detector)):
        known = [
            found[detector]
            for entity, found in entities.items()
            if entity.startswith(f"{name}/") and detector in found
        ]
        of_seed = [
            _mean([each.metrics["vus_pr"] for each in same])
            for _, same in _grouped(group, lambda each: (each.seed,))
        ]
        spread = float(np.std(of_seed, ddof=1)) if len(of_seed) > 1 else 0.0
        counts = {"vus_pr_spread": spread, "seeds": len(of_seed), "entities": len(known)}
        sets.setdefault(name, {})[detector] = {**_means(known), **counts}
    summary: dict[str, Any] = {"sets": sets, "entities": entities}
    if len(clean) < len(results):
        summary["stress"] = _kept(results)
    return summary


def _kept(results: Sequence[Result]) -> dict[str, dict[str, Summary]]:
    """VUS-PR under stress as a share of the clean one: set, detector, what was made worse."""
    kept: dict[str, dict[str, Summary]] = {}
    for (name, detector), group in _grouped(results, lambda each: (each.set, each.detector)):
        clean = {
            (each.entity, each.seed): each.metrics["vus_pr"]
            for each in group
            if each.stress == CLEAN
        }
        shares = kept.setdefault(name, {}).setdefault(detector, {})
        for (kind,), same in _grouped(group, lambda each: (each.stress,)):
            # Over the same entities, should the run have been cut short.
            before = _mean([clean[(each.entity, each.seed)] for each in same])
            after = _mean([each.metrics["vus_pr"] for each in same])
            if kind != CLEAN:
                shares[kind] = after / before if before else math.nan
    return kept


def _grouped(
    results: Sequence[Result], key: Callable[[Result], tuple[Any, ...]]
) -> list[tuple[tuple[Any, ...], list[Result]]]:
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return list(groups.items())
