"""What prometheus-kafka-adapter writes (`SERIALIZATION_FORMAT=json`): one sample a message.

    {"timestamp": "1970-01-01T00:00:00Z", "value": "456", "name": "up", "labels": {"instance": "a"}}

github.com/Telefonica/prometheus-kafka-adapter. The value is text, since JSON knows no +Inf. A
channel is the metric's name with its labels behind it.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Final

import msgspec

from stream.errors import DecodeError
from stream.formats.base import Decoded, Decoder, Naming, epoch_ms, json_reader

# As Go's strconv.FormatFloat writes them.
_NUMBER: Final = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?Inf|NaN", re.ASCII)
_LONGEST_NUMBER: Final = 400


class _Sample(msgspec.Struct):
    name: str
    timestamp: Annotated[datetime, msgspec.Meta(tz=True)]
    value: str | float
    labels: dict[str, str]


_read = json_reader(
    _Sample,
    '{"timestamp": RFC 3339, "value": number as text, "name": text, "labels": {label: text}}',
)


def make(naming: Naming) -> Decoder:
    """Return a decoder that names things so."""

    def decode(value: bytes) -> Sequence[Decoded]:
        sample = _read(value)
        labels = sample.labels
        entity = naming.entity_of(labels)
        labels.pop("__name__", None)
        channel = sample.name + naming.suffix(labels)
        number = _number(sample.value)
        return (Decoded(entity, epoch_ms(sample.timestamp), {channel: number}),)

    return decode


def _number(written: str | float) -> float:
    if isinstance(written, str):
        if len(written) > _LONGEST_NUMBER or not _NUMBER.fullmatch(written):
            raise DecodeError(
                "wrong_type", f"expected a number as the value's text, got {written[:60]!r}"
            )
        return float(written)
    return written
