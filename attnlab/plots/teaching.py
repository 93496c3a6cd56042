"""Pictures that teach: which head reads which, how positions turn, how a cache grows, what flows through one step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from attnlab.errors import InputError
from attnlab.plots import style
from attnlab.plots.rows import GROUPS, source
from attnlab.predict.memory import KIB, kv_cache_bytes
from attnlab.results import newest
from attnlab.shapes import ModelShape

_HEADS = ModelShape(n_layers=1, dim=1024, n_heads=8, n_kv_heads=8, head_dim=128, ffn_dim=1, vocab_size=1)
_ROW = 2.0  # height of a variant, in units of the distance between two query heads
_WORDS = ("to", "be", "or", "not", "to", "be", "that", "is")
_PROMPT = 4  # of the words; the others are generated one by one


@style.styled
def head_map(n_heads: int = 8, kv_heads: Sequence[int] | None = None) -> Figure:
    """Which key/value head every query head reads, for each G, and the bytes that one token adds to the cache."""
    heads_of = replace(_HEADS, n_heads=n_heads, n_kv_heads=n_heads)
    chosen = [g for g in range(n_heads, 0, -1) if n_heads % g == 0] if kv_heads is None else kv_heads
    shapes = [replace(heads_of, n_kv_heads=g) for g in chosen]
    figure, (heads, cache) = style.canvas(
        f"How {n_heads} query heads share key/value heads",
        "Query head h reads KV head h // R, with R = H / G. Only KV heads are stored, so the cache shrinks by R.",
        f"Drawn from shapes: H = {n_heads} query heads, head_dim D = 128, one layer, bfloat16. No measurement.",
        0.9 + len(shapes) * min(1.0, 8 / n_heads),
        ncols=2,
        width_ratios=[3.1, 1],
        sharey=True,
    )
    letters: dict[str, Any] = {"size": min(7.5, 60 / n_heads), "ha": "center", "va": "center_baseline", "zorder": 3}
    margin = 0.4 * n_heads
    for index, shape in enumerate(shapes):
        bottom, colour, size = -_ROW * index, style.variant_colour(shape.variant), shape.group_size
        sharing = "a KV head each" if size == 1 else f"{size} queries a KV head"
        heads.text(
            -margin, bottom + 0.85, shape.variant, size=12, weight="bold", color=style.darker(colour), va="center"
        )
        heads.text(-margin, bottom + 0.35, f"G = {shape.n_kv_heads}\n{sharing}", color=style.MUTED, va="top")
        for h in range(shape.n_heads):
            g = h // size
            middle = g * size + (size - 1) / 2
            heads.plot([h, middle], [bottom + 0.73, bottom + 0.3], color=colour, linewidth=1.3, zorder=1)
            heads.add_patch(Circle((h, bottom + 1), 0.27, facecolor=style.PAPER, edgecolor=style.INK, zorder=2))
            heads.text(h, bottom + 1, f"q{h}", **letters)
            if h % size == 0:
                look: Any = {"facecolor": colour, "edgecolor": style.PAPER, "zorder": 2}
                heads.add_patch(FancyBboxPatch((middle - 0.2, bottom - 0.2), 0.4, 0.4, "round,pad=0.1", **look))
                heads.text(middle, bottom, f"kv{g}", color=style.readable_on(colour), **letters)
    stored = [kv_cache_bytes(shape, 1, 1) / KIB for shape in shapes]
    whole = kv_cache_bytes(heads_of, 1, 1) / KIB
    middles = [0.5 - _ROW * index for index in range(len(shapes))]
    cache.barh(middles, [whole] * len(shapes), height=0.62, color=style.GRID)
    cache.barh(middles, stored, height=0.62, color=[style.variant_colour(shape.variant) for shape in shapes])
    for middle, value in zip(middles, stored, strict=True):
        cache.text(0, middle - 0.42, f"{value:g} KiB a token: {100 * value / whole:.3g} % of MHA", size=8, va="top")
    heads.set(xlim=(-margin - 0.1, n_heads - 0.5), ylim=(-_ROW * (len(shapes) - 1) - 0.55, 1.45), aspect="equal")
    heads.set_title("query heads (circles) and the KV heads they read (squares)")
    cache.set_title("KV cache, one layer")
    heads.axis("off")
    cache.axis("off")
    return figure


@style.styled
def rope_pairs(head_dim: int = 128, theta: float = 10_000.0) -> Figure:
    """Rotary positions as clocks: each pair of dimensions turns at a speed of its own, and a score sees differences."""
    pairs, positions = [0, head_dim // 8, head_dim // 4, head_dim // 2 - 1], (0, 1, 2, 5, 10)
    figure, grid = style.canvas(
        "Rotary positions: every pair of dimensions is a clock",
        f"Pair i of a query or key at position m is turned by m · {theta:g}^(−2i/D) radians (D = {head_dim}). Above: "
        f"where its hand stands at m = 0, 1, 2, 5, 10. Below: hands of a query (solid) and a key (dashed), equally far "
        f"apart at two places: the angle between them, all that a score sees, is the same.",
        f"Computed from head_dim D = {head_dim} and rope_theta = {theta:g} (arXiv 2104.09864). No measurement.",
        5.3,
        nrows=2,
        ncols=len(pairs),
    )
    ramp = LinearSegmentedColormap.from_list("ramp", style.RAMP)
    for (clock, below), pair in zip(grid.T, pairs, strict=True):
        speed = theta ** (-2 * pair / head_dim)
        _dial(clock, f"pair {pair}", f"one turn: {_round(2 * math.pi / speed)} tokens")
        for rank, m in enumerate(positions):
            apart = 10 * speed > 0.5  # else hands lie together, and the last one's name stands for all
            name = f"{m}" if m == 10 or (apart and (m == 0 or speed > 0.5)) else ""
            _hand(clock, m * speed, to_hex(ramp(0.35 + 0.65 * rank / 4)), name)
        unit = 10 ** round(-math.log10(speed))
        _dial(below, "", f"{3 * unit:,} tokens apart: cosine {math.cos(3 * unit * speed):.2f}".replace("-", "−"))
        for colour, m, n in ((style.variant_colour("MQA"), 4, 1), (style.variant_colour("MHA"), 9, 6)):
            _hand(below, m * unit * speed, colour, f"q{_round(m * unit)}")
            _hand(below, n * unit * speed, colour, f"k{_round(n * unit)}", dashed=True)
    return figure


def _round(count: float) -> str:
    """Three digits of it: "6.28", "54,400"."""
    return f"{float(f'{count:.3g}'):,.10g}"


def _dial(axes: Axes, title: str, below: str) -> None:
    axes.add_patch(Circle((0, 0), 1, facecolor="none", edgecolor=style.MUTED, linewidth=0.8))
    axes.text(0, -1.6, below, size=8, ha="center", va="center")
    axes.set(xlim=(-1.5, 1.5), ylim=(-1.75, 1.4), aspect="equal")
    axes.set_title(title, loc="center")
    axes.axis("off")


def _hand(axes: Axes, angle: float, colour: str, name: str, dashed: bool = False) -> None:
    x, y = math.cos(angle), math.sin(angle)
    axes.plot([0, x], [0, y], color=colour, linewidth=1.8, linestyle="--" if dashed else "-", solid_capstyle="round")
    side = "center" if abs(x) < 0.3 else "left" if x > 0 else "right"
    axes.text(1.1 * x, 1.15 * y, name, size=7, ha=side, va="center", color=style.darker(colour))


@style.styled
def cache_growth() -> Figure:
    """The cache while a sentence is generated: a column for every token, a row for every KV head; MHA, GQA-2, MQA."""
    shapes = [replace(_HEADS, n_kv_heads=g) for g in (8, 2, 1)]
    steps = len(_WORDS) - _PROMPT + 1
    figure, panels = style.canvas(
        "What is kept while a sentence is generated",
        f"A prompt of {_PROMPT} tokens fills {_PROMPT} columns at once; every new token adds one, and reads them all. "
        f"A row for each KV head; a square is its key and value.",
        "Drawn from shapes: H = 8 query heads, head_dim D = 128, one layer, bfloat16. No measurement.",
        4.3,
        nrows=3,
        height_ratios=[shape.n_kv_heads + 1.9 for shape in shapes],
    )
    for axes, shape in zip(panels, shapes, strict=True):
        colour, g = style.variant_colour(shape.variant), shape.n_kv_heads
        for column, word in enumerate(_WORDS):
            step = max(0, column - _PROMPT + 1)
            for head in range(g):
                look: Any = {"facecolor": colour, "edgecolor": style.PAPER, "linewidth": 1.2}
                axes.add_patch(Rectangle((column, head), 1, 1, gid=f"from-{step}", **look))
            axes.text(column + 0.5, -0.25, word, ha="center", va="top", size=8, gid=f"from-{step}")
        for step in range(steps):
            tokens = _PROMPT + step
            size = kv_cache_bytes(shape, 1, tokens) / KIB
            said = f"{tokens} tokens, {size:g} KiB" + (
                "\nafter the prompt" if step == 0 else "\nall read for the next token"
            )
            axes.text(len(_WORDS) + 0.3, g / 2, said, va="center", size=8.5, gid=f"only-{step}")
        name = f"{shape.variant}\nG = {g}"
        axes.text(-0.3, g / 2, name, ha="right", va="center", weight="bold", color=style.darker(colour))
        axes.set(xlim=(-1.6, len(_WORDS) + 4.2), ylim=(-1.35, g + 0.1))
        axes.axis("off")
    return figure


@style.styled
def attention_flow(rows: pandas.DataFrame, machine: str) -> Figure:
    """The size of every tensor in one layer's decode step, as a run recorded them: only K and V depend on G."""
    done = newest(rows[rows["status"] == "ok"], "flow", machine)
    if done.empty:
        raise InputError(f"no flow rows of {machine}; record them with: attnlab flow")
    done = done.astype({GROUPS: int, "order": int}).sort_values([GROUPS, "order"], ascending=[False, True])
    first, names = done.iloc[0], list(dict.fromkeys(done["tensor"]))
    variants = list(dict.fromkeys(zip(done[GROUPS], done["variant"], strict=True)))
    figure, axes = style.canvas(
        "One decode step of one layer, tensor by tensor",
        f"B = {first['batch']:g}, H = {first['shape.n_heads']:g}, D = {first['shape.head_dim']:g}, d = "
        f"{first['shape.dim']:g}, {first['context']:g} tokens in the cache after this one. Down the page as they are "
        f"made. Bars: bytes. Coloured: what the number of KV heads G changes.",
        source(done),
        1.2 + 0.36 * len(names),
    )
    most = done["bytes"].max()
    for column, (g, variant) in enumerate(variants):
        own = done[done[GROUPS] == g].set_index("tensor")
        left = 2.6 + 3.1 * column
        axes.text(left, 0.9, variant, size=11, weight="bold", color=style.darker(style.variant_colour(variant)))
        for line, name in enumerate(names):
            size, held = own["dims"][name], own["bytes"][name]
            same = done[done["tensor"] == name]["bytes"].nunique() == 1
            colour = style.GRID if same else style.variant_colour(variant)
            axes.add_patch(Rectangle((left, -line - 0.12), 2.7 * held / most, 0.2, facecolor=colour, edgecolor="none"))
            sizes = "[" + ", ".join(f"{each:g}" for each in size) + "]"
            weight = "normal" if same else "bold"
            axes.text(left, -line + 0.16, f"{sizes}  {held:,.0f} B", size=7.5, va="bottom", weight=weight)
    for line, name in enumerate(names):
        axes.text(0, -line + 0.16, name, va="bottom", size=8.5)
    axes.set(xlim=(-0.05, 2.6 + 3.1 * len(variants)), ylim=(-len(names) + 0.6, 1.3))
    axes.axis("off")
    return figure
