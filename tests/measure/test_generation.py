"""Whole-model cells: that both libraries take the same step on the same bytes, and that nothing but a step is timed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnlab import generated
from attnlab.errors import InputError
from attnlab.measure import clock, generation
from attnlab.measure.generation import ARMS, DYNAMIC, OURS, STATIC, Cell, cells, fill, measure_cell, new_model
from attnlab.predict.machine import Machine
from attnlab.results import MACHINE, Run, load_results
from attnlab.shapes import ModelShape

SHAPE = ModelShape(3, 48, 6, 2, 16, 56, 64, max_context=128, name="tiny")
FAST = Machine("m", "cpu", 1e12, 1e12, {"float32": 1e15, "bfloat16": 1e15}, 1e-9, 2**40)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """These times are not looked at."""
    monkeypatch.setattr(clock, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(generation, "ROUNDS", 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("groups", [6, 2, 1])
def test_both_libraries_take_the_same_step(groups: int, dtype: str) -> None:
    """A comparison of speeds between models that compute different things: bfloat16 weights whose rotary frequencies
    were cast too, a cache one token short, heads in another order."""
    shape = SHAPE.with_kv_heads(groups)
    rows = dict(measure_cell(Cell(shape, 3, 37, dtype), new_model(shape, dtype, "cpu"), list(ARMS), FAST))
    assert [row["status"] for row in rows.values()] == ["ok"] * 3
    for arm in (DYNAMIC, STATIC):
        assert 0 < rows[arm]["error"] < (1e-5 if dtype == "float32" else 0.03)
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(3 / row["median"])
        assert row["rounds"] == len(row["samples"]) == 5 and row["predicted"] > 0
    assert {arm for arm in ARMS if "first_token" in rows[arm]} == {OURS, DYNAMIC}


def test_a_difference_in_logits_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number on a red check: transformers' frequencies cast to bfloat16 are the error that people publish."""
    theirs_of = generation.transformers_model

    def cast(model: Any) -> Any:
        theirs = theirs_of(model)
        theirs.model.rotary_emb.inv_freq *= 1.01
        return theirs

    monkeypatch.setattr(generation, "transformers_model", cast)
    with pytest.raises(AssertionError, match=r"tiny GQA-2 ctx37 b3 float32 transformers-\w+: logits differ by"):
        dict(measure_cell(Cell(SHAPE, 3, 37, "float32"), new_model(SHAPE, "float32", "cpu"), list(ARMS), FAST))


def test_transformers_works_on_the_same_bytes() -> None:
    """A copy of the weights for the rival doubles the memory that a cell needs, and colder weights would be slower."""
    model = new_model(SHAPE, "bfloat16", "cpu")
    theirs = generation.transformers_model(model)
    ours = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in theirs.parameters()} == ours
    assert theirs.model.rotary_emb.inv_freq.dtype == torch.float32


def test_every_round_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that grows from round to round times a longer context than the row says."""
    model = new_model(SHAPE, "float32", "cpu")
    cache = generation.noise_cache(model, 3, 38)
    theirs = generation.transformers_model(model)
    steps = [generation.decode_step(model, 3, 37, cache)]
    steps += [generation.transformers_step(theirs, cache, 37, static) for static in (False, True)]
    for step in steps:
        first: Tensor = step()
        assert all(torch.equal(step(), first) for _ in range(3)) and first.shape == (3, 1, 64)


def test_what_does_not_fit_or_is_not_there_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole in a table looks like choice. The growing cache is held twice, so it is the first that does not fit."""
    cell = Cell(SHAPE, 3, 101, "float32")
    least, most = cell.needed_bytes(OURS), cell.needed_bytes(DYNAMIC)
    assert most - least == 2 * 3 * 3 * 2 * 102 * 16 * 4 and cell.needed_bytes(STATIC) == least
    small = Machine("m", "cpu", 1e12, 1e12, {"float32": 1e15}, 1e-9, int((most - 1) / generation.MEMORY_SHARE))
    model = new_model(SHAPE, "float32", "cpu")
    rows = dict(measure_cell(cell, model, list(ARMS), small))
    assert {arm: row["status"] for arm, row in rows.items()} == {OURS: "ok", DYNAMIC: "too_big", STATIC: "ok"}
    assert rows[DYNAMIC]["reason"].startswith(f"needs {most} of ")
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    rows = dict(measure_cell(cell, model, list(ARMS), FAST))
    assert [row["status"] for row in rows.values()] == ["ok", "unsupported", "unsupported"]
    assert rows[STATIC]["reason"] == "transformers is not installed"


def test_a_run_of_cells_goes_on_where_it_was(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of cells is not measured twice, and the table at the end shows every one of them."""
    monkeypatch.setattr(generation, "refreshed", lambda machine, *_: machine)
    grid = [Cell(SHAPE.with_kv_heads(g), 1, context, "float32") for g in (6, 2) for context in (29, 31)]
    facts = {"device": "cpu", "machine": "m"}
    FAST.save(tmp_path / "run" / MACHINE)
    with Run(tmp_path / "run") as run:
        fill(run, grid[:1], facts, lambda *_: None)
        before = list(run.rows)
        fill(run, grid, facts, lambda *_: None)
        assert run.rows[: len(before)] == before and len(run.rows) == len(grid) * len(ARMS) and run.left() == 0
    found = generated.ratios(load_results(tmp_path / "run"))
    assert found[["shape.n_kv_heads", "context"]].values.tolist() == [[6, 29], [6, 31], [2, 29], [2, 31]]
    assert (found[["dynamic", "static", "first"]] > 0).all().all()
    said = generated.summary(found)
    assert said[0].startswith("a step with transformers' dynamic cache takes") and "of 4 cells)" in said[0]
    assert "nan" not in " ".join(said)  # no cell is long here, so nothing is said of long ones


def test_a_grid_of_cells() -> None:
    """The question a run answers is stated: models, G, batches and contexts."""
    quick = cells("quick", "cpu", ["float32", "bfloat16"])
    assert len(quick) == 2 * 3 * (6 + 3) and {cell.shape.n_kv_heads for cell in quick} == {16, 4, 1}
    with pytest.raises(InputError, match="unknown grid 'quik'; did you mean quick"):
        cells("quik", "cpu", ["float32"])
