"""The one way rows are written, read and checked.

A *run* is one execution of a set of points on one machine: a folder with ``machine.json`` (its description and roofs)
and ``rows.jsonl``, one JSON object a line. A row's identity is (run, key), the key being a hash of its configuration.
A row counts once its newline is on disk; what a kill left behind it is cut off and said. ``plan.txt`` holds the keys
that a run sets out to fill: only whole runs are published. Published runs lie in ``bench/results/<machine>/<run>/``, a
user's own in ``runs/<machine>/<run>/``.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlab.errors import InputError, write_whole

if TYPE_CHECKING:  # pandas costs 0.3 s to import; only load_results needs it
    import pandas

SCHEMA = 1
OURS, DYNAMIC, STATIC = "attnlab", "transformers-dynamic", "transformers-static"  # impl of kind "generate"
REPOSITORY = Path(__file__).resolve().parent.parent
PUBLISHED = REPOSITORY / "bench" / "results"
ROWS, MACHINE, PLAN = "rows.jsonl", "machine.json", "plan.txt"


def row_key(configuration: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that name a configuration, whatever the order of its fields."""
    canonical = json.dumps(configuration, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@functools.cache
def git_commit() -> str:
    """Short commit of the checkout that holds this library, "-dirty" where it was changed, "" outside a checkout."""
    return _git("describe", "--always", "--dirty", "--exclude=*")


def full_commit(name: str) -> str:
    """The forty digits of a commit, tag or branch of that checkout; "" where there is none of this ``name``."""
    return _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")


def _git(*arguments: str) -> str:
    if not (REPOSITORY / ".git").exists():  # installed inside some other checkout, whose commit is not ours
        return ""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class Run:
    """A run's folder, opened for writing by one process at a time. Opening reads what is there (``rows``, in order),
    cuts off a torn last line (``repaired`` says so) and takes a lock. Raises ``InputError`` on rows of another schema,
    damaged rows, an unwritable folder, or a second writer."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.name, self.repaired = self.folder.name, ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.folder / ROWS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._repair()
            self.rows = _read_rows(self.folder / ROWS)
        except BlockingIOError:
            holder = _holder(self._file)
            os.close(self._file)
            remedy = "wait for it, or give another folder"
            raise InputError(f"{self.folder} is being written by {holder}; {remedy}") from None
        except BaseException:
            os.close(self._file)
            raise
        self._by_key = {row["key"]: row for row in self.rows}

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._by_key[key]

    def append(self, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """Add one row under ``key`` and return it as stored, with schema, run, commit and time filled in. On disk
        entirely or not at all. Raises ``ValueError`` for a key already there, ``InputError`` on a full disk."""
        if key in self._by_key:
            raise ValueError(f"key {key} is already in {self.folder}")
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        full = {"schema": SCHEMA, "run": self.name, "key": key, **row, "commit": git_commit(), "time": stamp}
        line = json.dumps(full, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, end)
            safe = f"the {len(self.rows)} rows before are safe, rerun to go on"
            raise InputError(f"cannot write to {self.folder / ROWS}: {error.strerror}; {safe}") from None
        self.rows.append(full)
        self._by_key[key] = full
        return full

    def plan(self, keys: Iterable[str]) -> None:
        """Add ``keys`` to what this run sets out to hold; ``publish`` refuses it until they are there."""
        write_whole(self.folder / PLAN, "\n".join(sorted(_planned(self.folder).union(keys))))

    def left(self) -> int:
        """How many planned rows are not there yet."""
        return len(_planned(self.folder) - self._by_key.keys())

    def _repair(self) -> None:
        content = (self.folder / ROWS).read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._file, whole)
            torn = len(content) - whole
            self.repaired = f"cut off a torn last line of {torn} bytes in {self.folder / ROWS}; its point is done again"


def _holder(file: int) -> str:
    """Who holds the lock on an open file, by number and command where Linux tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, process, where, *_ = line.split()
            if kind == "FLOCK" and where.endswith(f":{os.fstat(file).st_ino}"):
                command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                return f"process {process} ({' '.join(command.split())[:200]})"
    return "another process"


def _planned(folder: Path) -> set[str]:
    return set((folder / PLAN).read_text().split()) if (folder / PLAN).exists() else set()


def stored_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's folder, none where it has not begun."""
    return _read_rows(folder / ROWS) if (folder / ROWS).exists() else []


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Every whole row of ``path``; a torn last line is warned about and left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if lines.pop():
        warnings.warn(f"{path} ends in a torn line, which is left out", stacklevel=3)
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            schema, _, key = row["schema"], row["run"], str(row["key"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f"{where}: not a row of attnlab (a JSON object with schema, run and key)") from None
        if schema != SCHEMA:
            raise InputError(f"{where}: schema {schema!r}, this version reads schema {SCHEMA}")
        if key in rows:
            raise InputError(f"{where}: key {key} stands there twice")
        rows[key] = row
    return list(rows.values())


def load_results(path: Path | str | None = None) -> "pandas.DataFrame":
    """Every row below ``path`` (a run, a machine's folder or a whole tree; the published rows if None), one a line.
    Nested fields become dotted columns: ``shape.n_kv_heads``, ``terms.bandwidth``. Raises ``InputError`` if the folder
    is absent, holds no rows, or holds rows of another schema."""
    import pandas

    root = PUBLISHED if path is None else Path(path)
    files = sorted(root.rglob(ROWS)) if root.is_dir() else []
    if not files:
        raise InputError(f"no {ROWS} at or below {root}; give a run's folder, or make one with: attnlab explore")
    rows = [row for file in files for row in _read_rows(file)]
    if not rows:
        raise InputError(f"{files[0]} holds no rows yet; let its run go on, for example with: attnlab explore")
    return pandas.json_normalize(rows)


def newest(rows: "pandas.DataFrame", kind: str, machine: str) -> "pandas.DataFrame":
    """The ``kind`` rows of the newest run of ``machine`` that has any; empty if none has. A tuning is no such run: it
    times one batch, and not every implementation."""
    chosen = rows[(rows["kind"] == kind) & (rows["machine"] == machine) & ~rows["run"].str.endswith("-tune")]
    return chosen[chosen["run"] == chosen["run"].max()]


def prediction_error(rows: "pandas.DataFrame") -> "pandas.Series":
    """|predicted − measured| / measured of each timed row."""
    return (rows["predicted"] - rows["median"]).abs() / rows["median"]


def headline() -> str:
    """The published machine that README and post show, from ``bench/results/headline.txt``."""
    try:
        return (PUBLISHED / "headline.txt").read_text(encoding="utf-8").strip()
    except OSError:
        raise InputError(f"no headline machine is published: {PUBLISHED / 'headline.txt'} is absent") from None


def run_folder(root: Path, machine: str, *, fresh: bool = False, suffix: str = "") -> Path:
    """The newest run of ``machine`` below ``root`` whose name ends in ``suffix``; else an unfinished published one, to
    be gone on with there; else a new one, named by UTC time."""

    def runs(tree: Path, file: str) -> list[Path]:
        folders = () if fresh else (tree / machine).glob(f"*{suffix}")
        return sorted(folder for folder in folders if (folder / file).exists())

    if old := runs(root, ROWS):
        return old[-1]
    if unfinished := runs(PUBLISHED, PLAN):
        return Path(shutil.copytree(unfinished[-1], root / machine / unfinished[-1].name))
    return root / machine / (time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + suffix)


def publish(run: Path, root: Path | None = None, partial: bool = False) -> Path:
    """Copy a finished run under ``root``/<machine>/ (``bench/results`` if None); return where it lies. A ``partial``
    one is published with its plan, and again as it grows. Raises ``InputError`` for a run that is there already, has
    no rows, lacks planned ones, or finds no room for all."""
    rows = stored_rows(run)
    if not rows:
        raise InputError(f"{run} is not a run: it has no {ROWS} with rows")
    planned = _planned(run)
    left = len(planned - {row["key"] for row in rows})
    if left and not partial:
        raise InputError(f"{run} is unfinished: {left} of {len(planned)} planned rows are missing; let it go on first")
    machine = str(rows[0].get("machine"))
    if not re.fullmatch(r"[a-z0-9-]+", machine):  # it becomes a folder's name
        raise InputError(f"{run / ROWS}, line 1: {machine!r} is not a machine's name")
    target = (root or PUBLISHED) / machine / run.resolve().name
    whole = (run / ROWS).read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    if target.exists():
        old = (target / ROWS).read_bytes()
        if not (target / PLAN).exists() or not whole.startswith(old):
            raise InputError(f"{target} is published already")
    new = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        (new / ROWS).write_bytes(whole)
        for name in (MACHINE, *([PLAN] if left else [])):
            if (run / name).exists():
                shutil.copyfile(run / name, new / name)
        if target.exists():  # only ever a beginning of the new one
            shutil.rmtree(target)
        new.rename(target)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise InputError(f"cannot write {target}: {error.strerror}") from None
    return target
