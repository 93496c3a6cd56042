"""A sweep: a declared set of training runs, each a key; one-thread runs side by side, resumable, rows as they end.

Arms of one seed share initial weights and data order, so that differences to MHA can be taken seed by seed
(``attnlab.effects`` says what they can show). What is declared lies in ``train/sweeps.py``.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attnlab import host
from attnlab.measure.roofs import matmul_rate
from attnlab.model.convert import to_grouped
from attnlab.model.llama import Llama
from attnlab.predict.time import training_flops
from attnlab.results import Run, row_key
from attnlab.train.corpus import Corpus
from attnlab.train.loop import Task, forget, train
from attnlab.train.maps import conversion_rows
from attnlab.train.recipe import Recipe

Report = Callable[[str, int, int, float, str], None]


@dataclass(frozen=True)
class Planned:
    """One run of a sweep: its recipe and data, the arm it belongs to, the experiment it serves, and in ``facts`` what
    else tells it from others. With a ``parent`` it starts from that run's last weights, converted to its own number of
    KV heads by the method that ``arm`` names, and is judged after each of ``alphas``, shares of the parent's steps: a
    row each."""

    experiment: str
    arm: str
    recipe: Recipe
    task: Task
    facts: tuple[tuple[str, Any], ...] = ()
    parent: "Planned | None" = None
    alphas: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.experiment} {self.recipe.shape.variant} {self.arm} seed {self.recipe.seed}"

    @property
    def configuration(self) -> dict[str, Any]:
        """What the run's key hashes: its name, and everything that decides its numbers."""
        return {"experiment": self.experiment, "arm": self.arm, **self.training, **dict(self.facts)}

    @property
    def training(self) -> dict[str, Any]:
        """What decides its numbers, whatever it is called."""
        begins = {"parent": self.parent.key, "arm": self.arm} if self.parent else {}
        return {"corpus": self.task.digest, **asdict(self.recipe), **begins}

    @property
    def key(self) -> str:
        return row_key(self.configuration)

    @property
    def marks(self) -> dict[float, int]:
        """Alpha -> step."""
        return {alpha: round(alpha * self.parent.recipe.steps) for alpha in self.alphas} if self.parent else {}

    def row_keys(self) -> dict[str, dict[str, Any]]:
        """Keys of the rows that the run ends in, with what tells each from the others."""
        parts = [{"alpha": alpha} for alpha in self.alphas] or self.task.parts()
        return {row_key({**self.configuration, **part}): part for part in parts}


def run_sweep(
    folder: Path, runs: Iterable[Planned], report: Report | None = None, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Train what ``folder`` does not hold yet, one one-thread process per core (on a card one process), appending rows
    as each run ends. ``report(label, step, steps, loss, state)`` is called about once a second per run. A killed sweep
    goes on from its rows and checkpoints to the same numbers. Raises ``InputError`` if another process writes to
    ``folder``."""
    facts = host.describe(device) | {"threads": 1}
    context = multiprocessing.get_context("spawn")
    progress: Any = context.Queue()
    runs = list(runs)
    with Run(folder) as rows, host.training():
        rows.plan(key for planned in runs for key in planned.row_keys())
        waiting = [planned for planned in runs if any(key not in rows for key in planned.row_keys())]
        weights: dict[Planned | None, Path] = {
            run.parent: folder / "models" / f"{run.parent.key}.pt" for run in runs if run.parent
        }
        # a parent whose weights are not there is trained again, to the same ones, even if its row is
        needed = dict.fromkeys(run.parent for run in waiting if run.parent and not weights[run.parent].exists())
        waiting = [*(parent for parent in needed if parent not in waiting), *waiting]
        _add_conversions(rows, weights, facts)  # of what is there; else a sweep that is stopped never has them
        workers = facts["cores"] if device == "cpu" else 1
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(progress,))
        try:
            pending: dict[Future[dict[str, Any]], Planned] = {}
            while waiting or pending:
                for planned in list(waiting):
                    if len(pending) == 2 * workers:
                        break
                    if planned.parent and not weights[planned.parent].exists():
                        continue
                    if any(run.training == planned.training for run in pending.values()):
                        continue
                    waiting.remove(planned)
                    keep, start = weights.get(planned), weights.get(planned.parent)
                    if keep is None and (same := _trained_already(planned, rows.rows)):
                        named = {"key": planned.key, "copy_of": same["key"]}
                        rows.append(planned.key, same | planned.configuration | named)
                        continue
                    checkpoint = folder / "checkpoints" / f"{planned.key}.pt"
                    pending[pool.submit(_work, planned, checkpoint, start, keep, device)] = planned
                done, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    planned = pending.pop(future)
                    result = future.result()
                    for key, row in _rows(planned, facts, result):
                        if key not in rows:
                            rows.append(key, row)
                    forget(folder / "checkpoints" / f"{planned.key}.pt")
                    if result["status"] != "ok":  # what was to start from its weights never can
                        waiting = [run for run in waiting if run.parent != planned]
                _drain(progress, report)
            _add_conversions(rows, weights, facts)
        finally:
            for process in list((pool._processes or {}).values()):  # else Ctrl-C waits for minutes of training
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
        return rows.rows


def _add_conversions(rows: Run, weights: Mapping[Planned | None, Path], facts: dict[str, Any]) -> None:
    """Append what conversion does to the attention of each parent whose weights are there, once."""
    for parent, path in weights.items():
        if parent and path.exists() and isinstance(parent.task, Corpus):
            for row in conversion_rows(_loaded(parent, path), parent.task):
                key = row_key({"parent": parent.key, "method": row["method"], "head": row["head"]})
                if key not in rows:
                    rows.append(key, facts | {"parent": parent.key} | row)


def _trained_already(planned: Planned, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of a run that differs from ``planned`` in nothing but what it is called, and so in no number."""
    wanted = planned.training
    if planned.parent is not None:
        return None
    return next((row for row in rows if "parent" not in row and all(row.get(n) == wanted[n] for n in wanted)), None)


def _rows(planned: Planned, facts: dict[str, Any], result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    shape = planned.recipe.shape
    said = facts | planned.task.facts() | planned.configuration
    row = said | {"kind": "quality", "n_params": shape.n_params} | result
    marks, parts = dict(row.pop("marks", ())), row.pop("parts", None)
    if result["status"] == "ok" and "matmul_rate" in row:
        spent = row["tokens_per_second"] * training_flops(shape, planned.recipe.context)
        row["mfu"] = spent / row["matmul_rate"]
    if planned.alphas and marks:
        parts = [{"bits_per_byte": marks[step]} for step in planned.marks.values()]
    keys = planned.row_keys()
    if len(keys) > 1:  # of the run as a whole, not of one of its rows
        row = {name: value for name, value in row.items() if name != "positions" and not name.endswith("_raw")}
    for (key, part), own in zip(keys.items(), parts or [{}] * len(keys), strict=True):
        yield key, row | part | own


def _drain(progress: Any, report: Report | None) -> None:
    latest = {}
    with contextlib.suppress(queue.Empty):
        while True:
            label, *state = progress.get_nowait()
            latest[label] = state
    for label, state in latest.items():
        if report:
            report(label, *state)


def _loaded(planned: Planned, path: Path) -> Llama:
    """The model that a finished run left in ``path``."""
    model = Llama(planned.recipe.shape)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


_progress: Any


def _start_worker(progress: Any) -> None:
    global _progress
    _progress = progress
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer, without a traceback here
    torch.set_num_threads(1)  # two one-thread runs side by side beat one run of two threads


def _leave_with_parent() -> None:
    """End with the sweep, however it ends: after a kill -9 its workers would train on, beside those of the next start,
    and write the same checkpoints."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(planned: Planned, checkpoint: Path, start: Path | None, keep: Path | None, device: str) -> dict[str, Any]:
    recipe, first = planned.recipe, (0, 0.0)

    def on_step(step: int, loss: float) -> None:
        nonlocal first
        now, said = time.monotonic(), "starting"
        if not first[0]:  # what came before is start-up, and steps of another day
            first = step, now
        else:
            seconds = (now - first[1]) / (step - first[0])
            left = (recipe.steps - step) * seconds / 60
            said = f"{recipe.batch * recipe.context / seconds:,.0f} tokens/s, {left:.0f} min left"
        _progress.put((planned.label, step, recipe.steps, loss, said))

    model = None
    if start is not None and planned.parent is not None:
        model = _loaded(planned.parent, start)
        if planned.arm != "continued":
            model = to_grouped(model, recipe.shape.n_kv_heads, planned.arm, seed=recipe.seed)
    rate = matmul_rate("bfloat16" if recipe.autocast else "float32", device)
    marks = tuple(planned.marks.values())
    result = train(recipe, planned.task, checkpoint, on_step, model=model, marks=marks, device=device, keep=keep)
    return result | {"matmul_rate": rate}
