"""What torch holds, against allocations made by hand; and where memory ends, against the solvers."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnlab import ModelShape
from attnlab.errors import InputError
from attnlab.measure import memory
from attnlab.predict.memory import decode_peak_bytes, training_peak_bytes
from attnlab.results import Run
from attnlab.train.loop import train
from attnlab.train.recipe import Recipe

# H = 12 has divisors between 1 and H; no two sizes that could be swapped are equal.
SMALL = ModelShape(n_layers=3, dim=64, n_heads=12, n_kv_heads=4, head_dim=16, ffn_dim=479, vocab_size=331)


def test_allocations_are_counted_to_the_byte() -> None:
    """An end-of-call figure misses what lived in between, and a sum of all allocations counts what was never held
    together: 400 bytes, then 200 more, the first freed, then 80 more."""

    def call() -> Tensor:
        first, second = torch.empty(100), torch.empty(100, dtype=torch.bfloat16)
        del first
        third = torch.empty(10, dtype=torch.float64)
        del second
        return third

    assert memory.peak_bytes(call) == 600
    assert memory.peak_bytes(lambda: [torch.empty(7, dtype=torch.int8) for _ in range(13)]) == 91
    assert memory.peak_bytes(lambda: None) == 0
    assert memory.peak_bytes(lambda: [torch.empty(7).numel() for _ in range(1000)]) == 28


def test_scratch_inside_a_kernel_counts() -> None:
    """Counting a call's tensors from Python overlooks what its kernels take: torch's median sorts a copy."""
    x = torch.randn(1013)
    assert memory.peak_bytes(lambda: torch.median(x)) == x.nbytes + 4
    assert memory.peak_bytes(lambda: x.sort()) >= 3 * x.nbytes  # values, and indices of twice the width


def test_the_first_call_is_not_the_one_weighed() -> None:
    """What a first call leaves behind (a table, a compiled plan) would be charged to every step."""
    kept: list[Tensor] = []

    def call() -> Tensor:
        if not kept:
            kept.append(torch.empty(1000))
        return torch.empty(5)

    assert memory.peak_bytes(call) == 20


class FakeCard:
    """What torch.cuda says of an allocator, changed by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int = 10**6) -> None:
        self.current, self.peak, self.reserved, self.fraction = 1000, 7000, 1 << 12, 1.0
        properties = type("Properties", (), {"total_memory": total})
        fakes: dict[str, Any] = {
            "reset_peak_memory_stats": lambda: setattr(self, "peak", self.current),
            "memory_stats": lambda: {
                "requested_bytes.all.current": self.current,
                "requested_bytes.all.peak": self.peak,
                "allocated_bytes.all.peak": 512 * 99,
            },
            "memory_reserved": lambda: self.reserved,
            "empty_cache": lambda: setattr(self, "reserved", 1 << 10),
            "get_device_properties": lambda index: properties,
            "set_per_process_memory_fraction": lambda fraction: setattr(self, "fraction", fraction),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def hold(self, nbytes: int) -> None:
        self.current += nbytes
        self.peak = max(self.peak, self.current)


def test_on_cuda_the_bytes_asked_for_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocated bytes are rounded to blocks of 512, and a peak that is not reset is some earlier call's."""
    card = FakeCard(monkeypatch)

    def call() -> None:
        card.hold(300)
        card.hold(-260)

    assert memory.peak_bytes(call, "cuda") == 300


def test_a_card_is_capped_above_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap of capacity / total takes what the process held before out of the capacity; cached blocks are not held."""
    card = FakeCard(monkeypatch)
    memory._cap(123_456, "cuda")
    assert card.fraction == pytest.approx((1024 + 123_456) / 10**6)
    memory._cap(2 * 10**6, "cuda")
    assert card.fraction == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_kv_heads", [12, 4, 1])
@pytest.mark.parametrize(
    ("scope", "batch", "context"), [("decode", 7, 19), ("decode", 1, 211), ("prefill", 3, 37), ("prefill", 1, 211)]
)
def test_stored_bytes_are_exact_and_peaks_within_3_percent(
    scope: str, batch: int, context: int, n_kv_heads: int, dtype: str
) -> None:
    """A peak that forgets what is alive beside the largest tensor is off by tens of percent; weights hide that, so
    the working memory has to be right by itself."""
    row = memory.measure_peak(SMALL.with_kv_heads(n_kv_heads), scope, batch, context, dtype, "cpu")
    assert row["stored_bytes"] == row["terms"]["weights"] + row["terms"]["kv_cache"]
    assert row["predicted_bytes"] == sum(row["terms"].values())
    assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.03)
    assert row["predicted_working"] == pytest.approx(row["measured_working"], rel=0.03)
    assert row["measured_bytes"] - row["stored_bytes"] == row["measured_working"] > 0


@pytest.mark.parametrize("scope", ["training", "recomputing"])
@pytest.mark.parametrize(
    ("shape", "batch", "context"),
    [
        (SMALL.with_kv_heads(12), 5, 67),
        (SMALL, 7, 131),
        (replace(SMALL, n_kv_heads=1, tied_embeddings=True), 3, 29),
        (replace(SMALL, n_layers=1), 2, 211),
        (replace(SMALL, ffn_dim=37, n_kv_heads=12), 5, 67),
        (replace(SMALL, qk_norm=True, qkv_bias=True), 2, 101),
        (replace(SMALL, vocab_size=20011), 5, 131),
        (replace(SMALL, vocab_size=8009, tied_embeddings=True), 2, 67),
    ],
    ids=["MHA", "GQA", "MQA, tied", "one layer", "narrow FFN", "norms, biases", "large head", "large table"],
)
def test_peaks_of_training_are_within_3_percent(shape: ModelShape, batch: int, context: int, scope: str) -> None:
    """Activations are most of training, and rules of thumb for them miss by half; the peak moves from the loss to the
    first backward pass to the averaging of weights as sizes change, and each of these shapes peaks elsewhere."""
    row = memory.measure_training(shape, scope, batch, context)
    assert row["stored_bytes"] == 16 * shape.n_params == row["predicted_bytes"] - row["predicted_working"]
    assert row["measured_bytes"] == row["stored_bytes"] + row["measured_working"]
    assert row["predicted_working"] == pytest.approx(row["measured_working"], rel=0.03)
    assert row["terms"] == training_peak_bytes(shape, batch, context, scope == "recomputing").terms()


class Zeros:
    """A task that weighs nothing."""

    digest = "zeros"

    def batch(self, seed: int, step: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(batch, context, dtype=torch.int64)
        return tokens, tokens

    def evaluate(self, model: object, context: int, whole: bool) -> dict[str, Any]:
        return {"loss": 1.0}


@pytest.mark.parametrize(("n_kv_heads", "recompute"), [(12, False), (4, True)])
def test_a_real_run_holds_what_is_predicted_within_10_percent(n_kv_heads: int, recompute: bool) -> None:
    """A step written for the measurement proves itself; this is a whole run of ``train``, whatever attention it picks,
    from nothing to its result."""
    shape, batch, context = SMALL.with_kv_heads(n_kv_heads), 5, 131
    recipe = Recipe(shape, seed=3, tokens=2 * batch * context, batch=batch, context=context, recompute=recompute)
    held = memory.peak_bytes(lambda: train(recipe, Zeros()))
    assert training_peak_bytes(shape, batch, context, recompute).total == pytest.approx(held, rel=0.1)


def test_a_wrong_count_of_stored_bytes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored bytes are a promise, not an estimate: one byte off is a bug, and no row may hide it."""
    off_by_one = replace(decode_peak_bytes(SMALL, 2, 5, "float32"), kv_cache=15359)
    monkeypatch.setattr(memory, "decode_peak_bytes", lambda *_: off_by_one)
    with pytest.raises(AssertionError, match=r"\d+ bytes stored, predicted were \d+"):
        memory.measure_peak(SMALL, "decode", 2, 5, "float32", "cpu")


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_the_last_that_fits(seed: int) -> None:
    """A bisection off by one step, or one that trusts its first guess, is the proof of nothing."""
    rng = random.Random(seed)
    most, step = rng.choice([0, 1, 2, 63, 64, 65, rng.randint(1, 10_000)]), rng.choice([1, 2, 7, 64])
    tried: list[int] = []
    found = memory.largest(lambda count: tried.append(count) or count <= most, step)  # type: ignore[func-returns-value]
    assert found == most // step * step
    assert len(tried) == len(set(tried)) and found + step in tried and (found == 0 or found in tried)


@pytest.mark.parametrize(
    ("error", "fits"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (MemoryError(), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
    ids=["cpu", "cuda", "python", "a bug"],
)
def test_only_the_end_of_memory_is_the_end(error: Exception, fits: bool | None) -> None:
    """A bug taken for the end of memory would make the largest batch whatever the bug begins at."""

    class Model:
        def new_cache(self, batch: int, capacity: int) -> None:
            raise error

    if fits is None:
        with pytest.raises(RuntimeError, match="mat1"):
            memory._runs(Model(), 2, 3)  # type: ignore[arg-type]
    else:
        assert memory._runs(Model(), 2, 3) is fits  # type: ignore[arg-type]


# Enough beside the weights that pages and small blocks, some hundred KB, are less than a step.
CAPPED = replace(SMALL, dim=96, ffn_dim=256, n_layers=2, n_kv_heads=2, head_dim=16)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "other"), [("batch", 8192), ("context", 3)])
def test_memory_ends_where_predicted(what: str, other: int) -> None:
    """A solver is only as good as the allocator agrees: the largest batch and context that really run under a cap of
    256 MiB are within one step of the answer, and half the capacity gives another."""
    found = [memory.measure_limit(CAPPED, what, size * 2**20, other, "float32", "cpu") for size in (256, 128)]
    for row in found:
        assert row["status"] == "ok" and row["variant"] == "GQA-2" and row["probes"] > 3
        assert row["predicted"] > 10
        assert abs(row["predicted"] // row["step"] - row["measured"] // row["step"]) <= 1
    assert found[0]["measured"] > 1.9 * found[1]["measured"]


def test_a_capacity_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits, so there is nothing to search: said before a process is started."""
    monkeypatch.setattr(memory.subprocess, "run", None)
    for what in memory.LIMITS:
        with pytest.raises(InputError, match=rf"capacity_bytes=5 holds no {what} of 1 of this shape in bfloat16"):
            memory.measure_limit(SMALL, what, 5, 7, "bfloat16", "cpu")
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    row = memory.measure_limit(SMALL, "batch", 2**30, 7, "bfloat16", "cpu")
    assert row["status"] == "unsupported" and "as on Linux" in row["reason"]


def test_a_search_that_dies_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends without an answer must not be read as "nothing fits"."""
    monkeypatch.setitem(memory._STEADY, "PYTHONHOME", "/nowhere")  # no interpreter starts there
    with pytest.raises(RuntimeError, match=r"looking for the largest batch ended with 1: .*"):
        memory.measure_limit(SMALL, "batch", 2**30, 7, "float32", "cpu")


def test_proofs_become_rows_once(tmp_path: Path) -> None:
    """A stopped run goes on where it stopped, and a row can be found by what was asked."""
    asked = [one for one in memory.proofs("cpu") if one["kind"] == "peak"]
    shape = {**asked[0]["shape"], "dim": 64, "ffn_dim": 173, "vocab_size": 331}
    peaks = [asked[0], next(one for one in reversed(asked) if one["scope"] == "prefill"), asked[-1]]
    asked = [{**one, "batch": 2, "context": 5, "shape": shape} for one in peaks]
    told: list[tuple[str, int, int]] = []
    with Run(tmp_path / "one") as run:
        memory.prove(run, asked[:1])
        memory.prove(run, asked, lambda *step: told.append(step))
        decode, prefill, training = run.rows
    assert told == [
        ("peak of decode, MHA float32", 0, 3),
        ("peak of prefill, MHA bfloat16", 1, 3),
        ("peak of recomputing, MHA float32", 2, 3),
    ]
    assert (training["scope"], training["impl"]) == ("recomputing", "sdpa")
    assert training["predicted_bytes"] == training_peak_bytes(ModelShape(**shape), 2, 5, recompute=True).total
    assert (decode["kind"], decode["scope"], decode["dtype"]) == ("peak", "decode", "float32")
    assert (prefill["scope"], prefill["device"], prefill["shape"]["ffn_dim"]) == ("prefill", "cpu", 173)
    assert decode["predicted_bytes"] == decode_peak_bytes(ModelShape(**shape), 2, 5, "float32").total
    assert decode["machine"] and decode["torch"] == torch.__version__


def test_the_plan_asks_every_question_of_every_variant() -> None:
    """A plan that loses a dtype or an end of the range proves less than it says."""
    asked = memory.proofs("cpu")
    kinds = {(one["kind"], one.get("scope") or one["what"]) for one in asked}
    training = {("peak", "training"), ("peak", "recomputing")}
    assert kinds - training == {("peak", "decode"), ("peak", "prefill"), ("limit", "batch"), ("limit", "context")}
    assert training < kinds  # in float32 alone, which is what is counted
    trained = [one for one in asked if (one["kind"], one.get("scope")) in training]
    assert [(one["shape"]["n_kv_heads"], one["dtype"], one["impl"]) for one in trained] == 2 * [
        (g, "float32", "sdpa") for g in (8, 2, 1)
    ]
    for kind, what in kinds - training:
        same = [one for one in asked if one["kind"] == kind and what in (one.get("scope"), one.get("what"))]
        models = {(one["shape"]["n_kv_heads"], one["dtype"]) for one in same}
        assert models == {(g, dtype) for g in (8, 2, 1) for dtype in ("float32", "bfloat16")}
