"""The main job: describe the machine, prove every implementation, weigh the cache, time the grid. One run, resumable.

Everything becomes a row: ``correctness`` (worst error of an implementation over awkward shapes), ``memory`` (predicted
and allocated bytes of a cache), ``decode`` and ``prefill`` (a timed point). A killed job goes on where it stopped.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from attnlab import host
from attnlab.attention import attend, implementations, supports
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
from attnlab.shapes import ModelShape, dtype_name

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


def arms() -> list[str]:
    """Every implementation, and ``auto``."""
    return [*implementations(), "auto"]


def explore(run: Run, points: list[Point], device: str, progress: Progress | None = None) -> Machine:
    """Fill ``run`` with every row that ``points`` ask for and it does not hold; return the machine it was measured on.

    ``progress(what, done, total)`` is told before each step. The caller holds ``host.timing()``. Raises ``InputError``
    if the run was begun on another machine; ``AssertionError`` where an output is wrong.
    """
    facts = host.describe(device)
    dtypes = tuple(dict.fromkeys(point.dtype for point in points))
    proofs = list(itertools.product(implementations(), dtypes))
    caches = [point for point in points if point.kind == "decode"]
    total = len(proofs) + len(caches) + len(points)
    tell = progress or (lambda what, done, total: None)
    tell("roofs of this machine", 0, total)
    machine = _machine(run, device, facts["machine"], dtypes)
    for done, (impl, dtype) in enumerate(proofs):
        tell(f"correctness {impl} {dtype}", done, total)
        _correctness_row(run, impl, dtype, facts)
    for done, point in enumerate(caches, len(proofs)):
        tell(f"cache bytes {point.label}", done, total)
        _cache_row(run, point, facts, machine)
    _sweep(run, points, facts, machine, lambda what, done: tell(what, len(proofs) + len(caches) + done, total))
    return machine


def _machine(run: Run, device: str, name: str, dtypes: tuple[str, ...]) -> Machine:
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


def _sweep(
    run: Run, points: list[Point], facts: dict[str, Any], machine: Machine, tell: Callable[[str, int], None]
) -> None:
    inputs = new_inputs(facts)
    roofs: tuple[tuple[str, int], Machine] | None = None
    for done, point in enumerate(points):
        tell(point.label, done)
        if not _missing(run, point, facts["device"]):
            continue
        group = point.dtype, point.n_kv_heads
        if roofs is None or roofs[0] != group:  # measured beside each group of points
            roofs = group, refreshed(machine, point.dtype)
        fill_point(run, point, facts, inputs, roofs[1])


def new_inputs(facts: dict[str, Any]) -> Inputs:
    """Inputs that rotate past the last-level cache of the machine that ``facts`` describe."""
    return Inputs(
        facts["device"], CUDA_ROTATION_BYTES if facts["device"] == "cuda" else 2 * facts["last_level_cache_bytes"]
    )


def fill_point(run: Run, point: Point, facts: dict[str, Any], inputs: Inputs, roofs: Machine) -> None:
    """Measure the arms of ``point`` that ``run`` does not hold, interleaved, and append a row for each."""
    for arm, row in measure_point(point, _missing(run, point, facts["device"]), inputs, roofs):
        configuration = point.configuration(arm, facts["device"])
        run.append(row_key(configuration), {**facts, **configuration, **row})


def _missing(run: Run, point: Point, device: str) -> list[str]:
    return [arm for arm in arms() if row_key(point.configuration(arm, device)) not in run]


def _cache_row(run: Run, point: Point, facts: dict[str, Any], machine: Machine) -> None:
    """Allocate a cache of two layers at this point's sizes and compare its storage with the prediction."""
    shape = ModelShape(2, 1, point.n_heads, point.n_kv_heads, point.head_dim, 1, 1)
    configuration = {**point.configuration("cache", facts["device"]), "kind": "memory"}
    key = row_key(configuration)
    if key in run:
        return
    predicted = kv_cache_bytes(shape, point.batch, point.context, point.dtype)
    row: dict[str, Any] = {
        "status": "ok",
        "variant": shape.variant,
        "n_layers": shape.n_layers,
        "predicted_bytes": predicted,
    }
    if predicted > MEMORY_SHARE * machine.memory_bytes:
        row |= {"status": "too_big", "reason": f"needs {predicted} of {machine.memory_bytes} bytes of memory"}
    else:
        cache = KVCache(shape, point.batch, point.context, getattr(torch, point.dtype), facts["device"])
        row["allocated_bytes"] = cache.nbytes
        if cache.nbytes != predicted:
            raise AssertionError(f"{point.label}: a cache of {cache.nbytes} bytes, predicted were {predicted}")
    run.append(key, {**facts, **configuration, **row})


def awkward_cases() -> Iterator[tuple[int, int, int, int, int, bool]]:
    """(H, G, D, T, S, causal): every divisor of 12 and 7, a single query, a past, no past; odd sizes throughout."""
    for heads, head_dim in ((12, 64), (7, 32)):
        for groups in divisors(heads):
            for T, S in ((1, 61), (3, 17), (37, 37)):
                for causal in (False, True):
                    yield heads, groups, head_dim, T, S, causal


def _correctness_row(run: Run, impl: str, dtype: str, facts: dict[str, Any]) -> None:
    device = facts["device"]
    configuration = {"kind": "correctness", "impl": impl, "dtype": dtype, "device": device}
    key = row_key(configuration)
    if key in run:
        return
    generator = torch.Generator().manual_seed(1)
    worst, cases, reason = 0.0, 0, ""
    chosen = list(awkward_cases())[:: 5 if impl == "flex" else 1]  # flex compiles for seconds at each
    for heads, groups, head_dim, T, S, causal in chosen:
        sizes = ((3, heads, T, head_dim), (3, groups, S, head_dim), (3, groups, S, head_dim))
        q, k, v = (torch.randn(size, generator=generator).to(device, getattr(torch, dtype)) for size in sizes)
        able, why = supports(impl, q, k, v, causal)
        if not able:
            reason = why
            continue
        output = attend(q, k, v, causal=causal, impl=impl)
        worst, cases = max(worst, relative_error(output, q, k, v, causal)), cases + 1
        if worst > tolerance(dtype):
            where = f"H={heads} G={groups} D={head_dim} T={T} S={S} causal={causal}"
            raise AssertionError(
                f"{impl} {dtype}: error {worst:.2g} at {where}, at most {tolerance(dtype):.2g} is allowed"
            )
    row: dict[str, Any] = {
        "status": "ok" if cases else "unsupported",
        "cases": cases,
        "error": worst,
        "tolerance": tolerance(dtype),
    }
    run.append(key, {**facts, **configuration, **row, **({"reason": reason} if reason else {})})
