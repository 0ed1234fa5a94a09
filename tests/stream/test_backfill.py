"""History through the live loop, with a real small model."""

from collections import Counter, defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stream.backfill import BackfillSummary, backfill
from stream.compose import Model, load_model
from stream.config import DetectSection, ServiceConfig, load_config
from stream.errors import StreamError
from stream.records import STATES
from stream.sinks import ParquetSink
from tests.stream.conftest import SmallBundle
from tsdiff.config import Adapt
from tsdiff.detector import HISTORY_SHAPES, SHAPES
from tsdiff.errors import BundleError
from tsdiff.history import EntityHistory, History
from tsdiff.series import score_series
from tsdiff.windows import to_grid

PERIOD_MS = 60_000
Rows = dict[str, list[dict[str, Any]]]


def config(**settings: object) -> ServiceConfig:
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return load_config(None, {"model.path": "b", "input.topic": "t", **given})


def closed_slots(history: History, entity: str, lag: int = 0) -> range:
    """Slots of an entity that are over, by the newest reading of all or since they are complete."""
    watermark = max(int(e.timestamps_ms[-1]) for e in history.entities)
    until = (watermark - config().grid.lateness_ms) // PERIOD_MS
    (own,) = [e for e in history.entities if e.entity == entity]
    numbers, values = to_grid(own.timestamps_ms, own.values, PERIOD_MS, 10_000)
    complete = numbers[~np.isnan(values).any(axis=1)].tolist()
    while until in complete:
        until += 1
    return range(int(numbers[0]), until - lag)


def cut(history: History, start: int, stop: int, names: int | None = None) -> History:
    """Slots `start` to before `stop` of the first entities."""
    first = min(int(e.timestamps_ms[0]) for e in history.entities)
    entities = []
    for entity in history.entities[:names]:
        slots = (entity.timestamps_ms - first) // PERIOD_MS
        chosen = (slots >= start) & (slots < stop)
        entities.append(
            EntityHistory(entity.entity, entity.timestamps_ms[chosen], entity.values[chosen])
        )
    return replace(history, entities=tuple(entities))


@pytest.fixture(scope="module")
def model(small_bundle: SmallBundle) -> Model:
    return load_model(small_bundle.path)


@pytest.fixture(scope="module")
def live(small_bundle: SmallBundle) -> History:
    """Three servers of the training set and the newcomer."""
    entities = small_bundle.live.entities
    return cut(replace(small_bundle.live, entities=(*entities[:3], entities[5])), 0, 700)


@pytest.fixture(scope="module")
def done(
    model: Model, live: History, tmp_path_factory: pytest.TempPathFactory
) -> tuple[BackfillSummary, Path, list[int]]:
    path = tmp_path_factory.mktemp("backfill") / "new" / "scores.parquet"
    told: list[int] = []
    return backfill(live, model, config(), path, told.append), path, told


@pytest.fixture(scope="module")
def rows(done: tuple[BackfillSummary, Path, list[int]]) -> Rows:
    found: Rows = defaultdict(list)
    for row in pq.read_table(done[1]).to_pylist():
        found[row["entity"]].append(row)
    return found


@pytest.mark.parametrize(
    ("adapt", "lag", "shapes"),
    [
        ("full", 0, HISTORY_SHAPES),
        ("full", 7, SHAPES),
        ("level", 3, HISTORY_SHAPES),
        ("level", 0, SHAPES),
        ("none", 15, HISTORY_SHAPES),
    ],
)
def test_the_loop_says_what_a_look_at_the_whole_series_says(
    small_bundle: SmallBundle,
    live: History,
    tmp_path: Path,
    adapt: Adapt,
    lag: Literal[0, 3, 7, 15],
    shapes: tuple[tuple[int, int], ...],
) -> None:
    model = load_model(small_bundle.path, shapes, DetectSection(adapt=adapt, lag=lag))
    detector = model.detector
    entities = live.entities[:3]
    backfill(replace(live, entities=entities), model, config(), tmp_path / "scores.parquet")
    found: Rows = defaultdict(list)
    for row in pq.read_table(tmp_path / "scores.parquet").to_pylist():
        found[row["entity"]].append(row)
    for entity in entities:
        name = entity.entity
        numbers, values = to_grid(entity.timestamps_ms, entity.values, PERIOD_MS, 10_000)
        mean, scale = detector.statistics(detector.row(name))
        whole = score_series(
            detector,
            name,
            values,
            mean=mean,
            scale=scale,
            numbers=numbers,
            first=model.bundle.manifest.model.window,
        )
        # What the service has not closed yet, it has not scored.
        closed = closed_slots(replace(live, entities=entities), name, lag)
        assert [slot_of(row) for row in found[name]] == list(closed)
        threshold = detector.threshold(1.0)
        for row, evidence in zip(found[name], whole.evidence.tolist(), strict=False):
            if row["anomaly_score"] is None:
                assert np.isnan(evidence)
            else:
                assert row["anomaly_score"] * threshold == pytest.approx(evidence, abs=1e-4)


def slot_of(row: dict[str, Any]) -> int:
    elapsed: timedelta = row["timestamp"] - datetime(1970, 1, 1, tzinfo=UTC)
    slot, rest = divmod(elapsed, timedelta(milliseconds=PERIOD_MS))
    assert not rest
    return slot


def test_every_closed_slot_of_every_entity_is_there_once(live: History, rows: Rows) -> None:
    assert rows.keys() == {entity.entity for entity in live.entities}
    for entity in live.entities:
        # Missing readings in between have a slot as well.
        closed = closed_slots(live, entity.entity)
        assert [slot_of(row) for row in rows[entity.entity]] == list(closed)
        assert len(entity.timestamps_ms) < len(rows[entity.entity]) + 2


def test_observed_values_are_those_of_the_history(model: Model, live: History, rows: Rows) -> None:
    column = {name: i for i, name in enumerate(model.detector.channels)}
    for entity in live.entities:
        at = dict(zip((entity.timestamps_ms // PERIOD_MS).tolist(), entity.values, strict=True))
        for row in rows[entity.entity]:
            values = at.get(slot_of(row), np.full(len(column), np.nan))
            assert row["imputed_ratio"] == pytest.approx(np.isnan(values).mean())
            for name, channel in row["channels"]:
                observed = values[column[name]]
                if np.isnan(observed):
                    assert channel["observed"] is None
                else:
                    assert channel["observed"] == pytest.approx(float(observed))


def test_scores_are_numbers_that_belong_together(model: Model, rows: Rows) -> None:
    for row in (row for part in rows.values() for row in part):
        assert row["model"] == model.bundle.version
        assert row["state"] in STATES
        if row["anomaly_score"] is None:
            assert row["p_value"] is None
            assert row["channels"] == []
            continue
        assert row["anomaly_score"] >= 0
        assert 0 < row["p_value"] <= 1
        contributions = [channel["contribution"] for _, channel in row["channels"]]
        assert contributions == sorted(contributions, reverse=True)
        alerting = row["state"] in {"pending", "firing", "recovering"}
        # All of them, too, in the slot in which a channel breaks or is mended.
        assert len(contributions) in ((12,) if alerting else (5, 12))
        if len(contributions) == 12:
            assert sum(contributions) == pytest.approx(1 if row["imputed_ratio"] < 1 else 0)
        for _, channel in row["channels"]:
            assert channel["lower"] <= channel["expected"] <= channel["upper"]


def test_known_entities_warm_up_for_a_window_and_newcomers_for_their_statistics(
    live: History, rows: Rows
) -> None:
    for number, entity in enumerate(live.entities):
        warming = [row["state"] == "warming" for row in rows[entity.entity]]
        slots = config().detect.warmup_slots if number == 3 else 16
        assert warming == [True] * slots + [False] * (len(warming) - slots)


def test_states_follow_the_alert_rule_and_faults_are_found(
    done: tuple[BackfillSummary, Path, list[int]], rows: Rows
) -> None:
    follows = {
        "warming": {"warming", "ok", "pending"},
        "ok": {"ok", "pending"},
        "pending": {"pending", "ok", "firing"},
        "firing": {"firing", "recovering"},
        "recovering": {"recovering", "ok", "firing"},
    }
    changes: Counter[tuple[str, str]] = Counter()
    for part in rows.values():
        for row, next_row in pairwise(part):
            before, after = row["state"], next_row["state"]
            assert after in follows[before]
            told = before != after and (before, after) != ("warming", "ok")
            changes[before, after] += told or row["faulty"] != next_row["faulty"]
    summary = done[0]
    assert Counter((a.previous, a.state) for a in summary.alerts) == +changes
    assert changes["pending", "firing"] > 0
    # One in three days of four servers at most: an alert is rare on this simulated fleet.
    assert sum(row["state"] == "firing" for part in rows.values() for row in part) < 400


def test_the_file_has_the_schema_that_is_documented(
    done: tuple[BackfillSummary, Path, list[int]],
) -> None:
    summary, path, told = done
    schema = pq.read_schema(path)
    number = pa.float64()
    channel = pa.struct(
        [(name, number) for name in ("observed", "expected", "lower", "upper", "contribution")]
    )
    assert [(field.name, field.type) for field in schema] == [
        ("entity", pa.string()),
        ("timestamp", pa.timestamp("ms", tz="UTC")),
        ("anomaly_score", number),
        ("p_value", number),
        ("state", pa.string()),
        ("imputed_ratio", number),
        ("model", pa.string()),
        ("faulty", pa.map_(pa.string(), pa.string())),
        ("channels", pa.map_(pa.string(), channel)),
    ]
    assert summary.scores == pq.read_metadata(path).num_rows
    assert told[0] == 0
    assert told == sorted(told)
    assert told[-1] == summary.readings
    assert summary.warming == ()
    assert list(path.parent.iterdir()) == [path]


def test_a_part_of_the_history_gives_the_same_scores(
    model: Model, live: History, rows: Rows, tmp_path: Path
) -> None:
    # The first entity alone, and cut short: no score knows the future.
    path = tmp_path / "part.parquet"
    backfill(cut(live, 0, 200, names=1), model, config(grid__lateness="0s"), path)
    part = pq.read_table(path).to_pylist()
    whole = rows[live.entities[0].entity][: len(part)]
    assert len(part) == 200
    for ours, theirs in zip(part, whole, strict=True):
        assert ours["state"] == theirs["state"]
        if ours["state"] != "warming":
            assert ours["anomaly_score"] == pytest.approx(theirs["anomaly_score"], rel=1e-4)


def test_too_short_a_history_has_slots_and_no_scores(
    model: Model, live: History, tmp_path: Path
) -> None:
    path = tmp_path / "scores.parquet"
    short = cut(live, 0, 10, names=2)
    summary = backfill(short, model, config(grid__lateness="0s"), path)
    assert summary.scores == 18
    assert summary.warming == tuple(entity.entity for entity in short.entities)
    assert set(pq.read_table(path)["state"].to_pylist()) == {"warming"}


@pytest.mark.parametrize("at", ["commit", "close"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_backfill_that_fails_leaves_no_file(
    model: Model,
    live: History,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
    error: BaseException,
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "scores.parquet"
    path.write_bytes(b"the one of yesterday")
    monkeypatch.setattr(ParquetSink, at, fail)
    with pytest.raises(type(error)):
        backfill(cut(live, 0, 10), model, config(), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"the one of yesterday"


def test_a_place_that_cannot_be_written_is_said_at_once(
    model: Model, live: History, tmp_path: Path
) -> None:
    told: list[int] = []
    (tmp_path / "file").write_text("")
    for path, said in ((tmp_path, "folder"), (tmp_path / "file" / "x.parquet", "cannot write")):
        with pytest.raises(StreamError, match=said):
            backfill(live, model, config(), path, told.append)
    assert told == []


def test_another_period_than_the_models_is_refused(
    model: Model, live: History, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"grid\.period of 60s.*got 30s; train"):
        backfill(live, model, config(grid__period="30s"), tmp_path / "scores.parquet")
    assert list(tmp_path.iterdir()) == []
