"""Scores to a Prometheus, or what speaks its protocol, by remote write 1.0.

Batches go one after the other, so that every series arrives in the order of time. What a server
may take later (5xx, 429, no connection) is sent again after a pause; all else ends the run.
"""

import base64
import http.client
import re
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import structlog

from stream.codec import rfc3339
from stream.errors import StreamError
from stream.records import SlotScore
from stream.series import (
    Points,
    SeriesBuffer,
    SeriesKey,
    entity_samples,
    key_of,
    labels_of,
)
from stream.sinks import Round
from tsdiff.errors import ConfigError

try:
    import cramjam
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
except ImportError as error:
    raise StreamError(
        f"expected the package {(error.name or 'protobuf').partition('.')[0]} for --remote-write, "
        "it is not installed; pip install 'tsdiff[prometheus]'"
    ) from error

_log = structlog.get_logger("tsdiff.remote_write")

BATCH_BYTES: Final = 1024 * 1024
"""Of a request before compression, about; servers refuse what is much larger."""
REQUEST_TIMEOUT_S: Final = 30.0
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
PATIENCE_S: Final = 300.0
"""A batch that nobody takes for so long ends the run: as long as Prometheus may need to restart."""

STALE: Final[float] = struct.unpack("<d", struct.pack("<Q", 0x7FF0000000000002))[0]
"""The NaN by which Prometheus knows that a series has ended; otherwise it lasts for 5 minutes."""

_HEADERS: Final = {
    "Content-Encoding": "snappy",
    "Content-Type": "application/x-protobuf",
    "User-Agent": "tsdiff",
    "X-Prometheus-Remote-Write-Version": "0.1.0",
}
# What Prometheus says of samples that are older than what it takes.
_TOO_OLD: Final = re.compile(r"out of bounds|out of order|too old", re.IGNORECASE)


# -- the message -----------------------------------------------------------------------------------


def _write_request() -> Any:  # noqa: ANN401 - a class made at run time
    """Make the class of `prometheus.WriteRequest`, as far as it is needed here."""
    kinds = descriptor_pb2.FieldDescriptorProto
    one, many = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED
    fields: dict[str, list[tuple[str, int, Any, Any, str | None]]] = {
        "Label": [
            ("name", 1, kinds.TYPE_STRING, one, None),
            ("value", 2, kinds.TYPE_STRING, one, None),
        ],
        "Sample": [
            ("value", 1, kinds.TYPE_DOUBLE, one, None),
            ("timestamp", 2, kinds.TYPE_INT64, one, None),
        ],
        "TimeSeries": [
            ("labels", 1, kinds.TYPE_MESSAGE, many, "Label"),
            ("samples", 2, kinds.TYPE_MESSAGE, many, "Sample"),
        ],
        "WriteRequest": [("timeseries", 1, kinds.TYPE_MESSAGE, many, "TimeSeries")],
    }
    file = descriptor_pb2.FileDescriptorProto(
        name="tsdiff/remote_write.proto", package="prometheus", syntax="proto3"
    )
    for message, members in fields.items():
        described = file.message_type.add(name=message)
        for name, number, kind, label, of in members:
            described.field.add(
                name=name,
                number=number,
                type=kind,
                label=label,
                type_name=of and f".prometheus.{of}",
            )
    # A pool of its own: others may have Prometheus' messages in the common one.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName("prometheus.WriteRequest")
    return message_factory.GetMessageClass(found)


WriteRequest: Final = _write_request()


def encode(series: Mapping[SeriesKey, Points], labels: Mapping[str, str]) -> bytes:
    """Series as the body of a request: a WriteRequest, compressed."""
    request = WriteRequest()
    for key, points in series.items():
        one = request.timeseries.add()
        for name, text in _sorted_labels(key, labels):
            one.labels.add(name=name, value=text)
        for timestamp_ms, value in zip(*points, strict=True):
            one.samples.add(value=value, timestamp=timestamp_ms)
    return bytes(cramjam.snappy.compress_raw(request.SerializeToString()))


def _sorted_labels(key: SeriesKey, labels: Mapping[str, str]) -> list[tuple[str, str]]:
    """Sorted by name, none empty, as the protocol wants them."""
    pairs = [("__name__", key[0]), *labels_of(key, labels)]
    return sorted(pair for pair in pairs if pair[1])


# -- the server ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """Where to write, and what to show there.

    Raises:
        ConfigError: no http(s) URL, a password in it, or two ways to show who we are.

    """

    url: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:  # A port that is no number, or half an IPv6 address.
            usable = False
        if not usable:
            raise ConfigError(
                "expected --remote-write as http://HOST:PORT/api/v1/write or https://..., "
                f"got {self.url!r}"
            )
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                "expected --remote-write without a user or password in it, which all users of the "
                "machine would see; give --remote-write-user and --remote-write-password-file"
            )
        if (self.user is None) != (self.password is None):
            raise ConfigError(
                "expected --remote-write-user and --remote-write-password-file together, got one"
            )
        if self.user is not None and self.token is not None:
            raise ConfigError("expected --remote-write-user or --remote-write-token-file, got both")

    def headers(self) -> dict[str, str]:
        """What every request says, beside its body."""
        if self.user is not None:
            pair = base64.b64encode(f"{self.user}:{self.password}".encode()).decode("ascii")
            return {**_HEADERS, "Authorization": f"Basic {pair}"}
        if self.token is not None:
            return {**_HEADERS, "Authorization": f"Bearer {self.token}"}
        return dict(_HEADERS)


class Answer(NamedTuple):
    """What came of a request; `status` is None where nobody answered."""

    status: int | None
    said: str
    wait_s: float = 0.0
    """How long the server asks to wait (Retry-After)."""

    @property
    def passing(self) -> bool:
        """Whether the same request may be taken later."""
        return self.status is None or self.status == 429 or 500 <= self.status < 600


class Client:
    """Sends one request after the other over one connection, as long as it lasts."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._endpoint = endpoint
        self._headers = endpoint.headers()
        parts = urlsplit(endpoint.url)
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        host, port = str(parts.hostname), parts.port
        self._connection = (
            http.client.HTTPSConnection(host, port, timeout=REQUEST_TIMEOUT_S, context=endpoint.tls)
            if parts.scheme == "https"
            else http.client.HTTPConnection(host, port, timeout=REQUEST_TIMEOUT_S)
        )
        self._patience_s = patience_s
        self._clock = clock
        self._sleep = sleep
        self._answered = False

    def send(self, body: bytes) -> None:
        """Send until it is taken.

        Raises:
            StreamError: it was refused, or nobody took it for too long.

        """
        until = self._clock() + self._patience_s
        pause_s = FIRST_PAUSE_S
        while True:
            answer = self._post(body)
            self._answered |= answer.status is not None
            if answer.status is not None and 200 <= answer.status < 300:
                return
            if not answer.passing:
                raise StreamError(_refused(self._endpoint.url, answer))
            if not self._answered:
                # It never did: more likely a wrong address than a restart.
                raise StreamError(
                    f"expected a server at {self._endpoint.url}, got {answer.said}; start it, or "
                    "mend --remote-write"
                )
            wait_s = max(pause_s, answer.wait_s)
            if self._clock() + wait_s > until:
                raise StreamError(
                    f"expected {self._endpoint.url} to take a batch within {self._patience_s:g} s, "
                    f"got {_shown(answer)}"
                    + (f" and to wait for {answer.wait_s:g} s" if answer.wait_s else "")
                )
            _log.warning(
                "remote write is tried again", after_seconds=wait_s, because=_shown(answer)
            )
            self._sleep(wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _post(self, body: bytes) -> Answer:
        # A connection that was idle for a while may have been closed: that says nothing.
        reused = self._connection.sock is not None
        try:
            return self._request(body)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            if not reused:
                return Answer(None, _why(error))
        return self._post(body)

    def _request(self, body: bytes) -> Answer:
        self._connection.request("POST", self._path, body, self._headers)
        with self._connection.getresponse() as response:
            said = response.read(64 * 1024)
            if not response.isclosed():
                self._connection.close()  # The rest of a long answer is in the way.
            return Answer(
                response.status, _one_line(said), _seconds(response.headers["Retry-After"])
            )

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()


def _why(error: OSError | http.client.HTTPException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def _one_line(body: bytes) -> str:
    text = " ".join(body.decode("utf-8", "replace").split())
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable if len(printable) <= 300 else printable[:297] + "..."


def _seconds(retry_after: str | None) -> float:
    """Seconds that a Retry-After asks for, given as such or as a date; 0 where it is neither."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after)
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    return 0.0


def _shown(answer: Answer) -> str:
    if answer.status is None:
        return answer.said
    return f"{answer.status} {answer.said or http.client.responses.get(answer.status, '')}".strip()


def _refused(url: str, answer: Answer) -> str:
    if _TOO_OLD.search(answer.said):
        mend = (
            "it takes what is older than its newest samples only with "
            "storage.tsdb.out_of_order_time_window in its configuration, or from --openmetrics"
        )
    elif answer.status in {401, 403}:
        mend = "give --remote-write-user and --remote-write-password-file, or ...-token-file"
    elif answer.status in {404, 405}:
        mend = (
            "name the path that takes remote write, and start Prometheus with "
            "--web.enable-remote-write-receiver"
        )
    elif answer.status is not None and 300 <= answer.status < 400:
        mend = "redirects are not followed: name the place itself"
    else:
        mend = "nothing of that request was repeated"
    return f"{url} refuses what it is sent: {_shown(answer)}; {mend}"


# -- the sink --------------------------------------------------------------------------------------


class RemoteWriteSink:
    """Scores to a server, in batches of bounded size; what it took stays there, whatever follows.

    Args:
        client: takes the requests.
        labels: what is added to every series.
        top_channels: channels told for each slot, those that contribute most.
        batch_bytes: size of a batch before compression, about.

    """

    def __init__(
        self,
        client: Client,
        labels: Mapping[str, str],
        *,
        top_channels: int,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        self._client = client
        self._labels = labels
        self._top_channels = top_channels
        self._batch_bytes = batch_bytes
        self._buffer = SeriesBuffer()
        self._reached_ms: int | None = None
        """Time of the oldest slot that may not all be there; None before the first one."""
        self._last: dict[str, set[SeriesKey]] = {}
        """Series of each entity in its last slot."""
        self.sent = 0
        """Samples that the server took."""

    def commit(self, round_: Round, generation: Any) -> None:  # noqa: ANN401 - opaque token
        """Send the scores of a round, but for a last batch that may still grow."""
        # By time, so that all before some slot is there when the run ends early.
        for score in sorted(round_.scores, key=lambda score: score.timestamp_ms):
            if not self._buffer.samples:
                self._reached_ms = score.timestamp_ms
            for key, value in self._samples(score):
                self._buffer.add(key, score.timestamp_ms, value)
            if self._buffer.bytes >= self._batch_bytes:
                self._flush()

    def _samples(self, score: SlotScore) -> Iterable[tuple[SeriesKey, float]]:
        """The samples of a slot, and the ends of the series that the slot before had."""
        samples = {
            key_of(sample): sample.value for sample in entity_samples(score, self._top_channels)
        }
        for key in self._last.get(score.entity, set()) - samples.keys():
            yield key, STALE
        self._last[score.entity] = set(samples)
        yield from samples.items()

    def _flush(self) -> None:
        if self._buffer.samples:
            self._client.send(encode(self._buffer.series, self._labels))
            self.sent += self._buffer.samples
        self._buffer.clear()

    def told(self) -> str:
        """Say how far it came, when the run ended early, and how to go on there."""
        if not self.sent or self._reached_ms is None:
            return "nothing was sent"
        at = rfc3339(self._reached_ms)
        return f"{self.sent} samples were sent, all of the slots before {at}; --since {at} goes on"

    def reset(self) -> None:
        """Nothing can have failed that would be tried again."""

    def close(self) -> None:
        """Send what is left."""
        self._flush()
        self._client.close()

    def abandon(self) -> None:
        """Let go; what was sent cannot be taken back."""
        self._client.close()
