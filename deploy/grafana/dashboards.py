#!/usr/bin/env python3
"""The three dashboards of tsdiff, as code: fleet -> entity -> channel, and the service itself.

    python deploy/grafana/dashboards.py

writes `dashboards/{fleet,entity,service}.json` beside this file, which Grafana 11 and newer read
from disk (`provisioning/`). Needs grafana-foundation-sdk, which is part of the extra `test`.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from grafana_foundation_sdk.builders.dashboard import Dashboard, DashboardLink, Row
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units
from panels import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    YELLOW,
    AlertAnnotation,
    bars,
    board_link,
    buckets,
    colored_cell,
    column,
    fixed_color,
    graph,
    grid,
    heat,
    label_variable,
    now,
    number,
    option,
    over_time,
    rows,
    score_thresholds,
    source_variable,
    stacked,
    state_code,
    state_mapping,
    thresholds,
    timeline,
    value_link,
    with_score_line,
    word_mapping,
)

FLEET, ENTITY, SERVICE = "tsdiff-fleet", "tsdiff-entity", "tsdiff-service"
FOLDER: Final = Path(__file__).resolve().parent / "dashboards"

# More lines, rows or cells than this are not read by anybody.
_WORST: Final = 20
_LINES: Final = 10

_MANY: Final = 'entity=~"$entity"'
_ONE: Final = 'entity="$entity"'
_OURS: Final = 'instance=~"$instance"'


class _Placed(Protocol):
    """A panel's builder, of whichever kind."""

    def build(self) -> models.Panel: ...

    def id(self, id_val: int) -> Any: ...  # noqa: ANN401 - each kind returns its own


Section = tuple[str, list[_Placed]]


def _assemble(
    title: str,
    uid: str,
    text: str,
    variables: Iterable[Builder[models.VariableModel]],
    links: Iterable[DashboardLink],
    sections: Iterable[Section],
) -> Dashboard:
    board = (
        Dashboard(title)
        .uid(uid)
        .description(text)
        .tags(["tsdiff"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .editable()
        .variables(list(variables))
        .links(list(links))
    )
    # Numbers of our own: links to a panel hold them, so they must not be Grafana's choice.
    ids = iter(range(1, 1000))
    for name, panels in sections:
        board.with_row(Row(name).id(next(ids)))
        for panel in panels:
            board.with_panel(panel.id(next(ids)))
    return board


# -- fleet -------------------------------------------------------------------------------------


def _to_entity(*given: str) -> dict[str, object]:
    return value_link("Entity", ENTITY, *given)


def _fleet_now() -> Section:
    return "Now", [
        number(
            "Alerts firing",
            "Entities whose alert is firing or recovering.",
            now(f"sum(max by (entity) (tsdiff_alert_active{{{_MANY}}}))"),
        ).thresholds(thresholds((1, RED))),
        number(
            "Highest score",
            "1 is as rare as the false alarms asked for.",
            now(f"max(tsdiff_anomaly_score{{{_MANY}}})"),
        )
        .decimals(2)
        .thresholds(score_thresholds()),
        number(
            "Entities",
            "Entities that are scored; those beyond metrics.max_entities have no series of their "
            "own, but count here.",
            now("sum(tsdiff_entities)"),
        ),
        number(
            "Channels dead or stuck",
            "Channels of all entities that send nothing any more, or always the same.",
            now("sum(tsdiff_channels)"),
        ).thresholds(thresholds((1, ORANGE))),
    ]


def _worst_entities() -> _Placed:
    score = f"max by (entity) (tsdiff_anomaly_score{{{_MANY}}})"
    worst = f"and on (entity) topk({_WORST}, {score})"
    blamed = f"topk by (entity) (1, max by (entity, channel) ({_contribution(_MANY)}))"
    panel = grid(
        "Worst entities",
        f"The {_WORST} highest scores, and the channel that contributes most to each.",
        [
            rows(f"topk({_WORST}, {score})", "A"),
            rows(f"{state_code(_MANY)} {worst}", "B"),
            rows(f"{blamed} {worst}", "C"),
            rows(f"max by (entity) (tsdiff_imputed_ratio{{{_MANY}}}) {worst}", "D"),
            rows(
                f"time() - max by (entity) (tsdiff_score_timestamp_seconds{{{_MANY}}}) {worst}",
                "E",
            ),
        ],
        {
            "entity": "Entity",
            "Value #A": "Score",
            "Value #B": "State",
            "channel": "Most blamed",
            "Value #C": "Its share",
            "Value #D": "Imputed",
            "Value #E": "Last slot ago",
        },
        "Score",
    )
    to_entity = _to_entity("var-entity=${__data.fields.Entity}")
    to_channel = _to_entity(
        "var-entity=${__data.fields.Entity}", 'var-channel=${__data.fields["Most blamed"]}'
    )
    _score_columns(panel)
    column(panel, "Entity", option("links", [to_entity]))
    column(panel, "Most blamed", option("links", [to_channel]))
    column(panel, "Imputed", option("unit", units.PercentUnit), option("decimals", 0))
    column(panel, "Last slot ago", option("unit", units.Seconds))
    return panel


def _score_columns(panel: Any) -> None:  # noqa: ANN401 - a table's builder, which column() types
    column(
        panel,
        "Score",
        option("decimals", 2),
        option("thresholds", score_thresholds().build()),
        colored_cell(),
    )
    column(panel, "State", option("mappings", [state_mapping()]), colored_cell())
    column(panel, "Its share", option("unit", units.PercentUnit), option("decimals", 0))


def _contribution(selector: str) -> str:
    return f"tsdiff_channel_contribution_ratio{{{selector}}}"


def _firing() -> _Placed:
    active = f"(max by (entity) (tsdiff_alert_active{{{_MANY}}}) == 1)"
    blamed = f"topk by (entity) (1, max by (entity, channel) ({_contribution(_MANY)}))"
    panel = grid(
        "Firing alerts",
        "Empty while nothing is wrong.",
        [
            rows(
                f"max by (entity) (tsdiff_anomaly_score{{{_MANY}}}) and on (entity) {active}", "A"
            ),
            rows(f"{state_code(_MANY)} and on (entity) {active}", "B"),
            rows(f"{blamed} and on (entity) {active}", "C"),
        ],
        {
            "entity": "Entity",
            "Value #A": "Score",
            "Value #B": "State",
            "channel": "Most blamed",
            "Value #C": "Its share",
        },
        "Score",
    ).span(12)
    _score_columns(panel)
    to_entity = _to_entity("var-entity=${__data.fields.Entity}")
    return column(panel, "Entity", option("links", [to_entity]))


def _fleet_worst() -> Section:
    blamed = (
        f"topk({_LINES}, sum by (channel) ({_contribution(_MANY)} "
        "and on (entity) tsdiff_alert_active == 1))"
    )
    return "Who and what", [
        _worst_entities(),
        _firing(),
        bars(
            "Channels blamed by active alerts",
            "Contributions, summed over the entities whose alert is active: a channel high above "
            "the others is a cause that entities share. Empty while nothing is wrong.",
            now(blamed, "{{channel}}"),
        ).height(9),
    ]


def _score_map() -> _Placed:
    # The end of the time range decides who is shown, or rows would come and go.
    worst = (
        f"topk(50, max by (entity) "
        f"(max_over_time(tsdiff_anomaly_score{{{_MANY}}}[$__range] @ end())))"
    )
    return heat(
        "Scores",
        "A row for each entity, the 50 with the highest scores of the time range. A column that is "
        "bright for many entities is a cause that they share.",
        over_time(
            f"max by (entity) (tsdiff_anomaly_score{{{_MANY}}}) and on (entity) {worst}",
            "{{entity}}",
        ),
        # So that a calm fleet looks calm; the line of the alerts is half-way.
        brightest=2,
    )


def _fleet_history() -> Section:
    top = f"topk({_LINES}, max by (entity) (tsdiff_anomaly_score{{{_MANY}}}))"
    to_entity = models.DashboardLink(
        title="Entity",
        url=str(_to_entity("var-entity=${__field.labels.entity}")["url"]),
    )
    return "Over time", [
        _score_map(),
        with_score_line(
            graph(
                "Highest scores",
                f"The {_LINES} highest at each moment; the line is at 1, as rare as the false "
                "alarms asked for.",
                over_time(top, "{{entity}}"),
            )
        ).override_by_field_type("number", [option("links", [to_entity])]),
        stacked(
            graph(
                "Entities by state",
                "All entities, those beyond metrics.max_entities too.",
                over_time("sum by (state) (tsdiff_entities)", "{{state}}"),
            )
        ),
        graph(
            "Active alerts",
            "Entities whose alert is firing or recovering.",
            over_time(f"sum(max by (entity) (tsdiff_alert_active{{{_MANY}}}))", "alerts"),
        ).min(0),
        graph(
            "Channels dead or stuck",
            "Channels of all entities that send nothing any more, or always the same.",
            over_time("sum by (state) (tsdiff_channels)", "{{state}}"),
        ).min(0),
    ]


def fleet() -> Dashboard:
    """Who is unusual now, and who has been."""
    variables = [
        source_variable(),
        label_variable("entity", "Entity", "label_values(tsdiff_entity_state, entity)", many=True),
    ]
    return _assemble(
        "tsdiff / Fleet",
        FLEET,
        "Which entities are unusual, and which channels are to blame.",
        variables,
        [board_link("Service", SERVICE)],
        [_fleet_now(), _fleet_worst(), _fleet_history()],
    ).annotation(AlertAnnotation(_MANY))


# -- entity ------------------------------------------------------------------------------------


def _entity_now() -> Section:
    return "$entity", [
        number("State", "What the alert rule says.", now(state_code(_ONE))).mappings(
            [state_mapping()]
        ),
        number(
            "Score",
            "1 is as rare as the false alarms asked for.",
            now(f"max(tsdiff_anomaly_score{{{_ONE}}})"),
        )
        .decimals(2)
        .thresholds(score_thresholds()),
        number(
            "Imputed",
            "Share of the last slot's cells without a reading.",
            now(f"max(tsdiff_imputed_ratio{{{_ONE}}})"),
            units.PercentUnit,
        )
        .decimals(0)
        .thresholds(thresholds((0.3, YELLOW), (0.9, RED))),
        number(
            "Last slot ago",
            "Age of the last slot that was scored, by event time.",
            now(f"time() - max(tsdiff_score_timestamp_seconds{{{_ONE}}})"),
            units.Seconds,
        ),
    ]


def _entity_history() -> Section:
    return "Score", [
        with_score_line(
            graph(
                "Anomaly score",
                "Above the line at 1 a slot counts towards an alert; below 0.7 it counts as calm.",
                over_time(f"max(tsdiff_anomaly_score{{{_ONE}}})", "score"),
            )
        ),
        timeline("State", "What the alert rule says.", over_time(state_code(_ONE), "state")),
        stacked(
            graph(
                "Contributions",
                "Share of the anomaly that is each channel's, the metrics.top_channels largest. "
                "What is left to 100 % is that of all others.",
                over_time(f"max by (channel) ({_contribution(_ONE)})", "{{channel}}"),
                unit=units.PercentUnit,
            )
        ).max(1),
        graph(
            "Imputed share",
            "Share of each slot's cells without a reading: the model has filled them in.",
            over_time(f"max(tsdiff_imputed_ratio{{{_ONE}}})", "imputed"),
            unit=units.PercentUnit,
        )
        .min(0)
        .max(1),
    ]


_CHANNEL_TEXT: Final = (
    "What was read, what the model expected, and the band that holds 90 % of what was expected. "
    "A channel has series only while it is among the metrics.top_channels that contribute most."
)


def _channel_series(name: str, selector: str) -> str:
    return f"max by (channel) (tsdiff_channel_{name}{{{selector}}})"


def _channel_graph() -> _Placed:
    one = f'{_ONE}, channel="$channel"'
    queries = [
        over_time(_channel_series(name, one), name, ref)
        for name, ref in zip(("observed", "expected", "lower", "upper"), "ABCD", strict=True)
    ]
    hidden = {"legend": True, "tooltip": False, "viz": False}
    panel = graph("$channel", _CHANNEL_TEXT, *queries)
    return (
        panel.override_by_name("observed", [fixed_color(ORANGE), option("custom.lineWidth", 2)])
        .override_by_name("expected", [fixed_color(BLUE)])
        .override_by_name("lower", [_edge(), fixed_color(BLUE), option("custom.hideFrom", hidden)])
        .override_by_name(
            "upper",
            [
                _edge(),
                fixed_color(BLUE),
                # Between the two edges is the band.
                option("custom.fillBelowTo", "lower"),
                option("custom.fillOpacity", 15),
                option("custom.hideFrom", hidden),
            ],
        )
        .repeat("channel")
        .repeat_direction("h")
        .max_per_row(2)
    )


def _edge() -> models.DynamicConfigValue:
    return option("custom.lineWidth", 0)


def _channel_table() -> _Placed:
    names = ("observed", "expected", "lower", "upper", "contribution_ratio")
    queries = [
        rows(_channel_series(name, _ONE), ref) for name, ref in zip(names, "ABCDE", strict=True)
    ]
    panel = grid(
        "Channels now",
        "The channels that contribute most to the last slot's score.",
        queries,
        {
            "channel": "Channel",
            "Value #E": "Contribution",
            "Value #A": "Observed",
            "Value #B": "Expected",
            "Value #C": "Lower",
            "Value #D": "Upper",
        },
        "Contribution",
    ).span(16)
    to_channel = _to_entity("var-entity=${entity}", "var-channel=${__data.fields.Channel}")
    column(panel, "Channel", option("links", [to_channel]))
    return column(panel, "Contribution", option("unit", units.PercentUnit), option("decimals", 0))


def _broken_channels() -> _Placed:
    panel = grid(
        "Dead or stuck channels",
        "Channels that send nothing any more, or always the same. Empty while there are none.",
        [rows(f"max by (channel, state) (tsdiff_channel_state{{{_ONE}}})", "A")],
        {"channel": "Channel", "state": "Is"},
        "Channel",
    )
    return panel.span(8)


def _entity_channels() -> list[Section]:
    return [
        ("Channels", [_channel_table(), _broken_channels()]),
        ("Observed against expected", [_channel_graph()]),
    ]


def entity() -> Dashboard:
    """One entity: its score and state, and each of its channels against what was expected."""
    channels = f"label_values({_contribution(_ONE)}, channel)"
    variables = [
        source_variable(),
        label_variable("entity", "Entity", "label_values(tsdiff_entity_state, entity)", many=False),
        label_variable(
            "channel",
            "Channel",
            channels,
            many=True,
            text="Channels that were among those that contribute most in the time range.",
        ),
    ]
    return _assemble(
        "tsdiff / Entity",
        ENTITY,
        "One entity: its score, its state, and what its channels did against what was expected.",
        variables,
        [board_link("Fleet", FLEET), board_link("Service", SERVICE)],
        [_entity_now(), _entity_history(), *_entity_channels()],
    ).annotation(AlertAnnotation(_ONE))


# -- service -----------------------------------------------------------------------------------


def _rate(metric: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{_OURS}}}[$__rate_interval]))"


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
                f"{_rate('tsdiff_p_value_bucket', 'le')} / on () group_left () "
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
        ).min(0),
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
        ).min(0),
        graph(
            "Rebalances and recoveries",
            "Times that partitions moved, and that a partition could not go on as it was.",
            over_time(_increase("tsdiff_rebalances_total"), "rebalances"),
            # A reason has a series from its first time on; a service may never have had one.
            over_time(
                f"{_increase('tsdiff_recoveries_total', 'reason')} or on () vector(0)",
                "recovery: {{reason}}",
                "B",
            ),
        ).min(0),
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


def _versions() -> _Placed:
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
    return panel.span(12).height(8)


def service() -> Dashboard:
    """The processes themselves: how fast, how far behind, what they refuse."""
    variables = [
        source_variable(),
        label_variable(
            "instance", "Instance", "label_values(tsdiff_build_info, instance)", many=True
        ),
    ]
    return _assemble(
        "tsdiff / Service",
        SERVICE,
        "The services themselves: throughput, latency, lag, what they could not read, memory.",
        variables,
        [board_link("Fleet", FLEET)],
        [_service_now(), _service_flow(), _service_lag(), _service_process()],
    )


# -- files -------------------------------------------------------------------------------------

DASHBOARDS: Final[Mapping[str, Callable[[], Dashboard]]] = {
    "fleet": fleet,
    "entity": entity,
    "service": service,
}


def rendered() -> dict[str, str]:
    """The JSON of each dashboard, by the name of its file."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    texts = {f"{name}.json": encoder.encode(make().build()) for name, make in DASHBOARDS.items()}
    # Through json once more: enums are written as what they stand for, whatever Python this is.
    return {
        name: json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        for name, text in texts.items()
    }


def main() -> int:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, "utf-8")
        print(FOLDER / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
