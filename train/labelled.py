"""Labelled folders `<set>/<entity>/{train,test}.parquet[,interpretation.json]`, on the grid."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from train.baselines import forward_fill
from train.metrics import Cause, autocorrelation_period
from tsdiff.config import ModelConfig
from tsdiff.errors import HistoryError
from tsdiff.history import STEP_LIMIT, TIMESTAMP, EntityHistory, load_history
from tsdiff.types import BoolArray, FloatArray
from tsdiff.windows import extended, to_grid

_LABEL = "label"
# What training and the service take for a pause of the entity rather than missing slots.
LONGEST_GAP = ModelConfig.window


class Trial(NamedTuple):
    """What is judged: `values` (T, D) on the grid; per row of the file, its slot and its label.

    `numbers` (T,) are the slots' own, which tell the time of day.
    `goes_on`: the first slot follows the training part's last one, so it has context there.
    `buffer` is the longest that VUS uses; a property of the metric, taken from channel 0 of the
    training and the test part, as TSB-AD does.
    """

    values: FloatArray
    numbers: NDArray[np.int64]
    slots: NDArray[np.int64]
    labels: BoolArray
    causes: tuple[Cause, ...]
    goes_on: bool
    buffer: int


@dataclass(frozen=True)
class Entity:
    """An entity: its training part as it came, the same on the grid (N, D), and its test part.

    One without labelled test part (None) is trained on, and not judged.
    """

    name: str
    history: EntityHistory
    past: FloatArray
    test: Trial | None


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Entities with the same channels and period."""

    name: str
    channels: tuple[str, ...]
    period_ms: int
    entities: tuple[Entity, ...]


def find_sets(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Names of sets and the folders of their entities.

    A path is an entity (it holds train.parquet), a set (a folder of entities), or a folder of sets.

    Raises:
        HistoryError: a path is none of these, or an entity is given twice.

    """
    found: dict[str, list[Path]] = {}
    for path in paths:
        here = path.resolve()
        entities = [here] if _is_entity(here) else list(_entities(here))
        if not entities and here.is_dir():
            entities = [entity for folder in sorted(here.iterdir()) for entity in _entities(folder)]
        if not entities:
            raise HistoryError(
                f"{path}: expected labelled folders [SET/][ENTITY/]{{train,test}}.parquet, found "
                "no train.parquet"
            )
        for entity in entities:
            names = found.setdefault(entity.parent.name, [])
            if entity.name in {known.name for known in names}:
                raise HistoryError(
                    f"{path}: a second entity {entity.parent.name}/{entity.name}; give each once"
                )
            names.append(entity)
    return found


def _is_entity(folder: Path) -> bool:
    return (folder / "train.parquet").is_file()


def _entities(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (entity for entity in sorted(folder.iterdir()) if _is_entity(entity))


def load_set(
    name: str, folders: Sequence[Path], period_ms: int | None, steps_ms: int | None
) -> LabelledSet:
    """Read a set. Its period is `period_ms`; else what its timestamps say, or for steps `steps_ms`.

    Raises:
        HistoryError: a file cannot be read, channels differ, rows are out of order, no labels.

    """
    channels: tuple[str, ...] | None = None
    parts: list[dict[str, EntityHistory]] = []
    for folder in folders:
        own: dict[str, EntityHistory] = {}
        for part in ("train", "test"):
            if (folder / f"{part}.parquet").is_file():
                history = load_history(
                    folder / f"{part}.parquet",
                    period_ms=period_ms or steps_ms,
                    channels=channels,
                )
                channels = history.channels
                if len(history.entities) != 1:
                    raise HistoryError(f"{folder}: expected one entity a folder; split the file")
                own[part] = history.entities[0]
        parts.append(own)
    if period_ms is None:
        counted = steps_ms if _counts_steps(folders[0] / "train.parquet") else None
        period_ms = counted or _median_step([own["train"] for own in parts], folders[0].parent)
    entities = tuple(
        _entity(folder, own, channels or (), period_ms)
        for folder, own in zip(folders, parts, strict=True)
    )
    if all(entity.test is None for entity in entities):
        raise HistoryError(
            f"{folders[0].parent}: expected a column `{_LABEL}` in the test.parquet of at least "
            "one entity, found none"
        )
    return LabelledSet(name, channels or (), period_ms, entities)


def _counts_steps(file: Path) -> bool:
    """Whether the (readable) file's timestamps are step indices."""
    times = pq.read_table(file, columns=[TIMESTAMP]).column(TIMESTAMP)
    if not pa.types.is_integer(times.type):
        return False
    return bool(np.max(times.drop_null().to_numpy()) < STEP_LIMIT)


def _median_step(pieces: Sequence[EntityHistory], folder: Path) -> int:
    steps = np.concatenate([np.diff(piece.timestamps_ms) for piece in pieces])
    if len(steps) == 0:
        raise HistoryError(f"{folder}: expected at least two rows in train.parquet, found one")
    return max(int(np.median(steps)), 1)


def _entity(
    folder: Path, parts: Mapping[str, EntityHistory], channels: Sequence[str], period_ms: int
) -> Entity:
    train = parts["train"]
    past = to_grid(train.timestamps_ms, train.values, period_ms, LONGEST_GAP)[1]
    if "test" not in parts:
        return Entity(folder.name, train, past, None)
    file, test = folder / "test.parquet", parts["test"]
    labels = _labels(file)
    if labels is None:
        return Entity(folder.name, train, past, None)
    times_ms = test.timestamps_ms
    last_slot = int(train.timestamps_ms[-1]) // period_ms
    first_slot = int(times_ms[0]) // period_ms
    if first_slot <= last_slot and _counts_steps(file):
        # Steps that start again at 0 go on where training ended.
        times_ms = times_ms + (last_slot + 1 - first_slot) * period_ms
        first_slot = last_slot + 1
    numbers, values = to_grid(times_ms, test.values, period_ms, LONGEST_GAP)
    slots = np.searchsorted(numbers, times_ms // period_ms)
    gap = first_slot - last_slot - 1
    goes_on = 0 <= gap < LONGEST_GAP
    if goes_on and gap:
        values = np.concatenate([np.full((gap, values.shape[1]), np.nan, np.float32), values])
        numbers = extended(numbers, gap)
        slots = slots + gap
    whole = np.concatenate([train.values[:, :1], test.values[:, :1]])
    first = forward_fill(whole)[:, 0].astype(np.float64)
    known = first[np.isfinite(first)]
    first = np.where(np.isfinite(first), first, known.mean() if len(known) else 0.0)
    return Entity(
        folder.name,
        train,
        past,
        Trial(
            values,
            numbers,
            slots.astype(np.int64),
            labels,
            _causes(folder / "interpretation.json", channels, len(labels)),
            goes_on,
            autocorrelation_period(first),
        ),
    )


def _labels(file: Path) -> BoolArray | None:
    """Labels row by row; None without the column."""
    if _LABEL not in pq.read_schema(file).names:
        return None
    table = pq.read_table(file, columns=[TIMESTAMP, _LABEL])
    times = table.column(TIMESTAMP)
    if times.null_count or not np.all(np.diff(times.cast(pa.int64()).to_numpy()) > 0):
        raise HistoryError(
            f"{file}: expected rows in order of time and each time once, so that labels and "
            "segments keep their rows; sort it and drop repeated rows"
        )
    try:
        labels = table.column(_LABEL).cast(pa.float64()).to_numpy()
    except pa.ArrowException as error:
        raise HistoryError(f"{file}: expected 0 or 1 in the column `{_LABEL}` ({error})") from error
    return np.asarray(np.nan_to_num(labels) != 0)


def _causes(file: Path, channels: Sequence[str], rows: int) -> tuple[Cause, ...]:
    """Faults whose channels are known; none without the file."""
    if not file.is_file():
        return ()
    number = {name: place for place, name in enumerate(channels)}
    causes = []
    try:
        for segment in json.loads(file.read_text("utf-8"))["segments"]:
            blamed = frozenset(number[name] for name in segment.get("channels", ()))
            start, end = int(segment["start"]), int(segment["end"])
            if not 0 <= start < end <= rows:
                raise ValueError(f"rows {start} to {end} of {rows}")
            if blamed:
                causes.append(Cause(start, end, blamed))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HistoryError(
            f"{file}: expected segments of start, end (rows of test.parquet) and channels, got "
            f"{type(error).__name__}: {error}; mend or remove the file"
        ) from error
    return tuple(causes)
