"""A score as Prometheus series: the one way, for /metrics, for OpenMetrics and for remote write."""

import heapq
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Self

from stream.records import ALERTING, STATES, ChannelScore, SlotScore
from tsdiff.errors import ConfigError


class Family(NamedTuple):
    """One metric about entities; all of them are gauges."""

    name: str
    help: str
    labels: tuple[str, ...]


class Sample(NamedTuple):
    """One value of one series; `labels` are the values of the family's labels."""

    family: Family
    labels: tuple[str, ...]
    value: float


ANOMALY_SCORE: Final = Family(
    "tsdiff_anomaly_score",
    "How unusual the last slot is; 1 is as rare as the false alarms asked for.",
    ("entity",),
)
ALERT_ACTIVE: Final = Family(
    "tsdiff_alert_active", "1 while the entity's alert is firing or recovering.", ("entity",)
)
CONTRIBUTION: Final = Family(
    "tsdiff_channel_contribution_ratio",
    "Share of the anomaly that is this channel's; all channels together make 1.",
    ("entity", "channel"),
)
EXPECTED: Final = Family(
    "tsdiff_channel_expected",
    "Value that the model expected, in the channel's own unit.",
    ("entity", "channel"),
)
LOWER: Final = Family(
    "tsdiff_channel_lower",
    "Lower end of the band that holds 90 % of what was expected.",
    ("entity", "channel"),
)
UPPER: Final = Family(
    "tsdiff_channel_upper",
    "Upper end of the band that holds 90 % of what was expected.",
    ("entity", "channel"),
)
OBSERVED: Final = Family(
    "tsdiff_channel_observed",
    "Value that was read, in the channel's own unit.",
    ("entity", "channel"),
)
IMPUTED_RATIO: Final = Family(
    "tsdiff_imputed_ratio", "Share of the last slot's cells without a reading.", ("entity",)
)
SCORE_TIMESTAMP: Final = Family(
    "tsdiff_score_timestamp_seconds",
    "Event time of the last slot that was scored, in seconds since the epoch.",
    ("entity",),
)
ENTITY_STATE: Final = Family(
    "tsdiff_entity_state", "1 for the state that the entity is in.", ("entity", "state")
)
CHANNEL_STATE: Final = Family(
    "tsdiff_channel_state",
    "1 while the channel is dead (no readings) or stuck (always the same one).",
    ("entity", "channel", "state"),
)
ENTITY_FAMILIES: Final[tuple[Family, ...]] = (
    ANOMALY_SCORE,
    ALERT_ACTIVE,
    CONTRIBUTION,
    EXPECTED,
    LOWER,
    UPPER,
    OBSERVED,
    IMPUTED_RATIO,
    SCORE_TIMESTAMP,
    ENTITY_STATE,
    CHANNEL_STATE,
)


_OF_NAME: Final = {family.name: family for family in ENTITY_FAMILIES}


def entity_samples(score: SlotScore, top_channels: int) -> Iterator[Sample]:
    """What Prometheus is told about an entity once this slot is its last; unknown has no sample."""
    entity = (score.entity,)
    if score.anomaly_score is not None:
        yield Sample(ANOMALY_SCORE, entity, score.anomaly_score)
    yield Sample(ALERT_ACTIVE, entity, 1 if score.state in ALERTING else 0)
    yield Sample(IMPUTED_RATIO, entity, score.imputed_ratio)
    yield Sample(SCORE_TIMESTAMP, entity, score.timestamp_ms / 1000)
    for known in STATES:
        yield Sample(ENTITY_STATE, (*entity, known), 1 if score.state == known else 0)
    for name, fault in score.faulty.items():
        yield Sample(CHANNEL_STATE, (*entity, name, fault), 1)
    for name, channel in _top(score.channels, top_channels):
        of_channel = (*entity, name)
        yield Sample(CONTRIBUTION, of_channel, channel.contribution)
        for family, value in (
            (EXPECTED, channel.expected),
            (LOWER, channel.lower),
            (UPPER, channel.upper),
            (OBSERVED, channel.observed),
        ):
            if value is not None:
                yield Sample(family, of_channel, value)


def _top(channels: Mapping[str, ChannelScore], count: int) -> Sequence[tuple[str, ChannelScore]]:
    if len(channels) <= count:
        return list(channels.items())
    return heapq.nlargest(count, channels.items(), key=_contribution)


def _contribution(item: tuple[str, ChannelScore]) -> float:
    return item[1].contribution


# -- series that are kept for a while ------------------------------------------------------------

SeriesKey = tuple[str, tuple[str, ...]]
"""Name of the family, and values of its labels."""


def key_of(sample: Sample) -> SeriesKey:
    """Which series a sample belongs to."""
    return sample.family.name, sample.labels


def family_of(key: SeriesKey) -> Family:
    """The family that a series is of."""
    return _OF_NAME[key[0]]


def labels_of(key: SeriesKey, more: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names and values of a series' own labels, then `more` ones."""
    return [*zip(family_of(key).labels, key[1], strict=True), *more.items()]


class Points(NamedTuple):
    """Times and values of one series, in order; 16 bytes a sample."""

    # Quoted: before Python 3.12 an array takes no subscript at run time.
    timestamps_ms: "array[int]"
    values: "array[float]"

    @classmethod
    def empty(cls) -> Self:
        """Without a sample yet."""
        return cls(array("q"), array("d"))


class SeriesBuffer:
    """Samples by series until there are enough of them to be worth a write."""

    def __init__(self) -> None:
        self.samples = 0
        self.bytes = 0
        """About what the samples and the labels of their series take."""
        self.series: dict[SeriesKey, Points] = {}

    def add(self, key: SeriesKey, timestamp_ms: int, value: float) -> None:
        """Append to a series."""
        points = self.series.get(key)
        if points is None:
            points = self.series[key] = Points.empty()
            self.bytes += len(key[0]) + sum(len(text) for text in key[1]) + _SERIES_BYTES
        points.timestamps_ms.append(timestamp_ms)
        points.values.append(value)
        self.samples += 1
        self.bytes += 16

    def clear(self) -> None:
        """Let go of everything."""
        self.series, self.samples, self.bytes = {}, 0, 0


# The names of labels, and those that are the same for all series.
_SERIES_BYTES: Final = 100

# -- labels that scraping would add ----------------------------------------------------------------

DEFAULT_LABELS: Final[Mapping[str, str]] = {"job": "tsdiff"}
"""What Prometheus adds to scraped series by itself, as in deploy/prometheus/prometheus.yml."""

_LABEL_NAME: Final = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*", re.ASCII)
_OWN_LABELS: Final = frozenset(label for family in ENTITY_FAMILIES for label in family.labels)


def external_labels(pairs: Sequence[str]) -> dict[str, str]:
    """Read `name=value` pairs over the default ones; an empty value takes a label away.

    Raises:
        ConfigError: not a pair, no name that Prometheus takes, or one of our own labels.

    """
    labels = dict(DEFAULT_LABELS)
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not _LABEL_NAME.fullmatch(name):
            raise ConfigError(
                f"expected --label NAME=VALUE with a name of letters, digits and _, got {pair!r}"
            )
        if name in _OWN_LABELS:
            raise ConfigError(
                f"expected another label than {name} for --label: tsdiff's series have it already"
            )
        labels[name] = value
    return {name: value for name, value in labels.items() if value}
