"""A real Prometheus on loopback, and the part of its HTTP API that Grafana uses."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import free_port, require_program

Series = list[dict[str, Any]]


class QueryError(Exception):
    """Prometheus refused a query; the message is its own."""


class Process:
    """A program that a test runs, and what it says."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, "GOMAXPROCS": "1"}
            )

    def end(self) -> None:
        """End it; what it stored is left to whoever made the folder."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def scraping(*targets: str, every: str = "1s", storage: Mapping[str, Any] | None = None) -> str:
    """A configuration that scrapes these ("host:port"); `storage` is that part of it."""
    job = {"job_name": "tsdiff", "static_configs": [{"targets": list(targets)}]}
    config = {
        "global": {"scrape_interval": every, "scrape_timeout": every},
        "scrape_configs": [job] if targets else [],
        **({} if storage is None else {"storage": storage}),
    }
    # JSON is YAML, and needs no care with quotes.
    return json.dumps(config)


class PrometheusServer(Process):
    """One Prometheus with a configuration, until `end`; its blocks are in `folder / "tsdb"`."""

    def __init__(self, folder: Path, config: str, *options: str, port: int | None = None) -> None:
        program = require_program("prometheus", "prometheus")
        address = f"127.0.0.1:{free_port() if port is None else port}"
        self.url = f"http://{address}"
        file = folder / "prometheus.yml"
        file.write_text(config)
        command = [
            program,
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={address}",
            *options,
        ]
        super().__init__(command, folder / "prometheus.log")

    def wait_until_ready(self, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).close()  # noqa: S310
                return
            except (urllib.error.URLError, OSError) as error:
                said = self.log.read_text()[-2000:]
                assert self.process.poll() is None, f"Prometheus ended:\n{said}"
                assert time.monotonic() < deadline, f"no Prometheus: {error}\n{said}"
            time.sleep(0.1)

    def query(self, expr: str, at: float | None = None) -> Series:
        """Evaluate at one moment; None = now."""
        moment = {} if at is None else {"time": f"{at:.3f}"}
        return self._result("query", {"query": expr, **moment})

    def query_range(self, expr: str, start: float, end: float, step: float) -> Series:
        """Evaluate at every step of a time range."""
        span = {"start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{step:g}"}
        return self._result("query_range", {"query": expr, **span})

    def label_values(self, selector: str, label: str, start: float, end: float) -> list[str]:
        """Return what Grafana's `label_values(selector, label)` finds in a time range."""
        span = {"match[]": selector, "start": f"{start:.3f}", "end": f"{end:.3f}"}
        return sorted(self._get(f"label/{label}/values", span))

    def _result(self, path: str, fields: Mapping[str, str]) -> Series:
        found: Series = self._get(path, fields)["result"]
        return found

    def _get(self, path: str, fields: Mapping[str, str]) -> Any:  # noqa: ANN401
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(fields)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310 - loopback
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise QueryError(json.load(error)["error"]) from None


def points(series: Series) -> Sequence[tuple[float, str]]:
    """All points of a result, instant or range."""
    found = [point for one in series for point in one.get("values", [one.get("value")])]
    return [(float(at), str(value)) for at, value in found]
