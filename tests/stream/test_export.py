"""History for Prometheus: OpenMetrics through real promtool, and remote write to a real server."""

import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cramjam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser

from stream import remote_write
from stream.backfill import HEAD_MS, BackfillSummary, Output, Span, backfill, parse_moment_ms
from stream.compose import Model, load_model
from stream.config import ServiceConfig, load_config
from stream.errors import StreamError
from stream.openmetrics import OpenMetricsSink
from stream.records import STATES, ChannelScore, ChannelState, SlotScore
from stream.remote_write import Client, Endpoint, RemoteWriteSink, WriteRequest
from stream.series import entity_samples, external_labels
from stream.sinks import Round
from tests.conftest import Certificates, free_port
from tests.prometheus_server import PrometheusServer, points, scraping
from tests.stream.conftest import SmallBundle
from tsdiff import cli
from tsdiff.detector import HISTORY_SHAPES
from tsdiff.errors import ConfigError
from tsdiff.history import EntityHistory, History

PERIOD_MS = 60_000
SLOTS = 300
KEEP = "--storage.tsdb.retention.time=10y"
RECEIVE = "--web.enable-remote-write-receiver"
LABELS = {"job": "tsdiff"}


def config(**settings: object) -> ServiceConfig:
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return load_config(None, {"model.path": "b", "input.topic": "t", **given})


@pytest.fixture(scope="module")
def model(small_bundle: SmallBundle) -> Model:
    return load_model(small_bundle.path, HISTORY_SHAPES)


@pytest.fixture(scope="module")
def history(small_bundle: SmallBundle) -> History:
    """Five hours of three servers, of months ago; a channel dies on the way."""
    entities = []
    for number, entity in enumerate(small_bundle.live.entities[:3]):
        values = entity.values[:SLOTS].copy()
        if number == 1:
            values[100:200, 4] = np.nan
        entities.append(EntityHistory(entity.entity, entity.timestamps_ms[:SLOTS], values))
    return replace(small_bundle.live, entities=tuple(entities))


def ending(history: History, newest_ms: float) -> History:
    """The same readings, the last of which is in the slot of this moment."""
    last = max(int(e.timestamps_ms[-1]) for e in history.entities)
    shift = int((newest_ms - last) // PERIOD_MS * PERIOD_MS)
    entities = [replace(e, timestamps_ms=e.timestamps_ms + shift) for e in history.entities]
    return replace(history, entities=tuple(entities))


@pytest.fixture(scope="module")
def done(
    model: Model, history: History, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, BackfillSummary]:
    """A folder with `scores.parquet` and `scores.om` of one run."""
    folder = tmp_path_factory.mktemp("export")
    sink = OpenMetricsSink(folder / "scores.om", LABELS, top_channels=5)
    summary = backfill(
        history, model, config(), folder / "scores.parquet", others=[sink], span=Span()
    )
    assert {path.name for path in folder.iterdir()} == {"scores.parquet", "scores.om"}
    return folder, summary


def parse_openmetrics(text: str) -> list[Metric]:
    return list(parser.text_string_to_metric_families(text))  # type: ignore[no-untyped-call]


Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(done: tuple[Path, BackfillSummary]) -> Rows:
    found: Rows = pq.read_table(done[0] / "scores.parquet").to_pylist()
    assert any(row["faulty"] for row in found)
    return found


Series = dict[tuple[tuple[str, str], ...], dict[int, float]]


def expected_series(rows: Rows) -> dict[str, Series]:
    """What the Parquet file says, as the series that Prometheus is to hold: told independently."""
    found: dict[str, Series] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        at = round(row["timestamp"].timestamp() * 1000)

        def put(name: str, value: float | None, at: int = at, **labels: str) -> None:
            if value is not None:
                found[f"tsdiff_{name}"][tuple(sorted(labels.items()))][at] = float(value)

        entity = row["entity"]
        put("anomaly_score", row["anomaly_score"], entity=entity)
        put("alert_active", row["state"] in {"firing", "recovering"}, entity=entity)
        put("imputed_ratio", row["imputed_ratio"], entity=entity)
        put("score_timestamp_seconds", at / 1000, entity=entity)
        for state in STATES:
            put("entity_state", state == row["state"], entity=entity, state=state)
        for channel, state in row["faulty"]:
            put("channel_state", 1, entity=entity, channel=channel, state=state)
        told = sorted(row["channels"], key=lambda pair: -pair[1]["contribution"])[:5]
        for channel, values in told:
            put(
                "channel_contribution_ratio", values["contribution"], entity=entity, channel=channel
            )
            for name in ("expected", "lower", "upper", "observed"):
                put(f"channel_{name}", values[name], entity=entity, channel=channel)
    return found


def stored_series(
    server: PrometheusServer, name: str, rows: Rows, labels: Mapping[str, str]
) -> Series:
    """All samples of a metric that a server holds, as they were written; stale markers are none."""
    times = [row["timestamp"].timestamp() for row in rows]
    # A range selector of an instant query brings raw samples.
    span = int(max(times) - min(times)) + 60
    found: Series = {}
    for one in server.query(f"{name}[{span}s]", at=max(times)):
        metric = dict(one["metric"])
        assert metric.pop("__name__") == name
        assert {key: metric.pop(key) for key in labels} == labels
        found[tuple(sorted(metric.items()))] = {
            round(at * 1000): float(value) for at, value in points([one])
        }
    return found


@contextmanager
def prometheus(
    folder: Path,
    *options: str,
    scrape_itself: bool = False,
    storage: Mapping[str, Any] | None = None,
) -> Iterator[PrometheusServer]:
    port = free_port()
    targets = [f"127.0.0.1:{port}"] if scrape_itself else []
    server = PrometheusServer(folder, scraping(*targets, storage=storage), *options, port=port)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()


# -- OpenMetrics -----------------------------------------------------------------------------------


def test_blocks_made_of_the_file_answer_with_the_scores(
    done: tuple[Path, BackfillSummary], rows: Rows, tmp_path: Path, promtool: str
) -> None:
    command = ["tsdb", "create-blocks-from", "openmetrics"]
    made = subprocess.run(
        [promtool, *command, str(done[0] / "scores.om"), str(tmp_path / "tsdb")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    print(made.stdout)
    expected = expected_series(rows)
    assert len(expected) == 11
    with prometheus(tmp_path, KEEP) as server:
        for name, series in expected.items():
            assert stored_series(server, name, rows, LABELS) == series, name
        # And as a dashboard asks.
        calm = rows[len(rows) // 2]
        (answer,) = server.query(
            f'tsdiff_anomaly_score{{entity="{calm["entity"]}",job="tsdiff"}}',
            at=calm["timestamp"].timestamp() + 30,
        )
        assert float(answer["value"][1]) == calm["anomaly_score"]


def test_the_file_is_openmetrics_as_the_specification_has_it(
    done: tuple[Path, BackfillSummary], rows: Rows
) -> None:
    # This parser, unlike promtool, minds the order of families, series and times.
    families = parse_openmetrics((done[0] / "scores.om").read_text())
    expected = expected_series(rows)
    assert {family.name for family in families} == expected.keys()
    for family in families:
        assert family.type == "gauge"
        found: Series = defaultdict(dict)
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("job") == "tsdiff"
            assert sample.timestamp is not None
            moment = round(float(sample.timestamp) * 1000)
            found[tuple(sorted(labels.items()))][moment] = sample.value
        assert found == expected[family.name]


def score(entity: str, number: int, **changes: Any) -> SlotScore:  # noqa: ANN401
    channel = ChannelScore(0.5, 0.25, 0.125, 1.0, 1.0)
    stuck: dict[str, ChannelState] = {}
    fields = {"channels": {"cpu": channel}, "faulty": stuck, **changes}
    return SlotScore(entity, number * PERIOD_MS, 0.5, 0.5, "ok", 0.0, "m@0", **fields)


def write_all(sink: Output, rounds: Sequence[Sequence[SlotScore]]) -> None:
    for scores in rounds:
        sink.commit(Round(scores=scores), None)
    sink.close()


def test_what_does_not_fit_into_memory_is_merged_from_the_disk(tmp_path: Path) -> None:
    rounds = [
        [
            score(f"e{n % 7}", t, channels={f"c{t % 3}": ChannelScore(t, n, 0, 1, 0)})
            for n in range(7)
        ]
        for t in range(1, 60)
    ]
    for name, size in (("one", 10**9), ("many", 2_000)):
        write_all(OpenMetricsSink(tmp_path / name, {}, top_channels=2, run_bytes=size), rounds)
    text = (tmp_path / "one").read_text()
    assert (tmp_path / "many").read_text() == text
    assert len(parse_openmetrics(text)) == 10
    assert {path.name for path in tmp_path.iterdir()} == {"one", "many"}


def test_names_with_anything_in_them_are_escaped(tmp_path: Path) -> None:
    odd = 'a"b\\c\nd{e="f"} # µ'
    sink = OpenMetricsSink(tmp_path / "x.om", {"instance": odd}, top_channels=1)
    write_all(sink, [[score(odd, 1, channels={odd: ChannelScore(None, 1e-9, 1, 1e300, 1)})]])
    for family in parse_openmetrics((tmp_path / "x.om").read_text()):
        for sample in family.samples:
            assert sample.labels["entity"] == sample.labels["instance"] == odd
            assert sample.labels.get("channel", odd) == odd


def test_without_a_score_the_file_is_empty_and_valid(tmp_path: Path) -> None:
    write_all(OpenMetricsSink(tmp_path / "x.om", {}, top_channels=1), [])
    assert (tmp_path / "x.om").read_text() == "# EOF\n"


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, said in ((tmp_path, "got the folder"), (tmp_path / "file" / "x.om", "cannot write")):
        with pytest.raises(StreamError, match=said):
            OpenMetricsSink(path, {}, top_channels=1)


def test_a_run_that_fails_leaves_the_file_of_before(
    model: Model, history: History, tmp_path: Path
) -> None:
    path = tmp_path / "scores.om"
    path.write_text("of yesterday")
    sink = OpenMetricsSink(path, LABELS, top_channels=5)

    def fail(done: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backfill(history, model, config(), None, fail, others=[sink])
    assert path.read_text() == "of yesterday"
    assert list(tmp_path.iterdir()) == [path]


# -- which slots -----------------------------------------------------------------------------------


def test_a_span_is_a_part_of_the_whole(
    model: Model, history: History, rows: Rows, tmp_path: Path
) -> None:
    start = int(history.entities[0].timestamps_ms[0])
    span = Span(start + 40 * PERIOD_MS, start + 90 * PERIOD_MS + 1)
    summary = backfill(history, model, config(), tmp_path / "part.parquet", span=span)
    part = pq.read_table(tmp_path / "part.parquet").to_pylist()
    assert part == [r for r in rows if round(r["timestamp"].timestamp() * 1000) in span]
    assert summary.scores == len(part) == 3 * 51
    assert summary.warming == ()


def test_a_span_does_not_wait_for_what_is_beyond(
    model: Model, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    start = int(small_bundle.live.entities[0].timestamps_ms[0])
    span = Span(until_ms=start + 20 * PERIOD_MS)
    summary = backfill(small_bundle.live, model, config(), tmp_path / "x.parquet", span=span)
    total = sum(len(e.timestamps_ms) for e in small_bundle.live.entities)
    assert 0 < summary.readings < total


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-23T12:00:00Z", 1_795_435_200_000),
        ("2026-11-23T13:00:00.5+01:00", 1_795_435_200_500),
        ("2026-11-23", 1_795_392_000_000),
        ("1795435200", 1_795_435_200_000),
        ("1795435200.25", 1_795_435_200_250),
        ("1795435200000", 1_795_435_200_000),
    ],
)
def test_moments_are_rfc_3339_or_epoch(text: str, moment: int) -> None:
    assert parse_moment_ms(text, "--since") == moment


@pytest.mark.parametrize("text", ["", "soon", "nan", "-5", "2026-13-01"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--until: expected RFC 3339"):
        Span.parse(None, text)


def test_labels_are_pairs_over_the_default() -> None:
    assert external_labels([]) == LABELS
    assert external_labels(["job=x", "instance=a=b"]) == {"job": "x", "instance": "a=b"}
    assert external_labels(["job="]) == {}
    for pair in ("job", "=x", "1a=x", "__name__=x", "a-b=x", "entity=x", "state=x"):
        with pytest.raises(ConfigError, match="--label"):
            external_labels([pair])


# -- remote write: a server that answers as it is told ---------------------------------------------


@dataclass
class Receiver:
    """Answers requests with these, in turn, and then with 204; keeps what it took."""

    answers: list[tuple[int, dict[str, str], str]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    url: str = ""

    def series(self) -> dict[tuple[tuple[str, str], ...], list[tuple[int, float]]]:
        """Samples of each series, in the order in which they came."""
        found: dict[tuple[tuple[str, str], ...], list[tuple[int, float]]] = defaultdict(list)
        for body in self.bodies:
            request = WriteRequest.FromString(bytes(cramjam.snappy.decompress_raw(body)))
            for one in request.timeseries:
                labels = tuple((label.name, label.value) for label in one.labels)
                assert labels == tuple(sorted(labels))
                assert all(name and value for name, value in labels)
                found[labels] += [(s.timestamp, s.value) for s in one.samples]
        return found


@contextmanager
def receiver(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    kept = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept.headers.append(dict(self.headers))
            status, headers, text = kept.answers.pop(0) if kept.answers else (204, {}, "")
            if status == 204:
                kept.bodies.append(body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    kept.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}/api/v1/write"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Waits(list[float]):
    """A clock that only sleeping moves."""

    def sleep(self, seconds: float) -> None:
        self.append(seconds)

    def clock(self) -> float:
        return sum(self)


def client_of(url: str, waits: Waits | None = None, **endpoint: Any) -> Client:  # noqa: ANN401
    waits = Waits() if waits is None else waits
    return Client(Endpoint(url, **endpoint), clock=waits.clock, sleep=waits.sleep)


def test_requests_say_what_they_are_and_hold_every_sample_in_order() -> None:
    rounds = [[score(e, t) for e in ("b", "a") for t in (n, n + 1)] for n in range(1, 40, 2)]
    with receiver() as kept:
        labels = {"job": "tsdiff", "zone": "x", "Area": "y"}
        sink = RemoteWriteSink(client_of(kept.url), labels, top_channels=1, batch_bytes=5_000)
        write_all(sink, rounds)
    expected = defaultdict(list)
    for one in sorted((s for part in rounds for s in part), key=lambda s: s.timestamp_ms):
        for sample in entity_samples(one, 1):
            pairs = {"__name__": sample.family.name, **labels}
            pairs |= dict(zip(sample.family.labels, sample.labels, strict=True))
            key = tuple(sorted(pairs.items()))
            expected[key].append((one.timestamp_ms, float(sample.value)))
    assert kept.series() == expected
    assert sink.sent == sum(map(len, expected.values()))
    assert len(kept.bodies) > 10
    assert max(len(cramjam.snappy.decompress_raw(body)) for body in kept.bodies) < 10_000
    for headers in kept.headers:
        assert headers["Content-Encoding"] == "snappy"
        assert headers["Content-Type"] == "application/x-protobuf"
        assert headers["X-Prometheus-Remote-Write-Version"] == "0.1.0"
        assert headers["User-Agent"].startswith("tsdiff")
        assert "Authorization" not in headers


def test_series_that_end_are_marked_stale() -> None:
    fault: dict[str, ChannelState] = {"cpu": "stuck"}
    cpu, mem = ({name: ChannelScore(1.0, 1.0, 1.0, 1.0, 1.0)} for name in ("cpu", "mem"))
    scores = [score("e", 1, channels=cpu, faulty=fault), score("e", 2, channels=mem)]
    with receiver() as kept:
        write_all(RemoteWriteSink(client_of(kept.url), {}, top_channels=1), [scores])
        raw = b"".join(bytes(cramjam.snappy.decompress_raw(body)) for body in kept.bodies)
        series = kept.series()
    ended = {
        (dict(labels)["__name__"].removeprefix("tsdiff_"), dict(labels)["channel"])
        for labels, samples in series.items()
        if samples[-1][0] == 2 * PERIOD_MS and np.isnan(samples[-1][1])
    }
    of_channel = {f"channel_{n}" for n in ("contribution_ratio", "expected", "lower", "upper")}
    assert ended == {(n, "cpu") for n in (*of_channel, "channel_observed", "channel_state")}
    # The one NaN that means it, bit by bit.
    assert raw.count(struct.pack("<Q", 0x7FF0000000000002)) == len(ended)


def test_what_may_be_taken_later_is_sent_again() -> None:
    soon = formatdate(time.time() + 60, usegmt=True)
    with receiver() as kept:
        kept.answers += [
            (500, {}, "no\nspace  left"),
            (503, {"Retry-After": "0"}, ""),
            (429, {"Retry-After": "7"}, "slow down"),
            (429, {"Retry-After": soon}, "slow down"),
            (503, {"Retry-After": "whenever"}, ""),
        ]
        waits = Waits()
        write_all(
            RemoteWriteSink(client_of(kept.url, waits), {}, top_channels=1), [[score("e", 1)]]
        )
        assert len(kept.bodies) == 1
        assert len(kept.headers) == 6
    assert waits[:3] == [0.5, 1.0, 7.0]
    assert 50 < waits[3] <= 60
    assert waits[4] == 8.0


def test_what_is_never_taken_ends_the_run() -> None:
    with receiver() as kept:
        kept.answers += [(503, {}, "starting up")] * 100
        waits = Waits()
        sink = RemoteWriteSink(client_of(kept.url, waits), {}, top_channels=1)
        with pytest.raises(StreamError, match=r"within 300 s, got 503 starting up$"):
            write_all(sink, [[score("e", 1)]])
        sink.abandon()
        kept.answers[:] = [(429, {"Retry-After": "3600"}, "")]
        with closing(client_of(kept.url)) as client, pytest.raises(StreamError, match="3600 s"):
            client.send(b"")
    assert sum(waits) <= 300
    assert max(waits) == 30
    assert sink.told() == "nothing was sent"


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (400, "out of\nbounds", r"400 out of bounds; it takes .*out_of_order_time_window"),
        (400, "bad \x1b[31mlabel", r"400 bad \?\[31mlabel; nothing of that request was repeated"),
        (401, "", r"401 Unauthorized; give --remote-write-user"),
        (404, "not found", r"--web.enable-remote-write-receiver"),
        (308, "", r"redirects are not followed"),
        (400, "x" * 100_000, r"400 x{297}\.\.\.;"),
    ],
)
def test_a_refusal_is_an_error_with_the_servers_reason(status: int, text: str, said: str) -> None:
    with receiver() as kept:
        kept.answers += [(204, {}, ""), (status, {}, text)]
        waits = Waits()
        sink = RemoteWriteSink(client_of(kept.url, waits), {}, top_channels=1, batch_bytes=1)
        with pytest.raises(StreamError, match=said) as caught:
            write_all(sink, [[score("e", 1), score("e", 2)], [score("e", 3)]])
        sink.abandon()
        assert len(kept.headers) == 2
    assert "\n" not in str(caught.value)
    assert waits == []
    at = "1970-01-01T00:02:00Z"
    assert sink.told() == (
        f"{sink.sent} samples were sent, all of the slots before {at}; --since {at} goes on"
    )


def test_a_server_that_is_not_there_is_said_at_once() -> None:
    waits = Waits()
    sink = RemoteWriteSink(
        client_of(f"http://127.0.0.1:{free_port()}/write", waits), {}, top_channels=1
    )
    with pytest.raises(StreamError, match=r"expected a server at .*refused"):
        write_all(sink, [[score("e", 1)]])
    assert waits == []


def test_a_server_that_goes_away_is_waited_for() -> None:
    with receiver() as kept:
        waits = Waits()
        kept.answers.append((204, {"Connection": "close"}, ""))
        client = client_of(kept.url, waits)
        client.send(b"")
    with pytest.raises(StreamError, match=r"within 300 s, got .*refused"):
        client.send(b"")
    assert len(waits) > 10
    client.close()


def test_who_we_are_is_shown(certificates: Certificates) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificates.certificate("server"), certificates.key("server"))
    from stream.tls import trusting

    trusted, other = (trusting("x", file) for file in (certificates.ca, certificates.other_ca))
    with receiver(tls) as kept:
        ways: list[dict[str, Any]] = [{"user": "ann", "password": "s3:t"}, {"token": "t0ken"}]
        for shown in ways:
            with closing(client_of(kept.url, tls=trusted, **shown)) as client:
                client.send(b"")
        refused = pytest.raises(StreamError, match="certificate verify failed")
        with closing(client_of(kept.url, tls=other)) as client, refused:
            client.send(b"")
    shown_there = [headers["Authorization"] for headers in kept.headers]
    assert shown_there == ["Basic YW5uOnMzOnQ=", "Bearer t0ken"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"url": "localhost:9090"}, "expected --remote-write as http"),
        ({"url": "ftp://h/x"}, "expected --remote-write as http"),
        ({"url": "http://h:port/x"}, "expected --remote-write as http"),
        ({"url": "http://[::1/x"}, "expected --remote-write as http"),
        ({"url": "http://ann:secret@h/x"}, "without a user or password"),
        ({"url": "http://h/x", "user": "ann"}, "together, got one"),
        ({"url": "http://h/x", "user": "a", "password": "p", "token": "t"}, "got both"),
    ],
)
def test_an_endpoint_that_cannot_be_is_wrong_usage(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Endpoint(**fields)
    assert "secret" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    ways: list[dict[str, Any]] = [{"user": "a", "password": "s3cret"}, {"token": "s3cret"}]
    for shown in ways:
        assert "s3cret" not in repr(Endpoint("http://h/x", **shown))


@pytest.mark.parametrize("package", ["cramjam", "google.protobuf"])
def test_a_missing_package_is_said_with_its_extra(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, remote_write.__name__)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        StreamError, match=r"expected the package \w+ for --remote-write.*prometheus"
    ):
        import stream.remote_write  # noqa: F401


# -- remote write: a real Prometheus ---------------------------------------------------------------


def test_a_real_prometheus_holds_what_it_was_sent(
    model: Model, history: History, tmp_path: Path
) -> None:
    recent = ending(history, time.time() * 1000)
    labels = {"job": "tsdiff", "instance": "here"}
    with prometheus(tmp_path, RECEIVE) as server:
        client = Client(Endpoint(f"{server.url}/api/v1/write"))
        sink = RemoteWriteSink(client, labels, top_channels=5, batch_bytes=50_000)
        backfill(recent, model, config(), tmp_path / "x.parquet", others=[sink])
        rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
        expected = expected_series(rows)
        for name, series in expected.items():
            assert stored_series(server, name, rows, labels) == series, name
        assert sink.sent >= sum(len(s) for series in expected.values() for s in series.values())
        # A channel that is mended is so at once, not after five minutes.
        faults = expected["tsdiff_channel_state"]
        until = {r["entity"]: round(r["timestamp"].timestamp() * 1000) for r in rows}
        ends = {
            max(samples)
            for labels_, samples in faults.items()
            if max(samples) < until[dict(labels_)["entity"]]
        }
        assert ends
        for end in ends:
            for at in (end, end + PERIOD_MS):
                told = server.query("tsdiff_channel_state", at=at / 1000)
                assert len(told) == sum(at in samples for samples in faults.values())
        # What is there already may come again.
        again = RemoteWriteSink(
            Client(Endpoint(f"{server.url}/api/v1/write")), labels, top_channels=5
        )
        backfill(recent, model, config(), None, others=[again], span=Span(max_time(rows)))
        assert again.sent > 0


def test_old_samples_want_an_out_of_order_window(
    model: Model, history: History, rows: Rows, tmp_path: Path
) -> None:
    window = {"tsdb": {"out_of_order_time_window": "10000d"}}
    for name, storage in (("plain", None), ("window", window)):
        folder = tmp_path / name
        folder.mkdir()
        with prometheus(folder, RECEIVE, KEEP, scrape_itself=True, storage=storage) as server:
            wait_for(partial(server.query, "up"))
            client = Client(Endpoint(f"{server.url}/api/v1/write"))
            sink = RemoteWriteSink(client, LABELS, top_channels=5)
            if storage is None:
                with pytest.raises(StreamError, match=r"400 out of bounds; it takes what is older"):
                    backfill(history, model, config(), None, others=[sink])
                continue
            backfill(history, model, config(), None, others=[sink])
            for metric, series in expected_series(rows).items():
                assert stored_series(server, metric, rows, LABELS) == series, metric


def max_time(rows: Rows) -> int:
    return round(max(float(row["timestamp"].timestamp()) for row in rows) * 1000)


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# -- the command -----------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def run(small_bundle: SmallBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `tsdiff backfill` on a history; return status, standard output and lines of error."""

    def run(history: History, *options: str) -> tuple[int, str, list[str]]:
        folder = tmp_path / "history"
        folder.mkdir(exist_ok=True)
        for entity in history.entities:
            columns: dict[str, Any] = {"timestamp": pa.array(entity.timestamps_ms)}
            columns |= {name: entity.values[:, i] for i, name in enumerate(history.channels)}
            pq.write_table(pa.table(columns), folder / f"{entity.entity}.parquet")
        status = cli.main(["backfill", str(folder), "-m", str(small_bundle.path), *options])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


def test_the_command_writes_all_three(run: Run, history: History, tmp_path: Path) -> None:
    files = {name: tmp_path / f"scores.{name}" for name in ("parquet", "om")}
    (tmp_path / "token").write_text("t0ken\n")
    with receiver() as kept:
        options = ["-o", str(files["parquet"]), "--openmetrics", str(files["om"])]
        options += ["--remote-write", kept.url, "--label", "instance=here"]
        options += ["--remote-write-token-file", str(tmp_path / "token")]
        status, out, errors = run(history, *options)
        assert (status, errors) == (0, [])
        sent = kept.series()
    rows = pq.read_table(files["parquet"]).to_pylist()
    assert f"{len(rows)} scores" in out
    assert out.endswith(f"-> {files['parquet']}, {files['om']}, {kept.url}\n")
    labels = (("instance", "here"), ("job", "tsdiff"))
    assert all(set(labels) <= set(series) for series in sent)
    assert 'instance="here"' in files["om"].read_text()
    assert {headers["Authorization"] for headers in kept.headers} == {"Bearer t0ken"}


def test_the_last_three_hours_are_not_for_blocks(
    run: Run, history: History, tmp_path: Path
) -> None:
    recent = ending(history, time.time() * 1000)
    path = tmp_path / "scores.om"
    status, out, (line,) = run(recent, "--openmetrics", str(path))
    assert (status, out) == (2, "")
    assert "three hours ago" in line
    assert "the head" in line
    assert "--remote-write" in line
    assert line.endswith("or wait")
    assert not path.exists()
    limit = line.partition("--until ")[2].partition(",")[0]
    assert abs(parse_moment_ms(limit, "") - (time.time() * 1000 - HEAD_MS)) < 2 * PERIOD_MS
    # What the message says is right, and both parts together are the whole.
    status, out, errors = run(recent, "--openmetrics", str(path), "--until", limit)
    assert (status, errors) == (0, [])
    with receiver() as kept:
        status, _, errors = run(recent, "--remote-write", kept.url, "--since", limit)
        assert (status, errors) == (0, [])
        after = kept.series()
    stamps = {
        (s.labels["entity"], round(float(s.timestamp or 0) * 1000))
        for family in parse_openmetrics(path.read_text())
        if family.name == "tsdiff_imputed_ratio"
        for s in family.samples
    }
    stamps_after = {
        (dict(labels)["entity"], at)
        for labels, samples in after.items()
        if dict(labels)["__name__"] == "tsdiff_imputed_ratio"
        for at, _ in samples
    }
    assert stamps.isdisjoint(stamps_after)
    whole = tmp_path / "whole.parquet"
    assert run(recent, "-o", str(whole))[0] == 0
    rows = pq.read_table(whole).to_pylist()
    every = {(r["entity"], round(r["timestamp"].timestamp() * 1000)) for r in rows}
    assert stamps | stamps_after == every


def test_ctrl_c_says_how_far_it_came(
    run: Run, history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    def interrupt(self: Client, body: bytes) -> None:
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(len(body))

    monkeypatch.setattr(Client, "send", interrupt)
    small = partial(RemoteWriteSink, batch_bytes=20_000)
    monkeypatch.setattr(remote_write, "RemoteWriteSink", small)
    path = tmp_path / "scores.parquet"
    status, out, (line,) = run(history, "--remote-write", "http://127.0.0.1:9/x", "-o", str(path))
    assert (status, out) == (130, "")
    assert line.startswith("warning: ")
    assert "goes on" in line
    assert not list(tmp_path.glob("scores*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "expected at least one of --output, --openmetrics and --remote-write, got none"),
        (["-o", "x", "--openmetrics", "./x"], "expected another file for --openmetrics than"),
        (["-o", "x", "--label", "a=b"], "expected --label with --openmetrics or --remote-write"),
        (["-o", "x", "--remote-write-user", "ann"], "expected --remote-write with --remote"),
        (["-o", "x", "--since", "soon"], "--since: expected RFC 3339"),
        (["-o", "x", "--since", "60", "--until", "60"], "expected --since before --until"),
        (["--remote-write", "nowhere"], "expected --remote-write as http"),
        (
            ["--remote-write", "http://h/x", "--remote-write-token-file", "/nowhere"],
            "--remote-write-token-file: expected a file with a secret",
        ),
        (
            ["--remote-write", "https://h/x", "--remote-write-ca-file", "/nowhere"],
            "--remote-write-ca-file: expected certificates",
        ),
        (
            ["--remote-write", "http://h/x", "--remote-write-ca-file", "/nowhere"],
            "expected --remote-write https://",
        ),
    ],
)
def test_wrong_usage_is_said_before_any_work(
    capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert cli.main(["backfill", "nowhere", "-m", "nowhere", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_the_history_itself_is_not_overwritten(
    small_bundle: SmallBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.parquet"
    path.write_text("")
    command = ["backfill", str(path), "-m", str(small_bundle.path), "--openmetrics", str(path)]
    assert cli.main(command) == 2
    assert "expected another file for --openmetrics than the history" in capsys.readouterr().err
