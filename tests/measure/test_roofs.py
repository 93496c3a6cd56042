"""The machine's own roofs, against the bytes and the products that torch was really asked for.

Samples take made-up times here, so each figure can be checked: what was moved or multiplied, over the time it took.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnlab import host
from attnlab.measure import roofs
from attnlab.measure.roofs import measure_machine, refreshed
from attnlab.predict.machine import Machine

BYTES = 2**20
READ, COPY, CALL = 0.25, 0.5, 1e-6  # seconds


class Spy(TorchFunctionMode):
    """What one call asked torch for: bytes read by sums, bytes copied one way, flops of products by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.copied = 0
        self.flops: dict[torch.dtype, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.sum:
            self.read = args[0].nbytes
        elif func is Tensor.copy_:
            self.copied = args[1].nbytes
        elif func in (Tensor.matmul, Tensor.__matmul__):
            left, right = args
            self.flops[left.dtype] = 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> list[Spy]:
    """One spy per roof measured. Products of 256 and more take 0.04 s, smaller ones next to nothing."""
    seen: list[Spy] = []

    def interleaved(
        calls: Mapping[str, Callable[[], Tensor]], rounds: Mapping[str, int], device: str, calls_per_sample: int = 1
    ) -> dict[str, list[float]]:
        ((name, call),) = calls.items()
        with Spy() as spy:
            call()
        seen.append(spy)
        flops = sum(spy.flops.values())
        seconds = READ if spy.read else COPY if spy.copied else CALL
        if flops:
            seconds = 0.04 if flops >= 2 * 256**3 else 1e-5
        # a lucky, an unlucky and a usual sample: the roof is the usual one
        return {name: [seconds * factor for factor in (0.5, *[1] * (rounds[name] - 2), 9)]}

    monkeypatch.setattr(roofs, "interleaved", interleaved)
    monkeypatch.setattr(roofs, "_rates", lambda dtype, device, call: {f"decode {dtype} 1": 5.0})
    monkeypatch.setattr(roofs, "_layer_and_step", lambda device, rounds: (7.0, 11.0))
    monkeypatch.setattr(roofs, "_read_bytes", lambda device: BYTES)
    return seen


@pytest.mark.parametrize(("cache", "expected"), [(2**25, 2**28), (3 * 2**27, 3 * 2**29)])
def test_what_is_read_lies_in_memory(monkeypatch: pytest.MonkeyPatch, cache: int, expected: int) -> None:
    """On a server whose caches hold 256 MiB, reading 256 MiB again and again measures the caches."""
    monkeypatch.setattr(host, "describe", lambda device: {"last_level_cache_bytes": cache})
    assert roofs._read_bytes("cpu") == expected


def test_roofs_are_work_over_time(spies: list[Spy]) -> None:
    """A copy moves every byte twice, a product of n × n takes 2 n³ flop, and the median stands, not the luckiest
    sample: each mistaken roof makes honest points impossible or slow ones efficient."""
    machine = measure_machine("cpu", ("float32", "bfloat16"))
    facts = host.describe("cpu")
    assert (machine.name, machine.device, machine.source) == (facts["machine"], "cpu", "measured")
    assert machine.memory_bytes == facts["memory_bytes"]
    (read,), (copied,) = ([s.read for s in spies if s.read], [s.copied for s in spies if s.copied])
    assert machine.read_bandwidth == pytest.approx(read / READ)
    assert machine.copy_bandwidth == pytest.approx(2 * copied / COPY)
    assert machine.call_seconds == pytest.approx(CALL)
    assert read == copied == BYTES
    assert machine.matmul_rate == pytest.approx({"float32": 2 * 256**3 / 0.04, "bfloat16": 2 * 256**3 / 0.04})
    dtypes = [dtype for spy in spies for dtype in spy.flops]
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2  # 128, 256
    assert machine.rates == {"decode float32 1": 5.0, "decode bfloat16 1": 5.0}
    assert (machine.layer_seconds, machine.step_seconds) == (7.0, 11.0)
    assert set(machine.spread) == {"read_bandwidth", "copy_bandwidth", "call_seconds"}
    assert all(spread == 0 for spread in machine.spread.values())  # quartiles pass over one lucky sample


def test_only_what_binds_is_measured_beside_each_group(spies: list[Spy]) -> None:
    """The roofs of a group of points are measured next to them; all of them each time would take longer than the
    points. On a CPU float32 products bound bf16 too."""
    machine = Machine("m", "cpu", 1.0, 2.0, {"float32": 3.0, "bfloat16": 4.0, "float16": 5.0}, 6.0, 7)
    fresh = refreshed(machine, "bfloat16")
    rate = pytest.approx(2 * 256**3 / 0.04)
    assert fresh.matmul_rate == {"float32": rate, "bfloat16": rate, "float16": 5.0}
    assert fresh.read_bandwidth == pytest.approx(BYTES / READ)
    assert (fresh.copy_bandwidth, fresh.call_seconds, fresh.name) == (2.0, 6.0, "m")
    assert refreshed(machine, "float32").matmul_rate == {"float32": rate, "bfloat16": 4.0, "float16": 5.0}
    assert (machine.read_bandwidth, machine.matmul_rate["float32"]) == (1.0, 3.0)


def test_rates_are_measured_again_where_a_head_dim_is_given(spies: list[Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared machine's clock changes by a fifth within minutes: rates of its first minute mislead a whole run. Those
    of the points at hand are taken beside them, the others stay."""
    asked = []
    monkeypatch.setattr(roofs, "_rates", lambda *what: asked.append(what) or {"decode 64 float32 1": 8.0})
    machine = Machine(
        "m", "cpu", 1.0, 2.0, {"float32": 3.0}, 6.0, 7, rates={"decode 64 float32 1": 5.0, "product": 9.0}
    )
    assert refreshed(machine, "float32", 80).rates == {"decode 64 float32 1": 8.0, "product": 9.0}
    assert asked == [("float32", "cpu", 6.0, (64,), False)]
    assert refreshed(machine, "float32").rates == machine.rates


def test_the_smallest_call_is_a_call_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixed cost is what remains of a point when there is next to nothing to compute, threads woken included."""
    output = roofs._smallest_call("cpu")()
    assert isinstance(output, Tensor) and output.shape == (1, 8, 1, 64)
    assert math.isclose(float(output.min()), 1) and math.isclose(float(output.max()), 1)


def test_rates_are_flops_over_time_less_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate with the fixed cost left in would be counted twice; one of R taken at another R's sizes is another's.
    Every call here takes 3 ms, 1 ms of it fixed; flops are counted by hand: 8 MiB of K and V are 1,048,576 elements of
    K."""
    monkeypatch.setattr(roofs, "_repeat", lambda call, rounds, device: [3e-3] * rounds)
    rates = roofs._rates("float32", "cpu", 1e-3)
    assert rates["decode 128 float32 1"] == rates["decode 32 float32 1"] == pytest.approx(4 * 1_048_576 / 2e-3)
    assert rates["decode 64 float32 8"] == pytest.approx(8 * 4 * 1_048_576 / 2e-3)
    assert rates["prefill float32 256"] == pytest.approx(4 * 8 * 128 * (256 * 257 // 2) / 2e-3)
    assert rates["product float32 16"] == pytest.approx(2 * 16 * 2_097_152 / 2e-3)
    bf16 = roofs._rates("bfloat16", "cpu", 2.9e-3)  # the fixed cost never takes more than half
    assert bf16["product bfloat16 1"] == pytest.approx(2 * 4_194_304 / 1.5e-3)


def test_a_layer_costs_what_sixteen_more_of_them_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of a tiny step divided by its layers would charge the head and the embedding to every layer."""
    taken = iter((5e-3, 21e-3))
    monkeypatch.setattr(roofs, "_repeat", lambda call, rounds, device: [next(taken)])
    assert roofs._layer_and_step("cpu", 3) == (pytest.approx(1e-3), pytest.approx(4e-3))
