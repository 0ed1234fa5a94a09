"""Messages whose header names are not UTF-8, which kafka-python cannot read.

The protocol wants UTF-8 (https://kafka.apache.org/documentation/#recordheader), brokers do not
check it, and kafka-python 3.0.12 takes such a batch for a corrupt one: a single message would stop
its partition for good. Here the bytes of such a name that are not ASCII become question marks.
"""

from typing import Any

from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import decode_varint

_read = DefaultRecordBatch._read_msg


def tolerate() -> None:
    """Have kafka-python read them, in this process; to call it twice does no more."""
    DefaultRecordBatch._read_msg = _read_msg


def _read_msg(batch: Any) -> Any:  # noqa: ANN401 - kafka-python is untyped
    try:
        return _read(batch)
    except UnicodeDecodeError:
        # Nothing was taken yet: the position moves only once a record is whole.
        batch._buffer = readable(batch._buffer, batch._pos)
        return _read(batch)


def readable(buffer: Any, position: int) -> bytearray:  # noqa: ANN401 - bytes or a view
    """Copy a batch with the header names of the record at `position` made ASCII, of equal length.

    Record => Length Attributes TimestampDelta OffsetDelta Key Value [HeaderKey HeaderValue], all
    numbers as varints, all bytes behind their length.
    """
    mended = bytearray(buffer)
    for _ in range(4):
        _, position = decode_varint(mended, position)
    for _ in ("key", "value"):
        length, position = decode_varint(mended, position)
        position += max(length, 0)
    headers, position = decode_varint(mended, position)
    for _ in range(headers):
        length, position = decode_varint(mended, position)
        name = mended[position : position + length]
        mended[position : position + length] = bytes(b if b < 0x80 else ord("?") for b in name)
        position += length
        length, position = decode_varint(mended, position)
        position += max(length, 0)
    return mended
