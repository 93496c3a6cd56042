"""Measured time of one decode step's attention, against group count, context and batch, with the prediction beside."""

import itertools
from typing import Any

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnlab.errors import InputError
from attnlab.plots import style
from attnlab.plots.rows import GROUPS, best_arm, commonest, dtypes, few, source, timed
from attnlab.shapes import variant_name

USUAL = "expanded"
_NAMES = {GROUPS: "KV heads G", "context": "context S (tokens, k = 1024)", "batch": "batch B (sequences)"}

_Panel = tuple[Axes, pandas.DataFrame, list[style.End]]  # where, which rows, and the ends of its lines to be named


@style.styled
def decode_groups(rows: pandas.DataFrame, machine: str) -> Figure:
    """Time over G, one line per implementation, a panel per dtype and context; at the batch that most rows have."""
    drawn = commonest(_swept(rows, machine, GROUPS), ["batch"])
    drawn = drawn[drawn["context"].isin(few(drawn["context"], 3))]
    figure, panels = _panels(
        drawn,
        ("dtype", "context"),
        GROUPS,
        "Fewer KV heads, less to read: one decode step's attention",
        f"Medians, bars from first to third quartile; rings: auto, which picks an implementation. Dashed: predicted, "
        f"black where K and V are read once, grey where they are repeated to all heads first. "
        f"{_sizes(drawn)}, batch {drawn['batch'].iloc[0]}.",
    )
    groups = sorted(drawn[GROUPS].unique(), reverse=True)
    for axes, panel, ends in panels:
        for impl, look in style.IMPLEMENTATIONS.items():
            arm = panel[panel["impl"] == impl]
            if not arm.empty:
                _curve(axes, GROUPS, arm, impl, look, predicted=impl in ("grouped", USUAL))
                ends.append((arm[GROUPS].iloc[0], arm["median"].iloc[0] * 1e3, impl, look[0]))
        auto = panel[panel["impl"] == "auto"]
        axes.plot(auto[GROUPS], auto["median"] * 1e3, "o", ms=9, mfc="none", color=style.INK, label="auto")
        style.log_axis(axes, "x", groups)
        axes.set_xlim(groups[0] * 1.25, groups[-1] / 1.25)  # from MHA down to MQA
    _label(panels)
    return figure


@style.styled
def decode_context(rows: pandas.DataFrame, machine: str) -> Figure:
    """Time over context, one line per variant, a panel per batch and dtype."""
    title = "Each token of context adds G heads to read, at every step"
    return _per_variant(rows, machine, "context", "batch", title)


@style.styled
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
    for axes, panel, ends in panels:
        for g in sorted(panel[GROUPS].unique(), reverse=True):
            variant, arms = variant_name(heads, g), panel[panel[GROUPS] == g]
            mine, usual = arms[arms["impl"] == best], arms[arms["impl"] == USUAL]
            if not usual.empty and g < heads:
                look = style.IMPLEMENTATIONS[USUAL]
                _curve(axes, x, usual, f"{variant}, {USUAL}", look, linewidth=1, ms=4)
                if USUAL not in {end[2] for end in ends}:
                    ends.append((usual[x].iloc[-1], usual["median"].iloc[-1] * 1e3, USUAL, look[0]))
            if not mine.empty:
                look = style.variant_look(variant)
                _curve(axes, x, mine, variant, look, predicted=True)
                ends.append((mine[x].iloc[-1], mine["median"].iloc[-1] * 1e3, variant, look[0]))
        style.log_axis(axes, "x", sorted(drawn[x].unique()), style.tokens if x == "context" else "{:g}".format)
    _label(panels)
    return figure


def _swept(rows: pandas.DataFrame, machine: str, x: str) -> pandas.DataFrame:
    drawn = timed(rows, "decode", machine)
    drawn = drawn[drawn["dtype"].isin(dtypes(drawn))]
    if drawn[x].nunique() < 2:
        raise InputError(f"decode rows of {machine} have one {_NAMES[x]} only, a curve needs two")
    return drawn.sort_values(x)


def _sizes(drawn: pandas.DataFrame) -> str:
    return f"One layer, H = {drawn['shape.n_heads'].iloc[0]} query heads, D = {drawn['shape.head_dim'].iloc[0]}"


def _panels(
    drawn: pandas.DataFrame, by: tuple[str, str], x: str, title: str, subtitle: str
) -> tuple[Figure, list[_Panel]]:
    """A figure with a line of panels per value of ``by[0]`` and a column per value of ``by[1]``."""
    lines, columns = (dtypes(drawn) if column == "dtype" else sorted(drawn[column].unique()) for column in by)
    height, count = 1.2 + 2.3 * len(lines), {"nrows": len(lines), "ncols": len(columns)}
    figure, grid = style.canvas(
        title, subtitle, source(drawn), height, **count, sharex=True, sharey="row", squeeze=False
    )
    panels: list[_Panel] = []
    for axes, (line, column) in zip(grid.flat, itertools.product(lines, columns), strict=True):
        own = dict(zip(by, (line, column), strict=True))
        size = f"context {style.tokens(own['context'])}" if "context" in own else f"batch {own['batch']}"
        axes.set_title(f"{own['dtype']}, {size}")
        style.log_axis(axes, "y")
        panels.append((axes, drawn[(drawn[by[0]] == line) & (drawn[by[1]] == column)], []))
    for axes in grid[:, 0]:
        axes.set_ylabel("time of a step (ms)")
    for axes in grid[-1]:
        axes.set_xlabel(_NAMES[x])
    return figure, panels


def _label(panels: list[_Panel]) -> None:
    """Name the lines where there is room, now that panels which share an axis have drawn all that scales it."""
    for axes, _, ends in panels:
        spec: Any = axes.get_subplotspec()
        if spec.is_last_col() or spec.get_gridspec().ncols < 3:
            style.label_ends(axes, ends)


def _curve(
    axes: Axes, x: str, rows: pandas.DataFrame, label: str, look: tuple[str, str], predicted: bool = False, **more: Any
) -> None:
    """Medians with bars from the first to the third quartile and, dashed, what was predicted; in milliseconds."""
    colour, marker = look
    median = rows["median"] * 1e3
    spread = [median - rows["q25"] * 1e3, rows["q75"] * 1e3 - median]
    axes.errorbar(rows[x], median, spread, color=colour, marker=marker, label=label, elinewidth=1, **more)
    if predicted:
        axes.plot(rows[x], rows["predicted"] * 1e3, color=colour, label=f"{label}, predicted", ls=(0, (4, 2)), lw=1.1)
