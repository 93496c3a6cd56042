"""The roofs of this machine, measured: what it reads, copies and multiplies a second, and what a call costs.

Reading is a read-only reduction, the roof of decoding; a copy is a second figure and never its roof.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from attnlab import host
from attnlab.attention import attend
from attnlab.measure.clock import interleaved, quartiles
from attnlab.predict.machine import Machine


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
    spread = {
        name: (quartiles(taken)[2] - quartiles(taken)[0]) / statistics.median(taken) for name, taken in seconds.items()
    }
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
    fresh = torch.ones(_read_bytes(machine.device) // 4, device=machine.device)
    read = fresh.nbytes / statistics.median(_repeat(fresh.sum, 7, machine.device))
    rates = {name: _matmul_rate(name, machine.device) for name in {dtype, "float32"} & set(machine.matmul_rate)}
    return replace(machine, read_bandwidth=read, matmul_rate={**machine.matmul_rate, **rates})


def _read_bytes(device: str) -> int:
    """Enough that what is read lies in memory and in no cache."""
    return 1 << 30 if device == "cuda" else max(1 << 28, 4 * host.describe(device)["last_level_cache_bytes"])


def _repeat(call: Callable[[], object], rounds: int, device: str) -> list[float]:
    for _ in range(2):
        call()
    # On CUDA several calls share one replay, whose launch would else be counted as theirs.
    return interleaved({"": call}, {"": rounds}, device, 20 if device == "cuda" else 1)[""]


def _smallest_call(device: str) -> Callable[[], object]:
    q, kv = torch.ones(1, 8, 1, 64, device=device), torch.ones(1, 8, 1, 64, device=device)
    return lambda: attend(q, kv, kv, impl="grouped")


def _matmul_rate(dtype: str, device: str) -> float:
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
