"""One decode step of a whole small model at a fixed context, prefill outside the timer, against its prediction."""

from collections.abc import Callable
from typing import Any

import pytest

from attnlab import host
from attnlab.measure import measure_steps
from attnlab.predict.machine import Machine
from attnlab.results import Run, row_key
from attnlab.shapes import ModelShape

SHAPE = ModelShape(8, 512, 16, 16, 32, 1408, 8192, tied_embeddings=True, name="8l-512")
GROUPS = (16, 4, 1)
CONTEXTS = {"quick": (128, 1024), "full": (128, 1024, 4096)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    cases = [(g, context, dtype) for dtype in option.dtype for context in CONTEXTS[option.grid] for g in GROUPS]
    ids = [f"{SHAPE.with_kv_heads(g).variant}-ctx{context}-b1-{dtype}" for g, context, dtype in cases]
    metafunc.parametrize(("n_kv_heads", "context", "dtype"), cases, ids=ids)


def test_step(
    n_kv_heads: int, context: int, dtype: str, run: Run, machine: Machine, replay: Callable[[Any], None], benchmark: Any
) -> None:
    def configuration(g: int) -> dict[str, Any]:
        shape = {"n_layers": 8, "dim": 512, "n_heads": 16, "n_kv_heads": g, "head_dim": 32, "name": SHAPE.name}
        return {
            "kind": "generate",
            "impl": "auto",
            "shape": shape,
            "batch": 1,
            "context": context,
            "dtype": dtype,
            "device": machine.device,
        }

    if row_key(configuration(n_kv_heads)) not in run:
        for g, row in measure_steps(SHAPE, list(GROUPS), 1, context, dtype, machine):
            run.append(row_key(configuration(g)), {**host.describe(machine.device), **configuration(g), **row})
    benchmark.group = f"decode step of {SHAPE.name} ctx{context} {dtype}"
    replay(run[row_key(configuration(n_kv_heads))])
