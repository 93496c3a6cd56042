"""The one timing harness: the benchmarks and the command line both call it.

A point is one attention call at fixed sizes; its arms are implementations. Each arm is checked against the reference
before it is timed. Arms alternate (A B A B); K and V rotate through copies larger than the last-level cache, so that
every call reads from memory as a real decode step does; warm-up and prefill stay outside. On CUDA a sample is a replayed
graph of calls over its count, and the eager time, launches included, is kept beside it.

    B batch   T query tokens   S context   H query heads   G KV heads   D head_dim
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnlab import host
from attnlab.attention import attend, auto, backend, supports
from attnlab.errors import check_choice, check_size
from attnlab.predict.machine import Machine
from attnlab.predict.time import Prediction, attention_bytes, predict_decode, predict_prefill
from attnlab.shapes import ModelShape, dtype_name, element_bytes

ROUNDS, SLOW_ROUNDS, SLOW_FACTOR = 20, 5, 10.0
IMPLAUSIBLE = 1.05  # a point above this fraction of its roof is measured again, then not believed
RETRIES = 3
QUIET_SECONDS = 1.0  # how long a point waits for other processes to leave the cores alone
MEMORY_SHARE = 0.6  # a point that needs more of the memory than this is not tried
CUDA_ROTATION_BYTES = 300 * 10**6  # five times the L2 of the largest card


@dataclass(frozen=True)
class Point:
    """One attention call: ``kind`` "decode" (T = 1) or "prefill" (T = S, causal)."""

    kind: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    batch: int
    context: int
    dtype: str

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("decode", "prefill"))
        for name in ("batch", "context"):
            check_size(name, getattr(self, name))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        _ = self.shape  # checks the rest

    @property
    def shape(self) -> ModelShape:
        """One layer with these heads; what surrounds attention is as small as can be."""
        return ModelShape(1, self.n_heads * self.head_dim, self.n_heads, self.n_kv_heads, self.head_dim, 1, 1)

    @property
    def queries(self) -> int:
        """T."""
        return 1 if self.kind == "decode" else self.context

    @property
    def label(self) -> str:
        short = self.dtype.replace("bfloat", "bf").replace("float", "fp")
        return f"{self.shape.variant}-{self.kind}-ctx{self.context}-b{self.batch}-{short}"

    def configuration(self, impl: str, device: str) -> dict[str, Any]:
        """What a row's key hashes."""
        fields = asdict(self)
        shape = {name: fields.pop(name) for name in ("n_heads", "n_kv_heads", "head_dim")}
        return {**fields, "shape": shape, "queries": self.queries, "impl": impl, "device": device}

    def predict(self, machine: Machine, impl: str) -> Prediction:
        """What this call should take on ``machine``."""
        function = predict_decode if self.kind == "decode" else predict_prefill
        return function(self.shape, machine, self.batch, self.context, self.dtype, impl=impl)

    def needed_bytes(self, impl: str) -> int:
        """Memory that the call needs at once: inputs, output, and what ``impl`` makes of K and V."""
        element, heads = element_bytes(self.dtype), self.n_heads
        kv = 2 * self.batch * self.context * self.head_dim
        own = attention_bytes(self.shape, self.batch, self.queries, self.context, self.dtype)
        if impl == "expanded" and self.n_kv_heads < heads:
            own += kv * heads * element
        if impl == "reference":  # scores and weights, and 32-bit copies of 16-bit inputs
            own += 2 * self.batch * heads * self.queries * self.context * 4 + kv * self.n_kv_heads * 4
        return own


class Inputs:
    """Random q, k, v for points, cut from one block of random memory per dtype, which is kept and grows."""

    def __init__(self, device: str, rotation_bytes: int) -> None:
        self.device, self.rotation_bytes = device, rotation_bytes
        self._block = torch.empty(0)

    def rotation(self, point: Point) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Enough distinct (q, k, v) that one of them is cold again when its turn comes: q [B, H, T, D], k and v [B, G, S, D]."""
        q_size = (point.batch, point.n_heads, point.queries, point.head_dim)
        kv_size = (point.batch, point.n_kv_heads, point.context, point.head_dim)
        sizes = [torch.Size(size).numel() for size in (q_size, kv_size, kv_size)]
        bytes_each = sum(sizes) * element_bytes(point.dtype)
        copies = 1 if bytes_each >= self.rotation_bytes else -(-self.rotation_bytes // bytes_each) + 1
        block = self._filled(copies * sum(sizes), getattr(torch, point.dtype))
        pieces = block[: copies * sum(sizes)].split(sizes * copies)
        return [
            (pieces[i].view(q_size), pieces[i + 1].view(kv_size), pieces[i + 2].view(kv_size))
            for i in range(0, len(pieces), 3)
        ]

    def _filled(self, elements: int, dtype: torch.dtype) -> Tensor:
        if self._block.dtype != dtype or self._block.numel() < elements:
            self._block = torch.empty(0)  # freed before its successor is allocated
            block = torch.empty(elements, dtype=dtype, device=self.device)
            # A random tile of odd length, repeated: much faster than drawing it all, and no two heads begin alike.
            tile = torch.randn(min(elements, 2**22 - 3), generator=torch.Generator().manual_seed(0)).to(block)
            for piece in block.split(len(tile)):
                piece.copy_(tile[: len(piece)])
            self._block = block
        return self._block


# --- taking samples -------------------------------------------------------------------------------------------------


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: Mapping[str, int], device: str, calls_per_sample: int = 1) -> dict[str, list[float]]:
    """Seconds per call, ``rounds[name]`` samples of each, taken in turn: A B A B. Every call has been warmed before."""
    take = _cuda_sample if device == "cuda" else _cpu_sample
    prepared = {name: take(call, calls_per_sample) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(max(rounds.values())):
        for name, sample in prepared.items():
            if index < rounds[name]:
                seconds[name].append(sample())
    return seconds


def _cpu_sample(call: Callable[[], object], calls: int) -> Callable[[], float]:
    def sample() -> float:
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls

    return sample


def _cuda_sample(call: Callable[[], object], calls: int) -> Callable[[], float]:
    side = torch.cuda.Stream()  # a graph is captured after warm-up on a stream of its own
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return lambda: _event_seconds(graph.replay) / calls


def _one(call: Callable[[], object], device: str) -> float:
    return _event_seconds(call) if device == "cuda" else _cpu_sample(call, 1)()


def _event_seconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """25 %, 50 % and 75 % of the samples."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


# --- roofs ----------------------------------------------------------------------------------------------------------


def measure_machine(device: str, dtypes: tuple[str, ...] = ("float32", "bfloat16"), rounds: int = 11) -> Machine:
    """Measure every roof of this machine; a few seconds."""
    facts = host.describe(device)
    size = (1 << 28) if device == "cpu" else (1 << 30)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = {
        "read_bandwidth": _repeat(source.sum, rounds, device),
        "copy_bandwidth": _repeat(lambda: target.copy_(source), rounds, device),
        "call_seconds": _repeat(_smallest_call(device), 5 * rounds, device),
    }
    del source, target
    spread = {name: (quartiles(taken)[2] - quartiles(taken)[0]) / statistics.median(taken) for name, taken in seconds.items()}
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    return Machine(
        name=facts["machine"],
        device=device,
        read_bandwidth=size / middle["read_bandwidth"],
        copy_bandwidth=2 * size / middle["copy_bandwidth"],
        matmul_rate={dtype: _matmul_rate(dtype, device) for dtype in dtypes},
        call_seconds=middle["call_seconds"],
        memory_bytes=facts["memory_bytes"],
        spread=spread,
    )


def refreshed(machine: Machine, dtype: str) -> Machine:
    """``machine`` with the two roofs that bind a point of ``dtype`` measured again, now."""
    fresh = torch.ones((1 << 28) // 4 if machine.device == "cpu" else 1 << 28, device=machine.device)
    read = fresh.nbytes / statistics.median(_repeat(fresh.sum, 7, machine.device))
    rates = {name: _matmul_rate(name, machine.device) for name in {dtype, "float32"} & set(machine.matmul_rate)}
    return replace(machine, read_bandwidth=read, matmul_rate={**machine.matmul_rate, **rates})


def _repeat(call: Callable[[], object], rounds: int, device: str) -> list[float]:
    for _ in range(2):
        call()
    return interleaved({"": call}, {"": rounds}, device)[""]


def _smallest_call(device: str) -> Callable[[], object]:
    q, kv = torch.ones(1, 8, 1, 64, device=device), torch.ones(1, 8, 1, 64, device=device)
    return lambda: attend(q, kv, kv, impl="grouped")


def _matmul_rate(dtype: str, device: str) -> float:
    """Flop/s of the largest square product, by powers of two, that stays below a few hundredths of a second."""
    enough, largest = (0.03, 4096) if device == "cpu" else (0.002, 8192)
    size, seconds = 128, 0.0
    while True:
        left = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
        seconds = statistics.median(_repeat(lambda left=left: left @ left, 3, device))  # type: ignore[misc]
        if seconds > enough or size >= largest:
            return 2 * size**3 / seconds
        size *= 2


# --- measuring a point ----------------------------------------------------------------------------------------------


def tolerance(dtype: str) -> float:
    """Largest error, relative to the largest output, that still counts as the same mathematics."""
    epsilon = torch.finfo(getattr(torch, dtype)).eps
    return (4 if element_bytes(dtype) == 2 else 128) * epsilon


def relative_error(output: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """Largest deviation from the float64 reference over its largest magnitude, on the first and last (batch, group)."""
    group_size = q.shape[1] // k.shape[1]
    worst = 0.0
    for b, g in itertools.product({0, q.shape[0] - 1}, {0, k.shape[1] - 1}):
        heads = slice(g * group_size, (g + 1) * group_size)
        one = (q[b : b + 1, heads].double(), k[b : b + 1, g : g + 1].double(), v[b : b + 1, g : g + 1].double())
        expected = attend(*one, causal=causal, impl="reference")
        worst = max(worst, float((output[b, heads] - expected[0]).abs().max() / expected.abs().max()))
    return worst


def measure_point(point: Point, arms: list[str], inputs: Inputs, machine: Machine, rounds: int = ROUNDS) -> Iterator[tuple[str, dict[str, Any]]]:
    """Check and time ``arms`` of one point, interleaved; yield (arm, row) for each.

    A row holds sizes, backend, quartiles, roofs, prediction, correctness error, load and status; an arm that cannot run,
    would not fit, or ran out of memory is a row with the reason. An arm whose output is wrong raises ``AssertionError``:
    no number is shown on a red check. Any other exception of an implementation passes through.
    """
    device, causal = inputs.device, point.kind == "prefill"
    rows: dict[str, dict[str, Any]] = {}
    runnable: list[str] = []
    for arm in arms:
        rows[arm] = {"status": "ok", **_size_fields(point, arm)}
        if point.needed_bytes(arm) > MEMORY_SHARE * machine.memory_bytes:
            reason = f"needs {point.needed_bytes(arm)} of {machine.memory_bytes} bytes of memory"
            rows[arm] |= {"status": "too_big", "reason": reason}
        else:
            runnable.append(arm)
    rotation = inputs.rotation(point) if runnable else []
    warm: dict[str, float] = {}
    for arm in runnable:
        able, reason = supports(arm, *rotation[0], causal=causal)
        if not able:
            rows[arm] |= {"status": "unsupported", "reason": reason}
            continue
        began = time.perf_counter()
        try:
            output = attend(*rotation[0], causal=causal, impl=arm)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            rows[arm] |= {"status": "oom", "reason": str(error).split("\n")[0]}
            continue
        error = relative_error(output, *rotation[0], causal=causal)
        warm[arm] = time.perf_counter() - began
        assert error <= tolerance(point.dtype), f"{point.label} {arm}: error {error:.2g} > {tolerance(point.dtype):.2g}"
        rows[arm] |= {"error": error, "tolerance": tolerance(point.dtype)}
        rows[arm]["backend"] = backend(arm, *rotation[0], causal=causal)
        rows[arm]["picked"] = auto.pick(*rotation[0], causal) if arm == "auto" else arm
    if warm:
        _time_arms(point, list(warm), rotation, machine, rounds, rows)
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
    arms: list[str],
    rotation: list[tuple[Tensor, Tensor, Tensor]],
    machine: Machine,
    rounds: int,
    rows: dict[str, dict[str, Any]],
) -> None:
    device, causal = machine.device, point.kind == "prefill"
    turn = itertools.cycle(rotation)  # shared, so that no arm finds what another just read
    calls = {arm: (lambda arm=arm: attend(*next(turn), causal=causal, impl=arm)) for arm in arms}
    for attempt in range(RETRIES):
        busy = host.wait_for_quiet(QUIET_SECONDS)
        load = host.Load()
        once = {arm: _one(call, device) for arm, call in calls.items()}
        limit = SLOW_FACTOR * min(once.values())
        count = {arm: SLOW_ROUNDS if once[arm] > limit else rounds for arm in arms}
        per_sample = len(rotation) if device == "cuda" else 1
        seconds = interleaved(calls, count, device, per_sample)
        for arm in arms:
            low, middle, high = quartiles(seconds[arm])
            prediction = point.predict(machine, arm)
            least = point.predict(machine, "grouped")
            rows[arm] |= {
                "median": middle,
                "q25": low,
                "q75": high,
                "samples": seconds[arm],
                "rounds": count[arm],
                "predicted": prediction.seconds,
                "terms": prediction.terms,
                "binding": prediction.binding,
                "flops": prediction.flops,
                "read_bandwidth": machine.read_bandwidth,
                "copy_bandwidth": machine.copy_bandwidth,
                "matmul_rate": machine.compute_roof(point.dtype),
                "fraction_of_roof": max(least.terms["bandwidth"], least.terms["compute"]) / middle,
                "load": load.cores(),
                "busy": busy,
            }
            if device == "cuda":  # what a user without graphs meets, launches included
                rows[arm]["eager"] = statistics.median(_event_seconds(calls[arm]) for _ in range(SLOW_ROUNDS))
        if all(rows[arm]["fraction_of_roof"] <= IMPLAUSIBLE for arm in arms):
            return
        if attempt + 1 < RETRIES:
            machine = refreshed(machine, point.dtype)
    for arm in arms:
        if rows[arm]["fraction_of_roof"] > IMPLAUSIBLE:
            share = rows[arm]["fraction_of_roof"]
            rows[arm] |= {"status": "implausible", "reason": f"{share:.2f} of the roof after {RETRIES} measurements"}
