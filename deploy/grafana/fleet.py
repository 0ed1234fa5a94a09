"""The fleet: who is unusual now, who has been, and which channels are to blame."""

from typing import Any, Final

from board import FLEET, SERVICE, Placed, Section, assemble, contribution, to_entity
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.models import units
from panels import (
    ORANGE,
    RED,
    AlertAnnotation,
    bars,
    board_link,
    colored_cell,
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
    score_thresholds,
    source_variable,
    stacked,
    state_code,
    state_mapping,
    thresholds,
    with_score_line,
)

# More lines, rows or cells than this are not read by anybody.
_WORST: Final = 20
_LINES: Final = 10

_MANY: Final = 'entity=~"$entity"'


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


def _worst_entities() -> Placed:
    score = f"max by (entity) (tsdiff_anomaly_score{{{_MANY}}})"
    worst = f"and on (entity) topk({_WORST}, {score})"
    blamed = f"topk by (entity) (1, max by (entity, channel) ({contribution(_MANY)}))"
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
    link = to_entity("var-entity=${__data.fields.Entity:percentencode}")
    to_channel = to_entity(
        "var-entity=${__data.fields.Entity:percentencode}",
        'var-channel=${__data.fields["Most blamed"]:percentencode}',
    )
    _score_columns(panel)
    column(panel, "Entity", option("links", [link]))
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


def _firing() -> Placed:
    active = f"(max by (entity) (tsdiff_alert_active{{{_MANY}}}) == 1)"
    blamed = f"topk by (entity) (1, max by (entity, channel) ({contribution(_MANY)}))"
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
    link = to_entity("var-entity=${__data.fields.Entity:percentencode}")
    return column(panel, "Entity", option("links", [link]))


def _fleet_worst() -> Section:
    blamed = (
        f"topk({_LINES}, sum by (channel) ({contribution(_MANY)} "
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


def _score_map() -> Placed:
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
    link = to_entity("var-entity=${__field.labels.entity:percentencode}")
    return "Over time", [
        _score_map(),
        with_score_line(
            graph(
                "Highest scores",
                f"The {_LINES} highest at each moment; the line is at 1, as rare as the false "
                "alarms asked for.",
                over_time(top, "{{entity}}"),
            )
        ).override_by_field_type("number", [option("links", [link])]),
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
    return assemble(
        "tsdiff / Fleet",
        FLEET,
        "Which entities are unusual, and which channels are to blame.",
        variables,
        [board_link("Service", SERVICE)],
        [_fleet_now(), _fleet_worst(), _fleet_history()],
    ).annotation(AlertAnnotation(_MANY))
