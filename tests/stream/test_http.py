"""The service's HTTP answers, asked for over real sockets."""

import gzip
import http.client
import socket
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import Metric

from stream.errors import StreamError
from stream.http import Health, MetricsServer
from tsdiff.errors import ConfigError


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def health(clock: _Clock) -> Health:
    return Health(stalled_after_s=60, clock=clock)


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("tsdiff_readings_total", "Readings.", registry=registry).inc(3)
    return registry


@pytest.fixture
def server(registry: CollectorRegistry, health: Health) -> Iterator[MetricsServer]:
    with MetricsServer("127.0.0.1:0", registry, health) as server:
        yield server


def ask(
    server: MetricsServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    host = "::1" if "[" in server.url else "127.0.0.1"
    connection = http.client.HTTPConnection(host, server.port, timeout=10)
    try:
        connection.request(
            method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_metrics_as_prometheus_text(server: MetricsServer) -> None:
    status, headers, body = ask(server, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert b"tsdiff_readings_total 3.0\n" in body
    assert int(headers["Content-Length"]) == len(body)


def test_metrics_as_openmetrics_where_it_is_accepted(server: MetricsServer) -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    status, headers, body = ask(server, "/metrics", Accept=accept)
    assert status == 200
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")


def test_metrics_are_compressed_where_it_is_accepted(server: MetricsServer) -> None:
    _, headers, body = ask(server, "/metrics", Accept_Encoding="gzip")
    assert headers["Content-Encoding"] == "gzip"
    assert b"tsdiff_readings_total" in gzip.decompress(body)


def test_some_metrics_only(server: MetricsServer) -> None:
    _, _, body = ask(server, "/metrics?name[]=nothing_of_ours")
    assert body == b""


def test_head_has_no_body(server: MetricsServer) -> None:
    status, headers, body = ask(server, "/metrics", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0


def test_a_broken_collector_says_so(registry: CollectorRegistry, server: MetricsServer) -> None:
    class Broken:
        def describe(self) -> list[Metric]:
            return []

        def collect(self) -> list[Metric]:
            raise ValueError("no such thing")

    registry.register(Broken())
    status, _, body = ask(server, "/metrics")
    assert status == 500
    assert body == b"could not collect the metrics: ValueError: no such thing\n"


def test_healthy_while_the_loop_goes_round(
    server: MetricsServer, health: Health, clock: _Clock
) -> None:
    assert ask(server, "/-/healthy")[0] == 200
    clock.now = 61
    status, _, body = ask(server, "/-/healthy")
    assert status == 503
    assert body == (
        b"not healthy: the loop has not gone round for 61 s; expected at least every 60 s\n"
    )
    health.beat()
    assert ask(server, "/-/healthy")[::2] == (200, b"healthy\n")


def test_ready_says_what_is_waited_for(server: MetricsServer, health: Health) -> None:
    assert ask(server, "/-/ready")[::2] == (503, b"not ready: starting\n")
    health.set_ready("no partition is assigned yet")
    assert ask(server, "/-/ready")[::2] == (503, b"not ready: no partition is assigned yet\n")
    health.set_ready(None)
    assert ask(server, "/-/ready")[::2] == (200, b"ready\n")


def test_reload_is_not_enabled(server: MetricsServer) -> None:
    for method, expected in (("POST", 404), ("PUT", 404), ("GET", 405)):
        status, _, body = ask(server, "/-/reload", method)
        assert status == expected
        assert b"reloading is not enabled" in body


def test_the_index_names_the_pages_and_nothing_else_is_there(server: MetricsServer) -> None:
    status, headers, body = ask(server, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    for path in (b"/metrics", b"/-/healthy", b"/-/ready"):
        assert path in body
    assert ask(server, "/favicon.ico")[0] == 404
    status, headers, _ = ask(server, "/metrics", "POST")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_the_server_header_names_no_versions(server: MetricsServer) -> None:
    assert ask(server, "/")[1]["Server"].strip() == "tsdiff"


def test_nothing_is_written_to_the_terminal(
    server: MetricsServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(server, "/")
    ask(server, "/nowhere")
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(b"nonsense\r\n\r\n")
        client.recv(100)
    assert capfd.readouterr() == ("", "")


def test_ipv6(registry: CollectorRegistry, health: Health) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with MetricsServer("[::1]:0", registry, health) as server:
        assert server.url == f"http://[::1]:{server.port}"
        assert ask(server, "/")[0] == 200


def test_a_port_that_is_taken_is_one_line(
    server: MetricsServer, registry: CollectorRegistry, health: Health
) -> None:
    with pytest.raises(StreamError) as caught:
        MetricsServer(f"127.0.0.1:{server.port}", registry, health)
    text = str(caught.value)
    assert text.startswith(f"expected to listen on 127.0.0.1:{server.port} for metrics, got: Addr")
    assert "set metrics.listen" in text
    assert "\n" not in text


def test_a_host_that_is_not_ours_is_one_line(registry: CollectorRegistry, health: Health) -> None:
    with pytest.raises(StreamError, match=r"expected to listen on 192\.0\.2\.1:0"):
        MetricsServer("192.0.2.1:0", registry, health)
    with pytest.raises(ConfigError, match="expected an address to listen on"):
        MetricsServer("9464", registry, health)


def test_closing_frees_the_port_and_ends_the_thread(
    registry: CollectorRegistry, health: Health
) -> None:
    server = MetricsServer("127.0.0.1:0", registry, health).start()
    port = server.port
    assert "tsdiff-http" in {thread.name for thread in threading.enumerate()}
    assert ask(server, "/")[0] == 200
    server.close()
    server.close()
    assert "tsdiff-http" not in {thread.name for thread in threading.enumerate()}
    with MetricsServer(f"127.0.0.1:{port}", registry, health) as again:
        assert again.port == port


def test_a_server_never_started_can_be_closed(registry: CollectorRegistry, health: Health) -> None:
    MetricsServer("127.0.0.1:0", registry, health).close()
