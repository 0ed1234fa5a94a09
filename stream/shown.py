"""What is kept of entities, as the JSON that the page asks for: bounded, and short."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stream.recent import UNKNOWN, Float32, Past, Recent
from stream.records import STATES, UNSETTLED, AlertEvent, State
from stream.words import Terms, present

Record = dict[str, Any]

MOST_LISTED: Final = 200
MOST_CHANNELS: Final = 60
_SPARK_POINTS = 120
_EVENTS_LISTED, _EVENTS_OF_ENTITY = 8, 50


def overview(recent: Recent, match: str = "", most: int = 50) -> Record:
    """The worst entities whose name holds `match`, and the alerts of late."""
    listed = recent.worst(match, min(most, MOST_LISTED))
    return {
        "kept": listed.kept,
        "matching": listed.matching,
        "slots": recent.layout.slots,
        "period_ms": recent.layout.period_ms,
        "trigger": recent.policy.trigger,
        "entities": [_row(past) for past in listed.pasts],
        "events": [_event(event) for event in listed.events[-_EVENTS_LISTED:][::-1]],
    }


def _row(past: Past) -> Record:
    record, scores = past.record, past.scores
    pooled = -(-len(scores) // _SPARK_POINTS)
    padded = np.concatenate([np.full(-len(scores) % pooled, np.nan, np.float32), scores])
    return {
        "entity": record.entity,
        "state": record.state,
        "anomaly_score": _rounded(record.anomaly_score),
        "timestamp_ms": record.timestamp_ms,
        "faulty": dict(record.faulty),
        "channels": list(record.channels)[:3] if record.state in UNSETTLED else [],
        # The highest of each few slots, so that no spike is lost.
        "spark": numbers(np.fmax.reduce(padded.reshape(-1, pooled), axis=1), 3),
    }


def entity(recent: Recent, name: str, match: str = "") -> Record | None:
    """All that is known of an entity, and of its channels whose name holds `match`."""
    past = recent.past(name)
    if past is None:
        return None
    record, period_ms = past.record, recent.layout.period_ms
    known = np.flatnonzero(np.isfinite(past.scores) | (past.states != UNKNOWN))
    changes = [(int(past.slots[i]) * period_ms, state) for i, state in _runs(past.states)]
    depth = len(recent.layout.channels)
    terms = Terms(depth, period_ms, recent.policy, recent.slots_per_alarm)
    return {
        "entity": name,
        "state": record.state,
        "anomaly_score": _rounded(record.anomaly_score),
        "timestamp_ms": record.timestamp_ms,
        "summary": present(record, _since(changes), terms),
        "faulty": dict(record.faulty),
        "imputed_ratio": _rounded(record.imputed_ratio),
        "model": record.model,
        "start_ms": int(past.slots[0]) * period_ms,
        "period_ms": period_ms,
        "since_ms": int(past.slots[known[0] if len(known) else 0]) * period_ms,
        "trigger": recent.policy.trigger,
        "scores": numbers(past.scores, 4),
        "states": [{"from_ms": ms, "state": state} for ms, state in changes],
        "events": [_event(event) for event in past.events[::-1][:_EVENTS_OF_ENTITY]],
        **_channels(recent, past, match),
    }


def _channels(recent: Recent, past: Past, match: str) -> Record:
    layout, record, cells, wanted = recent.layout, past.record, past.cells, match.casefold()
    # While somebody is to blame, the guiltiest come first; else they would only change places.
    blamed = list(record.channels) if record.state in UNSETTLED else []
    order = [*record.faulty, *blamed, *layout.channels]
    place = {name: i for i, name in enumerate(layout.channels)}
    names = [n for n in dict.fromkeys(order) if wanted in n.casefold() and n in place]
    listed = names[:MOST_CHANNELS]
    told: list[Record] = []
    for name in listed:
        c = place[name]
        score = record.channels.get(name)
        channel: Record = {
            "channel": name,
            "unit": layout.units[c],
            "state": record.faulty.get(name),
            "contribution": None if score is None else _rounded(score.contribution),
        }
        if cells is not None:
            for i, part in enumerate(("observed", "expected", "lower", "upper")):
                channel[part] = numbers(cells[:, i, c], 5)
        told.append(channel)
    begun = None
    if cells is not None and (filled := np.isfinite(cells[:, 1]).any(1)).any():
        begun = int(past.slots[np.argmax(filled)]) * layout.period_ms
    return {
        "channels": told,
        "channels_since_ms": begun,
        "channels_matching": len(names),
        "channels_known": len(layout.channels),
    }


def _runs(states: NDArray[np.int8]) -> list[tuple[int, State | None]]:
    """Where each run of a state begins; `None` = not known."""
    begins = np.flatnonzero(np.r_[True, states[1:] != states[:-1]]).tolist()
    return [(i, None if states[i] == UNKNOWN else STATES[states[i]]) for i in begins]


def _since(changes: Sequence[tuple[int, State | None]]) -> int:
    """When what is going on began: an alert begins with its first pending slot."""
    since_ms, state = changes[-1]
    if state == "firing" and len(changes) > 1 and changes[-2][1] == "pending":
        return changes[-2][0]
    return since_ms


def _event(event: AlertEvent) -> Record:
    return {
        "entity": event.entity,
        "timestamp_ms": event.timestamp_ms,
        "state": event.state,
        "previous": event.previous,
        "summary": event.summary,
    }


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")


def numbers(values: Float32, digits: int) -> list[float | None]:
    """Numbers with so many figures, for JSON; what is not finite is null."""
    finite = np.isfinite(values)
    wide = np.where(finite, values.astype(np.float64), 0.0)
    size = np.abs(np.where(wide != 0, wide, 1.0))
    grain = 10.0 ** (np.floor(np.log10(size)) - digits + 1)
    # Divided by a power of ten that is whole, numbers come out as short as they can be written.
    whole = np.maximum(np.round(1 / grain), 1.0)
    figures = np.round(wide / grain)
    short = np.where(grain < 1, figures / whole, figures * grain)
    return [x if ok else None for x, ok in zip(short.tolist(), finite.tolist(), strict=True)]
