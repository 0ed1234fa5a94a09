"""History through the live loop: Parquet in; Parquet, OpenMetrics or remote write out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from prometheus_client import CollectorRegistry

from stream.codec import rfc3339
from stream.compose import Model, grid_of, scoring_of
from stream.config import ServiceConfig
from stream.errors import DecodeError
from stream.formats.base import guessed_ms
from stream.grid import Grid
from stream.http import Health
from stream.metrics import ServiceMetrics
from stream.records import AlertEvent
from stream.service import Service
from stream.sinks import ParquetSink, Round, Sink
from stream.sources import HistorySource
from tsdiff.errors import ConfigError
from tsdiff.history import History

HEAD_MS: Final = 3 * 3_600_000
"""Prometheus is still writing its newest block; its documentation says not to backfill so much."""


class Output(Sink, Protocol):
    """A sink that can be given up."""

    def abandon(self) -> None:
        """Remove what can be removed: the run did not come to its end."""


@dataclass(frozen=True)
class Span:
    """Slots from `since_ms` to before `until_ms`."""

    since_ms: float = -math.inf
    until_ms: float = math.inf

    def __contains__(self, timestamp_ms: float) -> bool:
        return self.since_ms <= timestamp_ms < self.until_ms

    @classmethod
    def parse(cls, since: str | None, until: str | None) -> "Span":
        """Read the options of a command.

        Raises:
            ConfigError: one is no time, or nothing is between them.

        """
        span = cls(
            -math.inf if since is None else parse_moment_ms(since, "--since"),
            math.inf if until is None else parse_moment_ms(until, "--until"),
        )
        if span.since_ms >= span.until_ms:
            raise ConfigError(f"expected --since before --until, got {since} and {until}")
        return span


@dataclass(frozen=True)
class BackfillSummary:
    """What a backfill read and wrote."""

    readings: int
    scores: int
    alerts: tuple[AlertEvent, ...]
    warming: tuple[str, ...]
    """Entities whose history is too short for any score."""


def backfill(
    history: History,
    model: Model,
    config: ServiceConfig,
    path: Path | None,
    progress: Callable[[int], None] = lambda _: None,
    *,
    others: Sequence[Output] = (),
    span: Span | None = None,
) -> BackfillSummary:
    """Score a history into a Parquet file (None: none) and `others`, which are closed or abandoned.

    `progress` is told how many readings are done. A slot is scored once it is complete or a later
    reading has shown that it is over, exactly as live: of the newest slot of the history, what is
    incomplete stays open. Slots outside of `span` are not written; what was before it is read all
    the same, so that scores do not depend on where it begins.
    """
    source = HistorySource(history, progress)
    outputs = list(others)
    try:
        if path is not None:
            outputs.append(ParquetSink(path))
        grid, scoring = grid_of(model, config), scoring_of(model, config)
        tee = _Tee(outputs, span or Span(), grid)
        metrics = ServiceMetrics(
            CollectorRegistry(),
            channels=model.detector.channels,
            max_entities=0,
            top_channels=0,
            entity_ttl_s=1.0,
        )
        service = Service(source, tee, model.detector, grid, scoring, metrics, Health())
        service.run(lambda: tee.ended)
        tee.close()
    except BaseException:
        for output in outputs:
            output.abandon()
        raise
    scored = tee.scored
    warming = tuple(e.entity for e in history.entities if e.entity not in scored)
    return BackfillSummary(source.done, tee.rows, tuple(tee.alerts), warming)


class _Tee:
    """Passes the slots of a span on to several outputs, and counts them."""

    def __init__(self, outputs: Sequence[Output], span: Span, grid: Grid) -> None:
        self._outputs = outputs
        self._span = span
        # An entity may be ahead of others by the slots that are still open for readings.
        self._over_ms = span.until_ms + (grid.lateness_slots + 1) * grid.period_ms
        self.rows = 0
        self.alerts: list[AlertEvent] = []
        self.scored: set[str] = set()
        """Entities that have a score, in the span or before, not only slots of their warm-up."""
        self.ended = False
        """Whether all slots of the span were told."""

    def commit(self, round_: Round, generation: Any) -> None:  # noqa: ANN401 - opaque token
        span = self._span
        self.scored.update(s.entity for s in round_.scores if s.anomaly_score is not None)
        self.ended = any(s.timestamp_ms >= self._over_ms for s in round_.scores)
        part = replace(
            round_,
            scores=[s for s in round_.scores if s.timestamp_ms in span],
            alerts=[a for a in round_.alerts if a.timestamp_ms in span],
        )
        for output in self._outputs:
            output.commit(part, generation)
        self.rows += len(part.scores)
        self.alerts.extend(part.alerts)

    def reset(self) -> None:
        for output in self._outputs:
            output.reset()

    def close(self) -> None:
        for output in self._outputs:
            output.close()


def refuse_recent(history: History, grid: Grid, span: Span, now_ms: float) -> None:
    """See that no slot to be written is of the time that Prometheus' head block may hold.

    Raises:
        ConfigError: there is one; says where to stop, and what to do with the rest.

    """
    period = grid.period_ms
    newest = max(int(e.timestamps_ms[-1]) for e in history.entities)
    last = period * (newest // period if grid.close_complete else grid.closed_before(newest) - 1)
    limit = math.floor((now_ms - HEAD_MS) / period) * period
    begin = max(limit, span.since_ms)
    if begin > last or begin >= span.until_ms:
        return
    at = rfc3339(limit)
    raise ConfigError(
        f"expected for --openmetrics slots before {at}, three hours ago, got slots up to "
        f"{rfc3339(last)}: Prometheus is still writing its newest block (the head), and a block "
        f"from a file must not overlap it; give --until {at}, and the rest to --remote-write with "
        f"--since {at}, or wait"
    )


def parse_moment_ms(text: str, name: str) -> int:
    """Read RFC 3339 (UTC where no zone is given) or epoch seconds or milliseconds, as ms.

    Raises:
        ConfigError: it is neither; `name` says in the message what it was for.

    """
    try:
        try:
            return guessed_ms(float(text))
        except ValueError:
            moment = datetime.fromisoformat(text.strip())
            return guessed_ms(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ValueError, DecodeError):
        raise ConfigError(
            f"{name}: expected RFC 3339 (2026-11-23T12:00:00Z) or epoch seconds or milliseconds, "
            f"got {text!r}"
        ) from None
