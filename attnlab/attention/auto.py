"""The arms that ``impl="auto"`` considers, best first: as measured on such a machine, or by a stated rule.

``tuned.json`` holds, for each capability (AVX2 without native bfloat16 ranks the arms otherwise than AVX-512 with it),
the seconds of every arm at some (kind, dtype, R, S). ``attnlab tune`` writes it from a run's rows. A call takes the
order of the nearest entry of its kind and dtype, and then the first arm that can run it. Where there is no entry: on a
CPU the C++ loop decodes and folded rows do the rest; on CUDA 16-bit calls without a mask go to SDPA, whose flash
backend shares heads itself, and others to folded rows, since ``enable_gqa`` falls to the math path for them.

    T query tokens   S key/value tokens   R query heads per KV head
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from attnlab.native import capability

TABLE = Path(__file__).with_name("tuned.json")


def ranked(q: Tensor, k: Tensor, causal: bool) -> tuple[str, ...]:
    """Names of implementations for this call, best first, the last of which takes every call."""
    T, S = q.shape[2], k.shape[2]
    flash = q.device.type == "cuda" and q.element_size() == 2 and (not causal or T in (1, S))
    kind, dtype = "decode" if T == 1 else "prefill", str(q.dtype).removeprefix("torch.")
    return _ranked(capability(q.device), kind, dtype, q.shape[1] // k.shape[1], round(math.log2(S)), flash)


def decodes(like: Tensor, group_size: int, context: int) -> str:
    """The first of ``ranked`` for a decode step of ``like``'s device and dtype on a CPU, R and S."""
    dtype = str(like.dtype).removeprefix("torch.")
    return _ranked(capability(like.device), "decode", dtype, group_size, round(math.log2(context)), False)[0]


@functools.lru_cache(4096)
def _ranked(able: str, kind: str, dtype: str, group_size: int, doublings: int, flash: bool) -> tuple[str, ...]:
    entries = [entry for entry in table().get(able, ()) if (entry["kind"], entry["dtype"]) == (kind, dtype)]
    if entries:
        seconds: dict[str, float] = min(entries, key=lambda entry: distance(entry, group_size, doublings))["seconds"]
        return (*sorted(seconds, key=lambda name: seconds[name]), "grouped")
    if flash and int(able[3:]) >= 80:  # older cards have no flash, and enable_gqa falls to the math path there too
        return "sdpa", "grouped"
    return ("cpp", "grouped") if kind == "decode" else ("grouped",)


def distance(entry: dict[str, Any], group_size: int, doublings: int) -> float:
    """How far a table's entry is from a call, in doublings of R and of S; ``doublings`` is log2 of S, rounded."""
    return abs(math.log2(entry["group_size"] / group_size)) + abs(math.log2(entry["context"]) - doublings)


@functools.cache
def table() -> dict[str, list[dict[str, Any]]]:
    """Capability -> measured entries, from ``tuned.json``."""
    return json.loads(TABLE.read_text(encoding="utf-8"))
