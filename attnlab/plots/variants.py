"""The idea, drawn: how query heads share key/value heads, and what is left to store."""

from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from attnlab.plots import style
from attnlab.predict.memory import KIB, kv_cache_bytes
from attnlab.shapes import ModelShape

_HEADS = ModelShape(n_layers=1, dim=1024, n_heads=8, n_kv_heads=8, head_dim=128, ffn_dim=1, vocab_size=1)
_ROW = 2.0  # height of a variant, in units of the distance between two query heads


@style.styled
def variants() -> Figure:
    """Eight query heads with 8, 4, 2 and 1 key/value heads; beside each the bytes that one token adds to the cache."""
    figure, (heads, cache) = style.canvas(
        "How eight query heads share key/value heads",
        "Query head h reads KV head h // R, with R = H / G. Only KV heads are stored, so the cache shrinks by R.",
        "Drawn from shapes: H = 8 query heads, head_dim D = 128, one layer, bfloat16. No measurement.",
        4.9,
        ncols=2,
        width_ratios=[3.1, 1],
        sharey=True,
    )
    shapes = [replace(_HEADS, n_kv_heads=g) for g in (8, 4, 2, 1)]
    letters: dict[str, Any] = {"size": 7.5, "ha": "center", "va": "center_baseline", "zorder": 3}
    stored = [kv_cache_bytes(shape, 1, 1) / KIB for shape in shapes]
    for index, shape in enumerate(shapes):
        bottom, colour, size = -_ROW * index, style.variant_colour(shape.variant), shape.group_size
        sharing = "a KV head each" if size == 1 else f"{size} queries a KV head"
        heads.text(-3.2, bottom + 0.85, shape.variant, size=12, weight="bold", color=style.darker(colour), va="center")
        heads.text(-3.2, bottom + 0.35, f"G = {shape.n_kv_heads}\n{sharing}", color=style.MUTED, va="top")
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
    middles = [0.5 - _ROW * index for index in range(len(shapes))]
    cache.barh(middles, [stored[0]] * 4, height=0.62, color=style.GRID)
    cache.barh(middles, stored, height=0.62, color=[style.variant_colour(shape.variant) for shape in shapes])
    for middle, value in zip(middles, stored, strict=True):
        cache.text(0, middle - 0.42, f"{value:g} KiB a token: {100 * value / stored[0]:g} % of MHA", size=8, va="top")
    heads.set(xlim=(-3.3, 7.5), ylim=(-_ROW * 3 - 0.55, 1.45), aspect="equal")
    heads.set_title("query heads (circles) and the KV heads they read (squares)")
    cache.set_title("KV cache, one layer")
    heads.axis("off")
    cache.axis("off")
    return figure
