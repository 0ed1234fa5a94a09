"""What the service answers over HTTP: metrics, and whether it is alive and ready.

/            the page (stream/web.py) for browsers, these lines as text for others
/api/...     what the page shows, as JSON
/metrics     Prometheus text or OpenMetrics, as the client accepts; gzip where it may
/-/healthy   200 while the loop goes round, else 503 and why
/-/ready     200 once assigned, primed and compiled, else 503 and why
/-/reload    POST reads the settings and the bundle again, where that is enabled

Where a user or a client certificate is asked for, all of these ask for it.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from time import monotonic
from typing import Any, NamedTuple, Protocol, Self
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, make_wsgi_app

from stream.config import parse_listen
from stream.errors import StreamError

# Twice the 60 s for which kafka-python blocks at most while a broker is away: such a loop is
# waiting as it should, and restarting it would not help.
STALLED_AFTER_S = 120.0
# A scraper that stops in the middle of a request must not hold its thread for ever.
_SOCKET_TIMEOUT_S = 30.0

_TEXT = "text/plain; charset=utf-8"
_INDEX = """tsdiff
/metrics    metrics for Prometheus
/-/healthy  200 while the service works or waits for readings
/-/ready    200 once it has partitions, their recent past and a compiled model
"""
_NO_RELOAD = "reloading is not enabled; set metrics.reload, or send SIGHUP\n"
_RELOADING = "asked for; tsdiff_config_last_reload_successful and the log tell how it went\n"


class Answer(NamedTuple):
    """One answer, as it is sent."""

    status: HTTPStatus
    headers: list[tuple[str, str]]
    body: bytes


class Site(Protocol):
    """The page, as this server knows it (`stream.web.Page`)."""

    index: str
    """Lines about it for the text index."""

    def answer(self, path: str, query: str, encodings: str, known: str) -> Answer | None:
        """Answer a GET; `None` where nothing of it is.

        `encodings` are those that the client takes, `known` the ETag that it has.
        """


class Health:
    """Whether the service is alive and ready; the loop tells it, HTTP threads ask.

    Args:
        stalled_after_s: seconds without a beat after which the loop counts as stuck.
        clock: time in seconds; only differences are used.

    """

    def __init__(
        self,
        *,
        stalled_after_s: float = STALLED_AFTER_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._stalled_after_s = stalled_after_s
        self._clock = clock
        self._lock = threading.Lock()
        self._beat_at = clock()
        self._not_ready: str | None = "starting"

    def beat(self) -> None:
        """Tell that the loop went round, with readings or without."""
        with self._lock:
            self._beat_at = self._clock()

    def set_ready(self, reason: str | None) -> None:
        """Tell why the service is not ready, or None once it is."""
        with self._lock:
            self._not_ready = reason

    def unhealthy(self) -> str | None:
        """Say why the service is not healthy; None while it is."""
        with self._lock:
            silent_s = self._clock() - self._beat_at
        if silent_s <= self._stalled_after_s:
            return None
        return (
            f"the loop has not gone round for {silent_s:.0f} s; "
            f"expected at least every {self._stalled_after_s:.0f} s"
        )

    def unready(self) -> str | None:
        """Say why the service is not ready; None once it is."""
        with self._lock:
            return self._not_ready


@dataclass(frozen=True)
class Guard:
    """Who is answered; by default, everybody."""

    tls: ssl.SSLContext | None = None
    user: str | None = None
    password: str = field(default="", repr=False)

    @property
    def open(self) -> bool:
        """Whether nobody has to show who he is."""
        asks = self.tls is not None and self.tls.verify_mode == ssl.CERT_REQUIRED
        return self.user is None and not asks

    def admits(self, authorization: str) -> bool:
        """Whether this Authorization header is that of the user, in the same time for any."""
        if self.user is None:
            return True
        scheme, _, given = authorization.partition(" ")
        try:
            shown = base64.b64decode(given.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        # Hashes are of one length, whatever was sent.
        right = hashlib.sha256(f"{self.user}:{self.password}".encode()).digest()
        same = hmac.compare_digest(hashlib.sha256(shown).digest(), right)
        return same and scheme.lower() == "basic"


def exposed(address: str, guard: Guard) -> bool:
    """Whether what listens on this IP address answers anybody on other machines."""
    return guard.open and not ipaddress.ip_address(address).is_loopback


class MetricsServer:
    """The HTTP server; it listens as soon as it is made and answers once it is started.

    Args:
        listen: "host:port"; port 0 takes a free one.
        registry: what /metrics shows.
        health: what /-/healthy and /-/ready show.
        guard: who is answered.
        reload: what a POST to /-/reload calls; None where that is not enabled.
        site: the page at / and its parts; None where it is off.

    Raises:
        ConfigError: `listen` is not of that form.
        StreamError: the address cannot be listened on.

    """

    def __init__(
        self,
        listen: str,
        registry: CollectorRegistry,
        health: Health,
        guard: Guard | None = None,
        reload: Callable[[], None] | None = None,
        site: Site | None = None,
    ) -> None:
        host, port = parse_listen(listen)
        self._guard = guard or Guard()
        bound: dict[str, Any] = {"health": health, "guard": self._guard, "site": site}
        handler = type("_BoundHandler", (_Handler,), bound)
        handler.reload = staticmethod(reload) if reload else None  # type: ignore[attr-defined]
        handler.metrics = staticmethod(make_wsgi_app(registry))  # type: ignore[attr-defined]
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            # The class holds the family, and TCPServer makes its socket from it.
            made = {"address_family": family, "tls": self._guard.tls}
            server = type("_Server", (_Server,), made)
            self._server: ThreadingHTTPServer = server(address, handler)
        except OSError as error:
            raise StreamError(
                f"expected to listen on {listen} for metrics, got: {error.strerror or error}; "
                "set metrics.listen to a free host:port, or to nothing for no metrics"
            ) from None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port listened on, which is of interest when 0 was asked for."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Where the server answers, without a path."""
        host, scheme = self._host, "http" if self._guard.tls is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def exposed(self) -> bool:
        """Whether other machines may ask, and nobody has to show who he is."""
        return exposed(self._host, self._guard)

    @property
    def _host(self) -> str:
        return str(self._server.server_address[0])

    def start(self) -> Self:
        """Answer from now on, in threads of its own."""
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            # How long close() may take, at the most.
            kwargs={"poll_interval": 0.1},
            name="tsdiff-http",
            daemon=True,
        )
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop answering and free the port; to close twice does nothing."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()

    def __enter__(self) -> Self:
        return self if self._thread is not None else self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    tls: ssl.SSLContext | None = None
    daemon_threads = True
    # A scrape that hangs must not keep the service from ending.
    block_on_close = False

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            # "[::]" is meant to be every address, IPv4 as well.
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # HTTPServer's own asks the resolver for the host's full name, and may wait long for it.
        TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])

    def finish_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Answer, on the request's own thread; so a slow TLS handshake holds up nobody else."""
        if self.tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(_SOCKET_TIMEOUT_S)
        with self.tls.wrap_socket(request, server_side=True) as encrypted:
            super().finish_request(encrypted, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Say nothing: the client went away, and its next request will tell."""


class _Handler(BaseHTTPRequestHandler):
    health: Health
    guard: Guard
    site: Site | None
    reload: Callable[[], None] | None
    metrics: Callable[..., list[bytes]]
    timeout = _SOCKET_TIMEOUT_S
    server_version = "tsdiff"
    sys_version = ""

    def do_GET(self) -> None:
        if not self._admitted():
            return
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        if path == "/metrics":
            self._answer_metrics(query)
        elif path == "/-/healthy":
            self._answer_state("healthy", self.health.unhealthy())
        elif path == "/-/ready":
            self._answer_state("ready", self.health.unready())
        elif path == "/-/reload":
            text = _NO_RELOAD if self.reload is None else "expected POST\n"
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, text)
        elif (answer := self._page(path, query)) is not None:
            self._send(*answer)
        elif path == "/":
            self._answer(HTTPStatus.OK, self._index())
        else:
            self._answer(HTTPStatus.NOT_FOUND, f"nothing here\n\n{self._index()}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if not self._admitted():
            return
        if urlsplit(self.path).path == "/-/reload":
            if self.reload is None:
                self._answer(HTTPStatus.NOT_FOUND, _NO_RELOAD)
            else:
                self.reload()
                self._answer(HTTPStatus.ACCEPTED, _RELOADING)
        else:
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "expected GET\n")

    do_PUT = do_POST

    def _index(self) -> str:
        return _INDEX + (self.site.index if self.site is not None else "")

    def _page(self, path: str, query: str) -> Answer | None:
        # Whoever does not ask for HTML, as curl, is better served with text.
        if self.site is None or (
            path == "/" and "text/html" not in self.headers.get("Accept", "").lower()
        ):
            return None
        encodings = self.headers.get("Accept-Encoding", "")
        return self.site.answer(path, query, encodings, self.headers.get("If-None-Match", ""))

    def _admitted(self) -> bool:
        if self.guard.admits(self.headers.get("Authorization", "")):
            return True
        self._answer(HTTPStatus.UNAUTHORIZED, "expected the user and password of metrics\n")
        return False

    def _answer_state(self, state: str, reason: str | None) -> None:
        if reason is None:
            self._answer(HTTPStatus.OK, f"{state}\n")
        else:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"not {state}: {reason}\n")

    def _answer_metrics(self, query: str) -> None:
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/metrics",
            "QUERY_STRING": query,
            "HTTP_ACCEPT": self.headers.get("Accept", ""),
            "HTTP_ACCEPT_ENCODING": self.headers.get("Accept-Encoding", ""),
        }
        answer: list[tuple[str, list[tuple[str, str]]]] = []
        try:
            body = b"".join(self.metrics(environ, lambda *status: answer.append(status)))
        except Exception as error:  # a broken collector must show, not look like a dead network
            problem = f"could not collect the metrics: {type(error).__name__}: {error}\n"
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, problem)
            return
        status, headers = answer[0]
        self._send(HTTPStatus(int(status.split()[0])), headers, body)

    def _answer(self, status: HTTPStatus, text: str) -> None:
        headers = [("Content-Type", _TEXT)]
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            reload = "POST" if self.reload is not None else ""
            headers.append(("Allow", reload if "reload" in self.path else "GET, HEAD"))
        elif status == HTTPStatus.UNAUTHORIZED:
            headers.append(("WWW-Authenticate", 'Basic realm="tsdiff", charset="UTF-8"'))
        self._send(status, headers, text.encode())

    def _send(self, status: HTTPStatus, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write no access log: a line for each scrape would bury what matters."""
