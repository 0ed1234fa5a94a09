"""What alerts say, word by word, and that it is said by the loop."""

from dataclasses import replace
from pathlib import Path

import pytest

from stream.backfill import backfill
from stream.compose import load_model
from stream.config import load_config
from stream.decide import AlertPolicy
from stream.records import ChannelScore, ChannelState, SlotScore, State
from stream.words import Change, Terms, present, summary
from tests.stream.conftest import SmallBundle
from tests.stream.test_faulty import run

MINUTE = 60_000
NOON = 1_795_435_200_000  # 2026-11-23 12:00 UTC
NINE_WEEKS = 8 / (9 * 7 * 24 * 60)  # slots, of which eight make one stretch
TERMS = Terms(38, MINUTE, AlertPolicy(), slots_per_alarm=8.0)
RARE = "about one such stretch per 9 entity-weeks is expected by chance"


def cell(off: float | None, share: float) -> ChannelScore:
    """A channel `off` half widths from the 10.0 that were expected; None = no reading."""
    return ChannelScore(None if off is None else 10.0 + off, 10.0, 9.0, 11.0, share)


def slot(state: State, number: float | None = 1.4, **faulty: ChannelState) -> SlotScore:
    return SlotScore(
        entity="machine-1-6",
        timestamp_ms=NOON + 5 * MINUTE,
        anomaly_score=number,
        p_value=None if number is None else NINE_WEEKS,
        state=state,
        imputed_ratio=0.0,
        model="m@0",
        channels={"disk_w": cell(4.1, 0.5), "disk_wa": cell(3.0, 0.4), "cpu": cell(0.5, 0.1)},
        faulty=faulty,
    )


def said(score: SlotScore, previous: State, minutes: int = 1, **before: ChannelState) -> str:
    """Say what changed, from a state that had begun so many minutes before the slot."""
    since_ms = score.timestamp_ms - minutes * MINUTE
    return summary(Change(score, previous, since_ms, before), TERMS)


OFF = (
    "disk_w and disk_wa on machine-1-6 are up to 4.1 times their usual error above what the other "
    "36 channels imply, unusual since"
)


def test_an_alert_says_who_is_off_since_when_and_how_rare_that_is() -> None:
    assert said(slot("firing"), "pending") == f"{OFF} 12:04 UTC; {RARE}"
    # What was calm, silent or warming up before is no part of it.
    for before in ("ok", "recovering", "stale", "warming"):
        assert said(slot("pending"), before, 300) == f"{OFF} 12:05 UTC; {RARE}"


@pytest.mark.parametrize(
    ("state", "previous", "words"),
    [
        (
            "recovering",
            "firing",
            "machine-1-6 is calm again after 25 minutes: the anomaly score is 0.31, the threshold "
            "1",
        ),
        ("ok", "recovering", "machine-1-6 has stayed calm since 11:40 UTC: the alert is over"),
        ("ok", "pending", "machine-1-6 is calm again after 25 minutes, before it was an alert"),
        ("ok", "stale", "machine-1-6 sends readings again, after 25 minutes as stale"),
        ("ok", "warming", "machine-1-6 has warmed up"),
        ("stale", "firing", "machine-1-6 has sent no readings for 5 minutes or longer"),
        (
            "warming",
            "ok",
            "machine-1-6 is warming up, and has no scores until its window is full",
        ),
    ],
)
def test_every_other_change_has_its_sentence(state: State, previous: State, words: str) -> None:
    assert said(slot(state, 0.31), previous, 25) == words


def test_a_calm_that_began_on_another_day_has_its_date() -> None:
    assert "since 2026-11-22 23:05 UTC" in said(slot("ok", 0.3), "recovering", 13 * 60)


def test_channels_that_break_and_those_that_are_mended() -> None:
    dead = "disk_w on machine-1-6 is dead: without readings for far longer than ever in training"
    assert said(slot("ok", 0.3, disk_w="dead"), "ok") == dead
    assert said(slot("ok", 0.3, disk_w="stuck"), "ok", disk_w="dead") == (
        "disk_w on machine-1-6 is stuck at 14.1: without a change for far longer than ever in "
        "training"
    )
    two = said(slot("ok", 0.3, disk_w="stuck", cpu="stuck"), "ok")
    assert two.startswith("disk_w and cpu on machine-1-6 are stuck: without a change")
    assert said(slot("ok", 0.3), "ok", cpu="dead") == "cpu on machine-1-6 sends readings again"
    assert said(slot("ok", 0.3), "ok", a="stuck", b="stuck") == "a and b on machine-1-6 move again"


def test_a_slot_may_say_several_things() -> None:
    both = said(slot("firing", cpu="dead"), "pending", disk_w="stuck")
    assert both.startswith(f"{OFF} 12:04 UTC; {RARE}. cpu on machine-1-6 is dead:")
    assert both.endswith(". disk_w on machine-1-6 moves again")
    # While it warms up, nobody can tell whether a channel works.
    assert "again" not in said(slot("warming", None), "ok", cpu="dead")


def test_how_an_entity_is_now() -> None:
    def now(score: SlotScore, minutes: int = 3) -> str:
        since_ms = score.timestamp_ms - minutes * MINUTE
        return present(score, since_ms, TERMS)

    assert now(slot("firing")) == f"{OFF} 12:02 UTC; {RARE}"
    assert now(slot("ok", 0.3)).startswith(
        "nothing unusual on machine-1-6 at 12:05 UTC: the anomaly score is 0.30, the threshold 1;"
    )
    assert now(slot("ok", 0.3, cpu="dead")) == (
        "cpu on machine-1-6 is dead: without readings for far longer than ever in training. All "
        "else is as usual: the anomaly score is 0.30, the threshold 1"
    )
    assert now(slot("firing", cpu="dead")).endswith("for far longer than ever in training")
    assert "was up to" in now(slot("ok", 1.4)) or "were up to" in now(slot("ok", 1.4))
    assert now(slot("stale")) == "machine-1-6 has sent no readings for 5 minutes or longer"
    assert now(slot("ok", None)) == "nothing can be said about machine-1-6 at 12:05 UTC"
    silent = replace(slot("firing"), channels={"cpu": cell(None, 1.0)})
    assert now(silent).startswith("machine-1-6 has sent nothing since 12:02 UTC")


def test_the_loop_says_it_of_faulty_channels() -> None:
    (alert,) = run([0.1, 0.2, *[0.3] * 6]).alerts
    assert alert.summary == (
        "a on a is stuck at 0.3: without a change for far longer than ever in training"
    )


def test_a_backfill_of_a_real_model_says_it_of_every_change(
    small_bundle: SmallBundle, tmp_path: Path
) -> None:
    model = load_model(small_bundle.path)
    settings = load_config(None, {"model.path": "b", "input.topic": "t"})
    told = backfill(small_bundle.live, model, settings, tmp_path / "scores.parquet")
    assert {a.state for a in told.alerts} >= {"pending", "firing", "recovering", "ok"}
    # The words are those of a few figures, and so do not depend on how slots share a call.
    live = load_model(small_bundle.path, ((8, 1),))
    again = backfill(small_bundle.live, live, settings, tmp_path / "again.parquet")
    assert {(a.entity, a.timestamp_ms): a.summary for a in again.alerts} == {
        (a.entity, a.timestamp_ms): a.summary for a in told.alerts
    }
    for alert in told.alerts:
        assert alert.entity in alert.summary
        if alert.state == "firing" != alert.previous:
            assert "usual error" in alert.summary or "unusual together" in alert.summary
            assert "is expected by chance" in alert.summary
        if (alert.previous, alert.state) == ("firing", "recovering"):
            assert f"{alert.entity} is calm again after " in alert.summary
