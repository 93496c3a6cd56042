"""What five mistakes of benchmarks claim about G, beside what is true."""

from typing import Any

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnlab.errors import InputError
from attnlab.plots import style
from attnlab.plots.rows import GROUPS, source
from attnlab.results import newest

_LOOKS: dict[str, dict[str, Any]] = {
    "right": {"color": style.INK, "marker": "o"},
    "wrong": {"color": "#B3123F", "marker": "X", "ls": (0, (4, 2))},
}
_MISTAKES = {
    "prefill-in-timer": ("Prefill in the timer", "The prompt's cost drowns what G saves."),
    "warm-cache": ("Warm cache", "K and V out of a cache; dotted: memory."),
    "float32-label": ("float32 labelled bfloat16", "Twice the bytes that the label says."),
    "expanded-cache": ("Expanded heads cached", "Repeated, then stored: no G saves any."),
    "top-left-mask": ("Mask aligned top-left", "It hides nearly all keys: wrong output."),
}


@style.styled
def five_ways_it_goes_wrong(rows: pandas.DataFrame, machine: str) -> Figure:
    """Per mistake its wrong curve over G beside the right one; then the gain of the fewest heads that each claims."""
    drawn = newest(rows, "mistake", machine)
    drawn = drawn[drawn["status"] == "ok"]
    if lacking := [name for name in _MISTAKES if name not in set(drawn.get("name", []))]:
        raise InputError(f"rows of {machine} lack {', '.join(lacking)}; measure: pytest bench/test_mistakes.py")
    drawn = drawn.astype({GROUPS: int, "batch": int, "context": int}).sort_values(GROUPS, ascending=False)
    variants = list(drawn["variant"].unique())
    over = f"{variants[0]} over {variants[-1]}"
    figure, grid = style.canvas(
        "Five ways in which a benchmark of shared heads goes wrong",
        f"Each mistake made on purpose (red crosses, dashed) and measured in turn with the right way (round); bars: "
        f"first to third quartile. Beside the lines: {over}. H = {drawn['shape.n_heads'].iloc[0]:g} query heads.",
        source(drawn),
        5.9,
        nrows=2,
        ncols=3,
    )
    summary = grid.flat[5]
    for number, (axes, (name, (title, caption))) in enumerate(zip(grid.flat, _MISTAKES.items(), strict=False), 1):
        mine = drawn[drawn["name"] == name]
        ways, stored = {way: mine[mine["impl"] == way] for way in _LOOKS}, name == "expanded-cache"
        ends, claims = [], []
        for way, found in ways.items():
            values, look = (found["bytes"] / 2**20 if stored else found["median"] * 1e3), _LOOKS[way]
            spread = None if stored else [values - found["q25"] * 1e3, found["q75"] * 1e3 - values]
            axes.errorbar(range(len(found)), values, spread, label=way, elinewidth=1, **look)
            claims.append(values.iloc[0] / values.iloc[-1])
            ends.append((len(found) - 1, values.iloc[-1], f"{claims[-1]:.3g}×", look["color"]))
            summary.plot(claims[-1], -number, **look, ms=8, label=f"{number}, {way}", zorder=3)
        summary.plot(claims, [-number] * 2, color=style.MUTED, lw=1, label="gap")
        first, right, wrong = mine.iloc[0], *(found.iloc[-1] for found in ways.values())
        note = f"{first['dtype']}, batch {first['batch']}, context {style.tokens(first['context'])}"
        if stored:
            note += f"\n{variants[-1]}'s step: {1e3 * wrong['median']:.2g} ms, right {1e3 * right['median']:.2g} ms"
        elif name == "top-left-mask":
            note += f"\noutput off by {100 * ways['wrong']['error'].min():,.0f} % or more"
        elif name == "warm-cache":
            least = 1e3 * ways["right"]["bytes"] / ways["right"]["read_bandwidth"]
            axes.plot(range(len(least)), least, ":", color=style.MUTED, lw=1.2, label="memory read once")
        style.log_axis(axes, "y")
        axes.set_xticks(range(len(variants)), variants)
        axes.set(ylabel="stored (MiB)" if stored else "time (ms)", xlim=(-0.25, len(variants) - 0.75))
        style.label_ends(axes, ends)
        _letter(axes, f"{number}  {title}", caption, note)
    summary.set_yticks(range(-5, 0), ["5", "4", "3", "2", "1"], weight="bold")
    style.log_axis(summary, "x", [1, 3, 10, 30, 100], "{:g}×".format)
    summary.set(ylim=(-5.6, -0.4))
    _letter(summary, f"What {variants[-1]} seems to gain", f"{over}: circles are right.", "times less")
    return figure


def _letter(axes: Axes, title: str, caption: str, below: str) -> None:
    """Title and caption from the edge of the panel, over its labels; sizes below."""
    for text, up, look in ((title, 21, {"size": 9, "weight": "bold"}), (caption, 8, {"color": style.MUTED})):
        axes.annotate(text, (0, 1), (-34, up), xycoords="axes fraction", textcoords="offset points", **look)
    axes.set_xlabel(below, size=7.5, color=style.MUTED)
