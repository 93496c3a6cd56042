"""The cache: bytes stored against bytes predicted, to the byte, and what appending one token to every layer takes."""

from typing import Any

import pytest
import torch

from attnlab import KVCache, kv_cache_bytes
from attnlab.errors import divisors
from attnlab.shapes import ModelShape


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    groups = [g for g in reversed(divisors(option.heads)) if option.grid == "full" or g in {option.heads, 8, 4, 1}]
    shapes = [ModelShape(4, 128, option.heads, g, 128, 128, 256) for g in groups]
    cases = [(shape, dtype) for shape in shapes for dtype in option.dtype]
    metafunc.parametrize(("shape", "dtype"), cases, ids=[f"{s.variant}-{d}" for s, d in cases])


def test_append(shape: ModelShape, dtype: str, machine: Any, benchmark: Any) -> None:
    batch, context = 4, 1024
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
