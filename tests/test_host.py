"""What a row says of its machine, and whether somebody else disturbs a timing: against real processes."""

import fcntl
import getpass
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from attnlab import host
from attnlab.errors import InputError

SPIN = "while True: pass"


@pytest.fixture(autouse=True)
def own_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine's real lock belongs to whoever is training or timing while the tests run."""
    monkeypatch.setattr(host, "TRAINING_LOCK", tmp_path / "training.lock")


@contextmanager
def spinning() -> Iterator[subprocess.Popen[bytes]]:
    """A process that keeps a core busy."""
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        time.sleep(0.1)  # past its start
        yield process
    finally:
        process.kill()
        process.wait()


# --- the machine ----------------------------------------------------------------------------------------------------


def test_rows_name_a_machine_and_nobody() -> None:
    """Rows are published; a host's name or a user's in one of them cannot be taken back."""
    facts = host.describe("cpu")
    said = " ".join(map(str, facts.values())).lower()
    names = {socket.gethostname(), socket.getfqdn(), platform.node(), getpass.getuser(), os.path.expanduser("~")}
    for name in names - {"", "localhost", "/"}:
        assert name.lower() not in said.split() and name.lower() not in facts["machine"].split("-"), name
    assert facts.keys() == {
        "machine",
        "device",
        "processor",
        "cores",
        "capability",
        "memory_bytes",
        "last_level_cache_bytes",
        "threads",
        "os",
        "python",
        "torch",
        "numpy",
    }


def test_a_description_says_what_the_system_says() -> None:
    """Memory in pages instead of bytes lets no point fit; a cache in KiB makes every rotation warm."""
    facts = host.describe("cpu")
    assert facts["device"] == "cpu"
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["python"] == platform.python_version()
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert 2**30 < facts["memory_bytes"] < 2**50
    assert 2**18 <= facts["last_level_cache_bytes"] < 2**34
    assert facts == host.describe("cpu")
    machine = facts["machine"]
    assert machine == machine.lower() and set(machine) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert f"-{facts['cores']}c-" in machine


def test_a_processors_name_is_free_of_advertising(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name becomes a folder's; clock rates and trademarks would make two machines of one."""
    lines = {
        "model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz": "Intel Xeon Platinum 8481C",
        "model name\t: AMD EPYC 7B13 64-Core Processor": "AMD EPYC 7B13",
        "model name\t: 13th Gen Intel(R) Core(TM) i7-1370P": "13th Gen Intel Core i7-1370P",
    }
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    for line, name in lines.items():
        monkeypatch.setattr(Path, "read_text", lambda self, line=line: f"processor\t: 0\n{line}\nflags\t: a b\n")
        assert host._processor() == name


def test_all_last_level_caches_count(tmp_path: Path) -> None:
    """A large CPU has one for every dozen cores: a rotation past a single one of them is still warm in the others."""
    for cpu, shared in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        for level, size, cores in ((1, "48K", str(cpu)), (2, "1024K", str(cpu)), (3, "32768K", shared)):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{level}"
            folder.mkdir(parents=True)
            for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", cores)):
                (folder / name).write_text(text + "\n")
    assert host._last_level_cache_bytes(tmp_path) == 2 * 32 * 2**20
    assert host._last_level_cache_bytes(tmp_path / "absent") == 32 * 2**20


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA asked for and absent must not end in torch's traceback, and above all not run on the CPU in silence."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert host.resolve_device("auto") == host.resolve_device("cpu") == "cpu"
    with pytest.raises(InputError, match="CUDA was asked for, but torch finds no CUDA device here; valid: cpu, auto"):
        host.resolve_device("cuda")
    with pytest.raises(InputError, match="device 'mps' is not supported; valid: auto, cpu, cuda"):
        host.resolve_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert host.resolve_device("auto") == host.resolve_device("cuda") == "cuda"
    assert host.resolve_device("cpu") == "cpu"


# --- the lock -------------------------------------------------------------------------------------------------------


def test_a_timing_refuses_while_a_training_runs() -> None:
    """Both at once: the timing is wrong and the training slow, and neither row says why."""
    with host.training(), pytest.raises(InputError, match="a training or another timing is running"), host.timing():
        raise AssertionError("timed beside a training")
    with host.timing(), pytest.raises(InputError, match="another timing is running"), host.timing():
        raise AssertionError("two timings at once")
    with host.timing():
        pass


def test_trainings_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock for one training alone would stop the second of two sweeps that fit beside each other."""
    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, how: real(file, how | fcntl.LOCK_NB))  # fail rather than wait
    with host.training(), host.training():
        pass


def test_the_lock_holds_between_processes_and_dies_with_them() -> None:
    """A lock that a kill leaves behind would refuse every timing until somebody finds and deletes a file."""
    code = f"import fcntl, sys; file = open({str(host.TRAINING_LOCK)!r}, 'a'); fcntl.flock(file, fcntl.LOCK_SH)"
    code += "; print('held', flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="a training or another timing is running"), host.timing():
            raise AssertionError("timed beside a training")
        process.kill()
        process.wait()
        with host.timing():
            pass


def test_another_users_lock_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shared /tmp Linux refuses to open for writing, or with O_CREAT, a file that belongs to somebody else: the
    second user of a machine could never time anything."""
    host.TRAINING_LOCK.touch()
    real = os.open

    def others(path: object, flags: int, *mode: int) -> int:
        if path == host.TRAINING_LOCK and flags != os.O_RDONLY:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *mode)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", others)
    with host.training(), pytest.raises(InputError, match="a training or another timing is running"), host.timing():
        raise AssertionError("timed beside a training")


# --- load -----------------------------------------------------------------------------------------------------------


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _others_seconds() -> float:
    """Processor seconds of all other processes since boot, ended ones too: the whole machine's less our own."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - _cpu_seconds(os.getpid())


if Path("/proc/stat").exists():  # elsewhere load is unknown: the last test

    def test_load_sees_another_process() -> None:
        """A row measured beside a busy process must say so: this is the only trace of it."""
        with spinning() as process:
            load, before, began = host.Load(), _cpu_seconds(process.pid), time.monotonic()
            while (used := _cpu_seconds(process.pid) - before) < 0.3:
                time.sleep(0.02)
            elapsed = time.monotonic() - began
            cores = load.cores()
        assert cores is not None and cores * elapsed > used - 0.05

    def test_load_is_not_our_own_work() -> None:
        """Our own threads are what is measured; counted as others' they would make every timing wait for itself."""
        work, enough = torch.ones(300, 300), time.process_time() + 0.5

        def spin() -> None:
            while time.process_time() < enough:
                work @ work

        threads = [threading.Thread(target=spin) for _ in range(2)]
        most = -_others_seconds(), -time.monotonic()  # the widest and the narrowest span around what Load counts
        load = host.Load()
        least = -_others_seconds(), -time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        least = least[0] + _others_seconds(), least[1] + time.monotonic()
        cores = load.cores()
        most = most[0] + _others_seconds(), most[1] + time.monotonic()
        assert cores is not None
        assert cores * most[1] > least[0] - 0.1
        assert cores * least[1] < most[0] + 0.1

    def test_waiting_for_quiet_ends_and_names_the_culprit(monkeypatch: pytest.MonkeyPatch) -> None:
        """A busy machine must slow a sweep down, not stop it, and who it was is the first question."""
        monkeypatch.setattr(host, "BUSY_CORES", 0.05)
        monkeypatch.setattr(host, "LOAD_WINDOW_SECONDS", 0.4)
        real = host._process_seconds
        with spinning() as process:
            # others may be busier than ours on a shared machine; beside our idle parent, ours is the culprit
            seen = {process.pid, os.getppid()}
            monkeypatch.setattr(
                host, "_process_seconds", lambda: {who: cpu for who, cpu in real().items() if who[1] in seen}
            )
            began = time.monotonic()
            said = host.wait_for_quiet(0.5)
            name = Path(f"/proc/{process.pid}/comm").read_text().strip()
        assert time.monotonic() - began < 5
        assert f" cores kept busy by others, most by {name} ({process.pid})" in said


def test_a_quiet_machine_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting the whole limit at every point would double the sweep on every idle machine."""
    monkeypatch.setattr(host, "BUSY_CORES", 1e9)
    began = time.monotonic()
    assert host.wait_for_quiet(60) == ""
    assert time.monotonic() - began < 10


def test_a_system_that_does_not_tell_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no /proc/stat: load is then unknown, not zero, and nothing may fail over it."""

    def absent(self: Path, *_: object) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", absent)
    load = host.Load()
    assert load.cores() is None
    assert host.wait_for_quiet(60) == ""
