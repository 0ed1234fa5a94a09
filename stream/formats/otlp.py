"""OTLP metrics, what both encodings share: from metrics of a resource to readings.

The entity is an attribute of the resource. Points become channels by the metric's name with the
attributes of the point behind it: gauges and sums as they are, histograms and summaries as
`name.sum` and `name.count`. A cumulative sum is a counter, to be declared in `input.rate`; a delta
is what it says, what was added since the point before.

github.com/open-telemetry/opentelemetry-proto, metrics/v1/metrics.proto.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from stream.errors import DecodeError
from stream.formats.base import Decoded, Naming, Readings, epoch_ms

# DataPointFlags.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK
_NO_RECORDED_VALUE: Final = 1

Attributes = Callable[[Iterable[Any]], dict[str, str]]


def readings(
    resources: Iterable[Any],
    naming: Naming,
    attributes: Attributes,
    number: Callable[[Any], float | None],
    total: Callable[[Any], float | None],
) -> Sequence[Decoded]:
    """Walk over everything that looks like ResourceMetrics.

    `attributes` reads KeyValues whose values are text, numbers or booleans, `number` a point of a
    gauge or sum, `total` the optional sum of a histogram.

    Raises:
        DecodeError: a resource that has points has no name for its entity.

    """
    found = Readings()
    for resource in resources:
        entity = None
        of_resource = attributes(resource.resource.attributes) if resource.resource else {}
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for name, point, value in _values(metric, number, total):
                    entity = entity or naming.entity_of(of_resource)
                    values = found.at(entity, _epoch_ms(int(point.time_unix_nano)))
                    suffix = naming.suffix(attributes(point.attributes))
                    missing = int(point.flags) & _NO_RECORDED_VALUE
                    values[name + suffix] = None if missing else value
    return found.all()


def _epoch_ms(nanoseconds: int) -> int:
    if nanoseconds == 0:
        raise DecodeError("bad_timestamp", "expected timeUnixNano in every point, got 0: unknown")
    return epoch_ms(nanoseconds // 1_000_000)


def _values(
    metric: Any,  # noqa: ANN401 - of either encoding
    number: Callable[[Any], float | None],
    total: Callable[[Any], float | None],
) -> Iterable[tuple[str, Any, float | None]]:
    for data in (metric.gauge, metric.sum):
        for point in data.data_points if data else ():
            yield metric.name, point, number(point)
    sum_name, count_name = f"{metric.name}.sum", f"{metric.name}.count"
    for data in (metric.histogram, metric.exponential_histogram, metric.summary):
        for point in data.data_points if data else ():
            yield sum_name, point, total(point)
            yield count_name, point, float(point.count)
