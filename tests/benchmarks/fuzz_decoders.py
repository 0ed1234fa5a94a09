"""Every input format's decoder, fed by a coverage-guided fuzzer (atheris, which is libFuzzer).

    python -m tests.benchmarks.fuzz_decoders --seconds 3600

A message is either read, into readings that can be keyed, printed and put into columns, or refused
with a `DecodeError` of a known reason. Any other exception, ten seconds for one message, or 2 GB of
memory end the run; the message that did it is then in the current folder. All formats take turns:
the first byte of an input chooses one.
"""

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--seconds", type=int, default=3600, help="how long at most")
    parser.add_argument("--runs", type=int, default=10_000_000, help="how many inputs at most")
    parser.add_argument("--corpus", type=Path, help="folder that keeps what was found interesting")
    options = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit(
            "expected the package atheris; pip install atheris (it has wheels for Linux and "
            f"CPython 3.11 to 3.13, this is {sys.version.split()[0]} on {sys.platform})"
        )
    with atheris.instrument_imports(include=["stream.formats", "json"]):
        from stream.codec import REASONS, Columns, rfc3339
        from stream.errors import DecodeError
        from stream.formats import FORMATS, make_decoder
        from tests.stream.payloads import examples

    names = sorted(FORMATS)
    decoders = [make_decoder(name) for name in names]

    def one_input(data: bytes) -> None:
        if not data:
            return
        try:
            readings = decoders[data[0] % len(decoders)](data[1:])
        except DecodeError as error:
            if error.reason not in REASONS or "\n" in str(error) or len(str(error)) > 2000:
                raise RuntimeError(f"not how one refuses: {error.reason} {error}") from error
            return
        for reading in readings:
            reading.entity.encode()
            rfc3339(reading.timestamp_ms)
            columns = Columns(tuple(reading.values))
            columns.add(reading, 0)
            columns.values()

    with tempfile.TemporaryDirectory() as seeds:
        for number, name in enumerate(names):
            (Path(seeds) / name).write_bytes(bytes([number]) + examples()[name])
        kept = [] if options.corpus is None else [str(options.corpus)]
        limits = [f"-max_total_time={options.seconds}", f"-runs={options.runs}"]
        limits += ["-timeout=10", "-rss_limit_mb=2048", "-max_len=4096", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *limits, *kept, seeds], one_input)
        atheris.Fuzz()


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the text above as it is, and tells defaults."""


if __name__ == "__main__":
    main()
