"""Each format as its producer's documentation shows it, and everything else refused."""

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.codec import REASONS, Columns, rfc3339
from stream.config import InputSection
from stream.errors import DecodeError, StreamError
from stream.formats import ENTITY_LABELS, FORMATS, Decoded, make_decoder
from stream.formats.base import MAX_ENTITY_CHARS
from tests.stream.payloads import OTLP, examples

NOON = 1_795_435_200_000
NAMES = sorted(FORMATS)


def refused(name: str, value: bytes, **naming: Any) -> tuple[str, str]:  # noqa: ANN401
    with pytest.raises(DecodeError) as error:
        make_decoder(name, **naming)(value)
    return error.value.reason, str(error.value)


def read(name: str, value: bytes, **naming: Any) -> Decoded:  # noqa: ANN401
    (reading,) = make_decoder(name, **naming)(value)
    return reading


# -- Telegraf ----------------------------------------------------------------------------------


def test_line_protocol() -> None:
    assert read("telegraf-influx", examples()["telegraf-influx"]) == Decoded(
        "web-17",
        NOON,
        {"cpu.usage_idle{cpu=cpu0}": 97.5, "cpu.up{cpu=cpu0}": 1.0, "disk.used{path=/a b}": 1.0},
    )


@pytest.mark.parametrize(
    ("line", "values"),
    [
        (b"m,host=a x=1 1795435200000000000", {"m.x": 1.0}),
        (b"m,host=a x=-1.5e-3,y=2u,z=3i,w=.5 1795435200000000000\r\n",
         {"m.x": -0.0015, "m.y": 2.0, "m.z": 3.0, "m.w": 0.5}),
        (b"m,host=a x=t,y=FALSE,z=True 1795435200000000000", {"m.x": 1.0, "m.y": 0.0, "m.z": 1.0}),
        (b"# a comment\n\nm,host=a x=NaN 1795435200000000000", {"m.x": None}),
        (b'm,host=a s="x=1, y\\"\n 5",x=1 1795435200000000000', {"m.x": 1.0}),
        (b'm,host=a s="" 1795435200000000000', {}),
        (b"a\\ m,host=a,k\\=\\,=v\\ w f\\ g=1 1795435200000000000", {"a m.f g{k=,=v w}": 1.0}),
        (b"win,host=a,d=C:\\x x=1 1795435200000000000", {"win.x{d=C:\\x}": 1.0}),
        (b"m,host=a x=1 1795435200", {"m.x": 1.0}),
        (b"m,host=a x=1 1795435200000", {"m.x": 1.0}),
        (b"m,host=a x=1 1795435200000000", {"m.x": 1.0}),
        (b"m,host=a x=1 1795435200000000000\nm,host=a x=2 1795435200000000000", {"m.x": 2.0}),
    ],
    ids=repr,
)  # fmt: skip
def test_lines(line: bytes, values: dict[str, float | None]) -> None:
    assert read("telegraf-influx", line) == Decoded("a", NOON, values)
    # What has a quote or a backslash is read by another way, which must come to the same.
    slow = line.rstrip() + b'\nm,host=b s="\\"" 1'
    assert make_decoder("telegraf-influx")(slow)[0] == Decoded("a", NOON, values)


def test_what_telegraf_wrote() -> None:
    # Telegraf 1.37.2 with hostname = "web 17,a", its inputs cpu, disk and system.
    lines = (
        b"disk,device=devtmpfs,fstype=devtmpfs,host=web\\ 17\\,a,mode=rw,path=/dev "
        b"inodes_used_percent=0.003696949983833951,total=12630519808i,used_percent=0 "
        b"1795569361000000000\n",
        b"system,host=web\\ 17\\,a load1=32.81,n_cpus=2i 1795569361000000000\n",
        b"cpu,cpu=cpu0,host=web\\ 17\\,a usage_user=94.1176470588123 1795569361000000000\n",
    )
    documents = (
        b'{"fields":{"inodes_used_percent":0.003696949983833951,"total":12630519808,'
        b'"used_percent":0},"name":"disk","tags":{"device":"devtmpfs","fstype":"devtmpfs",'
        b'"host":"web 17,a","mode":"rw","path":"/dev"},"timestamp":1795569361}\n',
        b'{"fields":{"load1":32.81,"n_cpus":2},"name":"system","tags":{"host":"web 17,a"},'
        b'"timestamp":1795569361}\n',
        b'{"fields":{"usage_user":94.1176470588123},"name":"cpu","tags":{"cpu":"cpu0",'
        b'"host":"web 17,a"},"timestamp":1795569361}\n',
    )
    disk = "{device=devtmpfs,fstype=devtmpfs,mode=rw,path=/dev}"
    expected: list[dict[str, float | None]] = [
        {
            f"disk.inodes_used_percent{disk}": 0.003696949983833951,
            f"disk.total{disk}": 12630519808.0,
            f"disk.used_percent{disk}": 0.0,
        },
        {"system.load1": 32.81, "system.n_cpus": 2.0},
        {"cpu.usage_user{cpu=cpu0}": 94.1176470588123},
    ]
    for line, document, values in zip(lines, documents, expected, strict=True):
        assert read("telegraf-influx", line) == Decoded("web 17,a", 1_795_569_361_000, values)
        assert read("telegraf-json", document) == Decoded("web 17,a", 1_795_569_361_000, values)


def test_lines_of_several_hosts_and_times_are_several_readings() -> None:
    found = make_decoder("telegraf-influx")(
        b"m,host=a x=1 1795435200000000000\nm,host=b x=2 1795435200000000000\n"
        b"n,host=a x=3 1795435200000000000\nm,host=a x=4 1795435210000000000\n"
    )
    assert found == [
        Decoded("a", NOON, {"m.x": 1.0, "n.x": 3.0}),
        Decoded("b", NOON, {"m.x": 2.0}),
        Decoded("a", NOON + 10_000, {"m.x": 4.0}),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "malformed"),
        (b"# nothing\n", "malformed"),
        (b"m", "malformed"),
        (b"m,host=a", "malformed"),
        (b"m,host=a x 1", "malformed"),
        (b"m,host=a x= 1", "malformed"),
        (b"m,host=a =1 1", "malformed"),
        (b"m,host x=1 1", "malformed"),
        (b",host=a x=1 1", "malformed"),
        (b"m,host=a x=1 1 1", "malformed"),
        (b"m,host=a x=1 1.5", "malformed"),
        (b"m,host=a x=1 +-1", "malformed"),
        (b'm,host=a x="1 1', "malformed"),
        (b"m,host=a x=1\\ 1", "malformed"),
        (b"m,host=a x=1, 1", "malformed"),
        (b"m,,host=a x=1 1", "malformed"),
        (b"\xff,host=a x=1 1", "malformed"),
        (b"m,host=a x=1_0 1", "wrong_type"),
        (b"m,host=a x=abc 1", "wrong_type"),
        (b"m,host=a x=" + b"1" * 500 + b" 1", "wrong_type"),
        (b"m,host=a x=1", "bad_timestamp"),
        (b"m,host=a x=1 -1", "bad_timestamp"),
        (b"m,host=a x=1 " + b"9" * 39, "bad_timestamp"),
        (b"m,host=a x=1 " + b"9" * 9999, "malformed"),
        (b"m,cpu=a x=1 1", "missing_field"),
        (b"m,host=" + b"a" * 513 + b" x=1 1", "wrong_type"),
    ],
    ids=lambda given: repr(given)[:50],
)
def test_lines_that_are_none(line: bytes, reason: str) -> None:
    assert refused("telegraf-influx", line)[0] == reason
    if not line.startswith((b"#", b"\xff")) and line:
        slow = b'm,host=b s="\\"" 1\n' + line
        assert refused("telegraf-influx", slow)[0] == reason


def test_a_bad_line_takes_the_whole_message_with_it() -> None:
    good = b"m,host=a x=1 1795435200000000000\n"
    assert refused("telegraf-influx", good + b"m,host=a x=oops 1\n" + good)[0] == "wrong_type"


def test_telegraf_json_single_and_batch() -> None:
    single = (
        b'{"fields": {"field_1": 30, "text": "no", "on": true, "off": false, "none": null}, '
        b'"name": "docker", "tags": {"host": "raynor"}, "timestamp": 1458229140}'
    )
    assert read("telegraf-json", single) == Decoded(
        "raynor",
        1_458_229_140_000,
        {"docker.field_1": 30.0, "docker.on": 1.0, "docker.off": 0.0, "docker.none": None},
    )
    assert read("telegraf-json", examples()["telegraf-json"]) == Decoded(
        "raynor",
        1_458_229_140_000,
        {"docker.field_1": 30.0, "docker.n_images": 660.0, "swap.field_1{x=y}": 30.0},
    )


@pytest.mark.parametrize(
    "timestamp",
    ["1458229140", "1458229140000", "1458229140000000", "1458229140000000000",
     '"2016-03-17T15:39:00Z"'],
)  # fmt: skip
def test_the_unit_of_telegrafs_timestamps_is_told_by_their_size(timestamp: str) -> None:
    message = '{"fields": {"x": 1}, "name": "m", "tags": {"host": "a"}, "timestamp": %s}'
    assert read("telegraf-json", (message % timestamp).encode()).timestamp_ms == 1_458_229_140_000


# -- OTLP --------------------------------------------------------------------------------------

OTLP_VALUES: dict[str, float | None] = {
    "my.gauge{disk=sda}": 10.0,
    "my.counter": 5.0,
    "my.delta": 7.0,
    "my.histogram.sum": 4.5,
    "my.histogram.count": 3.0,
    "my.summary.sum": 9.0,
    "my.summary.count": 2.0,
}


@pytest.mark.parametrize("name", ["otlp-json", "otlp-proto"])
def test_otlp(name: str) -> None:
    assert read(name, examples()[name]) == Decoded("web-17", 1_544_712_660_300, OTLP_VALUES)


def otlp_message(name: str, change: Any) -> bytes:  # noqa: ANN401
    """The example, changed by a function of its document, in either encoding."""
    document = json.loads(OTLP)
    change(document["resourceMetrics"][0])
    if name == "otlp-json":
        return json.dumps(document).encode()
    from google.protobuf.json_format import ParseDict
    from opentelemetry.proto.metrics.v1.metrics_pb2 import MetricsData

    return ParseDict(document, MetricsData()).SerializeToString()


@pytest.mark.parametrize("name", ["otlp-json", "otlp-proto"])
def test_otlp_in_its_corners(name: str) -> None:
    def change(resource: dict[str, Any]) -> None:
        resource["resource"]["attributes"].append(
            {"key": "service.instance.id", "value": {"stringValue": "instance-1"}}
        )
        gauge, counter, _, histogram, _ = resource["scopeMetrics"][0]["metrics"]
        point = gauge["gauge"]["dataPoints"][0]
        point["asDouble"] = "NaN"
        point["attributes"] = [
            {"key": "b", "value": {"boolValue": True}},
            {"key": "a", "value": {"intValue": "7"}},
            {"key": "c", "value": {"doubleValue": 0.5}},
            {"key": "d", "value": {"arrayValue": {"values": []}}},
        ]
        counter["sum"]["dataPoints"][0]["flags"] = 1  # no recorded value
        del histogram["histogram"]["dataPoints"][0]["sum"]

    values = read(name, otlp_message(name, change)).values
    assert read(name, otlp_message(name, change)).entity == "instance-1"
    gauge = values["my.gauge{a=7,b=true,c=0.5}"]
    assert gauge is not None
    assert math.isnan(gauge)
    assert values["my.counter"] is None
    assert values["my.histogram.sum"] is None
    assert values["my.histogram.count"] == 3.0


@pytest.mark.parametrize("name", ["otlp-json", "otlp-proto"])
def test_otlp_that_says_too_little(name: str) -> None:
    def nameless(resource: dict[str, Any]) -> None:
        resource["resource"]["attributes"][0]["key"] = "service.name"

    reason, said = refused(name, otlp_message(name, nameless))
    assert reason == "missing_field"
    assert "service.instance.id or host.name to name the entity (input.entity)" in said
    assert "got service.name" in said
    changed = otlp_message(name, nameless)
    assert read(name, changed, entity=("service.name",)).entity == "web-17"

    def timeless(resource: dict[str, Any]) -> None:
        metric = resource["scopeMetrics"][0]["metrics"][0]
        metric["gauge"]["dataPoints"][0]["timeUnixNano"] = "0"

    assert refused(name, otlp_message(name, timeless))[0] == "bad_timestamp"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("otlp-json", b"{}", "missing_field"),
        ("otlp-json", b'{"resourceSpans": []}', "missing_field"),
        ("otlp-json", OTLP.replace(b'"5"', b'"five"'), "wrong_type"),
        ("otlp-json", OTLP.replace(b'"asDouble": 10', b'"asDouble": "ten"'), "wrong_type"),
        ("otlp-json", OTLP.replace(b'"1544712660300000000"', b'"noon"'), "bad_timestamp"),
        ("otlp-json", OTLP.replace(b'"1544712660300000000"', b'"-5"'),
         "bad_timestamp"),
        ("otlp-proto", b"\xff\xff", "malformed"),
        ("otlp-proto", b"", "missing_field"),
        ("otlp-proto", b"\x12\x00", "missing_field"),
    ],
    ids=lambda given: repr(given)[:40],
)  # fmt: skip
def test_otlp_that_is_none(name: str, value: bytes, reason: str) -> None:
    assert refused(name, value)[0] == reason


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.startswith("opentelemetry.proto.metrics")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "stream.formats.otlp_proto", raising=False)
    with pytest.raises(StreamError, match=r"pip install 'tsdiff\[formats\]'"):
        make_decoder("otlp-proto")


# -- Prometheus --------------------------------------------------------------------------------


def prometheus(value: object = "456", **labels: str) -> bytes:
    return json.dumps(
        {
            "value": value,
            "timestamp": "1970-01-01T00:00:10Z",
            "name": "foo",
            "labels": {"__name__": "foo", "instance": "a:9100", **labels},
        }
    ).encode()


def test_prometheus_adapter() -> None:
    decoded = read("prometheus-json", prometheus(labelfoo="label-bar"))
    assert decoded == Decoded("a:9100", 10_000, {"foo{labelfoo=label-bar}": 456.0})


@pytest.mark.parametrize(
    ("value", "expected"),
    [("+Inf", math.inf), ("-Inf", -math.inf), ("NaN", math.nan), ("0.5", 0.5), ("-1e-7", -1e-7),
     (3, 3.0)],
)  # fmt: skip
def test_values_as_go_writes_them(value: object, expected: float) -> None:
    got = read("prometheus-json", prometheus(value)).values["foo"]
    assert got == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("value", ["", "1_0", "one", "0x1p-2", "infinity", "9" * 500, True, None])
def test_values_that_are_no_numbers(value: object) -> None:
    assert refused("prometheus-json", prometheus(value))[0] == "wrong_type"


# -- Kafka Connect -----------------------------------------------------------------------------


def test_a_connect_envelope() -> None:
    # The columns of a table, as its JsonConverter writes them.
    stamp = {"type": "int64", "name": "org.apache.kafka.connect.data.Timestamp", "version": 1}
    row = {"c1": 10000, "c2": "bar", "create_ts": 1501834166000, "on": True, "gone": None}
    envelope = {
        "schema": {
            "type": "struct",
            "optional": False,
            "fields": [{"type": "int32", "field": "c1"}, {**stamp, "field": "create_ts"}],
        },
        "payload": {**row, "nested": {"x": 1.5, "text": "no"}},
    }
    expected = Decoded(
        "bar", 1_501_834_166_000, {"c1": 10000.0, "on": 1.0, "gone": None, "nested.x": 1.5}
    )
    naming = {"entity": ("c2",), "timestamp": "create_ts"}
    assert read("connect-json", json.dumps(envelope).encode(), **naming) == expected
    # Without schemas.enable there is no envelope.
    assert read("connect-json", json.dumps(envelope["payload"]).encode(), **naming) == expected


def test_a_table_with_one_channel_a_row() -> None:
    row = b'{"entity": 17, "timestamp": "2026-11-23T12:00:00Z", "metric": "cpu", "value": 0.5}'
    assert read("connect-json", row, labels=("metric",)) == Decoded(
        "17", NOON, {"value{metric=cpu}": 0.5}
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b'{"schema": null, "payload": null}', "wrong_type"),
        (b'{"schema": null, "payload": 5}', "wrong_type"),
        (b"[]", "wrong_type"),
        (b"{}", "missing_field"),
        (b'{"entity": "a"}', "missing_field"),
        (b'{"entity": "a", "timestamp": null}', "bad_timestamp"),
        (b'{"entity": "a", "timestamp": true}', "bad_timestamp"),
        (b'{"entity": "a", "timestamp": "2026-11-23"}', "bad_timestamp"),
        (b'{"entity": "a", "timestamp": -5}', "bad_timestamp"),
        (b'{"entity": "a", "timestamp": NaN}', "bad_timestamp"),
        (b'{"entity": "a", "timestamp": Infinity}', "bad_timestamp"),
    ],
    ids=repr,
)
def test_rows_that_are_none(value: bytes, reason: str) -> None:
    assert refused("connect-json", value)[0] == reason


# -- all of them -------------------------------------------------------------------------------


def test_every_format_of_the_settings_has_a_decoder() -> None:
    schema = InputSection.model_json_schema()["properties"]["format"]["enum"]
    assert sorted(schema) == NAMES == sorted(["native", *ENTITY_LABELS])
    assert sorted(examples()) == NAMES


def test_which_labels_name_what() -> None:
    line = b"m,host=a,rack=r1,cpu=cpu0 x=1 1795435200000000000"
    chosen = read("telegraf-influx", line, labels=("cpu", "unheard_of"))
    assert chosen == Decoded("a", NOON, {"m.x{cpu=cpu0}": 1.0})
    assert list(read("telegraf-influx", line, labels=()).values) == ["m.x"]
    other = read("telegraf-influx", line, entity=("device", "rack"))
    assert other == Decoded("r1", NOON, {"m.x{cpu=cpu0,host=a}": 1.0})


def is_read_or_refused(name: str, value: bytes) -> None:
    try:
        readings = make_decoder(name)(value)
    except DecodeError as error:
        assert error.reason in REASONS
        assert "\n" not in str(error)
        # It goes into a header of the dead letter, as UTF-8.
        assert len(str(error).encode()) < 2000
        return
    columns = Columns(("a", "b"))
    for reading in readings:
        assert 1 <= len(reading.entity) <= MAX_ENTITY_CHARS
        reading.entity.encode()  # the key of its records
        rfc3339(reading.timestamp_ms)
        columns.add(reading, 0)
        known = Columns(tuple(reading.values))
        known.add(reading, 0)
        assert not np.isinf(known.values()).any()


@pytest.mark.parametrize("name", NAMES)
@given(value=st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_read_or_refused(name: str, value: bytes) -> None:
    is_read_or_refused(name, value)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_message_is_read_or_refused(name: str, data: st.DataObject) -> None:
    message = examples()[name]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(message)))
        cut = data.draw(st.integers(0, 12))
        splice = data.draw(
            st.binary(max_size=4)
            | st.sampled_from([b'"', b"\\", b"\n", b"NaN", b"null", b"1e999", b"{", b"[", b","])
            | st.just(b"9" * 400)
        )
        message = message[:at] + splice + message[at + cut :]
    is_read_or_refused(name, message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from([
            "entity", "timestamp", "values", "name", "tags", "fields", "metrics", "labels",
            "value", "payload", "schema", "host", "instance", "host.name", "resourceMetrics",
            "resource", "attributes", "key", "stringValue", "scopeMetrics", "gauge", "sum",
            "dataPoints", "timeUnixNano", "asInt", "asDouble", "flags",
        ]),
        inner,
        max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("json") or n == "native"])
@given(document=JSON)
@settings(max_examples=100, deadline=None)
def test_any_json_is_read_or_refused(name: str, document: object) -> None:
    is_read_or_refused(name, json.dumps(document).encode())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "value",
    [b"[" * 500_000, b'{"a":' * 200_000, b'"' * 500_000, b"\\" * 500_001, b'"\\' * 250_000,
     b"m,host=a " + b"a=1," * 200_000, b"m," * 300_000, b" " * 500_000, b"\n" * 500_000,
     b"\x0a\xff\xff\xff\x7f", b"\x0a" * 500_000],
    ids=lambda value: repr(value[:8]),
)  # fmt: skip
@pytest.mark.timeout(20)
def test_half_a_megabyte_of_anything_is_refused_quickly(name: str, value: bytes) -> None:
    refused(name, value)
