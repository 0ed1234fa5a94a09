"""Input formats: each a decoder of its own, from the bytes of a message to readings.

A message may hold several readings, and a reading some of the channels: readings of one slot are
joined by the buffer. Whatever cannot be read raises `DecodeError` with a reason from
`stream.codec.REASONS`; then none of its readings count, and the message goes to the dead letters.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from stream.formats import (
    connect_json,
    native,
    otlp_json,
    prometheus_json,
    telegraf_influx,
    telegraf_json,
)
from stream.formats.base import Decoded, Decoder, Naming

__all__ = ["ENTITY_LABELS", "FORMATS", "Decoded", "Decoder", "Naming", "make_decoder"]


def _otlp_proto(naming: Naming) -> Decoder:
    # Its library is an extra, and takes a while to import.
    from stream.formats.otlp_proto import make  # noqa: PLC0415

    return make(naming)


FORMATS: Final[Mapping[str, Callable[[Naming], Decoder]]] = MappingProxyType(
    {
        "native": native.make,
        "telegraf-influx": telegraf_influx.make,
        "telegraf-json": telegraf_json.make,
        "otlp-json": otlp_json.make,
        "otlp-proto": _otlp_proto,
        "prometheus-json": prometheus_json.make,
        "connect-json": connect_json.make,
    }
)
_OTLP: Final = ("service.instance.id", "host.name")
# What names an entity where `input.entity` does not say.
ENTITY_LABELS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "telegraf-influx": ("host",),
        "telegraf-json": ("host",),
        "otlp-json": _OTLP,
        "otlp-proto": _OTLP,
        "prometheus-json": ("instance",),
        "connect-json": ("entity",),
    }
)


def make_decoder(
    name: str,
    entity: tuple[str, ...] | None = None,
    labels: tuple[str, ...] | None = None,
    timestamp: str | None = None,
) -> Decoder:
    """Make the decoder of a format; unset settings are the format's own.

    Raises:
        StreamError: a package that the format needs is not installed.

    """
    naming = Naming(entity or ENTITY_LABELS.get(name, ()), labels, timestamp or "timestamp")
    return FORMATS[name](naming)
