"""Channels that die or get stuck are told within a bounded time, and so is their recovery.

slot    0  1  2  3  4  5  6  7  8  9
a       7  8  7  -  -  -  -  -  8  7     `-`: no reading, while b goes on
told                      dead    ok     two slots of gap in training and a patience of 2
"""

from collections.abc import Sequence

import numpy as np

from stream.buffer import PartitionBuffer
from stream.scoring import Verdicts, score_rounds
from tests.stream.fakes import SCORING, FakeScorer, Reading, batch, grid

LIMIT = 2 * 1 + 2  # twice the longest run in training, and stale_after_slots


def run(channel: Sequence[float | None], entity: str = "a", longest: int = 1) -> Verdicts:
    """Score slots 0, 1, ...; the other channel never repeats itself."""
    scorer = FakeScorer(longest=longest)
    buffer = PartitionBuffer(grid(lateness_ms=0), scorer)
    log: list[Reading] = [
        (entity, 10 * slot, value, 0.01 * slot) for slot, value in enumerate([*channel, 0.5])
    ]
    return score_rounds([(buffer, buffer.advance(batch(log)))], scorer, SCORING)


def told(verdicts: Verdicts) -> list[str | None]:
    return [score.faulty.get("a") for score in verdicts.scores]


def test_a_channel_without_readings_is_dead_until_it_has_one() -> None:
    verdicts = run([0.1, 0.2, 0.3, None, None, None, None, None, 0.4, 0.5])
    assert told(verdicts) == [None] * (3 + LIMIT - 1) + ["dead", "dead", None, None]
    assert [(a.timestamp_ms // 10, a.state, dict(a.faulty)) for a in verdicts.alerts] == [
        (6, "ok", {"a": "dead"}),
        (8, "ok", {}),
    ]


def test_a_channel_that_stands_still_is_stuck_until_it_moves() -> None:
    verdicts = run([0.1, 0.2, 0.3, 0.3, 0.3, None, 0.3, 0.3, 0.4, 0.5])
    assert told(verdicts) == [None] * 6 + ["stuck", "stuck", None, None]


def test_stuck_and_then_dead() -> None:
    verdicts = run([0.1, 0.3, 0.3, 0.3, 0.3, *[None] * 5])
    assert told(verdicts)[4:] == ["stuck"] * 4 + ["dead"] * 2
    assert [dict(a.faulty) for a in verdicts.alerts] == [{"a": "stuck"}, {"a": "dead"}]


def test_what_training_saw_is_no_fault() -> None:
    assert told(run([0.1, 0.2, *[0.3] * 9], longest=9)) == [None] * 11
    assert told(run([0.1, 0.2, *[None] * 9], longest=9)) == [None] * 11


def test_nothing_is_told_while_an_entity_warms_up() -> None:
    verdicts = run([0.3] * 8, entity="new")
    assert [s.state for s in verdicts.scores[:5]] == ["warming"] * 5
    assert told(verdicts) == [None] * 5 + ["stuck"] * 3


def test_a_silent_entity_is_stale_and_its_channels_are_as_they_were() -> None:
    scorer = FakeScorer(longest=1)
    buffer = PartitionBuffer(grid(lateness_ms=0), scorer)
    log: list[Reading] = [("a", 10 * slot, 0.1 * slot, 0.2 * slot) for slot in range(4)]
    log += [("b", 10 * slot, 0.1 * slot, 0.2 * slot) for slot in range(4, 12)]
    verdicts = score_rounds([(buffer, buffer.advance(batch(log)))], scorer, SCORING)
    silent = [score for score in verdicts.scores if score.entity == "a"][4:]
    assert {score.state for score in silent[1:]} == {"stale"}
    assert not any(score.faulty for score in silent)


def test_an_alert_of_a_fault_shows_all_channels() -> None:
    verdicts = run([0.1, 0.2, *[0.3] * 6])
    (alert,) = verdicts.alerts
    assert set(alert.channels) == {"a", "b"}
    assert alert.previous == alert.state == "ok"
    assert np.isclose(alert.channels["a"].observed or 0, 0.3)
