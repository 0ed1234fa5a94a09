"""`tsdiff evaluate` on small labelled folders: what is read, what is run, what is printed."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.train.simulated import CHANNELS, MODEL, PERIOD_MS, anchor_bundle, simulate
from train import evaluate as module
from train import evaluate_cli
from train.baselines import BASELINES, Scored
from train.config import TrainConfig
from train.evaluate import Result, Settings, evaluate, judge, score_ours, summarize
from train.labelled import Entity, LabelledSet, Trial, find_sets, load_set
from train.metrics import Cause
from train.stress import WORSE, contaminate, worsen
from tsdiff import cli
from tsdiff.detector import Detector
from tsdiff.errors import ConfigError, HistoryError
from tsdiff.series import SHAPES

TRAIN, TEST = 600, 300
FAULT = (200, 230)
MONDAY_MS = 1_735_516_800_000
Write = Callable[..., Path]


def write_part(
    folder: Path, part: str, values: np.ndarray, times: np.ndarray, labels: np.ndarray | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns = {f"c{i}": values[:, i] for i in range(values.shape[1])}
    marks = {} if labels is None else {"label": labels, "label_any": labels}
    pq.write_table(pa.table({"timestamp": times, **columns, **marks}), folder / f"{part}.parquet")


def write_entity(folder: Path, seed: int, times: np.ndarray | None = None) -> Path:
    """One entity whose channels 1 and 3 part company in rows FAULT of its test part."""
    values = simulate(TRAIN + TEST, seed)
    start, end = FAULT
    values[TRAIN + start : TRAIN + end] += [0, 60, 0, -6e6, 0]
    labels = np.zeros(TEST, np.int8)
    labels[start:end] = 1
    moments = np.arange(TRAIN + TEST) if times is None else times
    write_part(folder, "train", values[:TRAIN], moments[:TRAIN])
    write_part(folder, "test", values[TRAIN:], moments[TRAIN:], labels)
    blamed = [{"start": start, "end": end, "channels": ["c1", "c3"]}, {"start": 1, "end": 2}]
    (folder / "interpretation.json").write_text(json.dumps({"segments": blamed}))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of two sets; the first has an entity that is trained on only."""
    write_entity(tmp_path / "data" / "pumps" / "a", 0)
    write_entity(tmp_path / "data" / "pumps" / "b", 1)
    write_part(tmp_path / "data" / "pumps" / "normal", "train", simulate(400, 2), np.arange(400))
    write_entity(tmp_path / "data" / "fans" / "x", 3)
    return tmp_path / "data"


def loaded(folder: Path, period_ms: int | None = None, steps_ms: int | None = 60_000) -> Any:  # noqa: ANN401
    (name, folders), *others = find_sets([folder]).items()
    assert not others
    return load_set(name, folders, period_ms, steps_ms)


def trial(entity: Entity) -> Trial:
    assert entity.test is not None
    return entity.test


# -- reading -----------------------------------------------------------------------------------


def test_a_path_is_an_entity_a_set_or_a_folder_of_sets(data: Path) -> None:
    def names(*paths: Path) -> dict[str, list[str]]:
        return {name: [each.name for each in found] for name, found in find_sets(paths).items()}

    assert names(data) == {"fans": ["x"], "pumps": ["a", "b", "normal"]}
    assert names(data / "pumps") == {"pumps": ["a", "b", "normal"]}
    assert names(data / "pumps" / "b", data / "pumps" / "a") == {"pumps": ["b", "a"]}


def test_a_set_is_read_as_it_is(data: Path) -> None:
    pumps = loaded(data / "pumps")
    assert pumps.channels == tuple(f"c{i}" for i in range(CHANNELS))  # labels are none
    assert pumps.period_ms == PERIOD_MS
    assert [entity.test is None for entity in pumps.entities] == [False, False, True]
    test = trial(pumps.entities[0])
    assert test.goes_on
    assert test.labels.nonzero()[0].tolist() == list(range(*FAULT))
    assert test.causes == (Cause(*FAULT, frozenset({1, 3})),)
    np.testing.assert_array_equal(test.values, simulate(TRAIN + TEST, 0)[TRAIN:] + shift())
    assert pumps.entities[0].past.shape == (TRAIN, CHANNELS)


def shift() -> np.ndarray:
    added = np.zeros((TEST, CHANNELS), np.float32)
    added[slice(*FAULT)] = [0, 60, 0, -6e6, 0]
    return added


@pytest.mark.parametrize(
    ("gap", "goes_on", "slots_before"), [(0, True, 0), (3, True, 3), (5000, False, 0)]
)
def test_time_decides_whether_the_test_part_goes_on(
    tmp_path: Path, gap: int, goes_on: bool, slots_before: int
) -> None:
    times = MONDAY_MS + 10_000 * np.arange(TRAIN + TEST)
    times[TRAIN:] += 10_000 * gap
    entity = loaded(write_entity(tmp_path / "s" / "e", 0, times), steps_ms=None)
    assert entity.period_ms == 10_000  # of the timestamps
    test = trial(entity.entities[0])
    assert test.goes_on == goes_on
    assert test.slots.tolist() == list(range(slots_before, TEST + slots_before))
    assert np.isnan(test.values[:slots_before]).all()


def test_steps_that_start_again_go_on_after_training(tmp_path: Path) -> None:
    times = np.concatenate([np.arange(TRAIN), np.arange(TEST)])
    test = trial(loaded(write_entity(tmp_path / "s" / "e", 0, times)).entities[0])
    assert test.goes_on
    assert test.slots.tolist() == list(range(TEST))


def test_rows_keep_their_slots_where_some_are_missing(tmp_path: Path) -> None:
    times = np.arange(TRAIN + TEST)
    times[TRAIN + 100 :] += 2
    test = trial(loaded(write_entity(tmp_path / "s" / "e", 0, times)).entities[0])
    assert len(test.values) == TEST + 2
    assert np.isnan(test.values[100:102]).all()
    assert test.slots[99:101].tolist() == [99, 102]


def spoil_order(folder: Path) -> None:
    table = pq.read_table(folder / "test.parquet")
    pq.write_table(table.take(np.r_[1, 0, 2 : len(table)]), folder / "test.parquet")


def spoil_labels(folder: Path) -> None:
    values = simulate(TEST, 0)
    write_part(folder, "test", values, np.arange(TRAIN, TRAIN + TEST), np.array(["x"] * TEST))


def drop_labels(folder: Path) -> None:
    write_part(folder, "test", simulate(TEST, 0), np.arange(TRAIN, TRAIN + TEST))


def write_causes(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "interpretation.json").write_text(text)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_order, "rows in order of time"),
        (spoil_labels, "0 or 1 in the column `label`"),
        (drop_labels, "column `label` in the test.parquet of at least one entity"),
        (write_causes("[]"), "segments of start, end"),
        (write_causes('{"segments": [{"start": 1, "end": 9999}]}'), "rows 1 to 9999 of 300"),
        (
            write_causes('{"segments": [{"start": 1, "end": 2, "channels": ["z"]}]}'),
            "KeyError: 'z'",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    folder = write_entity(tmp_path / "s" / "e", 0)
    spoil(folder)
    with pytest.raises(HistoryError, match=said):
        loaded(folder)


# -- scoring -----------------------------------------------------------------------------------


def test_scoring_goes_on_where_the_past_ended() -> None:
    """Scoring the whole series at once gives the second part the same scores."""
    detector = Detector(anchor_bundle(), shapes=SHAPES)
    values = simulate(500, 0)
    slots = np.arange(500)
    whole = score_ours(detector, "e0", None, values, slots)
    after = score_ours(detector, "e0", values[:400], values[400:], slots[400:])
    cold = score_ours(detector, "e0", None, values[400:], slots[400:])
    np.testing.assert_allclose(after.evidence, whole.evidence[400:], atol=1e-3)
    assert after.contribution is not None
    assert whole.contribution is not None
    np.testing.assert_allclose(after.contribution, whole.contribution[400:], atol=1e-4)
    assert not np.allclose(cold.evidence[:20], after.evidence[:20], atol=0.05)
    np.testing.assert_allclose(cold.evidence[60:], after.evidence[60:], atol=1e-3)


def test_a_judged_part_has_every_metric(data: Path) -> None:
    test = trial(loaded(data / "fans").entities[0])
    evidence = np.where(test.labels, 8.0, 0.1).astype(np.float32)
    rate, rare = 1.0, 1e-6  # lines at evidence 4 and 10
    contribution = np.tile(np.array([0, 0.6, 0.3, 0.1, 0], np.float32), (TEST, 1))
    metrics = judge(test, Scored(evidence, evidence, contribution, 1.0), PERIOD_MS, rate)
    assert metrics["auc_pr"] == metrics["auc_roc"] == metrics["event_f1"] == 1.0
    assert metrics["delay_slots"] == 1.0  # two of three slots
    assert metrics["root_cause_hit_rate"] == 0.5
    assert metrics["root_cause_hit_rate_150"] == 1.0
    calm = judge(test, Scored(evidence, evidence, None, 1.0), PERIOD_MS, rare)
    assert calm["event_f1"] == 0.0
    assert math.isnan(calm["root_cause_hit_rate"])
    # As many slots above a line as that make one alarm.
    assert judge(test, Scored(evidence, evidence, None, 1e4), PERIOD_MS, rare)["event_f1"] == 1.0
    silent = test._replace(values=np.full_like(test.values, np.nan))
    heard = judge(silent, Scored(evidence, evidence, None, 1.0), PERIOD_MS, rate)
    assert heard["event_recall"] == 0.0


def test_every_detector_is_run_on_every_judged_entity(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[tuple[str, int]] = []

    def fit(name: str, labelled: LabelledSet, settings: Settings, seed: int) -> module.Find:
        fits.append((name, seed))
        return lambda entity, test: Scored(test.values[:, 1], test.values[:, 1], None, 1.0)

    monkeypatch.setattr(module, "_fit", fit)
    settings = Settings(("l2", "tsdiff", "kmeansad"), seeds=2)
    lines: list[str] = []
    results = list(evaluate([loaded(data / "pumps")], settings, lines.append))
    # One that knows no chance is run once.
    assert fits == [("l2", 0), ("tsdiff", 0), ("tsdiff", 1), ("kmeansad", 0), ("kmeansad", 1)]
    assert len(results) == 5 * 2
    assert {result.entity for result in results} == {"a", "b"}
    assert len(lines) == 5
    assert lines[0].startswith("pumps  l2  seed 0: VUS-PR ")


def test_stress_is_drawn_anew_for_every_seed(data: Path) -> None:
    settings = Settings(("l2",), seeds=2, stress=True)
    results = list(evaluate([loaded(data / "fans")], settings, lambda _: None))
    of_seed = [
        {each.stress: each.metrics["vus_pr"] for each in results if each.seed == seed}
        for seed in range(2)
    ]
    same = {kind for kind, vus_pr in of_seed[0].items() if of_seed[1][kind] == vus_pr}
    assert set(of_seed[0]) == {"clean", "missing", "dead", "drift", "contaminated"}
    assert "clean" in same
    assert not same & {"missing", "contaminated"}


def test_a_summary_is_the_mean_over_seeds_then_entities() -> None:
    def result(entity: str, seed: int, vus_pr: float, kind: str = "clean") -> Result:
        return Result("s", entity, "cnn", seed, kind, {"vus_pr": vus_pr, "delay_slots": math.nan})

    results = [result("a", 0, 0.1), result("a", 1, 0.3), result("b", 0, 0.6), result("b", 1, 0.6)]
    summary = summarize(results)
    assert summary["entities"]["s/a"]["cnn"]["vus_pr"] == pytest.approx(0.2)
    found = summary["sets"]["s"]["cnn"]
    assert found["vus_pr"] == pytest.approx(0.4)
    assert math.isnan(found["delay_slots"])
    assert found["vus_pr_spread"] == pytest.approx(np.std([0.35, 0.45], ddof=1))
    assert (found["entities"], found["seeds"]) == (2, 2)
    assert "stress" not in summary
    # Cut short: what is kept is kept of the same entity.
    spoiled = summarize([*results, result("b", 0, 0.3, "drift")])
    assert spoiled["stress"] == {"s": {"cnn": {"drift": pytest.approx(0.5)}}}


# -- stress ------------------------------------------------------------------------------------


def test_training_is_contaminated_with_others_anomalies(data: Path) -> None:
    pumps = loaded(data / "pumps")
    spoiled = contaminate(pumps, 0)
    for before, after in zip(pumps.entities, spoiled.entities, strict=True):
        changed = (before.history.values != after.history.values).any(1)
        assert 0.04 < changed.mean() <= 0.051
        np.testing.assert_array_equal(after.past, after.history.values)
        # The channels that fail in the donors; the others stay as usual.
        wild = np.abs(after.past - before.past.mean(0)) / before.past.std(0)
        assert wild[:, 1].max() > 3
        assert wild[:, 0].max() < 5
        assert after.test is before.test
    again = contaminate(pumps, 0)
    np.testing.assert_array_equal(again.entities[1].past, spoiled.entities[1].past)
    alone = contaminate(loaded(data / "fans"), 0)  # its own anomalies, for want of others
    assert (alone.entities[0].past != loaded(data / "fans").entities[0].past).any()


@pytest.mark.parametrize("kind", WORSE)
def test_a_test_part_is_spoiled_as_said(data: Path, kind: str) -> None:
    entity = loaded(data / "fans").entities[0]
    before = trial(entity).values
    after = worsen(kind, entity, before, 0)
    np.testing.assert_array_equal(after, worsen(kind, entity, before, 0))
    assert after.dtype == np.float32
    share = np.isnan(after).mean(0)
    if kind == "missing":
        assert (np.abs(share - 0.3) < 0.1).all()
    elif kind == "dead":
        assert sorted(share) == [0, 0, 0, 0, 1]
    else:
        risen = ((after - before)[-1] / entity.history.values.std(0)).round(2)
        assert sorted(risen) == [0, 0, 1, 1, 1] or sorted(risen) == [0, 0, 0, 1, 1]
        np.testing.assert_array_equal(after[0], before[0])


# -- the command -------------------------------------------------------------------------------


def test_from_folders_to_json(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TrainConfig", partial(TrainConfig, model=MODEL))
    out = tmp_path / "result.json"
    status = cli.main(
        [
            *("evaluate", str(data / "pumps"), "--period", "60s", "--json", "--out", str(out)),
            *("--detector", "tsdiff", "--detector", "pca", "--no-network"),
        ]
    )
    said = capsys.readouterr()
    assert status == 0, said.err
    summary = json.loads(said.out)
    assert json.loads(out.read_text()) == summary
    assert set(summary) == {"sets", "entities"}
    assert set(summary["entities"]) == {"pumps/a", "pumps/b"}
    for found in (summary["sets"]["pumps"], *summary["entities"].values()):
        assert set(found) == {"tsdiff", "pca"}
        for metrics in found.values():
            assert {
                *("vus_pr", "auc_pr", "event_f1", "delay_slots"),
                *("false_alarms_per_entity_day", "root_cause_hit_rate"),
            } <= set(metrics)
            assert metrics["vus_pr"] > 0.5
            assert metrics["root_cause_hit_rate"] == 1.0
    assert "pumps  tsdiff  seed 0: VUS-PR" in said.err


def test_lines_are_aligned_in_a_pipe(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    arguments = ["--detector", "l2", "--detector", "iforest", "--seeds", "2", "--stress"]
    status = cli.main(["evaluate", str(data), "--period", "60s", *arguments, "--out", str(out)])
    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("pumps: mean of 2 entities")
    assert lines[first + 1].split()[:3] == ["detector", "VUS-PR", "±"]
    assert lines[first + 2].split()[0] == "l2"
    assert len({len(line) for line in lines[first + 1 : first + 4]}) == 1
    assert "pumps: share of the VUS-PR kept" in lines
    assert "fans: mean of 1 entities" in lines
    kept = json.loads(out.read_text())["stress"]
    assert set(kept["pumps"]) == {"l2", "iforest"}
    for shares in kept["pumps"].values():
        assert set(shares) == {"missing", "dead", "drift", "contaminated"}
        assert all(0 < share < 2 for share in shares.values())


def test_on_a_terminal_it_is_a_table(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, width=80, file=StringIO())
    monkeypatch.setattr(evaluate_cli, "Console", lambda: console)
    arguments = ["evaluate", str(data / "fans"), "--period", "60s", "--seeds", "2"]
    assert cli.main([*arguments, "--detector", "kmeansad16"]) == 0
    assert isinstance(console.file, StringIO)
    drawn = console.file.getvalue()
    assert "─" in drawn
    assert [
        word for word in ("kmeansad16", "VUS-PR", "±", "false/day") if word not in drawn
    ] == [], drawn
    assert "…" not in drawn


def test_what_is_there_is_printed_on_an_interrupt(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module.evaluate

    def interrupted(*arguments: Any) -> Iterator[Result]:  # noqa: ANN401
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "evaluate", interrupted)
    folder = str(data / "pumps")
    assert cli.main(["evaluate", folder, "--period", "60s", "--detector", "l2", "--json"]) == 130
    assert list(json.loads(capsys.readouterr().out)["entities"]) == ["pumps/a"]
    assert cli.main(["evaluate", folder, "--period", "60s", "--detector", "l2"]) == 130
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["pumps"], 1, "give --period"),
        (["nowhere"], 1, "found no train.parquet"),
        (["pumps", "pumps/a"], 1, "a second entity pumps/a"),
        (["pumps", "--period", "60"], 2, "60s would be seconds"),
        (["pumps", "--period", "fan=60s"], 2, "expected one of the sets pumps, got fan"),
        (["pumps", "--period", "60s", "--detector", "magic"], 2, "expected a detector of tsdiff"),
        (["pumps", "--period", "60s", "--out", "no/such/x.json"], 2, "a folder that exists"),
        (["pumps", "--period", "60s", "--false-alarms", "0"], 2, "a positive rate"),
    ],
)
def test_errors_are_one_line(
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(data)
    assert cli.main(["evaluate", *arguments]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_impossible_settings() -> None:
    with pytest.raises(ConfigError, match="at least one seed"):
        Settings(seeds=0)
    assert set(BASELINES) < set(Settings().detectors)


def test_one_model_for_a_set_or_one_for_each(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared model also learns from the entity that is not judged."""
    trained: list[list[str]] = []

    class Enough(Exception):
        pass

    def train(history: Any, config: Any, *, period_ms: int) -> Any:  # noqa: ANN401
        trained.append([entity.entity for entity in history.entities])
        if not shared and len(trained) < 2:
            return anchor_bundle()
        raise Enough

    monkeypatch.setattr(module, "train", train)
    pumps = loaded(data / "pumps")
    for shared, expected in ((True, [["a", "b", "normal"]]), (False, [["a"], ["b"]])):
        trained.clear()
        settings = replace(Settings(("tsdiff",)), shared=shared)
        with pytest.raises(Enough):
            list(evaluate([pumps], settings, print))
        assert trained == expected
