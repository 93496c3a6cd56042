"""Bytes against bytes predicted: the cache's, to the byte, with what appending one token to every layer takes; and what
a small model holds at the peak of a decode step and of a prefill, with what weighing it takes."""

import itertools
from dataclasses import asdict
from typing import Any

import pytest
import torch

from attnlab import KVCache, kv_cache_bytes
from attnlab.errors import divisors
from attnlab.measure.memory import SCOPES, measure_peak, prove
from attnlab.report import PEAK_ERROR
from attnlab.results import Run, row_key
from attnlab.shapes import ModelShape, variant_name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    groups = [g for g in reversed(divisors(option.heads)) if option.grid == "full" or g in {option.heads, 8, 4, 1}]
    names = ("groups", "scope", "dtype") if "scope" in metafunc.fixturenames else ("groups", "dtype")
    cases = list(itertools.product(groups, *([SCOPES] if "scope" in names else []), option.dtype))
    ids = ["-".join([variant_name(option.heads, g), *rest]) for g, *rest in cases]
    metafunc.parametrize(names, cases, ids=ids)


def test_append(groups: int, dtype: str, machine: Any, benchmark: Any, pytestconfig: pytest.Config) -> None:
    batch, context = 4, 1024
    shape = ModelShape(4, 128, pytestconfig.option.heads, groups, 128, 128, 256)
    cache = KVCache(shape, batch, context, getattr(torch, dtype), machine.device)
    token = torch.ones(batch, shape.n_kv_heads, 1, shape.head_dim, dtype=cache.k.dtype, device=machine.device)
    predicted = kv_cache_bytes(shape, batch, context, dtype)
    assert cache.nbytes == predicted
    benchmark.extra_info.update(stored_bytes=cache.nbytes, predicted_bytes=predicted)
    cache.length = context - 1

    def append() -> None:
        for layer in range(shape.n_layers):
            cache.append(layer, token, token)
        if machine.device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"append one token, {dtype}"
    benchmark.pedantic(append, rounds=20, iterations=5, warmup_rounds=3)


def test_peak(
    scope: str, groups: int, dtype: str, run: Run, machine: Any, benchmark: Any, pytestconfig: pytest.Config
) -> None:
    shape = ModelShape(2, 512, pytestconfig.option.heads, groups, 16, 1376, 4096)
    sizes = {"batch": 2, "context": 128, "shape": asdict(shape), "dtype": dtype, "impl": "auto"}
    question = {"kind": "peak", "scope": scope, **sizes, "device": machine.device}
    prove(run, [question])
    row = run[row_key(question)]
    off = row["predicted_bytes"] / row["measured_bytes"] - 1
    assert abs(off) <= PEAK_ERROR
    benchmark.extra_info.update({name: row[name] for name in ("predicted_bytes", "measured_bytes", "stored_bytes")})
    measured = f"{row['measured_bytes']:,} bytes, predicted {off:+.2%}"
    benchmark.group = f"peak of {scope}, {shape.variant}, {dtype}: {measured}"
    again = (shape, scope, sizes["batch"], sizes["context"], dtype, machine.device)
    benchmark.pedantic(measure_peak, again, rounds=3, iterations=1)
