"""What cannot be had skips a test, and fails it in CI."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, require_program, unavailable


def test_unavailable_skips_unless_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no such thing"):
        unavailable("no such thing")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no such thing"):
        unavailable("no such thing")


def test_a_program_is_found_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_program("sh", "dash").endswith("/sh")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no-such-tool.*Debian: tools"):
        require_program("no-such-tool", "tools")


@pytest.mark.parametrize(("ci", "status", "said"), [("", 0, "1 skipped"), ("true", 1, "1 error")])
def test_a_given_broker_must_answer(ci: str, status: int, said: str) -> None:
    test = "tests/deploy/test_kafka_local.py::test_what_is_produced_comes_back"
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "CI": ci, "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"},
    )
    assert answer.returncode == status, answer.stdout
    assert said in answer.stdout.splitlines()[-1]
    assert "no Kafka at KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:1" in answer.stdout
