"""The dashboards: current, whole, and every query of theirs brings something from a real service.

A worker scores telemetry from a real Kafka, a real Prometheus scrapes it, and the queries of all
panels, variables and annotations are asked as Grafana would ask them. `-s` prints the results.
"""

import json
import math
import re
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import yaml
from kafka import KafkaAdminClient, KafkaProducer

from tests.conftest import ROOT, free_port
from tests.prometheus_server import PrometheusServer, QueryError, Series, points, scraping
from tests.stream.conftest import SmallBundle
from tests.stream.workers import Deployment, deployment, wait_until
from tsdiff.history import EntityHistory, History

GRAFANA = ROOT / "deploy" / "grafana"
sys.path.insert(0, str(GRAFANA))  # its scripts run uninstalled

from dashboards import DASHBOARDS, rendered  # noqa: E402  (found by the line above)

# There only while something is wrong that is not wrong with the service that is watched.
ABSENT = ("tsdiff_channel_state",)

Board = dict[str, Any]

# -- files -------------------------------------------------------------------------------------


def boards() -> dict[str, Board]:
    return {
        name: json.loads((GRAFANA / "dashboards" / f"{name}.json").read_text())
        for name in DASHBOARDS
    }


def panels(board: Board) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_the_files_are_what_the_generator_makes() -> None:
    files = {path.name: path.read_text("utf-8") for path in (GRAFANA / "dashboards").iterdir()}
    assert files == rendered(), "run python deploy/grafana/dashboards.py"


def test_every_panel_says_what_it_shows_and_has_its_own_place() -> None:
    for name, board in boards().items():
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids), name
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(at.get("x", 0), at.get("x", 0) + at["w"])
                for y in range(at.get("y", 0), at.get("y", 0) + at["h"])
            }
            assert not cells & taken, f"{name}: {panel['title']} lies on another panel"
            assert max(x for x, _ in cells) < 24, f"{name}: {panel['title']} is too wide"
            taken |= cells
        for panel in panels(board):
            assert panel["title"] and panel["description"].endswith("."), (name, panel["title"])
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"], (name, panel["title"])


def test_links_lead_to_dashboards_and_variables_that_exist() -> None:
    everything = boards()
    variables = {
        board["uid"]: {variable["name"] for variable in board["templating"]["list"]}
        for board in everything.values()
    }
    found = set()
    for name, board in everything.items():
        text = json.dumps(board)
        for uid, query in re.findall(r'"/d/([\w-]+)\?([^"]*)"', text.replace('\\"', "'")):
            given = set(re.findall(r"var-(\w+)=", query))
            assert given <= variables[uid], (name, uid, given)
            found.add((name, uid, "channel" in given))
    assert {
        ("fleet", "tsdiff-entity", False),
        ("fleet", "tsdiff-entity", True),
        ("entity", "tsdiff-entity", True),
        ("entity", "tsdiff-fleet", False),
    } <= found
    assert all(b["annotations"].get("list") for n, b in everything.items() if n != "service")


def test_the_score_has_its_line_at_one() -> None:
    for board, title in (("fleet", "Highest scores"), ("entity", "Anomaly score")):
        panel = next(p for p in panels(boards()[board]) if p["title"] == title)
        defaults = panel["fieldConfig"]["defaults"]
        assert [step["value"] for step in defaults["thresholds"]["steps"]] == [None, 1.0]
        assert defaults["custom"]["thresholdsStyle"] == {"mode": "line"}


def test_provisioning_names_what_exists() -> None:
    folder = GRAFANA / "provisioning"
    read = {path.stem: yaml.safe_load(path.read_text()) for path in folder.rglob("*.yaml")}
    (source,) = read["prometheus"]["datasources"]
    assert source["type"] == "prometheus" and source["url"] == "http://prometheus:9090"
    (provider,) = read["dashboards"]["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    # Two folders of one title otherwise, or no Grafana: rules come first, and name no uid.
    assert provider["folder"] not in {group["folder"] for group in read["rules"]["groups"]}
    rules = [rule for group in read["rules"]["groups"] for rule in group["rules"]]
    assert len({rule["uid"] for rule in rules}) == len(rules)
    for rule in rules:
        refs = {step["refId"]: step for step in rule["data"]}
        assert rule["condition"] in refs
        assert {step["datasourceUid"] for step in rule["data"]} <= {source["uid"], "__expr__"}
        dashboard = rule["annotations"]["__dashboardUid__"]
        panel = int(rule["annotations"]["__panelId__"])
        (board,) = [board for board in boards().values() if board["uid"] == dashboard]
        assert panel in {p["id"] for p in panels(board)}


# -- a service that was watched ----------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A Prometheus that has seen a service raise alerts, and the time in which it did."""

    prometheus: PrometheusServer
    start: float
    end: float
    entity: str
    """One whose alert is active at the end."""


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        return str(response.read().decode())


def firing(port: int) -> list[str]:
    """Entities whose alert is active, as the service says right now."""
    return re.findall(r'^tsdiff_alert_active\{entity="([^"]+)"\} 1', scraped(port), re.MULTILINE)


def part(history: History, share: tuple[float, float]) -> History:
    """The readings between two shares of a history's time."""
    first = min(int(one.timestamps_ms[0]) for one in history.entities)
    last = max(int(one.timestamps_ms[-1]) for one in history.entities) + 1
    begin, end = (first + at * (last - first) for at in share)

    def cut(one: EntityHistory) -> EntityHistory:
        kept = (one.timestamps_ms >= begin) & (one.timestamps_ms < end)
        return replace(one, timestamps_ms=one.timestamps_ms[kept], values=one.values[kept])

    entities = [cut(one) for one in history.entities]
    return replace(history, entities=tuple(e for e in entities if len(e.timestamps_ms)))


def settle(port: int, sent: int) -> None:
    """Wait until all that was sent is read, and nothing more is scored."""

    def count(name: str) -> float:
        return float(re.findall(rf"^{name} (\S+)", scraped(port), re.MULTILINE)[0])

    wait_until(lambda: count("tsdiff_readings_total") >= sent, f"{sent} readings")
    scores = -1.0
    while (now := count("tsdiff_scores_total")) != scores:
        scores = now
        time.sleep(0.3)


def send_poison(deployed: Deployment) -> None:
    """One message for the dead letters."""
    with KafkaProducer(bootstrap_servers=deployed.servers) as producer:
        producer.send(deployed.topic, b"no reading").get(timeout=30)


def feed(deployed: Deployment, bundle: SmallBundle, port: int) -> str:
    """Send readings piece by piece until alerts have come and gone, and one is active.

    No slot closes afterwards, so the alert stays. Returns its entity.
    """
    pieces, raised, sent = 40, False, 0
    for piece in range(pieces):
        span = (piece / pieces, (piece + 1) / pieces)
        sent += deployed.send(part(bundle.live, span), bundle.period_ms)
        if piece == pieces // 4:
            send_poison(deployed)
        settle(port, sent)
        active = firing(port)
        if active and raised and piece > pieces / 2:
            return active[0]
        raised = raised or bool(active)
    raise AssertionError("no alert was active after half of the readings")


@pytest.fixture(scope="module")
def watched(
    kafka: str, small_bundle: SmallBundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """Let a worker score until alerts have come and gone, before the eyes of Prometheus."""
    folder = tmp_path_factory.mktemp("watched")
    topic = f"dashboards-{uuid.uuid4().hex[:12]}"
    admin = KafkaAdminClient(bootstrap_servers=kafka)
    admin.create_topics({topic: {"num_partitions": 2}}, wait_for_metadata=True)
    port = free_port()
    prometheus = PrometheusServer(folder, scraping(f"127.0.0.1:{port}"))
    try:
        with deployment(kafka, topic, small_bundle.path, folder) as deployed:
            start = time.time()
            worker = deployed.start(metrics__listen=f"127.0.0.1:{port}")
            worker.wait_for("partition assigned")
            prometheus.wait_until_ready()
            entity = feed(deployed, small_bundle, port)
            end = time.time() + 1.5

            def seen_until() -> float:
                newest = points(prometheus.query("timestamp(tsdiff_scores_total)"))
                return max((float(value) for _, value in newest), default=0.0)

            wait_until(lambda: seen_until() > end, "a scrape after the last score")
            # The last step of a range is its end, where the alert is active.
            start = end - math.ceil((end - start) / STEP) * STEP
            yield Watched(prometheus, start, end, entity)
    finally:
        prometheus.end()
        admin.delete_topics([topic], raise_errors=False)
        admin.close()


# -- what Grafana would ask --------------------------------------------------------------------

STEP = 2.0


def expanded(text: str, given: Mapping[str, str]) -> str:
    """Put in what Grafana knows: variables, and the intervals of a 1 s scrape and `STEP`."""
    for name, value in given.items():
        text = re.sub(rf"\$(?:{name}\b|{{{name}}})", value.replace("\\", r"\\"), text)
    assert "$" not in text, f"a variable that is not known here: {text}"
    return text


def variables_of(board: Board, watched: Watched) -> dict[str, str]:
    """What is chosen: the entity whose alert is active, one of its channels; else all."""
    span = watched.end - watched.start
    given = {
        # As Grafana has it: four scrapes, or a step and a scrape where that is more.
        "__rate_interval": f"{max(4.0, STEP + 1):g}s",
        "__range": f"{math.ceil(span)}s",
        "__interval": f"{STEP:g}s",
    }
    for variable in board["templating"]["list"]:
        if variable["type"] == "datasource":
            continue
        call = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert call is not None, variable
        selector = expanded(call[1], given)
        values = watched.prometheus.label_values(selector, call[2], watched.start, watched.end)
        assert values, f"{board['title']}: nothing to choose for {variable['name']}"
        if variable["includeAll"] and variable["name"] != "channel":
            given[variable["name"]] = variable["allValue"]
        else:
            given[variable["name"]] = watched.entity if watched.entity in values else values[0]
    return given


def queries_of(board: Board) -> Iterator[tuple[str, str, bool]]:
    """Every query: where it is, its text, and whether it asks for one moment only."""
    for panel in panels(board):
        for target in panel["targets"]:
            yield f"{panel['title']} [{target['refId']}]", target["expr"], bool(target["instant"])
    for annotation in board["annotations"].get("list", ()):
        yield f"annotation {annotation['name']}", annotation["expr"], False


def ask(watched: Watched, expr: str, instant: bool) -> Series:
    if instant:
        return watched.prometheus.query(expr, watched.end)
    return watched.prometheus.query_range(expr, watched.start, watched.end, STEP)


def told(series: Series) -> list[float]:
    """The values that a panel could draw."""
    values = [float(value) for _, value in points(series)]
    return [value for value in values if not math.isnan(value)]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_query_brings_something(name: str, watched: Watched) -> None:
    board = boards()[name]
    given = variables_of(board, watched)
    lines, empty = [], []
    for place, text, instant in queries_of(board):
        expr = expanded(text, given)
        try:
            series = ask(watched, expr, instant)
        except QueryError as error:
            pytest.fail(f"{name}: {place}: {error}\n{expr}")
        values = told(series)
        absent = any(re.search(rf"\b{metric}\b", text) for metric in ABSENT)
        if not values and not absent:
            empty.append(f"{place}: {expr}")
        last = f"{values[-1]:.4g}" if values else "absent" if absent else "EMPTY"
        lines.append(f"{place:48} {len(series):4} series {len(values):5} points  last {last}")
    print(f"\n{board['title']}: {given}", *lines, sep="\n  ")
    assert not empty, f"{name}: nothing came from\n" + "\n".join(empty)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_only_metrics_that_exist_are_asked_for(name: str) -> None:
    """A misspelt metric would be as empty as one that is not there yet."""
    text = (ROOT / "README.md").read_text()
    known = set(re.findall(r"^\| `(tsdiff_\w+)` \|", text, re.MULTILINE))
    asked = {
        metric
        for _, expr, _ in queries_of(boards()[name])
        for metric in re.findall(r"\btsdiff_\w+", expr)
    }
    # A histogram's own three names, too.
    known |= {f"{metric}_{end}" for metric in known for end in ("bucket", "sum", "count")}
    assert not asked - known, asked - known


@pytest.mark.timeout(240)
def test_grafanas_own_rules_see_the_alert(watched: Watched) -> None:
    rules = GRAFANA / "provisioning" / "alerting" / "rules.yaml"
    for group in yaml.safe_load(rules.read_text())["groups"]:
        for rule in group["rules"]:
            (query,) = [step for step in rule["data"] if step["datasourceUid"] != "__expr__"]
            expr = expanded(query["model"]["expr"], {})
            values = told(watched.prometheus.query(expr, watched.end))
            assert values, f"{rule['title']}: nothing came from {expr}"
            if rule["uid"] == "tsdiff-entity-anomalous":
                assert max(values) == 1
