"""`tsdiff train` and `tsdiff inspect` from the command line."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from tests.train.simulated import network_bundle, simulate
from train import cli
from train.cli import describe
from tsdiff.bundle import load_bundle

app = typer.Typer()
app.command()(cli.train)
app.command()(cli.inspect)
runner = CliRunner()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for entity in range(2):
        values = simulate(600, entity)
        columns = {f"c{i}": values[:, i] for i in range(values.shape[1])}
        table = pa.table({"timestamp": np.arange(600), **columns})
        pq.write_table(table, folder / f"host-{entity}.parquet")
    return folder


def test_train_and_inspect(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    options = ["--period", "60s", "--steps", "20", "--name", "hosts"]
    done = runner.invoke(app, ["train", str(data), "-o", str(output), *options])
    assert done.exit_code == 0, done.output
    bundle = load_bundle(output)
    assert bundle.version in done.output
    assert bundle.entities == ("host-0", "host-1")
    assert "step 20/20 loss" in done.output
    assert not (tmp_path / "bundle.checkpoints").exists()
    shown = runner.invoke(app, ["inspect", str(output)])
    assert shown.exit_code == 0
    assert re.search(r"model\s+hosts@[0-9a-f]{12}", shown.output)


def test_without_a_network(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    done = runner.invoke(
        app, ["train", str(data), "-o", str(output), "--period", "60s", "--no-network"]
    )
    assert done.exit_code == 0, done.output
    assert "Gaussian anchor alone" in describe(load_bundle(output))


def test_counters_are_trained_on_as_rates(tmp_path: Path) -> None:
    """A counter that grows by some 300 in a slot of 60 s, and begins again once: 5 a second."""
    rng = np.random.default_rng(0)
    total = 1e9 + np.cumsum(rng.uniform(270, 330, 600))
    total[400:] -= total[400]
    table = pa.table({"timestamp": np.arange(600), "a": rng.normal(size=600), "bytes": total})
    pq.write_table(table, tmp_path / "host.parquet")
    output = tmp_path / "bundle"
    options = ["--period", "60s", "--no-network", "--rate", "by*"]
    command = ["train", str(tmp_path / "host.parquet"), "-o", str(output)]
    done = runner.invoke(app, [*command, *options])
    assert done.exit_code == 0, done.output
    statistics = load_bundle(output).arrays
    assert statistics["statistics.mean"][0, 1] == pytest.approx(5.0, abs=0.1)
    assert statistics["statistics.scale"][0, 1] < 1.0
    wrong = runner.invoke(app, [*command, *options[:-1], "nothing*"])
    assert "pattern" in str(wrong.exception)


def test_describe_names_the_network() -> None:
    assert "anchor and network (weight 0.5" in describe(network_bundle())


def test_describe_says_that_no_channel_is_a_flag() -> None:
    assert "on or off  no channel" in describe(network_bundle())
