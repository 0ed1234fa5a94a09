"""Logging: structlog for ours, the standard library's for kafka-python's, one form for both."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

# Between two lines of kafka-python's: often enough to see that something is still wrong.
REPEAT_SECONDS: Final = 10.0


def configure_logging(level: str, form: str) -> None:
    """Write to stderr, as lines for people ("console") or as JSON for collectors ("json")."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.types.Processor
    if form == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        shared.append(_on_one_line)  # JSON escapes by itself
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        # In one write with its end: other threads' lines are written between any two.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    kafka = logging.getLogger("kafka")
    # Never DEBUG: kafka-python would write its settings and every byte it sends, passwords too.
    kafka.setLevel(logging.INFO if number == logging.DEBUG else logging.ERROR)
    if number > logging.DEBUG:
        handler.addFilter(_Sparse("kafka", REPEAT_SECONDS))


def _on_one_line(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Escape what ends a line, moves the cursor or turns the text around: names come from afar."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = "".join(c if c.isprintable() else repr(c)[1:-1] for c in value)
    return event


class _Sparse(logging.Filter):
    """Lets one line of a library through at a time, then none for a while.

    A broker that is away makes kafka-python write several errors for every attempt to reconnect;
    the first one says all that there is to know.
    """

    def __init__(self, library: str, seconds: float) -> None:
        super().__init__()
        self._library = library
        self._seconds = seconds
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the record."""
        if record.name.partition(".")[0] != self._library:
            return True
        if record.created < self._next:
            return False
        self._next = record.created + self._seconds
        return True
