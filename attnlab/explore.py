"""The main job: describe the machine, prove every implementation, weigh the cache, time the grid. One run, resumable.

Everything becomes a row: ``correctness`` (worst error of an implementation over awkward shapes), ``memory`` (predicted
and allocated bytes of a cache), ``decode`` and ``prefill`` (a timed point). A killed job goes on where it stopped.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from attnlab import host
from attnlab.attention import attend, implementations, peers, supports
from attnlab.errors import InputError, check_choice, check_size, divisors
from attnlab.measure import (
    CUDA_ROTATION_BYTES,
    MEMORY_SHARE,
    Inputs,
    Point,
    measure_machine,
    measure_point,
    refreshed,
    relative_error,
    tolerance,
)
from attnlab.model.cache import KVCache
from attnlab.predict.machine import Machine
from attnlab.predict.memory import kv_cache_bytes
from attnlab.results import MACHINE, Run, row_key
from attnlab.shapes import dtype_name

DTYPES = ("float32", "bfloat16")
# (contexts, batches) of decoding and of prefill
_GRIDS = {
    ("quick", "cpu"): (((1024, 4096, 16384), (1, 4)), ((256, 512), (1,))),
    ("quick", "cuda"): (((1024, 4096, 16384), (1, 32)), ((1024, 4096), (1,))),
    ("full", "cpu"): (((1024, 2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8)), ((256, 512, 1024, 2048), (1, 4))),
    ("full", "cuda"): (((1024, 4096, 16384, 65536), (1, 8, 32, 128)), ((1024, 4096, 16384), (1, 4))),
}
Progress = Callable[[str, int, int], None]


def grid(name: str, device: str, dtypes: Iterable[str] = DTYPES, heads: int = 32, head_dim: int = 128) -> list[Point]:
    """The points of a sweep, those that share roofs (dtype, G) next to each other. Quick: G in {H, 8, 4, 1}; full:
    every divisor of H. Raises ``InputError`` on an unknown name or dtype."""
    check_choice("grid", name, ("quick", "full"))
    check_size("heads", heads)
    decode, prefill = _GRIDS[name, device]
    groups = [g for g in reversed(divisors(heads)) if name == "full" or g in {heads, 8, 4, 1}]
    return [
        Point(kind, heads, g, head_dim, batch, context, dtype_name(dtype))
        for dtype, g in itertools.product(dtypes, groups)
        for kind, (contexts, batches) in (("decode", decode), ("prefill", prefill))
        for context, batch in itertools.product(contexts, batches)
    ]


def arms(also: Sequence[str] = ()) -> list[str]:
    """Every implementation, the peers in ``also``, and ``auto``."""
    return [*implementations(), *also, "auto"]


def named_peers(text: str) -> list[str]:
    """The peers that ``text`` names, with commas between, or "all" of them. Raises ``InputError`` on another name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return peers() if names == ["all"] else [check_choice("peer", name, peers()) for name in names]


def explore(
    run: Run, points: list[Point], device: str, progress: Progress | None = None, also: Sequence[str] = ()
) -> Machine:
    """Fill ``run`` with every row that ``points`` ask for and it does not hold; return the machine it was measured on.
    The peers in ``also`` are proved and timed with the implementations, in turn with them. ``progress(what, done,
    total)`` is told before each step. The caller holds ``host.timing()``. Raises ``InputError`` if the run was begun on
    another machine; ``AssertionError`` where an output is wrong."""
    facts = host.describe(device)
    dtypes = tuple(dict.fromkeys(point.dtype for point in points))
    proofs = list(itertools.product(arms(also)[:-1], dtypes))
    caches = [point for point in points if point.kind == "decode"]
    total = len(proofs) + len(caches) + len(points)
    tell = progress or (lambda *_: None)
    tell("roofs of this machine", 0, total)
    machine = machine_of(run, device, facts["machine"], dtypes)
    run.plan(planned(points, device, also))
    for done, (impl, dtype) in enumerate(proofs):
        tell(f"correctness {impl} {dtype}", done, total)
        proof = _proof(impl, dtype, device)
        if (key := row_key(proof)) not in run:
            run.append(key, {**facts, **proof, **_correctness(impl, dtype, device)})
    for done, point in enumerate(caches, len(proofs)):
        tell(f"cache bytes {point.label}", done, total)
        cache = _cache(point, device)
        if (key := row_key(cache)) not in run:
            run.append(key, {**facts, **cache, **_cache_bytes(point, device, machine.memory_bytes)})
    inputs, roofs = new_inputs(facts), dict[tuple[str, int], Machine]()
    for done, point in enumerate(points, len(proofs) + len(caches)):
        tell(point.label, done, total)
        if not _missing(run, point, device, also):
            continue
        group = point.dtype, point.n_kv_heads
        if group not in roofs:  # measured beside each group of points
            roofs = {group: refreshed(machine, point.dtype, point.head_dim)}
        fill_point(run, point, facts, inputs, roofs[group], also)
    return machine


def planned(points: list[Point], device: str, also: Sequence[str] = ()) -> list[str]:
    """The key of every row that ``explore`` fills for ``points``."""
    dtypes = dict.fromkeys(point.dtype for point in points)
    proofs = [_proof(impl, dtype, device) for impl, dtype in itertools.product(arms(also)[:-1], dtypes)]
    caches = [_cache(point, device) for point in points if point.kind == "decode"]
    calls = [point.configuration(arm, device) for point, arm in itertools.product(points, arms(also))]
    return [row_key(configuration) for configuration in (*proofs, *caches, *calls)]


def machine_of(run: Run, device: str, name: str, dtypes: tuple[str, ...]) -> Machine:
    """The machine as it was measured when ``run`` began, measured now if it has not. Raises ``InputError`` if that was
    another than ``name``."""
    path = run.folder / MACHINE
    if not path.exists():
        measure_machine(device, dtypes).save(path)
    machine = Machine.load(path)
    if machine.name != name:
        raise InputError(f"{run.folder} was begun on {machine.name}, this is {name}; start another run with --fresh")
    if missing := tuple(dtype for dtype in dtypes if dtype not in machine.matmul_rate):  # begun with other dtypes
        rates = measure_machine(device, missing).matmul_rate
        machine = replace(machine, matmul_rate={**machine.matmul_rate, **rates})
        machine.save(path)
    return machine


def new_inputs(facts: dict[str, Any]) -> Inputs:
    """Inputs that rotate past the last-level cache of the machine that ``facts`` describe."""
    size = CUDA_ROTATION_BYTES if facts["device"] == "cuda" else 2 * facts["last_level_cache_bytes"]
    return Inputs(facts["device"], size)


def fill_point(
    run: Run, point: Point, facts: dict[str, Any], inputs: Inputs, roofs: Machine, also: Sequence[str] = ()
) -> None:
    """Measure the arms of ``point`` that ``run`` does not hold, interleaved, and append a row for each."""
    for arm, row in measure_point(point, _missing(run, point, facts["device"], also), inputs, roofs):
        configuration = point.configuration(arm, facts["device"])
        run.append(row_key(configuration), {**facts, **configuration, **row})


def _missing(run: Run, point: Point, device: str, also: Sequence[str]) -> list[str]:
    return [arm for arm in arms(also) if row_key(point.configuration(arm, device)) not in run]


def _cache(point: Point, device: str) -> dict[str, Any]:
    return {**point.configuration("cache", device), "kind": "memory"}


def _cache_bytes(point: Point, device: str, memory_bytes: int) -> dict[str, Any]:
    """Allocate a cache of two layers at this point's sizes and compare its storage with the prediction."""
    shape = replace(point.shape, n_layers=2)
    predicted = kv_cache_bytes(shape, point.batch, point.context, point.dtype)
    row = {"status": "ok", "variant": shape.variant, "n_layers": shape.n_layers, "predicted_bytes": predicted}
    if predicted > MEMORY_SHARE * memory_bytes:
        return row | {"status": "too_big", "reason": f"needs {predicted} of {memory_bytes} bytes of memory"}
    allocated = KVCache(shape, point.batch, point.context, getattr(torch, point.dtype), device).nbytes
    if allocated != predicted:
        raise AssertionError(f"{point.label}: a cache of {allocated} bytes, predicted were {predicted}")
    return row | {"allocated_bytes": allocated}


def awkward_cases() -> Iterator[tuple[int, int, int, int, int, bool]]:
    """(H, G, D, T, S, causal): every divisor of 12 and 7, a single query, a past, no past; odd sizes throughout."""
    for heads, head_dim in ((12, 64), (7, 32)):
        lengths = ((1, 61), (3, 17), (37, 37))
        for groups, (T, S), causal in itertools.product(divisors(heads), lengths, (False, True)):
            yield heads, groups, head_dim, T, S, causal


def _proof(impl: str, dtype: str, device: str) -> dict[str, Any]:
    return {"kind": "correctness", "impl": impl, "dtype": dtype, "device": device}


def _correctness(impl: str, dtype: str, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    worst, cases, reason, allowed = 0.0, 0, "", tolerance(dtype)
    chosen = list(awkward_cases())[:: 5 if impl.startswith("flex") else 1]  # flex compiles for seconds at each
    for heads, groups, head_dim, T, S, causal in chosen:
        sizes = ((3, heads, T, head_dim), (3, groups, S, head_dim), (3, groups, S, head_dim))
        q, k, v = (torch.randn(size, generator=generator).to(device, getattr(torch, dtype)) for size in sizes)
        able, why = supports(impl, q, k, v, causal)
        if not able:
            reason = why
            continue
        output = attend(q, k, v, causal=causal, impl=impl)
        worst, cases = max(worst, relative_error(output, q, k, v, causal)), cases + 1
        if worst > allowed:
            where = f"H={heads} G={groups} D={head_dim} T={T} S={S} causal={causal}"
            raise AssertionError(f"{impl} {dtype}: error {worst:.2g} at {where}, at most {allowed:.2g} is allowed")
    status = {"status": "ok"} if cases else {"status": "unsupported", "reason": reason}
    return {**status, "cases": cases, "error": worst, "tolerance": allowed}
