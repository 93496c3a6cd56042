"""The table that ``auto`` goes by: what is timed, what becomes of the rows, and that a table is never half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attnlab import explore, host, tune
from attnlab.attention import attend, auto, picked
from attnlab.errors import InputError
from attnlab.measure import Point, clock
from attnlab.native import capability
from attnlab.predict.machine import Machine
from attnlab.results import Run

HERE = capability(torch.device("cpu"))
FEW = [Point(kind, 8, g, 16, 1, 64, "float32") for g in (8, 2) for kind in ("decode", "prefill")]


def roofs(device: str, dtypes: tuple[str, ...]) -> Machine:
    return Machine(host.describe(device)["machine"], device, 1e15, 1e15, dict.fromkeys(dtypes, 1e18), 1e-9, 2**40)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A tuning of four small points, finished. Its times are not looked at."""
    monkeypatch.setattr(clock, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(tune, "points", lambda: FEW)
    monkeypatch.setattr(explore, "measure_machine", roofs)
    monkeypatch.setattr(tune, "refreshed", lambda machine, *_: machine)
    with Run(tmp_path / "run") as run:
        tune.tune(run, "cpu", lambda *_: None)
    return run


def test_every_contender_is_timed_at_every_point(run: Run) -> None:
    """An arm that is left out can never be picked; the oracle and the arm that loses on purpose need no timing."""
    assert len(run.rows) == len(FEW) * len(tune.CONTENDERS) and run.left() == 0
    assert {"cpp", "grouped", "sdpa"} <= set(tune.CONTENDERS) and not {"reference", "expanded"} & set(tune.CONTENDERS)
    found = tune.entries(run)
    assert [(e["kind"], e["group_size"], e["context"]) for e in found] == [
        *(("decode", 1, 64), ("prefill", 1, 64), ("decode", 4, 64), ("prefill", 4, 64))
    ]
    for entry in found:
        rows = {r["impl"]: r for r in run.rows if r["kind"] == entry["kind"] and r["status"] == "ok"}
        assert set(entry["seconds"]) <= set(rows) and {"grouped", "sdpa"} <= set(entry["seconds"])


def test_a_tuning_gone_on_with_is_of_the_machine_it_began_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roofs measured anew at every start were written over those that the rows were judged by; and a folder carried
    to another machine went on there, under one name."""
    monkeypatch.setattr(explore, "measure_machine", lambda *_: pytest.fail("measured again"))
    with Run(run.folder) as again:
        tune.tune(again, "cpu", lambda *_: None)
        there = host.describe("cpu") | {"machine": "another"}
        monkeypatch.setattr(host, "describe", lambda device: there)
        with pytest.raises(InputError, match=r"was begun on .*, this is another"):
            tune.tune(again, "cpu", lambda *_: None)


def test_the_table_decides_what_auto_takes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that nobody reads, or that is read once and kept after it was written anew."""
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"sm_90": [{"kept": 1}], HERE: ["of an older run"]}))
    assert tune.write(run, "cpu", path) == len(FEW)
    table: dict[str, Any] = json.loads(path.read_text())
    assert table["sm_90"] == [{"kept": 1}] and table[HERE] == tune.entries(run)
    assert len(path.read_text().splitlines()) == 4 + 1 + len(FEW) + 2  # an entry a line: a diff shows what changed
    for entry in table[HERE]:
        entry["seconds"] = {"sdpa": 1.0, "grouped": 2.0, "cpp": 3.0}
    monkeypatch.setattr(auto, "table", lambda: table)
    auto._ranked.cache_clear()
    q, k = torch.randn(1, 8, 1, 16), torch.randn(1, 2, 64, 16)
    try:
        assert picked(q, k, k) == "sdpa"
        torch.testing.assert_close(attend(q, k, k), attend(q, k, k, impl="sdpa"))
    finally:
        auto._ranked.cache_clear()


def test_an_unfinished_run_or_a_full_disk_leaves_the_table_as_it_was(run: Run, tmp_path: Path) -> None:
    """Half a table sends every call to whatever happened to be timed."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*tuned.json: "):
        tune.write(run, "cpu", tmp_path / "file" / "tuned.json")
    with Run(run.folder) as again:
        again.plan(["another"])
        with pytest.raises(InputError, match="is unfinished: 1 rows are missing"):
            tune.write(again, "cpu", tmp_path / "tuned.json")
    assert not (tmp_path / "tuned.json").exists()


def test_the_grid_spans_what_auto_is_asked() -> None:
    """R = 1 to 32, short and long, decode and prefill, in every dtype that a cache has."""
    points = tune.points()
    assert {point.dtype for point in points} == {"float32", "bfloat16", "float16"}
    assert {point.shape.group_size for point in points} == {1, 4, 8, 32}
    assert {point.context for point in points if point.kind == "decode"} >= {128, 8192}
    assert len(points) == len(set(points))
