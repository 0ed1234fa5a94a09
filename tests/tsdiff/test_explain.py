"""The sentences, word by word: who, how far, since when, how rare."""

import math
from dataclasses import replace
from typing import Any

import pytest

from tsdiff.explain import (
    Deviation,
    Event,
    blamed,
    duration_text,
    headline,
    moment_text,
    numbers_text,
    paragraph,
    rarity,
    times_text,
)

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
NOON = 1_795_435_200_000  # 2026-11-23 12:00 UTC
WEEK_IN_MINUTES = 7 * 24 * 60


def channel(name: str, off: float, share: float, **changes: Any) -> Deviation:  # noqa: ANN401
    """A channel that was `off` half widths from the 10.0 that were expected, band 9 to 11."""
    return replace(Deviation(name, 10.0 + off, 10.0, 9.0, 11.0, share), **changes)


def event(*deviations: Deviation, **changes: Any) -> Event:  # noqa: ANN401
    """Twenty-seven minutes from 12:04 on, as rare as once in nine weeks."""
    usual = Event(
        entity="machine-1-6",
        deviations=deviations,
        channels=38,
        start_ms=NOON + 4 * MINUTE,
        end_ms=NOON + 31 * MINUTE,
        ongoing=True,
        period_ms=MINUTE,
        anomaly_score=1.4,
        p_value=1 / (9 * WEEK_IN_MINUTES),
    )
    return replace(usual, **changes)


RARE = "; about one such stretch per 9 entity-weeks is expected by chance"
SINCE = "since 12:04 UTC"


# -- who, how far, since when ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deviations", "said"),
    [
        (
            [channel("disk_w", 4.1, 0.9)],
            "disk_w on machine-1-6 has been up to 4.1 times its usual error above what the other "
            "37 channels imply",
        ),
        (
            [channel("disk_w", 4.1, 0.5), channel("disk_wa", 3.0, 0.4), channel("cpu", 0.5, 0.1)],
            "disk_w and disk_wa on machine-1-6 have been up to 4.1 times their usual error above "
            "what the other 36 channels imply",
        ),
        (
            [channel("disk_w", -4.1, 0.5), channel("disk_wa", -30.4, 0.4)],
            "disk_w and disk_wa on machine-1-6 have been up to 30 times their usual error below "
            "what the other 36 channels imply",
        ),
        (
            [channel("disk_w", 4.1, 0.5), channel("disk_wa", -3.0, 0.4)],
            "disk_w (above) and disk_wa (below) on machine-1-6 have been up to 4.1 times their "
            "usual error away from what the other 36 channels imply",
        ),
        (
            [channel("disk_w", 4.1, 0.9, swings=True)],
            "disk_w on machine-1-6 has been up to 4.1 times its usual error away from what the "
            "other 37 channels imply, now above and now below,",
        ),
        (
            [channel("disk_w", 4.1, 0.5, swings=True), channel("disk_wa", -3.0, 0.4)],
            "disk_w (both ways) and disk_wa (below) on machine-1-6 have been up to 4.1 times "
            "their usual error away from what the other 36 channels imply",
        ),
        (
            [channel("disk_w", 400.0, 0.9)],
            "disk_w on machine-1-6 has been over 100 times its usual error above what the other "
            "37 channels imply",
        ),
        (
            [channel("in_errs", 5.0, 0.9, still=True)],
            "in_errs on machine-1-6, usually constant, has been above what the other 37 channels "
            "imply",
        ),
        (
            [channel("in_errs", 5e9, 0.5, still=True), channel("cpu", 2.0, 0.5)],
            "in_errs and cpu on machine-1-6 have been up to 2.0 times their usual error above "
            "what the other 36 channels imply",
        ),
    ],
)
def test_who_and_how_far(deviations: list[Deviation], said: str) -> None:
    assert headline(event(*deviations)) == f"{said} {SINCE}{RARE}"


def test_names_are_three_or_four_and_then_a_number() -> None:
    four = [channel(name, 5.0, 0.2) for name in "abcd"]
    assert headline(event(*four)).startswith("a, b, c and d on machine-1-6 have been")
    many = [channel(f"c{i}", 5.0, 0.8 / 12) for i in range(12)]
    said = headline(event(*many))
    assert said.startswith("c0, c1, c2 and 9 more channels on machine-1-6 have been")
    assert "the other 26 channels imply" in said


@pytest.mark.parametrize(
    ("channels", "said"),
    [(3, "the other 2 channels imply"), (2, "the other channel implies"), (1, "its own past")],
)
def test_few_channels(channels: int, said: str) -> None:
    assert said in headline(event(channel("a", 5.0, 1.0), channels=channels))


def test_all_channels_are_off() -> None:
    both = [channel("a", 5.0, 0.5), channel("b", 5.0, 0.5)]
    assert "above what their own past implies since" in headline(event(*both, channels=2))


def test_what_is_over_is_told_in_the_past() -> None:
    one = channel("a", 5.0, 0.9)
    said = headline(event(one, ongoing=False))
    assert "a on machine-1-6 was up to 5.0 times" in said
    assert "channels implied from 12:04 to 12:31 UTC, for 27 minutes;" in said
    two = headline(event(one, channel("b", 5.0, 0.9, contribution=0.1), ongoing=False))
    assert "was" in two  # b is not needed to explain it
    assert " were " in headline(event(channel("a", 5, 0.5), channel("b", 5, 0.5), ongoing=False))


def test_of_the_latest_slot_alone_nothing_is_said_about_those_before() -> None:
    one = headline(event(channel("a", 5.0, 0.9), latest=True))
    assert one.startswith(
        "a on machine-1-6 is 5.0 times its usual error above what the other 37 channels imply, "
        "unusual since 12:04 UTC; about"
    )
    two = headline(event(channel("a", 5.0, 0.5), channel("b", -3.0, 0.5), latest=True))
    assert two.startswith(
        "a (above) and b (below) on machine-1-6 are up to 5.0 times their usual error away from "
        "what the other 36 channels imply, unusual since 12:04 UTC; about"
    )


def test_one_slot_has_no_up_to_and_no_duration() -> None:
    said = headline(event(channel("a", 5.0, 0.9), ongoing=False, end_ms=NOON + 5 * MINUTE))
    assert "was 5.0 times its usual error above" in said
    assert "implied at 12:04 UTC;" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start_ms": NOON - 2 * DAY}, "since 2026-11-21 12:00 UTC"),
        (
            {"start_ms": NOON - 13 * HOUR, "ongoing": False},
            "from 2026-11-22 23:00 to 2026-11-23 12:31 UTC, for 13 hours 31 minutes",
        ),
        (
            {"start_ms": NOON + 1000, "end_ms": NOON + 3000, "period_ms": 1000, "ongoing": False},
            "from 12:00:01 to 12:00:03 UTC, for 2 seconds",
        ),
        ({"end_ms": NOON + 12 * HOUR, "ongoing": False}, "from 12:04 to 00:00 UTC, for 11 hours"),
        ({"steps": True, "start_ms": 0, "end_ms": 9 * MINUTE}, "since step 0"),
        (
            {"steps": True, "start_ms": 5 * MINUTE, "end_ms": 9 * MINUTE, "ongoing": False},
            "from step 5 to 8, for 4 minutes",
        ),
        (
            {"steps": True, "start_ms": 5 * MINUTE, "end_ms": 6 * MINUTE, "ongoing": False},
            "at step 5;",
        ),
    ],
)
def test_when(changes: dict[str, Any], said: str) -> None:
    assert said in headline(event(channel("a", 5.0, 0.9), **changes))


def test_the_paragraph_has_the_date_and_the_numbers() -> None:
    guilty = [
        channel("disk_w", 4.1, 0.5, unit="MB/s"),
        channel("in_errs", 4.0, 0.3, still=True),
        channel("mem", 0.0, 0.0, observed=None),
        channel("cpu", 0.2, 0.2),
    ]
    assert paragraph(event(*guilty)) == (
        "disk_w and in_errs on machine-1-6 have been up to 4.1 times their usual error above what "
        f"the other 36 channels imply since 2026-11-23 12:04 UTC{RARE}. disk_w read 14.1 MB/s at "
        "its furthest, where 10 MB/s was expected (90 % band 9 to 11 MB/s). in_errs, which did not "
        "move before, read 14 at its furthest, where 10 was expected. mem has sent nothing in that "
        "time."
    )


def test_at_most_three_channels_have_their_numbers_told() -> None:
    many = [channel(f"c{i}", 5.0, 0.1) for i in range(8)]
    assert paragraph(event(*many)).count(" was expected") == 3


def test_several_silent_channels() -> None:
    silent = [channel(f"s{i}", 0.0, 0.0, observed=None) for i in range(6)]
    said = paragraph(event(channel("a", 5.0, 1.0), *silent, ongoing=False))
    assert said.endswith(" s0, s1, s2 and 3 more channels sent nothing in that time.")


def test_nothing_at_all_came() -> None:
    silent = [channel("a", 0.0, 0.0, observed=None), channel("b", 0.0, 0.0, observed=math.nan)]
    assert headline(event(silent[0])) == f"machine-1-6 has sent nothing {SINCE}"
    assert paragraph(event(*silent, anomaly_score=0.0, ongoing=False, p_value=1.0)) == (
        "machine-1-6 sent nothing from 2026-11-23 12:04 to 12:31 UTC, for 27 minutes."
    )
    assert headline(event()) == f"machine-1-6 has sent nothing {SINCE}"


def test_nothing_unusual() -> None:
    calm = event(
        channel("a", 0.8, 0.9),
        channel("b", 0.0, 0.0, observed=None),
        anomaly_score=0.314,
        p_value=0.025,
        ongoing=False,
        end_ms=NOON + 5 * MINUTE,
    )
    what = "nothing unusual on machine-1-6 at 12:04 UTC: the anomaly score is 0.31, the threshold 1"
    rare = "about one such stretch per 40 entity-minutes is expected by chance"
    assert headline(calm) == f"{what}; {rare}"
    said = paragraph(calm)
    assert said.startswith("Nothing unusual on machine-1-6 at 2026-11-23 12:04 UTC")
    assert said.endswith("b sent nothing in that slot.")
    assert headline(replace(calm, threshold=0.3)).startswith("the channels of machine-1-6")


def test_unusual_together_though_each_is_in_its_band() -> None:
    said = paragraph(event(channel("a", 0.8, 0.6), channel("b", -0.7, 0.4)))
    assert said.startswith(
        "The channels of machine-1-6 are unusual together since 2026-11-23 12:04 UTC, though none "
        "is outside its 90 % band by itself; a contributes most; about one such stretch"
    )


# -- who is blamed -----------------------------------------------------------------------------


def test_blamed_are_those_who_account_for_most_of_it() -> None:
    shares = {"a": 0.05, "b": 0.5, "c": 0.35, "d": 0.1}
    names = [d.channel for d in blamed([channel(n, 3.0, share) for n, share in shares.items()])]
    assert names == ["b", "c"]


def test_nobody_in_its_band_is_blamed_unless_all_are() -> None:
    inside, outside = channel("a", 0.9, 0.6), channel("b", 2.0, 0.4)
    assert blamed([inside, outside]) == (outside,)
    assert blamed([inside, channel("b", 0.5, 0.4)]) == (inside,)
    assert blamed([]) == ()


@pytest.mark.parametrize(
    ("observed", "times", "side"),
    [(14.0, 4.0, "above"), (7.0, 3.0, "below"), (10.0, 0.0, "above"), (None, 0.0, "above")],
)
def test_how_far_and_where(observed: float | None, times: float, side: str) -> None:
    deviation = Deviation("a", observed, 10.0, 9.0, 11.0, 1.0)
    assert (deviation.times, deviation.side) == (times, side)


def test_a_band_of_no_width() -> None:
    flat = Deviation("a", 3.0, 0.0, 0.0, 0.0, 1.0)
    assert flat.times == math.inf
    assert "a on machine-1-6 has been over 100 times its usual error" in headline(event(flat))
    assert "a read 3 at its furthest, where 0 was expected" in paragraph(event(flat))
    assert Deviation("a", 0.0, 0.0, 0.0, 0.0, 1.0).times == 0.0


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "period_ms", "said"),
    [
        (1, MINUTE, "about one such stretch per 60 entity-seconds"),
        (1, 1000, "about one such stretch per entity-second"),
        (2, MINUTE, "about one such stretch per 2 entity-minutes"),
        (118.7, MINUTE, "about one such stretch per 2 entity-hours"),
        (119, 1000, "about one such stretch per 2 entity-minutes"),
        (40, MINUTE, "about one such stretch per 40 entity-minutes"),
        (47 * 60, MINUTE, "about one such stretch per 2 entity-days"),
        (WEEK_IN_MINUTES, MINUTE, "about one such stretch per 7 entity-days"),
        (9 * WEEK_IN_MINUTES, MINUTE, "about one such stretch per 9 entity-weeks"),
        (3 * WEEK_IN_MINUTES, 60 * MINUTE, "about one such stretch per 3 entity-years"),
        (523 * 365.25 * 1440, MINUTE, "about one such stretch per 520 entity-years"),
        (1000 * 365.25 * 1440, MINUTE, "less than one such stretch in a thousand entity-years"),
        (1e30, MINUTE, "less than one such stretch in a thousand entity-years"),
        (math.inf, MINUTE, "less than one such stretch in a thousand entity-years"),
    ],
)
def test_rarity(span: float, period_ms: int, said: str) -> None:
    assert rarity(1 / span, period_ms) == f"{said} is expected by chance"


@pytest.mark.parametrize(
    ("duration_ms", "said"),
    [
        (MINUTE, "1 minute"),
        (27 * MINUTE, "27 minutes"),
        (65 * MINUTE, "1 hour 5 minutes"),
        (HOUR + 30_000, "1 hour"),
        (2 * DAY + 3 * HOUR + 4 * MINUTE, "2 days 3 hours"),
        (45_000, "45 seconds"),
        (90_000, "1 minute 30 seconds"),
        (500, "500 ms"),
    ],
)
def test_duration(duration_ms: int, said: str) -> None:
    assert duration_text(duration_ms) == said


@pytest.mark.parametrize(
    ("numbers", "resolution", "said"),
    [
        ((0.41234, 0.12), 0.02, ("0.412", "0.12")),
        ((65_812_345.0, 65_812_301.0), 30.0, ("65,812,345", "65,812,301")),
        ((5_023_456.0, 4_900_000.0), 200_000.0, ("5,020,000", "4,900,000")),
        ((-0.001, 0.0), 0.5, ("0", "0")),
        ((1e30, 3e-9), 0.5, ("1e+30", "3e-09")),
        ((250.0, 100.0), 0.0, ("250", "100")),
        ((0.0, 0.0), 0.0, ("0", "0")),
        ((math.nan, 1.0), 0.5, ("nan", "1")),
        ((90.0, 9.0), 1.0, ("90", "9")),
    ],
)
def test_numbers(numbers: tuple[float, ...], resolution: float, said: tuple[str, ...]) -> None:
    assert numbers_text(numbers, resolution) == said


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (1.04, "1.0 times"),
        (9.94, "9.9 times"),
        (9.96, "10 times"),
        (100.0, "100 times"),
        (math.inf, "over 100 times"),
    ],
)
def test_times(times: float, said: str) -> None:
    assert times_text(times) == said


def test_moments() -> None:
    assert moment_text(NOON) == "2026-11-23 12:00"
    assert moment_text(NOON + 1500, dated=False) == "12:00:01"
