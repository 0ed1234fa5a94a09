"""Lint, format and types are tests like any other, so that one command checks everything."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

CODE = ["tsdiff", "train", "stream", "tests", "deploy"]
# A folder whose name cannot be a package's: mypy takes its files one by one.
SCRIPTS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("deploy/*/*.py"))]


def check(*command: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{answer.stdout}{answer.stderr}", pytrace=False)


def test_lint() -> None:
    check("ruff", "check", "--quiet", *CODE)


def test_format() -> None:
    check("ruff", "format", "--check", *CODE)


def test_types() -> None:
    check("mypy", "--strict", "tsdiff", "train", "stream", "tests", *SCRIPTS)
