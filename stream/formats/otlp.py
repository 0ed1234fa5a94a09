"""OTLP metrics, what both encodings share: from metrics of a resource to readings.

The entity is an attribute of the resource. Points become channels by the metric's name with the
attributes of the point behind it: gauges and sums as they are, histograms and summaries as
`name.sum` and `name.count`. A cumulative sum is a counter, to be declared in `input.rate`; a delta
is what it says, what was added since the point before.

github.com/open-telemetry/opentelemetry-proto, metrics/v1/metrics.proto.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from stream.errors import DecodeError
from stream.formats.base import Decoded, Naming, Readings, epoch_ms

# DataPointFlags.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK
_NO_RECORDED_VALUE: Final = 1

_DISTRIBUTIONS: Final = frozenset({"histogram", "exponential_histogram", "summary"})
KINDS: Final = ("gauge", "sum", *sorted(_DISTRIBUTIONS))


class Encoding(NamedTuple):
    """How one encoding is looked into, where the two differ."""

    kind: Callable[[Any], str | None]
    """Which of `KINDS` a metric is."""
    attributes: Callable[[Iterable[Any]], dict[str, str]]
    """KeyValues whose values are text, numbers or booleans."""
    number: Callable[[Any], float | None]
    """The value of a point of a gauge or sum."""
    total: Callable[[Any], float | None]
    """The optional sum of a point of a distribution."""


def readings(resources: Iterable[Any], naming: Naming, encoding: Encoding) -> Sequence[Decoded]:
    """Walk over ResourceMetrics of either encoding.

    Raises:
        DecodeError: a resource that has points has no name for its entity, a point no time.

    """
    found = Readings()
    for resource in resources:
        entity = None
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for name, point, value in _values(metric, encoding):
                    if entity is None:
                        own = resource.resource
                        entity = naming.entity_of(
                            encoding.attributes(own.attributes if own else ())
                        )
                    values = found.at(entity, _epoch_ms(int(point.time_unix_nano)))
                    labels = point.attributes
                    suffix = naming.suffix(encoding.attributes(labels)) if labels else ""
                    missing = point.flags & _NO_RECORDED_VALUE
                    values[name + suffix] = None if missing else value
    return found.all()


def _epoch_ms(nanoseconds: int) -> int:
    if nanoseconds == 0:
        raise DecodeError("bad_timestamp", "expected timeUnixNano in every point, got 0: unknown")
    return epoch_ms(nanoseconds // 1_000_000)


def _values(metric: Any, encoding: Encoding) -> Iterator[tuple[str, Any, float | None]]:  # noqa: ANN401
    kind, name = encoding.kind(metric), metric.name
    if kind is None:
        return
    for point in getattr(metric, kind).data_points:
        if kind in _DISTRIBUTIONS:
            yield f"{name}.sum", point, encoding.total(point)
            yield f"{name}.count", point, float(point.count)
        else:
            yield name, point, encoding.number(point)
