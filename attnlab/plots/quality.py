"""What sharing costs in loss, with its uncertainty; and memory, speed and loss in one chart.

A figure of trained models draws one experiment, of the newest run that has it.
"""

from typing import Any

import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attnlab.effects import UNRESOLVED, Effect, effects, finished, too_few
from attnlab.errors import InputError
from attnlab.plots import style
from attnlab.plots.rows import GROUPS, best_arm, source, timed
from attnlab.shapes import variant_name

_OFFSETS = {"plain": 0.17, "matched": -0.17}  # of a row's height, above and below its middle


def seeds(rows: pandas.DataFrame, columns: list[str]) -> str:
    """ "5 seeds", or "2 to 5 seeds" where the groups that share ``columns`` have not all as many: a partial sweep."""
    counts = rows.groupby(columns)["seed"].nunique()
    low, high = counts.min(), counts.max()
    return f"{high} seed{'s' if high > 1 else ''}" if low == high else f"{low} to {high} seeds (partial)"


def _interval(axes: Axes, effect: Effect, y: float) -> None:
    """Mean and 95 % interval, the single seeds below it, and in grey what these seeds would likely not have shown."""
    missed = 2 * effect.smallest
    axes.barh(y, missed, left=-missed / 2, height=0.26, color=style.GRID, label="missed")
    axes.plot(effect.differences, [y - 0.08] * effect.seeds, ".", color=style.MUTED, ms=4, mew=0, label="seeds")
    estimate(axes, effect.mean, effect.half_width, y, effect.variant, effect.arm)


def estimate(axes: Axes, value: float, reach: Any, y: float, variant: str, arm: str) -> None:
    """A variant's mark with its interval, hollow where the FFN was widened to MHA's parameter count."""
    colour, marker = style.variant_look(variant)
    fill = colour if arm == "plain" else style.PAPER
    axes.errorbar(value, y, xerr=reach, fmt=marker, color=colour, mfc=fill, capsize=3, label=f"{variant}, {arm}")


@style.styled
def quality(rows: pandas.DataFrame, machine: str) -> Figure:
    """Loss difference from MHA with its 95 % interval, per G plain and parameter-matched, and the verdict on each."""
    done = finished(rows, "g-sweep", machine)
    found, heads = effects(done), int(done["shape.n_heads"].iloc[0])
    variants = list(dict.fromkeys(effect.variant for effect in found))
    mha, few = done[done[GROUPS] == heads], too_few(done)
    figure, axes = style.canvas(
        "What sharing KV heads costs in quality, and what these runs can show",
        f"{mha['n_params'].iloc[0] / 1e6:.2g} M parameters as MHA (H = {heads}), "
        f"{done['tokens'].iloc[0] / 1e6:.3g} M tokens, {seeds(done, [GROUPS, 'arm'])}; MHA reaches "
        f"{mha['bits_per_byte'].mean():.4f} bits per byte. Filled: plain, only G differs; hollow: matched, the FFN "
        f"widened to MHA's parameter count. Bars: 95 % intervals, paired by seed; dots: single seeds. Grey: true "
        f"differences this small would likely be missed. Verdicts answer for all arms together."
        + (f" Too few pairs yet: {', '.join(few)}." if few else ""),
        source(done),
        1.6 + 1.05 * len(variants),
    )
    for effect in found:
        y = _OFFSETS[effect.arm] - variants.index(effect.variant)
        _interval(axes, effect, y)
        text = f"{effect.arm}  {effect.mean:+.4f} ± {effect.half_width:.4f}\n{effect.verdict}".replace("-", "−")
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), size=8, va="center", linespacing=1.3)
    _zero(axes, found)
    axes.set_yticks([-index for index in range(len(variants))], variants, weight="bold")
    axes.set_title("Difference from MHA")
    return figure


def _zero(axes: Axes, found: list[Effect]) -> None:
    """An axis of differences, as wide to the left of zero as to the right."""
    reach = [(abs(effect.mean) + effect.half_width, effect.smallest, *map(abs, effect.differences)) for effect in found]
    widest = max(map(max, reach))
    axes.axvline(0, color=style.INK, linewidth=1, label="MHA")
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set(xlim=(-1.1 * widest, 1.1 * widest), xlabel="bits per byte; right of zero is worse")


@style.styled
def quality_curves(rows: pandas.DataFrame, machine: str) -> Figure:
    """Loss over tokens beside gzip and xz on the same bytes; and each arm minus MHA of the same seed."""
    done = finished(rows, "g-sweep", machine).sort_values("seed")
    heads = int(done["shape.n_heads"].iloc[0])
    arms = sorted(set(zip(done[GROUPS], done["arm"], strict=True)), key=lambda arm: (-arm[0], arm[1] == "matched"))
    figure, (left, right) = style.canvas(
        "Loss while training, and how far apart the variants are",
        f"H = {heads}, {seeds(done, [GROUPS, 'arm'])}: thin; means of the seeds that all got there: thick. Left: "
        f"plain arms, on a sample of the validation text; marks: averaged weights, all of it; dashed: compressors on "
        f"the same bytes. Right: minus MHA of the same seed; dotted: means of matched arms.",
        source(done),
        4.6,
        ncols=2,
        width_ratios=[1, 1.1],
    )
    mha = pandas.DataFrame()
    ends: tuple[list[style.End], list[style.End]] = ([], [])
    for g, arm in arms:
        runs = done[(done[GROUPS] == g) & (done["arm"] == arm)]
        curves = pandas.DataFrame({seed: dict(curve) for seed, curve in zip(runs["seed"], runs["curve"], strict=True)})
        curves = curves.set_index(curves.index / 1e6).sort_index()
        variant = variant_name(heads, g)
        colour, marker = style.variant_look(variant)
        mha = curves if g == heads else mha
        for axes, drawn, named in zip((left, right), (curves, curves - mha), ends, strict=True):
            drawn = drawn.dropna(axis=1, how="all").dropna(how="all")
            if drawn.empty or (g == heads and axes is right) or (arm == "matched" and axes is left):
                continue
            mean, dash = drawn.dropna().mean(axis=1), "-" if arm == "plain" else ":"
            if arm == "plain":
                axes.plot(drawn.index, drawn, color=colour, lw=0.6, alpha=0.6, label=f"{variant}, seeds")
                named.append((mean.index[-1], mean.iloc[-1], variant, colour))
            axes.plot(mean.index, mean, dash, color=colour, lw=2, label=f"{variant}, {arm}")
        if arm == "plain":
            left.plot(mha.index[-1], runs["bits_per_byte"].mean(), marker, color=colour, label=f"{variant}, averaged")
    for name in ("gzip", "xz"):
        for bits in set(done.get(f"{name}_bits", done["seed"][:0]).dropna()):
            left.axhline(bits, color=style.MUTED, ls="--", lw=1, label=name)
            ends[0].append((mha.index[-1], bits, f"{name} -9: {bits:.2f}", style.MUTED))
    late = [0.0]  # before, it is noise that would decide the axis
    for line in right.get_lines():
        y = numpy.asarray(line.get_ydata(), float)[len(line.get_xdata()) // 2 :]
        late += [float(numpy.nanmin(y)), float(numpy.nanmax(y))]
    pad = 0.1 * (max(late) - min(late)) or 0.01
    right.axhline(0, color=style.INK, lw=1, label="MHA")
    right.set(ylim=(min(late) - pad, max(late) + pad), ylabel="above MHA (bits per byte)")
    left.set_ylabel("loss (bits per byte)")
    for axes, named in zip((left, right), ends, strict=True):
        axes.set_xlabel("tokens trained on (millions)")
        style.label_ends(axes, named)
    return figure


@style.styled
def tradeoff(rows: pandas.DataFrame, machine: str) -> Figure:
    """Cache bytes, decode time and loss against R = H / G, which models of different size share; one line per R."""
    decode = timed(rows, "decode", machine)
    decode = decode[(decode["impl"] == best_arm(decode)) & (decode["context"] == decode["context"].max())]
    decode = decode[decode["batch"] == decode["batch"].min()]
    whole = decode[decode[GROUPS] == decode["shape.n_heads"]]
    if whole.empty:
        raise InputError(f"decode rows of {machine} hold no MHA to compare with")
    # Where MHA itself comes nearest its roof, so that a slow path it alone takes is not drawn as the gain of sharing.
    decode = decode[decode["dtype"] == whole.loc[whole["fraction_of_roof"].idxmax(), "dtype"]]
    speed = {int(row["shape.n_heads"] // row[GROUPS]): row for _, row in decode.iterrows()}
    try:
        done = finished(rows, "g-sweep", machine)
    except InputError:  # loss does not depend on the machine, so another's will do; the footer names both
        others = rows[rows.get("experiment", rows["kind"]) == "g-sweep"].sort_values("run")["machine"]
        if others.empty:
            raise
        done = finished(rows, "g-sweep", others.iloc[-1])
    found, heads, mha = effects(done), int(done["shape.n_heads"].iloc[0]), speed[1]
    ratios = sorted({*speed, *(heads // effect.n_kv_heads for effect in found)})
    resolved = sum(effect.verdict != UNRESOLVED for effect in found)
    figure, (cache, time, loss) = style.canvas(
        "Sharing KV heads: memory and time it saves, quality it costs",
        f"R query heads share one KV head. Time: a decode step's attention, context {style.tokens(mha['context'])}, "
        f"batch {mha['batch']}, H = {mha['shape.n_heads']}, {mha['impl']}, in the dtype whose MHA is nearest its roof; "
        f"bars: quartiles. Loss: small models, H = {heads}, {seeds(done, [GROUPS, 'arm'])}, 95 % intervals; "
        f"grey: too small to be seen; {resolved} of {len(found)} differences resolved. Time and loss share R, not G.",
        f"time: {source(decode)}\nloss: {source(done)}",
        5.2,
        ncols=3,
        width_ratios=[0.9, 1.1, 1.2],
        sharey=True,
    )
    ys = [-index for index in range(len(ratios))]
    for y, ratio in zip(ys, ratios, strict=True):
        cache.barh(y, 100 / ratio, height=0.5, color=style.MUTED, label=f"R = {ratio}")
        cache.text(100 / ratio + 3, y, f"{100 / ratio:.4g} %", va="center")
        if ratio in speed:
            row, colour = speed[ratio], style.variant_colour(speed[ratio]["variant"])
            low, part, high = (100 * row[name] / mha["median"] for name in ("q25", "median", "q75"))
            predicted = 100 * row["predicted"] / mha["predicted"]
            time.barh(y, part, height=0.5, color=colour, label=row["variant"])
            spread = [[part - low], [high - part]]
            time.errorbar(part, y, xerr=spread, color=style.INK, capsize=2, linewidth=1, label="quartiles")
            time.plot([predicted] * 2, [y - 0.38, y + 0.38], color=style.INK, label="predicted")
            text = f"{part:.0f} %  {row['variant']}"
            time.text(max(high, predicted) + 4, y, text, color=style.darker(colour), weight="bold", va="center")
        else:
            time.text(3, y, "not measured", color=style.MUTED, va="center")
        here = [effect for effect in found if heads // effect.n_kv_heads == ratio]
        for effect in here:
            _interval(loss, effect, y + _OFFSETS[effect.arm])
        name = variant_name(heads, heads // ratio) if here or ratio == 1 else "not trained"
        colour = style.darker(style.variant_colour(name)) if here or ratio == 1 else style.MUTED
        loss.text(1.03, y, name, transform=loss.get_yaxis_transform(), color=colour, va="center", weight="bold")
    _zero(loss, found)
    cache.set_yticks(ys, [f"R = {ratio}" for ratio in ratios], weight="bold")
    cache.set(title="memory: the KV cache", xlabel="bytes, % of MHA", xlim=(0, 150))
    time.set(title="time (line: predicted)", xlabel="median, % of MHA", xlim=(0, 1.55 * time.dataLim.x1))
    loss.set(title="quality (hollow: matched)")
    for axes in (cache, time):
        axes.grid(axis="y", visible=False)
    return figure
