"""The service's metrics: what the loop tells, and what Prometheus gets to see."""

import math
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from stream.http import Health, MetricsServer
from stream.metrics import STAGES, ServiceMetrics
from stream.records import (
    STATES,
    ChannelScore,
    ChannelState,
    PartitionId,
    SlotScore,
    State,
)
from tests.prometheus_server import PrometheusServer, Series, scraping

CHANNELS = ("cpu", "mem", "disk")


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def slot(
    entity: str,
    state: State = "ok",
    anomaly_score: float | None = 0.25,
    timestamp_ms: int = 60_000,
    faulty: Mapping[str, ChannelState] | None = None,
) -> SlotScore:
    channels = {
        "cpu": ChannelScore(0.9, 0.4, 0.3, 0.5, 0.7),
        "mem": ChannelScore(None, 2.0, 1.0, 3.0, 0.0),
        "disk": ChannelScore(5.0, 5.5, 5.0, 6.0, 0.3),
    }
    return SlotScore(
        entity, timestamp_ms, anomaly_score, 0.01, state, 1 / 3, "m@0", channels, faulty or {}
    )


def build(
    max_entities: int = 10, top_channels: int = 2, clock: _Clock | None = None
) -> tuple[CollectorRegistry, ServiceMetrics]:
    registry = CollectorRegistry()
    metrics = ServiceMetrics(
        registry,
        channels=CHANNELS,
        max_entities=max_entities,
        top_channels=top_channels,
        entity_ttl_s=900,
        clock=clock or _Clock(),
    )
    return registry, metrics


def fill(metrics: ServiceMetrics) -> None:
    metrics.readings(7)
    metrics.late(2)
    metrics.duplicate_readings(1)
    metrics.unknown_channels(3)
    metrics.dead_letter("not_json")
    metrics.scores(5)
    metrics.end_to_end_latency(np.array([[0.02, 0.2], [0.7, 400.0]]))
    for stage in STAGES:
        with metrics.stage(stage):
            pass
    metrics.consumer_lag({PartitionId("t", 0): 4, PartitionId("t", 1): 0}, 1.5)
    metrics.compilations(4)
    metrics.entities({"ok": 3, "firing": 1})
    metrics.model_info("m@0123456789ab", period_ms=60_000, window=64)
    metrics.config_reload(True)
    metrics.rebalance()
    metrics.recovery("crash")
    metrics.observe_scores([slot("web-1"), slot("web-2", "firing", 3.5, faulty={"mem": "dead"})])
    metrics.channels({"dead": 1})


@pytest.fixture
def filled() -> CollectorRegistry:
    registry, metrics = build()
    fill(metrics)
    return registry


def entities_shown(registry: CollectorRegistry) -> set[str]:
    return {
        sample.labels["entity"]
        for family in registry.collect()
        if family.name == "tsdiff_imputed_ratio"
        for sample in family.samples
    }


# Name, type and labels, as they are promised to dashboards and alert rules.
PROMISED = {
    "tsdiff_anomaly_score": ("gauge", {"entity"}),
    "tsdiff_alert_active": ("gauge", {"entity"}),
    "tsdiff_channel_contribution_ratio": ("gauge", {"entity", "channel"}),
    "tsdiff_channel_expected": ("gauge", {"entity", "channel"}),
    "tsdiff_channel_lower": ("gauge", {"entity", "channel"}),
    "tsdiff_channel_upper": ("gauge", {"entity", "channel"}),
    "tsdiff_channel_observed": ("gauge", {"entity", "channel"}),
    "tsdiff_imputed_ratio": ("gauge", {"entity"}),
    "tsdiff_score_timestamp_seconds": ("gauge", {"entity"}),
    "tsdiff_entity_state": ("gauge", {"entity", "state"}),
    "tsdiff_channel_state": ("gauge", {"entity", "channel", "state"}),
    "tsdiff_channels": ("gauge", {"state"}),
    "tsdiff_readings_total": ("counter", set()),
    "tsdiff_late_readings_total": ("counter", set()),
    "tsdiff_duplicate_readings_total": ("counter", set()),
    "tsdiff_unknown_channels_total": ("counter", set()),
    "tsdiff_dead_letters_total": ("counter", {"reason"}),
    "tsdiff_scores_total": ("counter", set()),
    "tsdiff_end_to_end_latency_seconds": ("histogram", {"le"}),
    "tsdiff_batch_duration_seconds": ("histogram", {"stage", "le"}),
    "tsdiff_consumer_lag_records": ("gauge", {"topic", "partition"}),
    "tsdiff_consumer_lag_seconds": ("gauge", set()),
    "tsdiff_compilations_total": ("counter", set()),
    "tsdiff_entities": ("gauge", {"state"}),
    "tsdiff_series_dropped_total": ("counter", set()),
    "tsdiff_model_info": ("gauge", {"model", "channels", "period_seconds", "window"}),
    "tsdiff_config_last_reload_successful": ("gauge", set()),
    "tsdiff_config_last_reload_success_timestamp_seconds": ("gauge", set()),
    "tsdiff_misplaced_readings_total": ("counter", {"reason"}),
    "tsdiff_build_info": ("gauge", {"version"}),
    "tsdiff_rebalances_total": ("counter", set()),
    "tsdiff_recoveries_total": ("counter", {"reason"}),
    "tsdiff_p_value": ("histogram", {"le"}),
    "tsdiff_ready": ("gauge", set()),
    "tsdiff_memory_limit_bytes": ("gauge", set()),
}


def test_names_types_and_labels_are_as_promised(filled: CollectorRegistry) -> None:
    shown = {}
    for family in text_string_to_metric_families(generate_latest(filled).decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels}
        assert family.documentation.endswith("."), name
        shown[name] = (family.type, labels)
    assert shown == PROMISED


def test_openmetrics_is_well_formed(filled: CollectorRegistry) -> None:
    text = generate_openmetrics(filled).decode()  # type: ignore[no-untyped-call]
    assert text.endswith("# EOF\n")
    families = list(parse_openmetrics(text))  # type: ignore[no-untyped-call]
    assert len(families) == len(PROMISED)


def test_promtool_finds_nothing_to_say(filled: CollectorRegistry, promtool: str) -> None:
    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=generate_latest(filled),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_values_of_the_service(filled: CollectorRegistry) -> None:
    value = filled.get_sample_value
    assert value("tsdiff_readings_total") == 7
    assert value("tsdiff_dead_letters_total", {"reason": "not_json"}) == 1
    assert value("tsdiff_consumer_lag_records", {"topic": "t", "partition": "0"}) == 4
    assert value("tsdiff_consumer_lag_seconds") == 1.5
    assert value("tsdiff_entities", {"state": "firing"}) == 1
    assert value("tsdiff_entities", {"state": "stale"}) == 0
    assert value("tsdiff_batch_duration_seconds_count", {"stage": "score"}) == 1
    info = {"model": "m@0123456789ab", "channels": "3", "period_seconds": "60", "window": "64"}
    assert value("tsdiff_model_info", info) == 1


def test_latencies_are_counted_in_batches() -> None:
    registry, metrics = build()
    metrics.end_to_end_latency([0.01, 0.0100001, 0.74, 1e9, -3.0, math.nan, math.inf])
    metrics.end_to_end_latency(0.3)
    metrics.end_to_end_latency([])
    name = "tsdiff_end_to_end_latency_seconds"

    def below(bound: str) -> float | None:
        return registry.get_sample_value(f"{name}_bucket", {"le": bound})

    assert [below(b) for b in ("0.01", "0.025", "0.3", "0.75", "300", "+Inf")] == [2, 3, 4, 5, 5, 6]
    assert registry.get_sample_value(f"{name}_count") == 6
    assert registry.get_sample_value(f"{name}_sum") == pytest.approx(1e9 + 0.01 + 0.0100001 + 1.04)


def test_p_values_of_scored_slots_are_counted() -> None:
    registry, metrics = build(max_entities=0)
    metrics.observe_scores([slot("a"), slot("b")])  # p = 0.01 each
    metrics.observe_scores([])
    metrics.observe_scores([replace(slot("c"), p_value=p) for p in (None, 1e-9, 0.3, 1.0)])

    def below(bound: str) -> float | None:
        return registry.get_sample_value("tsdiff_p_value_bucket", {"le": bound})

    assert [below(b) for b in ("0.0001", "0.001", "0.01", "0.5", "1", "+Inf")] == [1, 1, 3, 4, 5, 5]
    assert registry.get_sample_value("tsdiff_p_value_count") == 5


def test_readiness_is_asked_for_when_it_is_shown() -> None:
    registry, metrics = build()
    health = Health()
    assert registry.get_sample_value("tsdiff_ready") == 0
    metrics.readiness(lambda: health.unready() is None)
    assert registry.get_sample_value("tsdiff_ready") == 0
    health.set_ready(None)
    assert registry.get_sample_value("tsdiff_ready") == 1


def test_memory_and_its_limit_are_shown_together() -> None:
    registry, _ = build()
    limit = registry.get_sample_value("tsdiff_memory_limit_bytes")
    # The registry that `tsdiff run` uses has prometheus-client's collector of the process.
    used = REGISTRY.get_sample_value("process_resident_memory_bytes")
    assert limit
    assert used
    assert 0 < used < limit


def test_compilations_are_told_as_a_total() -> None:
    registry, metrics = build()
    for total in (3, 3, 4, 1):
        metrics.compilations(total)
    assert registry.get_sample_value("tsdiff_compilations_total") == 4


def test_a_partition_given_away_leaves_no_lag_behind() -> None:
    registry, metrics = build()
    metrics.consumer_lag({PartitionId("t", 0): 4}, 2.0)
    metrics.consumer_lag({PartitionId("t", 1): 5}, -1.0)
    labels = {"topic": "t", "partition": "0"}
    assert registry.get_sample_value("tsdiff_consumer_lag_records", labels) is None
    assert registry.get_sample_value("tsdiff_consumer_lag_seconds") == 0


def test_an_entity_shows_its_last_score_and_top_channels(filled: CollectorRegistry) -> None:
    value = filled.get_sample_value
    assert value("tsdiff_anomaly_score", {"entity": "web-2"}) == 3.5
    assert value("tsdiff_score_timestamp_seconds", {"entity": "web-2"}) == 60
    cpu = {"entity": "web-1", "channel": "cpu"}
    assert value("tsdiff_channel_contribution_ratio", cpu) == 0.7
    bounds = [value(f"tsdiff_channel_{n}", cpu) for n in ("lower", "expected", "upper", "observed")]
    assert bounds == [0.3, 0.4, 0.5, 0.9]
    mem = {"entity": "web-1", "channel": "mem"}
    assert value("tsdiff_channel_expected", mem) is None  # two channels contribute more
    disk = {"entity": "web-1", "channel": "disk"}
    assert value("tsdiff_channel_contribution_ratio", disk) == 0.3


def test_what_is_not_known_has_no_series() -> None:
    registry, metrics = build(top_channels=3)
    metrics.observe_scores([slot("new", "warming", anomaly_score=None)])
    value = registry.get_sample_value
    assert value("tsdiff_anomaly_score", {"entity": "new"}) is None
    assert value("tsdiff_alert_active", {"entity": "new"}) == 0
    mem = {"entity": "new", "channel": "mem"}
    assert value("tsdiff_channel_observed", mem) is None
    assert value("tsdiff_channel_expected", mem) == 2.0


@pytest.mark.parametrize("state", STATES)
def test_states_are_a_set_of_zeros_and_a_one(state: State) -> None:
    registry, metrics = build()
    metrics.observe_scores([slot("e", state)])
    shown = {
        s: registry.get_sample_value("tsdiff_entity_state", {"entity": "e", "state": s})
        for s in STATES
    }
    assert shown == {s: float(s == state) for s in STATES}
    active = registry.get_sample_value("tsdiff_alert_active", {"entity": "e"})
    assert active == float(state in {"firing", "recovering"})


def test_entities_beyond_the_budget_are_counted() -> None:
    registry, metrics = build(max_entities=2)
    metrics.observe_scores([slot("a"), slot("b"), slot("c"), slot("a"), slot("d")])
    metrics.observe_scores([slot("c"), slot("b")])
    assert entities_shown(registry) == {"a", "b"}
    assert registry.get_sample_value("tsdiff_series_dropped_total") == 3


def test_no_entity_is_shown_where_the_budget_is_nothing() -> None:
    registry, metrics = build(max_entities=0)
    metrics.observe_scores([slot("a", "firing")])
    assert entities_shown(registry) == set()
    assert registry.get_sample_value("tsdiff_series_dropped_total") == 1


def test_an_alert_takes_the_place_of_a_calm_entity() -> None:
    registry, metrics = build(max_entities=2)
    metrics.observe_scores([slot("a"), slot("b"), slot("c", "firing")])
    assert entities_shown(registry) == {"b", "c"}
    metrics.observe_scores([slot("d", "firing"), slot("e", "firing")])
    assert entities_shown(registry) == {"c", "d"}
    assert registry.get_sample_value("tsdiff_series_dropped_total") == 1


def test_quiet_entities_lose_their_series() -> None:
    clock = _Clock()
    registry, metrics = build(max_entities=2, clock=clock)
    metrics.observe_scores([slot("a"), slot("b")])
    clock.now += 600
    metrics.observe_scores([slot("b")])
    clock.now += 600
    metrics.observe_scores([slot("c")])  # makes room for itself, nobody having asked
    assert entities_shown(registry) == {"b", "c"}
    clock.now += 301
    assert entities_shown(registry) == {"c"}


def test_entities_of_a_partition_given_away_are_forgotten() -> None:
    registry, metrics = build()
    metrics.observe_scores([slot("a"), slot("b")])
    metrics.forget(["a", "never-seen"])
    assert entities_shown(registry) == {"b"}


def test_only_some_families_can_be_asked_for(filled: CollectorRegistry) -> None:
    text = generate_latest(filled.restricted_registry(["tsdiff_anomaly_score"])).decode()
    assert {f.name for f in text_string_to_metric_families(text)} == {"tsdiff_anomaly_score"}


HOSTILE = [
    'quo"te',
    "new\nline",
    "back\\slash",
    '\\"\n',
    "{}=,",
    "Ωμέγα ✓",
    "",
    " ",
    "a\u202eb",
    "x" * 10_000,
]


def test_hostile_names_come_back_as_they_were() -> None:
    registry, metrics = build(max_entities=len(HOSTILE))
    metrics.observe_scores([slot(name) for name in HOSTILE])
    plain = text_string_to_metric_families(generate_latest(registry).decode())
    openmetrics = parse_openmetrics(generate_openmetrics(registry).decode())  # type: ignore[no-untyped-call]
    for parsed in (plain, openmetrics):
        families = {f.name: f for f in parsed}
        named = [s.labels["entity"] for s in families["tsdiff_anomaly_score"].samples]
        assert named == HOSTILE


def test_storing_scores_costs_next_to_nothing() -> None:
    _, metrics = build(max_entities=1000)
    scores = [slot(f"host-{i}") for i in range(2000)]
    begin = time.process_time()
    for _ in range(10):
        metrics.observe_scores(scores)
    # 20,000 scores are two seconds of work at the goal; this may take a twentieth of it.
    assert time.process_time() - begin < 0.1


@pytest.fixture
def prometheus(tmp_path: Path, filled: CollectorRegistry) -> Iterator[PrometheusServer]:
    """A real Prometheus that scrapes the filled registry."""
    with MetricsServer("127.0.0.1:0", filled, Health()) as server:
        scraper = PrometheusServer(tmp_path, scraping(f"127.0.0.1:{server.port}", every="200ms"))
        try:
            scraper.wait_until_ready()
            yield scraper
        finally:
            scraper.end()


def query(prometheus: PrometheusServer, promql: str) -> Series:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = prometheus.query(promql)
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"Prometheus has no answer to {promql}")


def test_a_real_prometheus_reads_it(prometheus: PrometheusServer) -> None:
    found = query(prometheus, 'tsdiff_anomaly_score{entity="web-2"} > 1')
    value = found[0]["value"]
    assert isinstance(value, list)
    assert value[1] == "3.5"
    assert query(prometheus, "up == 1")
    assert query(prometheus, "histogram_quantile(0.5, tsdiff_end_to_end_latency_seconds_bucket)")
