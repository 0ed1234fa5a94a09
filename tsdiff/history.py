"""Parquet history, read the same way by training, backfill and replay.

One table a file: a `timestamp` column and one numeric column a channel; NaN, null and infinity
are missing readings. Several entities are told apart by file, by folder, or by an `entity` column.
Everything that had to be mended on the way is said in `History.warnings`.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tsdiff.errors import ConfigError, HistoryError

TIMESTAMP = "timestamp"
ENTITY = "entity"
PARTS = ("train", "test")
DEFAULT_PART = "train"

NOT_CHANNELS = frozenset({TIMESTAMP, ENTITY, "label", "label_any", "segment", "changepoint"})
# pandas stores an index without a name under such a column; it is no measurement.
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")

# Integers below are step indices; as milliseconds since the epoch they would be before 1973-03.
STEP_LIMIT = 10**11
# Integers from here on are no milliseconds of our time, but micro- or nanoseconds (5138-11-16).
MILLISECOND_LIMIT = 10**14
# Where seconds since the epoch are likely meant (2001-09 to 2100), though by rule they are steps.
_SECONDS = (10**9, 4_102_444_800)

_NAMES_SHOWN = 5

# A counter's rate is told from the last of so many slots before that has a reading: at 60 s the
# five minutes after which Prometheus takes a series for gone.
RATE_LOOKBACK = 5


@dataclass(frozen=True)
class EntityHistory:
    """The readings of one entity: times (N,) ascending without repeats, `values` (N, D) raw."""

    entity: str
    timestamps_ms: NDArray[np.int64]
    values: NDArray[np.float32]
    counters: NDArray[np.float64] | None = None
    """The channels `rate` (N, K) as they were read: float32 cannot hold 16,777,217."""


@dataclass(frozen=True)
class History:
    """Readings of all entities over the same channels, and what was mended while reading."""

    channels: tuple[str, ...]
    entities: tuple[EntityHistory, ...]
    warnings: tuple[str, ...]


@dataclass
class _Reader:
    """What one call of `load_history` has learned so far."""

    period_ms: int | None
    wanted: tuple[str, ...] | None
    channels: tuple[str, ...] | None
    kind: type[np.float32] | type[np.float64] = np.float32
    channels_of: Path | None = None
    warnings: list[str] = field(default_factory=list)


def load_history(
    path: str | os.PathLike[str],
    *,
    period_ms: int | None,
    channels: Sequence[str] | None = None,
    part: str | None = None,
    rate: Sequence[str] = (),
) -> History:
    """Read one Parquet file, or a folder of them.

    A file is one entity, named by the file (`train.parquet` and `test.parquet`: by their folder),
    or several where it has an `entity` column. A folder holds such files, or folders
    `<entity>/<part>.parquet`. `part` is "train" by default; it does not matter to other files.

    Timestamps are Parquet timestamps (without a zone: UTC) or integers: step indices, which count
    periods of `period_ms`, when all are below 10^11, else milliseconds since the epoch.

    `channels` chooses and orders the channels; without it every column that is not a timestamp,
    entity or label is one, in the order of the first file.

    Channels that match a pattern of `rate` are counters, and kept in `EntityHistory.counters` too.

    Raises:
        HistoryError: in one line, which file or column cannot be used and what to do about it.
        ConfigError: a pattern of `rate` matches no channel.

    """
    root = Path(path)
    wanted = None if channels is None else tuple(channels)
    reader = _Reader(period_ms, wanted, wanted, np.float64 if rate else np.float32)
    pieces: dict[str, list[EntityHistory]] = {}
    for file in _find_files(root, part or DEFAULT_PART, reader.warnings):
        for piece in _read_file(file, reader):
            pieces.setdefault(piece.entity, []).append(piece)
    if not pieces or reader.channels is None:
        raise HistoryError(f"{root}: expected readings, found no row in any file")
    entities = tuple(_join(name, pieces[name], reader.warnings) for name in sorted(pieces))
    if rate:
        counters = list(rate_channels(reader.channels, rate))
        entities = tuple(_with_counters(entity, counters) for entity in entities)
    for entity in entities:
        empty = np.flatnonzero(np.isnan(entity.values).all(axis=0))
        if empty.size:
            names = _some([reader.channels[i] for i in empty])
            reader.warnings.append(
                f"{entity.entity}: no reading at all in {names}; kept as missing"
            )
    return History(reader.channels, entities, tuple(reader.warnings))


def rate_channels(channels: Sequence[str], patterns: Sequence[str]) -> tuple[int, ...]:
    """Places of the channels that match one of the patterns (`*`, `?`, `[abc]`).

    Raises:
        ConfigError: a pattern matches none.

    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in channels):
            raise ConfigError(
                f"expected each pattern of input.rate to match a channel of the model, {pattern!r} "
                f"matches none of {_some(channels)}"
            )
    return tuple(
        place
        for place, name in enumerate(channels)
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def counter_rates(counters: NDArray[np.float64], period_ms: int) -> NDArray[np.float64]:
    """Counters by slot (..., T, K), NaN where there is none -> rates per second, NaN where unknown.

    The difference to the last slot that has a reading, of the `RATE_LOOKBACK` before, by the time
    between the two slots. A counter that fell has begun again at nothing, as Prometheus assumes.
    """
    rates = np.full(counters.shape, np.nan)
    for back in range(1, min(RATE_LOOKBACK, counters.shape[-2] - 1) + 1):
        found = _rate(counters[..., back:, :], counters[..., :-back, :], back, period_ms)
        # A nearer slot has been taken already where there is one.
        nearer = rates[..., back:, :]
        nearer[...] = np.where(np.isnan(nearer), found, nearer)
    return rates


def with_rates(history: History, rate: Sequence[str], period_ms: int) -> History:
    """Put rates in the place of counters, slot by slot as the service does, for training.

    `history` was loaded with the same `rate`. The rate of a slot is in the row of the slot's last
    reading of that channel, and its other rows have none.
    """
    places = rate_channels(history.channels, rate)
    entities = []
    for entity in history.entities:
        values, slots = entity.values.copy(), entity.timestamps_ms // period_ms
        for k, place in enumerate(places):
            counter = np.zeros(0) if entity.counters is None else entity.counters[:, k]
            rows = np.flatnonzero(~np.isnan(counter))
            last = rows[np.append(np.diff(slots[rows]) > 0, True)] if len(rows) else rows
            apart = np.diff(slots[last])
            rates = _rate(counter[last[1:]], counter[last[:-1]], apart, period_ms)
            values[:, place] = np.nan
            values[last[1:], place] = np.where(apart <= RATE_LOOKBACK, rates, np.nan)
        entities.append(EntityHistory(entity.entity, entity.timestamps_ms, values))
    return replace(history, entities=tuple(entities))


def _rate(
    now: NDArray[np.float64],
    before: NDArray[np.float64],
    slots: int | NDArray[np.int64],
    period_ms: int,
) -> NDArray[np.float64]:
    grown = np.where(now >= before, now - before, np.where(np.isnan(before), np.nan, now))
    return np.asarray(grown / (slots * period_ms / 1000), np.float64)


def _with_counters(entity: EntityHistory, counters: list[int]) -> EntityHistory:
    """Keep the counters of readings that are still float64, and round the rest."""
    with np.errstate(over="ignore"):
        values = entity.values.astype(np.float32)
    values[~np.isfinite(values)] = np.nan
    exact = np.where(np.isnan(values[:, counters]), np.nan, entity.values[:, counters])
    return replace(entity, values=values, counters=exact)


def _find_files(root: Path, part: str, warnings: list[str]) -> list[Path]:
    """List the files to read, sorted; folders that lack the wanted part are warned about."""
    try:
        if not root.exists():
            raise HistoryError(f"{root}: expected a Parquet file or a folder, it does not exist")
        if not root.is_dir():
            return [root]
        files = _files_of(root, part)
        for folder in sorted(entry for entry in root.iterdir() if entry.is_dir()):
            here = folder / f"{part}.parquet"
            if here.is_file():
                files.append(here)
            elif any(folder.glob("*.parquet")):
                warnings.append(f"{folder}: has no {part}.parquet, left out")
    except OSError as error:
        raise HistoryError(f"{root}: cannot be read ({error.strerror})") from error
    if not files:
        raise HistoryError(
            f"{root}: expected *.parquet files or folders <entity>/{part}.parquet, found none"
        )
    return files


def _files_of(folder: Path, part: str) -> list[Path]:
    # `train.parquet` and its siblings are parts of one entity: only the wanted one counts.
    parts = {*PARTS, part}
    return [
        file
        for file in sorted(folder.glob("*.parquet"))
        if file.stem == part or file.stem not in parts
    ]


def _read_file(file: Path, reader: _Reader) -> Iterator[EntityHistory]:
    """Yield the entities of one file, each sorted and without repeated timestamps."""
    try:
        with pq.ParquetFile(file) as source:
            schema = source.schema_arrow
            channels = _channels(file, schema, reader)
            several = ENTITY in schema.names
            columns = [TIMESTAMP, *([ENTITY] if several else []), *channels]
            table = source.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HistoryError(f"{file}: not a readable Parquet file ({reason}); write it again") from (
            error
        )
    times = table.column(TIMESTAMP)
    if times.null_count:
        reader.warnings.append(
            f"{file}: {times.null_count} of {len(times)} rows have no timestamp, left out"
        )
        table = table.filter(times.is_valid())
    if table.num_rows == 0:
        reader.warnings.append(f"{file}: holds no rows, left out")
        return
    timestamps_ms = _timestamps_ms(file, table.column(TIMESTAMP), reader)
    values = _values(table, channels, reader.kind)
    if several:
        names, member = _entities(file, table.column(ENTITY))
    else:
        stem = file.resolve().parent.name if file.stem in PARTS else file.stem
        names, member = [stem], np.zeros(len(timestamps_ms), np.int64)
    yield from _split(file, names, member, timestamps_ms, values, reader.warnings)


def _channels(file: Path, schema: pa.Schema, reader: _Reader) -> tuple[str, ...]:
    """Check the columns of `file`; the channels in the order of the result."""
    if TIMESTAMP not in schema.names:
        raise HistoryError(
            f"{file}: expected a column `{TIMESTAMP}`, found {_some(schema.names)}; rename the "
            "column that holds the time of each row"
        )
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        raise HistoryError(f"{file}: several columns are called {_some(repeated)}; rename them")
    here = tuple(
        name
        for name in schema.names
        if name not in NOT_CHANNELS and not _PANDAS_INDEX.fullmatch(name)
    )
    if reader.wanted is not None:
        here = tuple(name for name in reader.wanted if name in here)
    for name in here:
        kind = schema.field(name).type
        if not _is_number(kind):
            raise HistoryError(
                f"{file}: column `{name}` is {_kind(kind)}, and a channel must be a number; drop "
                "the column or convert it"
            )
    if reader.channels is None:
        if not here:
            raise HistoryError(f"{file}: expected a numeric column for each channel, found none")
        reader.channels, reader.channels_of = here, file
    lacks = [name for name in reader.channels if name not in here]
    extra = [name for name in here if name not in reader.channels]
    if lacks or extra:
        against = "the channels asked for" if reader.wanted else str(reader.channels_of)
        differences = [
            f"{word} {_some(names)}" for word, names in (("lacks", lacks), ("adds", extra)) if names
        ]
        raise HistoryError(
            f"{file}: channels differ from {against}: {' and '.join(differences)}; every entity "
            "needs the same channels (a column without readings will do)"
        )
    return reader.channels


def _is_number(kind: pa.DataType) -> bool:
    kinds = pa.types
    return bool(
        kinds.is_integer(kind)
        or kinds.is_floating(kind)
        or kinds.is_decimal(kind)
        or kinds.is_boolean(kind)
        # What pandas writes for a column of nothing but None.
        or kinds.is_null(kind)
    )


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return f"text ({kind})" if text else f"of type {kind}"


def _timestamps_ms(file: Path, column: pa.ChunkedArray, reader: _Reader) -> NDArray[np.int64]:
    """Convert the timestamp column, which has no nulls, to milliseconds since the epoch (N,)."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("ms", column.type.tz), safe=False)
        return np.asarray(column.cast(pa.int64()).to_numpy(), np.int64)
    if not pa.types.is_integer(column.type):
        raise HistoryError(
            f"{file}: expected `{TIMESTAMP}` as a Parquet timestamp or integer, it is "
            f"{_kind(column.type)}; convert it"
        )
    steps = column.cast(pa.int64(), safe=False).to_numpy()
    highest = int(steps.max())
    if highest >= MILLISECOND_LIMIT:
        raise HistoryError(
            f"{file}: expected integer timestamps in milliseconds, got {highest}; divide "
            "microseconds by 1,000 and nanoseconds by 1,000,000"
        )
    if highest >= STEP_LIMIT:
        return np.asarray(steps, np.int64)
    if reader.period_ms is None:
        raise HistoryError(
            f"{file}: timestamps are step indices (up to {highest}), and without a period their "
            "time is unknown; give --period"
        )
    if int(steps.min()) >= _SECONDS[0] and highest <= _SECONDS[1]:
        reader.warnings.append(
            f"{file}: timestamps such as {highest} are taken as step indices; if they are seconds "
            "since the epoch, multiply them by 1,000"
        )
    return np.asarray(steps, np.int64) * reader.period_ms


def _values(
    table: pa.Table, channels: Sequence[str], kind: type[np.float32] | type[np.float64]
) -> NDArray[Any]:
    """Collect the channels as (N, D); whatever is no finite number becomes NaN."""
    values = np.empty((table.num_rows, len(channels)), kind)
    for place, name in enumerate(channels):
        column = table.column(name)
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        numbers = column.cast(pa.float64(), safe=False).to_numpy()
        with np.errstate(over="ignore"):  # Beyond float32 is infinite, and so missing.
            values[:, place] = numbers
    values[~np.isfinite(values)] = np.nan
    return values


def _entities(file: Path, column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """Return the distinct names of an entity column, and which of them each row (N,) has."""
    if column.null_count:
        raise HistoryError(
            f"{file}: {column.null_count} of {len(column)} rows have no `{ENTITY}`; fill or drop "
            "them"
        )
    encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), np.asarray(encoded.indices.to_numpy(), np.int64)


def _split(
    file: Path,
    names: Sequence[str],
    member: NDArray[np.int64],
    timestamps_ms: NDArray[np.int64],
    values: NDArray[np.float32],
    warnings: list[str],
) -> Iterator[EntityHistory]:
    """Separate the entities of a file and put each in order; warn once about all of them."""
    late = repeated = 0
    by_member = np.argsort(member, kind="stable")
    ends = np.cumsum(np.bincount(member, minlength=len(names)))
    for name, rows in zip(names, np.split(by_member, ends[:-1]), strict=True):
        here, of_row = timestamps_ms[rows], values[rows]
        late += int(np.count_nonzero(here < np.maximum.accumulate(here)))
        ordered, kept = _in_order(here, of_row)
        repeated += len(here) - len(ordered)
        yield EntityHistory(name, ordered, kept)
    if late:
        warnings.append(f"{file}: {late} of {len(member)} rows were out of order; sorted")
    if repeated:
        warnings.append(
            f"{file}: {repeated} of {len(member)} rows repeat a timestamp; the last of each is kept"
        )


def _in_order(
    timestamps_ms: NDArray[np.int64], values: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Sort by time, and of rows with the same time keep the one that came last."""
    if np.all(timestamps_ms[1:] > timestamps_ms[:-1]):
        return timestamps_ms, values
    order = np.argsort(timestamps_ms, kind="stable")
    ordered = timestamps_ms[order]
    order = order[np.append(ordered[1:] != ordered[:-1], True)]
    return timestamps_ms[order], values[order]


def _join(name: str, pieces: Sequence[EntityHistory], warnings: list[str]) -> EntityHistory:
    """Put together what several files hold of one entity."""
    if len(pieces) == 1:
        return pieces[0]
    timestamps_ms = np.concatenate([piece.timestamps_ms for piece in pieces])
    values = np.concatenate([piece.values for piece in pieces])
    ordered, kept = _in_order(timestamps_ms, values)
    repeated = len(timestamps_ms) - len(ordered)
    if repeated:
        warnings.append(
            f"{name}: {repeated} timestamps are in several files; the last in order of file names "
            "is kept"
        )
    return EntityHistory(name, ordered, kept)


def _some(names: Sequence[str]) -> str:
    """List names for a message, the first few of many."""
    shown = ", ".join(f"`{name}`" for name in names[:_NAMES_SHOWN]) or "no columns"
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
