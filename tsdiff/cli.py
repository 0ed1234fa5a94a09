"""The console script `tsdiff`: it mounts the commands of `train` and `stream`.

Nothing of them is imported before it is called, so that `tsdiff --help` answers at once. This is
the only module that sees both sides. The demo, which streams and needs a model first, gets
training handed in: `ctx.obj.train` (see `Tools`).
"""

import importlib
import os
import select
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
import typer.core
import typer.main

from tsdiff.errors import ConfigError, TsdiffError

if TYPE_CHECKING:
    from tsdiff.bundle import Bundle
    from tsdiff.history import History

# Older typer uses click, newer typer a copy of its own; these are right in both.
UsageError: type[Any] = typer.BadParameter.__mro__[1]
ClickException: type[Any] = typer.BadParameter.__mro__[2]


@dataclass(frozen=True)
class Command:
    """Where a command is found; `extra` is what to install when one of its packages is missing.

    The function's parameters are its options and arguments, annotated for typer. It may return an
    exit status.
    """

    module: str
    function: str
    help: str
    extra: str = ""


COMMANDS: dict[str, Command] = {
    "demo": Command("stream.cli", "demo", "Everything in one process, on simulated data.", "demo"),
    "train": Command("train.cli", "train", "Learn a model bundle from history.", "train"),
    "run": Command("stream.cli", "run", "Score a Kafka topic live."),
    "backfill": Command("stream.cli", "backfill", "Score history: to Parquet, to Prometheus."),
    "replay": Command("stream.cli", "replay", "Send history to a Kafka topic."),
    "doctor": Command("stream.cli", "doctor", "Try everything before it is needed."),
    "rekey": Command("stream.cli", "rekey", "Key a topic's messages by entity, in another topic."),
    "evaluate": Command(
        "train.evaluate_cli", "evaluate", "Compare detectors on labelled data.", "eval"
    ),
    "inspect": Command("train.cli", "inspect", "A bundle in words; history in a picture.", "train"),
    "bench": Command("stream.cli", "bench", "Measure speed and memory on this machine.", "train"),
}


class Train(Protocol):
    """Training, as a command of `stream` may call it without importing `train`."""

    def __call__(self, history: "History", *, period_ms: int, **settings: Any) -> "Bundle":  # noqa: ANN401
        """Make a bundle; `settings` are the fields of `train.config.TrainConfig`."""
        ...


@dataclass(frozen=True)
class Tools:
    """What a command finds in `ctx.obj`, when it takes a `typer.Context`."""

    train: Train
    debug: bool = False


def _train(history: "History", *, period_ms: int, **settings: Any) -> "Bundle":  # noqa: ANN401
    from train.config import TrainConfig
    from train.loop import train

    return train(history, TrainConfig(**settings), period_ms=period_ms)


class _Passed(Exception):
    """Carries an exception past typer, which has ideas of its own about some of them."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


class LazyGroup(typer.core.TyperGroup):
    """Lists commands by their one line each, and imports only the one that is called."""

    def __init__(self, **attributes: Any) -> None:  # noqa: ANN401
        super().__init__(**attributes)
        for name, entry in COMMANDS.items():
            self.add_command(typer.core.TyperCommand(name=name, help=entry.help), name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401  (click's types)
        """Replace the one line that was found by the command itself."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = _load(name, COMMANDS[name])
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        """Run the command; typer must not swallow a broken socket as if it were our output."""
        try:
            return super().invoke(ctx)
        except (OSError, EOFError, KeyboardInterrupt) as error:
            raise _Passed(error) from error


def _load(name: str, entry: Command) -> Any:  # noqa: ANN401
    """Import a command and turn its function into one that typer can call."""
    try:
        function = getattr(importlib.import_module(entry.module), entry.function)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "tsdiff", "train", "stream"):
            raise
        extra = f"[{entry.extra}]" if entry.extra else ""
        raise TsdiffError(
            f"`tsdiff {name}` needs the package {package}, which is not installed; "
            f"install it with: pip install 'tsdiff{extra}'"
        ) from error
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name)(function)
    command = typer.main.get_command(app)
    command.name = name
    return command


def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Watch multivariate telemetry on Kafka with a diffusion model.

    Start with `tsdiff demo`, or with `tsdiff train --help`.
    """
    if version:
        typer.echo(f"tsdiff {_version()}")
        raise typer.Exit
    ctx.obj = Tools(train=_train, debug=debug)
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(2)


def use_one_blas_thread() -> None:
    """Let NumPy's linear algebra run on the thread that calls it, unless the environment says else.

    Anchors are refitted by products too small to gain by more, and OpenBLAS's threads wait for one
    another by spinning: beside another busy process, or with fewer cores than the machine shows (a
    container's quota), a refit took three times as long, and one in a hundred twenty times.

    Before NumPy is imported, since that is when it reads this.
    """
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("tsdiff")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console script and return its exit status.

    0 fine, 1 ran and failed, 2 wrong usage or configuration, 130 interrupted.
    """
    use_one_blas_thread()
    args = list(sys.argv[1:] if arguments is None else arguments)
    # Whoever adds --debug to a line that failed adds it at the end; typer wants it first.
    end = args.index("--") if "--" in args else len(args)
    debug = "--debug" in args[:end]
    if debug:
        args = ["--debug", *(word for word in args[:end] if word != "--debug"), *args[end:]]
    app = typer.Typer(cls=LazyGroup, rich_markup_mode=None, invoke_without_command=True)
    app.callback()(_root)
    try:
        try:
            answer = typer.main.get_command(app).main(args, "tsdiff", standalone_mode=False)
            sys.stdout.flush()
        except _Passed as passed:
            raise passed.error from None
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        return _report(error, debug)
    return answer if isinstance(answer, int) else 0


def _report(error: BaseException, debug: bool) -> int:
    """Say what went wrong in one line on standard error; return the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError) and _output_is_gone():
        return 1
    if debug and not isinstance(error, ClickException):
        traceback.print_exception(error)
    status, said = _describe(error)
    print("error:", " ".join(said.split()), file=sys.stderr)
    return status


def _describe(error: BaseException) -> tuple[int, str]:
    if isinstance(error, TsdiffError):
        return (2 if isinstance(error, ConfigError) else 1), str(error)
    if isinstance(error, ClickException):
        said = error.format_message().rstrip(".")
        path = error.ctx.command_path if isinstance(error, UsageError) and error.ctx else "tsdiff"
        return error.exit_code, f"{said}; see {path} --help"
    if isinstance(error, typer.Abort):
        return 1, "aborted"
    name = type(error).__name__
    return 1, f"internal error: {name}: {error}; run again with --debug for the traceback"


def _output_is_gone() -> bool:
    """Whether nobody reads our standard output any more (`| head`); if so, quiet it for good."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # Not a file at all.
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        return False
    # Python flushes once more at exit, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


if __name__ == "__main__":
    sys.exit(main())
