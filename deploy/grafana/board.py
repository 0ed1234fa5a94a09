"""What the three dashboards share: their names, and how panels become a dashboard."""

from collections.abc import Iterable
from typing import Any, Final, Protocol

from grafana_foundation_sdk.builders.dashboard import Dashboard, DashboardLink, Row
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as models
from panels import value_link

FLEET: Final = "tsdiff-fleet"
ENTITY: Final = "tsdiff-entity"
SERVICE: Final = "tsdiff-service"


class Placed(Protocol):
    """A panel's builder, of whichever kind."""

    def build(self) -> models.Panel:
        """Return the panel."""
        ...

    def id(self, id_val: int) -> Any:  # noqa: ANN401 - each kind returns its own
        """Set the number that links name the panel by."""
        ...


Section = tuple[str, list[Placed]]


def assemble(
    title: str,
    uid: str,
    text: str,
    variables: Iterable[Builder[models.VariableModel]],
    links: Iterable[DashboardLink],
    sections: Iterable[Section],
) -> Dashboard:
    """Make a dashboard of sections, each a row of panels."""
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


def to_entity(*given: str) -> dict[str, object]:
    """Link from a cell or a series to the entity's dashboard."""
    return value_link("Entity", ENTITY, *given)


def contribution(selector: str) -> str:
    """Shares of the anomaly, of the entities that `selector` chooses."""
    return f"tsdiff_channel_contribution_ratio{{{selector}}}"
