"""Decoded readings to columns, and records to bytes; `stream.formats` has the decoders."""

import base64
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.buffer import UNKNOWN_OFFSET, EntitySnapshot
from stream.decide import AlertState
from stream.formats.base import Decoded
from stream.grid import ReplayPoint
from stream.learning import Learned
from stream.records import STATES, AlertEvent, DeadLetter, SlotScore
from tsdiff.runs import Runs

REASONS: Final = (
    "empty",
    "too_large",
    "not_json",
    "malformed",
    "wrong_type",
    "missing_field",
    "bad_timestamp",
    "future_timestamp",
)
# Beyond float32 a value can only become infinite; it is treated as the infinity it would be.
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_encoder = msgspec.json.Encoder()


class Columns:
    """Collects decoded readings into columns of the model's channels."""

    def __init__(self, channels: Sequence[str], counters: Sequence[int] = ()) -> None:
        self._channels = tuple(channels)
        self._counters = counters
        self._known = frozenset(channels)
        self.entities: list[str] = []
        self.timestamps_ms: list[int] = []
        self.offsets: list[int] = []
        self._rows: list[list[float | None]] = []
        self.unknown_channels = 0

    def add(self, reading: Decoded, offset: int) -> None:
        """Append one reading; channels the model does not know are counted and left out."""
        values = reading.values
        if not self._known.issuperset(values):
            self.unknown_channels += len(values.keys() - self._known)
        get = values.get
        self._rows.append([get(name) for name in self._channels])
        self.entities.append(reading.entity)
        self.timestamps_ms.append(reading.timestamp_ms)
        self.offsets.append(offset)

    def values(self) -> NDArray[np.float32]:
        """Values (N, D); whatever is not a finite float32 is NaN, that is missing."""
        wide = np.array(self._rows, np.float64).reshape(len(self._rows), len(self._channels))
        wide[~(np.abs(wide) <= _FLOAT32_MAX)] = np.nan
        return wide.astype(np.float32)

    def counters(self) -> NDArray[np.float64] | None:
        """The counters among them (N, K) in full precision; `None` where there are none."""
        if not self._counters:
            return None
        rows = [[row[i] for i in self._counters] for row in self._rows]
        exact = np.array(rows, np.float64).reshape(len(rows), len(self._counters))
        exact[~(np.abs(exact) <= _FLOAT32_MAX)] = np.nan
        return exact


# -- what leaves -------------------------------------------------------------------------------


def rfc3339(timestamp_ms: int) -> str:
    """Epoch milliseconds as text: `2026-11-23T12:00:00Z`, with milliseconds if there are any."""
    moment = _EPOCH + timestamp_ms * _MILLISECOND
    timespec = "milliseconds" if timestamp_ms % 1000 else "seconds"
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")


def encode_score(score: SlotScore) -> bytes:
    """One record of the scores topic."""
    return _encoder.encode(
        {
            "entity": score.entity,
            "timestamp": rfc3339(score.timestamp_ms),
            "anomaly_score": score.anomaly_score,
            "p_value": score.p_value,
            "state": score.state,
            "imputed_ratio": score.imputed_ratio,
            "model": score.model,
            "faulty": score.faulty,
            "channels": score.channels,
        }
    )


def encode_alert(alert: AlertEvent) -> bytes:
    """One record of the alerts topic: a change of state, or of the channels that are faulty."""
    return _encoder.encode(
        {
            "entity": alert.entity,
            "timestamp": rfc3339(alert.timestamp_ms),
            "state": alert.state,
            "previous": alert.previous,
            "since": rfc3339(alert.since_ms),
            "anomaly_score": alert.anomaly_score,
            "summary": alert.summary,
            "model": alert.model,
            "faulty": alert.faulty,
            "channels": alert.channels,
        }
    )


_TRUNCATED: Final = "truncated_from_bytes"


def dead_letter_headers(letter: DeadLetter) -> list[tuple[str, bytes]]:
    """Where a dead letter came from and why, as Kafka record headers, behind its own ones."""
    fields = {
        "topic": letter.topic,
        "partition": str(letter.partition),
        "offset": str(letter.offset),
        "reason": letter.reason,
        "error": letter.error,
    }
    return [*letter.headers, *((name, text.encode()) for name, text in fields.items())]


class FittedLetter(NamedTuple):
    """A dead letter as a record of its topic."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


def fit_dead_letter(letter: DeadLetter, largest: int) -> FittedLetter:
    """Lay a dead letter out in at most some `largest` bytes beside the headers of ours.

    What does not fit is cut short, which a header says; topic, partition and offset tell where
    the rest is. A refused record would stop the service instead.
    """
    key, value, own = letter.key, letter.value, letter.headers
    of_headers = sum(len(name.encode()) + len(content) for name, content in own)
    if of_headers > largest // 4:
        own, of_headers = (), 0
    if key is not None:
        key = key[: largest // 4]
    if value is not None:
        value = value[: largest - of_headers - len(key or b"")]
    headers = dead_letter_headers(replace(letter, headers=own))
    if (key, value, own) != (letter.key, letter.value, letter.headers):
        headers.append((_TRUNCATED, str(len(letter.value or b"")).encode()))
    # kafka-python sends no record that has neither.
    return FittedLetter(key, b"" if key is None and value is None else value, headers)


class Origin(NamedTuple):
    """The message that a dead letter was."""

    topic: str
    partition: int
    headers: tuple[tuple[str, bytes], ...]
    truncated: bool


def origin_of(headers: Sequence[tuple[str, bytes | None]]) -> Origin | None:
    """Read what `fit_dead_letter` wrote; `None` if it did not write these."""
    names = [name for name, _ in headers]
    ours = ["topic", "partition", "offset", "reason", "error"]
    truncated = bool(names) and names[-1] == _TRUNCATED
    begin = len(names) - len(ours) - truncated
    if begin < 0 or names[begin : begin + len(ours)] != ours:
        return None
    own = tuple((name, content or b"") for name, content in headers[:begin])
    try:
        topic = (headers[begin][1] or b"").decode()
        return Origin(topic, int(headers[begin + 1][1] or b""), own, truncated)
    except ValueError:
        return None


# -- state -------------------------------------------------------------------------------------

_STATE_FORMAT: Final = 2


def _pack(array: NDArray[Any] | None) -> str | None:
    return None if array is None else base64.b64encode(array.tobytes()).decode("ascii")


def _array(text: str, dtype: type) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype).copy()


def _unpack(text: str | None, dtype: type, rows: int | None = None) -> NDArray[Any] | None:
    if text is None:
        return None
    array = _array(text, dtype)
    return array if rows is None else array.reshape(rows, -1)


def _unpack_runs(packed: list[str] | None) -> Runs | None:
    """Read back the run lengths; earlier versions kept none."""
    if packed is None:
        return None
    gap, still, last = packed
    return Runs(_array(gap, np.int32), _array(still, np.int32), _array(last, np.float32))


def encode_snapshot(snapshot: EntitySnapshot) -> bytes:
    """One record of the state topic."""
    learned = snapshot.learned
    return _encoder.encode(
        {
            "format": _STATE_FORMAT,
            "entity": snapshot.entity,
            "slot": snapshot.slot,
            "first_slot": snapshot.first_slot,
            "silent": snapshot.silent,
            "alert": list(snapshot.alert),
            "sums": _pack(snapshot.sums),
            "statistics": _pack(snapshot.statistics),
            "learned": learned and {"slot": learned.slot, "state": _pack(learned.state)},
            "learned_by": snapshot.learned_by,
            "runs": snapshot.runs and [_pack(part) for part in snapshot.runs],
            "offset": snapshot.offset,
        }
    )


def decode_snapshot(value: bytes) -> EntitySnapshot | None:
    """Read a state record back; `None` if another version wrote it in a way we cannot read."""
    try:
        record = msgspec.json.decode(value)
        if record["format"] != _STATE_FORMAT:
            return None
        phase, since_slot, hot, calm = record["alert"]
        if phase not in STATES:
            return None
        learned = record["learned"]
        return EntitySnapshot(
            entity=record["entity"],
            slot=record["slot"],
            first_slot=record["first_slot"],
            silent=record["silent"],
            alert=AlertState(phase, since_slot, hot, calm),
            sums=_unpack(record["sums"], np.float64, 3),
            statistics=_unpack(record["statistics"], np.float32, 2),
            learned=learned and Learned(learned["slot"], _unpack(learned["state"], np.float32)),
            learned_by=record["learned_by"],
            runs=_unpack_runs(record.get("runs")),
            offset=record.get("offset", UNKNOWN_OFFSET),
        )
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None


class CommitMetadata(msgspec.Struct, frozen=True):
    """What the committed offset says besides itself (Kafka: at most 4 KiB of text)."""

    replay_offset: int
    replay_watermark_ms: int
    watermark_ms: int
    period_ms: int
    format: int = 1
    close_complete: bool = False
    """Whether complete slots are closed at once from this offset on (`Grid.close_complete`)."""
    complete_changes: tuple[int, ...] = ()
    """Offsets after the one to replay from at which that changed, in order."""

    def encode(self) -> str:
        """As the text that Kafka keeps beside the offset."""
        return _encoder.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> "CommitMetadata | None":
        """Read it back; `None` if it is missing or of another version."""
        try:
            metadata = msgspec.json.decode(text.encode(), type=cls)
        except (msgspec.DecodeError, AttributeError):
            return None
        return metadata if metadata.format == 1 else None

    @property
    def replay_point(self) -> ReplayPoint:
        """Where to start reading to rebuild the windows."""
        return ReplayPoint(self.replay_offset, self.replay_watermark_ms)
