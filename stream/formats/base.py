"""What all decoders share: the reading, its time, and how its channels are named."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple, TypeVar

import msgspec

from stream.errors import DecodeError

MAX_ENTITY_CHARS: Final = 512
# Year 9999; later timestamps cannot be printed as RFC 3339.
_LAST_TIMESTAMP_MS: Final = 253_402_300_799_999
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
# Today is 1.8e9 s; each limit is reached by its unit in the year 5138, and passed by the next
# finer unit since 1973.
_LAST_SECONDS: Final = 10**11
_LAST_MILLISECONDS: Final = 10**14
_LAST_MICROSECONDS: Final = 10**17

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Decoded:
    """One reading as it came: values by channel name, missing ones as `None` or absent."""

    entity: str
    timestamp_ms: int
    values: dict[str, float | None]


Decoder = Callable[[bytes], Sequence[Decoded]]


class Naming(NamedTuple):
    """How entities and channels get their names (`input.entity`, `.labels`, `.timestamp`)."""

    entity: tuple[str, ...]
    """Labels that may name the entity; the first one that a reading has does."""
    labels: tuple[str, ...] | None = None
    """Labels that are part of a channel's name; `None` = all but those of `entity`."""
    timestamp: str = "timestamp"
    """Field that holds the time, in formats that do not say themselves."""

    def entity_of(self, labels: Mapping[str, str]) -> str:
        """Name the entity.

        Raises:
            DecodeError: no label names it, or with nothing or too much.

        """
        for name in self.entity:
            if name in labels:
                return checked_entity(labels[name])
        raise DecodeError(
            "missing_field",
            f"expected {' or '.join(self.entity)} to name the entity (input.entity), "
            f"got {_some(labels)}",
        )

    def suffix(self, labels: Mapping[str, str]) -> str:
        """Write the labels of a channel as `{cpu=cpu0,mode=idle}`; nothing where there are none."""
        if self.labels is None:
            kept = [(k, v) for k, v in labels.items() if k not in self.entity]
        else:
            kept = [(k, labels[k]) for k in self.labels if k in labels]
        if not kept:
            return ""
        return "{" + ",".join([f"{k}={v}" for k, v in sorted(kept)]) + "}"


class Readings:
    """Joins what a message holds of one entity and moment, in the order of the message."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], dict[str, float | None]] = {}

    def at(self, entity: str, timestamp_ms: int) -> dict[str, float | None]:
        """Return the values of that entity and moment, to be added to."""
        return self._found.setdefault((entity, timestamp_ms), {})

    def all(self) -> Sequence[Decoded]:
        """Return every reading."""
        return [Decoded(entity, at, values) for (entity, at), values in self._found.items()]


def checked_entity(entity: str) -> str:
    """Return the name, if it can be one.

    Raises:
        DecodeError: it is empty or longer than `MAX_ENTITY_CHARS`.

    """
    if not entity or len(entity) > MAX_ENTITY_CHARS:
        raise DecodeError(
            "missing_field" if not entity else "wrong_type",
            f"expected an entity name of 1 to {MAX_ENTITY_CHARS} characters, got {len(entity)}",
        )
    return entity


def epoch_ms(timestamp: datetime | float) -> int:
    """Turn a moment or epoch milliseconds into whole milliseconds, rounded down.

    Raises:
        DecodeError: it is not between 1970 and 9999.

    """
    if isinstance(timestamp, datetime):
        timestamp_ms = (timestamp - _EPOCH) // _MILLISECOND
    elif isinstance(timestamp, int) or math.isfinite(timestamp):
        timestamp_ms = math.floor(timestamp)
    else:
        timestamp_ms = -1
    if not 0 <= timestamp_ms <= _LAST_TIMESTAMP_MS:
        raise DecodeError(
            "bad_timestamp",
            f"expected a timestamp between 1970 and 9999, got {str(timestamp)[:60]}",
        )
    return timestamp_ms


def guessed_ms(timestamp: datetime | float) -> int:
    """Turn epoch seconds, milli-, micro- or nanoseconds, told apart by size, into milliseconds."""
    if isinstance(timestamp, datetime) or not timestamp > 0:
        return epoch_ms(timestamp)
    if timestamp < _LAST_SECONDS:
        return epoch_ms(timestamp * 1000)
    if timestamp < _LAST_MILLISECONDS:
        return epoch_ms(timestamp)
    if timestamp < _LAST_MICROSECONDS:
        return epoch_ms(timestamp // 1000)
    return epoch_ms(timestamp // 1_000_000)


def json_reader(kind: type[T], expected: str) -> Callable[[bytes], T]:
    """Make a function that reads JSON as `kind`; `expected` says in an error what it should be."""
    strict = msgspec.json.Decoder(kind).decode

    def read(value: bytes) -> T:
        try:
            return strict(value)
        except msgspec.ValidationError as error:
            raise rejection(str(error), expected) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _read_lenient(value, kind, expected, str(error))

    return read


def _read_lenient(value: bytes, kind: type[T], expected: str, strict_error: str) -> T:
    """Python and many exporters write bare NaN and Infinity, which JSON proper does not know."""
    try:
        document = json.loads(value)
        # json also lets half of a surrogate pair pass, which can neither be a key nor be printed.
        json.dumps(document, ensure_ascii=False).encode()
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise rejection(str(error), expected) from None
    except (ValueError, RecursionError):
        raise DecodeError("not_json", f"expected a JSON object, got: {strict_error}") from None


def rejection(error: str, expected: str) -> DecodeError:
    """Name what msgspec found to be wrong with a document."""
    if "missing required field" in error:
        reason = "missing_field"
    elif re.search(r"\$.*\.time", error):
        reason = "bad_timestamp"
    else:
        reason = "wrong_type"
    return DecodeError(reason, f"expected {expected}, got: {error[:300]}")


def _some(names: Iterable[str]) -> str:
    shown = [name[:40] for name, _ in zip(names, range(5), strict=False)]
    return ", ".join(shown).replace("\n", " ") or "none"
