"""Taking samples: arms in turn (A B A B), on the CPU by the clock, on CUDA by events around a replayed graph."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from attnlab import host
from attnlab.predict.time import Prediction

QUIET_SECONDS = 1.0  # how long a point waits for other processes to leave the cores alone
UNSTEADY = 0.25  # quartiles further apart than this share of the median: of 20 rounds it is then uncertain by a tenth


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: Mapping[str, int], device: str, calls_per_sample: int = 1
) -> dict[str, list[float]]:
    """Seconds per call, ``rounds[name]`` samples of each, taken in turn: A B A B. Every call has been warmed before."""
    if device == "cuda":
        pool = torch.cuda.graph_pool_handle()  # graphs are replayed one at a time, so all arms may share their memory
        prepared = {name: _cuda_sample(call, calls_per_sample, pool) for name, call in calls.items()}
    else:
        prepared = {name: _cpu_sample(call, calls_per_sample) for name, call in calls.items()}
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


def _cuda_sample(call: Callable[[], object], calls: int, pool: Any) -> Callable[[], float]:
    side = torch.cuda.Stream()  # a graph is captured after warm-up on a stream of its own
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(calls):
            call()
    return lambda: event_seconds(graph.replay) / calls


def event_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call on CUDA, launches included."""
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


def prediction_fields(prediction: Prediction) -> dict[str, Any]:
    """What a row says of its prediction."""
    predicted, terms, binding, flops = prediction.seconds, prediction.terms, prediction.binding, prediction.flops
    return {"predicted": predicted, "terms": terms, "binding": binding, "flops": flops}


def time_fields(samples: list[float], prediction: Prediction, load: host.Load, busy: str) -> dict[str, Any]:
    """What a row says of its samples, its prediction, and who else kept the machine busy meanwhile."""
    low, middle, high = quartiles(samples)
    return {
        "median": middle,
        "q25": low,
        "q75": high,
        "unsteady": high - low > UNSTEADY * middle,
        "samples": samples,
        "rounds": len(samples),
        **prediction_fields(prediction),
        "load": load.cores(),
        "busy": busy,
    }


def out_of_memory(error: RuntimeError) -> str:
    """The reason for a row; raises ``error`` again if memory is not what ran out. (The CPU's allocator has no exception
    of its own.)"""
    if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
        raise error
    return str(error).split("\n")[0]
