"""Who may import whom. Each rule is a function of a file's name and text, so that it can fail here.

stream -> tsdiff <- train       stream and train never meet; only tsdiff/cli.py looks outward
"""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest

from tests.conftest import ROOT

OURS = ("tsdiff", "train", "stream")
MAY_IMPORT = {"tsdiff": {"tsdiff"}, "train": {"train", "tsdiff"}, "stream": {"stream", "tsdiff"}}
OUTWARD = "tsdiff/cli.py"
FLAX = {"tsdiff/denoiser.py"}
DISK = {"tsdiff/bundle.py", "tsdiff/history.py"}
DISK_MODULES = {"pyarrow", "safetensors", "shutil", "tempfile", "pathlib", "sqlite3", "pickle"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
DISK_CALLS = {
    *("open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "makedirs"),
    *(
        "unlink",
        "rename",
        "rmtree",
        "rmdir",
        "save",
        "savez",
        "savez_compressed",
        "load",
        "loadtxt",
    ),
    *("memmap", "fromfile", "tofile", "touch"),
}
# Where the name to import is not the name to install.
DISTRIBUTIONS = {
    "kafka": "kafka-python",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "orbax": "orbax-checkpoint",
    "google": "protobuf",
    "opentelemetry": "opentelemetry-proto",
    # The two that pydantic-settings is built on.
    "pydantic": "pydantic-settings",
    "pydantic_core": "pydantic-settings",
}

Rule = Callable[[str, str], list[str]]


def imports(file: str, source: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield every module that `source` imports, by statement or by `import_module("...")`."""
    package = file.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module, node
            for alias in node.names:
                yield f"{module}.{alias.name}", node
        elif isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__"):
            argument = node.args[0] if node.args else None
            known = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            yield str(argument.value) if known and isinstance(argument, ast.Constant) else "?", node


def name_of(node: ast.AST) -> str:
    """Return the last name of `a`, `x.a` or `f(x).a`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def top_level(source: str, file: str) -> set[ast.AST]:
    """Return the nodes that run when a module is imported."""
    found: set[ast.AST] = set()
    waiting: list[ast.AST] = [ast.parse(source, file)]
    while waiting:
        node = waiting.pop()
        found.add(node)
        inner = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, inner)]
    return found


def direction(file: str, source: str) -> list[str]:
    """Keep stream -> tsdiff <- train; and nobody imports tests."""
    room = file.split("/", maxsplit=1)[0]
    early = {node.lineno for node in top_level(source, file) if isinstance(node, ast.stmt)}
    wrong = []
    for module, node in imports(file, source):
        target = module.split(".")[0]
        line = getattr(node, "lineno", 0)
        if file == OUTWARD and line not in early:
            continue  # The console script, inside a function: when called.
        if target == "?":
            wrong.append(f"{file}:{line} imports a module by a name that cannot be checked")
        elif target in {*OURS, "tests", "deploy"} - MAY_IMPORT[room]:
            wrong.append(f"{file}:{line} imports {module}")
    return wrong


def flax_in_one_place(file: str, source: str) -> list[str]:
    """Only the denoiser knows which library its network is written in."""
    if not file.startswith("tsdiff/") or file in FLAX:
        return []
    return [
        f"{file}:{getattr(node, 'lineno', 0)} imports {module}"
        for module, node in imports(file, source)
        if module.split(".")[0] == "flax"
    ]


def disk_in_two_places(file: str, source: str) -> list[str]:
    """Only bundles and history are read from, or written to, the disk."""
    if not file.startswith("tsdiff/") or file in DISK:
        return []
    wrong = [
        f"{file}:{getattr(node, 'lineno', 0)} imports {module}"
        for module, node in imports(file, source)
        if module.split(".")[0] in DISK_MODULES
    ]
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.Call) and name_of(node.func) in DISK_CALLS:
            quiet = bool(node.args) and ast.unparse(node.args[0]) == "os.devnull"
            if not quiet:
                wrong.append(f"{file}:{node.lineno} calls {ast.unparse(node.func)}")
    return wrong


def declared() -> set[str]:
    """Return what pyproject.toml says is to be installed, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = [re.match(r"[A-Za-z0-9._-]+", line) for line in wanted]
    return {name[0].lower().replace("_", "-") for name in names if name}


def everything_declared(file: str, source: str) -> list[str]:
    """What is imported is in pyproject.toml, so that a fresh installation works."""
    known = declared()
    modules = {
        module.split(".")[0] for module, _ in imports(file, source) if module and module != "?"
    }
    others = modules - set(sys.stdlib_module_names) - set(OURS)
    return [
        f"{file} imports {module}, which pyproject.toml does not mention"
        for module in sorted(others)
        if DISTRIBUTIONS.get(module, module).replace("_", "-") not in known
    ]


def nothing_runs_what_it_reads(file: str, source: str) -> list[str]:
    """Nothing that is read from a file, a bundle or a topic becomes code."""
    wrong = [
        f"{file}:{getattr(node, 'lineno', 0)} imports {module}"
        for module, node in imports(file, source)
        if module.split(".")[0] in PICKLES
    ]
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in {"eval", "exec"}:
                wrong.append(f"{file}:{node.lineno} calls {node.func.id}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            if not refused:
                wrong.append(f"{file}:{node.value.lineno} allows pickle")
    return wrong


RULES: list[Rule] = [
    direction,
    flax_in_one_place,
    disk_in_two_places,
    everything_declared,
    nothing_runs_what_it_reads,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rooms_are_kept_apart(rule: Rule) -> None:
    files = [file for room in OURS for file in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 10
    wrong = [
        line
        for file in files
        for line in rule(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_is_checked() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert rooms == set(OURS)


def test_the_exceptions_exist() -> None:
    for file in {OUTWARD, *FLAX, *DISK}:
        assert Path(ROOT / file).is_file(), file


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (direction, "tsdiff/a.py", "import train"),
        (direction, "tsdiff/a.py", "def f():\n    from stream.codec import decode"),
        (direction, "tsdiff/a.py", "import importlib\nimportlib.import_module('train.loop')"),
        (direction, "tsdiff/a.py", "name = 'x'\n__import__(name)"),
        (direction, "tsdiff/cli.py", "from train.loop import train"),
        (direction, "train/a.py", "import stream.codec as c"),
        (direction, "train/a.py", "if TYPE_CHECKING:\n    from stream import codec"),
        (direction, "train/deep/a.py", "from ...stream import codec"),
        (direction, "stream/a.py", "from train.config import TrainConfig"),
        (direction, "stream/a.py", "from tests.conftest import ROOT"),
        (flax_in_one_place, "tsdiff/anchor.py", "from flax import nnx"),
        (flax_in_one_place, "tsdiff/anchor.py", "def f():\n    import flax.nnx as nnx"),
        (disk_in_two_places, "tsdiff/detector.py", "open('x')"),
        (disk_in_two_places, "tsdiff/detector.py", "import os\nos.open('x', 0)"),
        (disk_in_two_places, "tsdiff/detector.py", "def f(path):\n    path.write_text('x')"),
        (disk_in_two_places, "tsdiff/detector.py", "import pyarrow.parquet as pq"),
        (disk_in_two_places, "tsdiff/detector.py", "np.savez('x', a=1)"),
        (nothing_runs_what_it_reads, "tsdiff/bundle.py", "from pickle import loads"),
        (nothing_runs_what_it_reads, "tsdiff/bundle.py", "np.load('x', allow_pickle=True)"),
        (nothing_runs_what_it_reads, "stream/a.py", "eval(text)"),
        (everything_declared, "stream/a.py", "import left_pad"),
        (everything_declared, "stream/a.py", "def f():\n    import left_pad.right"),
    ],
)
def test_each_rule_can_fail(rule: Rule, file: str, source: str) -> None:
    assert rule(file, source)


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (direction, "tsdiff/a.py", "from tsdiff import anchor\nimport numpy.random"),
        (direction, "tsdiff/cli.py", "def f():\n    from train.loop import train"),
        (direction, "train/a.py", "from tsdiff.bundle import Bundle\nfrom .config import X"),
        (direction, "stream/a.py", "import streamlit, training"),
        (flax_in_one_place, "tsdiff/denoiser.py", "from flax import nnx"),
        (flax_in_one_place, "train/loop.py", "from flax import nnx"),
        (disk_in_two_places, "tsdiff/bundle.py", "open('x')"),
        (disk_in_two_places, "train/loop.py", "open('x')"),
        (disk_in_two_places, "tsdiff/cli.py", "import os\nos.open(os.devnull, os.O_WRONLY)"),
        (nothing_runs_what_it_reads, "tsdiff/a.py", "np.load('x', allow_pickle=False)"),
        (nothing_runs_what_it_reads, "tsdiff/a.py", "module.eval(x)"),
        (everything_declared, "stream/a.py", "import kafka, yaml, os.path, tsdiff.anchor"),
    ],
)
def test_each_rule_lets_pass_what_is_right(rule: Rule, file: str, source: str) -> None:
    assert rule(file, source) == []
