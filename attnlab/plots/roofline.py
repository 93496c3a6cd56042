"""What the machine allows and what was reached, and how well time was predicted."""

import numpy
import pandas
from matplotlib.figure import Figure

from attnlab.plots.rows import dtypes, source, timed
from attnlab.plots.speed import GROUPS
from attnlab.plots.style import (
    GRID,
    INK,
    MUTED,
    canvas,
    darker,
    label_ends,
    log_axis,
    styled,
    tokens,
    variant_colour,
    variant_marker,
)
from attnlab.errors import InputError


@styled
def roofline(rows: pandas.DataFrame, machine: str) -> Figure:
    """Attained flop/s over flop per byte, under the machine's measured roofs; a panel per dtype."""
    drawn = timed(rows, "decode", machine)
    drawn = drawn.assign(intensity=drawn["flops"] / drawn["bytes"], rate=drawn["flops"] / drawn["median"] / 1e9)
    kinds, context = dtypes(drawn), drawn["context"].max()
    longest = drawn[(drawn["context"] == context) & (drawn["impl"] != "auto")]
    batch = longest["batch"].max()
    longest = longest[longest["batch"] == batch]
    figure, panels = canvas(
        "Sharing heads climbs the roof: R query heads use each byte that is read",
        f"Decode attention does R = H / G flop per byte in 16 bit and R / 2 in 32 bit. Lines: this machine's measured "
        f"roofs. Large: each variant's fastest implementation at context {tokens(context)}, batch {batch}, and its share "
        f"of the roof; small: every other measurement.",
        source(drawn),
        4.7,
        ncols=len(kinds),
        sharey=True,
        squeeze=False,
    )
    for axes, dtype in zip(panels[0], kinds, strict=True):
        panel, ends = drawn[drawn["dtype"] == dtype], []
        bandwidth, rate = panel["read_bandwidth"].median() / 1e9, panel["matmul_rate"].median() / 1e9
        low, high = panel["intensity"].min() / 1.6, max(panel["intensity"].max() * 1.6, rate / bandwidth * 2)
        edge = rate / bandwidth
        axes.plot([low, edge, high], [low * bandwidth, rate, rate], color=INK, label="roof")
        axes.plot(panel["intensity"], panel["rate"], ".", color=MUTED, alpha=0.35, ms=4, mew=0, label="all")
        for variant, arms in longest[longest["dtype"] == dtype].groupby("variant", sort=False):
            best = arms.loc[arms["rate"].idxmax()]
            colour = variant_colour(variant)
            axes.plot([best["intensity"]], [best["rate"]], variant_marker(variant), color=colour, ms=9, label=variant)
            ends.append((best["intensity"], best["rate"], variant, colour))
            axes.annotate(
                f"{variant}, {best['impl']}\n{best['fraction_of_roof']:.0%} of the roof",
                (best["intensity"], best["rate"]),
                (8, -4),
                textcoords="offset points",
                color=darker(colour),
                size=7.5,
                va="top",
            )
        axes.set_title(dtype)
        log_axis(axes, "x", [2.0**exponent for exponent in range(-2, 12)])
        log_axis(axes, "y", [1, 10, 100, 1000, 10**4, 10**5, 10**6])
        axes.set(xlim=(low, high), xlabel="flop per byte of K, V, q and output")
    panels[0, 0].set_ylabel("attained Gflop/s")
    return figure


@styled
def prediction(rows: pandas.DataFrame, machine: str) -> Figure:
    """Predicted over measured time of every point of ``grouped``: decode, and prefill marked apart."""
    parts = {}
    for kind in ("decode", "prefill"):
        try:
            chosen = timed(rows, kind, machine)
        except InputError:
            if kind == "decode":
                raise
            continue
        chosen = chosen[chosen["impl"] == "grouped"]
        if not chosen.empty:
            parts[kind] = chosen.assign(off=(chosen["predicted"] - chosen["median"]).abs() / chosen["median"])
    if not parts:
        raise InputError(f"grouped was not measured on {machine}")
    drawn = pandas.concat(parts.values())
    return drawn
