"""OTLP metrics in JSON: the collector's Kafka exporter with `encoding: otlp_json`.

    {"resourceMetrics": [{"resource": {...}, "scopeMetrics": [{"metrics": [...]}]}]}

opentelemetry.io/docs/specs/otlp, "JSON Protobuf Encoding": names in lower camel case, 64-bit
integers as text or numbers, NaN and infinity as text.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Final

import msgspec

from stream.errors import DecodeError
from stream.formats import otlp
from stream.formats.base import Decoded, Decoder, Naming, json_reader

_Int = int | Annotated[str, msgspec.Meta(pattern=r"^-?[0-9]{1,20}$")]
_Float = float | Annotated[str, msgspec.Meta(max_length=400)]
_WORDS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_NUMBER: Final = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)


class _Camel(msgspec.Struct, rename="camel"):
    """Fields are called as in the protocol's own files; JSON has them in lower camel case."""


class _AnyValue(_Camel):
    string_value: str | None = None
    bool_value: bool | None = None
    int_value: _Int | None = None
    double_value: _Float | None = None


class _KeyValue(_Camel):
    key: str
    value: _AnyValue | None = None


class _Point(_Camel):
    time_unix_nano: _Int
    attributes: list[_KeyValue] = []
    flags: int = 0
    as_double: _Float | None = None
    as_int: _Int | None = None


class _Distribution(_Camel):
    time_unix_nano: _Int
    attributes: list[_KeyValue] = []
    flags: int = 0
    count: _Int = 0
    sum: _Float | None = None


class _Points(_Camel):
    data_points: list[_Point] = []


class _Distributions(_Camel):
    data_points: list[_Distribution] = []


class _Metric(_Camel):
    name: str
    gauge: _Points | None = None
    sum: _Points | None = None
    histogram: _Distributions | None = None
    exponential_histogram: _Distributions | None = None
    summary: _Distributions | None = None


class _Scope(_Camel):
    metrics: list[_Metric] = []


class _Resource(_Camel):
    attributes: list[_KeyValue] = []


class _ResourceMetrics(_Camel):
    resource: _Resource | None = None
    scope_metrics: list[_Scope] = []


class _Metrics(_Camel):
    resource_metrics: list[_ResourceMetrics]


_read = json_reader(_Metrics, 'OTLP metrics in JSON, {"resourceMetrics": [...]}')


def make(naming: Naming) -> Decoder:
    """Return a decoder that names things so."""

    def decode(value: bytes) -> Sequence[Decoded]:
        resources = _read(value).resource_metrics
        return otlp.readings(resources, naming, _ENCODING)

    return decode


def _kind(metric: _Metric) -> str | None:
    # One of them at most, says the protocol; of several the first counts.
    return next((kind for kind in otlp.KINDS if getattr(metric, kind) is not None), None)


def _attributes(pairs: Iterable[_KeyValue]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        value = pair.value
        if value is None:
            continue
        if value.string_value is not None:
            found[pair.key] = value.string_value
        elif value.bool_value is not None:
            found[pair.key] = "true" if value.bool_value else "false"
        elif value.int_value is not None:
            found[pair.key] = str(value.int_value)[:40]
        elif value.double_value is not None:
            found[pair.key] = str(_float(value.double_value))
    return found


def _number(point: _Point) -> float | None:
    return _float(point.as_double if point.as_double is not None else point.as_int)


def _total(point: _Distribution) -> float | None:
    return _float(point.sum)


def _float(written: float | str | None) -> float | None:
    if written is None:
        return None
    if isinstance(written, str):
        if written in _WORDS:
            return _WORDS[written]
        if not _NUMBER.fullmatch(written):
            raise DecodeError("wrong_type", f"expected a number as text, got {written[:60]!r}")
    try:
        return float(written)
    except OverflowError:
        raise DecodeError(
            "wrong_type", "expected a 64-bit integer, got one that no float can hold"
        ) from None


_ENCODING: Final = otlp.Encoding(_kind, _attributes, _number, _total)
