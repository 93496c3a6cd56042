"""What the machine allows and what was reached, and how well time was predicted."""

import contextlib

import numpy
import pandas
from matplotlib.figure import Figure

from attnlab.errors import InputError
from attnlab.plots import style
from attnlab.plots.rows import GROUPS, dtypes, source, timed
from attnlab.results import prediction_error
from attnlab.shapes import element_bytes

_MARKS = {"decode": "o", "prefill": "^"}


@style.styled
def roofline(rows: pandas.DataFrame, machine: str) -> Figure:
    """Attained flop/s over flop per byte, under the machine's measured roofs; a panel per dtype."""
    drawn = timed(rows, "decode", machine)
    kinds = dtypes(drawn)
    drawn = drawn[(drawn["impl"] != "auto") & drawn["dtype"].isin(kinds)]  # auto is one of the others
    drawn = drawn[drawn["context"] == drawn["context"].max()]
    drawn = drawn[drawn["batch"] == drawn["batch"].max()]
    if drawn.empty:
        raise InputError(f"decode rows of {machine} are of auto only")
    drawn = drawn.assign(intensity=drawn["flops"] / drawn["bytes"], rate=drawn["flops"] / drawn["median"] / 1e9)
    point = drawn.iloc[0]
    figure, panels = style.canvas(
        "Sharing heads climbs the roof: R query heads use each byte that is read",
        f"Decode attention does R = H / G flop per byte in 16 bit, R / 2 in 32 bit. Line: this machine's measured "
        f"roofs. Named: each variant's fastest implementation and its share of the roof; small: the others. "
        f"H = {point['shape.n_heads']}, context {style.tokens(point['context'])}, batch {point['batch']}.",
        source(drawn),
        5.2,
        ncols=len(kinds),
        sharey=True,
        squeeze=False,
    )
    named_top = 0.0
    for axes, dtype in zip(panels[0], kinds, strict=True):
        panel = drawn[drawn["dtype"] == dtype]
        bandwidth, rate = panel["read_bandwidth"].median() / 1e9, panel["matmul_rate"].median() / 1e9
        low, high = panel["intensity"].min() / 1.5, max(panel["intensity"].max(), rate / bandwidth) * 1.5
        axes.plot([low, rate / bandwidth, high], [low * bandwidth, rate, rate], color=style.INK, label="roof")
        axes.plot(panel["intensity"], panel["rate"], ".", color=style.MUTED, ms=6, mew=0, label="others")
        for variant, arms in panel.groupby("variant", sort=False):
            best = arms.loc[arms["rate"].idxmax()]
            x, y, share = best["intensity"], best["rate"], best["fraction_of_roof"]
            roof, (colour, marker) = y / share, style.variant_look(variant)
            named_top = max(named_top, roof)
            axes.plot([x, x], [y, roof], color=colour, linewidth=1, label=f"{variant}, below its roof")
            axes.plot([x], [y], marker, color=colour, ms=9, label=variant)
            text, look = f"{variant}, {best['impl']}: {100 * share:.0f} %", {"rotation": 65, "rotation_mode": "anchor"}
            axes.annotate(text, (x, roof), (2, 5), textcoords="offset points", color=style.darker(colour), **look)
        axes.set_title(dtype)
        style.log_axis(axes, "x", [2.0**exponent for exponent in range(-3, 14)])
        style.log_axis(axes, "y")
        axes.set(xlim=(low, high), xlabel="arithmetic intensity (flop per byte)")
    bottom, top = panels[0, 0].get_ylim()
    top = max(top, bottom * (named_top / bottom) ** (1 / 0.62))  # room for the names
    panels[0, 0].set(ylabel="attained rate (Gflop/s)", ylim=(bottom, top))
    return figure


@style.styled
def prediction(rows: pandas.DataFrame, machine: str) -> Figure:
    """Predicted over measured time of every point of ``auto``: decode, and prefill marked apart."""
    parts = {"decode": timed(rows, "decode", machine)}
    with contextlib.suppress(InputError):
        parts["prefill"] = timed(rows, "prefill", machine)
    drawn = pandas.concat(parts.values())
    drawn = drawn[drawn["impl"] == "auto"]
    if drawn.empty:
        raise InputError(f"auto was not measured on {machine}")
    drawn = drawn.assign(off=prediction_error(drawn))
    figure, axes = style.canvas(
        "Predicted against measured time of one attention call",
        "Predicted from sizes, and from roofs, rates and fixed costs measured on this machine. Band: within 25 % of "
        "the measurement. Every point of auto is drawn and counted; error is |predicted − measured| / measured.",
        source(drawn),
        5.6,
    )
    times = pandas.concat([drawn["median"], drawn["predicted"]]) * 1e3
    line = numpy.array([times.min() / 1.6, times.max() * 1.6])
    axes.fill_between(line, 0.75 * line, 1.25 * line, color=style.GRID, linewidth=0, label="within 25 %")
    axes.plot(line, line, color=style.MUTED, linewidth=1, label="exact")
    said = []
    for kind, marker in _MARKS.items():
        points = drawn[drawn["kind"] == kind]
        for (variant, dtype), some in points.groupby(["variant", "dtype"], sort=False):
            colour = style.variant_colour(str(variant))
            face, label = style.PAPER if _hollow(dtype) else colour, f"{kind}, {variant}, {dtype}"
            axes.plot(some["median"] * 1e3, some["predicted"] * 1e3, marker, color=colour, mfc=face, label=label)
        if not points.empty:
            median, most = 100 * points["off"].median(), 100 * points["off"].quantile(0.9)
            said.append(f"{kind}, {len(points)} points: median error {median:.0f} %, 90th percentile {most:.0f} %")
    axes.set_title("\n".join(said))
    key = [(f"{mark} {kind}", style.MUTED) for mark, kind in (("●", "decode"), ("▲", "prefill"))]
    key += [(f"{'○' if _hollow(dtype) else '●'} {dtype}", style.MUTED) for dtype in sorted(drawn["dtype"].unique())]
    for variant in drawn.sort_values(GROUPS, ascending=False)["variant"].unique():
        key.append((variant, style.darker(style.variant_colour(variant))))
    for index, (text, colour) in enumerate(key):
        axes.text(1.02, 0.97 - 0.045 * index, text, transform=axes.transAxes, color=colour, va="top")
    style.log_axis(axes, "x")
    style.log_axis(axes, "y")
    axes.set(xlim=line, ylim=line, xlabel="measured median (ms)", ylabel="predicted (ms)")
    return figure


def _hollow(dtype: object) -> bool:
    return element_bytes(dtype) > 2
