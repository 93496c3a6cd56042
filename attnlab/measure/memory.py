"""Memory, proven: the bytes that torch really held, and the batch and context at which memory really ended.

- ``peak_bytes`` counts torch's own allocations, those inside its kernels included. On the CPU the profiler reports
  each; what a library below takes for itself (the packing buffers of a product) is not torch's and is not seen. On CUDA
  the allocator counts the bytes it was asked for, before it rounds them.
- ``measure_limit`` finds by bisection the largest batch or context whose decode steps still run, in a process of its
  own that may hold so many bytes more and no more. On the CPU its address space is capped: Linux hands out pages it
  does not have, but no addresses past that limit, so torch's allocator fails as it would at the end of memory.

B batch   T query tokens   S context
"""

import itertools
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile

from attnlab import host
from attnlab.errors import InputError, check_choice
from attnlab.measure.clock import out_of_memory
from attnlab.measure.generation import new_model
from attnlab.measure.step import decode_step
from attnlab.model.llama import Llama
from attnlab.predict.memory import (
    GIB,
    Held,
    decode_peak_bytes,
    max_batch,
    max_context,
    prefill_peak_bytes,
    training_peak_bytes,
)
from attnlab.results import REPOSITORY, Run, row_key
from attnlab.shapes import ModelShape
from attnlab.train.loss import linear_cross_entropy

SCOPES, TRAINING, LIMITS = ("decode", "prefill"), ("training", "recomputing"), ("batch", "context")
CONTEXT_STEPS = 256  # a context is searched in steps of this fraction of the prediction, a batch one by one
# One thread, one arena, and every larger block a mapping of its own: what is freed goes back, and a probe finds the
# address space as the one before it did.
_STEADY = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that torch held at once during ``call`` above those held before it. (It is called once before: a
    first call may leave things behind. On the CPU, what a call frees of earlier memory is not counted.)"""
    call()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        call()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else every profile leaves two lines on stderr
    found = -1
    for _ in range(8):  # a busy machine's profile lacks events at times: believed is what two in a row say
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            call()
        events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        before, found = found, max(itertools.accumulate((event.nbytes() for event in events), initial=0))
        if found == before:
            return found
    raise AssertionError(f"torch's profile counts another number of bytes each time, {before} and {found} at last")


def measure_peak(shape: ModelShape, scope: str, batch: int, context: int, dtype: str, device: str) -> dict[str, Any]:
    """Weigh a model, a cache of ``context`` tokens, and one decode step at its end or the prefill that fills it.

    ``predicted_bytes`` and ``measured_bytes`` are of everything held at the peak, ``predicted_working`` and
    ``measured_working`` of what is neither weights nor cache. Raises ``AssertionError`` unless the bytes stored are
    exactly those predicted.
    """
    check_choice("scope", scope, SCOPES)
    model = new_model(shape, dtype, device)
    cache = model.new_cache(batch, context)
    tokens = torch.zeros(batch, context, dtype=torch.int64, device=device)

    def prefill() -> object:  # as generate does it: the head on the last position only
        cache.reset()
        with torch.inference_mode():
            return model.logits(model.hidden(tokens, cache)[:, -1:])

    predict = decode_peak_bytes if scope == "decode" else prefill_peak_bytes
    working = peak_bytes(decode_step(model, batch, context - 1, cache) if scope == "decode" else prefill, device)
    predicted = predict(shape, batch, context, dtype)
    return _row(shape, predicted, (predicted.activations, working), [*model.parameters(), cache.k, cache.v])


def measure_training(shape: ModelShape, scope: str, batch: int, context: int) -> dict[str, Any]:
    """As ``measure_peak``, of a step of ``train`` in float32 on the CPU that keeps what its backward pass needs
    ("training") or computes it again ("recomputing"): stored are weights, average and moments, working is the rest."""
    check_choice("scope", scope, TRAINING)
    model = new_model(shape, "float32", "cpu")
    model.impl, model.recompute = "sdpa", scope == "recomputing"
    average, optimizer = AveragedModel(model), torch.optim.AdamW(model.parameters(), fused=True)
    head = (model.lm_head or model.embed_tokens).weight
    tokens = torch.zeros(batch, context, dtype=torch.int64)

    def step() -> None:
        states = model.hidden(tokens).flatten(0, 1)
        linear_cross_entropy(states, head, tokens.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        optimizer.zero_grad()  # last, since ``peak_bytes`` overlooks the end of what it did not see begin

    working, predicted = peak_bytes(step), training_peak_bytes(shape, batch, context, model.recompute)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    stored = [*model.parameters(), *average.parameters(), *moments]
    return _row(shape, predicted, (predicted.gradients + predicted.activations, working), stored)


def _row(shape: ModelShape, predicted: Held, working: tuple[int, int], tensors: list[Tensor]) -> dict[str, Any]:
    """A peak's: ``tensors`` are what is stored, ``working`` the bytes beside it, predicted and measured."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if stored != predicted.total - working[0]:
        raise AssertionError(f"{stored} bytes stored, predicted were {predicted.total - working[0]}")
    return {
        "status": "ok",
        "variant": shape.variant,
        "stored_bytes": stored,
        "predicted_bytes": predicted.total,
        "measured_bytes": stored + working[1],
        "predicted_working": working[0],
        "measured_working": working[1],
        "terms": predicted.terms(),
    }


# --- where memory ends ----------------------------------------------------------------------------------------------


def measure_limit(
    shape: ModelShape, what: str, capacity_bytes: int, other: int, dtype: str, device: str
) -> dict[str, Any]:
    """Find the largest batch at ``other`` tokens, or the largest context of ``other`` sequences, whose weights, cache
    and decode steps fit ``capacity_bytes``, and set it beside ``max_batch`` or ``max_context``.

    Raises ``InputError`` on a capacity that does not hold even one; of status "unsupported" on a CPU without Linux.
    """
    check_choice("what", what, LIMITS)
    if device == "cpu" and sys.platform != "linux":
        return {"status": "unsupported", "reason": "a CPU's memory is capped through its address space, as on Linux"}
    predicted = (max_batch if what == "batch" else max_context)(shape, capacity_bytes, other, dtype)
    if not predicted:
        raise InputError(f"capacity_bytes={capacity_bytes} holds no {what} of 1 of this shape in {dtype}; give more")
    step = 1 if what == "batch" else max(1, predicted // CONTEXT_STEPS)
    # What libraries keep from their first calls (a CPU's matrix products: 16 MB) is no part of the model.
    question = (shape, what, capacity_bytes, other, step, dtype, device, predicted if what == "batch" else other)
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    answer = subprocess.run(
        [sys.executable, "-c", "from attnlab.measure.memory import _answer; _answer()"],
        input=pickle.dumps(question),
        env={**os.environ, **_STEADY, "PYTHONPATH": path},
        capture_output=True,
    )
    if answer.returncode:
        raise RuntimeError(f"looking for the largest {what} ended with {answer.returncode}: {answer.stderr.decode()}")
    return {"status": "ok", "variant": shape.variant, "predicted": predicted, "step": step, **json.loads(answer.stdout)}


def _answer() -> None:
    """The process that ``measure_limit`` starts: a question on stdin, the answer on stdout. (Its first probe, small, is
    also where a model joins weights that it multiplies together, and holds those of one product twice for a moment.)"""
    shape, what, capacity_bytes, other, step, dtype, device, warm_batch = pickle.load(sys.stdin.buffer)
    _runs(new_model(shape, dtype, device), warm_batch, 1)
    _cap(capacity_bytes, device)
    model, probes = new_model(shape, dtype, device), []

    def fits(count: int) -> bool:
        probes.append(count)
        return _runs(model, count, other) if what == "batch" else _runs(model, other, count)

    print(json.dumps({"measured": largest(fits, step), "probes": len(probes)}))


def largest(fits: Callable[[int], bool], step: int) -> int:
    """The largest multiple of ``step`` that fits, 0 if none does: doubled until one does not, then bisected."""
    low, high = 0, step
    while fits(high):
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _runs(model: Llama, batch: int, context: int) -> bool:
    """Whether two decode steps run at the end of a cache of ``context`` tokens, or memory ends before."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the probe before left
    try:
        cache = model.new_cache(batch, context)
        token = torch.zeros(batch, 1, dtype=torch.int64, device=cache.k.device)
        with torch.inference_mode():
            for _ in range(2):
                cache.length = context - 1
                model(token, cache)
        return True
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError):
            out_of_memory(error)  # raises again what is something else
        return False


def _cap(more: int, device: str) -> None:
    """Let this process hold so many bytes ``more`` than it holds now."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + more) / total))
        return
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + more, resource.getrlimit(resource.RLIMIT_AS)[1]))


# --- rows -----------------------------------------------------------------------------------------------------------


def proofs(device: str) -> list[dict[str, Any]]:
    """What ``prove`` asks of MHA, GQA and MQA in two dtypes: peaks of decoding and of prefill, then both limits; on a
    CPU peaks of training in float32 as well."""
    if device == "cuda":
        shape, groups, dtypes = ModelShape(8, 4096, 32, 32, 128, 11008, 32000), (32, 8, 1), ("bfloat16", "float16")
        half = torch.cuda.get_device_properties(0).total_memory // 2
        capacity, long, sizes = min(24 * GIB, half), 16384, ((1, 4096), (8, 1024), (3, 333))
    else:
        shape, groups, dtypes = ModelShape(4, 512, 8, 8, 64, 1376, 8192), (8, 2, 1), ("float32", "bfloat16")
        capacity, long, sizes = GIB, 4096, ((1, 1024), (4, 256), (3, 77))
    asked: list[dict[str, Any]] = [
        *({"kind": "peak", "scope": scope, "batch": b, "context": s} for scope in SCOPES for b, s in sizes),
        {"kind": "limit", "what": "batch", "capacity_bytes": capacity, "context": long},
        {"kind": "limit", "what": "context", "capacity_bytes": capacity, "batch": 3},
    ]
    models = [{"shape": asdict(shape.with_kv_heads(g)), "dtype": dtype} for dtype in dtypes for g in groups]
    pairs = [*itertools.product(asked, models)]
    if device == "cpu":
        trained = [{"kind": "peak", "scope": scope, "batch": 4, "context": 256, "impl": "sdpa"} for scope in TRAINING]
        pairs += itertools.product(trained, models[: len(groups)])  # the first dtype's
    return [{"impl": "auto", **question, **model, "device": device} for question, model in pairs]


def prove(run: Run, questions: list[dict[str, Any]], progress: Callable[[str, int, int], None] | None = None) -> None:
    """Append to ``run`` the row of each of ``questions`` that it does not hold: kinds "peak" and "limit"."""
    run.plan([row_key(question) for question in questions])
    for done, question in enumerate(questions):
        shape, dtype, device = ModelShape(**question["shape"]), question["dtype"], question["device"]
        if progress:
            name = f"peak of {question['scope']}" if question["kind"] == "peak" else f"largest {question['what']}"
            progress(f"{name}, {shape.variant} {dtype}", done, len(questions))
        if (key := row_key(question)) in run:
            continue
        if (scope := question.get("scope")) in TRAINING:
            row = measure_training(shape, scope, question["batch"], question["context"])
        elif question["kind"] == "peak":
            row = measure_peak(shape, question["scope"], question["batch"], question["context"], dtype, device)
        else:
            other = question["context" if question["what"] == "batch" else "batch"]
            row = measure_limit(shape, question["what"], question["capacity_bytes"], other, dtype, device)
        run.append(key, {**host.describe(device), **question, **row})
