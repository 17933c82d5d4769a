"""How much memory this process may still take."""

from contextlib import suppress
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
# The limit and the use of the group of processes that this one is in, in both versions of Linux.
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def free_memory() -> int | None:
    """Return the bytes that are free here, or None where the system does not say."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = (line.split() for line in _MEMINFO.read_text().splitlines())
        found += [int(line[1]) * 1024 for line in lines if line and line[0] == "MemAvailable:"]
    for limit, used in _GROUPS:
        # A group without a limit says "max".
        with suppress(OSError, ValueError):
            found.append(max(0, int(limit.read_text()) - int(used.read_text())))
    return min(found, default=None)
