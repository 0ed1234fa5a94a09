"""A real Prometheus on loopback, and the part of its HTTP API that Grafana uses."""

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Series = list[dict[str, Any]]


class QueryError(Exception):
    """Prometheus refused a query; the message is its own."""


class PrometheusServer:
    """One Prometheus that scrapes `target` ("host:port") every second, until `stop`.

    Its blocks are in `folder / "tsdb"`; `options` are flags, `storage` a part of its configuration.
    """

    def __init__(
        self,
        program: str,
        port: int,
        target: str | None,
        folder: Path,
        *options: str,
        storage: Mapping[str, Any] | None = None,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "prometheus.log"
        config = folder / "prometheus.yml"
        # JSON is YAML, and needs no care with quotes.
        config.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s"},
                    "scrape_configs": [
                        {"job_name": "tsdiff", "static_configs": [{"targets": [target]}]}
                        for target in ([] if target is None else [target])
                    ],
                    **({} if storage is None else {"storage": storage}),
                }
            )
        )
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    program,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    *options,
                ],
                cwd=folder,
                stdout=log,
                stderr=log,
            )

    def wait_until_ready(self, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).close()  # noqa: S310
                return
            except (urllib.error.URLError, OSError) as error:
                said = self._log.read_text()[-2000:]
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

    def stop(self) -> None:
        """End it; what it stored is left to whoever made the folder."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(20)


def points(series: Series) -> Sequence[tuple[float, str]]:
    """All points of a result, instant or range."""
    found = [point for one in series for point in one.get("values", [one.get("value")])]
    return [(float(at), str(value)) for at, value in found]
