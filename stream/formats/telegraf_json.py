"""Telegraf's `data_format = "json"`: one metric a message, or a batch of them.

    {"name": "cpu", "tags": {"host": "a"}, "fields": {"usage_idle": 97.5}, "timestamp": 1458229140}
    {"metrics": [...]}

as docs.influxdata.com/telegraf/v1/data_formats/output/json shows. A channel is `name.field` with
the tags behind it. The unit of timestamps (`json_timestamp_units`) is told by their size; RFC 3339
(`json_timestamp_format`) is read as well. Text fields are no channels; true is 1 and false is 0.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import msgspec

from stream.formats.base import Decoded, Decoder, Naming, Readings, guessed_ms, json_reader


class _Metric(msgspec.Struct):
    name: str
    fields: dict[str, float | bool | str | None]
    timestamp: Annotated[datetime, msgspec.Meta(tz=True)] | int | float
    tags: dict[str, str] = {}


class _Batch(msgspec.Struct):
    metrics: list[_Metric]


_EXPECTED = (
    '{"name": text, "tags": {tag: text}, "fields": {field: number}, "timestamp": epoch} '
    'or {"metrics": [such]}'
)
_read_metric = json_reader(_Metric, _EXPECTED)
_read_batch = json_reader(_Batch, _EXPECTED)


def make(naming: Naming) -> Decoder:
    """Return a decoder that names things so."""

    def decode(value: bytes) -> Sequence[Decoded]:
        # A batch begins so, as Go writes a map of one key; a metric begins with "fields".
        batch = value.lstrip(b" \t\r\n{").startswith(b'"metrics"')
        found = Readings()
        for metric in _read_batch(value).metrics if batch else (_read_metric(value),):
            values = found.at(naming.entity_of(metric.tags), guessed_ms(metric.timestamp))
            suffix = naming.suffix(metric.tags)
            for field, number in metric.fields.items():
                if not isinstance(number, str):
                    values[f"{metric.name}.{field}{suffix}"] = number
        return found.all()

    return decode
