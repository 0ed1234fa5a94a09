"""What happened, in words: for `tsdiff inspect`, alerts and web pages.

Pure: an `Event` in, sentences out. A channel's "usual error" is half the width of its 90 % band.

    disk_w and disk_wa on machine-1-6 have been up to 4.1 times their usual error above what the
    other 36 channels imply since 12:04 UTC; about one such stretch per 9 entity-weeks is expected
    by chance
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

Side = Literal["above", "below", "around"]

NAMED: Final = 3
"""Channels that are called by name; of more it is said how many."""
_BLAMED_SHARE = 0.8  # who has to be named so that so much of an anomaly is accounted for
_COUNTED = 100.0  # beyond so many usual errors another number says no more
_MILLENNIUM_YEARS = 1000.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNITS_MS: Final = {
    "second": 1_000,
    "minute": 60_000,
    "hour": 3_600_000,
    "day": 86_400_000,
    "week": 7 * 86_400_000,
    "year": 365.25 * 86_400_000,
}


@dataclass(frozen=True)
class Deviation:
    """One channel of an event, in the channel's own unit, at the slot where it was furthest off.

    `observed` is `None` (or NaN) where the channel sent nothing. `swings` says that it was off to
    both sides by turns, `still` that it did not move before, so that its error has no usual size.
    """

    channel: str
    observed: float | None
    expected: float
    lower: float
    upper: float
    contribution: float
    unit: str = ""
    swings: bool = False
    still: bool = False

    @property
    def heard(self) -> bool:
        """Whether it sent a reading."""
        return self.observed is not None and math.isfinite(self.observed)

    @property
    def half_width(self) -> float:
        """Half the width of the 90 % band: the usual error."""
        return (self.upper - self.lower) / 2

    @property
    def times(self) -> float:
        """Distance from the expected value in usual errors; 0 without a reading."""
        if self.observed is None or not self.heard:
            return 0.0
        distance = abs(self.observed - self.expected)
        if distance == 0:
            return 0.0
        return distance / self.half_width if self.half_width > 0 else math.inf

    @property
    def side(self) -> Side:
        """On which side of the expected value it was."""
        if self.swings:
            return "around"
        return "below" if self.observed is not None and self.observed < self.expected else "above"


@dataclass(frozen=True)
class Event:
    """An entity's consecutive slots from `start_ms` to before `end_ms`, and who was off in them.

    `deviations` are all channels or those that contribute most, in any order; `channels` is how
    many the entity has. `anomaly_score` and `p_value` are those of the rarest slot; from
    `threshold` on the event is unusual, and `slots_per_alarm` such slots make one alarm. `steps`
    says that times count periods, not from 1970. `latest` says that `deviations` and numbers are
    those of the last slot alone, as live: how far off the slots before it were is not known any
    more.
    """

    entity: str
    deviations: tuple[Deviation, ...]
    channels: int
    start_ms: int
    end_ms: int
    ongoing: bool
    period_ms: int
    anomaly_score: float
    p_value: float
    threshold: float = 1.0
    slots_per_alarm: float = 1.0
    steps: bool = False
    latest: bool = False

    @property
    def slots(self) -> int:
        """How long it is."""
        return max(1, (self.end_ms - self.start_ms) // self.period_ms)


# -- sentences ---------------------------------------------------------------------------------


def headline(event: Event) -> str:
    """Say in one sentence who is off, how far, since when, and how rare that is; no full stop."""
    return _what_happened(event, dated=False)


def paragraph(event: Event) -> str:
    """Say what `headline` says, with the date, and what the channels read and should have read."""
    first = f"{_what_happened(event, dated=True)}."
    # Only words of ours are given a capital: names stay as they are.
    ours = first.startswith(("nothing unusual", "the channels of"))
    sentences = [first[0].upper() + first[1:] if ours else first]
    heard = [d for d in event.deviations if d.heard]
    if event.anomaly_score >= event.threshold:
        sentences += [_reading(deviation, event) for deviation in blamed(heard)[:NAMED]]
    silent = [d.channel for d in event.deviations if not d.heard]
    if heard and silent:
        have = "has" if len(silent) == 1 else "have"
        sent = f"{have} sent" if event.ongoing else "sent"
        slot = "in that slot" if event.slots == 1 else "in that time"
        sentences.append(f"{names_text(silent)} {sent} nothing {slot}.")
    return " ".join(sentences)


def blamed(deviations: Sequence[Deviation]) -> tuple[Deviation, ...]:
    """Pick the channels that account for most of an anomaly, the guiltiest first.

    Those within their band are not blamed, unless all are: then the guiltiest one is.
    """
    ranked = sorted((d for d in deviations if d.heard), key=lambda d: -d.contribution)
    chosen: list[Deviation] = []
    share = 0.0
    for deviation in ranked:
        if share >= _BLAMED_SHARE:
            break
        share += deviation.contribution
        if deviation.times > 1:
            chosen.append(deviation)
    return tuple(chosen or ranked[:1])


def _what_happened(event: Event, *, dated: bool) -> str:
    guilty = blamed(event.deviations)
    when = _when(event, dated=dated)
    if not guilty:
        return f"{event.entity} {'has sent' if event.ongoing else 'sent'} nothing {when}"
    if event.anomaly_score < event.threshold:
        score = f"the anomaly score is {event.anomaly_score:.2f}, the threshold {event.threshold:g}"
        what = f"nothing unusual on {event.entity} {when}: {score}"
    elif guilty[0].times <= 1:
        are = "are" if event.ongoing else "were"
        what = (
            f"the channels of {event.entity} {are} unusual together {when}, though none is outside "
            f"its 90 % band by itself; {guilty[0].channel} contributes most"
        )
    else:
        what = f"{_who_is_off(guilty, event)}{', unusual' if event.latest else ''} {when}"
    return f"{what}; {rarity(event.p_value / event.slots_per_alarm, event.period_ms)}"


def _who_is_off(guilty: Sequence[Deviation], event: Event) -> str:
    many = len(guilty) > 1
    be = ("have been" if many else "has been") if event.ongoing else ("were" if many else "was")
    if event.latest:
        be = "are" if many else "is"
    sides = {deviation.side for deviation in guilty}
    mixed = len(sides) > 1
    names = [_with_side(d) if mixed else d.channel for d in guilty]
    still = ", usually constant," if all(d.still for d in guilty) else ""
    where = "away from" if mixed or sides == {"around"} else sides.pop()
    around = "" if mixed or guilty[0].side != "around" else ", now above and now below,"
    implied = _implied(event.channels - len(guilty), many=many, ongoing=event.ongoing)
    return (
        f"{names_text(names)} on {event.entity}{still} {be} {_distance(guilty, event)}"
        f"{where} {implied}{around}"
    )


def _with_side(deviation: Deviation) -> str:
    words = {"above": "above", "below": "below", "around": "both ways"}
    return f"{deviation.channel} ({words[deviation.side]})"


def _distance(guilty: Sequence[Deviation], event: Event) -> str:
    """Say how many usual errors, with a blank behind; nothing where an error is not usual."""
    moving = [deviation.times for deviation in guilty if not deviation.still]
    if not moving:
        return ""
    most = "up to " if len(guilty) > 1 or (event.slots > 1 and not event.latest) else ""
    if max(moving) > _COUNTED:
        most = ""
    whose = "their" if len(guilty) > 1 else "its"
    return f"{most}{times_text(max(moving))} {whose} usual error "


def _implied(others: int, *, many: bool, ongoing: bool) -> str:
    if others <= 0:
        own = "their own past" if many else "its own past"
        return f"what {own} {'implies' if ongoing else 'implied'}"
    if others == 1:
        return f"what the other channel {'implies' if ongoing else 'implied'}"
    return f"what the other {others} channels {'imply' if ongoing else 'implied'}"


def _reading(deviation: Deviation, event: Event) -> str:
    """Say what a channel read and what was expected of it."""
    observed = deviation.observed if deviation.observed is not None else math.nan
    furthest = " at its furthest" if event.slots > 1 else ""
    numbers = (observed, deviation.expected, deviation.lower, deviation.upper)
    read, expected, lower, upper = numbers_text(numbers, deviation.half_width)
    unit = f" {deviation.unit}" if deviation.unit else ""
    if deviation.still:
        return (
            f"{deviation.channel}, which did not move before, read {read}{unit}{furthest}, where "
            f"{expected}{unit} was expected."
        )
    return (
        f"{deviation.channel} read {read}{unit}{furthest}, where {expected}{unit} was expected "
        f"(90 % band {lower} to {upper}{unit})."
    )


def names_text(names: Sequence[str]) -> str:
    """Return `a, b and c`; of more than four only their number, and never "1 more" for a name."""
    words = list(names)
    if len(words) > NAMED + 1:
        words = [*words[:NAMED], f"{len(words) - NAMED} more channels"]
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


# -- numbers -----------------------------------------------------------------------------------


def times_text(times: float) -> str:
    """Return `4.1 times`, `12 times` or `over 100 times`."""
    if times > _COUNTED:
        return f"over {_COUNTED:.0f} times"
    return f"{times:.1f} times" if times < 9.95 else f"{times:.0f} times"


def rarity(p_value: float, period_ms: int) -> str:
    """Say how often chance alone brings what begins in one of `1 / p_value` slots."""
    span_ms = period_ms / p_value if p_value > 0 else math.inf
    if span_ms >= _MILLENNIUM_YEARS * _UNITS_MS["year"]:
        return "less than one such stretch in a thousand entity-years is expected by chance"
    count, unit = _in_largest_unit(span_ms)
    per = f"entity-{unit}" if count == 1 else f"{count:,} entity-{unit}s"
    return f"about one such stretch per {per} is expected by chance"


def _in_largest_unit(span_ms: float) -> tuple[int, str]:
    """Return two figures of a span, in the largest unit of which it holds two."""
    unit = "second"
    for name, size in _UNITS_MS.items():
        if span_ms >= 1.95 * size:
            unit = name
    count = span_ms / _UNITS_MS[unit]
    figures = max(0, math.floor(math.log10(max(count, 1))) - 1)
    return max(1, round(count / 10**figures) * 10**figures), unit


def duration_text(duration_ms: int) -> str:
    """Return a duration in its two largest units: `27 minutes`, `1 hour 5 minutes`."""
    words = []
    left = duration_ms
    for unit in ("day", "hour", "minute", "second"):
        size = int(_UNITS_MS[unit])
        count, left = divmod(left, size)
        if count:
            words.append(f"{count} {unit}{'' if count == 1 else 's'}")
        elif words:
            break
        if len(words) == 2:
            break
    return " ".join(words) or f"{duration_ms} ms"


def numbers_text(numbers: Sequence[float], resolution: float) -> tuple[str, ...]:
    """Write numbers of one channel alike, fine enough to tell apart what is `resolution` apart."""
    if not math.isfinite(resolution) or resolution <= 0:
        resolution = max((abs(x) for x in numbers if math.isfinite(x)), default=1.0) / 100
    decimals = 1 - math.floor(math.log10(max(resolution, 1e-300)))
    return tuple(_number(number, decimals) for number in numbers)


def _number(number: float, decimals: int) -> str:
    if not 1e-6 <= abs(number) < 1e12 and number != 0:
        return f"{number:.3g}"
    text = f"{round(number, min(decimals, 9)):,.{min(max(decimals, 0), 9)}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


# -- times -------------------------------------------------------------------------------------


def moment_text(timestamp_ms: int, *, dated: bool = True) -> str:
    """Return a moment in UTC, without saying so: `2026-11-23 12:04` or `12:04`."""
    moment = _EPOCH + timedelta(milliseconds=timestamp_ms)
    form = "%H:%M:%S" if timestamp_ms % 60_000 else "%H:%M"
    return moment.strftime(f"%Y-%m-%d {form}" if dated else form)


def _when(event: Event, *, dated: bool) -> str:
    last_ms = event.end_ms - event.period_ms
    if event.steps:
        first, last = event.start_ms // event.period_ms, last_ms // event.period_ms
        if event.ongoing:
            return f"since step {first}"
        if event.slots == 1:
            return f"at step {first}"
        return f"from step {first} to {last}, for {duration_text(event.end_ms - event.start_ms)}"
    # Without its date a time is today's; the newest slot is as near to today as is known.
    same_day = event.start_ms // _UNITS_MS["day"] == last_ms // _UNITS_MS["day"]
    start = moment_text(event.start_ms, dated=dated or not same_day)
    if event.ongoing:
        return f"since {start} UTC"
    if event.slots == 1:
        return f"at {start} UTC"
    end = moment_text(event.end_ms, dated=not same_day)
    return f"from {start} to {end} UTC, for {duration_text(event.end_ms - event.start_ms)}"
