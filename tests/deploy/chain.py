"""Prometheus, Alertmanager and a receiver as processes and threads of a test, on loopback."""

import json
import re
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, free_port, require_program
from tests.prometheus_server import Process, PrometheusServer

PROMETHEUS = ROOT / "deploy" / "prometheus"
ALERTMANAGER = ROOT / "deploy" / "alertmanager"
RECEIVER = "http://127.0.0.1:9465"
"""Where the placeholders of alertmanager.yml send to."""

FASTER = 60
_UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def hurried(text: str) -> str:
    """A configuration or rules with every duration divided by 60: a minute passes in a second."""

    def divide(match: re.Match[str]) -> str:
        return f"{int(match[1]) * _UNITS_MS[match[2]] // FASTER}ms"

    return re.sub(r"(?<![\w.])(\d+)([smhd])\b", divide, text)


def get_json(url: str) -> Any:  # noqa: ANN401 - whatever the API says
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - ours, on loopback
        return json.load(answer)


class Receiver:
    """A webhook that keeps every notification it is sent, with the path it was sent to."""

    def __init__(self) -> None:
        self.notifications: list[tuple[str, dict[str, Any]]] = []
        kept = self.notifications

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                kept.append((self.path, json.loads(body)))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,))
        self._thread.start()

    def end(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Chain:
    """Prometheus and Alertmanager with the files of `deploy/`, in a hurry, and a receiver."""

    def __init__(self, folder: Path, target: str, stack: ExitStack) -> None:
        self.receiver = Receiver()
        stack.callback(self.receiver.end)
        alertmanager = f"127.0.0.1:{free_port()}"
        self.alertmanager = f"http://{alertmanager}"
        routes = (ALERTMANAGER / "alertmanager.yml").read_text()
        assert RECEIVER in routes
        (folder / "alertmanager.yml").write_text(
            hurried(routes.replace(RECEIVER, self.receiver.url))
        )
        scrapes = (PROMETHEUS / "prometheus.yml").read_text()
        for ours, theirs in (("127.0.0.1:9464", target), ("127.0.0.1:9093", alertmanager)):
            assert ours in scrapes
            scrapes = scrapes.replace(ours, theirs)
        rules = (PROMETHEUS / "tsdiff.rules.yml").read_text()
        (folder / "tsdiff.rules.yml").write_text(hurried(rules))
        manager = Process(
            [
                require_program("prometheus-alertmanager", "prometheus-alertmanager"),
                f"--config.file={folder / 'alertmanager.yml'}",
                f"--storage.path={folder / 'alertmanager'}",
                f"--web.listen-address={alertmanager}",
                f"--web.external-url={self.alertmanager}",
                "--cluster.listen-address=",  # no cluster: it would listen on all interfaces
            ],
            folder / "alertmanager.log",
        )
        stack.callback(manager.end)
        self.prometheus = PrometheusServer(folder, hurried(scrapes), "--query.lookback-delta=5s")
        stack.callback(self.prometheus.end)
        self.processes = [manager, self.prometheus]
        self.prometheus.wait_until_ready()

    def query(self, promql: str) -> list[dict[str, Any]]:
        """What Prometheus answers; nothing when it does not, which `wait_until` tells."""
        try:
            return self.prometheus.query(promql)
        except OSError:
            return []

    def suppressed(self) -> dict[str, str]:
        """The alerts that Alertmanager holds back: their entities, and each one's name."""
        alerts = get_json(f"{self.alertmanager}/api/v2/alerts?active=false&silenced=false")
        return {a["labels"].get("entity", ""): a["labels"]["alertname"] for a in alerts}

    def told(self, status: str, alertname: str) -> list[dict[str, Any]]:
        """The notifications of one status with an alert of this name."""
        return [
            body
            for _, body in self.receiver.notifications
            if body["status"] == status
            and any(alert["labels"]["alertname"] == alertname for alert in body["alerts"])
        ]

    def wait_until(
        self, condition: Callable[[], object], what: str, logs: Sequence[Path], seconds: float = 40
    ) -> None:
        """Wait; fails with what every process has said."""
        deadline = time.monotonic() + seconds
        ended = False
        while not (ended or condition()):
            ended = any(p.process.poll() is not None for p in self.processes)
            if ended or time.monotonic() > deadline:
                logs = [*logs, *(p.log for p in self.processes)]
                said = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)
                got = json.dumps(self.receiver.notifications, indent=1)[-4000:]
                raise AssertionError(f"not within {seconds:g} s: {what}\n{said}\n--- told\n{got}")
            time.sleep(0.1)


@contextmanager
def chain(folder: Path, target: str) -> Iterator[Chain]:
    """Run the chain for what listens on `target`; all of it has ended afterwards."""
    with ExitStack() as stack:
        yield Chain(folder, target, stack)
