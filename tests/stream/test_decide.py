"""The alert rule: every arrow of its diagram, and what must hold for any run of slots."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stream.decide import AlertPolicy, AlertState, step
from stream.records import State

# Two of three hot slots raise, two calm ones end, after three slots at the least.
POLICY = AlertPolicy(
    trigger=1.0, recovery=0.7, m=2, n=3, recovery_slots=2, minimum_slots=3, stale_after_slots=4
)
# One letter a slot: hot, in between, calm, silent, warming.
SCORES = {"H": 2.0, "m": 0.9, "c": 0.1, ".": None, "w": None}
LETTERS: dict[State, str] = {
    "ok": "o",
    "pending": "p",
    "firing": "F",
    "recovering": "r",
    "warming": "w",
    "stale": "s",
}


def run(slots: str, policy: AlertPolicy = POLICY, begin: AlertState | None = None) -> str:
    """Return the phase after each slot, one letter each."""
    return "".join(LETTERS[state.phase] for state in states(slots, policy, begin))


def states(
    slots: str, policy: AlertPolicy = POLICY, begin: AlertState | None = None
) -> list[AlertState]:
    state, silent, found = begin or AlertState("ok"), 0, []
    for number, letter in enumerate(slots):
        silent = silent + 1 if letter == "." else 0
        state = step(
            policy, state, number, SCORES[letter], warming=letter == "w", silent_slots=silent
        )
        found.append(state)
    return found


@pytest.mark.parametrize(
    ("slots", "phases", "why"),
    [
        ("cccc", "oooo", "nothing happens"),
        ("mmmm", "oooo", "between recovery and trigger nothing is raised"),
        ("H", "p", "ok --hot--> pending"),
        ("Hccc", "pppo", "pending --none hot in three--> ok"),
        ("HH", "pF", "pending --two of three--> firing"),
        ("HcH", "ppF", "they need not be neighbours"),
        ("HccH", "pppp", "but within three slots"),
        ("HHcccc", "pFFFro", "firing --calm, after its minimum time--> recovering"),
        ("HHHHcc", "pFFFro", "recovering --two calm--> ok, once the minimum time is over"),
        ("HHHHcH", "pFFFrF", "recovering --one hot--> firing"),
        ("HHHHcHcccc", "pFFFrFFFro", "which has its minimum time again"),
        ("HHHHcmcc", "pFFFrrro", "in between, recovering starts to count anew"),
        ("HHHHmmmm", "pFFFFFFF", "in between nothing ends: hysteresis"),
        ("HHHHcmmmH", "pFFFrrrrF", "nor is it quite over"),
        ("HHHHc...c", "pFFFrrrro", "silence does not end an alert, nor break the calm before it"),
        ("HHc...c", "pFFFFFr", "nor does it let one recover when the minimum time is over"),
        ("HHHH..H", "pFFFFFF", "a silent slot is not calm"),
        ("H..c", "pppo", "silence takes up slots of the three"),
        ("H.H", "ppF", "without being one that is not hot"),
        ("HHHHccHcc", "pFFFroppp", "after its end, one hot slot is pending"),
        ("....", "ooos", "silent for long: stale"),
        ("....c", "oooso", "stale ends with the first reading"),
        ("....H", "ooosp", "which may be hot"),
        ("....HH", "ooospF", "and the alert begins as always"),
        ("HHHH....", "pFFFFFFs", "a firing entity that falls silent is stale in the end"),
        ("HHHH....c", "pFFFFFFso", "and no longer firing when it is back calm"),
        ("wwww", "wwww", "warming"),
        ("wwc", "wwo", "warm"),
        ("wwHH", "wwpF", "warming counts towards nothing"),
    ],
)
def test_the_state_after_every_slot(slots: str, phases: str, why: str) -> None:
    assert run(slots) == phases, why


@pytest.mark.parametrize(
    ("m", "n", "slots", "phases"),
    [
        (1, 1, "HcHc", "FFFF"),
        (1, 3, "cH", "oF"),
        (3, 3, "HHcHHH", "pppppF"),
        (3, 5, "HcHcH", "ppppF"),
        (3, 5, "HcHccH", "pppppp"),
        (2, 70, "H" + "c" * 68 + "H", "p" * 69 + "F"),
        (2, 70, "H" + "c" * 69 + "H", "p" * 71),
    ],
)
def test_m_of_n(m: int, n: int, slots: str, phases: str) -> None:
    assert run(slots, replace(POLICY, m=m, n=n, minimum_slots=99)) == phases


@pytest.mark.parametrize(
    ("minimum", "phases"), [(0, "pFro"), (1, "pFro"), (2, "pFFr"), (9, "pFFF")]
)
def test_an_alert_lasts_its_minimum_time(minimum: int, phases: str) -> None:
    assert run("HHcc", replace(POLICY, minimum_slots=minimum)) == phases


def test_the_thresholds_themselves_are_neither_hot_nor_calm() -> None:
    firing = AlertState("firing", 0, hot=0b11)
    assert step(POLICY, firing, 9, POLICY.trigger).hot == 0b110
    assert step(POLICY, firing, 9, POLICY.recovery).phase == "firing"
    assert step(POLICY, firing, 9, POLICY.recovery - 1e-6).phase == "recovering"
    assert step(POLICY, AlertState("ok"), 9, POLICY.trigger + 1e-6).phase == "pending"


def test_since_is_the_slot_of_the_last_change() -> None:
    assert [state.since_slot for state in states("HHHHcc")] == [0, 1, 1, 1, 4, 5]


@pytest.mark.parametrize("phase", ["ok", "pending", "firing", "recovering", "warming", "stale"])
def test_frozen_remembers_slots_and_keeps_the_phase(phase: State) -> None:
    state = AlertState(phase, 3, 0, 0)
    for slot, score in enumerate([2.0, None, 0.1, 2.0, 0.1], start=4):
        state = step(POLICY, state, slot, score, frozen=True, warming=True, silent_slots=99)
    assert state == AlertState(phase, 3, hot=0b010, calm=1)


RUNS = st.text(alphabet="HHmcc..", max_size=60)
POLICIES = st.builds(
    lambda n, m, recovery, minimum, stale: AlertPolicy(
        m=min(m, n),
        n=n,
        recovery_slots=recovery,
        minimum_slots=minimum,
        stale_after_slots=stale,
    ),
    *(st.integers(1, 6) for _ in range(5)),
)


@given(slots=RUNS, policy=POLICIES)
@settings(max_examples=200, deadline=None)
def test_nothing_fires_with_fewer_than_m_hot_of_n(slots: str, policy: AlertPolicy) -> None:
    phases = run(slots, policy)
    for at, (before, after) in enumerate(zip("o" + phases, phases, strict=False)):
        if after == "F" and before not in "Fr":
            assert slots[at] == "H"
            assert slots[max(0, at - policy.n + 1) : at + 1].count("H") >= policy.m


@given(slots=RUNS, policy=POLICIES)
@settings(max_examples=200, deadline=None)
def test_enough_hot_slots_always_fire(slots: str, policy: AlertPolicy) -> None:
    phases = run(slots, policy)
    for at, letter in enumerate(slots):
        if letter == "H" and slots[max(0, at - policy.n + 1) : at + 1].count("H") >= policy.m:
            assert phases[at] == "F"


@given(slots=RUNS, policy=POLICIES)
@example("Hcc.", AlertPolicy(m=1, n=4, recovery_slots=1, minimum_slots=1))
@settings(max_examples=200, deadline=None)
def test_only_a_hot_slot_raises_and_silence_only_makes_stale(
    slots: str, policy: AlertPolicy
) -> None:
    phases = run(slots, policy)
    for before, after, letter in zip("o" + phases, phases, slots, strict=False):
        if letter == ".":
            assert after in {before, "s"} or (before, after) == ("p", "o")
        if after == "p" and before != "p":
            assert letter == "H"


@given(slots=RUNS, policy=POLICIES)
@settings(max_examples=200, deadline=None)
def test_an_alert_ends_with_enough_calm_slots_and_none_hot_between(
    slots: str, policy: AlertPolicy
) -> None:
    phases = run(slots, policy)
    for at, (before, after) in enumerate(zip("o" + phases, phases, strict=False)):
        if before in "Fr" and after == "o":
            spoken = slots[: at + 1].replace(".", "")
            assert spoken.endswith("c" * policy.recovery_slots)
        if before == "F" and after == "r":
            fired = at - len(phases[:at].rstrip("F"))
            assert fired >= policy.minimum_slots


@given(slots=RUNS, policy=POLICIES, stray=st.tuples(st.integers(0, 63), st.integers(0, 6)))
@example(
    "HHHHHHc..c",
    AlertPolicy(m=1, n=1, recovery_slots=3, minimum_slots=1, stale_after_slots=3),
    (0, 2),
)
@settings(max_examples=300, deadline=None)
def test_the_memory_of_a_running_alert_is_rebuilt_from_so_many_slots(
    slots: str, policy: AlertPolicy, stray: tuple[int, int]
) -> None:
    # After a restart the phase is restored, and the slots of the log are played again on top of
    # whatever the snapshot remembered.
    if not slots:
        return
    truth = states(slots, policy)[-1]
    if truth.phase not in {"firing", "recovering"}:
        return
    hot, calm = stray[0] & ((1 << policy.n) - 1), min(stray[1], policy.recovery_slots)
    state = truth._replace(hot=hot, calm=calm)
    for letter in slots[-policy.memory_slots :]:
        state = step(policy, state, 0, SCORES[letter], frozen=True)
    if len(slots) >= policy.memory_slots:
        assert state == truth
