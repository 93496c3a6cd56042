"""The timing harness: checked before timed, arms in turn, inputs cold, and every outcome a row with its reason.

Time is mostly virtual here: a fake clock that each call advances by a known amount, so that no test depends on how busy
the machine is.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from attnlab import host, measure
from attnlab.attention import attend, auto, implementations
from attnlab.measure import Inputs, Point, clock, decode_step, measure_point, relative_error, tolerance
from attnlab.model import layers
from attnlab.model.cache import KVCache
from attnlab.model.llama import Llama
from attnlab.predict.machine import Machine
from attnlab.predict.time import attention_bytes, predict_decode, predict_prefill
from attnlab.shapes import ModelShape

DECODE = Point("decode", 6, 3, 10, 2, 61, "float32")
PREFILL = Point("prefill", 6, 2, 14, 3, 17, "bfloat16")
# roofs that nothing here comes near
FAST = Machine("m", "cpu", 1e15, 2e15, {"float32": 1e18, "bfloat16": 3e18}, 1e-9, 2**40)


@pytest.fixture(autouse=True)
def by_rule(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``auto`` by its rule: what it takes here must not change when a machine's table does."""
    monkeypatch.setattr(auto, "table", lambda: {})
    auto._ranked.cache_clear()
    yield
    auto._ranked.cache_clear()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is worth waiting for a busy machine."""
    monkeypatch.setattr(host, "wait_for_quiet", lambda seconds: "")


@pytest.fixture
def inputs() -> Inputs:
    return Inputs("cpu", 100_003)


Attend = Callable[..., Tensor]


def replace_arm(monkeypatch: pytest.MonkeyPatch, arm: str, fake: Callable[[Attend, Any], Tensor]) -> None:
    """Let ``arm`` be computed by ``fake(real, *qkv, **options)``; the reference and the other arms stay as they are."""

    def attending(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if options.get("impl") != arm or q.dtype == torch.float64:
            return attend(q, k, v, **options)
        return fake(attend, q, k, v, **options)  # type: ignore[call-arg]

    monkeypatch.setattr(measure, "attend", attending)


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds by a virtual clock that one call of each arm takes; fill it in. Arms that are not in it are free."""
    seconds: dict[str, float] = {}
    now = [0.0]

    def attending(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if q.dtype != torch.float64:
            now[0] += seconds.get(options["impl"], 1e-6)
        return attend(q, k, v, **options)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure, "attend", attending)
    return seconds


# --- what a row says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_a_row_is_made_of_its_samples_and_its_prediction(
    point: Point, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are all that remains of a measurement: each number in one must be the one its name promises."""
    monkeypatch.setattr(measure, "SLOW_FACTOR", math.inf)  # however busy the machine is
    arms = ["reference", "expanded", "sdpa", "grouped", "auto"]
    rows = dict(measure_point(point, arms, inputs, FAST))
    assert list(rows) == arms
    predict = predict_decode if point.kind == "decode" else predict_prefill
    for arm, row in rows.items():
        rounds = 5 if arm == "reference" else 20
        assert (row["status"], row["rounds"], row["busy"], row["dtype"]) == ("ok", rounds, "", point.dtype)
        assert len(row["samples"]) == rounds and min(row["samples"]) > 0
        quartiles = numpy.percentile(row["samples"], [25, 50, 75])
        assert [row["q25"], row["median"], row["q75"]] == pytest.approx(list(quartiles), rel=1e-12)
        prediction = predict(point.shape, FAST, point.batch, point.context, point.dtype, impl=arm)
        assert (row["predicted"], row["terms"]) == (prediction.seconds, prediction.terms)
        assert (row["binding"], row["flops"]) == (prediction.binding, prediction.flops)
        least = attention_bytes(point.shape, point.batch, point.queries, point.context, point.dtype)
        assert row["bytes"] == least and row["needed_bytes"] == point.needed_bytes(arm)
        floor = max(least / FAST.read_bandwidth, prediction.flops / FAST.compute_roof(point.dtype))
        assert row["fraction_of_roof"] == pytest.approx(floor / row["median"], rel=1e-12)
        assert (row["read_bandwidth"], row["copy_bandwidth"]) == (1e15, 2e15)
        assert row["matmul_rate"] == FAST.compute_roof(point.dtype)
        assert 0 <= row["error"] <= row["tolerance"] == tolerance(point.dtype)
        assert row["picked"] == ("grouped" if arm == "auto" else arm)
        assert row["backend"] == {"reference": "torch"}.get(arm, row["backend"]) in {"torch", "flash", "math"}
    assert rows["reference"]["backend"] == "torch" and rows["grouped"]["backend"] == rows["auto"]["backend"] == "flash"
    assert {row["variant"] for row in rows.values()} == {point.shape.variant}


def test_the_dtype_in_a_row_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    """A row that repeats the label would say bf16 whatever had been timed."""
    monkeypatch.setattr(Inputs, "_filled", lambda self, elements, dtype: torch.randn(elements))
    assert dict(measure_point(PREFILL, ["grouped"], inputs, FAST, rounds=3))["grouped"]["dtype"] == "float32"


def test_load_is_in_the_row(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    """A strange row can be explained later only if it says who else was busy."""
    asked = []

    class Load:
        def cores(self) -> float:
            return 1.25

    monkeypatch.setattr(host, "wait_for_quiet", lambda seconds: asked.append(seconds) or "1.9 cores, most by x (7)")
    monkeypatch.setattr(host, "Load", Load)
    row = dict(measure_point(DECODE, ["grouped"], inputs, FAST, rounds=3))["grouped"]
    assert (row["load"], row["busy"], row["rounds"]) == (1.25, "1.9 cores, most by x (7)", 3)
    assert asked == [clock.QUIET_SECONDS]


@pytest.mark.parametrize(("later", "unsteady"), [(1.0, False), (1.25, False), (1.4, True)])
def test_a_machine_that_slows_down_half_way_is_in_the_row(
    monkeypatch: pytest.MonkeyPatch, inputs: Inputs, later: float, unsteady: bool
) -> None:
    """A laptop that throttles has two speeds, and its median is of neither: quartiles 1 and 1.4 about a median of 1.2
    are a third of it apart."""
    halves = [1.0] * 10 + [later] * 10
    monkeypatch.setattr(measure, "interleaved", lambda calls, *_: dict.fromkeys(calls, halves))
    row = dict(measure_point(DECODE, ["grouped"], inputs, FAST))["grouped"]
    assert (row["q25"], row["q75"], row["median"]) == (1.0, later, pytest.approx((1 + later) / 2))
    assert row["unsteady"] is unsteady


# --- fair -----------------------------------------------------------------------------------------------------------


def test_arms_take_turns_through_one_rotation(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    """Blocks of one arm meet another clock speed than the next; a rotation per arm lets B read what A just warmed."""
    calls: list[tuple[str, int]] = []

    def attending(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if q.dtype != torch.float64:
            calls.append((options["impl"], k.data_ptr()))
        return attend(q, k, v, **options)

    monkeypatch.setattr(measure, "attend", attending)
    arms = ["expanded", "sdpa", "grouped"]
    copies = [k.data_ptr() for _, k, _ in inputs.rotation(DECODE)]
    list(measure_point(DECODE, arms, inputs, FAST, rounds=4))
    checked, timed = calls[:3], calls[-12:]  # each arm is warmed once, and four times timed
    assert [arm for arm, _ in checked] == arms
    assert [arm for arm, _ in timed] == arms * 4
    assert len(copies) > 3
    turned = list(itertools.islice(itertools.cycle(copies), len(calls) - 3))  # whoever looked slow was called once more
    assert [k for _, k in timed] == turned[-12:]


def test_the_oracle_is_not_a_contender(cost: dict[str, float], inputs: Inputs) -> None:
    """Twenty rounds of what nobody would use were a quarter of a sweep."""
    cost |= {"reference": 0.5, "grouped": 0.5}
    rows = dict(measure_point(DECODE, ["reference", "grouped"], inputs, FAST))
    assert {arm: row["rounds"] for arm, row in rows.items()} == {"reference": 5, "grouped": 20}


def test_auto_has_the_times_of_what_it_picks(inputs: Inputs) -> None:
    """Two timings of the same call differ by noise, and a table would show auto beaten by what it picked."""
    rows = dict(measure_point(DECODE, ["grouped", "auto"], inputs, FAST))
    assert rows["auto"]["picked"] == "grouped" and rows["auto"]["samples"] == rows["grouped"]["samples"]
    alone = dict(measure_point(DECODE, ["auto"], inputs, FAST))["auto"]
    assert (alone["picked"], len(alone["samples"])) == ("grouped", 20)


def test_a_slow_arm_gets_few_rounds_and_says_so(cost: dict[str, float], inputs: Inputs) -> None:
    """Twenty rounds of an arm that takes twenty times as long are most of a sweep; five that look like twenty would
    claim a spread nobody measured."""
    cost |= {"grouped": 0.5, "sdpa": 4.75, "expanded": 5.25}
    rows = dict(measure_point(DECODE, ["sdpa", "grouped", "expanded"], inputs, FAST))
    assert {arm: row["rounds"] for arm, row in rows.items()} == {"sdpa": 20, "grouped": 20, "expanded": 5}
    assert {arm: len(row["samples"]) for arm, row in rows.items()} == {"sdpa": 20, "grouped": 20, "expanded": 5}
    assert {arm: row["median"] for arm, row in rows.items()} == {"sdpa": 4.75, "grouped": 0.5, "expanded": 5.25}


# --- correct before fast --------------------------------------------------------------------------------------------


def _last(output: Tensor) -> Tensor:
    output[-1, -1, -1, 0] += 1
    return output


def _first(output: Tensor) -> Tensor:
    output[0, 0, 0, 0] -= 1
    return output


def _nan(output: Tensor) -> Tensor:
    output[0, 0, 0, 0] = math.nan
    return output


WRONG = {
    "last-element": _last,
    "first-element": _first,
    "one-NaN": _nan,
    "all-NaN": lambda output: output * math.nan,
    "infinite": lambda output: output / 0,
    "scaled": lambda output: output * 1.1,
    "zero": lambda output: output * 0,
    "heads-swapped": lambda output: output.flip(1),
}


@pytest.mark.parametrize("point", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_output_ends_the_run_before_any_time_is_taken(
    wrong: Callable[[Tensor], Tensor], point: Point, monkeypatch: pytest.MonkeyPatch, inputs: Inputs
) -> None:
    """A fast kernel that computes something else wins every comparison. NaN compares as neither larger nor smaller, and
    so passes a careless check."""
    replace_arm(monkeypatch, "expanded", lambda real, *qkv, **options: wrong(real(*qkv, **options)))
    monkeypatch.setattr(measure, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match=rf"{point.label} expanded: error .*, at most .* is allowed"):
        list(measure_point(point, ["grouped", "expanded"], inputs, FAST))


def _by_heads(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> numpy.ndarray:
    """Attention one query at a time, in numpy's float64."""
    q, k, v = (x.double().numpy() for x in (q, k, v))  # type: ignore[assignment]
    output = numpy.zeros(q.shape)
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    for b, h, i in itertools.product(range(B), range(H), range(T)):
        seen = S - T + i + 1 if causal else S
        group = h // (H // G)
        scores = k[b, group, :seen] @ q[b, h, i] / math.sqrt(D)
        weights = numpy.exp(scores - scores.max())
        output[b, h, i] = weights @ v[b, group, :seen] / weights.sum()
    return output


@pytest.mark.parametrize("block", [1, 5, 13, 512])
@pytest.mark.parametrize("causal", [False, True])
def test_the_error_is_the_largest_deviation_over_the_largest_output(
    monkeypatch: pytest.MonkeyPatch, causal: bool, block: int
) -> None:
    """Cut into blocks of queries so that a long prompt's scores fit: a block that sees too few keys, or is left out,
    would pass what is wrong. The expected number is by numpy, one query at a time."""
    monkeypatch.setattr(measure, "QUERY_BLOCK", block)
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 6, 13, 10), torch.randn(1, 2, 17, 10), torch.randn(1, 2, 17, 10)
    exact = _by_heads(q, k, v, causal)
    output = torch.from_numpy(exact).clone()
    assert relative_error(output, q, k, v, causal) < 1e-15
    for head, query in ((0, 0), (2, 6), (5, 12)):  # in the first, a middle and the last block
        off = output.clone()
        off[0, head, query, 7] += 0.25
        largest = numpy.abs(exact[0, :3] if head < 3 else exact[0, 3:]).max()  # of the KV head's own outputs
        assert relative_error(off, q, k, v, causal) == pytest.approx(0.25 / largest, rel=1e-9)


def test_a_tolerance_is_a_few_roundings() -> None:
    """Wide enough for bf16's own rounding, and for float32 far below what a wrong mask or scale would cause."""
    assert tolerance("bfloat16") == 4 * 2**-7 and tolerance("float16") == 4 * 2**-10
    assert tolerance("float32") == 128 * 2**-23 < 2e-5


# --- outcomes that are rows -----------------------------------------------------------------------------------------


def test_unsupported_is_a_row_with_the_reason(inputs: Inputs) -> None:
    """A hole in a curve looks like choice."""
    rows = dict(measure_point(DECODE, [*implementations(), "auto"], inputs, FAST, rounds=3))
    assert rows["flex"]["status"] == "unsupported"
    assert rows["flex"]["reason"].startswith("flex needs CUDA: on cpu")
    assert "median" not in rows["flex"] and rows["flex"]["bytes"] == rows["auto"]["bytes"]
    assert rows["cpp"]["reason"] == "cpp needs a head_dim that is a multiple of 8, got 10"
    assert {row["status"] for arm, row in rows.items() if arm not in ("cpp", "flex", "triton")} == {"ok"}


def test_what_would_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    """The system kills what asks for too much, and with it the sweep; so each arm is counted first, by what it makes
    of K and V."""
    needed = {arm: DECODE.needed_bytes(arm) for arm in ("expanded", "grouped")}
    assert needed["grouped"] < needed["expanded"]
    capacity = math.ceil(needed["grouped"] / measure.MEMORY_SHARE)
    rows = dict(measure_point(DECODE, ["expanded", "grouped"], inputs, replace(FAST, memory_bytes=capacity), rounds=3))
    assert rows["expanded"]["status"] == "too_big" and rows["grouped"]["status"] == "ok"
    assert rows["expanded"]["reason"] == f"needs {needed['expanded']} of {capacity} bytes of memory"
    monkeypatch.setattr(Inputs, "rotation", lambda *_: pytest.fail("allocated"))
    rows = dict(measure_point(DECODE, ["expanded", "grouped"], inputs, replace(FAST, memory_bytes=100)))
    assert {row["status"] for row in rows.values()} == {"too_big"}


def _cuda_allocator() -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.\nMore advice")


def _cpu_allocator() -> Tensor:
    return torch.empty(2**56)  # more than any address space: the real allocator's real exception


@pytest.mark.parametrize("allocate", [_cuda_allocator, _cpu_allocator])
def test_out_of_memory_is_a_row_and_the_others_go_on(
    allocate: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch, inputs: Inputs
) -> None:
    """That the usual code runs out where sharing does not is a finding. The CPU's allocator has no exception of its
    own."""
    replace_arm(monkeypatch, "expanded", lambda real, *qkv, **options: allocate())
    rows = dict(measure_point(DECODE, ["expanded", "grouped"], inputs, FAST, rounds=3))
    assert rows["expanded"]["status"] == "oom" and rows["grouped"]["status"] == "ok"
    assert "memory" in rows["expanded"]["reason"] and "\n" not in rows["expanded"]["reason"]
    assert "median" not in rows["expanded"]


def test_inputs_that_do_not_fit_are_rows_too() -> None:
    """Memory that others hold is not in the count beforehand."""
    point = Point("decode", 8, 8, 16, 2**16, 2**28, "float32")  # 2^54 bytes
    rows = dict(measure_point(point, ["expanded", "grouped"], Inputs("cpu", 1), replace(FAST, memory_bytes=2**62)))
    assert {row["status"] for row in rows.values()} == {"oom"}
    assert all("allocate memory" in row["reason"] for row in rows.values())


@pytest.mark.parametrize("error", [RuntimeError("expected scalar type Float"), KeyError("k"), ValueError("bad")])
def test_any_other_exception_ends_the_run(error: Exception, monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    """A bug swallowed as one more missing point has hidden in benchmarks for months."""

    def failing(real: Attend, *qkv: Tensor, **options: Any) -> Tensor:
        raise error

    replace_arm(monkeypatch, "expanded", failing)
    with pytest.raises(type(error)) as raised:
        list(measure_point(DECODE, ["grouped", "expanded"], inputs, FAST))
    assert raised.value is error


# --- implausible ----------------------------------------------------------------------------------------------------


@pytest.fixture
def roofs(monkeypatch: pytest.MonkeyPatch) -> list[Machine]:
    """What measuring the roofs again yields, in order; what is left over was not asked for."""
    planned: list[Machine] = []
    monkeypatch.setattr(measure, "refreshed", lambda *_: planned.pop(0))
    return planned


def _with_floor(seconds: float) -> Machine:
    """Roofs at which DECODE takes at least ``seconds``."""
    moved = attention_bytes(DECODE.shape, DECODE.batch, 1, DECODE.context, DECODE.dtype)
    return replace(FAST, read_bandwidth=moved / seconds)


def test_faster_than_the_machine_allows_is_measured_again_and_then_not_believed(
    cost: dict[str, float], roofs: list[Machine], inputs: Inputs
) -> None:
    """A broken timer or a warm cache makes records. Only the arm that beats its roof loses its row; the roof counts K
    and V once, whatever the arm moves."""
    cost |= {"grouped": 1.0, "expanded": 3.0}
    roofs += [_with_floor(1.2), _with_floor(1.4), _with_floor(9.9)]
    rows = dict(measure_point(DECODE, ["expanded", "grouped"], inputs, _with_floor(1.5)))
    assert len(roofs) == 1  # measured three times, and so refreshed twice
    assert rows["grouped"]["status"] == "implausible"
    assert rows["grouped"]["reason"] == "1.40 of the roof after 3 measurements"
    assert rows["grouped"]["fraction_of_roof"] == pytest.approx(1.4)
    assert rows["grouped"]["median"] == 1.0 and rows["grouped"]["read_bandwidth"] == _with_floor(1.4).read_bandwidth
    assert rows["expanded"]["status"] == "ok" and rows["expanded"]["fraction_of_roof"] == pytest.approx(1.4 / 3)


def test_a_roof_measured_on_a_busy_machine_is_forgiven(
    cost: dict[str, float], roofs: list[Machine], inputs: Inputs
) -> None:
    """Somebody else's second on the machine must not cost a row, and the row must hold the roof it was judged by."""
    cost |= {"grouped": 1.0}
    roofs += [_with_floor(0.9), _with_floor(9.9)]
    rows = dict(measure_point(DECODE, ["grouped", "auto"], inputs, _with_floor(1.06)))
    row = rows["grouped"]
    assert len(roofs) == 1 and (row["status"], row["read_bandwidth"]) == ("ok", _with_floor(0.9).read_bandwidth)
    assert "reason" not in row
    assert row["predicted"] == pytest.approx(0.9, rel=1e-6)
    assert rows["auto"]["picked"] == "grouped"  # and is predicted from the roofs that stand in its row too
    assert rows["auto"]["predicted"] == pytest.approx(0.9, rel=1e-6)
    row = dict(measure_point(DECODE, ["grouped"], inputs, _with_floor(1.04)))["grouped"]
    assert len(roofs) == 1 and row["status"] == "ok"  # within the 5 % that two measurements may differ


# --- a whole model --------------------------------------------------------------------------------------------------

SHAPE = ModelShape(2, 18, 6, 6, 10, 19, 23, max_context=97)


def test_a_step_decodes_one_token_at_a_fixed_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """With prefill inside the timer, or a cache that grows from round to round, the curve over G is flat: a nanoGPT
    fork published one."""
    caches: list[KVCache] = []
    new_cache = Llama.new_cache
    monkeypatch.setattr(Llama, "new_cache", lambda *size: caches.append(new_cache(*size)) or caches[-1])
    seen: list[tuple[int, ...]] = []

    def spying(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q.shape[0], q.shape[2], k.shape[1], k.shape[2], v.shape[2]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(layers, "attend", spying)
    torch.manual_seed(0)
    step = decode_step(Llama(SHAPE.with_kv_heads(2)), batch=3, context=37)
    (cache,) = caches
    assert seen == [] and cache.length == 37  # the cache is filled without a prefill
    assert 0.9 < float(cache.k[..., :37, :].std()) < 1.1 and 0.9 < float(cache.v[..., :37, :].std()) < 1.1
    first = step()
    assert seen == [(3, 1, 2, 38, 38)] * 2  # one token, its 37 predecessors and itself, in each of two layers
    for _ in range(3):
        assert cache.length == 37
        assert torch.equal(step(), first)
    assert len(seen) == 8 and len(set(seen)) == 1
    assert first.shape == (3, 1, 23) and first.isfinite().all()
