"""How much memory a process on the CPU may take, and what says so."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # control groups of version 1 say a number of this size where there is no limit


class Limit(NamedTuple):
    """size: bytes. name: what sets it. imposed: whether the system itself refuses more to a process."""

    size: int
    name: str
    imposed: bool


def memory_limit() -> Limit | None:
    """The smallest of the user's limits, of what the control group has left, and of what the machine has; None where
    the system says none of them."""
    found = []
    if resource is not None:
        for kind, name in ((resource.RLIMIT_AS, "ulimit -v (address space)"), (resource.RLIMIT_DATA, "ulimit -d")):
            if (size := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
                found.append(Limit(size, name, True))
    for size, name in ((left_in_group(), "left in the control group"), (available(), "available on this machine")):
        if size is not None:
            found.append(Limit(size, name, False))
    return min(found, default=None)


def impose(limit: Limit | None) -> None:
    """Let this process have no more than `limit`, where the system does not see to it: a machine whose memory is full
    would end other processes."""
    if limit is not None and not limit.imposed and resource is not None:
        with contextlib.suppress(OSError, ValueError):  # macOS
            resource.setrlimit(resource.RLIMIT_DATA, (limit.size, resource.getrlimit(resource.RLIMIT_DATA)[1]))


@contextlib.contextmanager
def within_memory(device_type: str) -> Iterator[None]:
    """While this lasts, what memory and swap have no room for is refused with an error: the system would give it, and
    end a process once it is used. Of work on a CPU alone: a GPU's libraries reserve addresses that they never use.
    """
    limit, own = memory_limit(), field_of(PROC / "self/status", "VmData:")
    if device_type != "cpu" or limit is None or limit.imposed or own is None or resource is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    most = own + limit.size + (field_of(PROC / "meminfo", "SwapFree:") or 0)
    resource.setrlimit(resource.RLIMIT_DATA, (min((most, *(each for each in before if each >= 0))), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def available() -> int | None:
    """Bytes that can be had without swapping."""
    return field_of(PROC / "meminfo", "MemAvailable:")


def peak_of_this_process() -> int:
    """Bytes that were in memory at once at most."""
    if (size := field_of(PROC / "self/status", "VmHWM:")) is not None:
        return size
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource is not None else 0  # macOS: bytes


def field_of(path: Path, name: str) -> int | None:
    """A field in kilobytes, as bytes."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
    return None


def left_in_group() -> int | None:
    """Bytes that the control group of this process, and those around it, have left; None without a limit."""
    rooms = []
    with contextlib.suppress(OSError, ValueError):
        for line in (PROC / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                names = "memory.max", "memory.current", "inactive_file"
                root = CGROUPS
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                root = CGROUPS / "memory"
            else:
                continue
            folder = root / path.strip("/")
            rooms += [room_in(each, *names) for each in (folder, *folder.parents) if each.is_relative_to(root)]
    return min((room for room in rooms if room is not None), default=None)


def room_in(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Limit less usage, where what files have cached and nobody reads counts as free."""
    try:
        most = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
    if most >= UNLIMITED:
        return None
    cached = 0
    with contextlib.suppress(OSError, ValueError):
        fields = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = next((int(value) for name, value in fields if name == reclaimable), 0)
    return max(0, most - used + cached)
