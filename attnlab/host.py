"""This machine: what it is called, what it has, and who else keeps it busy.

Nothing here names the host or its user: rows are published.
"""

import contextlib
import ctypes
import fcntl
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from attnlab.errors import InputError

TRAINING_LOCK = Path(tempfile.gettempdir()) / "attnlab-training.lock"
BUSY_CORES, BUSY_SHARE = 0.3, 0.05  # other processes above this, or this share of all cores, disturb a timing
LOAD_WINDOW_SECONDS = 0.1


def resolve_device(device: str = "auto") -> str:
    """Return "cpu" or "cuda"; "auto" takes CUDA where there is one. Raises ``InputError`` on CUDA asked for and absent,
    and on any other device."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not supported; valid: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("CUDA was asked for, but torch finds no CUDA device here; valid: cpu, auto")
    return device


def describe(device: str) -> dict[str, Any]:
    """What every row says of its machine and software: ``machine`` is the name of its folder of rows."""
    facts: dict[str, Any] = {
        "device": device,
        "processor": _processor(),
        "cores": _cores(),
        "capability": torch.backends.cpu.get_cpu_capability().lower(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "last_level_cache_bytes": _last_level_cache_bytes(),
        "threads": torch.get_num_threads(),
        "os": platform.system().lower(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(numpy.__version__),
    }
    name = f"{facts['processor']}-{facts['cores']}c-{facts['capability']}"
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        name = gpu.name
        facts |= {
            "processor": gpu.name,
            "capability": f"sm_{gpu.major}{gpu.minor}",
            "memory_bytes": gpu.total_memory,
            "last_level_cache_bytes": gpu.L2_cache_size,
            "cuda": str(torch.version.cuda),
            "driver": _driver(),
        }
    return {"machine": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), **facts}


def _processor() -> str:
    if platform.system() == "Linux":
        with contextlib.suppress(OSError):
            if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
                return re.sub(r"\s*(\(R\)|\(TM\)|CPU|Processor|@.*|\d+-Core)\s*", " ", found[1]).strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Of all the CPU's last-level caches together: a large CPU has one for every dozen cores. 32 MiB where the system
    does not say, which is large enough for a cold-cache rotation."""
    caches: dict[tuple[int, str], int] = {}
    for index in root.glob("cpu[0-9]*/cache/index*"):
        with contextlib.suppress(OSError, ValueError):
            level, cores, size = ((index / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
            caches[int(level), cores] = int(size.removesuffix("K")) * 1024
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or 32 * 2**20


def _driver() -> str:
    """The CUDA driver's interface version, as major.minor, asked of the driver itself."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


# --- who else keeps this machine busy ------------------------------------------------------------------------------


def training() -> contextlib.AbstractContextManager[None]:
    """Hold the training lock: timings on this machine refuse while it is held. Any number of trainings share it."""
    return _locked(fcntl.LOCK_SH)


def timing() -> contextlib.AbstractContextManager[None]:
    """Keep trainings out while timing; raises ``InputError`` if one is under way: each would spoil the other."""
    return _locked(fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def _locked(how: int) -> Iterator[None]:
    try:
        file = os.open(TRAINING_LOCK, os.O_RDONLY | os.O_CREAT, 0o644)
    except PermissionError:  # another user's, which Linux does not "create" in a shared folder; a lock need not write
        file = os.open(TRAINING_LOCK, os.O_RDONLY)
    with open(file):  # closed at the end, and with it the lock
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            remedy = "wait for it to end, or stop it"
            raise InputError(f"a training or another timing is running on this machine; {remedy}") from None
        yield


class Load:
    """Cores kept busy by *other* processes since ``Load()``: ``.cores()`` reads them, None on macOS."""

    def __init__(self) -> None:
        self._start, self._began = _busy_seconds(), time.monotonic()

    def cores(self) -> float | None:
        now = _busy_seconds()
        if now is None or self._start is None:
            return None
        elapsed = max(time.monotonic() - self._began, 1e-3)
        return round(max(0.0, (now - self._start) / elapsed), 3)


def wait_for_quiet(seconds: float = 10.0) -> str:
    """Wait until other processes leave the cores alone, at most ``seconds``; return "" or who still keeps them busy."""
    until = time.monotonic() + seconds
    while True:
        load, before = Load(), _process_seconds()
        time.sleep(LOAD_WINDOW_SECONDS)
        cores = load.cores()
        if cores is None or cores < max(BUSY_CORES, BUSY_SHARE * _cores()):
            return ""
        if time.monotonic() > until:
            spent = {process: after - before.get(process, after) for process, after in _process_seconds().items()}
            name, pid = max(spent, key=lambda process: spent[process], default=("?", 0))
            return f"{cores:.1f} cores kept busy by others, most by {name} ({pid})"


def _busy_seconds() -> float | None:
    """CPU seconds of every process but this one since boot; None where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq = map(int, fields[:7])
    mine = sum(os.times()[:2])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - mine


def _process_seconds() -> dict[tuple[str, int], float]:
    seconds: dict[tuple[str, int], float] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            head, _, rest = stat.read_text().rpartition(")")
            pid, name = head.split(" (", 1)
            if int(pid) != os.getpid():
                ticks = sum(map(int, rest.split()[11:13]))
                seconds[name, int(pid)] = ticks / os.sysconf("SC_CLK_TCK")
    return seconds
