"""From anomaly scores to alert states: trigger, m of n, recovery and a minimum time. Pure.

    ok ──hot──> pending ──m of n hot──> firing ──calm──> recovering ──all calm──> ok
     ^             │                      ^                   │
     └──none hot───┘                      └───────hot─────────┘

A slot is *hot* when its anomaly score is above `trigger`, *calm* when it is below `recovery`; the
gap between the two is the hysteresis. A slot without any reading is neither: silence says nothing
about the values, so it can neither raise nor end an alert; an entity that stays silent is `stale`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from stream.records import State


@dataclass(frozen=True)
class AlertPolicy:
    """When to wake somebody; counts are grid slots."""

    trigger: float = 1.0
    recovery: float = 0.7
    m: int = 2
    n: int = 3
    recovery_slots: int = 5
    minimum_slots: int = 3
    stale_after_slots: int = 5

    @property
    def memory_slots(self) -> int:
        """How many past slots the state looks back on.

        Silence does not count towards recovery, and before it gets as long as `stale_after_slots`
        it may stand between any two calm slots.
        """
        return max(self.n, self.recovery_slots * self.stale_after_slots)


class AlertState(NamedTuple):
    """The carried state of one entity."""

    phase: State = "warming"
    since_slot: int = 0
    hot: int = 0
    """The last n slots, newest in bit 0; 1 = hot."""
    calm: int = 0
    """Consecutive calm slots, at most `recovery_slots`."""


def step(
    policy: AlertPolicy,
    state: AlertState,
    slot: int,
    anomaly_score: float | None,
    *,
    warming: bool = False,
    silent_slots: int = 0,
    frozen: bool = False,
) -> AlertState:
    """Advance one entity by one closed slot.

    `anomaly_score` is `None` where the slot has no reading or the entity is warming up. With
    `frozen` (while state is rebuilt from the log) the phase stays as it was committed and only the
    memory of past slots is filled again.
    """
    is_hot = anomaly_score is not None and anomaly_score > policy.trigger
    is_calm = anomaly_score is not None and anomaly_score < policy.recovery
    hot = ((state.hot << 1) | is_hot) & ((1 << policy.n) - 1)
    calm = min(state.calm + 1, policy.recovery_slots) if is_calm else state.calm
    if is_hot or (anomaly_score is not None and not is_calm):
        calm = 0
    phase = state.phase if frozen else _next_phase(policy, state, slot, hot, calm, is_hot, is_calm)
    if not frozen:
        if warming:
            phase = "warming"
        elif silent_slots >= policy.stale_after_slots:
            phase = "stale"
    if phase == state.phase:
        return AlertState(phase, state.since_slot, hot, calm)
    return AlertState(phase, slot, hot, calm)


def _next_phase(
    policy: AlertPolicy,
    state: AlertState,
    slot: int,
    hot: int,
    calm: int,
    is_hot: bool,
    is_calm: bool,
) -> State:
    enough = is_hot and hot.bit_count() >= policy.m
    match state.phase:
        case "firing":
            served = slot - state.since_slot >= policy.minimum_slots
            return "recovering" if served and is_calm else "firing"
        case "recovering":
            if is_hot:
                return "firing"
            return "ok" if is_calm and calm >= policy.recovery_slots else "recovering"
        case _:
            if enough:
                return "firing"
            return "pending" if is_hot or (state.phase == "pending" and hot) else "ok"
