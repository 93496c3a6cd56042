"""Commands that read rows: which rows they take, and the tables they make of them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnlab.results import ROWS, Run

Command = Callable[..., tuple[int, str, str]]


def a_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    with Run(folder) as run:
        for index, row in enumerate(rows):
            run.append(str(index), row)
    return folder


@pytest.mark.parametrize("how", ["damaged", "foreign", "no-rows"])
def test_rows_that_cannot_be_read(refused: Callable[..., str], tmp_path: Path, how: str) -> None:
    """From every command that reads rows: the file and the line, so that it can be looked at."""
    folder = a_run(tmp_path / "r", [{"kind": "quality", "machine": "m-1"}] * 2)
    text = (folder / ROWS).read_text()
    (folder / ROWS).write_text(
        {"damaged": text[:30] + "\n" + text, "foreign": text.replace('"schema": 1', '"schema": 9', 1), "no-rows": ""}[
            how
        ]
    )
    expected = {
        "damaged": "r/rows.jsonl, line 1: not a row of attnlab",
        "foreign": "r/rows.jsonl, line 1: schema 9, this version reads schema 1",
        "no-rows": "no",
    }[how]
    commands = [("compare", folder), ("figures", "--results", folder), ("quality", "report", folder)]
    for arguments in [*commands, ("quality", "status", "--runs", folder), ("results", "publish", folder)]:
        assert expected in refused(*arguments)


def test_rows_of_another_kind(refused: Callable[..., str], tmp_path: Path) -> None:
    """A speed run has no seeds and a sweep no times: neither may end in a KeyError."""
    speed = a_run(tmp_path / "speed", [timed("auto", 2, 1.0)])
    sweep = a_run(tmp_path / "sweep", [{"kind": "quality", "status": "ok", "machine": "m-1"}])
    assert "no finished quality runs at" in refused("quality", "report", speed)
    assert "no finished quality runs at" in refused("quality", "status", "--runs", speed)
    assert "no timed rows in sweep; measure some with: attnlab explore" in refused("compare", speed, sweep)
    assert "no timed rows in sweep" in refused("compare", sweep, speed)
    assert "no headline machine is published" in refused("compare", speed)


def timed(impl: str, g: int, median: float, **more: Any) -> dict[str, Any]:
    """One decode row as ``explore`` writes it, as far as tables need it."""
    shape = {"n_heads": 6, "n_kv_heads": g, "head_dim": 10}
    facts = {"kind": "decode", "status": "ok", "machine": "m-1", "shape": shape, "variant": f"GQA-{g}", "batch": 2}
    numbers = {"median": median, "predicted": median, "fraction_of_roof": 0.5, "read_bandwidth": 8e9}
    return {**facts, **numbers, "context": 7, "queries": 1, "dtype": "float32", "impl": impl, **more}


def test_compare_with_the_headline(command: Command, tmp_path: Path) -> None:
    """Mine over theirs, not theirs over mine."""
    mine = a_run(tmp_path / "mine", [timed("auto", 2, 3.0), timed("auto", 3, 1.0)])
    a_run(tmp_path / "published" / "m-2" / "r1", [timed("auto", 2, 2.0, machine="m-2")])
    (tmp_path / "published" / "headline.txt").write_text("m-2\n")
    code, out, err = command("compare", mine)
    assert (code, err) == (0, "") and re.search(r"decode +│ +float32 +│ +GQA-2 +│ +1 +│ +1\.50×", out)
    assert "GQA-3" not in out and "m-1 (reads 8 GB/s) beside m-2" in out


def test_compare_of_two_runs(command: Command, tmp_path: Path) -> None:
    """The second over the first, however they are named; the table only where a point differs."""
    for name, commit, median in (("r1", "1111111", 2.0), ("r2", "2222222", 3.0)):
        rows = [
            timed("sdpa", g, median if g == 2 else 1.0, samples=[median if g == 2 else 1.0] * 20) for g in (1, 2, 3)
        ]
        a_run(tmp_path / "runs" / "m-1" / name, rows)
        path = tmp_path / "runs" / "m-1" / name / ROWS
        path.write_text(re.sub(r'"commit": "[^"]*"', f'"commit": "{commit}"', path.read_text()))
    for arguments in (("runs/m-1/r1", "runs/m-1/r2/rows.jsonl"), ("1111111", "2222222")):
        code, out, err = command("compare", *arguments)
        assert (code, err) == (0, "")
        assert out.startswith(
            "A: r1 of m-1, commit 1111111\nB: r2 of m-1, commit 2222222\n3 points: B/A is 1.14× (geom"
        )
        assert (
            "1.00× in the median point" in out
            and "1 of them differ significantly, B slower in 1 and faster in 0" in out
        )
        assert re.search(r"^ *GQA-2 decode ctx7 b2 fp32 +sdpa +1\.50× ", out, re.MULTILINE) and "GQA-3" not in out
    code, out, err = command("compare", "2222222", "2222222")
    assert (code, err) == (0, "") and out.endswith("0 of them differ significantly, B slower in 0 and faster in 0.\n")


def test_publish(command: Command, refused: Callable[..., str], tmp_path: Path) -> None:
    """Under the machine's name; once."""
    run = a_run(tmp_path / "runs" / "m-1" / "r1", [timed("auto", 2, 3.0)])
    target = tmp_path / "published" / "m-1" / "r1"
    assert command("results", "publish", run) == (0, f"{target}\n", "")
    assert (target / ROWS).read_bytes() == (run / ROWS).read_bytes()
    assert f"{target} is published already" in refused("results", "publish", run)
