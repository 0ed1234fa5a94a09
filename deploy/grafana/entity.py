"""One entity: its score and state, and each of its channels against what was expected."""

from typing import Final

from board import ENTITY, FLEET, SERVICE, Placed, Section, assemble, contribution, to_entity
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.models import common, units
from grafana_foundation_sdk.models import dashboard as models
from panels import (
    BLUE,
    ORANGE,
    RED,
    YELLOW,
    AlertAnnotation,
    board_link,
    column,
    fixed_color,
    graph,
    grid,
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
    with_score_line,
)

_ONE: Final = 'entity="$entity"'


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
                over_time(f"max by (channel) ({contribution(_ONE)})", "{{channel}}"),
                unit=units.PercentUnit,
            )
        )
        .max(1)
        # Areas would lead from one channel's share to another's: few are there twice in a row.
        .draw_style(common.GraphDrawStyle.BARS),
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


def _channel_graph() -> Placed:
    one = f'{_ONE}, channel="$channel"'
    queries = [
        over_time(_channel_series(name, one), name, ref)
        for name, ref in zip(("observed", "expected", "lower", "upper"), "ABCD", strict=True)
    ]
    hidden = {"legend": True, "tooltip": False, "viz": False}
    panel = graph("$channel", _CHANNEL_TEXT, *queries)
    return (
        # The only area is the band: what is under a line would hide it.
        panel.fill_opacity(0)
        .override_by_name("observed", [fixed_color(ORANGE), option("custom.lineWidth", 2)])
        .override_by_name("expected", [fixed_color(BLUE)])
        .override_by_name("lower", [*_edge(), fixed_color(BLUE), option("custom.hideFrom", hidden)])
        .override_by_name(
            "upper",
            [
                *_edge(),
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


def _edge() -> list[models.DynamicConfigValue]:
    return [option("custom.lineWidth", 0), option("custom.showPoints", "never")]


def _channel_table() -> Placed:
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
    to_channel = to_entity(
        "var-entity=${entity:percentencode}", "var-channel=${__data.fields.Channel:percentencode}"
    )
    column(panel, "Channel", option("links", [to_channel]))
    return column(panel, "Contribution", option("unit", units.PercentUnit), option("decimals", 0))


def _broken_channels() -> Placed:
    panel = grid(
        "Dead or stuck channels",
        "Channels that send nothing any more, or always the same. Empty while there are none.",
        [rows(f"max by (channel, state) (tsdiff_channel_state{{{_ONE}}})", "A")],
        {"channel": "Channel", "state": "Is"},
        "Channel",
    )
    return panel.span(8).no_value("none")


def _entity_channels() -> list[Section]:
    return [
        ("Channels", [_channel_table(), _broken_channels()]),
        ("Observed against expected", [_channel_graph()]),
    ]


def entity() -> Dashboard:
    """One entity: its score and state, and each of its channels against what was expected."""
    channels = f"label_values({contribution(_ONE)}, channel)"
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
    return assemble(
        "tsdiff / Entity",
        ENTITY,
        "One entity: its score, its state, and what its channels did against what was expected.",
        variables,
        [board_link("Fleet", FLEET), board_link("Service", SERVICE)],
        [_entity_now(), _entity_history(), *_entity_channels()],
    ).annotation(AlertAnnotation(_ONE))
