"""What alerts and the page say of an entity, in plain sentences. Pure: records in, text out.

`tsdiff.explain` has the sentence about who is off; here are the others: calm again, silent, dead.
Nothing is remembered for it, so a restart and a backfill say the same.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from stream.decide import AlertPolicy
from stream.records import ChannelScore, ChannelState, SlotScore, State
from tsdiff.explain import Deviation, Event, duration_text, headline, moment_text, names_text

_DAY_MS = 86_400_000
_LONGER = "for far longer than ever in training"


class Change(NamedTuple):
    """An entity's slot, its state before it and when that had begun, and who was faulty then."""

    score: SlotScore
    previous: State
    since_ms: int
    faulty_before: Mapping[str, ChannelState]


class Terms(NamedTuple):
    """What is the same for all entities: how many channels each has, and what an alarm is."""

    channels: int
    period_ms: int
    policy: AlertPolicy
    slots_per_alarm: float


def summary(change: Change, terms: Terms) -> str:
    """Say what changed. No full stop at the end."""
    score, previous, since_ms, faulty_before = change
    said = []
    if score.state != previous:
        said.append(_new_state(score, previous, since_ms, terms))
    said += broken(score, faulty_before)
    # What is masked while an entity warms up has not been mended.
    said += _mended(score, faulty_before) if score.state != "warming" else ()
    return ". ".join(said)


def present(score: SlotScore, since_ms: int, terms: Terms) -> str:
    """Say how an entity is now, which has been in its state since `since_ms`."""
    said = []
    faults = list(broken(score, {}))
    calm = score.anomaly_score is not None and score.anomaly_score <= terms.policy.trigger
    if faults and calm and score.state == "ok":
        return f"{'. '.join(faults)}. All else is as usual{_number(score, terms.policy)}"
    if score.state in ("stale", "warming"):
        said.append(_new_state(score, "ok", since_ms, terms))
    elif score.anomaly_score is None or not score.channels:
        what = "nothing can be said" if score.anomaly_score is None else "nothing unusual"
        when = moment_text(score.timestamp_ms, dated=False)
        said.append(f"{what} about {score.entity} at {when} UTC")
    else:
        alerting = score.state in ("pending", "firing")
        start_ms = since_ms if alerting else score.timestamp_ms
        said.append(headline(_event(score, start_ms, terms)))
    return ". ".join([*said, *faults])


def _new_state(score: SlotScore, previous: State, since_ms: int, terms: Terms) -> str:
    name = score.entity
    lasted = duration_text(max(score.timestamp_ms - since_ms, terms.period_ms))
    match score.state:
        case "pending" | "firing":
            # The slots that were pending are part of what fires; anything before is another story.
            start_ms = since_ms if previous == "pending" else score.timestamp_ms
            return headline(_event(score, start_ms, terms))
        case "recovering":
            return f"{name} is calm again after {lasted}{_number(score, terms.policy)}"
        case "stale":
            silent = duration_text(terms.policy.stale_after_slots * terms.period_ms)
            return f"{name} has sent no readings for {silent} or longer"
        case "warming":
            return f"{name} is warming up, and has no scores until its window is full"
        case "ok":
            return _calm(score, previous, since_ms, lasted)


def _calm(score: SlotScore, previous: State, since_ms: int, lasted: str) -> str:
    name = score.entity
    match previous:
        case "recovering":
            another_day = since_ms // _DAY_MS != score.timestamp_ms // _DAY_MS
            since = moment_text(since_ms, dated=another_day)
            return f"{name} has stayed calm since {since} UTC: the alert is over"
        case "stale":
            return f"{name} sends readings again, after {lasted} as stale"
        case "warming":
            return f"{name} has warmed up"
        case _:
            return f"{name} is calm again after {lasted}, before it was an alert"


def _number(score: SlotScore, policy: AlertPolicy) -> str:
    if score.anomaly_score is None:
        return ""
    return f": the anomaly score is {score.anomaly_score:.2f}, the threshold {policy.trigger:g}"


def _event(score: SlotScore, start_ms: int, terms: Terms) -> Event:
    """Put one slot into the form of `tsdiff.explain`; it goes on, as far as is known."""
    return Event(
        entity=score.entity,
        deviations=tuple(_deviation(name, cell) for name, cell in score.channels.items()),
        channels=terms.channels,
        start_ms=start_ms,
        end_ms=score.timestamp_ms + terms.period_ms,
        ongoing=score.state in ("pending", "firing"),
        period_ms=terms.period_ms,
        anomaly_score=score.anomaly_score or 0.0,
        p_value=1.0 if score.p_value is None else score.p_value,
        threshold=terms.policy.trigger,
        slots_per_alarm=terms.slots_per_alarm,
        latest=score.state in ("pending", "firing"),
    )


def _deviation(name: str, cell: ChannelScore) -> Deviation:
    # Only a channel without any reading has no numbers beside it; it is told as silent.
    told = (cell.expected, cell.lower, cell.upper)
    expected, lower, upper = (0.0 if x is None else x for x in told)
    return Deviation(name, cell.observed, expected, lower, upper, cell.contribution)


# -- channels that are broken themselves -------------------------------------------------------


def broken(score: SlotScore, before: Mapping[str, ChannelState]) -> Iterator[str]:
    """Say which channels are dead or stuck, and were not so `before`."""
    new = {name: state for name, state in score.faulty.items() if before.get(name) != state}
    dead = [name for name, state in new.items() if state == "dead"]
    stuck = [name for name, state in new.items() if state == "stuck"]
    if dead:
        yield f"{_on(dead, score, 'is dead', 'are dead')}: without readings {_LONGER}"
    if stuck:
        cell = score.channels.get(stuck[0])
        at = ""
        if len(stuck) == 1 and cell is not None and cell.observed is not None:
            at = f" at {cell.observed:.4g}"
        yield f"{_on(stuck, score, 'is stuck', 'are stuck')}{at}: without a change {_LONGER}"


def _mended(score: SlotScore, before: Mapping[str, ChannelState]) -> Iterator[str]:
    whole = {name: state for name, state in before.items() if name not in score.faulty}
    heard = [name for name, state in whole.items() if state == "dead"]
    moves = [name for name, state in whole.items() if state == "stuck"]
    if heard:
        yield f"{_on(heard, score, 'sends', 'send')} readings again"
    if moves:
        yield _on(moves, score, "moves again", "move again")


def _on(names: list[str], score: SlotScore, one: str, many: str) -> str:
    return f"{names_text(names)} on {score.entity} {one if len(names) == 1 else many}"
