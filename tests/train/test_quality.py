"""The sweep: whole rows, nothing twice, weights handed on, through kills, mistakes and a second process."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from attnlab.errors import InputError
from attnlab.model.convert import to_grouped
from attnlab.model.llama import Llama
from attnlab.predict.time import training_flops
from attnlab.results import Run, load_results
from attnlab.shapes import ModelShape
from attnlab.train.corpus import Corpus, prepare
from attnlab.train.quality import Planned, run_sweep
from attnlab.train.recall import Recall
from attnlab.train.recipe import Recipe
from attnlab.train.sweeps import uptraining

TINY = ModelShape(2, 20, 6, 6, 4, 23, 1024, tied_embeddings=True, name="tiny")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A real corpus, a small one: pieces of three modules of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    library = Path(sysconfig.get_paths()["stdlib"])
    whole = "".join((library / f"{name}.py").read_text() for name in ("argparse", "inspect", "typing"))
    for number in range(90):
        (folder / f"m{number}.py").write_text(whole[1500 * number : 1500 * (number + 1)])
    return prepare(str(folder), 1024, tmp_path_factory.mktemp("corpora"))


def parent_of(text: Corpus, steps: int = 40) -> Planned:
    return Planned("g-sweep", "plain", Recipe(TINY, 0, steps * 21, batch=3, context=7), text)


def declared(text: Corpus) -> list[Planned]:
    """An MHA run, one that diverges, three that start from the first, of whose steps 1 % is none; one on another task,
    and the first under another name."""
    parent = parent_of(text)
    ill = replace(
        parent, arm="matched", recipe=replace(parent.recipe, shape=TINY.with_kv_heads(1, True), peak_rate=1e30)
    )
    children = {(run.recipe.shape.n_kv_heads, run.arm): run for run in uptraining(parent, 1)}
    started = [children[6, "continued"], children[3, "mean"], children[1, "random"]]
    task = Recall(((8, 2), (13, 3)), vocab_size=37)
    looked_up = Planned("recall", "plain", replace(parent.recipe, shape=replace(TINY, vocab_size=37)), task)
    again = replace(parent, experiment="scale", facts=(("budget", "fixed"),))
    return [parent, ill, *started, looked_up, again]


class Swept(NamedTuple):
    folder: Path
    runs: list[Planned]
    rows: list[dict[str, Any]]
    told: set[str]

    def row(self, run: Planned, alpha: float | None = None) -> dict[str, Any]:
        (key,) = (key for key, part in run.row_keys().items() if part.get("alpha") == alpha)
        (row,) = (row for row in self.rows if row["key"] == key)
        return row


@pytest.fixture(scope="module")
def swept(text: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    folder, runs, told = tmp_path_factory.mktemp("machine") / "a-quality", declared(text), set()
    rows = run_sweep(folder, runs, lambda label, *_: told.add(label))
    return Swept(folder, runs, rows, told)


@pytest.mark.slow
def test_rows_are_whole_and_nothing_is_done_twice(swept, text):
    """A row must say all that its number depends on, a diverged run's included; the second call finds its rows and
    neither trains nor writes."""
    frame = load_results(swept.folder)
    frame = frame[frame["kind"] == "quality"].set_index("key")
    assert set(frame.index) == {key for run in swept.runs for key in run.row_keys()} and len(frame) == 2 + 3 * 5 + 3
    for run in swept.runs:
        for key, part in run.row_keys().items():
            row, recipe, alpha = frame.loc[key], run.recipe, part.get("alpha")
            said = (row["experiment"], row["arm"], row["seed"], row["tokens"], row["batch"], row["context"])
            assert said == (run.experiment, run.arm, recipe.seed, recipe.tokens, 3, part.get("context", 7))
            assert (row["corpus"], row["peak_rate"]) == (run.task.digest, recipe.peak_rate)
            assert row["n_params"] == sum(parameter.numel() for parameter in Llama(recipe.shape).parameters())
            assert alpha is None or (row["alpha"], row["parent"]) == (alpha, swept.runs[0].key)
    assert frame[["machine", "torch", "commit", "time", "run"]].notna().all(axis=None)
    on_text = frame[frame["corpus"] == text.digest]
    assert on_text[["xz_bits", "validation_bytes"]].notna().all(axis=None)
    assert {row["threads"] for row in swept.rows if row["kind"] == "quality"} == {1}
    assert swept.row(swept.runs[0])["shape"] == asdict(TINY)
    assert swept.told <= {run.label for run in swept.runs}
    assert not list((swept.folder / "checkpoints").glob("*"))
    with Run(swept.folder) as run:
        assert run.left() == 0
    before = (swept.folder / "rows.jsonl").read_bytes()
    assert run_sweep(swept.folder, swept.runs) == swept.rows
    assert (swept.folder / "rows.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_diverged_run_is_a_row_and_the_sweep_goes_on(swept):
    """A NaN must not end hours of other runs, nor be left out: an arm that diverges is a result."""
    row = swept.row(swept.runs[1])
    assert row["status"] == "diverged" and "nan" in row["reason"] and re.search(r"step \d", row["reason"])
    assert "bits_per_byte" not in row
    assert {swept.row(run, alpha)["status"] for run in swept.runs[2:5] for alpha in (0.0, 0.2)} == {"ok"}


@pytest.mark.slow
def test_a_converted_run_starts_from_its_parents_weights(swept, text):
    """Alpha 0 is the conversion alone: it must be the parent as it was left, converted by the method that the row
    names, and judged on the whole validation text. Where two alphas fall on one step both are rows."""
    parent, _, *children = swept.runs[:5]
    model = Llama(TINY)
    model.load_state_dict(torch.load(swept.folder / "models" / f"{parent.key}.pt", weights_only=True))
    raw = text.evaluate(model, 7, True)["bits_per_byte"]
    assert raw == pytest.approx(swept.row(parent)["bits_per_byte_raw"], rel=1e-6)
    assert [path.stem for path in (swept.folder / "models").iterdir()] == [parent.key]
    for run in children:
        own = (
            model
            if run.arm == "continued"
            else to_grouped(model, run.recipe.shape.n_kv_heads, run.arm, run.recipe.seed)
        )
        found = {alpha: swept.row(run, alpha)["bits_per_byte"] for alpha in run.alphas}
        assert found[0.0] == pytest.approx(text.evaluate(own, 7, True)["bits_per_byte"], rel=1e-6)
        assert found[0.0] == found[0.01] and len(set(found.values())) == 4
        assert "bits_per_byte_raw" not in swept.row(run, 0.2)  # which is of the whole run
    assert (
        abs(swept.row(children[0], 0.0)["bits_per_byte"] - raw)
        < 1e-6
        < abs(swept.row(children[2], 0.0)["bits_per_byte"] - raw)
    )


@pytest.mark.slow
def test_a_task_of_two_settings_ends_in_two_rows(swept):
    """One number for short and long sequences together hides where recall ends."""
    run = swept.runs[5]
    short, long = ({**row} for row in swept.rows if row.get("experiment") == "recall")
    assert [(row["context"], row["pairs"]) for row in (short, long)] == [(8, 2), (13, 3)]
    assert {short["key"], long["key"]} == set(run.row_keys()) and short["relations"] == 1
    assert all(0 <= row["accuracy"] <= 1 and "parts" not in row and "accuracy_raw" not in row for row in (short, long))


@pytest.mark.slow
def test_a_run_under_another_name_is_not_trained_again(swept):
    """The same numbers for the same hours: it is copied, and the row says from which."""
    first, again = swept.row(swept.runs[0]), swept.row(swept.runs[6])
    differ = {name for name in again if again[name] != first.get(name)}
    assert differ <= {"key", "experiment", "budget", "copy_of", "time"} and again["copy_of"] == first["key"]
    assert again["budget"] == "fixed" and again["key"] != first["key"]


@pytest.mark.slow
def test_the_share_of_the_matmul_rate_is_that_of_its_parts(swept):
    """A rate in tokens says nothing of a machine; its share of what the machine multiplies, measured by the same
    process on its one thread, does. Above 1 one of the two is wrong."""
    row = swept.row(swept.runs[0])
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * training_flops(TINY, 7) / row["matmul_rate"])
    assert 0 < row["mfu"] < 1


NUMBERS = ["key", "arm", "status", "n_params", "bits_per_byte", "bits_per_byte_raw", "curve", "positions"]


def numbers(folder: Path) -> list[dict[str, Any]]:
    rows = load_results(folder)
    return rows[rows["kind"] == "quality"][NUMBERS].fillna(-1.0).sort_values("key").to_dict("records")


@pytest.mark.slow
def test_a_parent_without_weights_is_trained_again_to_the_same(swept, tmp_path):
    """Rows are published and kept, weights are not: a run that starts from a finished one must make them again, equal
    to the last bit, and add no second row for it."""
    folder, parent, child = tmp_path / "again", swept.runs[0], swept.runs[3]
    shutil.copytree(swept.folder, folder)
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if not any(key in row for key in child.row_keys())]
    assert len(kept) == len(rows) - 5
    (folder / "rows.jsonl").write_text("".join(kept))
    weights = folder / "models" / f"{parent.key}.pt"
    before = torch.load(weights, weights_only=True)
    weights.unlink()
    run_sweep(folder, swept.runs)
    after = torch.load(weights, weights_only=True)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) and len(after) == len(before)
    assert numbers(folder) == numbers(swept.folder)


@pytest.mark.slow
def test_what_starts_from_a_diverged_run_is_left_out(tmp_path, text):
    """A sweep that waits for weights that never come does not end."""
    ill = replace(parent_of(text), recipe=replace(parent_of(text).recipe, peak_rate=1e30))
    rows = run_sweep(tmp_path / "run", [ill, uptraining(ill, 1)[0]])
    assert [row["status"] for row in rows] == ["diverged"]
    with Run(tmp_path / "run") as run:
        assert run.left() == 5


@pytest.mark.slow
def test_a_mistake_in_a_worker_reaches_the_caller(tmp_path, text):
    """A pool that swallows what its workers raise ends "done" with rows missing."""
    long = Planned("e", "plain", Recipe(TINY, 0, 600_000, batch=3, context=100_000), text)
    with pytest.raises(InputError, match="the training text has 0 windows of 100000 tokens, fewer than a batch of 3"):
        run_sweep(tmp_path / "run", [long])
    with Run(tmp_path / "run") as rows:  # and the folder is free again, with what it lacks on record
        assert rows.rows == [] and rows.left() == 1


def test_a_second_writer_is_refused_and_told_who_is_first(tmp_path, text):
    """Two sweeps in one folder train every run twice and interleave their rows. Who has forgotten that one is running
    needs its number."""
    first = rf"process {os.getpid()} \(.*pytest.*\)" if _locks() else "another process"
    with Run(tmp_path / "run"), pytest.raises(InputError, match=rf"is being written by {first}; wait for it"):
        run_sweep(tmp_path / "run", [parent_of(text)])


# Workers import the script too, so that they save after every look at the loss.
SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from attnlab.train import loop
from attnlab.train.corpus import load
from attnlab.train.quality import run_sweep
from attnlab.train.sweeps import uptraining
from tests.train.test_quality import parent_of

loop.SAVE_EVERY_SECONDS = -1.0
if __name__ == "__main__":
    parent = parent_of(load(Path(sys.argv[2])), 300)
    others = [replace(parent, recipe=replace(parent.recipe, seed=seed)) for seed in (1, 2)]
    run_sweep(Path(sys.argv[1]), [parent, *others, *uptraining(parent, 1)[:2]])
"""


def _until(seen: Callable[[], bool], process: "subprocess.Popen[bytes]", seconds: float = 240.0) -> None:
    """Wait until ``seen()``, while ``process`` lives."""
    end = time.monotonic() + seconds
    while not seen():
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < end, "the sweep does not get on"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_numbers(tmp_path, text):
    """kill -9 three times: before the first row, after the second, and while what starts from a finished run's weights
    is trained. Workers that outlive their parent go on writing to the checkpoints that their successors write (two
    writers, one file): they must end with it. What is there is kept, nothing is done twice, and the numbers are those
    of a sweep that nobody disturbed. Meanwhile a second writer is told the number of the first."""
    script = tmp_path / "sweep.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(name: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, str(script), str(tmp_path / name), str(text.path)]
        return subprocess.Popen(command, env=environment, cwd=tmp_path)

    assert start("undisturbed").wait(timeout=600) == 0
    folder, kept = tmp_path / "killed", b""
    for rows_before in (0, 2, 3):
        process = start("killed")
        _until(lambda: _lines(folder) >= rows_before and any(folder.glob("checkpoints/*.pt")), process)  # noqa: B023
        with pytest.raises(
            InputError, match=rf"process {process.pid} \(.*sweep\.py" if _locks() else "another process"
        ):
            Run(folder)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = (folder / "rows.jsonl").read_bytes()
        assert content.startswith(kept)
        kept = content
        time.sleep(1.0)
        states = {path: path.stat().st_mtime_ns for path in folder.glob("checkpoints/*")}
        time.sleep(0.5)
        assert {path: path.stat().st_mtime_ns for path in folder.glob("checkpoints/*")} == states, "orphans train on"
    assert start("killed").wait(timeout=600) == 0
    assert (folder / "rows.jsonl").read_bytes().startswith(kept)
    assert numbers(folder) == numbers(tmp_path / "undisturbed") and len(numbers(folder)) == 3 + 2 * 5


def _locks() -> bool:
    return Path("/proc/locks").exists()


def _lines(folder: Path) -> int:
    path = folder / "rows.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
