"""The limit of memory, in the file systems of both versions of cgroups."""

from pathlib import Path

import pytest

from stream.memory import memory_limit_bytes

MIB = 1 << 20


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 1000 MiB."""
    sizes = {"SC_PHYS_PAGES": 256_000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)


CASES = {
    "version 2, in a container": (
        "0::/\n",
        {"memory.max": "300000000\n"},
        300_000_000,
    ),
    "version 2, the cgroup above is tighter": (
        "0::/app.slice/tsdiff.service\n",
        {"app.slice/tsdiff.service/memory.max": "max\n", "app.slice/memory.max": f"{64 * MIB}\n"},
        64 * MIB,
    ),
    "version 2, no limit": (
        "0::/a\n",
        {"a/memory.max": "max\n"},
        1000 * MIB,
    ),
    "version 1, the path is the host's": (
        "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n",
        {"memory/memory.limit_in_bytes": f"{128 * MIB}\n"},
        128 * MIB,
    ),
    "version 1, no limit": (
        "4:memory:/\n",
        {"memory/memory.limit_in_bytes": "9223372036854771712\n"},
        1000 * MIB,
    ),
    "a path outside of the namespace": (
        "0::/../other\n",
        {"memory.max": f"{32 * MIB}\n"},
        32 * MIB,
    ),
}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", CASES)
def test_the_least_limit_holds(case: str, tmp_path: Path) -> None:
    cgroup, files, expected = CASES[case]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert memory_limit_bytes(tmp_path) == expected


@pytest.mark.usefixtures("machine")
def test_without_proc_it_is_the_machine(tmp_path: Path) -> None:
    assert memory_limit_bytes(tmp_path) == 1000 * MIB


def test_here_it_is_something() -> None:
    assert memory_limit_bytes() > 64 * MIB
