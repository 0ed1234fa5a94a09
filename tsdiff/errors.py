"""The root of every error that tsdiff raises on purpose.

A message is one line: what was expected, what came, and what to do about it. The console script
prints it as it is and exits with status 1; anything else is a bug and keeps its traceback.
"""


class TsdiffError(Exception):
    """Something the user can mend."""


class ConfigError(TsdiffError):
    """A setting, option or argument that cannot be used as given (exit status 2)."""


class BundleError(TsdiffError):
    """A model bundle that is damaged, of a newer format, or does not fit its use."""


class HistoryError(TsdiffError):
    """Parquet history that cannot be read as telemetry."""
