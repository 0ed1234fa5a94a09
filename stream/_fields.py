"""The kinds of values that settings are written as, and what each expects.

Every refusal is a `ValueError` that begins with what was expected. Only `stream.config` uses this.
"""

import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_settings import NoDecode

from tsdiff.durations import parse_duration_ms
from tsdiff.errors import TsdiffError

# Refused by parse_duration_ms, since a period of nothing makes no sense; a lateness of it does.
_NOTHING = re.compile(r"0+(ms|[smhd])")
_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")


def _duration_ms(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("expected a duration with its unit, such as 60s or 5m")
    if _NOTHING.fullmatch(value.strip()):
        return 0
    try:
        return parse_duration_ms(value)
    except (TsdiffError, ValueError):
        raise ValueError("expected a duration with its unit, such as 60s or 5m") from None


def _positive_duration_ms(value: object) -> object:
    milliseconds = _duration_ms(value)
    if isinstance(milliseconds, int) and milliseconds <= 0:
        raise ValueError("expected a duration longer than nothing, such as 60s")
    return milliseconds


def _optional_positive_duration_ms(value: object) -> object:
    return None if value is None else _positive_duration_ms(value)


def _topic(value: object) -> object:
    if isinstance(value, str) and (not _TOPIC.fullmatch(value) or value in {".", ".."}):
        raise ValueError("expected the name of a Kafka topic (letters, digits, '.', '_' and '-')")
    return value


def _servers(value: object) -> object:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError("expected host:port, a list of them, or one string with commas between")
    servers = tuple(part.strip() for part in parts if part.strip())
    if not servers:
        raise ValueError("expected at least one host:port")
    for server in servers:
        try:
            _, port = split_host_port(server)
        except ValueError:
            raise ValueError(f"expected host:port in each place, not {server!r}") from None
        if port == 0:
            raise ValueError(f"expected host:port in each place, not {server!r}")
    return servers


def _names(value: object) -> object:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError("expected a name, a list of them, or one string with commas between")
    return tuple(part.strip() for part in parts if part.strip())


def split_host_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError("expected host:port")
    if not host or (":" in host and not bracketed):
        raise ValueError("expected host:port, with an IPv6 address in brackets")
    return (host[1:-1] if bracketed else host), int(port)


_DURATION_SCHEMA = {"type": "string", "examples": ["500ms", "60s", "5m", "1h"]}
DurationMs = Annotated[int, BeforeValidator(_duration_ms), WithJsonSchema(_DURATION_SCHEMA)]
PositiveDurationMs = Annotated[
    int, BeforeValidator(_positive_duration_ms), WithJsonSchema(_DURATION_SCHEMA)
]
OptionalDurationMs = Annotated[
    int | None,
    BeforeValidator(_optional_positive_duration_ms),
    WithJsonSchema({"anyOf": [_DURATION_SCHEMA, {"type": "null"}]}),
]
_LIST_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names), WithJsonSchema(_LIST_SCHEMA)]
TopicName = Annotated[str, BeforeValidator(_topic)]
Servers = Annotated[
    tuple[str, ...],
    NoDecode,  # the environment gives host:port,host:port, not JSON
    BeforeValidator(_servers),
    WithJsonSchema(_LIST_SCHEMA),
]
