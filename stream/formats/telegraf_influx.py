r"""InfluxDB's line protocol, as Telegraf writes it (`data_format = "influx"`): a reading a line.

    cpu,cpu=cpu0,host=web-17 usage_idle=97.5,usage_user=1i 1795435200000000000

docs.influxdata.com/influxdb/v1/write_protocols/line_protocol_reference. A channel is
`measurement.field` with the tags behind it. Text fields are no channels; true is 1 and false is 0.
Times are nanoseconds; coarser ones are told by their size. A line without one is refused: the
moment at which we read it is not when it was measured.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from stream.errors import DecodeError
from stream.formats.base import Decoded, Decoder, Naming, Readings, guessed_ms

# Every loop is possessive: what does not fit is refused in one pass, however it was made.
_LINE: Final = re.compile(
    r"((?:[^,\s\\]|\\.)++)((?:,(?:[^,\s\\]|\\.)++)*+)[ ]++"  # measurement and tags
    r"((?:[^\s\\\"]|\\.|\"(?:[^\"\\]|\\.)*+\")++)"  # fields; only their text may hold line ends
    r"(?:[ ]++([+-]?\d++))?[ ]*+(?:\r?\n|\Z)",
    re.DOTALL | re.ASCII,
)
_SKIPPED: Final = re.compile(r"(?:\s++|#[^\n]*+)++")
_PART: Final = re.compile(r"(?:[^,\\]|\\.)++", re.DOTALL)
_PAIR: Final = re.compile(r"((?:[^=\\]|\\.)++)=(.++)", re.DOTALL)
_FIELD: Final = re.compile(
    r"((?:[^,=\\\"]|\\.)++)=(\"(?:[^\"\\]|\\.)*+\"|[^,\s\"\\]++)(?:,|\Z)", re.DOTALL
)
_ESCAPED: Final = re.compile(r"\\([,= ])")
_NUMBER: Final = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[iu]?", re.ASCII)
_WORDS: Final = {
    **dict.fromkeys(("t", "T", "true", "True", "TRUE"), 1.0),
    **dict.fromkeys(("f", "F", "false", "False", "FALSE"), 0.0),
    # Not of the protocol, but not worth losing a line's other fields for.
    **dict.fromkeys(("NaN", "nan", "+Inf", "-Inf", "Inf"), None),
}
# Longer than any 64-bit integer or shortest float; Python's own limit is the next one.
_LONGEST_NUMBER: Final = 400

_Line = tuple[str, dict[str, str], list[tuple[str, str]], str | None]


def make(naming: Naming) -> Decoder:
    """Return a decoder that names things so."""

    def decode(value: bytes) -> Sequence[Decoded]:
        try:
            text = value.decode()
        except UnicodeDecodeError as error:
            raise DecodeError(
                "malformed", f"expected line protocol in UTF-8, got: {error}"
            ) from None
        found = Readings()
        # Quotes and escapes are rare, and splitting is several times faster than matching.
        for line in _plain_lines(text) if '"' not in text and "\\" not in text else _lines(text):
            measurement, tags, fields, timestamp = line
            if timestamp is None:
                raise DecodeError(
                    "bad_timestamp",
                    "expected a timestamp at the end of each line, got none in a line of "
                    f"{measurement[:60]!r}",
                )
            values = found.at(naming.entity_of(tags), guessed_ms(int(timestamp)))
            suffix = naming.suffix(tags)
            for field, written in fields:
                if written[0] != '"':
                    values[f"{measurement}.{field}{suffix}"] = _number(written)
        readings = found.all()
        if not readings:
            raise DecodeError("malformed", "expected at least one line of line protocol, got none")
        return readings

    return decode


def _plain_lines(text: str) -> Iterator[_Line]:
    for line in text.split("\n"):
        parts = line.split()
        if not parts or parts[0][0] == "#":
            continue
        if not 2 <= len(parts) <= 3:
            raise _refusal(line)
        measurement, *tags = parts[0].split(",")
        try:
            named = dict([tag.split("=", 1) for tag in tags])
            fields = [field.split("=", 1) for field in parts[1].split(",")]
            pairs = [(key, written) for key, written in fields if key and written]
        except ValueError:
            raise _refusal(line) from None
        timestamp = parts[2] if len(parts) == 3 else None
        if len(pairs) < len(fields) or not measurement or not _is_integer(timestamp):
            raise _refusal(line)
        yield measurement, named, pairs, timestamp


def _is_integer(timestamp: str | None) -> bool:
    if timestamp is None:
        return True
    digits = timestamp.lstrip("+-") if len(timestamp) < 40 else ""
    return digits.isascii() and digits.isdigit() and len(timestamp) - len(digits) < 2


def _lines(text: str) -> Iterator[_Line]:
    at = 0
    while at < len(text):
        skipped = _SKIPPED.match(text, at)
        if skipped:
            at = skipped.end()
            continue
        match = _LINE.match(text, at)
        if match is None:
            raise _refusal(text[at:])
        at = match.end()
        measurement, tags, fields, timestamp = match.groups()
        if not _is_integer(timestamp):
            raise _refusal(match[0])
        named = {}
        for tag in _PART.findall(tags):
            pair = _PAIR.fullmatch(tag)
            if pair is None:
                raise _refusal(match[0])
            named[_plain(pair[1])] = _plain(pair[2])
        yield _plain(measurement), named, list(_fields(fields)), timestamp


def _fields(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        match = _FIELD.match(text, at)
        if match is None:
            raise _refusal(text[at:])
        at = match.end()
        if at == len(text) and text[-1] == ",":
            raise _refusal(text)
        yield _plain(match[1]), match[2]


def _plain(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)


def _number(written: str) -> float | None:
    if written in _WORDS:
        return _WORDS[written]
    if len(written) > _LONGEST_NUMBER or not _NUMBER.fullmatch(written):
        raise DecodeError(
            "wrong_type",
            f"expected numbers, text in quotes or true and false as fields, got {written[:60]!r}",
        )
    return float(written.rstrip("iu"))


def _refusal(line: str) -> DecodeError:
    return DecodeError(
        "malformed",
        f"expected measurement[,tag=value] field=value[,field=value] timestamp, got {line[:80]!r}",
    )
