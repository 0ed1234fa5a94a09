"""History through the live loop: Parquet in, Parquet out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from stream.compose import Model, grid_of, scoring_of
from stream.config import ServiceConfig
from stream.http import Health
from stream.metrics import ServiceMetrics
from stream.records import AlertEvent
from stream.service import Service
from stream.sinks import ParquetSink
from stream.sources import HistorySource
from tsdiff.history import History


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
    path: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> BackfillSummary:
    """Score all of a history; `progress` is told how many readings are done.

    A slot is scored once a later reading has shown that it is over, exactly as live: the newest
    slot of the history stays open.
    """
    grid = grid_of(model, config)
    source = HistorySource(history, progress)
    sink = ParquetSink(path)
    metrics = ServiceMetrics(
        CollectorRegistry(),
        channels=model.detector.channels,
        max_entities=0,
        top_channels=0,
        entity_ttl_s=1.0,
    )
    service = Service(
        source, sink, model.detector, grid, scoring_of(model, config), metrics, Health()
    )
    try:
        service.run()
        sink.close()
    except BaseException:
        sink.abandon()
        raise
    warming = tuple(e.entity for e in history.entities if e.entity not in sink.scored)
    return BackfillSummary(source.total, sink.rows, tuple(sink.alerts), warming)
