"""Every Prometheus collector of the service.

The loop calls short methods; what an entity's gauges look like is worked out when Prometheus
asks. Labels stay bounded: entities by `max_entities`, channels by `top_channels`, everything else
by short fixed lists. Message keys never become labels.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric

from stream.codec import REASONS
from stream.memory import memory_limit_bytes
from stream.records import (
    ALERTING,
    CHANNEL_STATES,
    STATES,
    ChannelState,
    PartitionId,
    SlotScore,
    State,
)
from stream.series import ENTITY_FAMILIES, entity_samples

# fetch waits for readings and decodes them; score is windows, model and alert rule; commit writes
# everything and the offsets.
Stage = Literal["fetch", "score", "commit"]
STAGES: tuple[Stage, ...] = ("fetch", "score", "commit")

Misplaced = Literal["no_key", "two_partitions"]
MISPLACED: tuple[Misplaced, ...] = ("no_key", "two_partitions")

# Close together around the goal (99 % under one second), then wide: past a minute only the order
# of magnitude matters.
LATENCY_BUCKETS_SECONDS = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
# Of calibrated scores these shares of slots are below; alert rules compare them.
P_VALUE_BUCKETS = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
# A stage takes about a millisecond for an empty batch and seconds when it compiles.
STAGE_BUCKETS_SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip

# Whatever else happens, entities that stopped are looked for this often while the table is full.
_EXPIRY_INTERVAL_S = 10.0


class ServiceMetrics:
    """What the service tells about itself and about its entities.

    Args:
        registry: where the collectors go; a fresh one for each service.
        channels: names of the model's channels.
        max_entities: entities with series of their own.
        top_channels: channels told for each of them, those that contribute most.
        entity_ttl_s: seconds without a score after which an entity's series end.
        clock: wall time in seconds; only differences are used.

    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        channels: Sequence[str],
        max_entities: int,
        top_channels: int,
        entity_ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Without this every counter would drag a second series along, which Prometheus ignores.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._channel_count = len(channels)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self._readings = counter("tsdiff_readings_total", "Readings taken from the input topic.")
        self._late = counter(
            "tsdiff_late_readings_total", "Readings dropped: their slot had been closed already."
        )
        self._duplicates = counter(
            "tsdiff_duplicate_readings_total",
            "Readings whose cells had been read for their slot already.",
        )
        self._unknown_channels = counter(
            "tsdiff_unknown_channels_total", "Values ignored: the model does not know the channel."
        )
        self._misplaced = counter(
            "tsdiff_misplaced_readings_total",
            "Readings that are not keyed by entity: without a key, or of an entity that another "
            "partition holds as well.",
            ["reason"],
        )
        for kind in MISPLACED:
            self._misplaced.labels(kind)
        self._dead_letters = counter(
            "tsdiff_dead_letters_total",
            "Messages that could not be read and went to the dead-letter topic.",
            ["reason"],
        )
        # Made now, so that the first dead letter is an increase and not a series without a past.
        for reason in REASONS:
            self._dead_letters.labels(reason)
        self._scores = counter("tsdiff_scores_total", "Slots scored.")
        self._series_dropped = counter(
            "tsdiff_series_dropped_total",
            "Scores not shown in entity series, because max_entities other entities have theirs.",
        )
        self._compilations = counter(
            "tsdiff_compilations_total", "Compilations of the model; none once it is warm."
        )
        self._compilations_seen = 0
        self._rebalances = counter(
            "tsdiff_rebalances_total", "Times that partitions were assigned or taken away."
        )
        self._recoveries = counter(
            "tsdiff_recoveries_total",
            "Times that the service went back to the last commit (reason commit), or a partition "
            "could not go on as it was.",
            ["reason"],
        )
        durations = Histogram(
            "tsdiff_batch_duration_seconds",
            "Time that a stage of the loop took for one batch.",
            ["stage"],
            buckets=STAGE_BUCKETS_SECONDS,
            registry=registry,
        )
        # Made now, so that every stage has a series from the start.
        self._stages = {stage: durations.labels(stage) for stage in STAGES}
        self._latency = _BatchHistogram(
            "tsdiff_end_to_end_latency_seconds",
            "Time from the append of a reading until what it led to was committed; each reading "
            "of a batch counts as the oldest one.",
            LATENCY_BUCKETS_SECONDS,
        )
        registry.register(self._latency)
        self._p_values = _BatchHistogram(
            "tsdiff_p_value",
            "Probability that normal data are as unusual as a slot that was scored.",
            P_VALUE_BUCKETS,
        )
        registry.register(self._p_values)
        self._lag = _ConsumerLag()
        registry.register(self._lag)
        self._entity_states = Gauge(
            "tsdiff_entities", "Entities that are scored, by state.", ["state"], registry=registry
        )
        self.entities({})
        self._channel_states = Gauge(
            "tsdiff_channels",
            "Channels without a reading (dead) or always with the same one (stuck), of all "
            "entities.",
            ["state"],
            registry=registry,
        )
        self.channels({})
        self._model_info = Info("tsdiff_model", "The model that scores.", registry=registry)
        build = Info("tsdiff_build", "The version of tsdiff that runs.", registry=registry)
        build.info({"version": _version()})
        self._reload = Gauge(
            "tsdiff_config_last_reload_successful",
            "Whether the settings were read without an error the last time.",
            registry=registry,
        )
        self._reloaded_at = Gauge(
            "tsdiff_config_last_reload_success_timestamp_seconds",
            "When the settings that are in force were read.",
            registry=registry,
        )
        self.config_reload(successful=True)
        self._ready = Gauge(
            "tsdiff_ready",
            "1 while the service is healthy and ready: it has partitions, their recent past, a "
            "compiled model and a broker.",
            registry=registry,
        )
        # Read when it is asked for: the limit of a running container may be changed.
        Gauge(
            "tsdiff_memory_limit_bytes",
            "Memory that the process may use: the cgroup's limit, or else the machine's memory.",
            registry=registry,
        ).set_function(memory_limit_bytes)
        self._series = _EntitySeries(max_entities, top_channels, entity_ttl_s, clock)
        registry.register(self._series)

    def readings(self, count: int) -> None:
        """Count readings taken."""
        self._readings.inc(count)

    def late(self, count: int) -> None:
        """Count readings that came after their slot had closed."""
        self._late.inc(count)

    def duplicate_readings(self, count: int) -> None:
        """Count readings that told what had been told."""
        self._duplicates.inc(count)

    def unknown_channels(self, count: int) -> None:
        """Count values of channels that the model does not know."""
        self._unknown_channels.inc(count)

    def misplaced(self, reason: Misplaced, count: int) -> None:
        """Count readings that are not where their entity is, or may not be."""
        self._misplaced.labels(reason).inc(count)

    def dead_letter(self, reason: str, count: int = 1) -> None:
        """Count messages dead-lettered; `reason` is one of the decoder's few short names."""
        self._dead_letters.labels(reason).inc(count)

    def scores(self, count: int) -> None:
        """Count slots scored."""
        self._scores.inc(count)

    def observe_scores(self, scores: Sequence[SlotScore]) -> None:
        """Show these scores as the last of their entities; of one entity, the last counts.

        Their p-values are counted, whether the entities have series or not.
        """
        self._p_values.observe(np.array([s.p_value for s in scores if s.p_value is not None]))
        dropped = self._series.observe(scores)
        if dropped:
            self._series_dropped.inc(dropped)

    def forget(self, entities: Iterable[str]) -> None:
        """End the series of entities that are no longer ours, as after a rebalance."""
        self._series.forget(entities)

    def end_to_end_latency(self, seconds: ArrayLike) -> None:
        """Add latencies, one or an array of any shape; clocks that disagree count as none."""
        self._latency.observe(np.asarray(seconds, dtype=np.float64).ravel())

    def stage(self, stage: Stage) -> AbstractContextManager[object]:
        """Time a stage of one batch: `with metrics.stage("score"): ...`."""
        return self._stages[stage].time()

    def consumer_lag(self, records: Mapping[PartitionId, int], seconds: float) -> None:
        """Replace the lag: records behind each assigned partition's end, and the oldest's age."""
        self._lag.replace(records, seconds)

    def compilations(self, total: int) -> None:
        """Say how many compilations there were since the process started."""
        self._compilations.inc(max(0, total - self._compilations_seen))
        self._compilations_seen = max(total, self._compilations_seen)

    def entities(self, counts: Mapping[State, int]) -> None:
        """Say how many entities are in each state; a state left out has none."""
        for state in STATES:
            self._entity_states.labels(state).set(counts.get(state, 0))

    def channels(self, counts: Mapping[ChannelState, int]) -> None:
        """Say how many channels are dead and stuck; a state left out has none."""
        for state in CHANNEL_STATES:
            self._channel_states.labels(state).set(counts.get(state, 0))

    def model_info(self, model: str, *, period_ms: int, window: int) -> None:
        """Say which model scores, as name@hash."""
        self._model_info.info(
            {
                "model": model,
                "channels": str(self._channel_count),
                "period_seconds": f"{period_ms / 1000:g}",
                "window": str(window),
            }
        )

    def config_reload(self, successful: bool) -> None:
        """Say whether the settings could be read, just now."""
        self._reload.set(1 if successful else 0)
        if successful:
            self._reloaded_at.set_to_current_time()

    def readiness(self, ready: Callable[[], bool]) -> None:
        """Say who knows whether the service is ready; asked whenever Prometheus asks."""
        self._ready.set_function(ready)

    def budget(self, *, max_entities: int, top_channels: int) -> None:
        """Change how many entities have series, and how many channels each."""
        self._series.budget(max_entities, top_channels)

    def rebalance(self) -> None:
        """Count a change of assignment."""
        self._rebalances.inc()

    def recovery(self, reason: str) -> None:
        """Count a return to the last commit; `reason` is one of a few short names."""
        self._recoveries.labels(reason).inc()

    def overview(self) -> dict[str, Any]:
        """What a person wants to know of the service, as it is now."""
        lag, behind_s = self._lag.state
        model = next(iter(self._model_info.collect())).samples
        return {
            "readings": _total(self._readings),
            "late_readings": _total(self._late),
            "scores": _total(self._scores),
            "dead_letters": _total(self._dead_letters),
            "lag_records": sum(lag.values()),
            "lag_seconds": behind_s,
            "model": model[0].labels.get("model") if model else None,
            "entities": _by_state(self._entity_states),
            "channels": _by_state(self._channel_states),
        }


def _total(counter: Counter) -> int:
    return int(sum(sample.value for sample in next(iter(counter.collect())).samples))


def _by_state(gauge: Gauge) -> dict[str, int]:
    return {s.labels["state"]: int(s.value) for s in next(iter(gauge.collect())).samples}


def _version() -> str:
    try:
        return version("tsdiff")
    except PackageNotFoundError:
        return "unknown"  # run from a tree that was never installed


class _BatchHistogram:
    """A histogram that takes thousands of values in one call."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = np.asarray(bounds)
        self._labels = [f"{bound:g}" for bound in bounds] + ["+Inf"]
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, values: NDArray[np.float64]) -> None:
        values = np.maximum(values[np.isfinite(values)], 0.0)
        counts = np.bincount(
            np.searchsorted(self._bounds, values, side="left"), minlength=len(self._counts)
        )
        with self._lock:
            self._counts += counts
            self._sum += float(values.sum())

    def describe(self) -> list[Metric]:
        return [HistogramMetricFamily(self._name, self._text)]

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            cumulative = self._counts.cumsum().tolist()
            total = self._sum
        family = HistogramMetricFamily(self._name, self._text)
        buckets = [(label, float(n)) for label, n in zip(self._labels, cumulative, strict=True)]
        family.add_metric([], buckets, total)
        yield family


class _ConsumerLag:
    """Replaced as a whole, so that a partition given away leaves no series behind."""

    def __init__(self) -> None:
        self.state: tuple[dict[PartitionId, int], float] = ({}, 0.0)

    def replace(self, records: Mapping[PartitionId, int], seconds: float) -> None:
        self.state = (dict(records), max(0.0, seconds))

    def describe(self) -> list[Metric]:
        return [
            GaugeMetricFamily(
                "tsdiff_consumer_lag_records",
                "Records between the last one read and the end of the partition.",
                labels=["topic", "partition"],
            ),
            GaugeMetricFamily(
                "tsdiff_consumer_lag_seconds",
                "Age of the oldest record that was not yet scored, by its Kafka timestamp.",
            ),
        ]

    def collect(self) -> Iterator[Metric]:
        by_partition, seconds = self.state
        records, age = self.describe()
        for partition, count in by_partition.items():
            labels = {"topic": partition.topic, "partition": str(partition.partition)}
            records.add_sample(records.name, labels, count)
        age.add_sample(age.name, {}, seconds)
        yield records
        yield age


class _EntitySeries:
    """The last score of up to `max_entities` entities, made into gauges when they are asked for.

    Who comes first is shown, with one exception: an entity whose alert is active, or that has a
    dead or stuck channel, takes the place of one that is calm. Otherwise an alert among many
    entities would never reach Alertmanager.
    """

    def __init__(
        self,
        max_entities: int,
        top_channels: int,
        ttl_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._max_entities = max_entities
        self._top_channels = top_channels
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, SlotScore] = {}
        self._seen_at: dict[str, float] = {}
        self._next_expiry = clock() + _EXPIRY_INTERVAL_S

    def budget(self, max_entities: int, top_channels: int) -> None:
        with self._lock:
            self._max_entities, self._top_channels = max_entities, top_channels
            # Alerts stay before calm ones, then whoever was here first.
            calm_last = sorted(self._last, key=lambda e: not _urgent(self._last[e]))
            for entity in calm_last[max_entities:]:
                self._remove(entity)

    def observe(self, scores: Sequence[SlotScore]) -> int:
        """Keep the last score of each entity; returns how many were beyond the budget."""
        now = self._clock()
        last, seen_at = self._last, self._seen_at
        waiting: list[SlotScore] = []
        with self._lock:
            for score in scores:
                entity = score.entity
                if entity in last or len(last) < self._max_entities:
                    last[entity] = score
                    seen_at[entity] = now
                else:
                    waiting.append(score)
            if waiting:
                return self._admit(waiting, now)
        return 0

    def _admit(self, waiting: list[SlotScore], now: float) -> int:
        if now >= self._next_expiry:
            self._expire(now)
        calm: list[str] | None = None
        dropped = 0
        for score in waiting:
            entity = score.entity
            if entity not in self._last and len(self._last) >= self._max_entities:
                if _urgent(score):
                    if calm is None:
                        # Oldest last: they are taken from the end.
                        calm = [e for e, s in self._last.items() if not _urgent(s)]
                        calm.reverse()
                    if calm:
                        self._remove(calm.pop())
                if len(self._last) >= self._max_entities:
                    dropped += 1
                    continue
            self._last[entity] = score
            self._seen_at[entity] = now
        return dropped

    def forget(self, entities: Iterable[str]) -> None:
        with self._lock:
            for entity in entities:
                self._remove(entity)

    def _remove(self, entity: str) -> None:
        self._last.pop(entity, None)
        self._seen_at.pop(entity, None)

    def _expire(self, now: float) -> None:
        self._next_expiry = now + _EXPIRY_INTERVAL_S
        oldest = now - self._ttl_s
        for entity in [e for e, seen_at in self._seen_at.items() if seen_at < oldest]:
            self._remove(entity)

    def describe(self) -> list[Metric]:
        return [
            GaugeMetricFamily(name, text, labels=labels) for name, text, labels in ENTITY_FAMILIES
        ]

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            self._expire(self._clock())
            scores = list(self._last.values())
        families = {family.name: family for family in self.describe()}
        for score in scores:
            for (name, _, labels), values, value in entity_samples(score, self._top_channels):
                families[name].add_sample(name, dict(zip(labels, values, strict=True)), value)
        yield from families.values()


def _urgent(score: SlotScore) -> bool:
    """Whether somebody has to be told: such entities take the place of calm ones."""
    return score.state in ALERTING or bool(score.faulty)
