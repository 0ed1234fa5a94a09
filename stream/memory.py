"""How much memory a process may use, and the most that it ever held."""

import os
from pathlib import Path

_CGROUPS = "sys/fs/cgroup"


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """Return the bytes after which the kernel ends this process; `root` is the file system's.

    It is the least of the limits of its cgroups and of the machine's own memory.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return limits[0]  # no Linux, or no /proc
    for line in lines:
        # hierarchy:controllers:path; version 2 names no controllers.
        _, controllers, path = line.split(":", 2)
        if not controllers:
            limits += _limits(root / _CGROUPS, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits(root / _CGROUPS / "memory", path, "memory.limit_in_bytes")
    return min(limits)


def _limits(mount: Path, path: str, name: str) -> list[int]:
    """Limits of a cgroup and of all above it, each of which holds.

    In a container the path may be the host's while the mount shows the container's own cgroup;
    then only the topmost file exists, and is the right one.
    """
    parts = [part for part in path.split("/") if part not in ("", "..")]
    found = []
    for depth in range(len(parts), -1, -1):
        try:
            text = mount.joinpath(*parts[:depth], name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # version 2 writes "max" for none
            found.append(int(text))
    return found


def peak_memory_bytes(pid: int | None = None) -> int | None:
    """Return the most memory that a process (None: this one) held; None where nobody tells (/proc).

    See proc(5), VmHWM: other than getrusage it does not count what the parent held.
    """
    try:
        status = Path(f"/proc/{'self' if pid is None else pid}/status").read_text(encoding="ascii")
    except OSError:
        return None
    lines = status.splitlines()
    return next((1024 * int(row.split()[1]) for row in lines if row.startswith("VmHWM")), None)
