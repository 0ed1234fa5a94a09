"""What Kafka Connect's JsonConverter writes: `{"schema": {...}, "payload": {...}}`.

A row a message: one field of the payload names the entity (`input.entity`), one holds the time
(`input.timestamp`: epoch, its unit told by its size, or RFC 3339), and every other number is a
channel, a nested one as `outer.inner`; true is 1 and false is 0. Text is no channel; where a text
field says what the number is (a table with one channel a row), name it in `input.labels`. Without
`schemas.enable` there is no envelope, and the object itself is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final

import msgspec

from stream.errors import DecodeError
from stream.formats.base import Decoded, Decoder, Naming, guessed_ms, json_reader

_Moment = Annotated[datetime, msgspec.Meta(tz=True)]
# Deeper is no row of a table; it bounds the names as well.
_DEEPEST: Final = 8

_read = json_reader(dict[str, Any], '{"schema": {...}, "payload": {field: number}}')


def make(naming: Naming) -> Decoder:
    """Return a decoder that names things so."""
    labelled = naming._replace(labels=naming.labels or ())

    def decode(value: bytes) -> Sequence[Decoded]:
        row = _read(value)
        if row.keys() == {"schema", "payload"}:
            row = row["payload"]
            if not isinstance(row, dict):
                raise DecodeError(
                    "wrong_type",
                    f"expected an object as payload, got {type(row).__name__}",
                )
        text = {k: _text(v) for k, v in row.items() if isinstance(v, str | int)}
        entity = naming.entity_of(text)
        timestamp_ms = _time(row, naming.timestamp)
        suffix = labelled.suffix(text)
        apart = {*naming.entity, naming.timestamp, *(naming.labels or ())}
        values = {
            name + suffix: number
            for name, number in _numbers(row, "", _DEEPEST)
            if name not in apart
        }
        return (Decoded(entity, timestamp_ms, values),)

    return decode


def _text(value: str | int) -> str:
    return value if isinstance(value, str) else str(value)[:40]


def _time(row: Mapping[str, Any], field: str) -> int:
    if field not in row:
        raise DecodeError(
            "missing_field", f"expected the time in the field {field} (input.timestamp), got none"
        )
    written = row[field]
    if isinstance(written, str):
        try:
            written = msgspec.convert(written, _Moment)
        except msgspec.ValidationError:
            written = None
    if isinstance(written, bool) or not isinstance(written, int | float | datetime):
        raise DecodeError(
            "bad_timestamp",
            f"expected epoch or RFC 3339 with a zone in the field {field}, got "
            f"{str(row[field])[:60]!r}",
        )
    return guessed_ms(written)


def _numbers(
    row: Mapping[str, Any], prefix: str, deepest: int
) -> Iterator[tuple[str, float | None]]:
    for name, value in row.items():
        if value is None or isinstance(value, int | float):
            yield prefix + name, _float(value)
        elif isinstance(value, dict) and deepest:
            yield from _numbers(value, f"{prefix}{name}.", deepest - 1)


def _float(value: float | None) -> float | None:
    try:
        return None if value is None else float(value)
    except OverflowError:
        # An integer beyond any float: the infinity that it would be.
        return None
