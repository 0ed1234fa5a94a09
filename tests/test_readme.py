"""The README is run and read: its commands, its settings, its metrics, its links."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client import CollectorRegistry

from stream.config import json_schema
from stream.metrics import ServiceMetrics
from stream.simulate import simulate_fleet
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def quickstart() -> list[str]:
    """The commands of the blocks that say they are run here."""
    blocks = re.findall(r"<!-- quickstart.*?-->\n```sh\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def settings() -> set[str]:
    schema = json_schema()
    definitions: dict[str, Any] = schema["$defs"]

    def keys(section: dict[str, Any], prefix: str) -> Iterator[str]:
        for name, field in section["properties"].items():
            inner = definitions.get(field.get("$ref", "").rsplit("/", 1)[-1])
            if inner and "properties" in inner:
                yield from keys(inner, f"{prefix}{name}.")
            else:
                yield prefix + name

    return set(keys(schema, ""))


def test_every_setting_is_listed_and_every_listed_one_exists() -> None:
    table = README.split("## Configuration")[1].split("## Metrics")[0]
    assert set(re.findall(r"^\| `([a-z_.]+)` \|", table, re.MULTILINE)) == settings()


def test_every_metric_is_listed_and_every_listed_one_exists() -> None:
    registry = CollectorRegistry()
    ServiceMetrics(registry, channels=("a",), max_entities=1, top_channels=1, entity_ttl_s=1)
    suffix = {"counter": "_total", "info": "_info"}
    # describe() names the families of entities too, of which there are none yet.
    exists = {
        family.name + suffix.get(family.type, "")
        for collector in registry._collector_to_names
        for family in getattr(collector, "describe")()  # noqa: B009 - untyped in the base class
    }
    table = README.split("## Metrics")[1].split("## How it works")[0]
    assert set(re.findall(r"^\| `(tsdiff_\w+)` \|", table, re.MULTILINE)) == exists


def test_files_and_tests_that_are_named_exist() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in sources, name
    for path in re.findall(r"`((?:deploy|tests|stream|train|tsdiff)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_scrape_configuration_is_valid(promtool: str) -> None:
    config = ROOT / "deploy" / "prometheus" / "prometheus.yml"
    subprocess.run([promtool, "check", "config", str(config)], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("kafka")  # so that it skips where no broker can be had
def test_the_quickstart_works(tmp_path: Path) -> None:
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    (tmp_path / "history").mkdir()
    fleet = simulate_fleet(2, 6, slots=2000, seed=3)
    for entity in fleet.history().entities:
        columns = {n: entity.values[:, i] for i, n in enumerate(fleet.channels)}
        moments = pa.array(entity.timestamps_ms, pa.timestamp("ms"))
        table = pa.table({"timestamp": moments, **columns})
        pq.write_table(table, tmp_path / "history" / f"{entity.entity}.parquet")
    with socket.socket() as free, socket.socket() as free_too:
        free.bind(("127.0.0.1", 0))
        free_too.bind(("127.0.0.1", 0))
        port, metrics_port = free.getsockname()[1], free_too.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # The README's ports may be in use on the machine that tests.
        "TSDIFF_INPUT__BOOTSTRAP_SERVERS": f"127.0.0.1:{port}",
        "TSDIFF_METRICS__LISTEN": f"127.0.0.1:{metrics_port}",
    }
    commands = quickstart()
    assert len(commands) == 7

    def call(command: str) -> str:
        done = subprocess.run(
            shlex.split(command),
            check=False,  # the assertion below says more
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    stop = f"python deploy/kafka-local/kafka_local.py stop --port {port}"
    try:
        for command in commands[:-1]:
            options = {"kafka_local.py start": f"--port {port}", "replay": f"-b 127.0.0.1:{port}"}
            extra = next((text for part, text in options.items() if part in command), "")
            call(command.replace("localhost:9092", f"127.0.0.1:{port}") + f" {extra}")
        assert pq.read_table(tmp_path / "scores.parquet").num_rows > 3900
        run = subprocess.Popen(shlex.split(commands[-1]), cwd=tmp_path, env=environment)
        try:
            ready = f"http://127.0.0.1:{metrics_port}/-/ready"
            deadline = time.monotonic() + 90
            while not answers(ready):
                assert run.poll() is None, "tsdiff run ended by itself"
                assert time.monotonic() < deadline, "tsdiff run does not get ready"
                time.sleep(0.2)
            run.send_signal(signal.SIGTERM)
            assert run.wait(30) == 0
        finally:
            run.kill()
            run.wait()
    finally:
        call(stop)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - ours, on loopback
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
