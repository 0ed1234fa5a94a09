"""Closed slots become verdicts: one call of the detector for many entities, then the alert rule.

Partitions take turns so that their windows share a call; nothing here depends on how the slots
were cut into batches.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from stream.buffer import Closing, Float32, PartitionBuffer, Profiles, Span
from stream.decide import AlertPolicy, step
from stream.records import (
    CHANNEL_STATES,
    UNSETTLED,
    AlertEvent,
    ChannelScore,
    ChannelState,
    SlotScore,
)
from stream.words import Change, Terms, summary


class Detection(Protocol):
    """What scoring reads of `tsdiff.detector.Detection`; shapes (E, T, ...)."""

    @property
    def evidence(self) -> Float32: ...  # noqa: D102
    @property
    def streams(self) -> Float32: ...  # noqa: D102
    @property
    def expected(self) -> Float32: ...  # noqa: D102
    @property
    def lower(self) -> Float32: ...  # noqa: D102
    @property
    def upper(self) -> Float32: ...  # noqa: D102
    @property
    def contribution(self) -> Float32: ...  # noqa: D102


class Scorer(Profiles, Protocol):
    """The model as the loop sees it (`tsdiff.detector.Detector`)."""

    @property
    def channels(self) -> tuple[str, ...]:
        """Channel names, in the order of every array."""

    @property
    def compilations(self) -> int:
        """How often the model was compiled since the process started."""

    def detect(
        self,
        values: Float32,
        slots: NDArray[np.int64],
        lengths: NDArray[np.int32],
        mean: Float32,
        scale: Float32,
        rows: NDArray[np.int32],
        history: Float32,
        states: Sequence[Float32 | None] | None = None,
    ) -> Detection:
        """Score E spans of T slots; see `tsdiff.detector.Detector.detect`."""


@dataclass(frozen=True)
class ScoringConfig:
    """How evidence becomes a verdict."""

    model: str
    period_ms: int
    threshold: float
    """Evidence at which `anomaly_score` is 1 (`tsdiff.calibration.evidence_threshold`)."""
    policy: AlertPolicy
    slots_per_alarm: float = 1.0
    """How many slots above a line make one alarm of normal data (`tsdiff.detector.Detector`)."""
    minimum_deviation: float = 0.0
    """Least distance from the expected value, in half widths of the band, for a slot to count."""
    direction: str = "both"
    channels: str = "top"
    top_channels: int = 5


class Detail(NamedTuple):
    """All channels of the slots that have just been scored, for whoever shows them.

    `anomaly_score` (n, T) and the others (n, T, D) are of n entities; NaN where there is nothing.
    """

    entities: list[str]
    first_slot: int
    emit: bool
    anomaly_score: Float32
    observed: Float32
    expected: Float32
    lower: Float32
    upper: Float32


Watcher = Callable[[Detail], None]


@dataclass
class Verdicts:
    """What one round of the loop has to say."""

    scores: list[SlotScore] = field(default_factory=list)
    alerts: list[AlertEvent] = field(default_factory=list)


class _Scored(NamedTuple):
    """The detections of one closing, laid out as its rows and slots; NaN where not scored."""

    evidence: Float32
    expected: Float32
    lower: Float32
    upper: Float32
    contribution: Float32


def score_rounds(
    turns: Sequence[tuple[PartitionBuffer, Iterator[Closing]]],
    scorer: Scorer,
    config: ScoringConfig,
    detecting: Callable[[], None] = lambda: None,
    watcher: Watcher | None = None,
) -> Verdicts:
    """Run every partition's closings to their end, scoring those of one round together.

    `detecting` is called before each round; a long backlog keeps its heartbeat with it. `watcher`
    is shown all channels of each closing, also of those that rebuild and emit nothing.
    """
    verdicts = Verdicts()
    waiting = list(turns)
    while waiting:
        round_: list[tuple[PartitionBuffer, Closing]] = []
        still = []
        for buffer, closings in waiting:
            closing = next(closings, None)
            if closing is not None:
                round_.append((buffer, closing))
                still.append((buffer, closings))
        if round_:
            detecting()
            _score_round(round_, scorer, config, verdicts, watcher)
        waiting = still
    return verdicts


def _score_round(
    round_: list[tuple[PartitionBuffer, Closing]],
    scorer: Scorer,
    config: ScoringConfig,
    verdicts: Verdicts,
    watcher: Watcher | None,
) -> None:
    scored = [_blank(closing, len(scorer.channels)) for _, closing in round_]
    spans = [(i, span) for i, (_, closing) in enumerate(round_) for span in closing.spans]
    _detect(round_, spans, scorer, scored)
    # Where something was learned in between, what follows is read with it.
    spans = [(i, span) for i, (b, closing) in enumerate(round_) for span in b.rest(closing)]
    _detect(round_, spans, scorer, scored)
    for (buffer, closing), result in zip(round_, scored, strict=True):
        if watcher is not None:
            watcher(_detail(buffer, closing, result, config))
        _judge(buffer, closing, result, scorer.channels, config, verdicts)


def _detail(
    buffer: PartitionBuffer, closing: Closing, scored: _Scored, config: ScoringConfig
) -> Detail:
    return Detail(
        [buffer.entity(row).name for row in closing.rows.tolist()],
        closing.first_slot,
        closing.emit,
        scored.evidence / np.float32(config.threshold),
        closing.values,
        scored.expected,
        scored.lower,
        scored.upper,
    )


def _detect(
    round_: list[tuple[PartitionBuffer, Closing]],
    spans: list[tuple[int, Span]],
    scorer: Scorer,
    scored: list[_Scored],
) -> None:
    """Score spans (of closing i each), equally wide ones together."""
    for width in sorted({span.width for _, span in spans}):
        group = [(i, span) for i, span in spans if span.width == width]
        stacked = [span for _, span in group]
        detection = scorer.detect(
            np.concatenate([s.values for s in stacked]),
            np.concatenate([s.slots for s in stacked]),
            np.concatenate([s.lengths for s in stacked]),
            np.concatenate([s.mean for s in stacked]),
            np.concatenate([s.scale for s in stacked]),
            np.concatenate([s.model_rows for s in stacked]),
            np.concatenate([s.history for s in stacked]),
            [state for s in stacked for state in s.states],
        )
        begin = 0
        for i, span in group:
            end = begin + len(span.rows)
            _put(scored[i], round_[i][1], span, detection, begin, end)
            round_[i][0].keep_streams(span, detection.streams[begin:end])
            begin = end


def _blank(closing: Closing, channels: int) -> _Scored:
    shape = closing.present.shape

    def nan(*tail: int) -> Float32:
        return np.full((*shape, *tail), np.nan, np.float32)

    return _Scored(nan(), *(nan(channels) for _ in range(4)))


def _put(
    scored: _Scored, closing: Closing, span: Span, detection: Detection, begin: int, end: int
) -> None:
    at = np.searchsorted(closing.rows, span.rows)
    since = span.first_slot - closing.first_slot
    for target, source in zip(
        scored,
        (
            detection.evidence,
            detection.expected,
            detection.lower,
            detection.upper,
            detection.contribution,
        ),
        strict=True,
    ):
        target[at, since : since + source.shape[1]] = source[begin:end]


def _judge(
    buffer: PartitionBuffer,
    closing: Closing,
    scored: _Scored,
    names: tuple[str, ...],
    config: ScoringConfig,
    verdicts: Verdicts,
) -> None:
    """Step the alert rule slot by slot, and write down scores and changes of state."""
    # What rebuilds says nothing, and this takes half of the time.
    channels = _ChannelTable(closing, scored, names, config.top_channels) if closing.emit else None
    evidence = scored.evidence.tolist()
    imputed = np.isnan(closing.values).mean(axis=2).tolist()
    warming, silent = closing.warming.tolist(), closing.silent.tolist()
    far = _far_enough(closing, scored, config)
    broken: list[list[bool]] = np.any(closing.faulty, axis=2).tolist()
    period_ms = config.period_ms
    terms = Terms(len(names), period_ms, config.policy, config.slots_per_alarm)
    entities = [buffer.entity(row) for row in closing.rows.tolist()]
    for t in range(closing.present.shape[1]):
        slot = closing.first_slot + t
        for i in np.flatnonzero(closing.present[:, t]).tolist():
            entity, e = entities[i], evidence[i][t]
            score = None if math.isnan(e) else round(e / config.threshold, 6)
            before = entity.alert
            # A slot whose channels are where they should be, as far as was asked, is calm.
            counted = 0.0 if score is not None and far is not None and not far[i][t] else score
            after = step(
                config.policy,
                before,
                slot,
                None if imputed[i][t] == 1.0 or warming[i][t] else counted,
                warming=warming[i][t],
                silent_slots=silent[i][t],
                frozen=not closing.emit,
            )
            entity.alert = after
            faulty = _faulty(closing.faulty[i, t], names) if broken[i][t] else {}
            faulty_before = entity.faulty
            broke_or_mended = faulty != faulty_before
            entity.faulty = faulty
            if channels is None:
                continue
            wanted = config.channels == "all" or after.phase in UNSETTLED or broke_or_mended
            verdict = SlotScore(
                entity=entity.name,
                timestamp_ms=slot * period_ms,
                anomaly_score=score,
                p_value=None if score is None else 10.0**-e,
                state=after.phase,
                imputed_ratio=imputed[i][t],
                model=config.model,
                channels={}
                if score is None or (config.channels == "alerting" and not wanted)
                else channels.pick(i, t, everything=wanted),
                faulty=faulty,
            )
            verdicts.scores.append(verdict)
            if after.phase == before.phase and not broke_or_mended:
                continue
            buffer.mark_dirty(int(closing.rows[i]))
            if before.phase == "warming" and after.phase == "ok" and not broke_or_mended:
                continue  # the end of the warm-up is nobody's alert
            since_ms = before.since_slot * period_ms
            change = Change(verdict, before.phase, since_ms, faulty_before)
            verdicts.alerts.append(
                AlertEvent(
                    entity=entity.name,
                    timestamp_ms=slot * period_ms,
                    state=after.phase,
                    previous=before.phase,
                    since_ms=since_ms,
                    anomaly_score=score,
                    channels=verdict.channels,
                    model=config.model,
                    faulty=faulty,
                    summary=summary(change, terms),
                )
            )


def _faulty(codes: NDArray[np.int8], names: tuple[str, ...]) -> dict[str, ChannelState]:
    """Read one slot's row of `Closing.faulty`."""
    return {names[c]: CHANNEL_STATES[codes[c] - 1] for c in np.flatnonzero(codes).tolist()}


def _far_enough(
    closing: Closing, scored: _Scored, config: ScoringConfig
) -> list[list[bool]] | None:
    """Whether some channel is off by enough, on the side that counts; `None` = not asked."""
    if config.minimum_deviation <= 0 and config.direction == "both":
        return None
    half = np.maximum((scored.upper - scored.lower) / 2, np.finfo(np.float32).tiny)
    deviation = np.nan_to_num((closing.values - scored.expected) / half)
    if config.direction == "both":
        deviation = np.abs(deviation)
    elif config.direction == "down":
        deviation = -deviation
    least = max(config.minimum_deviation, 1.0 if config.direction != "both" else 0.0)
    far: list[list[bool]] = np.any(deviation >= least, axis=2).tolist()
    return far


class _ChannelTable:
    """Per-channel results of a closing as Python numbers: of the guiltiest channels, or of all."""

    def __init__(self, closing: Closing, scored: _Scored, names: tuple[str, ...], top: int) -> None:
        self._names = names
        contribution = np.nan_to_num(scored.contribution)
        # Largest first; ties by position, so that equal data gives equal records.
        self._ranked = np.argsort(-contribution, axis=2, kind="stable")
        self._columns = np.stack(
            [closing.values, scored.expected, scored.lower, scored.upper, contribution], axis=3
        )
        # Most records have these only: made at once, and no more of them.
        first = self._ranked[:, :, :top]
        self._first: list[list[list[int]]] = first.tolist()
        self._cells: list[list[list[list[float]]]] = np.take_along_axis(
            self._columns, first[..., None], axis=2
        ).tolist()

    def pick(self, i: int, t: int, *, everything: bool) -> dict[str, ChannelScore]:
        """The channels of one record, the guiltiest first; the top ones, or all."""
        chosen, cells = self._first[i][t], self._cells[i][t]
        if everything:
            ranked = self._ranked[i, t]
            chosen, cells = ranked.tolist(), self._columns[i, t, ranked].tolist()
        names = self._names
        return {names[c]: _channel_score(*row) for c, row in zip(chosen, cells, strict=True)}


def _channel_score(
    observed: float, expected: float, lower: float, upper: float, contribution: float
) -> ChannelScore:
    return ChannelScore(
        None if math.isnan(observed) else observed, expected, lower, upper, contribution
    )
