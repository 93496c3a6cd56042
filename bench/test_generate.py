"""One decode step of a whole small model at a fixed context, prefill outside the timer: ours beside transformers'."""

from collections.abc import Callable
from typing import Any

import pytest

from attnlab import host
from attnlab.measure.generation import ARMS, SHAPES, Cell, measure_cell, new_model
from attnlab.predict.machine import Machine
from attnlab.results import Run, row_key

SHAPE = SHAPES["8l-512"]
GROUPS = (16, 4, 1)
CONTEXTS = {"quick": (128, 1024), "full": (128, 1024, 4096)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    cells = [
        Cell(SHAPE.with_kv_heads(g), 1, context, dtype)
        for dtype in option.dtype
        for context in CONTEXTS[option.grid]
        for g in GROUPS
    ]
    cases = [(cell, arm) for cell in cells for arm in ARMS]
    ids = [f"{cell.shape.variant}-ctx{cell.context}-b{cell.batch}-{arm}-{cell.dtype}" for cell, arm in cases]
    metafunc.parametrize(("cell", "arm"), cases, ids=ids)


def test_step(cell: Cell, arm: str, run: Run, machine: Machine, replay: Callable[[Any], None], benchmark: Any) -> None:
    key = row_key(cell.configuration(arm, machine.device))
    if key not in run:
        facts = host.describe(machine.device)
        for each, row in measure_cell(cell, new_model(cell.shape, cell.dtype, machine.device), list(ARMS), machine):
            configuration = cell.configuration(each, machine.device)
            run.append(row_key(configuration), {**facts, **configuration, **row})
    benchmark.group = f"decode step of {cell.shape.name} {cell.shape.variant} ctx{cell.context} {cell.dtype}"
    replay(run[key])
