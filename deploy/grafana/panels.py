"""The small pieces that the dashboards are made of: queries, panels, variables, links.

Everything here returns a builder of Grafana's foundation SDK with the house style applied: one
data source variable, the score's line at 1, colours that mean the same on every panel.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from grafana_foundation_sdk.builders import (
    bargauge,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common, units
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Query = prometheus.Dataquery

SOURCE: Final = models.DataSourceRef("prometheus", "${datasource}")
GREEN, YELLOW, ORANGE, RED, GREY, BLUE = "green", "yellow", "orange", "red", "#8e8e8e", "blue"

# Where alerts.recovery and alerts.trigger are unless a deployment says otherwise.
CALM_BELOW: Final = 0.7
SCORE_LINE: Final = 1.0

# Where the axis of a count ends while nothing is counted; Grafana's own choice is 100.
FEW: Final = 1

# One number for a state, so that one query draws it; the mapping below turns it back into a word.
STATES: Final[Mapping[str, tuple[int, str]]] = {
    "ok": (0, GREEN),
    "warming": (1, BLUE),
    "pending": (2, YELLOW),
    "recovering": (3, ORANGE),
    "stale": (4, GREY),
    "firing": (5, RED),
}

# -- queries -----------------------------------------------------------------------------------


def over_time(expr: str, legend: str = "", ref: str = "A") -> Query:
    """Ask for the whole time range; `ref` tells the queries of one panel apart."""
    return Query().expr(expr).range().legend_format(legend or "__auto").ref_id(ref)


def now(expr: str, legend: str = "", ref: str = "A") -> Query:
    """Ask for the end of the time range only."""
    return Query().expr(expr).instant().legend_format(legend or "__auto").ref_id(ref)


def rows(expr: str, ref: str) -> Query:
    """Ask for the end of the time range, as rows of a table."""
    return now(expr, ref=ref).format(PromQueryFormat.TABLE)


def buckets(expr: str) -> Query:
    """Ask for a histogram's buckets, for a heatmap."""
    return over_time(expr, "{{le}}").format(PromQueryFormat.HEATMAP)


def state_code(selector: str) -> str:
    """One number for the state of each entity that `selector` chooses; see `STATES`."""
    codes = (
        f'tsdiff_entity_state{{{selector}, state="{state}"}} * {code}'
        for state, (code, _) in STATES.items()
    )
    return f"max by (entity) ({' or '.join(codes)})"


# -- style -------------------------------------------------------------------------------------


def thresholds(*steps: tuple[float, str], base: str = GREEN) -> builders.ThresholdsConfig:
    """Colours from a value on; `base` is the colour below the first."""
    known = [models.Threshold(None, base), *(models.Threshold(at, color) for at, color in steps)]
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(known)


def score_thresholds() -> builders.ThresholdsConfig:
    """Calm, between the lines, and as rare as an alert is asked to be."""
    return thresholds((CALM_BELOW, YELLOW), (SCORE_LINE, RED))


def score_line() -> builders.ThresholdsConfig:
    """The line at 1 alone, to be drawn through a graph."""
    return thresholds((SCORE_LINE, RED))


def state_mapping() -> models.ValueMapping:
    """Turn a state's number back into its word and colour."""
    results = {
        str(code): models.ValueMappingResult(text=state, color=color, index=code)
        for state, (code, color) in STATES.items()
    }
    return models.ValueMap(results)


def word_mapping(words: Mapping[int, tuple[str, str]]) -> models.ValueMapping:
    """Show words and colours for numbers."""
    return models.ValueMap(
        {
            str(value): models.ValueMappingResult(text=word, color=color, index=index)
            for index, (value, (word, color)) in enumerate(words.items())
        }
    )


def option(name: str, value: object) -> models.DynamicConfigValue:
    """One property of an override."""
    return models.DynamicConfigValue(name, value)


def fixed_color(color: str) -> models.DynamicConfigValue:
    """A colour that does not depend on the order of the series."""
    return option("color", {"mode": "fixed", "fixedColor": color})


def colored(panel: timeseries.Panel, colors: Mapping[str, str]) -> timeseries.Panel:
    """Give series the colours of their meaning, by name; Grafana's own go by their order."""
    for name, color in colors.items():
        panel.override_by_name(name, [fixed_color(color)])
    return panel


def transformation(name: str, options: Mapping[str, Any]) -> models.DataTransformerConfig:
    """What Grafana does to a result before it is shown."""
    return models.DataTransformerConfig(id_val=name, options=dict(options))


# -- panels ------------------------------------------------------------------------------------


def number(title: str, text: str, query: Query, unit: str = units.Short) -> stat.Panel:
    """One number, large, with its colour; a quarter of the width."""
    return (
        stat.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .height(4)
        .span(6)
        .unit(unit)
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.NONE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(thresholds(base=BLUE))
        .with_target(query)
    )


def graph(title: str, text: str, *queries: Query, unit: str = units.Short) -> timeseries.Panel:
    """Lines over time; half the width."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .height(8)
        .span(12)
        .unit(unit)
        .line_width(1)
        .fill_opacity(5)
        # A point between two gaps has no line: NEVER would hide it.
        .show_points(common.VisibilityMode.AUTO)
        .point_size(4)
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
        .tooltip(
            common_builders.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(common.SortOrder.DESCENDING)
        )
    )
    for query in queries:
        panel.with_target(query)
    return panel


def with_score_line(panel: timeseries.Panel) -> timeseries.Panel:
    """Draw the line at 1, and keep it in the picture."""
    style = common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.LINE)
    return panel.thresholds(score_line()).thresholds_style(style).min(0).axis_soft_max(1.2)


def stacked(panel: timeseries.Panel) -> timeseries.Panel:
    """Put the series on top of each other."""
    mode = common_builders.StackingConfig().mode(common.StackingMode.NORMAL)
    return panel.stacking(mode).fill_opacity(60).line_width(0).min(0)


def bars(title: str, text: str, query: Query, unit: str = units.Short) -> bargauge.Panel:
    """One bar a series, as they are now."""
    return (
        bargauge.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .height(8)
        .span(12)
        .unit(unit)
        .min(0)
        .orientation(common.VizOrientation.HORIZONTAL)
        .display_mode(common.BarGaugeDisplayMode.BASIC)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(thresholds(base=BLUE))
        .with_target(query)
    )


def heat(
    title: str, text: str, query: Query, unit: str = units.Short, brightest: float | None = None
) -> heatmap.Panel:
    """Cells over time: a row for each series, or for each bucket of a histogram.

    `brightest` is the value of the strongest colour; None = the largest that is seen.
    """
    color = (
        heatmap.HeatmapColorOptions()
        # A scheme begins with a strong brown in the dark theme; this begins with the background.
        .mode(HeatmapColorMode.OPACITY)
        .fill("dark-orange")
        .scale(HeatmapColorScale.LINEAR)
        .steps(64)
        .min(0)
    )
    if brightest is not None:
        color.max(brightest)
    return (
        heatmap.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .height(10)
        .span(24)
        .calculate(False)
        .cell_gap(0)
        .color(color)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .with_target(query)
    )


def timeline(title: str, text: str, query: Query) -> statetimeline.Panel:
    """States over time, in their colours."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .height(8)
        .span(12)
        .merge_values(True)
        .show_value(common.VisibilityMode.AUTO)
        .row_height(0.9)
        .mappings([state_mapping()])
        .with_target(query)
    )


def grid(
    title: str, text: str, queries: Sequence[Query], columns: Mapping[str, str], sort: str
) -> table.Panel:
    """A table of several queries, joined by their labels.

    `columns` renames the fields that stay and gives their order; all others are hidden. `sort` is
    the renamed field to begin with, the largest first.
    """
    kept = {"include": {"names": list(columns)}}
    order = {name: index for index, name in enumerate(columns)}
    panel = (
        table.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .height(9)
        .span(24)
        .with_transformation(transformation("merge", {}))
        .with_transformation(transformation("filterFieldsByName", kept))
        .with_transformation(
            transformation("organize", {"renameByName": dict(columns), "indexByName": order})
        )
        .sort_by([common_builders.TableSortByFieldState().display_name(sort).desc(True)])
    )
    for query in queries:
        panel.with_target(query)
    return panel


def column(panel: table.Panel, name: str, *options: models.DynamicConfigValue) -> table.Panel:
    """Say how one column of a table looks."""
    return panel.override_by_name(name, list(options))


def colored_cell() -> models.DynamicConfigValue:
    """Let the thresholds or the mapping of a column colour its text."""
    return option("custom.cellOptions", {"type": "color-text"})


def state_column(panel: table.Panel, name: str) -> table.Panel:
    """Show states as words in their colours, on the left as words are."""
    look = (option("mappings", [state_mapping()]), colored_cell(), option("custom.align", "left"))
    return column(panel, name, *look)


# -- variables and links -----------------------------------------------------------------------


def source_variable() -> builders.DatasourceVariable:
    """Let the reader choose between Prometheus servers."""
    return builders.DatasourceVariable("datasource").label("Data source").type("prometheus")


def label_variable(
    name: str, label: str, query: str, *, many: bool, text: str = ""
) -> builders.QueryVariable:
    """Let the reader choose values of a label; `many` allows several, and begins with all."""
    variable = (
        builders.QueryVariable(name)
        .label(label)
        .description(text)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NATURAL_ASC)
    )
    if many:
        # Not ".*": a series without the label is none of these.
        variable.multi(True).include_all(True).all_value(".+")
        variable.current(models.VariableOption(True, ["All"], ["$__all"]))
    return variable


def value_link(title: str, uid: str, *given: str) -> dict[str, object]:
    """Link from a table's cell or a series to a dashboard, with the time and these variables."""
    query = "&".join(["var-datasource=${datasource}", *given, "${__url_time_range}"])
    return {"title": title, "url": f"/d/{uid}?{query}", "targetBlank": False}


def board_link(title: str, uid: str) -> builders.DashboardLink:
    """Link at the top of a dashboard to another one, with the time range."""
    return (
        builders.DashboardLink(title)
        .type(models.DashboardLinkType.LINK)
        .icon("dashboard")
        .url(f"/d/{uid}?var-datasource=${{datasource}}")
        .keep_time(True)
    )


class _PrometheusAnnotation(models.AnnotationQuery):
    """What Prometheus' annotations know beside the common fields, which are all the SDK has."""

    def to_json(self) -> dict[str, object]:
        texts = {"titleFormat": "Alert: {{entity}}", "textFormat": "", "tagKeys": "entity"}
        return {**super().to_json(), **texts}


class AlertAnnotation(Builder[models.AnnotationQuery]):
    """A region for as long as an entity's alert is active: its ends are the transitions."""

    def __init__(self, selector: str) -> None:
        self._selector = selector

    def build(self) -> models.AnnotationQuery:
        """Return the annotation."""
        return _PrometheusAnnotation(
            name="Alerts",
            datasource=SOURCE,
            icon_color=RED,
            expr=f"max by (entity) (tsdiff_alert_active{{{self._selector}}}) == 1",
        )
