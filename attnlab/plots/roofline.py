"""What the machine allows and what was reached, and how well time was predicted."""

import contextlib

import numpy
import pandas
from matplotlib.figure import Figure

from attnlab.errors import InputError
from attnlab.plots.rows import dtypes, source, timed
from attnlab.plots.speed import GROUPS
from attnlab.plots.style import (
    GRID,
    INK,
    MUTED,
    PAPER,
    canvas,
    darker,
    log_axis,
    styled,
    tokens,
    variant_colour,
    variant_marker,
)

_MARKS = {"decode": "o", "prefill": "^"}


@styled
def roofline(rows: pandas.DataFrame, machine: str) -> Figure:
    """Attained flop/s over flop per byte, under the machine's measured roofs; a panel per dtype."""
    drawn = timed(rows, "decode", machine)
    drawn = drawn.assign(intensity=drawn["flops"] / drawn["bytes"], rate=drawn["flops"] / drawn["median"] / 1e9)
    kinds, named = dtypes(drawn), drawn[drawn["impl"] != "auto"]
    named = named[named["context"] == named["context"].max()]
    named = named[named["batch"] == named["batch"].max()]
    point = named.iloc[0]
    figure, panels = canvas(
        "Sharing heads climbs the roof: R query heads use each byte that is read",
        f"Decode attention does R = H / G flop per byte in 16 bit, R / 2 in 32 bit. Black: this machine's measured "
        f"roofs. Named: each variant's fastest implementation at context {tokens(point['context'])}, batch "
        f"{point['batch']}, and its share of the roof. Small: every decode row. H = {point['shape.n_heads']}.",
        source(drawn),
        5.2,
        ncols=len(kinds),
        sharey=True,
        squeeze=False,
    )
    for axes, dtype in zip(panels[0], kinds, strict=True):
        panel = drawn[drawn["dtype"] == dtype]
        bandwidth, rate = panel["read_bandwidth"].median() / 1e9, panel["matmul_rate"].median() / 1e9
        low, high = panel["intensity"].min() / 1.5, max(panel["intensity"].max(), rate / bandwidth) * 1.5
        axes.plot([low, rate / bandwidth, high], [low * bandwidth, rate, rate], color=INK, label="roof")
        axes.plot(panel["intensity"], panel["rate"], ".", color=MUTED, alpha=0.4, ms=4, mew=0, label="all rows")
        for variant, arms in named[named["dtype"] == dtype].groupby("variant", sort=False):
            best = arms.loc[arms["rate"].idxmax()]
            x, y, share = best["intensity"], best["rate"], best["fraction_of_roof"]
            roof, colour = y / share, variant_colour(variant)
            axes.plot([x, x], [y, roof], color=colour, linewidth=1, label=f"{variant}, below its roof")
            axes.plot([x], [y], variant_marker(variant), color=colour, ms=9, label=variant)
            text, look = f"{variant}, {best['impl']}: {100 * share:.0f} %", {"rotation": 65, "rotation_mode": "anchor"}
            axes.annotate(text, (x, roof), (2, 5), textcoords="offset points", color=darker(colour), **look)
        axes.set_title(dtype)
        log_axis(axes, "x", [2.0**exponent for exponent in range(-3, 14)])
        log_axis(axes, "y")
        axes.set(xlim=(low, high), xlabel="arithmetic intensity (flop per byte)")
    bottom, top = panels[0, 0].get_ylim()
    panels[0, 0].set(ylabel="attained rate (Gflop/s)", ylim=(bottom, top * (top / bottom) ** 0.45))  # room for labels
    return figure


@styled
def prediction(rows: pandas.DataFrame, machine: str) -> Figure:
    """Predicted over measured time of every point of ``grouped``: decode, and prefill marked apart."""
    parts = {"decode": timed(rows, "decode", machine)}
    with contextlib.suppress(InputError):
        parts["prefill"] = timed(rows, "prefill", machine)
    drawn = pandas.concat(parts.values())
    drawn = drawn[drawn["impl"] == "grouped"]
    if drawn.empty:
        raise InputError(f"grouped was not measured on {machine}")
    drawn = drawn.assign(off=(drawn["predicted"] - drawn["median"]).abs() / drawn["median"])
    figure, axes = canvas(
        "Predicted against measured time of one attention call",
        "Predicted from sizes and this machine's measured roofs. Band: within 25 % of the measurement. Every point of "
        "implementation grouped is drawn and counted; error is |predicted − measured| / measured.",
        source(drawn),
        5.6,
    )
    times = pandas.concat([drawn["median"], drawn["predicted"]]) * 1e3
    line = numpy.array([times.min() / 1.6, times.max() * 1.6])
    axes.fill_between(line, 0.75 * line, 1.25 * line, color=GRID, linewidth=0, label="within 25 %")
    axes.plot(line, line, color=MUTED, linewidth=1, label="exact")
    kinds, said = dtypes(drawn), []
    for kind, marker in _MARKS.items():
        points = drawn[drawn["kind"] == kind]
        for (variant, dtype), some in points.groupby(["variant", "dtype"], sort=False):
            colour = variant_colour(str(variant))
            face = PAPER if dtype != kinds[-1] else colour
            label = f"{kind}, {variant}, {dtype}"
            axes.plot(some["median"] * 1e3, some["predicted"] * 1e3, marker, color=colour, mfc=face, label=label)
        if not points.empty:
            median, most = 100 * points["off"].median(), 100 * points["off"].quantile(0.9)
            said.append(f"{kind}, {len(points)} points: median error {median:.0f} %, 90th percentile {most:.0f} %")
    axes.text(0.02, 0.975, "\n".join(said), transform=axes.transAxes, va="top", linespacing=1.6, weight="bold")
    groups = drawn.sort_values(GROUPS)["variant"].unique()
    for index, variant in enumerate(groups):
        y, colour = 0.12 + 0.045 * index, variant_colour(variant)
        axes.text(0.98, y, variant, transform=axes.transAxes, ha="right", weight="bold", color=darker(colour))
    shapes = "circles: decode; triangles: prefill\nfilled: " + "; hollow: ".join(reversed(kinds))
    axes.text(0.98, 0.025, shapes, transform=axes.transAxes, ha="right", va="bottom", size=7.5, color=MUTED)
    log_axis(axes, "x")
    log_axis(axes, "y")
    axes.set(xlim=line, ylim=line, xlabel="measured median (ms)", ylabel="predicted (ms)")
    return figure
