"""What is logged: ours in full, kafka-python's complaints now and then."""

import io
import json
import logging
import sys

import pytest
import structlog

from stream.logs import configure_logging


def written(monkeypatch: pytest.MonkeyPatch, level: str) -> list[str]:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    configure_logging(level, "json")
    for attempt in range(5):
        logging.getLogger("kafka.conn").error("connection refused, attempt %d", attempt)
        structlog.get_logger("tsdiff.test").warning("waiting", attempt=attempt)
    return [json.loads(line)["event"] for line in out.getvalue().splitlines()]


def test_a_library_that_repeats_itself_is_heard_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(monkeypatch, "info") == ["connection refused, attempt 0"] + ["waiting"] * 5


def test_debug_hears_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(written(monkeypatch, "debug")) == 10


@pytest.mark.parametrize("form", ["console", "json"])
@pytest.mark.parametrize("name", ["new\nline", "\x1b[31mred", "a\u202eb", "nul\x00", "\r", "\x85"])
def test_no_name_breaks_a_line(form: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", form)
    structlog.get_logger("tsdiff").info(f"about {name}", entity=name, channels=[name])
    logging.getLogger("kafka").error("topic %s", name)
    written = capfd.readouterr().err
    assert len(written.splitlines()) == written.count("\n") == 2
    assert all(line.isprintable() for line in written.splitlines())


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_line_is_written_with_its_end(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[str] = []

    class Parts(io.StringIO):
        def write(self, text: str) -> int:
            parts.append(text)
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Parts())
    configure_logging("info", form)
    structlog.get_logger("tsdiff").info("ours")
    logging.getLogger("kafka").error("the library's")
    assert len(parts) == 2
    assert all(part.endswith("\n") for part in parts)
