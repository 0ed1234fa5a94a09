"""OTLP metrics in protobuf: the default of the collector's Kafka exporter (`otlp_proto`).

A message is an ExportMetricsServiceRequest, or MetricsData, which is the same on the wire.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from stream.errors import DecodeError, StreamError
from stream.formats import otlp
from stream.formats.base import Decoded, Decoder, Naming

try:
    from google.protobuf.message import DecodeError as ProtobufError
    from opentelemetry.proto.metrics.v1.metrics_pb2 import MetricsData, SummaryDataPoint
except ImportError as error:
    raise StreamError(
        "expected the package opentelemetry-proto for input.format: otlp-proto, it is not "
        "installed; pip install 'tsdiff[formats]'"
    ) from error


def make(naming: Naming) -> Decoder:
    """Return a decoder that names things so."""

    def decode(value: bytes) -> Sequence[Decoded]:
        try:
            message = MetricsData.FromString(value)
        except (ProtobufError, RecursionError) as error:
            raise DecodeError(
                "malformed",
                f"expected OTLP metrics in protobuf, got: {' '.join(str(error).split())}",
            ) from None
        if not message.resource_metrics:
            raise DecodeError("missing_field", "expected OTLP metrics in protobuf, got none")
        return otlp.readings(message.resource_metrics, naming, _ENCODING)

    return decode


def _kind(metric: Any) -> str | None:  # noqa: ANN401 - generated code
    kind: str | None = metric.WhichOneof("data")
    return kind


def _attributes(pairs: Iterable[Any]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        kind = pair.value.WhichOneof("value")
        if kind == "string_value":
            found[pair.key] = pair.value.string_value
        elif kind == "bool_value":
            found[pair.key] = "true" if pair.value.bool_value else "false"
        elif kind in {"int_value", "double_value"}:
            found[pair.key] = str(getattr(pair.value, kind))
    return found


def _number(point: Any) -> float | None:  # noqa: ANN401 - generated code
    kind = point.WhichOneof("value")
    return None if kind is None else float(getattr(point, kind))


def _total(point: Any) -> float | None:  # noqa: ANN401 - generated code
    # A summary always has one; a histogram of negative values has none.
    known = isinstance(point, SummaryDataPoint) or point.HasField("sum")
    return float(point.sum) if known else None


_ENCODING: Final = otlp.Encoding(_kind, _attributes, _number, _total)
