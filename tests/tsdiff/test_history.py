"""Reading Parquet history: what is accepted, mended with a warning, or refused in one line."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsdiff.errors import HistoryError
from tsdiff.history import load_history

T = TypeVar("T")

MINUTE = 60_000
NOON = 1_795_435_200_000


def write(path: Path, **columns: Any) -> Path:  # noqa: ANN401  (whatever pyarrow takes)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def only(things: Sequence[T]) -> T:
    assert len(things) == 1
    return things[0]


def refusal(path: Path, *, period_ms: int | None = MINUTE, **options: Any) -> str:  # noqa: ANN401
    with pytest.raises(HistoryError) as caught:
        load_history(path, period_ms=period_ms, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- where the readings are ------------------------------------------------------------------


def test_a_file_is_an_entity_named_by_its_stem(tmp_path: Path) -> None:
    path = write(tmp_path / "web-17.parquet", timestamp=[0, 1], cpu=[0.25, None], mem=[1, 2])
    history = load_history(path, period_ms=MINUTE)
    entity = only(history.entities)
    assert history.channels == ("cpu", "mem")
    assert history.warnings == ()
    assert entity.entity == "web-17"
    assert entity.timestamps_ms.dtype == np.int64
    assert entity.timestamps_ms.tolist() == [0, MINUTE]
    assert entity.values.dtype == np.float32
    np.testing.assert_array_equal(entity.values, [[0.25, 1], [np.nan, 2]])


def test_a_part_is_named_by_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "pump" / "train.parquet", timestamp=[0], flow=[1.0])
    assert only(load_history(path, period_ms=MINUTE).entities).entity == "pump"


def test_a_folder_of_files_and_of_folders(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", timestamp=[0], x=[1.0])
    for part, value in (("train", 2.0), ("test", 3.0)):
        write(tmp_path / "b" / f"{part}.parquet", timestamp=[0], x=[value], label=[0])
    (tmp_path / "notes.txt").write_text("not telemetry", "utf-8")
    history = load_history(tmp_path, period_ms=MINUTE)
    assert [(e.entity, e.values.tolist()) for e in history.entities] == [
        ("a", [[1.0]]),
        ("b", [[2.0]]),
    ]
    history = load_history(tmp_path, period_ms=MINUTE, part="test")
    assert history.entities[1].values.tolist() == [[3.0]]


def test_the_folder_of_one_entity(tmp_path: Path) -> None:
    write(tmp_path / "pump" / "train.parquet", timestamp=[0], x=[1.0])
    write(tmp_path / "pump" / "test.parquet", timestamp=[1], x=[2.0])
    entity = only(load_history(tmp_path / "pump", period_ms=MINUTE, part="test").entities)
    assert (entity.entity, entity.values.tolist()) == ("pump", [[2.0]])


def test_a_folder_without_the_part_is_left_out_with_a_warning(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.parquet", timestamp=[0], x=[1.0])
    write(tmp_path / "a" / "test.parquet", timestamp=[0], x=[1.0])
    write(tmp_path / "b" / "train.parquet", timestamp=[0], x=[1.0])
    history = load_history(tmp_path, period_ms=MINUTE, part="test")
    assert only(history.entities).entity == "a"
    assert history.warnings == (f"{tmp_path / 'b'}: has no test.parquet, left out",)


@pytest.mark.parametrize("coded", [False, True])
def test_entities_by_column(tmp_path: Path, coded: bool) -> None:
    entity = pa.array(["b", "a", "b", "a"])
    if coded:
        entity = entity.dictionary_encode()
    path = write(tmp_path / "all.parquet", timestamp=[0, 0, 1, 1], entity=entity, x=[1, 2, 3, 4])
    history = load_history(path, period_ms=MINUTE)
    assert history.channels == ("x",)
    assert [(e.entity, e.values[:, 0].tolist()) for e in history.entities] == [
        ("a", [2, 4]),
        ("b", [1, 3]),
    ]


def test_an_entity_spread_over_files_is_joined(tmp_path: Path) -> None:
    write(tmp_path / "day-2.parquet", timestamp=[1, 2], entity=["a", "a"], x=[20, 30])
    write(tmp_path / "day-1.parquet", timestamp=[0, 1], entity=["a", "a"], x=[0, 10])
    history = load_history(tmp_path, period_ms=1)
    entity = only(history.entities)
    assert entity.timestamps_ms.tolist() == [0, 1, 2]
    assert entity.values[:, 0].tolist() == [0, 20, 30]
    assert history.warnings == (
        "a: 1 timestamps are in several files; the last in order of file names is kept",
    )


def test_nothing_there(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "gone")
    assert "found none" in refusal(tmp_path)
    assert f"{tmp_path}" in refusal(tmp_path)


# -- time ------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
def test_parquet_timestamps_are_utc_milliseconds(
    tmp_path: Path, unit: str, zone: str | None
) -> None:
    noon = datetime.datetime.fromtimestamp(NOON / 1000, datetime.UTC)
    times = pa.array([noon], pa.timestamp(unit, zone))
    path = write(tmp_path / "a.parquet", timestamp=times, x=[1.0])
    history = load_history(path, period_ms=None)
    assert only(history.entities).timestamps_ms.tolist() == [NOON]


def test_integers_are_steps_or_milliseconds(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", timestamp=[NOON, NOON + MINUTE], x=[1.0, 2.0])
    history = load_history(path, period_ms=None)
    assert only(history.entities).timestamps_ms.tolist() == [NOON, NOON + MINUTE]
    path = write(tmp_path / "b.parquet", timestamp=[7, 8], x=[1.0, 2.0])
    history = load_history(path, period_ms=MINUTE)
    assert only(history.entities).timestamps_ms.tolist() == [7 * MINUTE, 8 * MINUTE]
    assert "give --period" in refusal(path, period_ms=None)


def test_other_units_of_the_epoch_are_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", timestamp=[NOON * 1000], x=[1.0])
    assert "divide microseconds by 1,000" in refusal(path)
    path = write(tmp_path / "b.parquet", timestamp=[NOON // 1000], x=[1.0])
    warning = only(load_history(path, period_ms=MINUTE).warnings)
    assert "multiply them by 1,000" in warning


def test_no_timestamp_column(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.parquet", time=[0], x=[1.0]))
    assert message.startswith(f"{tmp_path / 'a.parquet'}: expected a column `timestamp`, found ")
    assert "`time`, `x`" in message


@pytest.mark.parametrize(
    ("times", "said"), [(["noon"], "text (string)"), ([0.5], "of type double")]
)
def test_timestamps_of_another_type(tmp_path: Path, times: list[object], said: str) -> None:
    assert said in refusal(write(tmp_path / "a.parquet", timestamp=times, x=[1.0]))


def test_rows_without_a_timestamp_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", timestamp=[0, None, 2], x=[1.0, 2.0, 3.0])
    history = load_history(path, period_ms=1)
    assert only(history.entities).values[:, 0].tolist() == [1, 3]
    assert history.warnings == (f"{path}: 1 of 3 rows have no timestamp, left out",)


def test_unsorted_rows_are_sorted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", timestamp=[0, 3, 1, 2, 4], x=[0, 3, 1, 2, 4])
    history = load_history(path, period_ms=1)
    assert only(history.entities).values[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert history.warnings == (f"{path}: 2 of 5 rows were out of order; sorted",)


def test_of_repeated_timestamps_the_last_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", timestamp=[0, 1, 1, 0], x=[1, 2, 3, 4])
    history = load_history(path, period_ms=1)
    assert only(history.entities).values[:, 0].tolist() == [4, 3]
    assert history.warnings == (
        f"{path}: 1 of 4 rows were out of order; sorted",
        f"{path}: 2 of 4 rows repeat a timestamp; the last of each is kept",
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(-99, 99)), min_size=1
    )
)
def test_the_last_reading_of_every_slot_wins(
    tmp_path: Path, rows: list[tuple[str, int, int]]
) -> None:
    entity, timestamp, x = zip(*rows, strict=True)
    path = write(tmp_path / "a.parquet", timestamp=timestamp, entity=entity, x=x)
    history = load_history(path, period_ms=1)
    last = {(name, when): value for name, when, value in rows}
    assert {
        (e.entity, when): value
        for e in history.entities
        for when, value in zip(e.timestamps_ms.tolist(), e.values[:, 0].tolist(), strict=True)
    } == last
    assert all(np.all(np.diff(e.timestamps_ms) > 0) for e in history.entities)


# -- channels --------------------------------------------------------------------------------


def test_every_kind_of_number_and_every_kind_of_missing(tmp_path: Path) -> None:
    columns: Mapping[str, pa.Array] = {
        "double": pa.array([1.5, float("nan"), float("inf"), 1e300]),
        "float": pa.array([1.5, None, float("-inf"), 2.0], pa.float32()),
        "int": pa.array([1, None, 3, 4]),
        "bool": pa.array([True, False, None, True]),
        "decimal": pa.array([1, 2, None, 4], pa.decimal128(9, 2)),
    }
    path = write(tmp_path / "a.parquet", timestamp=[0, 1, 2, 3], **columns)
    nan = np.nan
    np.testing.assert_array_equal(
        only(load_history(path, period_ms=1).entities).values.T,
        [[1.5, nan, nan, nan], [1.5, nan, nan, 2], [1, nan, 3, 4], [1, 0, nan, 1], [1, 2, nan, 4]],
    )


def test_labels_and_indices_are_no_channels(tmp_path: Path) -> None:
    others = ("label", "label_any", "segment", "changepoint", "__index_level_0__")
    path = write(tmp_path / "a.parquet", timestamp=[0], x=[1.0], **{name: [1] for name in others})
    assert load_history(path, period_ms=1).channels == ("x",)


@pytest.mark.parametrize("coded", [False, True])
def test_a_text_column_is_named(tmp_path: Path, coded: bool) -> None:
    text = pa.array(["eu-1"])
    text = text.dictionary_encode() if coded else text
    message = refusal(write(tmp_path / "a.parquet", timestamp=[0], x=[1.0], region=text))
    assert "column `region` is text (string)" in message
    assert "drop the column or convert it" in message


def test_a_column_of_lists_is_named(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.parquet", timestamp=[0], x=[[1.0]]))
    assert "column `x` is of type list<" in message


def test_no_channels(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.parquet", timestamp=[0], label=[1]))
    assert "expected a numeric column for each channel, found none" in message


def test_an_empty_channel_is_kept_with_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", timestamp=[0, 1], x=[1.0, 2.0], dead=[None, None])
    history = load_history(path, period_ms=1)
    assert history.channels == ("x", "dead")
    assert np.isnan(only(history.entities).values[:, 1]).all()
    assert history.warnings == ("a: no reading at all in `dead`; kept as missing",)


def test_entities_with_different_channels_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", timestamp=[0], x=[1.0], y=[1.0])
    write(tmp_path / "b.parquet", timestamp=[0], x=[1.0], z=[1.0])
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'b.parquet'}: channels differ")
    assert f"from {tmp_path / 'a.parquet'}: lacks `y` and adds `z`" in message


def test_another_order_of_channels_is_put_right(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", timestamp=[0], x=[1.0], y=[2.0])
    write(tmp_path / "b.parquet", timestamp=[0], y=[2.0], x=[1.0])
    assert [e.values.tolist() for e in load_history(tmp_path, period_ms=1).entities] == [
        [[1.0, 2.0]],
        [[1.0, 2.0]],
    ]


def test_channels_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", timestamp=[0], x=[1.0], region=["eu"], y=[2.0])
    history = load_history(path, period_ms=1, channels=["y", "x"])
    assert history.channels == ("y", "x")
    assert only(history.entities).values.tolist() == [[2.0, 1.0]]
    message = refusal(path, channels=["y", "q"])
    assert "differ from the channels asked for: lacks `q`" in message


# -- broken files ----------------------------------------------------------------------------


def test_a_file_without_rows(tmp_path: Path) -> None:
    empty = write(tmp_path / "a.parquet", timestamp=pa.array([], pa.int64()), x=pa.array([], "f4"))
    assert "found no row" in refusal(empty)
    write(tmp_path / "b.parquet", timestamp=[0], x=[1.0])
    history = load_history(tmp_path, period_ms=1)
    assert only(history.entities).entity == "b"
    assert history.warnings == (f"{empty}: holds no rows, left out",)


@pytest.mark.parametrize("keep", [0, 3, 100, -20])
def test_a_damaged_file(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "a.parquet", timestamp=list(range(100)), x=[1.0] * 100)
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(path)
    assert message.startswith(f"{path}: not a readable Parquet file (")


def test_damage_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", timestamp=list(range(5000)), x=np.random.rand(5000))
    data = bytearray(path.read_bytes())
    data[8:2000] = bytes(1992)
    path.write_bytes(data)
    assert "not a readable Parquet file" in refusal(path)


def test_rows_without_an_entity(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", timestamp=[0, 1], entity=["a", None], x=[1.0, 2.0])
    assert "1 of 2 rows have no `entity`" in refusal(path)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pa.array([1])
    pq.write_table(pa.Table.from_arrays([column] * 3, ["timestamp", "x", "x"]), path)
    assert "several columns are called `x`" in refusal(path)


# -- the real thing --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "entities", "period_ms"),
    [
        ("smd", 38, 8, 60_000),
        ("asd", 19, 6, 300_000),
        ("gecco", 9, 1, 60_000),
        ("skab", 8, 7, 1000),
    ],
)
def test_labelled_telemetry_can_be_read(
    telemetry: Path, name: str, channels: int, entities: int, period_ms: int
) -> None:
    if not (telemetry / name).is_dir():
        pytest.skip(f"no {name} in {telemetry}")
    history = load_history(telemetry / name, period_ms=period_ms, part="test")
    assert len(history.channels) == channels
    assert len(history.entities) == entities
    for entity in history.entities:
        assert entity.values.shape == (len(entity.timestamps_ms), channels)
        assert np.all(np.diff(entity.timestamps_ms) > 0)
        assert np.isfinite(entity.values).mean() > 0.5
