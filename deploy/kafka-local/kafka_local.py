#!/usr/bin/env python3
"""Start, check and stop one real Apache Kafka node on this machine, without root or containers.

The command line around `KafkaLocal` (in `kafka_node.py`). Every node leaves a note of itself, so
that `status` and `stop` find it. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from kafka_node import HOST, KafkaLocal, KafkaLocalError, answers, kafka_version

__all__ = ["KafkaLocal", "KafkaLocalError", "answers", "main"]

DEFAULT_PORT = 9092


class Note:
    """What is written down of a node that runs, so that another command finds it."""

    def __init__(self, pid: int, port: int, folder: Path, temporary: bool) -> None:
        self.pid = pid
        self.port = port
        self.folder = folder
        self.temporary = temporary

    @staticmethod
    def dir() -> Path:
        """Name the folder of the notes, one file a port."""
        base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        return Path(base) / "tsdiff" / "kafka-local"

    @property
    def path(self) -> Path:
        """The file of this note."""
        return self.dir() / f"{self.port}.json"

    @property
    def alive(self) -> bool:
        """Whether the process still is this node, and not another that got its number."""
        return str(self.folder / "server.properties") in command_line(self.pid)

    def write(self) -> None:
        """Leave the note."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"pid": self.pid, "folder": str(self.folder), "temporary": self.temporary}
        self.path.write_text(json.dumps(facts), "utf-8")

    @classmethod
    def read_all(cls) -> Iterator[Note]:
        """Every note, in the order of the ports; what a dead node left is cleared away."""
        for path in sorted(cls.dir().glob("*.json")):
            try:
                facts = json.loads(path.read_text("utf-8"))
                folder, temporary = Path(facts["folder"]), bool(facts["temporary"])
                note = cls(int(facts["pid"]), int(path.stem), folder, temporary)
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if note.alive:
                yield note
            else:
                note.clear()

    def clear(self) -> None:
        """Remove the note, and the data if it was temporary."""
        self.path.unlink(missing_ok=True)
        if self.temporary:
            shutil.rmtree(self.folder, ignore_errors=True)


def command_line(pid: int) -> str:
    """Tell what process `pid` runs; empty where it does not exist, or only as a zombie."""
    proc = Path("/proc") / str(pid) / "cmdline"
    if proc.parent.parent.joinpath("self").exists():
        try:
            return proc.read_bytes().replace(b"\0", b" ").decode("utf-8", errors="replace")
        except OSError:
            return ""
    answer = subprocess.run(  # noqa: S603 - a fixed command
        ["/bin/ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return answer.stdout


def find_note(port: int | None) -> Note | None:
    """Find the note of the node at `port`, or of the only one that runs."""
    notes = [note for note in Note.read_all() if port is None or note.port == port]
    if len(notes) > 1:
        ports = ", ".join(str(note.port) for note in notes)
        raise KafkaLocalError(f"several nodes run (ports {ports}); say which one with --port")
    return notes[0] if notes else None


def say(text: str) -> None:
    """One line to standard error: standard output holds only what a script may want."""
    print(text, file=sys.stderr, flush=True)


def command_start(port: int, data: Path | None, detach: bool) -> int:
    """Start a node and, unless `detach`, stay until Ctrl-C, SIGTERM, or `stop` elsewhere."""

    def ask_to_stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ask_to_stop)
    node = KafkaLocal(port, data, detach=detach, log=say)
    begun = time.monotonic()
    note: Note | None = None
    try:
        node.start()
        note = Note(node.pid or 0, node.port, node.folder, node.temporary)
        note.write()
        say(f"Kafka {kafka_version()} answers after {time.monotonic() - begun:.1f} s")
        where = "temporary" if node.temporary else "kept"
        say(f"  pid {note.pid}, log {node.folder / 'kafka.log'}, data {where}")
        print(node.bootstrap_servers, flush=True)
        if detach:
            return 0
        say("  Ctrl-C stops it")
        status = node.wait()
    except KeyboardInterrupt:
        say("stopping")
        status = -signal.SIGTERM
    # Read before the folder goes. Java ends with 143 when SIGTERM asked it to.
    asked = status in (0, 143, -signal.SIGTERM, -signal.SIGKILL)
    tail = "" if asked or note is None else node.log_tail()
    node.stop()
    if note is not None:
        note.clear()
    if not asked:
        raise KafkaLocalError(f"the broker died (status {status}){tail}")
    return 0


def command_status(port: int | None) -> int:
    """Say which node runs and whether it answers; 1 where none does."""
    note = find_note(port)
    if note is None:
        say("not running" if port is None else f"not running on port {port}")
        return 1
    says = "answers" if answers(note.port) else "does not answer"
    print(f"{HOST}:{note.port} {says} (pid {note.pid}, folder {note.folder})")
    return 0 if says == "answers" else 1


def command_stop(port: int | None, timeout_seconds: float = 30.0) -> int:
    """Stop the node; 1 where none runs."""
    note = find_note(port)
    if note is None:
        say("not running" if port is None else f"not running on port {port}")
        return 1
    ends = [signal.SIGTERM, signal.SIGCONT] if not note.temporary else [signal.SIGKILL]
    deadline = time.monotonic() + timeout_seconds
    with contextlib.suppress(ProcessLookupError):
        for number in ends:
            os.kill(note.pid, number)
        while note.alive:
            if time.monotonic() > deadline:
                os.kill(note.pid, signal.SIGKILL)
            time.sleep(0.05)
    note.clear()
    say(f"stopped the node on port {note.port}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="kafka_local.py",
        description=f"One real Apache Kafka {kafka_version()} node on this machine.",
        epilog="example: kafka_local.py start --detach && kafka_local.py status; "
        "kafka_local.py stop",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def port_number(text: str) -> int:
        number = int(text) if text.isascii() and text.isdigit() else -1
        if not 0 <= number <= 65535:
            raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text!r}")
        return number

    about = "start a node, print its address, and stay until Ctrl-C (or --detach)"
    start = commands.add_parser("start", help=about, description=about)
    start.add_argument(
        "--port",
        type=port_number,
        default=DEFAULT_PORT,
        help=f"port to listen on; 0 = any free one (default {DEFAULT_PORT})",
    )
    start.add_argument(
        "--data",
        type=Path,
        help="keep the data in this folder, to start on it again (default: temporary)",
    )
    start.add_argument("--detach", action="store_true", help="return as soon as it answers")
    for name, about in (
        ("status", "say whether a node runs and answers (status 1 where not)"),
        ("stop", "stop the node that runs"),
    ):
        other = commands.add_parser(name, help=about, description=about)
        other.add_argument("--port", type=port_number, help="which node, where several run")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the console script: status 0 fine, 1 ran and failed, 2 wrong usage."""
    try:
        given = parse(arguments)
        if given.command == "start":
            return command_start(given.port, given.data, given.detach)
        if given.command == "status":
            return command_status(given.port)
        return command_stop(given.port)
    except (KafkaLocalError, OSError) as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
