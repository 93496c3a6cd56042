"""What commands share: options, and how a word of the command line becomes a shape, a card, dtypes or a number."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from attnlab.errors import InputError, check_choice
from attnlab.shapes import ModelShape, dtype_name

PLAIN: Any = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
RUNS = Path("runs")
UNITS = {"k": 2**10, "m": 2**20}  # of tokens: contexts are powers of two


def _resolved(device: str) -> str:
    from attnlab import host

    return host.resolve_device(device)


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A published name, a config.json, or a model directory.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", callback=_resolved)]
Dtypes = Annotated[str, typer.Option(help="Comma-separated dtypes.")]
Minutes = Annotated[float, typer.Option(min=0, help="Stop once they are over; the same command goes on.")]
Runs = Annotated[Path, typer.Option("--runs", help="Where runs are kept.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start a new run instead of continuing the newest.")]


def shape_of(model: str) -> ModelShape:
    """A published name's shape, or that of a config.json or model directory."""
    return ModelShape.from_hf(model) if os.path.exists(model) else ModelShape.published(model)


def card_of(card: str) -> Any:
    """A published card, or the one in a file that ``attnlab machine --out`` wrote."""
    from attnlab.predict.machine import Machine

    return Machine.load(card) if os.path.exists(card) else Machine.published(card)


def dtypes_of(text: str) -> list[str]:
    """Names with commas between; raises ``InputError`` on one that is not timed."""
    names = [dtype_name(name.strip()) for name in text.split(",")]
    return [check_choice("dtype", name, ("float32", "bfloat16", "float16")) for name in names]


def whole(option: str, text: str) -> int:
    """``text`` as a whole number, "32k" as 32·1024 and "1M" as 1024²; raises ``InputError``, naming ``option``."""
    unit = UNITS.get(text[-1:].lower(), 1)
    try:
        return unit * int(text if unit == 1 else text[:-1])
    except ValueError:
        got = f"got {text[:40]!r}; k means 1024 and M 1024², as in 32k"
        raise InputError(f"{option} must be a whole number or max_context, {got}") from None


def tokens_of(context: str, shape: ModelShape) -> int:
    """``--context``: a number, or the model's own where it is "max_context"."""
    return shape.max_context if context == "max_context" else whole("--context", context)


def show(*tables: Any) -> None:
    """Print tables of rich's."""
    from rich.console import Console

    Console().print(*tables)


@contextlib.contextmanager
def filling(device: str, kind: str, runs: Path, fresh: bool, minutes: float, alone: bool = True) -> Iterator[Any]:
    """(run, advance): this machine's newest run of ``kind``, or a new one, and what shows progress and ends the block
    when the minutes are over. Where ``alone``, nothing is trained or timed meanwhile."""
    from attnlab import host
    from attnlab.progress import progress
    from attnlab.results import Run, run_folder

    folder = run_folder(runs, host.describe(device)["machine"], fresh=fresh, suffix=f"-{kind}")
    with host.timing() if alone else contextlib.nullcontext(), Run(folder) as run, progress(minutes) as advance:
        if run.repaired:
            print(run.repaired)
        yield run, advance


def ending(run: Any) -> str:
    """Where a run's rows are, and whether it holds every one it set out to."""
    left = run.left()
    said = f"{left} planned rows are left: run it again to go on" if left else "complete: every planned row is there"
    return f"rows: {run.folder / 'rows.jsonl'}\n{said}"
