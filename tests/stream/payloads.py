"""One message of each format, with a name for its entity, to be read and to be damaged."""

from typing import Final

# As the specification of the protocol's JSON mapping has it: 64-bit integers are text.
OTLP: Final = b"""{"resourceMetrics": [{
  "resource": {"attributes": [{"key": "host.name", "value": {"stringValue": "web-17"}}]},
  "scopeMetrics": [{"scope": {"name": "library"}, "metrics": [
    {"name": "my.gauge", "unit": "1", "gauge": {"dataPoints": [
      {"asDouble": 10, "timeUnixNano": "1544712660300000000",
       "attributes": [{"key": "disk", "value": {"stringValue": "sda"}}]}]}},
    {"name": "my.counter", "sum": {"aggregationTemporality": 2, "isMonotonic": true,
      "dataPoints": [{"asInt": "5", "startTimeUnixNano": "1544712660300000000",
                      "timeUnixNano": "1544712660300000000"}]}},
    {"name": "my.delta", "sum": {"aggregationTemporality": 1, "dataPoints": [
      {"asInt": "7", "timeUnixNano": "1544712660300000000"}]}},
    {"name": "my.histogram", "histogram": {"aggregationTemporality": 1, "dataPoints": [
      {"count": "3", "sum": 4.5, "bucketCounts": ["1", "2"], "explicitBounds": [1],
       "timeUnixNano": "1544712660300000000"}]}},
    {"name": "my.summary", "summary": {"dataPoints": [
      {"count": "2", "sum": 9, "timeUnixNano": "1544712660300000000"}]}}
  ]}]
}]}"""


def otlp_proto() -> bytes:
    """The same message on the wire."""
    from google.protobuf.json_format import Parse
    from opentelemetry.proto.metrics.v1.metrics_pb2 import MetricsData

    return Parse(OTLP, MetricsData()).SerializeToString()


def examples() -> dict[str, bytes]:
    """A message of each format."""
    return {
        "native": b'{"entity": "web-17", "timestamp": "2026-11-23T12:00:00Z", '
        b'"values": {"cpu": 0.42, "mem": null}}',
        "telegraf-influx": b"cpu,cpu=cpu0,host=web-17 usage_idle=97.5,up=t 1795435200000000000\n"
        b'disk,host=web-17,path=/a\\ b used=1i,fstype="ext4" 1795435200000000000\n',
        "telegraf-json": b'{"metrics": [{"fields": {"field_1": 30, "n_images": 660}, '
        b'"name": "docker", "tags": {"host": "raynor"}, "timestamp": 1458229140}, '
        b'{"fields": {"field_1": 30}, "name": "swap", "tags": {"host": "raynor", "x": "y"}, '
        b'"timestamp": 1458229140}]}',
        "otlp-json": OTLP,
        "otlp-proto": otlp_proto(),
        "prometheus-json": b'{"timestamp": "1970-01-01T00:00:00Z", "value": "9876543210", '
        b'"name": "up", "labels": {"__name__": "up", "instance": "a:1", "job": "node"}}',
        "connect-json": b'{"schema": {"type": "struct", "fields": [], "optional": false}, '
        b'"payload": {"c1": 10000, "entity": "bar", "timestamp": 1501834166000}}',
    }
