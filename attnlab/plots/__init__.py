"""Figures: pure functions of rows, by name, each with a sentence on what it shows. Nothing here measures.

Same rows, same bytes. What is not in the rows is not drawn, and said; what did not end well is not drawn either.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pandas
from matplotlib.figure import Figure

from attnlab.errors import InputError, check_choice, write_whole
from attnlab.plots.files import save
from attnlab.plots.gallery import NAME, Card, card, gallery
from attnlab.plots.generation import generation, time_per_group
from attnlab.plots.limit import fraction_of_roof
from attnlab.plots.memory import capacity, kv_memory
from attnlab.plots.mistakes import five_ways_it_goes_wrong
from attnlab.plots.published import published_quality
from attnlab.plots.quality import quality, quality_curves, tradeoff
from attnlab.plots.roofline import prediction, roofline
from attnlab.plots.speed import decode_batch, decode_context, decode_groups, speedup_over_expanded
from attnlab.plots.teaching import attention_flow, cache_growth, head_map, rope_pairs
from attnlab.plots.training import conversion, recall, scale_vs_variant, uptraining

FROM_SHAPES = (head_map, rope_pairs, cache_growth, kv_memory, capacity, published_quality)
FIGURES: dict[str, Callable[..., Figure]] = {
    draw.__name__: draw
    for draw in (
        *FROM_SHAPES,
        attention_flow,
        *(decode_groups, decode_context, decode_batch, speedup_over_expanded, fraction_of_roof, roofline, prediction),
        *(generation, time_per_group, five_ways_it_goes_wrong),
        *(quality, quality_curves, scale_vs_variant, recall, uptraining, conversion, tradeoff),
    )
}
"""Name -> ``draw(rows, machine)``, or ``draw()`` of those ``FROM_SHAPES``, in the order of a gallery, with its caption
as docstring. A draw raises ``InputError`` where the rows lack what it needs."""


def drawn(
    rows: pandas.DataFrame | None,
    only: str | Iterable[str] | None = None,
    machine: str | None = None,
    say: Callable[[str], object] = print,
) -> Iterator[tuple[Card, Figure]]:
    """All figures, or ``only`` some, in the order of ``FIGURES``: what a gallery says of each, and the figure.

    Those that show measurements are drawn for every machine in ``rows``, or for ``machine``. A figure that ``rows``
    (None: there are none) cannot fill is left out, and ``say`` is given a line on why. Raises ``InputError`` on an
    unknown figure or machine.
    """
    wanted = list(FIGURES) if only is None else [only] if isinstance(only, str) else list(only)
    for name in wanted:
        check_choice("figure", name, FIGURES)
    machines: list[str] = [] if rows is None or rows.empty else sorted(rows["machine"].unique())
    if machine is not None and machines:
        machines = [check_choice("machine", machine, machines)]
    for name, draw in FIGURES.items():
        if name not in wanted:
            continue
        if draw in FROM_SHAPES:
            yield card(name, "", draw.__doc__, figure := draw()), figure
            continue
        if not machines:
            say(f"{name} is not drawn: there are no rows")
        for each in machines:
            try:
                figure = draw(rows, each)
            except InputError as lacking:
                say(f"{name}.{each} is not drawn: {lacking}")
            else:
                yield card(name, each, draw.__doc__, figure), figure


def draw_all(
    rows: pandas.DataFrame | None,
    out: Path,
    only: str | Iterable[str] | None = None,
    machine: str | None = None,
    say: Callable[[str], object] = print,
    kind: str = "blog",
) -> list[Path]:
    """Write what ``drawn`` draws into ``out``, as ``files.save`` does for this ``kind``; and where that is all figures
    for a blog, a gallery of them. Returns the files; raises ``InputError`` where ``out`` cannot be written."""
    cards, written = [], []
    for each, figure in drawn(rows, only, machine, say):
        cards.append(each)
        written += save(figure, out / each.stem, each.caption, kind)
    if only is None and kind == "blog" and cards:
        write_whole(out / NAME, gallery(cards, (out / "explorer.html").exists()))
        written.append(out / NAME)
    return written
