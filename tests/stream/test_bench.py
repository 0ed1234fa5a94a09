"""`tsdiff bench`: what it prints and counts. How fast anything is, no test says."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from stream import bench, compose
from stream.bench import (
    KEYS,
    MISSING,
    Record,
    Scorer,
    as_text,
    bytes_per_entity,
    compilations_while_shapes_change,
    counted_flops,
    flops_per_window,
    in_process,
    learning_seconds_per_slot,
    main,
    matmul_flops_per_second,
    measure,
    one_core,
    research_windows_per_second,
    run_bench,
    task,
    timed,
    workload,
)
from stream.compose import Model
from tests.train.simulated import ANCHOR_ONLY, CHANNELS, PERIOD_MS, anchor_bundle, history
from train.config import TrainConfig
from train.loop import train
from tsdiff import cli
from tsdiff.bundle import Bundle, save_bundle
from tsdiff.config import Adapt, NetworkConfig
from tsdiff.denoiser import Network
from tsdiff.detector import Detector
from tsdiff.errors import ConfigError, TsdiffError
from tsdiff.history import History
from tsdiff.reading import make_denoiser

Captured = pytest.CaptureFixture[str]
CASES = (("live", 8, 1), ("catching up", 2, 3), ("history", 1, 9))


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """A detector with few shapes: what is compiled takes seconds each."""
    detector = Detector(anchor_bundle(), shapes=((8, 1),))
    detector.warm_up()
    return detector


@pytest.fixture(scope="module")
def measured(scorer: Scorer) -> Record:
    """All that is measured on one core, of small workloads, in this process."""

    def only(_: Bundle, *, history: bool = False) -> Iterator[tuple[str, Scorer]]:
        yield "default", scorer
        yield "level", scorer
        if history:
            yield "second", scorer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "detectors_of", only)
        patch.setattr(bench, "WORKLOADS", CASES)
        patch.setattr(bench, "_MATMUL_SIZE", 64)
        config = replace(ANCHOR_ONLY, slow_scorers=("score-norms",))
        return measure(train(history(), config, period_ms=PERIOD_MS), 0.01)


@pytest.fixture
def faked(measured: Record, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Put what was measured in the place of processes; return their commands."""
    commands: list[list[str]] = []

    def answer(command: list[str], environment: dict[str, str]) -> Record:
        assert (Path(command[4]) / "manifest.json").exists()
        commands.append(command)
        if command[3] == "measure":
            assert "XLA_FLAGS" in environment
            return {"seconds": 9.0, **measured}
        assert "XDG_CACHE_HOME" in environment
        return {"seconds": 6.0 - len(commands), "peak_memory_bytes": 2**28}

    monkeypatch.setattr(bench, "in_process", answer)
    return commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "bundle"
    save_bundle(anchor_bundle(), path)
    return path


# -- the command -------------------------------------------------------------------------------


def test_the_json_has_what_is_promised(
    folder: Path, faked: list[list[str]], capsys: Captured
) -> None:
    assert cli.main(["bench", "-m", str(folder), "--seconds", "3", "--json"]) == 0
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert tuple(found)[: len(KEYS)] == KEYS
    assert len(out.splitlines()) == 1
    assert len(error.splitlines()) == 3  # what is being done
    assert [command[3] for command in faked] == ["measure", "start", "start"]
    assert faked[0][5:] == ["3.0"]
    null = {"readings_per_second", "latency_p50_seconds", "latency_p99_seconds"}
    assert {key for key in KEYS if found[key] is None} == null
    assert found["channels"] == CHANNELS
    assert found["compilations"] == 3
    assert found["compilations_after_warmup"] == 0
    assert all(found[key] > 0 for key in KEYS if key not in null | {"compilations_after_warmup"})
    assert 0 < found["core_share"] <= 1
    assert "seconds" not in found
    assert found["seconds_to_first_score"] == 4.0
    assert found["seconds_to_first_score_cached"] == 3.0
    assert found["windows_per_second_per_core"] == found["rates"][0]["windows_per_second"]
    assert found["learning_seconds_per_slot"] == 0.0  # this one does not learn
    rates = [(rate["scorer"], rate["workload"], rate["missing"]) for rate in found["rates"]]
    kinds = [(name, case) for case, _, _ in CASES for name in ("default", "level")]
    kinds.append(("second", "history"))
    slow = rates.pop()  # whatever is missing costs it the same
    assert slow == ("score-norms", "live", "complete")
    assert rates == [(*kind, missing) for kind in kinds for missing in MISSING]


@pytest.mark.usefixtures("faked")
def test_the_table_is_for_people(folder: Path, capsys: Captured) -> None:
    assert cli.main(["bench", "-m", str(folder)]) == 0
    text = capsys.readouterr().out
    facts, table = (part.splitlines() for part in text.split("\n\n")[:2])
    assert {line.index("  ") > 0 for line in facts} == {True}
    assert facts[-1].startswith("end to end    not measured")
    assert len({len(line) for line in table}) == 1  # aligned
    assert [line.split(":")[0] for line in table[1:]] == [
        "live",
        "level, live",
        "catching up",
        "level, catching up",
        "history",
        "level, history",
        "second, history",
        "score-norms, live",
    ]
    assert len(table[-1].split()) == len(table[1].split()) - 1  # one rate instead of three
    found = run_bench(_no_training, folder)
    assert "busy machine: the core was ours 50%" in as_text(found | {"core_share": 0.5})
    assert "busy" not in as_text(found | {"core_share": 0.95})
    assert "MFLOP" not in as_text(found | {"flops_per_window": None, "matmul_peak_share": None})


def _no_training(history: History, *, period_ms: int, **settings: Any) -> Bundle:  # noqa: ANN401
    raise AssertionError((history, period_ms, settings))


def test_without_a_bundle_a_tiny_one_is_trained_and_measured(faked: list[list[str]]) -> None:
    given: list[History] = []

    def tiny(history: History, *, period_ms: int, **settings: Any) -> Bundle:  # noqa: ANN401
        given.append(history)
        TrainConfig(**settings)  # an unknown setting raises
        assert period_ms == 60_000
        return anchor_bundle()

    found = run_bench(tiny, None, channels=30)
    assert found["model"] == anchor_bundle().version
    assert len(faked) == 3
    (history,) = given
    assert len(set(history.channels)) == 30
    assert {entity.values.shape for entity in history.entities} == {(1500, 30)}


@pytest.mark.parametrize(
    ("options", "said", "status"),
    [
        (["--channels", "0"], "expected --channels of at least 1 and --seconds above 0, got 0", 2),
        (["--seconds", "0"], "expected --channels of at least 1 and --seconds above 0", 2),
        (["-m", "nowhere"], "expected a bundle folder", 1),
    ],
)
def test_wrong_usage_is_said_in_one_line(
    options: list[str], said: str, status: int, capsys: Captured
) -> None:
    assert cli.main(["bench", *options]) == status
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_process_answers_with_a_line() -> None:
    code = "import os; print('{\"a\": ' + os.environ['TSDIFF_A'] + '}')"
    answer = in_process([sys.executable, "-c", code], {"TSDIFF_A": "5"})
    assert answer.pop("seconds") > 0
    assert answer == {"a": 5}


def test_a_process_that_fails_is_said(tmp_path: Path) -> None:
    with pytest.raises(TsdiffError, match=r"ended with status 1: .*BundleError: expected"):
        in_process(task("start", tmp_path), {})
    with pytest.raises(TsdiffError, match="ended with status 0: it said nothing"):
        in_process([sys.executable, "-c", ""], {})
    with pytest.raises(ConfigError, match="above 0, got 1 and -1"):
        run_bench(_no_training, tmp_path, channels=1, seconds=-1)


def test_a_start_ends_with_a_score(
    folder: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def load(path: Path) -> Model:
        assert path == folder
        return Model(anchor_bundle(), cast(Detector, scorer))

    monkeypatch.setattr(compose, "load_model", load)
    assert main(["start", str(folder)]) == 0
    assert 2**26 < json.loads(capsys.readouterr().out)["peak_memory_bytes"] < 2**36


# -- one core ----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_it_stays_on_one_core() -> None:
    code = "import os, stream.bench; stream.bench.pin_to_one_core(); print(os.sched_getaffinity(0))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.count(",") == 0


def test_the_flags_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    flags = one_core()["XLA_FLAGS"].split()
    assert flags == ["--xla_cpu_enable_fast_math=false", "--xla_cpu_multi_thread_eigen=false"]


# -- what is counted ---------------------------------------------------------------------------


def test_flops_of_a_known_product() -> None:
    a, b = jnp.zeros((64, 128)), jnp.zeros((128, 32))
    compiled = jax.jit(jnp.matmul).lower(a, b).compile()
    assert counted_flops(compiled) == pytest.approx(2 * 64 * 128 * 32, rel=0.01)


@pytest.mark.parametrize(
    ("answer", "flops"),
    [({"flops": 8.0}, 8.0), ([{"flops": 8.0}], 8.0), ({}, None), (None, None), ([], None)],
)
def test_flops_as_versions_of_jax_tell_them(answer: object, flops: float | None) -> None:
    class Compiled:
        def cost_analysis(self) -> object:
            return answer

    assert counted_flops(Compiled()) == flops
    assert counted_flops(object()) is None


def test_a_window_costs_what_its_products_cost(scorer: Scorer) -> None:
    flops = flops_per_window(scorer)
    assert flops is not None
    model = anchor_bundle().manifest.model
    # At the least: a window's projection on the anchor, at two noise levels.
    assert flops > 2 * 2 * model.window * CHANNELS * model.rank
    assert flops < 1e6

    class Opaque:
        pass

    assert flops_per_window(Opaque()) is None


def test_the_peak_is_a_rate() -> None:
    assert matmul_flops_per_second(64, 0.01) > 1e6


def test_nothing_is_compiled_once_it_is_warm(scorer: Scorer) -> None:
    assert compilations_while_shapes_change(scorer) == 0


@pytest.mark.parametrize(
    ("missing", "least", "most"),
    [("complete", 0, 0), ("few missing", 50, 50), ("many missing", 25, 80)],
)
def test_workloads_miss_what_they_say(scorer: Scorer, missing: str, least: int, most: int) -> None:
    made = workload(scorer, 50, 3, missing)
    assert made["values"].shape == (50, scorer.window + 2, CHANNELS)
    assert least <= np.isnan(made["values"][:, -1]).sum() <= most  # of 250 cells
    assert np.isfinite(scorer.detect(**made).evidence).all()


def test_an_entity_s_state_is_its_window_and_history(scorer: Scorer) -> None:
    measured = bytes_per_entity(anchor_bundle(), scorer)
    arrays = 4 * (scorer.window * CHANNELS + scorer.history * scorer.streams)
    assert arrays < measured < arrays + 4 * 40 * CHANNELS + 2000


@pytest.mark.parametrize("adapt", ["level", "full"])
def test_learning_takes_time_and_memory(adapt: Adapt) -> None:
    learner = Detector(anchor_bundle(), shapes=((8, 1),), adapt=adapt)
    assert 0 <= learning_seconds_per_slot(learner) < 1e-2
    adaptation = learner.adaptation
    assert adaptation is not None
    least = 4 * learner.window * CHANNELS + adaptation.entity_bytes
    assert bytes_per_entity(anchor_bundle(), learner) > least


def test_the_median_of_several_repetitions() -> None:
    calls: list[int] = []
    assert timed(lambda: calls.append(1), 0.0, least=4) >= 0
    assert len(calls) == 5  # the first one is not counted


# -- the research way --------------------------------------------------------------------------


def untrained() -> Bundle:
    """The anchor's bundle with a network that says something, if nothing sensible."""
    anchor = anchor_bundle()
    config = NetworkConfig(width=8, blocks=1, entity_width=2)
    manifest = msgspec.structs.replace(anchor.manifest, network=config, network_weight=0.5)
    network = Network(CHANNELS, len(anchor.entities), manifest.model, config)
    rng = np.random.default_rng(0)
    params = {
        f"network.{name}": 0.1 * rng.standard_normal(array.shape).astype(np.float32)
        for name, array in network.initialize(0).items()
    }
    return Bundle(manifest, {**anchor.arrays, **params})


@pytest.mark.parametrize("kind", ["anchor", "network"])
def test_the_denoiser_keeps_what_is_given(kind: str) -> None:
    bundle = anchor_bundle() if kind == "anchor" else untrained()
    model = bundle.manifest.model
    cells = model.window * CHANNELS
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, cells)), jnp.float32)
    target = jnp.arange(cells) >= cells - model.hidden * CHANNELS
    mean, sd = jax.jit(make_denoiser(bundle))(x, jnp.where(target, jnp.full(x.shape, 0.25), 0.0))
    assert mean.shape == sd.shape == x.shape
    np.testing.assert_allclose(mean[:, ~target], x[:, ~target], atol=1e-3)
    assert (sd[:, target] > 0).all()
    assert np.isfinite(mean).all()


def test_the_research_way_scores_windows() -> None:
    assert research_windows_per_second(untrained(), windows=2, steps=25, samples=2) > 0
