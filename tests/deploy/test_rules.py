"""Alert rules, routes and runbooks: valid, tested, complete, and of metrics that exist."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY, CollectorRegistry

from stream.metrics import ServiceMetrics
from tests.conftest import ROOT
from tests.deploy.chain import ALERTMANAGER, PROMETHEUS, hurried

RULES = PROMETHEUS / "tsdiff.rules.yml"
ROUTES = ALERTMANAGER / "alertmanager.yml"
RUNBOOKS = ROOT / "deploy" / "runbooks"
README = (ROOT / "README.md").read_text()

GROUPS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
RECORDED = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}
NAMES = sorted({rule["alert"] for rule in ALERTS})


def cases_in(name: str) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / name).read_text())["tests"]
    return groups


def existing() -> set[str]:
    """Names of samples that the service has, with those of its counters and histograms."""
    registry = CollectorRegistry()
    ServiceMetrics(registry, channels=("a",), max_entities=1, top_channels=1, entity_ttl_s=1)
    suffixes: dict[str, tuple[str, ...]] = {
        "counter": ("_total",),
        "info": ("_info",),
        "histogram": ("_bucket", "_count", "_sum"),
    }
    return {
        family.name + suffix
        for collector in registry._collector_to_names
        for family in getattr(collector, "describe")()  # noqa: B009 - untyped in the base class
        for suffix in suffixes.get(family.type, ("",))
    }


def named(text: str) -> set[str]:
    """The metrics, recorded ones too, that a text names."""
    return set(re.findall(r"(?<![\w:./-])(?:job:)?tsdiff_[a-z0-9_]+(?::\w+)?", text))


def promql(runbook: str) -> list[str]:
    """The queries of a runbook, which are parted by empty lines."""
    blocks = re.findall(r"^```promql\n(.*?)^```", runbook, re.DOTALL | re.MULTILINE)
    return [query for block in blocks for query in block.strip().split("\n\n")]


def check(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules_and_the_configuration(promtool: str) -> None:
    check(promtool, "check", "rules", RULES)
    check(promtool, "check", "config", PROMETHEUS / "prometheus.yml")


@pytest.mark.parametrize("path", sorted(PROMETHEUS.glob("*_test.yml")), ids=lambda p: p.stem)
def test_unit_tests_of_the_rules_pass(path: Path, promtool: str) -> None:
    check(promtool, "test", "rules", path)


def test_unit_tests_see_every_alert_fire() -> None:
    """Every alert of every severity, with all that it says."""
    fired = {
        (case["alertname"], alert["exp_labels"]["severity"])
        for group in cases_in("tsdiff.rules_test.yml")
        for case in group["alert_rule_test"]
        for alert in case.get("exp_alerts", ())
        if len(alert["exp_annotations"]) == 4
    }
    assert fired == {(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS}


def test_unit_tests_see_every_alert_not_fire() -> None:
    groups = cases_in("tsdiff.quiet_test.yml")
    cases = {re.split(r"\W", group["name"], maxsplit=1)[0]: group for group in groups}
    assert cases.keys() == {"healthy", "idle", "absent", "counter"}
    for group in groups:
        assert sorted(case["alertname"] for case in group["alert_rule_test"]) == NAMES
    # Each also begins and ends: it is asked for while it must not fire yet, or no more.
    quiet = {
        case["alertname"]
        for group in cases_in("tsdiff.rules_test.yml")
        for case in group["alert_rule_test"]
        if "exp_alerts" not in case
    }
    assert quiet == set(NAMES)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_has_what_its_reader_needs(rule: dict[str, Any]) -> None:
    name, notes = rule["alert"], rule["annotations"]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert notes.keys() == {"summary", "description", "runbook_url", "dashboard_url"}
    assert notes["runbook_url"].endswith(f"/deploy/runbooks/{name}.md")
    for text in ("summary", "description"):
        assert notes[text].strip().endswith((".", "{{- end }}")), (name, text)


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    assert sorted(path.stem for path in RUNBOOKS.glob("*.md")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_runbook_has_its_parts(name: str) -> None:
    lines = (RUNBOOKS / f"{name}.md").read_text().splitlines()
    headings = [line for line in lines if re.match("#+ ", line)]
    assert headings == [
        f"# {name}",
        "## Meaning",
        "## Impact",
        "## Diagnosis",
        "## Mitigation",
    ]


def test_metrics_that_are_named_exist() -> None:
    # The service's settings and topics do not begin like metrics: they have a dot or a capital.
    known = existing() | RECORDED
    for path in (RULES, *RUNBOOKS.glob("*.md")):
        assert named(path.read_text()) <= known, path.name


def test_queries_of_runbooks_are_of_the_service_or_of_its_process() -> None:
    process = {f"{f.name}_total" if f.type == "counter" else f.name for f in REGISTRY.collect()}
    for path in RUNBOOKS.glob("*.md"):
        for query in promql(path.read_text()):
            others = set(re.findall(r"\b(?:process_\w+|up)\b", query))
            assert named(query) or others, query
            assert others <= process | {"up"}, query


def test_queries_of_runbooks_can_be_asked(tmp_path: Path, promtool: str) -> None:
    queries = [query for path in RUNBOOKS.glob("*.md") for query in promql(path.read_text())]
    assert len(queries) >= len(NAMES)
    rules = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(queries)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "runbooks", "rules": rules}]}))
    check(promtool, "check", "rules", path)


def test_amtool_accepts_the_routes(amtool: str) -> None:
    check(amtool, "check-config", ROUTES)


@pytest.mark.parametrize(
    ("severity", "receiver"), [("critical", "tsdiff-page"), ("warning", "tsdiff")]
)
def test_alerts_are_routed_by_severity(severity: str, receiver: str, amtool: str) -> None:
    check(
        amtool,
        "config",
        "routes",
        "test",
        f"--config.file={ROUTES}",
        f"--verify.receivers={receiver}",
        "alertname=TsdiffLagging",
        f"severity={severity}",
    )


def test_inhibition_names_alerts_that_exist() -> None:
    text = ROUTES.read_text().split("inhibit_rules:")[1]
    assert {n for n in re.findall(r"Tsdiff\w+", text)} <= set(NAMES)


def test_the_readme_lists_the_alerts() -> None:
    part = README.split("## Alerting")[1].split("\n## ")[0]
    listed = re.findall(
        r"^\| \[`(\w+)`\]\(deploy/runbooks/\1\.md\) \| (.*?) \|", part, re.MULTILINE
    )
    severities: dict[str, list[str]] = {}
    for rule in ALERTS:
        severities.setdefault(rule["alert"], []).append(rule["labels"]["severity"])
    assert dict(listed) == {name: ", ".join(of) for name, of in severities.items()}


def test_a_hurried_copy_differs_in_durations_alone() -> None:
    assert hurried("for: 1m\nx[15m:15s] rate15m > 15 # 1d, 2h") == (
        "for: 1000ms\nx[15000ms:250ms] rate15m > 15 # 1440000ms, 120000ms"
    )
