"""How every figure looks: the same rows give the same figure.

A figure is an opaque card of warm white, so it reads on light and dark pages alike. Nothing of the user's matplotlib
settings, the date or matplotlib's version enters it. Colours of variants are Okabe and Ito's, chosen for colour-blind
readers; a variant keeps its colour and marker in every figure, and implementations have inks of their own.
"""

import functools
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

WIDTH, DPI = 8.0, 150
PAPER, INK, MUTED, GRID = "#FFFDF8", "#222222", "#6B675E", "#E8E3D8"
SETTINGS = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "path.simplify": False,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",
    "svg.hashsalt": "attnlab",
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
_VARIANTS = {
    "MHA": ("#D55E00", "o"),
    "GQA-16": ("#56B4E9", "P"),
    "GQA-8": ("#009E73", "s"),
    "GQA-4": ("#CC79A7", "D"),
    "GQA-2": ("#E69F00", "^"),
    "MQA": ("#0072B2", "v"),
}
IMPLEMENTATIONS = {
    "expanded": ("#8F8A80", "X"),
    "reference": ("#B5A642", "d"),
    "sdpa": ("#882255", "s"),
    "flex": ("#332288", "^"),
    "flex_tuned": ("#AB3DF5", ">"),
    "xformers": ("#F20DC4", "p"),
    "cudnn": ("#3DABF5", "<"),
    "flash": ("#0D0DF2", "v"),
    "flashinfer": ("#910808", "*"),
    "grouped": (INK, "o"),
    "cpp": ("#2A6F38", "P"),
    "triton": ("#2A6F38", "D"),
}
"""Ink and marker of every implementation, ours last, so that they lie on top; cpp and triton never meet. The inks are
apart for colour-blind eyes too, by a test."""
RAMP = (PAPER, "#B9DCD3", "#5FA89B", "#12836F", "#0A4A45")
"""Little to much, or short to long."""
P = ParamSpec("P")
End = tuple[float, float, str, str]
"""Of a line: x, y, what to call it, its colour."""


def variant_look(variant: str) -> tuple[str, str]:
    """The one colour and the one marker of a variant; grey for a G that has none of its own."""
    return _VARIANTS.get(variant, ("#777777", "h"))


def variant_colour(variant: str) -> str:
    """The one colour of a variant."""
    return variant_look(variant)[0]


def darker(colour: str) -> str:
    """``colour`` for letters, which need more contrast than lines."""
    red, green, blue = (round(255 * 0.72 * part) for part in to_rgb(colour))
    return f"#{red:02x}{green:02x}{blue:02x}"


def readable_on(colour: str) -> str:
    """Dark or light letters, whichever stand out on ``colour``."""
    red, green, blue = to_rgb(colour)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let ``draw`` see these settings alone, whatever the user's are."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(["default", SETTINGS]):
            return draw(*args, **kwargs)

    return inside


def canvas(title: str, subtitle: str, footer: str, height: float, **subplots: Any) -> tuple[Figure, Any]:
    """A card of the blog's width with its heading and its footer written, and axes between them."""
    figure = Figure((WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    subtitle = subtitle.replace(" = ", "\xa0=\xa0").replace(" %", "\xa0%")
    subtitle, footer = textwrap.fill(subtitle, 112), "\n".join(textwrap.fill(line, 140) for line in footer.split("\n"))
    top = 0.52 + 0.16 * subtitle.count("\n") + (0.14 if subtitle else 0)
    bottom = 0.28 + 0.14 * footer.count("\n")
    figure.text(0.016, 1 - 0.25 / height, title, size=12.5, weight="bold", va="center")
    figure.text(0.016, 1 - 0.42 / height, subtitle, color=MUTED, va="top", linespacing=1.3)
    figure.text(0.016, 0.10 / height, footer, size=7, color=MUTED, va="bottom", linespacing=1.3)
    rect = (0.008, bottom / height, 0.98, 1 - (top + bottom) / height)
    figure.get_layout_engine().set(rect=rect, wspace=0.04, hspace=0.04)  # type: ignore[union-attr, call-arg]
    return figure, figure.subplots(**subplots)


# --- axes -----------------------------------------------------------------------------------------------------------


def tokens(count: float) -> str:
    """1024 -> "1k", 2^20 -> "1M", 256 -> "256"; k and M are binary, as contexts are."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if count >= unit and count % unit == 0:
            return f"{count / unit:g}{name}"
    return f"{count:g}"


def log_axis(
    axes: Axes, which: str, values: Iterable[float] | None = None, name: Callable[[float], str] = "{:,.10g}".format
) -> None:
    """Make ``which`` ("x" or "y") logarithmic with plain numbers: at each of ``values``, or 1, 2 and 5 of a decade."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if values is None else FixedLocator(list(values)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: name(value)))
    axis.set_minor_locator(NullLocator())


def label_ends(axes: Axes, ends: Iterable[End]) -> None:
    """Write the names of lines right of the axes, at their ends; names that would touch are pushed apart."""
    axes.autoscale_view()
    to_fraction = axes.transData + axes.transAxes.inverted()
    placed = sorted((float(to_fraction.transform((x, y))[1]), x, y, text, colour) for x, y, text, colour in ends)
    gap = 0.17 / (axes.get_position().height * axes.figure.get_figheight())  # type: ignore[union-attr]
    # Each label pulls at the block it belongs to; blocks that overlap are merged and stand at the mean of their pulls.
    blocks: list[list[float]] = []
    for index, (wanted, *_) in enumerate(placed):
        blocks.append([wanted - index * gap])
        while len(blocks) > 1 and sum(blocks[-2]) / len(blocks[-2]) > sum(blocks[-1]) / len(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    # the highest name stands no higher than the axes, where a title may be
    heights = [min(sum(block) / len(block), 1 - (len(placed) - 1) * gap) for block in blocks for _ in block]
    for index, (height, (_, x, y, text, colour)) in enumerate(zip(heights, placed, strict=True)):
        axes.annotate(
            text,
            (x, y),
            (1.05, height + index * gap),
            textcoords="axes fraction",
            color=darker(colour),
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
        )
