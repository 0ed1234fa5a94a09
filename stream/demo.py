"""`tsdiff demo`: a simulated fleet with faults, watched by the real service, and what it caught.

Everything runs in this process: simulation, training, broker, service, metrics. Four days of the
fleet's time pass in a hundred seconds, those before last Thursday. The service is that of
`tsdiff run`, with the default alert rule. One thing differs from production: the embedded broker
keeps no offsets that come with a transaction, so delivery is at-least-once (stream/embedded.py).

    simulate -> train -> bundle --------------\
                      -> feeder -> broker -> service -> broker -> board -> live table, summary
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Final, Protocol

import numpy as np
from rich.console import Console, RenderableType

from stream.board import (
    BLAMED,
    Board,
    Episode,
    OutputsReader,
    Record,
    Screen,
    alert_line,
    clock_text,
    follow,
)
from stream.codec import rfc3339
from stream.compose import Model, enable_compilation_cache, load_model
from stream.config import ServiceConfig, parse_listen
from stream.demo_table import FaultRow, FleetHeader, fleet_table, summary_table
from stream.embedded import (
    DELIVERY_MODE,
    EmbeddedBroker,
    EmbeddedService,
    ReadingsThread,
    missing_extra,
)
from stream.logs import configure_logging
from stream.simulate import (
    FAULT_KINDS,
    Arrivals,
    Fault,
    FaultKind,
    Fleet,
    delivery_order,
    inject_faults,
    simulate_fleet,
)
from tsdiff.bundle import Bundle, save_bundle
from tsdiff.calibration import WEEK_MS
from tsdiff.history import History

DAY_SLOTS: Final = 288
# Slots in one call of the model: a look at the topic brings one or two of each entity.
_SPAN: Final = 4
# Messages of the feeder are sent in ticks, as agents' are.
_TICK_SECONDS: Final = 0.05
# An alert may come this late and still be the fault's: m of n slots, and the lag of smoothing.
GRACE_SLOTS: Final = 5
INPUT_TOPIC: Final = "telemetry"


class Train(Protocol):
    """Training, handed in by the console script: `stream` does not import `train`."""

    def __call__(self, history: History, *, period_ms: int, **settings: Any) -> Bundle:  # noqa: ANN401
        """Make a bundle; `settings` are the fields of `train.config.TrainConfig`."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long, how much, how fast; the defaults are the demo's, tests take less."""

    # Five minutes, as network devices are polled: three weeks are few enough slots to learn from
    # within seconds. Two weeks are fitted and one calibrates: what a Wednesday noon looks like is
    # not learned on a Sunday, and days unseen by the calibration would raise false alarms.
    period_ms: int = 300_000
    history_slots: int = 21 * DAY_SLOTS
    live_slots: int = 4 * DAY_SLOTS
    live_seconds: float = 100.0
    quiet_slots: int = 60
    """Slots at the beginning of the live part in which nothing is wrong."""
    kinds: tuple[FaultKind, ...] = FAULT_KINDS
    late_share: float = 0.02
    max_late_slots: int = 3
    # A slot is over a period after its time, so this waits for all but the very latest.
    lateness_slots: int = 2
    # A training would drop the network here (it leaves most of what the anchor leaves); without it
    # the first score comes some twenty seconds sooner.
    train: Mapping[str, Any] = field(default_factory=lambda: {"held_out": 0.334, "network": None})


@dataclass(frozen=True)
class Outcome:
    """What became of one fault; `alerts` are those raised for it, in their order."""

    fault: Fault
    alerts: tuple[Episode, ...]
    period_ms: int

    @property
    def alert(self) -> Episode | None:
        """The first one raised for it; None: it was missed."""
        return next(iter(self.alerts), None)

    @property
    def delay_slots(self) -> int | None:
        """Whole slots from the fault's first slot to the slot whose score raised the alert."""
        if self.alert is None:
            return None
        return (self.alert.start_ms - self.fault.start_ms) // self.period_ms

    @property
    def blamed_right(self) -> bool | None:
        """Whether a channel of the fault is among those that the alert blames."""
        if self.alert is None:
            return None
        return bool(set(self.fault.channels) & set(self.alert.channels))

    def as_json(self) -> Record:
        """Return it as `tsdiff demo --json` has it."""
        return {
            "kind": self.fault.kind,
            "entity": self.fault.entity,
            "channels": list(self.fault.channels),
            "start": rfc3339(self.fault.start_ms),
            "end": rfc3339(self.fault.end_ms),
            "caught": self.alert is not None,
            "delay_slots": self.delay_slots,
            "blamed": None if self.alert is None else list(self.alert.channels),
            "blamed_right": self.blamed_right,
        }


def judge(
    faults: Sequence[Fault], episodes: Sequence[Episode], period_ms: int
) -> tuple[list[Outcome], list[Episode]]:
    """Set alerts against faults: what became of each fault, and the alerts that were false.

    A fault is caught by an alert of its entity that fires while it lasts, or up to `GRACE_SLOTS`
    after. An alert that was on before the fault began says nothing about it: that one is false.
    """

    def meant(fault: Fault, episode: Episode) -> bool:
        last_ms = fault.end_ms + GRACE_SLOTS * period_ms
        return episode.entity == fault.entity and fault.start_ms <= episode.start_ms < last_ms

    outcomes = [
        Outcome(fault, tuple(e for e in episodes if meant(fault, e)), period_ms) for fault in faults
    ]
    false = [e for e in episodes if not any(meant(fault, e) for fault in faults)]
    return outcomes, false


def out_of_order(arrivals: Arrivals) -> int:
    """How many readings arrive behind a newer one of their own entity."""
    late = 0
    for row in np.unique(arrivals.rows):
        timestamps_ms = arrivals.timestamps_ms[arrivals.rows == row]
        late += int((timestamps_ms < np.maximum.accumulate(timestamps_ms)).sum())
    return late


class Feeder(ReadingsThread):
    """Delivers a fleet's readings in the order of their arrival, faster than they happened."""

    def __init__(
        self, broker: EmbeddedBroker, topic: str, fleet: Fleet, plan: Plan, seed: int
    ) -> None:
        super().__init__(broker, topic)
        self._arrivals = delivery_order(
            fleet, late_share=plan.late_share, max_late_slots=plan.max_late_slots, seed=seed
        )
        self._fleet = fleet
        self._speed = len(fleet.timestamps_ms) * fleet.period_ms / 1000 / plan.live_seconds
        self.total = len(self._arrivals.rows)
        self.late = out_of_order(self._arrivals)
        self.sent = 0
        self.done = False

    def feed(self) -> None:
        """Send until everything is sent."""
        arrivals = self._arrivals
        began, first_ms = time.monotonic(), int(arrivals.arrival_ms[0])
        while self.sent < self.total and not self._stopping.is_set():
            reached_ms = first_ms + (time.monotonic() - began) * self._speed * 1000
            due = int(np.searchsorted(arrivals.arrival_ms, reached_ms, side="right"))
            for i in range(self.sent, due):
                entity = self._fleet.entities[int(arrivals.rows[i])]
                values = dict(zip(self._fleet.channels, arrivals.values[i].tolist(), strict=True))
                self.send(entity, int(arrivals.timestamps_ms[i]), values)
            self.sent = due
            self._stopping.wait(_TICK_SECONDS)
        self._producer.flush(timeout=30)
        self.done = not self._stopping.is_set()


@dataclass(frozen=True)
class Result:
    """What the live part brought, with what it takes to tell about it."""

    outcomes: list[Outcome]
    false_alarms: list[Episode]
    episodes: list[Episode]
    scores: int
    entity_days: float
    readings: int
    late: int
    lost: int
    asked_per_entity_week: float
    seconds_to_first_score: float
    seconds: float

    def as_json(self) -> Record:
        """Return the summary that `tsdiff demo --json` ends with."""
        caught_by = {id(alert): o.fault.kind for o in self.outcomes for alert in o.alerts}
        return {
            "faults": len(self.outcomes),
            "caught": sum(o.alert is not None for o in self.outcomes),
            "false_alarms": len(self.false_alarms),
            "false_alarms_per_entity_day": round(len(self.false_alarms) / self.entity_days, 4),
            "seconds_to_first_score": round(self.seconds_to_first_score, 1),
            "seconds": round(self.seconds, 1),
            "scores": self.scores,
            "readings": self.readings,
            "readings_late": self.late,
            "readings_too_late": self.lost,
            "delivery": DELIVERY_MODE,
            "details": [outcome.as_json() for outcome in self.outcomes],
            "alerts": [{**e.as_json(), "fault": caught_by.get(id(e))} for e in self.episodes],
        }

    def tell(self, screen: Screen) -> None:
        """Say it to a person."""
        rows = [
            FaultRow(
                o.fault.kind,
                o.fault.entity,
                o.fault.channels,
                clock_text(o.fault.start_ms),
                o.alert is not None,
                o.delay_slots,
                o.blamed_right,
            )
            for o in self.outcomes
        ]
        screen.show(summary_table(rows))
        delays = [o.delay_slots for o in self.outcomes if o.delay_slots is not None]
        right = sum(bool(o.blamed_right) for o in self.outcomes)
        if delays:
            screen.say(
                f"median delay {median(delays):g} slots; among the first {BLAMED} "
                f"channels blamed was the faulty one in {right} of {len(delays)}"
            )
        per_day = len(self.false_alarms) / self.entity_days
        screen.say(
            f"{len(self.false_alarms)} false alarms in {self.entity_days:.1f} entity-days: "
            f"{per_day:.2f} a day and entity (asked for: {self.asked_per_entity_week / 7:.2f})"
        )
        for episode in self.false_alarms:
            blamed = ", ".join(episode.channels)
            screen.say(f"  false: {clock_text(episode.start_ms)} {episode.entity} {blamed}")
        screen.say(
            f"{self.scores} slots scored from {self.readings} readings, {self.late} of them late, "
            f"{self.lost} too late to count; first score after "
            f"{self.seconds_to_first_score:.0f} s, all done after {self.seconds:.0f} s"
        )


def process_started_at() -> float:
    """When this process began, in epoch seconds."""
    try:
        import psutil  # noqa: PLC0415 - optional
    except ModuleNotFoundError:
        raise missing_extra("psutil") from None
    return float(psutil.Process().create_time())


def run_demo(
    train: Train,
    *,
    seed: int = 0,
    entities: int = 8,
    listen: str = "",
    console: Console | None = None,
    plan: Plan | None = None,
    started_at: float | None = None,
) -> Record:
    """Run the demo; return its summary (`Result.as_json`).

    The same seed and plan give the same fleet, faults and model: event time ends with the last
    full week (Thursday 00:00 UTC), so that the rhythms do not depend on when the demo is run.

    Args:
        train: training, as the console script hands it in.
        seed: of the fleet, its faults, the order of arrival and the training.
        entities: size of the fleet; the faults take one entity each, the others stay quiet.
        listen: address of /metrics, another port is taken where it is not free; empty = off.
        console: where everything is shown; None = standard output.
        plan: sizes and speeds.
        started_at: what "first score after" counts from, in epoch seconds; None = now.

    Raises:
        ConfigError: `listen` is not an address, or the fleet has no room for the faults.
        TsdiffError: a package of the extra `demo` is missing, or a part of the demo failed.

    """
    if listen:
        parse_listen(listen)  # before minutes are spent
    plan = plan or Plan()
    started_at = time.time() if started_at is None else started_at
    screen = Screen(console or Console())
    configure_logging("error", "console")
    enable_compilation_cache()
    with ExitStack() as stack:
        broker = stack.enter_context(EmbeddedBroker())
        fleet = _simulate(plan, seed, entities, time.time())
        screen.say(_announce(fleet, plan))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tsdiff-demo-")))
        with screen.stage("training on the history"):
            history = fleet.history(0, plan.history_slots)
            settings = {"name": "demo", "seed": seed, "units": fleet.units, **plan.train}
            bundle = train(history, period_ms=plan.period_ms, **settings)
            save_bundle(bundle, folder / "bundle")
        with screen.stage(f"compiling {bundle.version}"):
            model = compiled_model(folder / "bundle", entities)
        config = service_config(
            broker,
            folder / "bundle",
            listen,
            lateness_ms=plan.lateness_slots * plan.period_ms,
        )
        result = _watch(config, model, broker, fleet, plan, seed, screen, started_at)
    result.tell(screen)
    return result.as_json()


def _simulate(plan: Plan, seed: int, entities: int, now: float) -> Fleet:
    slots = plan.history_slots + plan.live_slots
    end_ms = int(now * 1000) // WEEK_MS * WEEK_MS
    start_ms = (end_ms // plan.period_ms - slots) * plan.period_ms
    fleet = simulate_fleet(
        entities, period_ms=plan.period_ms, slots=slots, start_ms=start_ms, seed=seed
    )
    # Some slots at the end stay open for late readings; a fault is over before them.
    spare = GRACE_SLOTS + plan.lateness_slots + plan.max_late_slots
    return inject_faults(
        fleet,
        seed=seed,
        kinds=plan.kinds,
        start_slot=plan.history_slots + plan.quiet_slots,
        end_slot=slots - spare,
    )


def _announce(fleet: Fleet, plan: Plan) -> str:
    period_s = plan.period_ms / 1000
    days = plan.live_slots * plan.period_ms / 86_400_000
    past = plan.history_slots * plan.period_ms / 86_400_000
    return (
        f"{len(fleet.entities)} simulated servers of {len(fleet.channels)} channels, a reading "
        f"every {period_s:g} s: {past:.2g} days of history, then {days:.2g} days live "
        f"in {plan.live_seconds:.0f} s with {len(fleet.faults)} faults\n"
        "embedded broker: librdkafka's mock, which keeps no offsets of transactions, "
        f"so delivery is {DELIVERY_MODE}"
    )


def compiled_model(path: Path, entities: int) -> Model:
    """Load a bundle for a known number of entities, and compile it for that size alone."""
    batch = min(256, -(-entities // 8) * 8)
    model = load_model(path, shapes=((batch, _SPAN),))
    model.detector.warm_up()
    return model


def service_config(
    broker: EmbeddedBroker,
    bundle: Path,
    listen: str,
    *,
    lateness_ms: int,
    alerts: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Any] | None = None,
) -> ServiceConfig:
    """Settings of the service beside the embedded broker; the environment has no say here."""
    return ServiceConfig.model_validate(
        {
            "model": {"path": bundle},
            "input": {
                "bootstrap_servers": [broker.address],
                "topic": INPUT_TOPIC,
                "group": "tsdiff-demo",
            },
            "grid": {"lateness": f"{lateness_ms}ms"},
            "alerts": dict(alerts or {}),
            "outputs": dict(outputs or {}),
            "delivery": {"mode": DELIVERY_MODE},
            "metrics": {"listen": listen},
        }
    )


def _watch(
    config: ServiceConfig,
    model: Model,
    broker: EmbeddedBroker,
    fleet: Fleet,
    plan: Plan,
    seed: int,
    screen: Screen,
    started_at: float,
) -> Result:
    """Run the live part to its end."""
    broker.create_topics(config)
    live = replace(
        fleet,
        timestamps_ms=fleet.timestamps_ms[plan.history_slots :],
        values=fleet.values[:, plan.history_slots :],
    )
    board = Board(dict(zip(fleet.channels, fleet.units, strict=True)))
    first_score: float | None = None
    with (
        EmbeddedService(config, model, screen.say) as service,
        Feeder(broker, config.input.topic, live, plan, seed) as feeder,
        closing(OutputsReader(broker, config.outputs)) as reader,
    ):

        def line() -> str:
            state = f"{board.scores} scores, {len(board.episodes)} alerts"
            url = f"{service.url}/metrics" if service.url else "no metrics"
            now = clock_text(board.now_ms) if board.now_ms else "starting"
            return f"{now} · {state} · {100 * feeder.sent // feeder.total} % · {url}"

        def picture() -> RenderableType:
            return fleet_table(board.rows(), FleetHeader("tsdiff demo", (line(),)))

        with screen.live(picture, line) as refresh:
            for begun in follow(board, reader, service, feeder.check):
                if first_score is None and board.judged:
                    first_score = time.time() - started_at
                    where = f"; page and metrics at {service.url}" if service.url else ""
                    screen.say(f"first score after {first_score:.1f} s{where}")
                for episode in begun:
                    screen.say(alert_line(episode))
                refresh()
                taken = service.counted("tsdiff_readings_total")
                told = service.counted("tsdiff_scores_total")
                if feeder.done and taken >= feeder.total and board.scores >= told and not begun:
                    break
        outcomes, false = judge(fleet.faults, board.episodes, plan.period_ms)
        return Result(
            outcomes,
            false,
            board.episodes,
            scores=board.scores,
            entity_days=board.scores * plan.period_ms / 86_400_000,
            readings=feeder.total,
            late=feeder.late,
            lost=service.counted("tsdiff_late_readings_total"),
            asked_per_entity_week=config.alerts.false_alarms_per_entity_week,
            seconds_to_first_score=first_score if first_score is not None else float("nan"),
            seconds=time.time() - started_at,
        )
