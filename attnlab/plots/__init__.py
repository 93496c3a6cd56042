"""Figures: pure functions of rows, by name, each with a sentence on what it shows. Nothing here measures.

Same rows, same bytes. What is not in the rows is not drawn, and said; what did not end well is not drawn either.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas
from matplotlib.figure import Figure

from attnlab.errors import InputError, check_choice
from attnlab.plots.generation import generation, time_per_group
from attnlab.plots.limit import fraction_of_roof
from attnlab.plots.memory import capacity, kv_memory
from attnlab.plots.mistakes import five_ways_it_goes_wrong
from attnlab.plots.published import published_quality
from attnlab.plots.quality import quality, quality_curves, tradeoff
from attnlab.plots.roofline import prediction, roofline
from attnlab.plots.speed import decode_batch, decode_context, decode_groups, speedup_over_expanded
from attnlab.plots.style import save
from attnlab.plots.training import conversion, recall, scale_vs_variant, uptraining
from attnlab.plots.variants import variants


@dataclass(frozen=True)
class Chart:
    """One figure: ``draw(rows, machine)`` where it shows measurements, ``draw()`` where it follows from shapes alone.

    A ``draw`` raises ``InputError`` where the rows lack what it needs.
    """

    draw: Callable[..., Figure]
    caption: str
    measured: bool = True


FIGURES = {
    chart.draw.__name__: chart
    for chart in (
        Chart(variants, "How eight query heads share eight, four, two or one KV heads, and what is stored.", False),
        Chart(kv_memory, "KV cache of two published shapes over the tokens held, with weights and cards.", False),
        Chart(capacity, "Which batch fits at which context on an 80 GiB card: Llama 3 8B, G = 32, 8, 1.", False),
        Chart(decode_groups, "Time of one decode step's attention over KV heads, per implementation, and predicted."),
        Chart(decode_context, "Time of one decode step's attention over context, per variant, and predicted."),
        Chart(decode_batch, "Time of one decode step's attention over batch, per variant, and predicted."),
        Chart(speedup_over_expanded, "How many times as fast as with K and V repeated to all heads, over KV heads."),
        Chart(fraction_of_roof, "Share of the roofline that each implementation reaches, at every G."),
        Chart(roofline, "Decode attention under this machine's measured roofs: attained against possible."),
        Chart(prediction, "Predicted over measured time of every point, with median and 90th-percentile error."),
        Chart(generation, "Tokens per second of a whole model over batch, per variant, until memory ends."),
        Chart(time_per_group, "What a token costs a whole model with fewer KV heads, and what was published."),
        Chart(five_ways_it_goes_wrong, "Five mistakes of benchmarks, made on purpose, beside the right measurement."),
        Chart(quality, "Loss difference from MHA with its 95 % interval, and what these runs could have shown."),
        Chart(quality_curves, "Loss over tokens, a line per seed, beside gzip and xz, and its difference from MHA's."),
        Chart(scale_vs_variant, "Loss over parameters, and how many per cent of them sharing KV heads is worth."),
        Chart(recall, "Key-value pairs recalled over their number, per variant, in a plain and a harder form."),
        Chart(uptraining, "Loss of a converted MHA over the share of its training it gets back, per method."),
        Chart(conversion, "Attention of one group of query heads before and after conversion, per method."),
        Chart(
            published_quality, "What four papers printed on quality with fewer KV heads, and how they matched.", False
        ),
        Chart(tradeoff, "What sharing KV heads saves in memory and time, and costs in quality."),
    )
}
"""Name -> figure, in the order of a gallery."""


def draw_all(
    rows: pandas.DataFrame | None,
    out: Path,
    only: str | Iterable[str] | None = None,
    machine: str | None = None,
    say: Callable[[str], object] = print,
) -> list[Path]:
    """Draw all figures, or ``only`` some, into ``out`` as SVG and PNG; return the files, in the order of ``FIGURES``.

    Those that show measurements are drawn for every machine in ``rows``, or for ``machine``, which their file names
    carry. A figure that ``rows`` (None: there are none) cannot fill is left out, and ``say`` is given a line on why.
    Raises ``InputError`` on an unknown figure or machine, and where ``out`` cannot be written.
    """
    wanted = list(FIGURES) if only is None else [only] if isinstance(only, str) else list(only)
    for name in wanted:
        check_choice("figure", name, FIGURES)
    machines: list[str] = [] if rows is None or rows.empty else sorted(rows["machine"].unique())
    if machine is not None and machines:
        machines = [check_choice("machine", machine, machines)]
    written = []
    for name, chart in FIGURES.items():
        if name not in wanted:
            continue
        if not chart.measured:
            written += save(chart.draw(), out / name)
        elif not machines:
            say(f"{name} is not drawn: there are no rows")
        for each in machines if chart.measured else []:
            try:
                figure = chart.draw(rows, each)
            except InputError as lacking:
                say(f"{name}.{each} is not drawn: {lacking}")
            else:
                written += save(figure, out / f"{name}.{each}")
    return written
