"""Measured time of one decode step's attention, against group count, context and batch, with the prediction beside."""

from collections.abc import Iterator
from typing import Any

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnlab.errors import InputError
from attnlab.plots.rows import best_arm, commonest, dtypes, few, source, timed
from attnlab.plots.style import (
    IMPLEMENTATIONS,
    INK,
    canvas,
    label_ends,
    log_axis,
    styled,
    tokens,
    variant_colour,
    variant_marker,
)
from attnlab.shapes import variant_name

GROUPS, USUAL = "shape.n_kv_heads", "expanded"
_NAMES = {GROUPS: "KV heads G", "context": "context S (tokens, k = 1024)", "batch": "batch B (sequences)"}


@styled
def decode_groups(rows: pandas.DataFrame, machine: str) -> Figure:
    """Time over G, one line per implementation, a panel per dtype and context; at the batch that most rows have."""
    drawn = commonest(_swept(rows, machine, GROUPS), ["batch"])
    drawn = drawn[drawn["context"].isin(few(drawn["context"], 3))]
    figure, panels = _panels(
        drawn,
        ("dtype", "context"),
        GROUPS,
        "Fewer KV heads, less to read: one decode step's attention",
        f"Medians, bars from first to third quartile; dashed: predicted; rings: auto, which picks an implementation. "
        f"{_sizes(drawn)}, batch {drawn['batch'].iloc[0]}.",
    )
    groups = sorted(drawn[GROUPS].unique(), reverse=True)
    for axes, panel, labelled in panels:
        ends: list[tuple[float, float, str, str]] = []
        for impl, (colour, marker) in IMPLEMENTATIONS.items():
            arm = panel[panel["impl"] == impl]
            if not arm.empty:
                _curve(axes, GROUPS, arm, impl, colour, marker, predicted=impl in ("grouped", USUAL))
                ends.append((arm[GROUPS].min(), arm["median"].iloc[0] * 1e3, impl, colour))
        auto = panel[panel["impl"] == "auto"]
        axes.plot(auto[GROUPS], auto["median"] * 1e3, "o", ms=9, mfc="none", color=INK, label="auto")
        log_axis(axes, "x", groups)
        axes.set_xlim(groups[0] * 1.25, groups[-1] / 1.25)  # from MHA down to MQA
        if labelled:
            label_ends(axes, ends)
    return figure


@styled
def decode_context(rows: pandas.DataFrame, machine: str) -> Figure:
    """Time over context, one line per variant, a panel per batch and dtype."""
    title = "Each token of context adds G heads to read, at every step"
    return _per_variant(rows, machine, "context", "batch", title)


@styled
def decode_batch(rows: pandas.DataFrame, machine: str) -> Figure:
    """Time over batch, one line per variant, a panel per context and dtype."""
    title = "Each sequence of a batch has its own cache to read, at every step"
    return _per_variant(rows, machine, "batch", "context", title)


def _per_variant(rows: pandas.DataFrame, machine: str, x: str, fixed: str, title: str) -> Figure:
    drawn = _swept(rows, machine, x)
    drawn = drawn[drawn[fixed].isin(few(drawn[fixed], 2))]
    heads, best = int(drawn["shape.n_heads"].iloc[0]), best_arm(drawn)
    figure, panels = _panels(
        drawn,
        (fixed, "dtype"),
        x,
        title,
        f"Colours: {best}, medians with bars from first to third quartile; dashed: predicted. Grey: {USUAL}, what most "
        f"code does: K and V repeated to all heads, at each G < H. {_sizes(drawn)}.",
    )
    for axes, panel, labelled in panels:
        ends: list[tuple[float, float, str, str]] = []
        for g in sorted(panel[GROUPS].unique(), reverse=True):
            variant, arms = variant_name(heads, g), panel[panel[GROUPS] == g]
            mine, usual = arms[arms["impl"] == best], arms[arms["impl"] == USUAL]
            if not usual.empty and g < heads:
                colour, marker = IMPLEMENTATIONS[USUAL]
                _curve(axes, x, usual, f"{variant}, {USUAL}", colour, marker, linewidth=1, ms=4)
                if USUAL not in {end[2] for end in ends}:
                    ends.append((usual[x].iloc[-1], usual["median"].iloc[-1] * 1e3, USUAL, colour))
            if not mine.empty:
                colour = variant_colour(variant)
                _curve(axes, x, mine, variant, colour, variant_marker(variant), predicted=True)
                ends.append((mine[x].iloc[-1], mine["median"].iloc[-1] * 1e3, variant, colour))
        log_axis(axes, "x", sorted(drawn[x].unique()), tokens if x == "context" else "{:g}".format)
        if labelled:
            label_ends(axes, ends)
    return figure


def _swept(rows: pandas.DataFrame, machine: str, x: str) -> pandas.DataFrame:
    drawn = timed(rows, "decode", machine)
    if drawn[x].nunique() < 2:
        raise InputError(f"decode rows of {machine} have one {_NAMES[x]} only, a curve needs two")
    return drawn.sort_values(x)


def _sizes(drawn: pandas.DataFrame) -> str:
    return f"One layer, H = {drawn['shape.n_heads'].iloc[0]} query heads, D = {drawn['shape.head_dim'].iloc[0]}"


def _panels(
    drawn: pandas.DataFrame, by: tuple[str, str], x: str, title: str, subtitle: str
) -> tuple[Figure, Iterator[tuple[Axes, pandas.DataFrame, bool]]]:
    """A figure with a line of panels per value of ``by[0]`` and a column per value of ``by[1]``; each panel's axes, its
    rows, and whether there is room right of it for labels."""
    values = [dtypes(drawn) if column == "dtype" else sorted(drawn[column].unique()) for column in by]
    size = {"nrows": len(values[0]), "ncols": len(values[1])}
    figure, grid = canvas(
        title, subtitle, source(drawn), 1.2 + 2.3 * size["nrows"], **size, sharex=True, sharey="row", squeeze=False
    )

    def panels() -> Iterator[tuple[Axes, pandas.DataFrame, bool]]:
        for down, first in enumerate(values[0]):
            for right, second in enumerate(values[1]):
                axes = grid[down, right]
                own = dict(zip(by, (first, second), strict=True))
                log_axis(axes, "y")
                if right == 0:
                    axes.set_ylabel("time of a step (ms)")
                if down == len(values[0]) - 1:
                    axes.set_xlabel(_NAMES[x])
                size = f"context {tokens(own['context'])}" if "context" in own else f"batch {own['batch']}"
                axes.set_title(f"{own['dtype']}, {size}")
                panel = drawn[(drawn[by[0]] == first) & (drawn[by[1]] == second)]
                yield axes, panel, right == len(values[1]) - 1 or len(values[1]) < 3

    return figure, panels()


def _curve(
    axes: Axes,
    x: str,
    rows: pandas.DataFrame,
    label: str,
    colour: str,
    marker: str,
    predicted: bool = False,
    **look: Any,
) -> None:
    """Medians with bars from the first to the third quartile and, dashed, what was predicted; in milliseconds."""
    median = rows["median"] * 1e3
    spread = [median - rows["q25"] * 1e3, rows["q75"] * 1e3 - median]
    axes.errorbar(rows[x], median, spread, color=colour, marker=marker, label=label, elinewidth=1, capsize=2, **look)
    if predicted:
        axes.plot(rows[x], rows["predicted"] * 1e3, color=colour, label=f"{label}, predicted", ls=(0, (4, 2)), lw=1.1)
