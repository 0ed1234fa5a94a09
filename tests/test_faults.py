"""The short form of `python -m tests.faults`: ten rounds, in about a minute."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# What a busy machine can do within the bounds that the drill sets; the long form has all kinds.
KINDS = (
    *("kill -9", "SIGTERM", "worker joins", "worker leaves", "zombie", "hiccup"),
    *("broker stop and start", "broker kill -9", "broker paused"),
)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("kafka")  # so that it skips where no broker can be had
def test_faults_lose_nothing_and_repeat_nothing() -> None:
    # A process of its own: kafka-python leaks a socket with every connection that is refused.
    drill = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--seed", "3", "--rounds", "10"]
        + [f"--only={kind}" for kind in KINDS],
        check=False,  # the assertions below say more
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    told = f"{drill.stderr[-6000:]}\n{drill.stdout}"
    assert drill.returncode == 0, told
    assert "nothing lost, nothing wrong" in told
    counts = dict(re.findall(r"^(scores|alerts|dead letters): (\d+) expected", told, re.MULTILINE))
    assert int(counts["scores"]) > 1000
    assert int(counts["alerts"]) > 0
    assert int(counts["dead letters"]) > 0
