"""What papers printed on quality against KV heads, each panel with its table and with how parameters were matched.

The numbers lie in ``published.json``, as read in the papers' own tables. None of them was measured here, and none of
ours stands beside them: other sizes, data and scores cannot share an axis.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnlab.plots import style

_PUBLISHED = Path(__file__).with_suffix(".json")


@style.styled
def published_quality() -> Figure:
    """Four published tables: quality over time, over KV heads (twice), and differences from MHA per benchmark."""
    tables = json.loads(_PUBLISHED.read_text(encoding="utf-8"))
    figure, grid = style.canvas(
        "What papers report on quality with fewer KV heads",
        "Each paper has its own models, data and scores, so compare within a panel only. How parameters were matched "
        "differs too, and changes the ranking. The tables give no intervals.",
        "Numbers as printed in the named tables. No measurement of attnlab's is in this figure.",
        7.2,
        nrows=2,
        ncols=2,
        height_ratios=[1, 1.15],
    )
    panels = {"gqa": _over_time, "cla": _perplexity, "deepseek-v2": _scores, "llama-2": _differences}
    for axes, (name, draw) in zip(grid.flat, panels.items(), strict=True):
        table = tables[name]
        draw(axes, table["points"])
        axes.set_title(table["source"], pad=32)
        note: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "color": style.MUTED}
        axes.annotate(f"{table['setting']}\n{table['matched']}", (0, 1), (0, 5), **note).set_in_layout(False)
    return figure


def _over_time(axes: Axes, points: list[dict[str, Any]]) -> None:
    for point in points:
        colour, marker = style.variant_look(point["variant"])
        axes.plot(point["seconds"], point["quality"], marker, color=colour, ms=7, label=point["name"])
        away, side = (-8, "right") if point["seconds"] > 1 else (8, "left")
        look: dict[str, Any] = {"va": "center", "ha": side, "weight": "bold", "color": style.darker(colour)}
        xy = point["seconds"], point["quality"]
        axes.annotate(point["name"], xy, (away, 0), textcoords="offset points", **look)
    axes.set(xlim=(0, 1.65), ylim=(45.8, 47.4), xlabel="time per sample (s, per TPU v4 chip)")
    axes.set_ylabel("average quality (points)")


def _line(axes: Axes, points: list[dict[str, Any]], score: str) -> None:
    """A grey line over variants with a mark and the printed number at each, on the free side of the line."""
    rising = points[-1][score] > points[0][score]
    axes.plot(range(len(points)), [point[score] for point in points], color=style.MUTED, lw=1, label=score)
    for x, point in enumerate(points):
        colour, marker = style.variant_look(point["variant"])
        axes.plot(x, point[score], marker, color=colour, ms=7, label=f"{point['variant']}, {score}")
        look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center"}
        axes.annotate(
            str(point[score]), (x, point[score]), (16, -6 if rising else 6), color=style.darker(colour), **look
        )
    axes.set_xlim(-0.4, len(points) - 0.4)
    axes.margins(y=0.12)


def _perplexity(axes: Axes, points: list[dict[str, Any]]) -> None:
    _line(axes, points, "perplexity")
    axes.set_xticks(range(len(points)), [f"{p['variant']}\n{p['kv_bytes_per_token'] / 1024:g} KiB" for p in points])
    axes.set(ylabel="validation perplexity (lower is better)", xlabel="variant, and KV cache of a token")


def _scores(axes: Axes, points: list[dict[str, Any]]) -> None:
    for score in ("MMLU", "BBH"):
        _line(axes, points, score)
    style.label_ends(axes, [(len(points) - 1, points[-1][score], score, style.MUTED) for score in ("MMLU", "BBH")])
    axes.set_xticks(range(len(points)), [point["variant"] for point in points])
    axes.set(ylabel="score (points)", xlabel="variant")


def _differences(axes: Axes, points: list[dict[str, Any]]) -> None:
    mha, *others = points
    names = [name for name in mha if name != "variant"]
    for other in others:
        colour, marker = style.variant_look(other["variant"])
        values = [other[name] - mha[name] for name in names]
        axes.plot(values, range(len(names)), marker, color=colour, label=other["variant"])
        look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "weight": "bold"}
        axes.annotate(other["variant"], (values[0], 0), (0, 7), color=style.darker(colour), **look)
    axes.axvline(0, color=style.INK, lw=1, label="MHA")
    axes.set_yticks(range(len(names)), [f"{name}  {mha[name]:.1f}" for name in names])
    axes.set_ylim(len(names) - 0.5, -1.5)
    axes.set_xlabel("points above MHA, whose score is at the left")
