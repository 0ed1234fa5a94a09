"""Scores as OpenMetrics text with timestamps, for `promtool tsdb create-blocks-from openmetrics`.

The format wants all samples of a series to stand together, while scores come in the order of time.
(promtool itself takes series as they come, but drops without a word what is older than a sample
before it.) So samples are spooled: runs that are sorted by series, in a temporary file, are merged
at the end. Memory grows with the number of series, not with the length of the history.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from heapq import merge
from operator import itemgetter
from pathlib import Path
from struct import Struct
from typing import IO, Any, Final

from stream.errors import StreamError
from stream.series import (
    Points,
    SeriesBuffer,
    SeriesKey,
    entity_samples,
    family_of,
    key_of,
    labels_of,
)
from stream.sinks import Round

# Half a million samples of 16 bytes, and what their series take.
_RUN_BYTES: Final = 16 * 1024 * 1024
_HEADER: Final = Struct("<qq")


class OpenMetricsSink:
    """Scores to one OpenMetrics file, which appears under its name only when it is whole.

    Args:
        path: the file.
        labels: what is added to every series.
        top_channels: channels told for each slot, those that contribute most.
        run_bytes: samples that are held in memory before they go to the temporary file.

    Raises:
        StreamError: the file cannot be written.

    """

    def __init__(
        self,
        path: Path,
        labels: Mapping[str, str],
        *,
        top_channels: int,
        run_bytes: int = _RUN_BYTES,
    ) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._labels = labels
        self._top_channels = top_channels
        self._run_bytes = run_bytes
        self._buffer = SeriesBuffer()
        if path.is_dir():
            raise StreamError(f"expected a file for --openmetrics, got the folder {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Beside the file: where there is room for it, there should be room for this.
            self._spool = _Spool(path.parent)
        except OSError as error:
            raise self._cannot(error) from error

    def commit(self, round_: Round, generation: Any) -> None:  # noqa: ANN401 - opaque token
        """Take the scores of a round."""
        for score in round_.scores:
            for sample in entity_samples(score, self._top_channels):
                self._buffer.add(key_of(sample), score.timestamp_ms, sample.value)
            if self._buffer.bytes >= self._run_bytes:
                self._spill()

    def _spill(self) -> None:
        try:
            self._spool.write(self._buffer)
        except OSError as error:
            raise self._cannot(error) from error
        self._buffer.clear()

    def reset(self) -> None:
        """Nothing can have failed."""

    def close(self) -> None:
        """Write the file from its parts, and give it its name."""
        self._spill()
        try:
            with self._partial.open("w", encoding="utf-8", newline="\n") as out:
                self._write(out)
            os.replace(self._partial, self._path)
        except OSError as error:
            raise self._cannot(error) from error
        self._spool.close()

    def _write(self, out: IO[str]) -> None:
        family = ""
        before: SeriesKey | None = None
        prefix = ""
        for key, points in self._spool.merged():
            if key[0] != family:
                family = key[0]
                text = _escaped(family_of(key).help)
                out.write(f"# HELP {family} {text}\n# TYPE {family} gauge\n")
            if key != before:
                before, prefix = key, series_text(key, self._labels)
            out.writelines(
                f"{prefix} {value!r} {timestamp_ms / 1000!r}\n"
                for timestamp_ms, value in zip(*points, strict=True)
            )
        out.write("# EOF\n")

    def abandon(self) -> None:
        """Remove what was written: the run did not come to its end."""
        self._spool.close()
        self._partial.unlink(missing_ok=True)

    def _cannot(self, error: OSError) -> StreamError:
        return StreamError(
            f"cannot write OpenMetrics to {self._path}: {error.strerror or error}; name another "
            "file, or make room there for about twice its size"
        )


class _Spool:
    """Runs of series in one temporary file without a name; nothing is left of it."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - see close
        self._numbers: dict[SeriesKey, int] = {}
        self._keys: list[SeriesKey] = []
        self._ends = [0]

    def write(self, buffer: SeriesBuffer) -> None:
        """Append a run: its series in order, each with its samples in the order of time."""
        if not buffer.samples:
            return
        for key in sorted(buffer.series):
            number = self._numbers.setdefault(key, len(self._keys))
            if number == len(self._keys):
                self._keys.append(key)
            points = buffer.series[key]
            self._file.write(_HEADER.pack(number, len(points.values)))
            for column in points:
                column.tofile(self._file)
        self._ends.append(self._file.tell())

    def merged(self) -> Iterator[tuple[SeriesKey, Points]]:
        """All series in order; one that is in several runs comes as often, the oldest run first."""
        self._file.flush()
        runs = zip(self._ends, self._ends[1:], strict=False)
        # Of equal keys `merge` takes that of the earlier run.
        return merge(*(self._run(start, end) for start, end in runs), key=itemgetter(0))

    def _run(self, start: int, end: int) -> Iterator[tuple[SeriesKey, Points]]:
        file, at = self._file.fileno(), start
        while at < end:
            number, count = _HEADER.unpack(os.pread(file, _HEADER.size, at))
            points = Points.empty()
            for column in points:
                column.frombytes(os.pread(file, 8 * count, at + _HEADER.size))
                at += 8 * count
            at += _HEADER.size
            yield self._keys[number], points

    def close(self) -> None:
        self._file.close()


def series_text(key: SeriesKey, labels: Mapping[str, str]) -> str:
    """A series as it stands before a value: `name{label="value"}`."""
    pairs = [f'{label}="{_escaped(value)}"' for label, value in labels_of(key, labels)]
    return f"{key[0]}{{{','.join(pairs)}}}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
