"""The native format: one JSON object a message, one reading.

    {"entity": "web-17", "timestamp": "2026-11-23T12:00:00Z", "values": {"cpu": 0.42, "mem": null}}

A timestamp is RFC 3339 or epoch milliseconds. An absent or null channel, NaN and Infinity are
missing values.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import msgspec

from stream.formats.base import Decoded, Decoder, Naming, checked_entity, epoch_ms, json_reader


class _Native(msgspec.Struct):
    entity: str
    timestamp: Annotated[datetime, msgspec.Meta(tz=True)] | int | float
    values: dict[str, float | None]


_read = json_reader(
    _Native,
    '{"entity": text, "timestamp": RFC 3339 or epoch ms, "values": {channel: number}}',
)


def decode_native(value: bytes) -> Sequence[Decoded]:
    """Read one native message."""
    message = _read(value)
    entity = checked_entity(message.entity)
    return (Decoded(entity, epoch_ms(message.timestamp), message.values),)


def make(naming: Naming) -> Decoder:
    """Return the decoder."""
    return decode_native
