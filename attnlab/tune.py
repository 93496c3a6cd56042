"""What ``auto`` goes by: every contender timed on a small grid, the table of this machine's capability written from it.

T query tokens   S context   R query heads per KV head
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnlab import host
from attnlab.attention import auto, implementations
from attnlab.errors import InputError, write_whole
from attnlab.explore import machine_of, new_inputs
from attnlab.measure import Point, measure_point, refreshed
from attnlab.native import capability
from attnlab.results import Run, row_key

# No contenders: the oracle, and what sharing heads is compared with.
CONTENDERS = [name for name in implementations() if name not in ("reference", "expanded")]
DTYPES = ("float32", "bfloat16", "float16")
_CONTEXTS = {"decode": (128, 512, 2048, 8192), "prefill": (128, 512, 2048)}


def points() -> list[Point]:
    """One sequence, H = 32, D = 128, from R = 1 to 32; decoding and prefill."""
    return [
        Point(kind, 32, g, 128, 1, context, dtype)
        for dtype, g in itertools.product(DTYPES, (32, 8, 4, 1))
        for kind, contexts in _CONTEXTS.items()
        for context in contexts
    ]


def tune(run: Run, device: str, progress: Callable[[str, int, int], None]) -> None:
    """Fill ``run`` with a row for every contender at every point that it does not hold yet. The caller holds
    ``host.timing()``."""
    facts, grid = host.describe(device), points()
    keys = {(p, arm): row_key(p.configuration(arm, device)) for p, arm in itertools.product(grid, CONTENDERS)}
    run.plan(keys.values())
    inputs, machine = new_inputs(facts), machine_of(run, device, facts["machine"], DTYPES)
    roofs = {dtype: refreshed(machine, dtype) for dtype in DTYPES}
    for done, point in enumerate(grid):
        progress(point.label, done, len(grid))
        missing = [arm for arm in CONTENDERS if keys[point, arm] not in run]
        for arm, row in measure_point(point, missing, inputs, roofs[point.dtype]) if missing else ():
            run.append(keys[point, arm], {**facts, **point.configuration(arm, device), **row})


def entries(run: Run) -> list[dict[str, Any]]:
    """The table's entries from a run's rows: per (kind, dtype, R, S) the seconds of each arm that was timed."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in run.rows:
        if row["status"] == "ok":
            group_size = row["shape"]["n_heads"] // row["shape"]["n_kv_heads"]
            at = {"kind": row["kind"], "dtype": row["dtype"], "group_size": group_size, "context": row["context"]}
            entry = found.setdefault(tuple(at.values()), {**at, "seconds": {}})
            entry["seconds"][row["impl"]] = float(f"{row['median']:.3g}")
    return list(found.values())


def write(run: Run, device: str, path: Path = auto.TABLE) -> int:
    """Put ``run``'s entries into the table under this machine's capability, in place of those there; return how many.
    Other capabilities stay. Entirely or not at all; raises ``InputError`` for an unfinished run or an unwritable
    file."""
    if left := run.left():
        raise InputError(f"{run.folder} is unfinished: {left} rows are missing; run the same command again")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept[capability(torch.device(device))] = found = entries(run)
    blocks = (f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, kept[name])) + "\n ]" for name in sorted(kept))
    write_whole(path, "{\n" + ",\n".join(blocks) + "\n}\n")
    return len(found)
