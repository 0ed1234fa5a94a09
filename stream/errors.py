"""What can go wrong while streaming, separated by what the caller does about it.

TsdiffError
├── StreamError            stop: the message says what to mend
│   └── TopicError         a topic is missing or unfit
├── RetryableError         rewind to the last commit and go on
└── DecodeError            reject this record: it goes to the dead letters
"""

from tsdiff.errors import TsdiffError


class StreamError(TsdiffError):
    """The service cannot go on as configured."""


class TopicError(StreamError):
    """A topic does not exist, or does not fit its use."""


class RetryableError(TsdiffError):
    """The broker failed us; nothing was committed, so the batch is read again."""


class DecodeError(TsdiffError):
    """A record that cannot be read; `reason` is one of a few short names, bounded for metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
