"""Settings and bundles that change while the service runs.

SIGHUP, POST /-/reload ──> asked for ──> prepared on a thread ──> swapped in between two rounds
                                               └──> refused: the old ones run on
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Generic, TypeVar

import structlog

from stream.config import ServiceConfig
from stream.metrics import ServiceMetrics
from tsdiff.errors import ConfigError, TsdiffError

_log = structlog.get_logger("tsdiff.reload")

RELOADABLE: Final = (
    "model.path",
    "alerts.",
    "metrics.max_entities",
    "metrics.top_channels",
    "log.level",
)
"""Settings (or sections, with a dot) that can change without a restart."""
# A compilation ends within this; torn down in the middle, XLA may take the process with it.
_CLOSE_SECONDS: Final = 20.0

Prepared = TypeVar("Prepared")


class Wish:
    """That somebody wants a reload: SIGHUP or a request sets it, the loop takes it."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def ask(self, *_: object) -> None:
        """Ask."""
        self._asked.set()

    def take(self) -> bool:
        """Whether somebody asked since the last time."""
        asked = self._asked.is_set()
        if asked:
            self._asked.clear()
        return asked

    @contextmanager
    def on_signal(self) -> Iterator[None]:
        """Listen for SIGHUP, and restore what was there before."""
        before = signal.signal(signal.SIGHUP, self.ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGHUP, before)


def changed_keys(running: ServiceConfig, wanted: ServiceConfig) -> list[str]:
    """Name the settings that differ.

    Raises:
        ConfigError: one of them can only change with a restart.

    """
    changed = list(
        _differences(running.model_dump(by_alias=True), wanted.model_dump(by_alias=True))
    )
    for key in changed:
        if key != "log.level" and not key.startswith(RELOADABLE):
            raise ConfigError(
                f"needs a restart: {key} (a reload changes model.path, alerts, "
                "metrics.max_entities, metrics.top_channels and log.level)"
            )
    return changed


def _differences(
    running: dict[str, Any], wanted: dict[str, Any], prefix: str = ""
) -> Iterator[str]:
    for name, value in running.items():
        if isinstance(value, dict):
            yield from _differences(value, wanted[name], f"{prefix}{name}.")
        elif value != wanted[name]:
            yield prefix + name


class Reloader(Generic[Prepared]):
    """Prepares what was asked for beside the loop, and hands it to the loop when it is ready.

    Args:
        wish: whether somebody asked.
        prepare: reads, checks and compiles; on a thread of its own.
        swap: puts in force what was prepared; on the loop's thread, which calls `turn`.
        metrics: told how it went.

    """

    def __init__(
        self,
        wish: Wish,
        prepare: Callable[[], Prepared],
        swap: Callable[[Prepared], None],
        metrics: ServiceMetrics,
    ) -> None:
        self._wish = wish
        self._prepare = prepare
        self._swap = swap
        self._metrics = metrics
        self._thread: threading.Thread | None = None
        self._prepared: list[Prepared] = []
        self._refused: str | None = None

    @property
    def busy(self) -> bool:
        """Whether something is being prepared."""
        return self._thread is not None and self._thread.is_alive()

    def turn(self) -> None:
        """Between two rounds: begin what was asked for, or swap in what is ready."""
        if self._thread is None:
            if self._wish.take():
                self._thread = threading.Thread(target=self._run, name="tsdiff-reload", daemon=True)
                self._thread.start()
            return
        if self._thread.is_alive():
            return
        self._thread = None
        if self._refused is None:
            self._swap(self._prepared.pop())
        else:
            _log.error("reload refused; the old settings run on", error=self._refused)
        self._metrics.config_reload(self._refused is None)
        self._refused = None

    def close(self) -> None:
        """Wait for what is being prepared; it is not put in force."""
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            self._prepared.append(self._prepare())
        except TsdiffError as error:
            self._refused = str(error)
        except Exception as error:  # what runs must go on, whatever is wrong with what comes
            self._refused = repr(error)
