"""Durations with units."""

import pytest

from tsdiff.durations import parse_duration_ms
from tsdiff.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected_ms"),
    [
        ("250ms", 250),
        ("60s", 60_000),
        ("1.5s", 1_500),
        ("0.1s", 100),
        (" 5 m ", 300_000),
        ("1h", 3_600_000),
        ("7d", 604_800_000),
        ("0s", 0),
    ],
)
def test_reads_every_unit(text: str, expected_ms: int) -> None:
    assert parse_duration_ms(text) == expected_ms


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("60", "60s would be seconds"),
        ("", "such as 60s or 5m"),
        ("-5s", "such as 60s or 5m"),
        ("1h30m", "such as 60s or 5m"),
        ("5 minutes", "such as 60s or 5m"),
        ("5M", "such as 60s or 5m"),
        ("nan s", "such as 60s or 5m"),
        ("٣s", "such as 60s or 5m"),
        ("0.5ms", "whole number of milliseconds"),
    ],
)
def test_refuses_what_is_unclear(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_duration_ms(text, name="--period")
    message = str(caught.value)
    assert message.startswith("--period: expected ")
    assert repr(text) in message
    assert "\n" not in message


def test_a_minimum_is_kept() -> None:
    assert parse_duration_ms("1ms", minimum_ms=1) == 1
    with pytest.raises(ConfigError, match="at least 1ms, got '0s'"):
        parse_duration_ms("0s", minimum_ms=1)
