"""Figures: pure functions of rows (design: same rows, same bytes), by name, with a sentence on each for a gallery."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas
from matplotlib.figure import Figure

from attnlab.errors import InputError, check_choice
from attnlab.plots.memory import capacity, kv_memory
from attnlab.plots.quality import quality, tradeoff
from attnlab.plots.roofline import prediction, roofline
from attnlab.plots.speed import decode_batch, decode_context, decode_groups
from attnlab.plots.style import save
from attnlab.plots.variants import variants


@dataclass(frozen=True)
class Chart:
    """A figure by name: ``draw()`` from shapes alone, or ``draw(rows, machine)`` where ``measured``."""

    draw: Callable[..., Figure]
    caption: str
    measured: bool = True


FIGURES = {
    "variants": Chart(variants, "", False),
    "kv_memory": Chart(kv_memory, "", False),
    "capacity": Chart(capacity, "", False),
    "decode_groups": Chart(decode_groups, ""),
    "decode_context": Chart(decode_context, ""),
    "decode_batch": Chart(decode_batch, ""),
    "roofline": Chart(roofline, ""),
    "prediction": Chart(prediction, ""),
    "quality": Chart(quality, ""),
    "tradeoff": Chart(tradeoff, ""),
}


def draw_all(
    rows: pandas.DataFrame | None,
    out: Path,
    only: str | Iterable[str] | None = None,
    machine: str | None = None,
    say: Callable[[str], object] = print,
) -> list[Path]:
    """Draw every figure"""
    names = list(FIGURES) if only is None else [only] if isinstance(only, str) else list(only)
    found: list[str] = [] if rows is None or rows.empty else sorted(rows["machine"].unique())
    if machine is not None:
        found = [check_choice("machine", machine, found)]
    written = []
    for name in names:
        chart = FIGURES[check_choice("figure", name, FIGURES)]
        if not chart.measured:
            written += save(chart.draw(), out / name)
        elif not found:
            say(f"{name} is not drawn: there are no rows")
        for each in found if chart.measured else ():
            try:
                figure = chart.draw(rows, each)
            except InputError as lacking:
                say(f"{name}.{each} is not drawn: {lacking}")
            else:
                written += save(figure, out / f"{name}.{each}")
    return written
