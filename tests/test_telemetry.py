"""The main job on real labelled telemetry, as a user would run it: train, replay, run, backfill.

`pytest tests/test_telemetry.py -s -n 0` prints the numbers. The labels are read at the end only, to
compare; nothing is chosen by them. The floor is that of the data's own README: the mean over
channels of |z|, clipped at 10, with mean and standard deviation of the train part.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from stream.codec import rfc3339
from tests.conftest import MakeTopic
from tests.stream.workers import Scores, deployment
from tsdiff.history import History, load_history

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETS = {"smd": ("60s", 60_000, ["machine-1-6"]), "asd": ("300s", 300_000, [])}


def tsdiff(*arguments: object) -> str:
    command = [sys.executable, "-m", "tsdiff.cli", *map(str, arguments)]
    done = subprocess.run(command, check=False, text=True, capture_output=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def peak_memory_mib(pid: int) -> float:
    """Largest resident set of a running process; see proc(5), VmHWM."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def labels(path: Path, entity: str, period_ms: int) -> dict[str, bool]:
    table = pq.read_table(path / entity / "test.parquet", columns=["timestamp", "label"])
    steps = table["timestamp"].to_numpy()
    return {
        rfc3339(int(step) * period_ms): bool(label)
        for step, label in zip(steps, table["label"].to_numpy(), strict=True)
    }


def floor(train: NDArray[np.float32], test: NDArray[np.float32]) -> NDArray[np.float32]:
    z = np.abs((test - train.mean(0)) / np.maximum(train.std(0), 1e-9))
    mean: NDArray[np.float32] = np.minimum(z, 10).mean(1)
    return mean


@pytest.fixture(scope="module", params=sorted(SETS))
def job(
    request: pytest.FixtureRequest,
    telemetry: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Path, Path]]:
    """Name, data and trained bundle of one set."""
    name = request.param
    period, _, only = SETS[name]
    folder = tmp_path_factory.mktemp(name)
    data = folder / "data"
    data.mkdir()
    for entity in sorted((telemetry / name).iterdir()):
        if not only or entity.name in only:
            (data / entity.name).symlink_to(entity)
    began = time.monotonic()
    # The network is dropped on these sets, however long it is trained.
    options = ["--period", period, "--name", name, "--steps", "1000"]
    tsdiff("train", data, "-o", folder / "bundle", *options)
    print(f"\n{name}: trained in {time.monotonic() - began:.0f} s")
    yield name, data, folder / "bundle"


def test_live_scores_of_labelled_telemetry(
    job: tuple[str, Path, Path], kafka: str, make_topic: MakeTopic, tmp_path: Path
) -> None:
    name, data, bundle = job
    period, period_ms, _ = SETS[name]
    topic = make_topic(partitions=2, name=name)
    train = load_history(data, period_ms=period_ms, part="train")
    test = load_history(data, period_ms=period_ms, part="test")
    tsdiff("replay", data, "--to", topic, "-b", kafka, "--period", period)
    readings = sum(len(e.timestamps_ms) for e in test.entities)
    with deployment(kafka, topic, bundle, tmp_path) as deployed:
        killed = deployed.start(input__max_poll_records=500)
        deployed.wait_for_scores(readings // 2, killed, 300)
        killed.kill()
        halfway = len(deployed.read_scores())
        assert halfway < readings
        worker = deployed.start()
        worker.wait_for("partition assigned")
        began = time.monotonic()
        deployed.wait_for_scores(readings, worker, 300)
        seconds = time.monotonic() - began
        peak = peak_memory_mib(worker.process.pid)
        assert worker.stop() == 0
        # read_scores fails on a slot that is there twice.
        scores = deployed.read_scores()
        assert len(scores) == readings
        alerts = [json.loads(r.value) for r in deployed.records(deployed.alerts)]
    print(
        f"{name}: {readings} readings in, {len(scores)} scores out; killed at {halfway}; "
        f"{(readings - halfway) / seconds:.0f} scores/s after the restart, as seen by a reader; "
        f"peak memory of the service {peak:.0f} MiB"
    )
    report(name, data, train, test, scores, alerts)
    compare_with_backfill(data, bundle, scores, tmp_path)


def report(
    name: str,
    data: Path,
    train: History,
    test: History,
    scores: Scores,
    alerts: list[dict[str, object]],
) -> None:
    """Average precision beside the floor's, and the alerts beside the labelled segments."""
    _, period_ms, _ = SETS[name]
    ours, floors = [], []
    for before, after in zip(train.entities, test.entities, strict=True):
        entity = after.entity
        label = labels(data, entity, period_ms)
        stamps = [rfc3339(int(t)) for t in after.timestamps_ms]
        y = np.array([label[s] for s in stamps])
        live = [scores.get((entity, s), {}).get("anomaly_score") or 0.0 for s in stamps]
        ours.append(float(average_precision_score(y, live)))
        floors.append(float(average_precision_score(y, floor(before.values, after.values))))
        edges = np.flatnonzero(np.diff(np.r_[False, y, False].astype(int))).reshape(-1, 2)
        firing = [
            str(a["timestamp"]) for a in alerts if (a["entity"], a["state"]) == (entity, "firing")
        ]
        at = [stamps.index(stamp) for stamp in firing]
        hit = {i for i, (a, b) in enumerate(edges) for t in at if a <= t < b}
        outside = sum(not y[max(0, t - 5) : t + 5].any() for t in at)
        print(
            f"{name}/{entity}: average precision {ours[-1]:.3f} (floor {floors[-1]:.3f}); "
            f"{len(at)} alerts, {outside} of them away from every label; "
            f"{len(hit)} of {len(edges)} labelled segments alerted"
        )
        print(f"  labelled: {', '.join(f'{stamps[a]}+{b - a}' for a, b in edges)}")
        print(f"  alerts:   {', '.join(firing)}")
    print(f"{name}: mean average precision {np.mean(ours):.3f}, floor {np.mean(floors):.3f}")
    assert np.mean(ours) > np.mean(floors)


def compare_with_backfill(data: Path, bundle: Path, live: Scores, folder: Path) -> None:
    path = folder / "scores.parquet"
    tsdiff("backfill", data, "-m", bundle, "-o", path, "--set", "grid.lateness=0s")
    rows = pq.read_table(path).to_pylist()
    largest = 0.0
    assert len(rows) == len(live)
    for row in rows:
        score = live[(row["entity"], rfc3339(int(row["timestamp"].timestamp() * 1000)))]
        assert score["state"] == row["state"]
        assert (score["anomaly_score"] is None) == (row["anomaly_score"] is None)
        if row["anomaly_score"] is not None:
            largest = max(largest, abs(row["anomaly_score"] - score["anomaly_score"]))
    print(f"largest difference between live and backfill: {largest:.2g}")
    assert largest < 5e-5
