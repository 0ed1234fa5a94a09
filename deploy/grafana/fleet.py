"""The fleet: who is unusual now, who has been, and which channels are to blame."""

from typing import Any, Final

from board import FLEET, SERVICE, Placed, Section, assemble, contribution, to_entity
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.models import units
from panels import (
    FEW,
    ORANGE,
    RED,
    STATES,
    AlertAnnotation,
    bars,
    board_link,
    colored,
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
    state_column,
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
    _score_columns(panel)
    _linked(panel)
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
    state_column(panel, "State")
    column(panel, "Its share", option("unit", units.PercentUnit), option("decimals", 0))


def _linked(panel: Any) -> None:  # noqa: ANN401 - as above
    entity = "var-entity=${__data.fields.Entity:percentencode}"
    channel = 'var-channel=${__data.fields["Most blamed"]:percentencode}'
    column(panel, "Entity", option("links", [to_entity(entity)]))
    column(panel, "Most blamed", option("links", [to_entity(entity, channel)]))


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
    _linked(panel)
    return panel.no_value("none")


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
        )
        .height(9)
        .decimals(2)
        .no_value("none"),
    ]


def _scores_of_worst(count: int) -> str:
    # The end of the time range decides who is shown, or rows and lines would come and go.
    worst = (
        f"topk({count}, max by (entity) "
        f"(max_over_time(tsdiff_anomaly_score{{{_MANY}}}[$__range] @ end())))"
    )
    return f"max by (entity) (tsdiff_anomaly_score{{{_MANY}}}) and on (entity) {worst}"


def _score_map() -> Placed:
    return heat(
        "Scores",
        "A row for each entity, the 50 with the highest scores of the time range. A column that is "
        "bright for many entities is a cause that they share.",
        over_time(_scores_of_worst(50), "{{entity}}"),
        # So that a calm fleet looks calm; the line of the alerts is half-way.
        brightest=2,
    )


def _fleet_history() -> Section:
    link = to_entity("var-entity=${__field.labels.entity:percentencode}")
    return "Over time", [
        _score_map(),
        with_score_line(
            graph(
                "Highest scores",
                f"The {_LINES} entities with the highest scores of the time range; the line is at "
                "1, as rare as the false alarms asked for.",
                over_time(_scores_of_worst(_LINES), "{{entity}}"),
            )
        ).override_by_field_type("number", [option("links", [link])]),
        colored(
            stacked(
                graph(
                    "Entities by state",
                    "All entities, those beyond metrics.max_entities too.",
                    over_time("sum by (state) (tsdiff_entities)", "{{state}}"),
                )
            ),
            {state: color for state, (_, color) in STATES.items()},
        ),
        colored(
            graph(
                "Active alerts",
                "Entities whose alert is firing or recovering.",
                over_time(f"sum(max by (entity) (tsdiff_alert_active{{{_MANY}}}))", "alerts"),
            ),
            {"alerts": RED},
        )
        .min(0)
        .axis_soft_max(FEW),
        colored(
            graph(
                "Channels dead or stuck",
                "Channels of all entities that send nothing any more, or always the same.",
                over_time("sum by (state) (tsdiff_channels)", "{{state}}"),
            ),
            {"dead": RED, "stuck": ORANGE},
        )
        .min(0)
        .axis_soft_max(FEW),
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
