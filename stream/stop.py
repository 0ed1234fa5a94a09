"""How a command that goes on and on is asked to end."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import structlog

_log = structlog.get_logger("tsdiff.run")


class Stop:
    """SIGTERM and SIGINT ask for an orderly end; a second one is not waited for.

    While `at_once` there is nothing to bring to an end: the first one ends the process.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.requested, self.at_once = False, at_once

    def __call__(self) -> bool:
        """Whether somebody asked."""
        return self.requested

    def request(self, *_: object) -> None:
        """Ask."""
        self.requested = True

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listen for the signals, and restore what was there before."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            _log.info("stopping", signal=signal.Signals(number).name)
            if self.at_once:
                # The interpreter would wait for threads that compile, up to a minute.
                sys.stderr.flush()
                os._exit(0)
            self.request()

        before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
