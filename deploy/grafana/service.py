"""The processes themselves: how fast, how far behind, what they refuse."""

from typing import Final

from board import FLEET, SERVICE, Placed, Section, assemble
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.models import units
from panels import (
    FEW,
    GREEN,
    RED,
    YELLOW,
    board_link,
    buckets,
    column,
    graph,
    grid,
    heat,
    label_variable,
    now,
    number,
    option,
    over_time,
    rows,
    source_variable,
    stacked,
    thresholds,
    word_mapping,
)

_OURS: Final = 'instance=~"$instance"'
# All p-values are up to 1.
_BELOW_ONE: Final = 'le!~"1|1.0|[+]Inf"'


def _rate(metric: str, by: str = "", more: str = "") -> str:
    chosen = f"{_OURS}, {more}" if more else _OURS
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{chosen}}}[$__rate_interval]))"


def _increase(metric: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (increase({metric}{{{_OURS}}}[$__rate_interval]))"


def _quantile(q: float, metric: str, by: str = "le") -> str:
    return f"histogram_quantile({q:g}, {_rate(f'{metric}_bucket', by)})"


def _service_now() -> Section:
    return "Now", [
        number(
            "Services",
            "Processes that answer Prometheus.",
            now(f"count(tsdiff_build_info{{{_OURS}}})"),
        ),
        number(
            "Latency, 99 %",
            "From the append of the reading that closed a slot to the slot's score. The goal is "
            "one second.",
            now(_quantile(0.99, "tsdiff_end_to_end_latency_seconds")),
            units.Seconds,
        ).thresholds(thresholds((1, YELLOW), (10, RED))),
        number(
            "Lag",
            "Age of the oldest record that was not yet scored.",
            now(f"max(tsdiff_consumer_lag_seconds{{{_OURS}}})"),
            units.Seconds,
        ).thresholds(thresholds((60, YELLOW), (300, RED))),
        number(
            "Last reload",
            "Whether settings and bundle were read without an error the last time.",
            now(f"min(tsdiff_config_last_reload_successful{{{_OURS}}})"),
        ).mappings([word_mapping({1: ("fine", GREEN), 0: ("refused", RED)})]),
    ]


def _service_flow() -> Section:
    latency = "tsdiff_end_to_end_latency_seconds"
    return "Throughput and latency", [
        graph(
            "Throughput",
            "Readings taken and slots scored, a second.",
            over_time(_rate("tsdiff_readings_total"), "readings"),
            over_time(_rate("tsdiff_scores_total"), "scores", "B"),
            unit=units.CountsPerSecond,
        ).min(0),
        graph(
            "End-to-end latency",
            "From the append of the reading that closed a slot to the slot's score.",
            *(
                over_time(_quantile(q, latency), f"{q:.0%}", ref)
                for q, ref in ((0.5, "A"), (0.9, "B"), (0.99, "C"))
            ),
            unit=units.Seconds,
        ).min(0),
        heat(
            "Latencies",
            "How many scores had which latency.",
            buckets(_increase(f"{latency}_bucket", "le")),
            units.Seconds,
        )
        .height(8)
        .span(12),
        stacked(
            graph(
                "Where time goes",
                "Share of a second that each stage of the loop takes, over all services; a loop "
                "that is never idle has a sum of 1. fetch includes waiting for readings.",
                over_time(_rate("tsdiff_batch_duration_seconds_sum", "stage"), "{{stage}}"),
                unit=units.PercentUnit,
            )
        ),
        graph(
            "Stages, 99 %",
            "Time that each stage of the loop took for one batch.",
            over_time(_quantile(0.99, "tsdiff_batch_duration_seconds", "le, stage"), "{{stage}}"),
            unit=units.Seconds,
        ).min(0),
        graph(
            "p-values",
            "How many scores had a p-value up to each bound, as a share of all. On normal data it "
            "is the bound itself.",
            over_time(
                f"{_rate('tsdiff_p_value_bucket', 'le', _BELOW_ONE)} / on () group_left () "
                f"{_rate('tsdiff_p_value_count')}",
                "up to {{le}}",
            ),
            unit=units.PercentUnit,
        ),
    ]


def _service_lag() -> Section:
    partitions = "topic, partition"
    return "Kafka", [
        graph(
            "Lag by partition",
            "Records between the last one read and the end of the partition.",
            over_time(
                f"sum by ({partitions}) (tsdiff_consumer_lag_records{{{_OURS}}})",
                "{{topic}}/{{partition}}",
            ),
        )
        .min(0)
        .axis_soft_max(FEW),
        graph(
            "Lag in time",
            "Age of the oldest record that was not yet scored.",
            over_time(
                f"max by (instance) (tsdiff_consumer_lag_seconds{{{_OURS}}})", "{{instance}}"
            ),
            unit=units.Seconds,
        ).min(0),
        graph(
            "Dead letters",
            "Messages that could not be read, by reason. tsdiff replay --dead-letters sends them "
            "again once the cause is mended.",
            over_time(_increase("tsdiff_dead_letters_total", "reason"), "{{reason}}"),
        )
        .min(0)
        .axis_soft_max(FEW),
        graph(
            "Rebalances and recoveries",
            "Times that partitions moved, and that a partition could not go on as it was.",
            over_time(_increase("tsdiff_rebalances_total"), "rebalances"),
            # A reason has a series from its first time on; a service may never have had one.
            over_time(
                f"{_increase('tsdiff_recoveries_total', 'reason')} "
                'or on () label_replace(vector(0), "reason", "none", "", "")',
                "recovery: {{reason}}",
                "B",
            ),
        )
        .min(0)
        .axis_soft_max(FEW),
        graph(
            "Readings that need a look",
            "Too late for their slot, told twice, or not keyed by entity; values of channels that "
            "the model does not know.",
            over_time(_rate("tsdiff_late_readings_total"), "late"),
            over_time(_rate("tsdiff_duplicate_readings_total"), "duplicate", "B"),
            over_time(_rate("tsdiff_misplaced_readings_total", "reason"), "{{reason}}", "C"),
            over_time(_rate("tsdiff_unknown_channels_total"), "unknown channel", "D"),
            unit=units.CountsPerSecond,
        ).min(0),
        graph(
            "Scores without series",
            "Scores of entities beyond metrics.max_entities: they are in Kafka, not here.",
            over_time(_rate("tsdiff_series_dropped_total"), "dropped"),
            unit=units.CountsPerSecond,
        ).min(0),
    ]


def _service_process() -> Section:
    return "Process", [
        graph(
            "Memory",
            "Resident memory of each service, and the limit that it runs under.",
            over_time(f"process_resident_memory_bytes{{{_OURS}}} {_AND_OURS}", "{{instance}}"),
            over_time(
                f"min by (instance) (tsdiff_memory_limit_bytes{{{_OURS}}})",
                "limit of {{instance}}",
                "B",
            ),
            unit=units.BytesIEC,
        ).min(0),
        graph(
            "Processor",
            "Cores in use.",
            over_time(
                f"rate(process_cpu_seconds_total{{{_OURS}}}[$__rate_interval]) {_AND_OURS}",
                "{{instance}}",
            ),
        ).min(0),
        graph(
            "Compilations",
            "Compilations of the model since the start; flat once it is warm.",
            over_time(f"max by (instance) (tsdiff_compilations_total{{{_OURS}}})", "{{instance}}"),
        ).min(0),
        _versions(),
    ]


# Other programs tell of their processes under the same names.
_AND_OURS: Final = "and on (job, instance) tsdiff_build_info"


def _versions() -> Placed:
    instances = "instance, model, channels, period_seconds"
    panel = grid(
        "Versions",
        "What runs where.",
        [
            rows(f"max by (instance, version) (tsdiff_build_info{{{_OURS}}})", "A"),
            rows(f"max by ({instances}) (tsdiff_model_info{{{_OURS}}})", "B"),
        ],
        {
            "instance": "Instance",
            "version": "Version",
            "model": "Model",
            "channels": "Channels",
            "period_seconds": "Period (s)",
        },
        "Instance",
    )
    # Models have the longest names.
    for name in ("Version", "Channels", "Period (s)"):
        column(panel, name, option("custom.width", 90))
    return panel.span(12).height(8)


def service() -> Dashboard:
    """The processes themselves: how fast, how far behind, what they refuse."""
    variables = [
        source_variable(),
        label_variable(
            "instance", "Instance", "label_values(tsdiff_build_info, instance)", many=True
        ),
    ]
    return assemble(
        "tsdiff / Service",
        SERVICE,
        "The services themselves: throughput, latency, lag, what they could not read, memory.",
        variables,
        [board_link("Fleet", FLEET)],
        [_service_now(), _service_flow(), _service_lag(), _service_process()],
    )
