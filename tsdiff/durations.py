"""Durations as people write them ("60s", "5m", "1.5h") and as the code keeps them: whole ms."""

import re
from decimal import Decimal

from tsdiff.errors import ConfigError

UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.ASCII)


def parse_duration_ms(text: str, *, name: str = "duration", minimum_ms: int = 0) -> int:
    """Read a duration in milliseconds; `name` says in the message what it was for.

    Raises:
        ConfigError: not a number with a unit, a fraction of a millisecond, or below `minimum_ms`.

    """
    found = _DURATION.fullmatch(text.strip())
    if found is None or found[2] not in UNITS_MS:
        missing = f"; {text.strip()}s would be seconds" if found and not found[2] else ""
        units = ", ".join(UNITS_MS)
        raise ConfigError(
            f"{name}: expected a number with a unit ({units}) such as 60s or 5m, "
            f"got {text!r}{missing}"
        )
    duration_ms = Decimal(found[1]) * UNITS_MS[found[2]]
    if duration_ms != int(duration_ms):
        raise ConfigError(f"{name}: expected a whole number of milliseconds, got {text!r}")
    if duration_ms < minimum_ms:
        raise ConfigError(f"{name}: expected at least {minimum_ms}ms, got {text!r}")
    return int(duration_ms)
