"""The roofs of this machine, measured: what it reads, copies and multiplies a second, and what a call costs.

Reading is a read-only reduction, the roof of decoding; a copy is a second figure and never its roof. Beside the roofs
stand the rates that this library's own code reaches when its inputs lie in a cache, and what a layer costs when it has
next to nothing to do: no roofs, but what a prediction needs, each measured apart from the points it is judged by.
"""

import functools
import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attnlab import host
from attnlab.attention import attend
from attnlab.measure.clock import interleaved, quartiles
from attnlab.measure.step import decode_step
from attnlab.model.layers import product
from attnlab.model.llama import Llama
from attnlab.predict.machine import RATED_HEAD_DIMS, Machine, rated_head_dim
from attnlab.shapes import ModelShape

_SMALL_CONTEXT = 64  # the least that is shared out among threads: waking them is part of what a call costs
_CACHED_BYTES = 2**23  # of K and V, or of a weight, that stay in the last-level cache


def measure_machine(device: str, dtypes: tuple[str, ...] = ("float32", "bfloat16"), rounds: int = 11) -> Machine:
    """Measure every roof of this machine; a few seconds, after waiting a little for other processes to be quiet."""
    facts = host.describe(device)
    size = _read_bytes(device)
    host.wait_for_quiet()
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = {
        "read_bandwidth": _repeat(source.sum, rounds, device),
        "copy_bandwidth": _repeat(lambda: target.copy_(source), rounds, device),
        "call_seconds": _repeat(_smallest_call(device), 5 * rounds, device),
    }
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    spread = {name: (quartiles(taken)[2] - quartiles(taken)[0]) / middle[name] for name, taken in seconds.items()}
    layer, step = _layer_and_step(device, rounds)
    return Machine(
        name=facts["machine"],
        device=device,
        read_bandwidth=size / middle["read_bandwidth"],
        copy_bandwidth=2 * size / middle["copy_bandwidth"],
        matmul_rate={dtype: matmul_rate(dtype, device) for dtype in dtypes},
        call_seconds=middle["call_seconds"],
        memory_bytes=facts["memory_bytes"],
        spread=spread,
        rates={name: rate for dtype in dtypes for name, rate in _rates(dtype, device, middle["call_seconds"]).items()},
        layer_seconds=layer,
        step_seconds=step,
    )


def refreshed(machine: Machine, dtype: str, head_dim: int | None = None) -> Machine:
    """``machine`` with the two roofs that bind a point of ``dtype`` measured again, now, and the rates of decoding at
    ``head_dim`` if it is given: a shared machine's clock is another an hour, or a minute, later."""
    fresh = torch.ones(_read_bytes(machine.device) // 4, device=machine.device)
    read = fresh.nbytes / statistics.median(_repeat(fresh.sum, 7, machine.device))
    rates = {name: matmul_rate(name, machine.device) for name in {dtype, "float32"} & set(machine.matmul_rate)}
    own = _rates(dtype, machine.device, machine.call_seconds, (rated_head_dim(head_dim),), False) if head_dim else {}
    return replace(
        machine,
        read_bandwidth=read,
        matmul_rate={**machine.matmul_rate, **rates},
        rates={**machine.rates, **own},
    )


def _read_bytes(device: str) -> int:
    """Enough that what is read lies in memory and in no cache."""
    return 1 << 30 if device == "cuda" else max(1 << 28, 4 * host.describe(device)["last_level_cache_bytes"])


def _repeat(call: Callable[[], object], rounds: int, device: str) -> list[float]:
    for _ in range(2):
        call()
    # On CUDA several calls share one replay, whose launch would else be counted as theirs.
    return interleaved({"": call}, {"": rounds}, device, 20 if device == "cuda" else 1)[""]


def _smallest_call(device: str) -> Callable[[], object]:
    q, kv = torch.ones(1, 8, 1, 64, device=device), torch.ones(1, 8, _SMALL_CONTEXT, 64, device=device)
    return lambda: attend(q, kv, kv)


def _rates(
    dtype: str, device: str, call_seconds: float, head_dims: tuple[int, ...] = RATED_HEAD_DIMS, others: bool = True
) -> dict[str, float]:
    """Flop/s of decoding by D and R, and with ``others`` of prefill by T and of a product by rows; the fixed cost of a
    call taken off."""
    kind, generator = getattr(torch, dtype), torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator).to(kind)

    calls: dict[str, tuple[int, Callable[[], object]]] = {}
    for head_dim, group_size in itertools.product(head_dims, (1, 2, 4, 8, 16, 32)):
        heads = 32 * max(1, 128 // head_dim)
        context = _CACHED_BYTES * group_size // (2 * heads * head_dim * kind.itemsize)
        q, k, v = random(1, heads, 1, head_dim), *random(2, 1, heads // group_size, context, head_dim)
        flops = 4 * heads * context * head_dim
        calls[f"decode {head_dim} {dtype} {group_size}"] = flops, functools.partial(attend, q, k, v)
    for tokens in (256, 512, 1024) if others else ():
        q, k, v = random(3, 1, 8, tokens, 128)
        flops = 4 * 8 * 128 * tokens * (tokens + 1) // 2
        calls[f"prefill {dtype} {tokens}"] = flops, functools.partial(attend, q, k, v, causal=True)
    for rows in (1, 2, 4, 8, 16, 32, 64, 256) if others else ():
        x, linear = random(1, rows, 1024), torch.nn.Linear(1024, _CACHED_BYTES // 1024 // kind.itemsize, bias=False)
        linear.weight.data = random(linear.out_features, 1024)
        flops = 2 * rows * linear.weight.numel()
        calls[f"product {dtype} {rows}"] = flops, functools.partial(product, x, linear)
    with torch.inference_mode():
        seconds = {name: statistics.median(_repeat(call, 7, device)) for name, (_, call) in calls.items()}
    return {name: flops / max(seconds[name] - call_seconds, seconds[name] / 2) for name, (flops, _) in calls.items()}


def _layer_and_step(device: str, rounds: int) -> tuple[float, float]:
    """Seconds that a decode step takes per layer and once, in models so small that nothing else counts."""
    models = (Llama(ModelShape(layers, 64, 2, 1, 32, 64, 64)).to(device) for layers in (1, 17))
    one, many = (statistics.median(_repeat(decode_step(model, 1, 8), 5 * rounds, device)) for model in models)
    layer = max(many - one, 0) / 16
    return layer, max(one - layer, 0)


def matmul_rate(dtype: str, device: str) -> float:
    """Flop/s of the largest square product, by powers of two, that stays below a few hundredths of a second."""
    enough, largest = (0.03, 4096) if device == "cpu" else (0.002, 8192)
    size, seconds = 128, 0.0
    while True:
        # Random numbers: a card draws less power on equal ones, clocks higher, and a roof too high is no roof.
        left = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        seconds = statistics.median(_repeat(lambda left=left: left @ left, 3, device))  # type: ignore[misc]
        if seconds > enough or size >= largest:
            return 2 * size**3 / seconds
        size *= 2
