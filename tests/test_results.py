"""Rows on disk: whole or not at all, read back as they were written, and never twice.

Nothing here measures, so rows are small inventions; that a real sweep survives being killed is shown in test_kill.
"""

import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas
import pytest

from attnlab import results
from attnlab.errors import InputError
from attnlab.results import (
    PLAN,
    ROWS,
    Run,
    full_commit,
    git_commit,
    headline,
    load_results,
    newest,
    publish,
    row_key,
    run_folder,
)

DIGITS = 0.1 + 0.2  # 0.30000000000000004: one digit less is another number
ROW: dict[str, Any] = {"kind": "decode", "machine": "m-1", "shape": {"n_kv_heads": 3}, "median": DIGITS}


def a_run(folder: Path, keys: str = "abc", **more: Any) -> Path:
    with Run(folder) as run:
        for key in keys:
            run.append(key, ROW | more)
    return folder


def lines(folder: Path) -> list[bytes]:
    return (folder / ROWS).read_bytes().splitlines(keepends=True)


# --- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_does_not_depend_on_the_order_of_fields() -> None:
    """A dict built in another order, by the next version of a function, would measure everything again."""
    one = {"kind": "decode", "shape": {"n_heads": 6, "n_kv_heads": 3}, "context": 7}
    other = {"context": 7, "shape": {"n_kv_heads": 3, "n_heads": 6}, "kind": "decode"}
    assert row_key(one) == row_key(other)
    assert len(row_key(one)) == 16 and int(row_key(one), 16) >= 0


@pytest.mark.parametrize("changed", [{"context": 8}, {"context": "7"}, {"shape": {"n_heads": 3, "n_kv_heads": 6}}])
def test_a_key_depends_on_every_value(changed: dict[str, Any]) -> None:
    """Two questions under one key: the second is never measured, and the first's answer is drawn for it."""
    one = {"kind": "decode", "shape": {"n_heads": 6, "n_kv_heads": 3}, "context": 7}
    assert row_key(one) != row_key(one | changed)


# --- writing and reading --------------------------------------------------------------------------------------------


def test_rows_come_back_to_the_last_digit(tmp_path: Path) -> None:
    """``DataFrame.to_json`` keeps ten digits: a redrawn figure then differs from its rows."""
    folder = tmp_path / "20260101-000000-speed"
    with Run(folder) as run:
        stored = run.append("k1", ROW | {"samples": [1e-9, DIGITS], "terms": {"bandwidth": 5e-324}})
        assert "k1" in run and "k2" not in run and run["k1"] == stored and run.rows == [stored]
    rows = load_results(folder)
    row = rows.iloc[0]
    assert (row["median"], row["samples"], row["terms.bandwidth"]) == (DIGITS, [1e-9, DIGITS], 5e-324)
    assert (row["shape.n_kv_heads"], row["key"], row["schema"]) == (3, "k1", 1)
    assert row["run"] == "20260101-000000-speed"
    assert pandas.Timestamp(row["time"]).tzname() == "UTC"
    assert row["commit"] == git_commit()


def test_opening_again_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A resumed run that forgets what it holds does everything twice."""
    a_run(tmp_path / "r", "ab")
    before = lines(tmp_path / "r")
    with Run(tmp_path / "r") as run:
        assert [row["key"] for row in run.rows] == ["a", "b"] and not run.repaired
        run.append("c", ROW)
    assert lines(tmp_path / "r")[:2] == before
    assert list(load_results(tmp_path / "r")["key"]) == ["a", "b", "c"]


def test_a_key_is_written_once(tmp_path: Path) -> None:
    """A point measured twice would weigh twice in every mean."""
    a_run(tmp_path / "r", "a")
    with Run(tmp_path / "r") as run, pytest.raises(ValueError, match="key a is already in"):
        run.append("a", ROW)
    assert len(lines(tmp_path / "r")) == 1


def test_what_is_not_a_number_is_not_written(tmp_path: Path) -> None:
    """NaN is not JSON: other readers stop at the line, and a figure leaves a hole that nobody explains."""
    with Run(tmp_path / "r") as run:
        with pytest.raises(ValueError, match="Out of range float"):
            run.append("a", ROW | {"median": float("nan")})
        run.append("a", ROW)
    assert len(lines(tmp_path / "r")) == 1


def test_a_tree_is_read_as_one_table(tmp_path: Path) -> None:
    """Published rows lie in a folder per machine and run; a reader that takes one of them draws half the picture."""
    a_run(tmp_path / "m-1" / "r1", "ab")
    a_run(tmp_path / "m-2" / "r2", "a", machine="m-2", extra=1)
    rows = load_results(tmp_path)
    assert sorted(zip(rows["machine"], rows["run"], rows["key"], strict=True)) == [
        ("m-1", "r1", "a"),
        ("m-1", "r1", "b"),
        ("m-2", "r2", "a"),
    ]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    """Two sweeps in one folder would write each key twice. The lock goes with its process, so a killed one leaves
    none behind."""
    with Run(tmp_path / "r") as run:
        with pytest.raises(InputError, match=r"is being written by .*process.*; wait for it, or give another"):
            Run(tmp_path / "r")
        run.append("a", ROW)
    with Run(tmp_path / "r") as run:
        run.append("b", ROW)
    assert len(lines(tmp_path / "r")) == 2


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    """A file where the folder should be, or a read-only disk, is the user's to mend."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file/r: Not a directory"):
        Run(tmp_path / "file" / "r")


# --- what a kill, a full disk or a careless hand leaves behind --------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 20, -1], ids=["first-byte", "middle", "all-but-newline"])
def test_a_torn_last_line_is_cut_off_and_said(tmp_path: Path, cut: int) -> None:
    """A row without its newline may be half a number: kept, it is wrong; glued to the next one, both are lost."""
    folder = a_run(tmp_path / "r")
    *whole, last = lines(folder)
    (folder / ROWS).write_bytes(b"".join(whole) + last[:cut])
    torn = len(last[:cut])
    with Run(folder) as run:
        assert run.repaired.startswith(f"cut off a torn last line of {torn} bytes in {folder / ROWS}")
        assert [row["key"] for row in run.rows] == ["a", "b"]
        run.append("c", ROW)
    assert lines(folder)[:2] == whole
    assert list(load_results(folder)["key"]) == ["a", "b", "c"]


def test_reading_leaves_a_torn_line_where_it_is(tmp_path: Path) -> None:
    """Drawing figures while a sweep is writing must neither fail nor cut the row that is about to be whole."""
    folder = a_run(tmp_path / "r")
    content = (folder / ROWS).read_bytes()[:-5]
    (folder / ROWS).write_bytes(content)
    with pytest.warns(UserWarning, match=r"rows\.jsonl ends in a torn line, which is left out"):
        rows = load_results(folder)
    assert list(rows["key"]) == ["a", "b"]
    assert (folder / ROWS).read_bytes() == content


def _damaged(line: bytes) -> list[bytes]:
    return [line[:-9] + b"\n", b"\n", b"[1]\n", b'"schema"\n', b"{}\n", b'{"schema": 1, "key": "k"}\n', b"\xff\n"]


@pytest.mark.parametrize("kind", range(7), ids=["cut", "empty", "list", "string", "no-schema", "no-run", "not-utf8"])
@pytest.mark.parametrize("reader", [Run, load_results, publish], ids=["Run", "load_results", "publish"])
def test_a_damaged_line_is_named(tmp_path: Path, reader: Any, kind: int) -> None:
    """Skipping it would lose a row in silence; a traceback from json names a column and no file."""
    folder = a_run(tmp_path / "r")
    first, second, third = lines(folder)
    (folder / ROWS).write_bytes(first + _damaged(second)[kind] + third)
    for _ in range(2):  # a reader that failed must not keep the folder locked
        with pytest.raises(InputError, match=r"r/rows\.jsonl, line 2: not a row of attnlab"):
            reader(folder)


def test_rows_of_another_schema_are_refused(tmp_path: Path) -> None:
    """A renamed field reads as absent: the figure comes out, with other numbers."""
    folder = a_run(tmp_path / "r")
    first, second, third = lines(folder)
    (folder / ROWS).write_bytes(first + second.replace(b'"schema": 1', b'"schema": 2') + third)
    for reader in (Run, load_results):
        with pytest.raises(InputError, match=r"r/rows\.jsonl, line 2: schema 2, this version reads schema 1"):
            reader(folder)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """Two files joined by hand: which of the two answers counts is not ours to choose."""
    folder = a_run(tmp_path / "r")
    first, second, third = lines(folder)
    (folder / ROWS).write_bytes(first + second + third + first)
    for reader in (Run, load_results):
        with pytest.raises(InputError, match=r"r/rows\.jsonl, line 4: key a stands there twice"):
            reader(folder)


@pytest.mark.parametrize("name", ["absent", "empty", "started"])
def test_a_folder_without_rows_is_refused(tmp_path: Path, name: str) -> None:
    """An empty table passes on and fails later, as a KeyError in a plot."""
    (tmp_path / "empty").mkdir()
    with Run(tmp_path / "started"):
        pass
    expected = rf"no rows\.jsonl at or below .*{name}" if name != "started" else r"started/rows\.jsonl holds no rows"
    with pytest.raises(InputError, match=expected):
        load_results(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} is not a run: it has no rows\.jsonl with rows"):
        publish(tmp_path / name)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes: the operating system then writes what fits, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_writes_nothing_by_halves(tmp_path: Path) -> None:
    """Half a row at the end of a full disk is a damaged line in the middle once there is room again."""
    folder = a_run(tmp_path / "r", "ab")
    before = (folder / ROWS).read_bytes()
    with Run(folder) as run:
        for room in (40, 0):  # the first bytes of a row fit; none do
            with full_disk(len(before) + room), pytest.raises(InputError) as error:
                run.append("c", ROW)
            assert "rows.jsonl: " in str(error.value)
            assert str(error.value).endswith("; the 2 rows before are safe, rerun to go on")
            assert (folder / ROWS).read_bytes() == before
            assert "c" not in run
        run.append("c", ROW)
    assert list(load_results(folder)["key"]) == ["a", "b", "c"]


def test_a_row_is_on_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fsync a power cut takes rows that the progress bar has counted; a failing one must not count either."""
    synced: list[bytes] = []
    with Run(tmp_path / "r") as run:
        monkeypatch.setattr(os, "fsync", lambda file: synced.append((tmp_path / "r" / ROWS).read_bytes()))
        run.append("a", ROW)
        assert synced == [(tmp_path / "r" / ROWS).read_bytes()]

        def failing(file: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(InputError, match=r"Input/output error; the 1 rows before are safe"):
            run.append("b", ROW)
    assert lines(tmp_path / "r") == synced


# --- where runs lie -------------------------------------------------------------------------------------------------


def test_the_newest_run_goes_on_unless_a_fresh_one_is_asked_for(tmp_path: Path) -> None:
    """A sweep that starts over after Ctrl-C never ends; one that goes on in another kind's folder mixes them."""
    machine = tmp_path / "m-1"
    for name in ("20260101-000000-speed", "20260102-000000-speed", "20260103-000000-quality"):
        a_run(machine / name)
    (machine / "20260104-000000-speed").mkdir()  # holds no rows
    a_run(tmp_path / "m-2" / "20260105-000000-speed")
    assert run_folder(tmp_path, "m-1", suffix="-speed") == machine / "20260102-000000-speed"
    assert run_folder(tmp_path, "m-1", suffix="-quality") == machine / "20260103-000000-quality"
    assert run_folder(tmp_path, "m-1") == machine / "20260103-000000-quality"
    for folder in (
        run_folder(tmp_path, "m-1", fresh=True, suffix="-speed"),
        run_folder(tmp_path, "m-1", suffix="-bench"),
    ):
        assert folder.parent == machine and not folder.exists()
        assert folder.name > "20260105" and pandas.Timestamp(folder.name[:8])
    assert run_folder(tmp_path, "m-1", fresh=True, suffix="-speed").name.endswith("-speed")


def test_newest_takes_the_newest_run_that_has_the_kind(tmp_path: Path) -> None:
    """A quality sweep published after a speed sweep must not empty the speed figures, nor a tuning or another machine's
    run."""
    a_run(tmp_path / "m-1" / "20260101-000000-speed", "ab")
    a_run(tmp_path / "m-1" / "20260102-000000-speed", "c")
    a_run(tmp_path / "m-1" / "20260103-000000-quality", "d", kind="quality")
    a_run(tmp_path / "m-2" / "20260104-000000-speed", "e", machine="m-2")
    a_run(tmp_path / "m-1" / "20260105-000000-tune", "f")  # one batch, some arms: no figure is drawn from it
    rows = load_results(tmp_path)
    assert list(newest(rows, "decode", "m-1")["key"]) == ["c"]
    assert list(newest(rows, "quality", "m-1")["key"]) == ["d"]
    assert list(newest(rows, "decode", "m-2")["key"]) == ["e"]
    assert newest(rows, "quality", "m-2").empty and newest(rows, "decode", "m-3").empty


def test_published_rows_are_a_copy_and_are_published_once(tmp_path: Path) -> None:
    """A run published twice would replace rows that figures in git were drawn from."""
    folder = a_run(tmp_path / "runs" / "m-1" / "r1")
    (folder / "machine.json").write_text("{}")
    (folder / "figures").mkdir()
    root = tmp_path / "published"
    target = publish(folder, root)
    assert target == root / "m-1" / "r1"
    assert sorted(path.name for path in target.iterdir()) == ["machine.json", "rows.jsonl"]
    assert lines(target) == lines(folder)
    assert [path.name for path in (root / "m-1").iterdir()] == ["r1"]
    a_run(folder, "d")
    with pytest.raises(InputError, match="published/m-1/r1 is published already"):
        publish(folder, root)
    assert len(lines(target)) == 3


def test_a_run_without_its_planned_rows_is_not_published(tmp_path: Path) -> None:
    """Half a sweep reads like a whole one. What a first call planned is still to come when a second one, with other
    points, has done all of its own. Runs from before there were plans are what they hold."""
    folder, root = a_run(tmp_path / "m-1" / "r1", "a"), tmp_path / "published"
    with Run(folder) as run:
        assert run.left() == 0
        run.plan("abc")
        run.plan(iter("ad"))
        assert run.left() == 3
        run.append("d", ROW)
    expected = r"m-1/r1 is unfinished: 2 of 4 planned rows are missing; let it go on first"
    with pytest.raises(InputError, match=expected):
        publish(folder, root)
    with Run(folder) as run:
        assert run.left() == 2
        run.append("b", ROW)
        run.append("c", ROW)
        assert run.left() == 0
    assert not root.exists()
    target = publish(folder, root)
    assert [path.name for path in target.iterdir()] == [ROWS] and len(lines(target)) == 4


def test_an_unfinished_run_is_published_as_it_grows_and_gone_on_with_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of training end with the machine that was lent for them: what they left must be on record, must say that
    it is not all, must never be replaced by other rows, and must be gone on with where only the record is."""
    root, folder = tmp_path / "published", a_run(tmp_path / "runs" / "m-1" / "1-quality", "a")
    with Run(folder) as run:
        run.plan("abc")
    target = publish(folder, root, partial=True)
    assert len(lines(target)) == 1 and (target / PLAN).read_text().split() == list("abc")
    a_run(folder, "b")
    assert publish(folder, root, partial=True) == target and len(lines(target)) == 2

    monkeypatch.setattr(results, "PUBLISHED", root)
    again = run_folder(tmp_path / "elsewhere", "m-1", suffix="-quality")
    assert again == tmp_path / "elsewhere" / "m-1" / "1-quality" and lines(again) == lines(target)
    assert run_folder(tmp_path / "elsewhere2", "m-1", suffix="-quality", fresh=True) != again
    assert run_folder(tmp_path / "elsewhere3", "m-2", suffix="-quality").parent.name == "m-2"

    other = a_run(tmp_path / "other" / "m-1" / "1-quality", "c")
    with pytest.raises(InputError, match="is published already"):
        publish(other, root, partial=True)
    a_run(folder, "c")
    publish(folder, root)
    assert len(lines(target)) == 3 and not (target / PLAN).exists()  # whole, and so never to be gone on with
    assert run_folder(tmp_path / "elsewhere4", "m-1", suffix="-quality").name != "1-quality"


def test_a_plan_on_a_full_disk_stays_as_it_was(tmp_path: Path) -> None:
    """Half a plan makes half a run a whole one, and half a key a run that is never finished."""
    with Run(tmp_path / "r") as run:
        run.plan("ab")
        with full_disk(3), pytest.raises(InputError, match=r"cannot write .*/r/plan\.txt: File too large"):
            run.plan(["a" * 16])
        assert run.left() == 2


def test_a_torn_line_is_not_published(tmp_path: Path) -> None:
    """It would be warned about by everybody who reads the published rows from then on."""
    folder = a_run(tmp_path / "r1")
    with (folder / ROWS).open("ab") as file:
        file.write(b'{"schema": 1, "ke')
    with pytest.warns(UserWarning, match="torn line"):
        target = publish(folder, tmp_path / "published")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_results(target)) == 3


def test_publishing_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """Half a run below bench/results/ is read as a whole one."""
    folder = a_run(tmp_path / "r1")
    with full_disk(100), pytest.raises(InputError, match=r"cannot write .*published/m-1/r1: "):
        publish(folder, tmp_path / "published")
    assert list((tmp_path / "published").rglob("*.*")) == []
    assert len(lines(publish(folder, tmp_path / "published"))) == 3


@pytest.mark.parametrize("machine", ["../elsewhere", "", None])
def test_a_machines_name_cannot_lead_elsewhere(tmp_path: Path, machine: str | None) -> None:
    """Rows that somebody sent decide where they are written to."""
    folder = a_run(tmp_path / "r1", machine=machine)
    with pytest.raises(InputError, match=r"line 1: .* is not a machine's name"):
        publish(folder, tmp_path / "published")


def test_a_missing_headline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README and ``attnlab compare`` ask for it; a clone without published rows must not show a traceback."""
    monkeypatch.setattr(results, "PUBLISHED", tmp_path)
    with pytest.raises(InputError, match=r"no headline machine is published: .*headline\.txt is absent"):
        headline()
    (tmp_path / "headline.txt").write_text("m-1\n")
    assert headline() == "m-1"
    with pytest.raises(InputError, match=r"no rows\.jsonl at or below"):
        load_results()
    a_run(tmp_path / "m-1" / "r1")
    assert len(load_results()) == 3


# --- which code wrote it --------------------------------------------------------------------------------------------


def _git(folder: Path, *arguments: str) -> str:
    command = [
        "git",
        "-C",
        str(folder),
        "-c",
        "user.name=n",
        "-c",
        "user.email=e",
        "-c",
        "commit.gpgsign=no",
        *arguments,
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_this_library_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed into an environment inside another project's checkout, git answers with that project's commit."""
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "file").write_text("1")
    _git(tmp_path, "init")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "one")
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    assert git_commit.__wrapped__() == _git(tmp_path, "rev-parse", "--short", "HEAD") != ""
    whole = _git(tmp_path, "rev-parse", "HEAD")
    assert [full_commit(name) for name in ("HEAD", whole[:7], "nowhere", "--all")] == [whole, whole, "", ""]
    (tmp_path / "site-packages" / "file").write_text("2")
    assert git_commit.__wrapped__().endswith("-dirty")
    monkeypatch.setattr(results, "REPOSITORY", tmp_path / "site-packages")
    assert git_commit.__wrapped__() == full_commit("HEAD") == ""


def test_appending_does_not_load_pandas() -> None:
    """Every process that writes a row would wait for it, and a table is only needed to read."""
    code = "import sys, attnlab.results; assert not {'pandas', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(results.__file__).parents[1])


def test_a_row_is_one_line_of_json(tmp_path: Path) -> None:
    """Text with newlines or other alphabets must not break the one-row-a-line rule."""
    folder = a_run(tmp_path / "r", "a", reason="two\nlines, ≥ 1 €")
    assert [json.loads(line)["reason"] for line in lines(folder)] == ["two\nlines, ≥ 1 €"]
