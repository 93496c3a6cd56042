"""The queue of jobs for a CUDA machine, most valuable first: what each measures, its command, and whether its rows are
published. ``make gpu-jobs`` lists it; without an installation: python -m bench.gpu_jobs

Each command keeps its rows below the folder OUT, ends within nine minutes, and goes on from its rows when it is run
again. A run is published by ``attnlab results publish RUN`` once nothing of its plan is missing.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from attnlab.errors import InputError
from attnlab.results import load_results

if TYPE_CHECKING:
    import pandas

ATTNLAB = "python -m attnlab"
EXPLORE = f"{ATTNLAB} explore --device cuda --dtypes bfloat16 --minutes 7 --no-figures"
LARGE = "--device cuda --size 34m --seeds 3 --tokens 300000000"
TRAIN = f'{ATTNLAB} quality run {LARGE} --text site-packages --minutes 7 --runs "$OUT"'
SIZES = ["shape.n_kv_heads", "context", "batch"]


class Job(NamedTuple):
    """``published``, given all published rows of CUDA machines."""

    name: str
    measures: str
    command: str
    published: Callable[["pandas.DataFrame"], bool]


def holds(points: int = 1, **wanted: object) -> Callable[["pandas.DataFrame"], bool]:
    """Are there rows of at least so many sizes that have the ``wanted`` values? (``__`` in a name stands for a dot.)"""

    def look(rows: "pandas.DataFrame") -> bool:
        for name, value in wanted.items():
            column = name.replace("__", ".")
            rows = rows[rows[column] == value] if column in rows else rows[:0]
        return len(rows[[name for name in SIZES if name in rows]].drop_duplicates()) >= points

    return look


JOBS = [
    Job(
        "1a",
        "roofs, and the correctness of every implementation on the card",
        f'{EXPLORE} --grid full --runs "$OUT"',
        holds(kind="correctness", dtype="bfloat16"),
    ),
    Job(
        "1b",
        "decode: 6 G, 4 contexts, 4 batches, H = 32, every implementation (the run of 1a)",
        f'{EXPLORE} --grid full --runs "$OUT"',
        holds(96, kind="decode", impl="grouped", shape__n_heads=32),
    ),
    Job(
        "1c",
        "FlexAttention as it is and tuned, on the quick grid",
        f'{EXPLORE} --peers flex_tuned --runs "$OUT/flex"',
        holds(24, kind="decode", impl="flex_tuned"),
    ),
    Job(
        "1d",
        "decode with H = 24, whose groups are no powers of two",
        f'{EXPLORE} --grid full --heads 24 --runs "$OUT/h24"',
        holds(96, kind="decode", impl="grouped", shape__n_heads=24),
    ),
    Job(
        "1e",
        "decode beside other people's kernels, in one interleaved run",
        f'{EXPLORE} --grid full --peers all --runs "$OUT/peers"',
        holds(96, kind="decode", impl="flashinfer"),
    ),
    Job(
        "2",
        "memory: peaks, largest batch and largest context against a real end of memory",
        f'{ATTNLAB} prove-memory --device cuda --minutes 7 --runs "$OUT"',
        holds(kind="limit"),
    ),
    Job(
        "3",
        "generation end to end: a 7B-shaped model, four G, context and batch until memory ends",
        f'{ATTNLAB} generation --device cuda --grid full --minutes 7 --runs "$OUT"',
        holds(kind="generate"),
    ),
    Job(
        "4",
        "prefill: 6 G, 3 contexts, 2 batches (the run of 1a)",
        f'{EXPLORE} --grid full --runs "$OUT"',
        holds(36, kind="prefill", impl="grouped", shape__n_heads=32),
    ),
    Job(
        "5",
        "quality from scratch: 34 M parameters, every G, plain and matched, 3 seeds, on the Python sources installed",
        f"{TRAIN} --experiments g-sweep",
        holds(4, kind="quality", experiment="g-sweep"),
    ),
    Job(
        "6",
        "training back: the MHA of job 5 converted by every method to every G",
        f"{TRAIN} --experiments g-sweep,uptraining",
        holds(3, kind="quality", experiment="uptraining"),
    ),
    Job(
        "7",
        "which implementation is fastest on the card, into the table that auto goes by",
        f'{ATTNLAB} tune --device cuda --minutes 7 --runs "$OUT"',
        lambda rows: bool(rows["run"].str.endswith("-tune").any()),
    ),
]


def main() -> None:
    """Print the queue."""
    try:
        rows = load_results()
        rows = rows[rows["device"] == "cuda"]
    except InputError:  # nothing is published
        rows = None
    print("On a CUDA machine, in this folder; OUT: where rows are kept. Run each again while rows are left.\n")
    for job in JOBS:
        published = rows is not None and job.published(rows)
        print(f"{job.name:3} {'published' if published else 'to do    '}  {job.measures}\n    {job.command}\n")


if __name__ == "__main__":
    main()
