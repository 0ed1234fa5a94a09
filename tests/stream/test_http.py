"""The service's HTTP answers, asked for over real sockets."""

import base64
import contextlib
import gzip
import http.client
import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import Metric

from stream.config import load_config
from stream.errors import StreamError
from stream.http import Guard, Health, MetricsServer, exposed
from stream.tls import client_context, server_context
from tests.conftest import Certificates
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


def test_a_reload_is_asked_for_where_it_is_enabled(
    registry: CollectorRegistry, health: Health
) -> None:
    asked: list[bool] = []
    with MetricsServer(
        "127.0.0.1:0", registry, health, reload=lambda: asked.append(True)
    ) as server:
        status, headers, _ = ask(server, "/-/reload")
        assert (status, headers["Allow"], asked) == (405, "POST", [])
        status, _, body = ask(server, "/-/reload", "POST")
        assert (status, asked) == (202, [True])
        assert b"tsdiff_config_last_reload_successful" in body
    guard = Guard(user="u", password=WORD)
    with MetricsServer(
        "127.0.0.1:0", registry, health, guard, lambda: asked.append(True)
    ) as server:
        assert ask(server, "/-/reload", "POST")[0] == 401
    assert asked == [True]


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


WORD = "hunter2"


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def locked(registry: CollectorRegistry, health: Health) -> Iterator[MetricsServer]:
    guard = Guard(user="prometheus", password=WORD)
    with MetricsServer("127.0.0.1:0", registry, health, guard) as server:
        yield server


def test_a_password_opens_every_page(locked: MetricsServer) -> None:
    right = basic("prometheus", WORD)
    for path, status in (("/metrics", 200), ("/-/healthy", 200), ("/-/ready", 503), ("/", 200)):
        assert ask(locked, path, Authorization=right)[0] == status
    assert ask(locked, "/metrics", Authorization=right.replace("Basic", "basic"))[0] == 200


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Basic",
        "Basic !!!",
        basic("prometheus", "wrong"),
        basic("somebody", WORD),
        basic("prometheus", ""),
        basic("prometheus", WORD).replace("Basic", "Bearer"),
        "Basic " + "A" * 10_000,
    ],
)
def test_without_the_password_nothing_is_told(locked: MetricsServer, authorization: str) -> None:
    for path in ("/metrics", "/-/healthy", "/-/ready", "/", "/nowhere"):
        for method in ("GET", "HEAD", "POST"):
            status, headers, body = ask(locked, path, method, Authorization=authorization)
            assert status == 401
            assert headers["WWW-Authenticate"].startswith("Basic ")
            assert b"readings" not in body


def test_the_guard_does_not_show_its_password() -> None:
    assert WORD not in repr(Guard(user="prometheus", password=WORD))


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("192.0.2.1", False)],  # noqa: S104 - not listened on
)
def test_only_a_port_that_others_reach_and_nobody_guards_is_exposed(
    address: str, loopback: bool, certificates: Certificates
) -> None:
    server, key = certificates.certificate("server"), certificates.key("server")
    plain, mutual = (server_context("metrics", server, key, ca) for ca in (None, certificates.ca))
    assert exposed(address, Guard()) is not loopback
    assert exposed(address, Guard(plain)) is not loopback
    assert not exposed(address, Guard(user="u", password=WORD))
    assert not exposed(address, Guard(mutual))


def fetch(server: MetricsServer, context: ssl.SSLContext) -> bytes:
    url = f"{server.url}/metrics"
    with urllib.request.urlopen(url, timeout=10, context=context) as answer:  # noqa: S310 - ours
        return bytes(answer.read())


def test_metrics_over_tls(
    registry: CollectorRegistry, health: Health, certificates: Certificates
) -> None:
    tls = server_context(
        "metrics", certificates.certificate("server"), certificates.key("server"), None
    )
    with MetricsServer("127.0.0.1:0", registry, health, Guard(tls)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=certificates.ca)
        assert b"tsdiff_readings_total 3.0" in fetch(server, trusting)
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch(server, ssl.create_default_context(cafile=certificates.other_ca))
        # Neither who speaks no TLS nor who says nothing at all holds up the others.
        with socket.create_connection(("127.0.0.1", server.port)) as silent:
            with socket.create_connection(("127.0.0.1", server.port)) as plain:
                plain.settimeout(10)
                plain.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                with contextlib.suppress(ConnectionResetError):
                    assert b"tsdiff" not in plain.recv(1000)
            assert b"tsdiff_readings_total 3.0" in fetch(server, trusting)
            silent.close()


def test_only_who_shows_a_certificate_is_answered(
    registry: CollectorRegistry, health: Health, certificates: Certificates
) -> None:
    tls = server_context(
        "metrics", certificates.certificate("server"), certificates.key("server"), certificates.ca
    )
    with MetricsServer("127.0.0.1:0", registry, health, Guard(tls)) as server:
        context = ssl.create_default_context(cafile=certificates.ca)
        with pytest.raises(OSError):
            fetch(server, context)
        context.load_cert_chain(certificates.certificate("client"), certificates.key("client"))
        assert b"tsdiff_readings_total 3.0" in fetch(server, context)


def test_certificates_that_cannot_be_used_are_named(
    certificates: Certificates, tmp_path: Path
) -> None:
    server, key = certificates.certificate("server"), certificates.key("server")
    with pytest.raises(ConfigError, match=r"metrics.tls_certfile and tls_keyfile: expected a cert"):
        server_context("metrics", tmp_path / "none", key, None)
    with pytest.raises(ConfigError, match="key values mismatch"):
        server_context("metrics", server, certificates.key("client"), None)
    with pytest.raises(ConfigError, match=r"metrics.tls_client_cafile: expected certificates"):
        server_context("metrics", server, key, key)
    with pytest.raises(ConfigError, match=r"input.security.ssl_cafile: .*No such file"):
        client_context("input.security", tmp_path / "none", None, None)
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:x"]
    subprocess.run([*command, "-out", str(locked)], check=True, capture_output=True)
    with pytest.raises(ConfigError, match="the key has a passphrase; write it without one"):
        client_context("input.security", None, server, locked)


def test_an_open_port_is_warned_of(
    registry: CollectorRegistry, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stream.compose import _listening

    settings = {"model.path": "b", "input.topic": "t", "metrics.listen": "127.0.0.1:0"}
    for anybody in (False, True):
        # As if on another address: nothing of this machine is shown.
        monkeypatch.setattr("stream.http.exposed", lambda *_, anybody=anybody: anybody)
        with (
            structlog.testing.capture_logs() as said,
            _listening(load_config(None, settings), registry, health),
        ):
            warnings = [entry for entry in said if entry["log_level"] == "warning"]
        assert len(warnings) == anybody
        assert all("it asks for no password (metrics.username)" in w["event"] for w in warnings)
