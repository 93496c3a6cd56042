"""The one timing harness: the benchmarks and the command line both call it.

A point is one attention call at fixed sizes; its arms are implementations. Each arm is checked against the reference
before it is timed. Arms alternate (A B A B); K and V rotate through copies larger than the last-level cache, so that
every call reads from memory as a real decode step does; warm-up and prefill stay outside. On CUDA a sample is a
replayed graph of calls over its count, and the eager time, launches included, is kept beside it.

    B batch   T query tokens   S context   H query heads   G KV heads   D head_dim
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab import host
from attnlab.attention import attend, backend, picked, supports
from attnlab.measure import clock
from attnlab.measure.clock import event_seconds, interleaved
from attnlab.measure.point import Inputs, Point
from attnlab.measure.roofs import measure_machine, refreshed
from attnlab.measure.step import decode_step
from attnlab.predict.machine import Machine
from attnlab.predict.time import attention_bytes
from attnlab.shapes import dtype_name, element_bytes

__all__ = ["Inputs", "Point", "decode_step", "measure_machine", "measure_point", "refreshed"]

ROUNDS, SLOW_ROUNDS, SLOW_FACTOR = 20, 5, 10.0
ORACLE = "reference"  # what the others are checked against, not a contender: it gets as many rounds as a slow arm
IMPLAUSIBLE = 1.05  # a point above this fraction of its roof is measured again, then not believed
RETRIES = 3
MEMORY_SHARE = 0.6  # a point that needs more of the memory than this is not tried
QUERY_BLOCK = 512  # queries checked at a time
CUDA_ROTATION_BYTES = 300 * 10**6  # five times the L2 of the largest card


def tolerance(dtype: str) -> float:
    """Largest error, relative to the largest output, that still counts as the same mathematics."""
    epsilon = torch.finfo(getattr(torch, dtype)).eps
    return (4 if element_bytes(dtype) == 2 else 128) * epsilon


def relative_error(output: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """Largest deviation from the float64 reference over its largest magnitude, on the first and last (batch, group);
    infinite where the output is not a number. By blocks of queries, since the reference holds all scores at once."""
    group_size, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    worst = 0.0
    for b, g in itertools.product({0, q.shape[0] - 1}, {0, k.shape[1] - 1}):
        heads = slice(g * group_size, (g + 1) * group_size)
        deviation, largest = 0.0, 0.0
        for start in range(0, T, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, T)
            seen = S - T + end if causal else S  # keys that the block's last query sees
            one = (q[b : b + 1, heads, start:end], k[b : b + 1, g : g + 1, :seen], v[b : b + 1, g : g + 1, :seen])
            expected = attend(*(x.double() for x in one), causal=causal, impl="reference")[0]
            # max() of Python passes over NaN: an output of NaN would be taken for exact
            off = (output[b, heads, start:end] - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf)
            deviation, largest = max(deviation, float(off.max())), max(largest, float(expected.abs().max()))
        worst = max(worst, deviation / largest)
    return worst


def measure_point(
    point: Point, arms: list[str], inputs: Inputs, machine: Machine, rounds: int = ROUNDS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Check and time ``arms`` of one point, interleaved; yield (arm, row) for each.

    A row holds sizes, backend, quartiles, roofs, prediction, correctness error, load and status; an arm that cannot
    run, would not fit, or ran out of memory is a row with the reason. An arm whose output is wrong raises
    ``AssertionError``: no number is shown on a red check. Any other exception of an implementation passes through.
    """
    causal = point.kind == "prefill"
    rows: dict[str, dict[str, Any]] = {}
    runnable: list[str] = []
    for arm in arms:
        rows[arm] = {"status": "ok", **_size_fields(point, arm)}
        if point.needed_bytes(arm) > MEMORY_SHARE * machine.memory_bytes:
            reason = f"needs {point.needed_bytes(arm)} of {machine.memory_bytes} bytes of memory"
            rows[arm] |= {"status": "too_big", "reason": reason}
        else:
            runnable.append(arm)
    rotation: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        rotation = inputs.rotation(point) if runnable else []
    except RuntimeError as error:
        for arm in runnable:
            rows[arm] |= {"status": "oom", "reason": clock.out_of_memory(error)}
        runnable = []
    warm: dict[str, float] = {}
    for arm in runnable:
        rows[arm]["dtype"] = dtype_name(rotation[0][0].dtype)  # of the tensors, whatever the label says
        able, reason = supports(arm, *rotation[0], causal=causal)
        if not able:
            rows[arm] |= {"status": "unsupported", "reason": reason}
            continue
        began = time.perf_counter()
        try:
            output = attend(*rotation[0], causal=causal, impl=arm)
            warm[arm] = time.perf_counter() - began
        except RuntimeError as error:
            rows[arm] |= {"status": "oom", "reason": clock.out_of_memory(error)}
            continue
        wrong = relative_error(output, *rotation[0], causal=causal)
        if wrong > tolerance(point.dtype):
            raise AssertionError(
                f"{point.label} {arm}: error {wrong:.2g}, at most {tolerance(point.dtype):.2g} is allowed"
            )
        rows[arm] |= {"error": wrong, "tolerance": tolerance(point.dtype)}
        rows[arm]["backend"] = backend(arm, *rotation[0], causal=causal)
        rows[arm]["picked"] = picked(*rotation[0], causal) if arm == "auto" else arm
    # auto is the arm it picks: where both are asked for, they are checked apart and timed once.
    same = {arm: rows[arm]["picked"] for arm in warm if rows[arm]["picked"] in warm.keys() - {arm}}
    if warm:
        timed = {arm: seconds for arm, seconds in warm.items() if arm not in same}
        machine = _time_arms(point, timed, rotation, machine, rounds, rows)
    for arm, other in same.items():
        rows[arm] = rows[other] | {name: rows[arm][name] for name in ("error", "backend", "picked", "needed_bytes")}
        if "median" in rows[arm]:  # the roofline of torch's own arms knows nothing of the rates that auto reaches
            rows[arm] |= clock.prediction_fields(point.predict(machine, arm))
    for arm in arms:
        yield arm, rows[arm]


def _size_fields(point: Point, arm: str) -> dict[str, Any]:
    return {
        "variant": point.shape.variant,
        "bytes": attention_bytes(point.shape, point.batch, point.queries, point.context, point.dtype),
        "needed_bytes": point.needed_bytes(arm),
    }


def _time_arms(
    point: Point,
    warm: dict[str, float],
    rotation: list[tuple[Tensor, Tensor, Tensor]],
    machine: Machine,
    rounds: int,
    rows: dict[str, dict[str, Any]],
) -> Machine:
    """Fill in ``rows``; return the machine with the roofs that stand in them, measured anew where one was beaten."""
    device, causal, arms = machine.device, point.kind == "prefill", list(warm)
    turn = itertools.cycle(rotation)  # shared, so that no arm finds what another just read
    calls = {arm: (lambda arm=arm: attend(*next(turn), causal=causal, impl=arm)) for arm in arms}
    for attempt in range(RETRIES):
        busy = host.wait_for_quiet(clock.QUIET_SECONDS)
        load = host.Load()
        few = _slow(warm, calls, device)
        count = {arm: min(rounds, SLOW_ROUNDS) if arm in few else rounds for arm in arms}
        # On CUDA a replay goes through the rotation whole, and at least ten calls share its launch.
        per_sample = len(rotation) * -(-10 // len(rotation)) if device == "cuda" else 1
        try:
            seconds = interleaved(calls, count, device, per_sample)
        except RuntimeError as error:
            for arm in arms:
                rows[arm] |= {
                    "status": "oom",
                    "reason": f"while the arms were timed together: {clock.out_of_memory(error)}",
                }
            return machine
        for arm in arms:
            rows[arm] |= clock.time_fields(seconds[arm], point.predict(machine, arm), load, busy)
            rows[arm] |= {
                "read_bandwidth": machine.read_bandwidth,
                "copy_bandwidth": machine.copy_bandwidth,
                "matmul_rate": machine.compute_roof(point.dtype),
                "binding_roof": point.binding_roof(machine),
                "fraction_of_roof": point.least_seconds(machine) / rows[arm]["median"],
            }
            if device == "cuda":  # what a user without graphs meets, launches included
                rows[arm]["eager"] = statistics.median(event_seconds(calls[arm]) for _ in range(SLOW_ROUNDS))
        if all(rows[arm]["fraction_of_roof"] <= IMPLAUSIBLE for arm in arms):
            return machine
        if attempt + 1 < RETRIES:
            machine = refreshed(machine, point.dtype, point.head_dim)
    for arm in arms:
        if rows[arm]["fraction_of_roof"] > IMPLAUSIBLE:
            share = rows[arm]["fraction_of_roof"]
            rows[arm] |= {"status": "implausible", "reason": f"{share:.2f} of the roof after {RETRIES} measurements"}
    return machine


def _slow(warm: Mapping[str, float], calls: Mapping[str, Callable[[], object]], device: str) -> set[str]:
    """The arms that get few rounds: the oracle, and those more than ten times slower than the best. A first call may
    have been slow for reasons of its own, so whoever looks slow by it is called once more; on CUDA, where it was a
    launch or a compilation and tells nothing, everybody is."""
    if device == "cpu":
        once = dict(warm)
    else:
        once = {arm: min(event_seconds(call), event_seconds(call)) for arm, call in calls.items()}
    suspects = [arm for arm in once if once[arm] > SLOW_FACTOR * min(once.values()) and arm != ORACLE]
    if device == "cpu":
        once |= {arm: min(once[arm], interleaved({arm: calls[arm]}, {arm: 1}, device)[arm][0]) for arm in suspects}
    return {arm for arm in once if once[arm] > SLOW_FACTOR * min(once.values()) or arm == ORACLE}
