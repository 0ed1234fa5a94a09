"""The console script: quick to answer, one line for every error, the right exit status."""

import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from typing import Annotated, Any

import pytest
import typer

from tests.conftest import ROOT
from tsdiff import cli
from tsdiff.errors import BundleError, ConfigError, TsdiffError

HEAVY = ("jax", "flax", "kafka", "pyarrow", "numpy", "pydantic", "rich")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Make a function the command `fake`."""

    def mount(function: Callable[..., Any]) -> None:
        module = types.ModuleType("fake_commands")
        module.__dict__["fake"] = function
        monkeypatch.setitem(sys.modules, "fake_commands", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake_commands", "fake", "Pretend."))

    return mount


def raising(error: BaseException) -> Callable[[], None]:
    def fake() -> None:
        raise error

    return fake


def start(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:  # noqa: ANN401
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
    )


# -- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "threads"), [({}, 1), ({"OPENBLAS_NUM_THREADS": "2"}, 2)])
def test_linear_algebra_has_one_thread_unless_asked_otherwise(
    asked: dict[str, str], threads: int
) -> None:
    inherited = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    code = (
        "from tsdiff.cli import main; main(['inspect', '/no/bundle'])\n"
        "from threadpoolctl import threadpool_info\n"
        "print({of['num_threads'] for of in threadpool_info() if of['user_api'] == 'blas'})"
    )
    with start(code, env=inherited | asked) as process:
        found, _ = process.communicate(timeout=60)
    assert found.strip() == str({min(threads, os.cpu_count() or 1)})


# -- help --------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, entry in cli.COMMANDS.items():
        assert any(line.split() == [name, *entry.help.split()] for line in lines), name


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from tsdiff.cli import main; status = main(['--help']);"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr);"
        "sys.exit(status)"
    )
    with start(code) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert error.strip() == "[]"


def test_help_answers_in_300_ms() -> None:
    # The best of a few: a busy machine may be slow once, a slow import is slow every time.
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        with start("from tsdiff.cli import main; main(['--help'])") as process:
            process.communicate(timeout=60)
        seconds.append(time.perf_counter() - begun)
        if seconds[-1] < 0.3:
            break
    assert min(seconds) < 0.3


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tsdiff ")


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0, capsys.readouterr().err
    assert f"Usage: tsdiff {name} " in capsys.readouterr().out


# -- calling -----------------------------------------------------------------------------------


def test_options_and_arguments_arrive(fake: Callable[..., None]) -> None:
    got: list[object] = []

    def command(
        path: str, times: Annotated[int, typer.Option(help="How often.")] = 1, fast: bool = False
    ) -> None:
        got.extend([path, times, fast])

    fake(command)
    assert cli.main(["fake", "x", "--times", "3", "--fast"]) == 0
    assert got == ["x", 3, True]


@pytest.mark.parametrize(("answer", "status"), [(None, 0), (0, 0), (1, 1), (3, 3), ("text", 0)])
def test_a_returned_number_is_the_exit_status(
    fake: Callable[..., None], answer: object, status: int
) -> None:
    fake(lambda: answer)
    assert cli.main(["fake"]) == status


def test_exit_inside_a_command(fake: Callable[..., None]) -> None:
    fake(raising(typer.Exit(4)))
    assert cli.main(["fake"]) == 4


def test_training_is_handed_in(fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    config, loop = types.ModuleType("train.config"), types.ModuleType("train.loop")
    config.__dict__["TrainConfig"] = lambda **settings: settings

    def train(*args: object, **options: object) -> str:
        given.extend([*args, options])
        return "bundle"

    loop.__dict__["train"] = train
    monkeypatch.setitem(sys.modules, "train.config", config)
    monkeypatch.setitem(sys.modules, "train.loop", loop)

    def command(ctx: typer.Context) -> None:
        given.append(ctx.obj.train("history", period_ms=1000, seed=7))

    fake(command)
    assert cli.main(["fake"]) == 0
    assert given == ["history", {"seed": 7}, {"period_ms": 1000}, "bundle"]


# -- errors ------------------------------------------------------------------------------------

INTERNAL = "internal error: ValueError: two lines; run again with --debug for the traceback"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (TsdiffError("expected a, got b"), 1, "expected a, got b"),
        (BundleError("not a bundle"), 1, "not a bundle"),
        (ConfigError("expected a duration"), 2, "expected a duration"),
        (ValueError("two\nlines"), 1, INTERNAL),
        (typer.BadParameter("too small"), 2, "Invalid value: too small; see tsdiff fake --help"),
        (typer.Abort(), 1, "aborted"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_one_line(
    fake: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    said: str,
    debug: bool,
) -> None:
    fake(raising(error))
    assert cli.main(["fake", *(["--debug"] if debug else [])]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"error: {said}"
    if debug and not isinstance(error, typer.BadParameter):
        assert err.startswith("Traceback")
    else:
        assert err.count("\n") == 1


def test_debug_may_come_first(
    fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(raising(TsdiffError("no")))
    assert cli.main(["--debug", "fake"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_follows_two_hyphens_is_not_ours(fake: Callable[..., None]) -> None:
    got: list[str] = []

    def command(words: list[str]) -> None:
        got.extend(words)

    fake(command)
    assert cli.main(["fake", "--", "--debug"]) == 0
    assert got == ["--debug"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["--fast"], "No such option: --fast"),
        (["fake", "--fast"], "No such option: --fast"),
    ],
)
def test_wrong_usage_is_status_2(
    fake: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    fake(lambda: None)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_an_interrupt_is_quiet(
    fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(raising(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_broken_socket_is_not_taken_for_our_output(
    fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(raising(BrokenPipeError(32, "Broken pipe")))
    assert cli.main(["fake"]) == 1
    assert "internal error: BrokenPipeError" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_is_no_error(lines: int) -> None:
    # With one line the pipe breaks at the last flush, with many in the middle of the command.
    code = f"""
import sys, types
from tsdiff import cli
module = types.ModuleType("fake_commands")
def fake() -> None:
    sys.stdin.readline()
    for number in range({lines}):
        print("line", number)
module.fake = fake
sys.modules["fake_commands"] = module
cli.COMMANDS["fake"] = cli.Command("fake_commands", "fake", "Pretend.")
sys.exit(cli.main(["fake"]))
"""
    with start(code, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write("go\n")
        process.stdin.close()
        error = process.stderr.read()
        assert process.wait(60) == 1
    assert error == ""


def test_a_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        cli.COMMANDS, "fake", cli.Command("no_such_package.deep", "fake", "Pretend.", "train")
    )
    assert cli.main(["fake"]) == 1
    assert capsys.readouterr().err == (
        "error: `tsdiff fake` needs the package no_such_package, which is not installed; "
        "install it with: pip install 'tsdiff[train]'\n"
    )


def test_completion_knows_the_commands() -> None:
    environment = {
        **os.environ,
        "_TSDIFF_COMPLETE": "complete_bash",
        "COMP_WORDS": "tsdiff in",
        "COMP_CWORD": "1",
    }
    with start("from tsdiff.cli import main; main([])", env=environment) as process:
        out, _ = process.communicate(timeout=60)
    assert out.split() == ["inspect"]
