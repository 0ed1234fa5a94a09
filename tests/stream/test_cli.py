"""The commands of `stream`: what they print, and how they end when something is wrong."""

import gc
import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kafka import KafkaConsumer
from kafka.structs import TopicPartition

from stream.cli import _overrides, _warn
from tests.conftest import MakeTopic, free_port
from tests.stream.conftest import SmallBundle
from tests.stream.workers import Worker
from tsdiff import cli
from tsdiff.errors import ConfigError
from tsdiff.history import EntityHistory, History


def table(history: History, entity: EntityHistory) -> pa.Table:
    columns: dict[str, Any] = {"timestamp": pa.array(entity.timestamps_ms)}
    columns |= {name: entity.values[:, i] for i, name in enumerate(history.channels)}
    return pa.table(columns)


@pytest.fixture
def frame(small_bundle: SmallBundle) -> pa.Table:
    """Half an hour of the first server, as a table."""
    entity = small_bundle.live.entities[0]
    short = replace(entity, timestamps_ms=entity.timestamps_ms[:30], values=entity.values[:30])
    return table(small_bundle.live, short)


Outcome = tuple[int, str, list[str]]
Backfill = Callable[..., Outcome]


@pytest.fixture
def run_backfill(
    small_bundle: SmallBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Backfill:
    """Run `tsdiff backfill` on a table; return status, standard output and lines of error."""

    def run(data: pa.Table | Path, *options: str, model: Path | None = None) -> Outcome:
        if isinstance(data, pa.Table):
            pq.write_table(data, tmp_path / "web-1.parquet")
            data = tmp_path / "web-1.parquet"
        where = ["-m", str(model or small_bundle.path), "-o", str(tmp_path / "scores.parquet")]
        status = cli.main(["backfill", str(data), *where, *options])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


def one_error(outcome: Outcome, status: int = 1) -> str:
    """What the one line of an error says."""
    got, out, (line,) = outcome
    assert (got, out) == (status, "")
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# -- backfill ----------------------------------------------------------------------------------


def test_backfill_says_what_it_did(run_backfill: Backfill, frame: pa.Table, tmp_path: Path) -> None:
    status, out, warnings = run_backfill(frame, "--set", "grid.lateness=0s")
    assert (status, warnings) == (0, [])
    path = tmp_path / "scores.parquet"
    assert out == f"30 readings of 1 entities, 30 scores and 0 alerts -> {path}\n"
    scores = pq.read_table(path).to_pylist()
    assert [row["state"] for row in scores] == ["warming"] * 16 + ["ok"] * 14
    assert {row["entity"] for row in scores} == {"web-1"}
    assert not list(tmp_path.glob("*.partial"))


def test_what_was_mended_is_said_in_one_line_each(
    run_backfill: Backfill, frame: pa.Table, small_bundle: SmallBundle
) -> None:
    channel = small_bundle.live.channels[3]
    at = frame.schema.get_field_index(channel)
    empty = frame.set_column(at, channel, pa.nulls(len(frame), pa.float32()))
    # The last row first, the fifth one twice.
    order = [29, *range(5), 4, *range(5, 29)]
    status, out, warnings = run_backfill(empty.take(order), "--set", "grid.lateness=0s")
    assert status == 0
    assert out.startswith("30 readings of 1 entities, 29 scores")
    assert len(warnings) == 3
    assert all(line.startswith("warning: ") for line in warnings)
    text = "\n".join(warnings)
    assert "out of order; sorted" in text
    assert "1 of 31 rows repeat a timestamp; the last of each is kept" in text
    assert f"web-1: no reading at all in `{channel}`; kept as missing" in text


def test_too_short_a_history_is_a_warning(run_backfill: Backfill, frame: pa.Table) -> None:
    status, out, (warning,) = run_backfill(frame.slice(0, 9), "--set", "grid.lateness=0s")
    assert status == 0
    assert "9 readings of 1 entities, 8 scores" in out
    assert warning.startswith("warning: no score for web-1: their history is shorter than the ")
    assert "warm-up of 16 slots (256 for an entity never seen in training" in warning


def test_a_warning_is_one_line_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    text = "channel `cpu[0]` of [bold]web-1[/bold] " + "is long " * 40
    _warn(text.strip())
    assert capsys.readouterr().err == f"warning: {text.strip()}\n"


def test_a_text_column_is_refused(run_backfill: Backfill, frame: pa.Table) -> None:
    at = frame.schema.get_field_index("cpu_usage")
    text = frame.set_column(at, "cpu_usage", pa.array(["high"] * len(frame)))
    error = one_error(run_backfill(text))
    assert "column `cpu_usage` is text (string), and a channel must be a number; drop" in error


def test_a_text_column_beside_the_models_channels_does_not_matter(
    run_backfill: Backfill, frame: pa.Table
) -> None:
    more = frame.append_column("comment", pa.array(["fine"] * len(frame)))
    assert run_backfill(more.slice(0, 5))[0] == 0


def test_another_channel_set_is_refused(run_backfill: Backfill, frame: pa.Table) -> None:
    error = one_error(run_backfill(frame.drop_columns(["cpu_usage", "requests"])))
    assert "lacks `cpu_usage`, `requests`" in error
    assert "every entity needs the same channels" in error


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "it does not exist"), (b"", "not a readable Parquet file"), (b"{}", "not a readable")],
)
def test_what_is_no_history_is_refused(
    run_backfill: Backfill, tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "history.parquet"
    if content is not None:
        path.write_bytes(content)
    error = one_error(run_backfill(path))
    assert str(path) in error
    assert said in error


def test_a_bundle_that_is_missing_or_damaged_is_refused(
    run_backfill: Backfill, frame: pa.Table, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    missing = one_error(run_backfill(frame, model=tmp_path / "nowhere"))
    assert missing == (
        f"expected a bundle folder at {tmp_path / 'nowhere'}, found none; "
        "make it with `tsdiff train DATA -o BUNDLE`"
    )
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in small_bundle.path.iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            content[len(content) // 2] ^= 1
        (damaged / file.name).write_bytes(content)
    error = one_error(run_backfill(frame, model=damaged))
    assert "is damaged: params.safetensors does not have the SHA-256" in error
    assert error.endswith("copy the whole folder again")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("alerts.m", "expected --set section.key=value, got 'alerts.m'"),
        ("=3", "expected --set section.key=value, got '=3'"),
        ("alerts.m=many", "alerts.m"),
        ("alerts.m=9", "expected m <= n, got m: 9 and n: 3"),
        ("alerts.triger=1", "did you mean alerts.trigger?"),
        ("allerts.m=1", "did you mean alerts"),
        ("grid.lateness=soon", "grid.lateness"),
    ],
)
def test_a_setting_that_cannot_be_used_is_wrong_usage(
    run_backfill: Backfill, frame: pa.Table, setting: str, said: str
) -> None:
    assert said in one_error(run_backfill(frame, "--set", setting), status=2)


def test_settings_are_pairs() -> None:
    assert _overrides(["a.b=c=d", " e = f "]) == {"a.b": "c=d", "e": "f"}
    with pytest.raises(ConfigError):
        _overrides(["a.b"])


def test_another_period_than_the_bundles_is_refused(
    run_backfill: Backfill, frame: pa.Table
) -> None:
    error = one_error(run_backfill(frame, "--set", "grid.period=10s"))
    assert "expected grid.period of 60s" in error
    assert error.endswith("got 10s; train a bundle with that period")


def test_the_history_is_not_overwritten(
    run_backfill: Backfill, frame: pa.Table, tmp_path: Path
) -> None:
    path = tmp_path / "scores.parquet"
    pq.write_table(frame, path)
    before = path.read_bytes()
    assert "expected another file for --output" in one_error(run_backfill(path), status=2)
    assert path.read_bytes() == before


def test_a_file_where_a_folder_should_be_is_said(
    run_backfill: Backfill, frame: pa.Table, tmp_path: Path
) -> None:
    (tmp_path / "scores.parquet").mkdir()
    assert one_error(run_backfill(frame)).endswith("; name a file")


# -- run ---------------------------------------------------------------------------------------


def test_print_schema_is_a_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--print-schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["type"] == "object"
    assert {"model", "input"} <= set(schema["required"])
    for section in schema["properties"].values():
        name = (section.get("$ref") or section["allOf"][0]["$ref"]).rpartition("/")[2]
        for key, field in schema["$defs"][name]["properties"].items():
            assert field.get("description"), f"{name}.{key} is not described"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "model"),
        (["--set", "model.path=b"], "input"),
        (["-c", "nowhere.yaml"], "nowhere.yaml"),
        (["--set", "input.topics=x"], "did you mean input.topic?"),
    ],
)
def test_run_with_wrong_settings_is_wrong_usage(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["run", *arguments])
    assert said in one_error((status, *_captured(capsys)), status=2)


def test_run_without_a_bundle_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["--set", f"model.path={tmp_path / 'nowhere'}", "--set", "input.topic=t"]
    status = cli.main(["run", *given])
    assert "expected a bundle folder" in one_error((status, *_captured(capsys)))


def _captured(capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    out, err = capsys.readouterr()
    return out, err.splitlines()


@pytest.mark.timeout(120)
def test_run_waits_for_a_broker_that_is_down_and_stops_when_asked(
    small_bundle: SmallBundle, tmp_path: Path
) -> None:
    port = free_port()
    worker = Worker(
        tmp_path / "log",
        {
            "model.path": small_bundle.path,
            "input.topic": "telemetry",
            "input.bootstrap_servers": f"127.0.0.1:{port}",
            "metrics.listen": "",
        },
    )
    try:
        worker.wait_for("waiting", 100)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(20) == 0
    finally:
        worker.kill()
    (waiting, *_) = [event for event in worker.events() if event["event"] == "waiting"]
    assert waiting["level"] == "warning"
    assert f"no broker answers at 127.0.0.1:{port} (input.bootstrap_servers)" in waiting["error"]
    assert worker.said("stopping")
    assert "Traceback" not in worker.log.read_text()


@pytest.mark.timeout(120)
def test_run_ends_at_once_when_asked_while_it_compiles(
    small_bundle: SmallBundle, tmp_path: Path
) -> None:
    worker = Worker(
        tmp_path / "log",
        {
            "model.path": small_bundle.path,
            "input.topic": "telemetry",
            "input.bootstrap_servers": f"127.0.0.1:{free_port()}",
            "metrics.listen": "127.0.0.1:0",
        },
        {"XDG_CACHE_HOME": str(tmp_path)},  # nothing is compiled yet
    )
    try:
        worker.wait_for("metrics", 100)
        assert worker.stop() == 0
    finally:
        worker.kill()
    # Compiling would have ended with the second of these.
    assert worker.said("stopping")
    assert not worker.said("model ready")


# -- replay ------------------------------------------------------------------------------------


def history_file(tmp_path: Path, rows: int = 20) -> Path:
    path = tmp_path / "web-9.parquet"
    columns = {"timestamp": np.arange(rows), "cpu": np.linspace(0, 1, rows, dtype=np.float32)}
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--speed", "0"], "expected --speed above 0, got 0"),
        (["--speed", "-2"], "expected --speed above 0, got -2"),
        (["--start-at", "later"], "expected --start-at original or now, got 'later'"),
        (["--period", "soon"], "soon"),
        (["--dead-letters"], "expected --dead-letters alone"),
    ],
)
def test_replay_with_wrong_options_is_wrong_usage(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["replay", str(history_file(tmp_path)), "--to", "x", *options])
    assert said in one_error((status, *_captured(capsys)), status=2)


def test_replay_of_nothing_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["replay"], ["replay", "--to", "x"]):
        error = one_error((cli.main(command), *_captured(capsys)), status=2)
        assert "expected a history and --to TOPIC, or --dead-letters" in error


def test_replay_without_a_broker_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = f"127.0.0.1:{free_port()}"
    status = cli.main(["replay", str(history_file(tmp_path)), "--to", "x", "-b", servers])
    error = one_error((status, *_captured(capsys)))
    assert error.startswith(f"expected a broker at {servers}, got ")
    assert error.endswith("name another one with --bootstrap-servers")
    gc.collect()  # a socket left open is a warning here, and warnings are errors


@pytest.mark.timeout(120)
def test_replay_to_a_topic_that_does_not_exist_says_so(
    kafka: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    status = cli.main(["replay", str(history_file(tmp_path)), "--to", "nowhere", "-b", kafka])
    error = one_error((status, *_captured(capsys)))
    assert f"expected topic nowhere at {kafka}" in error
    assert "it does not exist; create it" in error
    assert time.monotonic() - begun < 30


def test_replay_writes_and_says_how_much(
    kafka: str, make_topic: MakeTopic, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topic = make_topic(1)
    assert cli.main(["replay", str(history_file(tmp_path)), "--to", topic, "-b", kafka]) == 0
    assert capsys.readouterr().out == f"20 readings of 1 entities -> {topic}\n"
    with KafkaConsumer(bootstrap_servers=kafka) as consumer:
        (end,) = consumer.end_offsets([TopicPartition(topic, 0)]).values()
    assert end == 20


@pytest.mark.parametrize("key", ["input.security.sasl_password", "metrics.password"])
def test_a_password_is_not_taken_from_the_command_line(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"expected {key} from the environment") as caught:
        _overrides([f"{key}=hunter2"])
    assert "hunter2" not in str(caught.value)
