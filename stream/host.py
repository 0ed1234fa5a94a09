"""`tsdiff demo --host`: this machine, watched second by second by the real service until Ctrl-C.

First it learns for some minutes what the machine does just now, then the same embedded broker and
service as in the demo score each second. What was learned is minutes of one mood of the machine:
whatever it does later for the first time is news to the model, and is meant to be.
"""

import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from stream.board import Board, Episode, OutputsReader, Record, Screen, alert_line, follow
from stream.compose import enable_compilation_cache
from stream.config import parse_listen
from stream.demo import Train, compiled_model, service_config
from stream.demo_table import FleetHeader, fleet_table
from stream.embedded import EmbeddedBroker, EmbeddedService, ReadingsThread, missing_extra
from stream.logs import configure_logging
from tsdiff.bundle import save_bundle
from tsdiff.errors import ConfigError
from tsdiff.history import EntityHistory, History

PERIOD_MS: Final = 1000
ENTITY: Final = "this-machine"
# Three windows of 64 slots are what training asks for; some more, since one may be missed.
LEARN_LEAST_SLOTS: Final = 220
# One false alarm an hour: what minutes of learning know of the tails does not reach to a week.
FALSE_ALARMS_PER_WEEK: Final = 7 * 24.0
_CLOCK: Final = "%H:%M:%S"
_MIB: Final = 1024 * 1024

Rates = dict[str, float]


class HostSampler:
    """Reads this machine's counters; a rate is the change since the sample before.

    What the machine does not have (a disk, a network, swap, a load) is left out of `channels`.

    Raises:
        TsdiffError: psutil is not installed.

    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            import psutil  # noqa: PLC0415 - optional
        except ModuleNotFoundError:
            raise missing_extra("psutil") from None
        self._psutil: ModuleType = psutil
        self._clock = clock
        self._at = clock()
        self._counters = self._count()
        self._levels()  # psutil's CPU shares are of the time since the call before
        self.channels: dict[str, str] = {
            name: unit for name, unit in _UNITS.items() if name in self._known()
        }

    def _known(self) -> set[str]:
        return {*self._levels(), *self._counters}

    def sample(self) -> Rates:
        """Return every channel's value now; one that cannot be read this time is left out."""
        now, counters = self._clock(), self._count()
        elapsed = max(now - self._at, 1e-3)
        rates = {
            # A counter that went back belongs to another device, or began anew.
            name: max(0.0, value - self._counters[name]) / elapsed
            for name, value in counters.items()
            if name in self._counters
        }
        self._at, self._counters = now, counters
        found = {**self._levels(), **rates}
        return {name: found[name] for name in self.channels if name in found}

    def _levels(self) -> Rates:
        psutil = self._psutil
        levels: Rates = {}
        share = psutil.cpu_times_percent()
        levels["cpu"] = 100.0 - share.idle
        for name in ("user", "system", "iowait"):
            if hasattr(share, name):
                levels[f"cpu_{name}"] = float(getattr(share, name))
        with suppress(OSError, AttributeError):
            levels["load_1m"] = float(psutil.getloadavg()[0])
        levels["memory"] = float(psutil.virtual_memory().percent)
        with suppress(OSError, RuntimeError):
            swap = psutil.swap_memory()
            if swap.total:
                levels["swap"] = float(swap.percent)
        levels["processes"] = float(len(psutil.pids()))
        return levels

    def _count(self) -> Rates:
        """Read what only grows."""
        psutil = self._psutil
        counters: Rates = {}
        # Containers and some systems show no disks or no network, or refuse to tell.
        with suppress(OSError, RuntimeError, NotImplementedError):
            disk = psutil.disk_io_counters()
            if disk is not None:
                counters["disk_read"] = disk.read_bytes / _MIB
                counters["disk_write"] = disk.write_bytes / _MIB
        with suppress(OSError, RuntimeError, NotImplementedError):
            net = psutil.net_io_counters()
            if net is not None:
                counters["net_in"] = net.bytes_recv / _MIB
                counters["net_out"] = net.bytes_sent / _MIB
                counters["packets"] = float(net.packets_recv + net.packets_sent)
        with suppress(OSError, RuntimeError, NotImplementedError):
            stats = psutil.cpu_stats()
            counters["switches"] = float(stats.ctx_switches)
            counters["interrupts"] = float(stats.interrupts)
        return counters


# Every channel there may be, with its unit, in the order in which they are shown.
_UNITS: Final = {
    "cpu": "%",
    "cpu_user": "%",
    "cpu_system": "%",
    "cpu_iowait": "%",
    "load_1m": "",
    "memory": "%",
    "swap": "%",
    "disk_read": "MiB/s",
    "disk_write": "MiB/s",
    "net_in": "MiB/s",
    "net_out": "MiB/s",
    "packets": "1/s",
    "switches": "1/s",
    "interrupts": "1/s",
    "processes": "",
}


class _Ticks:
    """Wakes once a slot, in the middle of it, so that none gets two samples."""

    def __init__(self, period_ms: int) -> None:
        self._period_ms = period_ms
        self._last = 0

    def wait(self, stopping: threading.Event) -> int:
        """Sleep until the next slot; return its time in ms. Slots slept through are left out."""
        now = 1000.0 * time.time() / self._period_ms
        self._last = max(self._last + 1, int(now + 0.5))
        stopping.wait(max(0.0, self._last + 0.5 - now) * self._period_ms / 1000.0)
        return self._last * self._period_ms


def learn(
    sampler: HostSampler, slots: int, period_ms: int, screen: Screen, console: Console
) -> History:
    """Sample so many slots, behind a progress bar."""
    stopping, ticks = threading.Event(), _Ticks(period_ms)
    names = tuple(sampler.channels)
    timestamps_ms, values = [], []
    screen.say(
        f"learning what this machine does for {slots * period_ms / 1000:g} s, {len(names)} "
        f"channels every {period_ms / 1000:g} s; Ctrl-C ends"
    )
    progress = Progress(
        TextColumn("learning"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("learning", total=slots)
        for _ in range(slots):
            timestamps_ms.append(ticks.wait(stopping))
            found = sampler.sample()
            values.append([found.get(name, np.nan) for name in names])
            progress.advance(task)
    entity = EntityHistory(ENTITY, np.array(timestamps_ms, np.int64), np.array(values, np.float32))
    return History(names, (entity,), ())


class HostFeeder(ReadingsThread):
    """Sends a sample a slot until it is told to stop."""

    def __init__(
        self, broker: EmbeddedBroker, topic: str, sampler: HostSampler, period_ms: int
    ) -> None:
        super().__init__(broker, topic)
        self._sampler = sampler
        self._period_ms = period_ms

    def feed(self) -> None:
        """Sample and send."""
        ticks = _Ticks(self._period_ms)
        while not self._stopping.is_set():
            at_ms = ticks.wait(self._stopping)
            self.send(ENTITY, at_ms, self._sampler.sample())


def channel_table(score: Record, units: dict[str, str]) -> Table:
    """Draw every channel of one score: what was read, what was expected, and who is to blame."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("channel", no_wrap=True)
    for name in ("observed", "expected", "90 % band", "share of the anomaly"):
        table.add_column(name, justify="right", no_wrap=True)
    found: dict[str, Record] = score["channels"]
    for name in (name for name in units if name in found):
        cell = found[name]
        outside = cell["observed"] is not None and not (
            cell["lower"] <= cell["observed"] <= cell["upper"]
        )
        table.add_row(
            Text(name),
            Text(_quantity(cell["observed"], units[name]), "yellow" if outside else ""),
            Text(_quantity(cell["expected"], units[name])),
            Text(f"{cell['lower']:.4g} to {cell['upper']:.4g}", "dim"),
            Text(f"{100 * cell['contribution']:.0f} %"),
        )
    return table


def _quantity(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.4g} {unit}".rstrip()


def run_host(
    train: Train,
    *,
    listen: str = "",
    learn_ms: int = 300_000,
    period_ms: int = PERIOD_MS,
    console: Console | None = None,
    watch_seconds: float | None = None,
) -> Record:
    """Learn from this machine, then watch it until Ctrl-C; return what there was to tell.

    Args:
        train: training, as the console script hands it in.
        listen: address of /metrics, another port is taken where it is not free; empty = off.
        learn_ms: how long to learn before watching.
        period_ms: how often the machine is read.
        console: where everything is shown; None = standard output.
        watch_seconds: end by itself after so long; None = never.

    Raises:
        ConfigError: `listen` is not an address, or the time to learn is too short.
        TsdiffError: a package of the extra `demo` is missing, or a part failed.

    """
    least_ms = LEARN_LEAST_SLOTS * period_ms
    if learn_ms < least_ms:
        raise ConfigError(
            f"expected at least {least_ms / 1000:g}s to learn from, got {learn_ms / 1000:g}s; "
            "give a longer --learn"
        )
    if listen:
        parse_listen(listen)  # before minutes are spent
    console = console or Console()
    screen = Screen(console)
    configure_logging("error", "console")
    enable_compilation_cache()
    sampler = HostSampler()
    board = Board(sampler.channels, _CLOCK)
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        broker = stack.enter_context(EmbeddedBroker())
        history = learn(sampler, learn_ms // period_ms, period_ms, screen, console)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tsdiff-host-")))
        with screen.stage("training on it"):
            units = tuple(sampler.channels.values())
            _make_bundle(train, history, period_ms, units, folder / "bundle")
        with screen.stage("compiling the model"):
            model = compiled_model(folder / "bundle", 1)
        config = service_config(
            broker,
            folder / "bundle",
            listen,
            lateness_ms=0,
            alerts={"false_alarms_per_entity_week": FALSE_ALARMS_PER_WEEK},
            outputs={"channels": "all"},
        )
        broker.create_topics(config)
        service = stack.enter_context(EmbeddedService(config, model, screen.say))
        feeder = stack.enter_context(HostFeeder(broker, config.input.topic, sampler, period_ms))
        reader = stack.enter_context(closing(OutputsReader(broker, config.outputs)))
        screen.say("watching until Ctrl-C; a score of 1 is as rare as once an hour")
        _watch(board, reader, service, feeder, screen, sampler.channels, watch_seconds)
    screen.say(_farewell(board))
    return {"scores": board.scores, "alerts": [episode.as_json() for episode in board.episodes]}


def _make_bundle(
    train: Train, history: History, period_ms: int, units: tuple[str, ...], path: Path
) -> None:
    settings: dict[str, Any] = {"name": "host", "units": units, "network": None}
    # A third is held out: of five minutes that is what calibration can live on.
    save_bundle(train(history, period_ms=period_ms, held_out=0.33, **settings), path)


def _watch(
    board: Board,
    reader: OutputsReader,
    service: EmbeddedService,
    feeder: HostFeeder,
    screen: Screen,
    units: dict[str, str],
    seconds: float | None,
) -> None:
    began = time.monotonic()

    def line() -> str:
        last = board.last.get(ENTITY)
        now = "no score yet" if last is None else f"{last['state']}, {_score_text(last)}"
        url = f"{service.url}/metrics" if service.url else "no metrics"
        return f"{now} · {board.scores} scores, {len(board.episodes)} alerts · {url}"

    def picture() -> RenderableType:
        fleet = fleet_table(board.rows(), FleetHeader("tsdiff demo --host", (line(),)))
        last = board.last.get(ENTITY)
        return fleet if last is None else Group(channel_table(last, units), Text(), fleet)

    with screen.live(picture, line) as refresh:
        begun: list[Episode]
        for begun in follow(board, reader, service, feeder.check):
            for episode in begun:
                screen.say(alert_line(episode, _CLOCK))
            refresh()
            if seconds is not None and time.monotonic() - began > seconds:
                return


def _score_text(score: Record) -> str:
    value = score["anomaly_score"]
    return "no score" if value is None else f"score {value:.2f}"


def _farewell(board: Board) -> str:
    if not board.scores:
        return "stopped before the first score"
    share = sum(episode.end_ms is None for episode in board.episodes)
    still = f", {share} of them still on" if share else ""
    return f"{board.scores} slots scored, {len(board.episodes)} alerts{still}"
