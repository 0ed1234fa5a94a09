"""What is read, what is refused and why, and that everything written can be read again."""

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from msgspec.structs import asdict

from stream.buffer import EntitySnapshot
from stream.codec import (
    REASONS,
    Columns,
    CommitMetadata,
    Origin,
    dead_letter_headers,
    decode_snapshot,
    encode_alert,
    encode_score,
    encode_snapshot,
    fit_dead_letter,
    origin_of,
    rfc3339,
)
from stream.decide import AlertState
from stream.errors import DecodeError
from stream.formats.base import MAX_ENTITY_CHARS, Decoded
from stream.formats.native import decode_native
from stream.grid import ReplayPoint
from stream.records import STATES, AlertEvent, ChannelScore, DeadLetter, SlotScore
from tsdiff.runs import Runs

NOON = 1_795_435_200_000  # 2026-11-23T12:00:00Z
LAST = 253_402_300_799_999  # 9999-12-31T23:59:59.999Z


def message(
    timestamp: str = "0", values: str = '{"cpu": 1}', entity: str = '"web-17"', more: str = ""
) -> bytes:
    """A native message of JSON fragments."""
    text = f'{{"entity": {entity}, "timestamp": {timestamp}, "values": {values}{more}}}'
    return text.encode()


def read(value: bytes) -> Decoded:
    (reading,) = decode_native(value)
    return reading


# -- what is read ------------------------------------------------------------------------------


def test_the_example_of_the_documentation() -> None:
    assert read(
        b'{"entity": "web-17", "timestamp": "2026-11-23T12:00:00Z", '
        b'"values": {"cpu": 0.42, "mem": null}}'
    ) == Decoded("web-17", NOON, {"cpu": 0.42, "mem": None})


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        ('"2026-11-23T12:00:00Z"', NOON),
        ('"2026-11-23T12:00:00z"', NOON),
        ('"2026-11-23 12:00:00Z"', NOON),
        ('"2026-11-23t12:00:00+00:00"', NOON),
        ('"2026-11-23T14:30:00+02:30"', NOON),
        ('"2026-11-22T22:00:00-14:00"', NOON),
        ('"2026-11-23T12:00:00.5Z"', NOON + 500),
        ('"2026-11-23T12:00:00.123456789Z"', NOON + 123),
        # A millisecond that is not over yet is not rounded up: :59.9996 is in its minute.
        ('"2026-11-23T12:00:59.9996Z"', NOON + 59_999),
        (str(NOON), NOON),
        (f"{NOON}.9", NOON),
        (f"{NOON / 1e3:.1f}e3", NOON),
        ("0", 0),
        ("-0.0", 0),
        (str(LAST), LAST),
        ('"1970-01-01T00:00:00Z"', 0),
        ('"9999-12-31T23:59:59.999Z"', LAST),
    ],
)
def test_timestamps(timestamp: str, expected: int) -> None:
    assert read(message(timestamp)).timestamp_ms == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", 1.0),
        ("-2.5e-3", -0.0025),
        ("null", None),
        ("NaN", math.nan),
        ("Infinity", math.inf),
        ("-Infinity", -math.inf),
        ("123456789012345678901234567890", 1.2345678901234568e29),
        ("-0", 0.0),
    ],
)
def test_values(value: str, expected: float | None) -> None:
    got = read(message(values=f'{{"cpu": {value}}}')).values["cpu"]
    assert got == expected or (got is not None and math.isnan(got))


@pytest.mark.parametrize(
    "value",
    [
        message(values="{}"),
        message(more=', "host": {"deep": [1, 2, {}]}'),
        b"\n\t " + message() + b" \n",
        message().replace(b'"cpu"', '"température"'.encode()),
        b"\xef\xbb\xbf" + message(),
        message(entity='"\\ud83d\\ude00"'),
        message(entity='"\\u0000"'),
        message(entity=f'"{"e" * MAX_ENTITY_CHARS}"'),
    ],
)
def test_unusual_messages_that_are_fine(value: bytes) -> None:
    assert read(value).timestamp_ms == 0


def test_of_a_repeated_key_the_last_counts() -> None:
    assert read(message(values='{"cpu": 1, "cpu": 2}')).values == {"cpu": 2.0}


# -- what is refused ---------------------------------------------------------------------------

DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("value", "reason", "said"),
    [
        (b"", "not_json", "truncated"),
        (b"not JSON", "not_json", "malformed"),
        (b"{", "not_json", "truncated"),
        (message()[:-1], "not_json", "truncated"),
        (message() + b"x", "not_json", "trailing"),
        (message().replace(b'"', b"'"), "not_json", "malformed"),
        (b"\xff\xfe\x00", "not_json", "malformed"),
        (message(values='{"?": 1}').replace(b"?", b"\xff"), "not_json", "UTF-8"),
        (message(entity='"?"').replace(b"?", b"\xc3\x28"), "not_json", "UTF-8"),
        (message(entity='"\\ud800"'), "not_json", "surrogate"),
        (message(values='{"cpu": nan}'), "not_json", "malformed"),
        (message(values='{"cpu": 01}'), "not_json", "malformed"),
        (message(values='{"cpu": NaN, "mem": 1' + "0" * 5000 + "}"), "not_json", "malformed"),
        (b"[NaN" + b"," + DEEP, "wrong_type", "array"),
        (b"null", "wrong_type", "null"),
        (b"[]", "wrong_type", "array"),
        (b"42", "wrong_type", "int"),
        (b"true", "wrong_type", "bool"),
        (b'"text"', "wrong_type", "str"),
        (DEEP, "wrong_type", "array"),
        (b"[" + message() + b"]", "wrong_type", "array"),
        (message(entity="null"), "wrong_type", "$.entity"),
        (message(entity="17"), "wrong_type", "$.entity"),
        (message(entity='["web"]'), "wrong_type", "$.entity"),
        (message(entity=f'"{"e" * (MAX_ENTITY_CHARS + 1)}"'), "wrong_type", "512 characters"),
        (message(values="null"), "wrong_type", "$.values"),
        (message(values="[1, 2]"), "wrong_type", "$.values"),
        (message(values='{"cpu": "1"}'), "wrong_type", "$.values"),
        (message(values='{"cpu": "NaN"}'), "wrong_type", "$.values"),
        (message(values='{"cpu": true}'), "wrong_type", "bool"),
        (message(values='{"cpu": [1]}'), "wrong_type", "array"),
        (message(values='{"cpu": {"mean": 1}}'), "wrong_type", "object"),
        (message(values='{"cpu": 1e400}'), "wrong_type", "out of range"),
        (message(values='{"cpu": 1' + "0" * 400 + "}"), "wrong_type", "out of range"),
        (message(values='{"cpu": NaN, "mem": 1' + "0" * 400 + "}"), "wrong_type", "out of range"),
        (message(values='{"cpu": ' + '{"a":' * 100_000), "wrong_type", "object"),
        (b"{}", "missing_field", "entity"),
        (b'{"timestamp": 0, "values": {}}', "missing_field", "entity"),
        (b'{"entity": "a", "values": {}}', "missing_field", "timestamp"),
        (b'{"entity": "a", "timestamp": 0}', "missing_field", "values"),
        (message(entity='""'), "missing_field", "got 0"),
        (message("null"), "bad_timestamp", "null"),
        (message("true"), "bad_timestamp", "bool"),
        (message("{}"), "bad_timestamp", "object"),
        (message('"now"'), "bad_timestamp", "RFC3339"),
        (message(f'"{NOON}"'), "bad_timestamp", "RFC3339"),
        (message('"2026-11-23"'), "bad_timestamp", "RFC3339"),
        (message('"2026-11-23T12:00:00"'), "bad_timestamp", "timezone"),
        (message('"2026-02-30T12:00:00Z"'), "bad_timestamp", "RFC3339"),
        (message('"2026-11-23T25:00:00Z"'), "bad_timestamp", "RFC3339"),
        (message("-1"), "bad_timestamp", "got -1"),
        (message("-0.5"), "bad_timestamp", "got -0.5"),
        (message('"1969-12-31T23:59:59.9Z"'), "bad_timestamp", "1970 and 9999"),
        (message('"0001-01-01T00:00:00+14:00"'), "bad_timestamp", "1970 and 9999"),
        (message('"10000-01-01T00:00:00Z"'), "bad_timestamp", "RFC3339"),
        (message('"9999-12-31T23:59:59-05:00"'), "bad_timestamp", "1970 and 9999"),
        (message(str(LAST + 1)), "bad_timestamp", "1970 and 9999"),
        (message("1e300"), "bad_timestamp", "1970 and 9999"),
        (message("1e400"), "bad_timestamp", "out of range"),
        (message("1" + "0" * 400), "bad_timestamp", "1970 and 9999"),
        (message("1" + "0" * 5000), "bad_timestamp", "out of range"),
        (message("NaN"), "bad_timestamp", "nan"),
        (message("-Infinity"), "bad_timestamp", "inf"),
        (message("1" + "0" * 400, values='{"cpu": NaN}'), "bad_timestamp", "1970 and 9999"),
    ],
    ids=lambda given: repr(given)[:60],
)
def test_what_cannot_be_read_has_a_reason(value: bytes, reason: str, said: str) -> None:
    with pytest.raises(DecodeError) as refusal:
        decode_native(value)
    assert refusal.value.reason == reason
    # msgspec before 0.23 names the codec.
    assert said in str(refusal.value).replace("'utf-8' codec", "UTF-8")
    assert "expected" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    # It goes into a header of the dead letter, as UTF-8.
    assert len(str(refusal.value).encode()) < 1000


def test_reasons_are_those_that_the_metrics_know() -> None:
    assert {"empty", "not_json", "wrong_type", "missing_field", "bad_timestamp"} <= set(REASONS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SIMILAR = st.fixed_dictionaries(
    {},
    optional={
        "entity": st.text() | JSON,
        "timestamp": st.integers() | st.floats() | st.datetimes().map(str) | JSON,
        "values": st.dictionaries(st.text(), st.floats() | st.integers() | st.none()) | JSON,
    },
)


def is_read_or_refused(value: bytes) -> None:
    try:
        (reading,) = decode_native(value)
    except DecodeError as error:
        assert error.reason in REASONS
        str(error).encode()
        return
    assert 1 <= len(reading.entity) <= MAX_ENTITY_CHARS
    reading.entity.encode()  # the key of its records
    rfc3339(reading.timestamp_ms)
    columns = Columns(("a", "b"))
    columns.add(reading, 0)
    assert not np.isinf(columns.values()).any()


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(value: bytes) -> None:
    is_read_or_refused(value)


@given(SIMILAR, st.booleans())
@example({"entity": "\ud800", "timestamp": 0, "values": {}}, True)
@example({"entity": "a", "timestamp": 10**400, "values": {}}, True)
@settings(max_examples=200, deadline=None)
def test_any_json_is_read_or_refused(document: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only)
    is_read_or_refused(text.encode(errors="surrogatepass"))


@given(st.integers(0, 60), st.binary(max_size=4), st.integers(0, 8))
@settings(max_examples=200, deadline=None)
def test_a_damaged_message_is_read_or_refused(at: int, splice: bytes, cut: int) -> None:
    whole = message('"2026-11-23T12:00:00Z"')
    is_read_or_refused(whole[:at] + splice + whole[at + cut :])


# -- columns -----------------------------------------------------------------------------------


def test_columns_are_the_models_channels() -> None:
    columns = Columns(("cpu", "mem", "disk"))
    columns.add(Decoded("a", 5, {"disk": 3.0, "cpu": 1.0, "fan": 9.0, "gpu": None}), 70)
    columns.add(Decoded("b", 6, {"mem": None}), 71)
    columns.add(Decoded("a", 7, {}), 71)
    nan = math.nan
    np.testing.assert_array_equal(columns.values(), [[1, nan, 3], [nan] * 3, [nan] * 3])
    assert columns.values().dtype == np.float32
    assert columns.entities == ["a", "b", "a"]
    assert columns.timestamps_ms == [5, 6, 7]
    assert columns.offsets == [70, 71, 71]
    assert columns.unknown_channels == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.5e38, -1e300, None])
def test_what_is_no_finite_float32_is_missing(value: float | None) -> None:
    columns = Columns(("cpu", "mem"))
    columns.add(Decoded("a", 0, {"cpu": value, "mem": 3.4e38}), 0)
    assert np.isnan(columns.values()).tolist() == [[True, False]]


def test_no_readings_are_an_empty_table() -> None:
    assert Columns(("cpu", "mem")).values().shape == (0, 2)


# -- what leaves -------------------------------------------------------------------------------

CHANNEL = ChannelScore(0.9, 0.4, 0.3, 0.5, 0.7)


@given(st.integers(-62_135_596_800_000, LAST))
@example(NOON)
@example(NOON + 1)
@example(253_370_764_800_001)
@settings(max_examples=300, deadline=None)
def test_rfc3339_is_what_datetime_reads(timestamp_ms: int) -> None:
    text = rfc3339(timestamp_ms)
    assert text.endswith("Z")
    assert (".000" in text, "." in text) == (False, timestamp_ms % 1000 != 0)
    moment = datetime.fromisoformat(text)
    assert moment - datetime(1970, 1, 1, tzinfo=UTC) == timedelta(milliseconds=timestamp_ms)
    if timestamp_ms >= 0:
        assert read(message(f'"{text}"')).timestamp_ms == timestamp_ms


@given(
    st.datetimes(datetime(1970, 1, 2), datetime(9999, 12, 30)),  # noqa: DTZ001 - the zone follows
    st.integers(-14 * 60, 14 * 60),
)
@settings(max_examples=200, deadline=None)
def test_every_zone_is_the_same_moment(local: datetime, minutes: int) -> None:
    moment = local.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    elapsed = moment - datetime(1970, 1, 1, tzinfo=UTC)
    got = read(message(f'"{moment.isoformat()}"')).timestamp_ms
    assert got == elapsed // timedelta(milliseconds=1)


def test_a_score_as_a_record() -> None:
    score = SlotScore(
        "web-17",
        NOON,
        1.25,
        0.001,
        "firing",
        0.5,
        "m@0",
        {"cpu": CHANNEL, "a": CHANNEL},
        {"a": "stuck"},
    )
    record = json.loads(encode_score(score))
    assert list(record["channels"]) == ["cpu", "a"]
    assert record == {
        "entity": "web-17",
        "timestamp": "2026-11-23T12:00:00Z",
        "anomaly_score": 1.25,
        "p_value": 0.001,
        "state": "firing",
        "imputed_ratio": 0.5,
        "model": "m@0",
        "faulty": {"a": "stuck"},
        "channels": {"cpu": asdict(CHANNEL), "a": asdict(CHANNEL)},
    }


def test_a_score_of_nothing_is_null_not_absent() -> None:
    score = SlotScore("é", 1, None, None, "stale", 1.0, "m@0", {"cpu": CHANNEL})
    record = json.loads(encode_score(score))
    assert record["anomaly_score"] is None
    assert record["p_value"] is None
    assert record["timestamp"] == "1970-01-01T00:00:00.001Z"
    assert record["entity"] == "é"


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats() | st.none())
@settings(max_examples=50, deadline=None)
def test_a_record_is_json_whatever_the_numbers(number: float, observed: float | None) -> None:
    channel = ChannelScore(observed, number, number, number, number)
    score = SlotScore("a", 0, number, number, "ok", number, "m@0", {"cpu": channel})

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    record = json.loads(encode_score(score), parse_constant=refuse)
    assert record["anomaly_score"] == (number if math.isfinite(number) else None)


def test_an_alert_as_a_record() -> None:
    channels = {"cpu": CHANNEL}
    alert = AlertEvent("a", NOON, "firing", "pending", 0, 1.5, channels, "m@0", summary="cpu")
    assert json.loads(encode_alert(alert)) == {
        "entity": "a",
        "timestamp": "2026-11-23T12:00:00Z",
        "state": "firing",
        "previous": "pending",
        "since": "1970-01-01T00:00:00Z",
        "anomaly_score": 1.5,
        "summary": "cpu",
        "model": "m@0",
        "faulty": {},
        "channels": {"cpu": asdict(CHANNEL)},
    }


def test_a_dead_letter_says_where_it_came_from_and_why() -> None:
    letter = DeadLetter("in", 3, 2**40, "not_json", "expected é", b"k", None)
    assert dict(dead_letter_headers(letter)) == {
        "topic": b"in",
        "partition": b"3",
        "offset": b"1099511627776",
        "reason": b"not_json",
        "error": "expected é".encode(),
    }


def test_the_headers_of_the_message_stay_and_are_told_from_ours() -> None:
    own = (("topic", b"theirs"), ("trace", b""), ("error", b"\xff"))
    letter = DeadLetter("in", 3, 5, "not_json", "expected JSON", b"k", b"v", own)
    fitted = fit_dead_letter(letter, 1000)
    assert (fitted.key, fitted.value) == (b"k", b"v")
    assert dict(fitted.headers)["topic"] == b"in"
    assert origin_of(fitted.headers) == Origin("in", 3, own, truncated=False)
    assert origin_of(own) is None
    assert origin_of([]) is None
    assert origin_of([*fitted.headers, ("more", b"")]) is None
    assert origin_of([*fitted.headers[:-4], ("partition", b"x"), *fitted.headers[-3:]]) is None


@given(
    st.none() | st.binary(max_size=300),
    st.none() | st.binary(max_size=300),
    st.lists(st.tuples(st.text(max_size=60), st.binary(max_size=60)), max_size=4),
    st.integers(8, 200),
)
@settings(max_examples=200, deadline=None)
def test_a_dead_letter_fits_or_says_that_it_was_cut(
    key: bytes | None, value: bytes | None, own: list[tuple[str, bytes]], largest: int
) -> None:
    letter = DeadLetter("in", 3, 5, "too_large", "expected less", key, value, tuple(own))
    fitted = fit_dead_letter(letter, largest)
    origin = origin_of(fitted.headers)
    assert origin is not None
    size = len(fitted.key or b"") + len(fitted.value or b"")
    size += sum(len(name.encode()) + len(content) for name, content in origin.headers)
    assert size <= largest
    # What kafka-python takes at all.
    assert fitted.key is not None or fitted.value is not None
    if origin.truncated:
        assert dict(fitted.headers)["truncated_from_bytes"] == str(len(value or b"")).encode()
    else:
        same = (fitted.key, fitted.value or None, origin.headers)
        assert same == (key, value or None, tuple(own))


# -- state -------------------------------------------------------------------------------------

COUNTS = st.integers(-(2**40), 2**40)
ALERTS = st.builds(AlertState, st.sampled_from(STATES), COUNTS, st.integers(0, 2**64 - 1), COUNTS)


def arrays(rows: int, dtype: type) -> st.SearchStrategy[np.ndarray | None]:
    numbers = st.lists(st.floats(width=32), min_size=2 * rows, max_size=2 * rows)
    return st.none() | numbers.map(lambda x: np.array(x, dtype).reshape(rows, 2))


COUNTS_OF_CHANNELS = st_np.arrays(np.int32, 2)
RUNS = st.builds(
    Runs,
    COUNTS_OF_CHANNELS,
    COUNTS_OF_CHANNELS,
    st_np.arrays(np.float32, 2),
)


@given(
    st.builds(
        EntitySnapshot,
        st.text(st.characters(codec="utf-8"), min_size=1),
        COUNTS,
        COUNTS,
        COUNTS,
        ALERTS,
        arrays(3, np.float64),
        arrays(2, np.float32),
        runs=st.none() | RUNS,
    )
)
@settings(max_examples=100, deadline=None)
def test_a_snapshot_comes_back_as_it_was(snapshot: EntitySnapshot) -> None:
    back = decode_snapshot(encode_snapshot(snapshot))
    assert back is not None
    for name in ("entity", "slot", "first_slot", "silent", "alert"):
        assert getattr(back, name) == getattr(snapshot, name)
    assert type(back.alert) is AlertState
    assert (back.runs is None) == (snapshot.runs is None)
    for ours, theirs in zip(snapshot.runs or (), back.runs or (), strict=True):
        assert theirs.dtype == ours.dtype
        np.testing.assert_array_equal(theirs, ours)
    for name in ("sums", "statistics"):
        ours, theirs = getattr(snapshot, name), getattr(back, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert theirs.dtype == ours.dtype
            assert theirs.flags.writeable
            np.testing.assert_array_equal(theirs, ours)


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    snapshot = EntitySnapshot("a", 1, 0, 0, AlertState("ok"), np.zeros((3, 2)))
    record = json.loads(encode_snapshot(snapshot))
    change(record)
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"{}",
        b"[]",
        b"17",
        b"\xff",
        edited(lambda r: r.update(format=3)),
        edited(lambda r: r.pop("slot")),
        edited(lambda r: r.update(alert=["singing", 0, 0, 0])),
        edited(lambda r: r.update(alert=["ok", 0])),
        edited(lambda r: r.update(sums="not base64!")),
        edited(lambda r: r.update(sums="AAAA")),
        edited(lambda r: r.update(sums=17)),
        edited(lambda r: r.update(runs=["AAAA"])),
    ],
)
def test_state_of_another_version_is_left_alone(value: bytes) -> None:
    assert decode_snapshot(value) is None


def test_state_of_before_runs_were_kept_is_read() -> None:
    snapshot = decode_snapshot(edited(lambda r: r.pop("runs")))
    assert snapshot is not None
    assert snapshot.runs is None


OFFSETS = st.integers(0, 2**63 - 1)
TIMES = st.integers(-(2**62), 2**63 - 1)


@given(st.builds(CommitMetadata, OFFSETS, TIMES, TIMES, st.integers(1, 2**62)))
@settings(max_examples=100, deadline=None)
def test_commit_metadata_comes_back_and_fits_into_kafka(metadata: CommitMetadata) -> None:
    text = metadata.encode()
    assert len(text.encode()) < 4096  # offset.metadata.max.bytes of a broker
    assert CommitMetadata.decode(text) == metadata
    assert metadata.replay_point == ReplayPoint(
        metadata.replay_offset, metadata.replay_watermark_ms
    )


@pytest.mark.parametrize(
    "text",
    ["", "another tool", "{}", "[]", "null", CommitMetadata(1, 2, 3, 4, format=2).encode()],
)
def test_commit_metadata_of_somebody_else_is_none(text: str) -> None:
    assert CommitMetadata.decode(text) is None
