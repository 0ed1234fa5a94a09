"""What the service tells, followed and shown: its output topics, read back as a picture of now."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec
from kafka import KafkaConsumer, TopicPartition
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from stream.codec import rfc3339
from stream.config import OutputsSection
from stream.demo_table import FleetRow
from stream.embedded import EmbeddedBroker, EmbeddedService
from stream.errors import StreamError
from stream.records import ALERTING, State

# Channels that an alert blames: a person looks at the first few, not at all of them.
BLAMED: Final = 3
# A service that says nothing for so long will not say anything; compiling takes a third of it.
_SILENCE_SECONDS: Final = 120.0
_PIPE_COLUMNS: Final = 120
_DRAWN_EVERY_SECONDS: Final = 0.25
_LINES_EVERY_SECONDS: Final = 15.0
# A record of a topic, decoded: the outputs of the service are JSON objects.
Record = dict[str, Any]


@dataclass
class Episode:
    """One alert, from firing until it is over; `channels` are those blamed when it fired.

    Or, where `state` says so, a channel from the slot on in which it was found dead or stuck.
    """

    entity: str
    start_ms: int
    anomaly_score: float | None
    channels: tuple[str, ...]
    end_ms: int | None = None
    state: Literal["firing", "dead", "stuck"] = "firing"

    def as_json(self) -> Record:
        """Return it as the machine-readable summaries have it."""
        return {
            "entity": self.entity,
            "start": rfc3339(self.start_ms),
            "end": None if self.end_ms is None else rfc3339(self.end_ms),
            "state": self.state,
            "channels": list(self.channels),
            "anomaly_score": self.anomaly_score,
        }


def clock_text(timestamp_ms: int, form: str = "%a %H:%M") -> str:
    """Event time for people, in UTC."""
    return datetime.fromtimestamp(timestamp_ms / 1000, UTC).strftime(form)


class OutputsReader:
    """Reads scores and alerts from the beginning, as any other consumer of them would."""

    def __init__(self, broker: EmbeddedBroker, outputs: OutputsSection) -> None:
        self._alerts = outputs.alerts
        self._consumer = KafkaConsumer(
            **broker.client_kwargs(), enable_auto_commit=False, auto_offset_reset="earliest"
        )
        self._consumer.assign(
            [
                TopicPartition(topic, number)
                for topic in (outputs.scores, outputs.alerts)
                for number in self._consumer.partitions_for_topic(topic) or ()
            ]
        )

    def poll(self, timeout_ms: int = 100) -> tuple[list[Record], list[Record]]:
        """Return the scores and the alerts that have come."""
        scores: list[Record] = []
        alerts: list[Record] = []
        for partition, records in self._consumer.poll(timeout_ms=timeout_ms).items():
            kept = alerts if partition.topic == self._alerts else scores
            kept.extend(msgspec.json.decode(record.value) for record in records)
        return scores, alerts

    def close(self) -> None:
        """Disconnect."""
        self._consumer.close()


class Board:
    """The last score of every entity, and every alert so far. Nothing is counted twice.

    `form` says how event time is shown.
    """

    def __init__(self, units: Mapping[str, str], form: str = "%a %H:%M") -> None:
        self.episodes: list[Episode] = []
        self.last: dict[str, Record] = {}
        self.now_ms = 0
        """Newest slot that was scored, in event time."""
        self.judged = 0
        """Scores that held a number: entities that warm up, and slots without reading, have none"""
        self._units = dict(units)
        self._form = form
        # At-least-once: after a recovery the service may tell the same again.
        self._told: dict[str, set[str]] = {}
        self._open: dict[tuple[str, str | None], Episode] = {}
        """By entity, and channel where it is one that is dead or stuck."""

    @property
    def scores(self) -> int:
        """Slots scored, of all entities."""
        return sum(map(len, self._told.values()))

    def take(self, scores: list[Record], alerts: list[Record]) -> list[Episode]:
        """Add what was read; return the alerts that began."""
        for score in scores:
            told = self._told.setdefault(score["entity"], set())
            if score["timestamp"] in told:
                continue
            told.add(score["timestamp"])
            self.judged += score["anomaly_score"] is not None
            self.last[score["entity"]] = score
            self.now_ms = max(self.now_ms, _milliseconds(score["timestamp"]))
        return [begun for alert in alerts for begun in self._follow(alert)]

    def _follow(self, alert: Record) -> Iterator[Episode]:
        entity, now_ms = alert["entity"], _milliseconds(alert["timestamp"])
        wanted: dict[str | None, Episode] = {
            channel: Episode(entity, now_ms, alert["anomaly_score"], (channel,), state=state)
            for channel, state in alert["faulty"].items()
        }
        # To fire again while recovering is the same alert: nobody was told that it is over.
        if alert["state"] in ALERTING:
            channels = alert["channels"]
            guiltiest = sorted(channels, key=lambda name: -channels[name]["contribution"])
            blamed = tuple(guiltiest[:BLAMED])
            wanted[None] = Episode(entity, now_ms, alert["anomaly_score"], blamed)
        for channel in [c for e, c in self._open if e == entity and c not in wanted]:
            self._open.pop((entity, channel)).end_ms = now_ms
        for channel, begun in wanted.items():
            if self._open.setdefault((entity, channel), begun) is begun:
                self.episodes.append(begun)
                yield begun

    def rows(self) -> list[FleetRow]:
        """Every entity as it is now, by name."""
        newest = {episode.entity: episode for episode in self.episodes}
        return [self._row(name, newest.get(name)) for name in sorted(self.last, key=_by_number)]

    def _row(self, name: str, alert: Episode | None) -> FleetRow:
        score = self.last[name]
        channels: dict[str, Record] = score["channels"]
        top = max(channels, key=lambda c: float(channels[c]["contribution"]), default=None)
        state: State = score["state"]
        said = None
        if alert is not None:
            said = f"{clock_text(alert.start_ms, self._form)} {', '.join(alert.channels[:2])}"
        return FleetRow(
            entity=name,
            state=state,
            anomaly_score=score["anomaly_score"],
            top_channel=top,
            expected=None if top is None else channels[top]["expected"],
            observed=None if top is None else channels[top]["observed"],
            unit="" if top is None else self._units.get(top, ""),
            last_alert=said,
        )


def _milliseconds(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def _by_number(name: str) -> tuple[str, int, str]:
    """Sort web-10 behind web-9."""
    stem, _, number = name.rpartition("-")
    return (stem, int(number) if number.isdecimal() else 0, name)


def alert_line(episode: Episode, form: str = "%a %H:%M") -> str:
    """Tell of an alert in one line."""
    when = clock_text(episode.start_ms, form)
    blamed = ", ".join(episode.channels)
    if episode.state != "firing":
        return f"{when} {episode.entity} {blamed} is {episode.state}"
    return f"{when} {episode.entity} firing, score {episode.anomaly_score:.2f}: {blamed}"


class Screen:
    """Where it is shown: a live table on a terminal, plain lines in a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        if not console.is_terminal:
            # Rich takes a pipe for 80 columns wide, and would cut what nothing has to cut.
            console.width = max(console.width, _PIPE_COLUMNS)

    def say(self, text: str) -> None:
        """Print a line of its own, above the table where there is one."""
        self._console.print(Text(text), soft_wrap=True)

    def show(self, picture: RenderableType) -> None:
        """Print a table once."""
        self._console.print(picture)

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Say what is being waited for, and how long it took."""
        began = time.monotonic()
        with self._console.status(text):
            yield
        self.say(f"{text}: {time.monotonic() - began:.1f} s")

    @contextmanager
    def live(
        self, picture: Callable[[], RenderableType], line: Callable[[], str]
    ) -> Iterator[Callable[[], None]]:
        """Yield what is to be called now and then: it draws `picture`, or prints `line`."""
        shown_at = time.monotonic()
        every = _DRAWN_EVERY_SECONDS if self._console.is_terminal else _LINES_EVERY_SECONDS

        def refresh() -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at < every:
                return
            shown_at = time.monotonic()
            if self._console.is_terminal:
                live.update(picture(), refresh=True)
            else:
                self.say(line())

        # Drawn by whoever refreshes: a thread of Rich's would read the board while it changes.
        with Live(console=self._console, auto_refresh=False) as live:
            yield refresh
            if self._console.is_terminal:
                live.update(picture(), refresh=True)


def follow(
    board: Board,
    reader: OutputsReader,
    service: EmbeddedService,
    check: Callable[[], None],
) -> Iterator[list[Episode]]:
    """Keep the board up to date; yield the alerts that began, after every look.

    Raises:
        TsdiffError: what ended the service, what `check` raised, or that no score comes.

    """
    heard_at = time.monotonic()
    while True:
        service.check()
        check()
        scores, alerts = reader.poll()
        if scores:
            heard_at = time.monotonic()
        elif time.monotonic() - heard_at > _SILENCE_SECONDS:
            raise StreamError(
                f"expected scores from the service, none came for {_SILENCE_SECONDS:.0f} s; "
                "see `tsdiff --debug demo`"
            )
        yield board.take(scores, alerts)
