"""A progress bar on stderr that names what is being done; plain lines where stderr is not a terminal."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Advance = Callable[[str, int, int], None]


class _TimeIsOver(Exception):
    """Ends the block of ``progress`` and goes no further."""


@contextlib.contextmanager
def progress(minutes: float = math.inf) -> Iterator[Advance]:
    """Yield ``advance(what, done, total)``; the first call, with anything done, after ``minutes`` leaves the block."""
    until = time.monotonic() + 60 * minutes
    with contextlib.suppress(_TimeIsOver), _shown() as show:

        def advance(what: str, done: int, total: int) -> None:
            if done and time.monotonic() >= until:
                raise _TimeIsOver
            show(what, done, total)

        yield advance


@contextlib.contextmanager
def _shown() -> Iterator[Advance]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, done, total: print(f"[{done}/{total}] {what}", file=sys.stderr, flush=True)
        return
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total)
