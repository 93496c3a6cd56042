"""Measured time of one decode step's attention, against group count, context and batch, with the prediction beside."""

import itertools
from typing import Any

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnlab.errors import InputError
from attnlab.plots import style
from attnlab.plots.rows import GROUPS, best_arm, commonest, contenders, crossing, dtypes, few, source, timed
from attnlab.shapes import variant_name

USUAL = "expanded"
_TIMES = ("q25", "median", "q75")
_NAMES = {
    GROUPS: "KV heads G",
    "context": "context S (tokens, k = 1024)",
    "batch": "batch B (sequences)",
    "part": "G / H",
}

_Panel = tuple[Axes, pandas.DataFrame, list[style.End]]  # where, which rows, and the ends of its lines to be named


@style.styled
def decode_groups(rows: pandas.DataFrame, machine: str) -> Figure:
    """Time over G, one line per implementation, a panel per dtype and context; at the batch that most rows have."""
    drawn = _over_groups(rows, machine)
    return _per_impl(
        drawn,
        contenders(drawn),
        "Fewer KV heads, less to read: one decode step's attention",
        f"Medians, bars from first to third quartile; rings: auto, which picks an implementation. Dashed: predicted, "
        f"strong where K and V are read once, pale where they are repeated to all heads first. "
        f"{_sizes(drawn)}, batch {drawn['batch'].iloc[0]}.",
    )


@style.styled
def speedup_over_expanded(rows: pandas.DataFrame, machine: str) -> Figure:
    """How many times as fast as ``expanded`` each implementation is, over G; a panel per dtype and context."""
    drawn, point = _over_groups(rows, machine), ["dtype", "context", GROUPS]
    usual = drawn[drawn["impl"] == USUAL].set_index(point)[[*_TIMES, "predicted"]]
    if usual.empty:
        raise InputError(f"decode rows of {machine} hold no {USUAL} to compare with")
    shown = [impl for impl in contenders(drawn) if impl not in (USUAL, "reference")]
    drawn = drawn[~drawn["impl"].isin(["auto", USUAL, "reference"])].join(usual.add_suffix("_usual"), on=point)
    over = {"q25": "q75", "median": "median", "q75": "q25", "predicted": "predicted"}  # quartiles the wide way about
    drawn = drawn.assign(**{name: drawn[f"{name}_usual"] / drawn[other] for name, other in over.items()})
    return _per_impl(
        drawn.dropna(subset=["median"]),
        shown,
        "What not repeating K and V gains, in one decode step's attention",
        f"Median of {USUAL} over median of the implementation, measured in turn; bars: first over third quartile, and "
        f"third over first. Dashed: predicted. A single head (G = 1) is repeated without a copy. {_sizes(drawn)}, "
        f"batch {drawn['batch'].iloc[0]}.",
        f"times as fast as {USUAL}",
    )


def _over_groups(rows: pandas.DataFrame, machine: str) -> pandas.DataFrame:
    drawn = commonest(_swept(rows, machine, GROUPS), ["batch"])
    return drawn[drawn["context"].isin(few(drawn["context"], 3))]


def _per_impl(drawn: pandas.DataFrame, shown: list[str], title: str, subtitle: str, *y: str) -> Figure:
    left = sorted({*drawn["impl"]} - {*shown, "auto"})
    subtitle += f" Slower, and in fraction_of_roof only: {', '.join(left)}." if left else ""
    figure, panels = panelled(drawn, ("dtype", "context"), GROUPS, title, subtitle + _hollow(drawn), *y)
    groups = sorted(drawn[GROUPS].unique(), reverse=True)
    for axes, panel, ends in panels:
        for impl, look in style.IMPLEMENTATIONS.items():
            arm = panel[panel["impl"] == impl]
            if not arm.empty and impl in shown:
                curve(axes, GROUPS, arm, impl, look, predicted=impl in ("grouped", USUAL))
                ends.append((arm[GROUPS].iloc[0], arm["median"].iloc[0], impl, look[0]))
        auto = panel[panel["impl"] == "auto"]
        axes.plot(auto[GROUPS], auto["median"], "o", ms=9, mfc="none", color=style.INK, label="auto")
        style.log_axis(axes, "x", groups)
        axes.set_xlim(groups[0] * 1.25, groups[-1] / 1.25)  # from MHA down to MQA
    label(panels)
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
    hollow = _hollow(drawn[drawn["impl"].isin([best, USUAL])])
    fits = drawn.iloc[0]["last_level_cache_bytes"] if x == "context" and "last_level_cache_bytes" in drawn else 0
    size = f"the last-level cache ({fits / 2**20:.3g} MiB)"
    warm = f" Upright bars: to their left K and V would fit {size}, were they not kept out of it." if fits else ""
    figure, panels = panelled(
        drawn,
        (fixed, "dtype"),
        x,
        title,
        f"Colours: {best}, medians with bars from first to third quartile; dashed: predicted. Grey: {USUAL}, what most "
        f"code does: K and V repeated to all heads, at each G < H. {_sizes(drawn)}.{warm}{hollow}",
    )
    for axes, panel, ends in panels:
        for g in sorted(panel[GROUPS].unique(), reverse=True):
            variant, arms = variant_name(heads, g), panel[panel[GROUPS] == g]
            mine, usual = arms[arms["impl"] == best], arms[arms["impl"] == USUAL]
            if not usual.empty and g < heads:
                look = style.IMPLEMENTATIONS[USUAL]
                curve(axes, x, usual, f"{variant}, {USUAL}", look, linewidth=1, ms=4)
                if USUAL not in {end[2] for end in ends}:
                    ends.append((usual[x].iloc[-1], usual["median"].iloc[-1], USUAL, look[0]))
            if not mine.empty:
                look = style.variant_look(variant)
                curve(axes, x, mine, variant, look, predicted=True)
                if fits:
                    at = crossing(mine["bytes"], mine[x], fits)
                    here = crossing(mine[x], mine["median"], at)
                    axes.plot(at, here, "|", ms=13, mew=1.6, color=style.INK, label="fits")
                ends.append((mine[x].iloc[-1], mine["median"].iloc[-1], variant, look[0]))
        style.log_axis(axes, "x", sorted(drawn[x].unique()), style.tokens if x == "context" else "{:g}".format)
    label(panels)
    return figure


def _swept(rows: pandas.DataFrame, machine: str, x: str) -> pandas.DataFrame:
    """Decode rows over ``x``, their times in milliseconds."""
    drawn = timed(rows, "decode", machine)
    drawn = drawn[drawn["dtype"].isin(dtypes(drawn))]
    if drawn[x].nunique() < 2:
        raise InputError(f"decode rows of {machine} have one {_NAMES[x]} only, a curve needs two")
    return drawn.assign(**{name: 1e3 * drawn[name] for name in (*_TIMES, "predicted")}).sort_values(x)


def _sizes(drawn: pandas.DataFrame) -> str:
    return f"One layer, H = {drawn['shape.n_heads'].iloc[0]} query heads, D = {drawn['shape.head_dim'].iloc[0]}"


def _unsteady(rows: pandas.DataFrame) -> pandas.DataFrame:
    return rows[rows["unsteady"].eq(True)] if "unsteady" in rows else rows[:0]


def _hollow(drawn: pandas.DataFrame) -> str:
    return "" if _unsteady(drawn).empty else " Hollow: unsteady, the quartiles are far apart."


def panelled(
    drawn: pandas.DataFrame, by: tuple[str, str], x: str, title: str, subtitle: str, y: str = "time of a step (ms)"
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
        size = own.get("model", f"batch {own.get('batch')}")
        size = f"context {style.tokens(own['context'])}" if "context" in own else size
        axes.set_title(f"{own['dtype']}, {size}")
        style.log_axis(axes, "y")
        panels.append((axes, drawn[(drawn[by[0]] == line) & (drawn[by[1]] == column)], []))
    for axes in grid[:, 0]:
        axes.set_ylabel(y)
    for axes in grid[-1]:
        axes.set_xlabel(_NAMES[x])
    return figure, panels


def label(panels: list[_Panel]) -> None:
    """Name the lines where there is room, now that panels which share an axis have drawn all that scales it."""
    for axes, _, ends in panels:
        spec: Any = axes.get_subplotspec()
        if spec.is_last_col() or spec.get_gridspec().ncols < 3:
            style.label_ends(axes, ends)


def curve(
    axes: Axes, x: str, rows: pandas.DataFrame, label: str, look: tuple[str, str], predicted: bool = False, **more: Any
) -> None:
    """Medians with bars from the first to the third quartile and, dashed, what was predicted."""
    colour, marker = look
    low, median, high = (rows[name] for name in _TIMES)
    spread = [median - low, high - median]
    axes.errorbar(rows[x], median, spread, color=colour, marker=marker, label=label, elinewidth=1, **more)
    for _, row in _unsteady(rows).iterrows():
        axes.plot(row[x], row["median"], marker, color=colour, mfc=style.PAPER, ms=more.get("ms"), zorder=3)
    if predicted:
        axes.plot(rows[x], rows["predicted"], color=colour, label=f"{label}, predicted", ls=(0, (4, 2)), lw=1.1)
