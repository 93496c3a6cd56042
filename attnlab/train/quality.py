"""What sharing heads costs in quality: a declared set of small runs (``attnlab.effects`` says what they can show).

Every variant is trained plain (fewer parameters than MHA) and matched (the FFN widened to MHA's count), with several
seeds. Arms of one seed share data order, so that differences to MHA can be taken seed by seed.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attnlab import host
from attnlab.errors import check_size, divisors
from attnlab.results import Run, row_key
from attnlab.shapes import ModelShape
from attnlab.train.corpus import Corpus, standard_library
from attnlab.train.loop import train
from attnlab.train.recipe import Recipe

# 0.5 M parameters, heads small enough that eight of them fit: what two CPU cores can repeat 21 times in an hour.
FIRST_CUT = ModelShape(3, 128, 8, 8, 16, 256, 256, tied_embeddings=True, max_context=256, name="byte-0.5m")
QUICK = ModelShape(2, 32, 4, 4, 8, 64, 256, tied_embeddings=True, max_context=64, name="byte-quick")
Report = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class Planned:
    """One run of a sweep: its recipe, the arm it belongs to, the experiment it serves."""

    experiment: str
    arm: str
    recipe: Recipe

    @property
    def label(self) -> str:
        return f"{self.recipe.shape.variant} {self.arm} seed {self.recipe.seed}"

    def configuration(self, corpus: Corpus) -> dict[str, Any]:
        """What the row's key hashes: everything that decides the run's numbers."""
        return {"experiment": self.experiment, "arm": self.arm, "corpus": corpus.digest, **asdict(self.recipe)}


def plan(
    shape: ModelShape = FIRST_CUT,
    *,
    seeds: int = 3,
    tokens: int = 2_000_000,
    experiment: str = "first-cut",
    **recipe: Any,
) -> list[Planned]:
    """Every G that divides H × plain and matched × seeds, whole seeds first: a partial sweep is still paired."""
    check_size("seeds", seeds)
    runs = []
    for seed in range(seeds):
        for g in reversed(divisors(shape.n_heads)):
            for arm in ("plain",) if g == shape.n_heads else ("plain", "matched"):
                grouped = shape.with_kv_heads(g, match_params=arm == "matched")
                runs.append(Planned(experiment, arm, Recipe(grouped, seed, tokens, **recipe)))
    return runs


def quick_plan() -> list[Planned]:
    """The machinery in a minute: a toy model, a toy budget, the same code."""
    return plan(QUICK, tokens=65_536, experiment="quick", context=64)


def run_sweep(
    folder: Path, runs: Iterable[Planned], corpus: Corpus | None = None, report: Report | None = None
) -> list[dict[str, Any]]:
    """Train what ``folder`` does not hold yet, one one-thread process per core, appending a row as each run ends.
    ``report(label, step, steps, loss)`` is called about once a second per run. A killed sweep goes on from its rows and
    checkpoints to the same numbers. Raises ``InputError`` if another process writes to ``folder``."""
    corpus = corpus or standard_library()
    facts = host.describe("cpu") | {"threads": 1}
    context = multiprocessing.get_context("spawn")
    progress: Any = context.Queue()
    with Run(folder) as rows, host.training():
        keyed = {row_key(planned.configuration(corpus)): planned for planned in runs}
        rows.plan(keyed)
        pool = ProcessPoolExecutor(
            facts["cores"], mp_context=context, initializer=_start_worker, initargs=(corpus, progress)
        )
        try:
            pending: dict[Future[dict[str, Any]], Planned] = {}
            for key, planned in keyed.items():
                if key not in rows:
                    pending[pool.submit(_work, planned, folder / "checkpoints" / f"{key}.pt")] = planned
            while pending:
                done, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    planned = pending.pop(future)
                    configuration, recipe = planned.configuration(corpus), planned.recipe
                    key = row_key(configuration)
                    more = {"kind": "quality", "n_params": recipe.shape.n_params, "tokens": recipe.tokens}
                    rows.append(key, facts | configuration | more | future.result())
                    (folder / "checkpoints" / f"{key}.pt").unlink(missing_ok=True)
                _drain(progress, report)
        finally:
            for process in list((pool._processes or {}).values()):  # else Ctrl-C waits for minutes of training
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
        return rows.rows


def _drain(progress: Any, report: Report | None) -> None:
    latest = {}
    with contextlib.suppress(queue.Empty):
        while True:
            label, *state = progress.get_nowait()
            latest[label] = state
    for label, state in latest.items():
        if report:
            report(label, *state)


_corpus: Corpus
_progress: Any


def _start_worker(corpus: Corpus, progress: Any) -> None:
    global _corpus, _progress
    _corpus, _progress = corpus, progress
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


def _work(planned: Planned, checkpoint: Path) -> dict[str, Any]:
    def on_step(step: int, loss: float) -> None:
        if step % 10 == 0:
            _progress.put((planned.label, step, planned.recipe.steps, loss))

    return train(planned.recipe, _corpus, checkpoint, on_step)
