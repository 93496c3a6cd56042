"""What sharing costs in loss, with its uncertainty; and memory, speed and loss in one chart."""

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attnlab.effects import Effect, effects
from attnlab.errors import InputError
from attnlab.plots import style
from attnlab.plots.rows import GROUPS, best_arm, source, timed
from attnlab.results import newest
from attnlab.shapes import variant_name

_OFFSETS = {"plain": 0.17, "matched": -0.17}  # of a row's height, above and below its middle


def _trained(rows: pandas.DataFrame, machine: str) -> pandas.DataFrame:
    trained = newest(rows, "quality", machine)
    trained = trained[trained["status"] == "ok"]
    if trained.empty:
        raise InputError(f"no quality rows of {machine} ended well")
    return trained.astype({GROUPS: int})


def _interval(axes: Axes, effect: Effect, y: float) -> None:
    """Mean and 95 % interval, the single seeds below it, and in grey what these seeds would likely not have shown."""
    colour, marker = style.variant_look(effect.variant)
    missed = 2 * effect.smallest
    axes.barh(y, missed, left=-missed / 2, height=0.26, color=style.GRID, label="missed")
    axes.plot(effect.differences, [y - 0.08] * effect.seeds, ".", color=style.MUTED, ms=4, mew=0, label="seeds")
    axes.errorbar(
        effect.mean,
        y,
        xerr=effect.half_width,
        fmt=marker,
        color=colour,
        mfc=colour if effect.arm == "plain" else style.PAPER,
        capsize=3,
        label=f"{effect.variant}, {effect.arm}",
    )


@style.styled
def quality(rows: pandas.DataFrame, machine: str) -> Figure:
    """Loss difference from MHA with 95 % intervals, plain and parameter-matched; beside it the loss curves."""
    trained = _trained(rows, machine)
    found, heads = effects(trained), int(trained["shape.n_heads"].iloc[0])
    variants = list(dict.fromkeys(effect.variant for effect in found))
    params = trained[trained[GROUPS] == heads]["n_params"].iloc[0]
    figure, (left, right) = style.canvas(
        "What sharing KV heads costs in quality, and what these runs can show",
        f"{params / 1e6:.2g} M parameters as MHA (H = {heads}), {trained['tokens'].iloc[0] / 1e6:g} M tokens, "
        f"{trained['seed'].nunique()} seeds. Filled: plain, only G differs; hollow: matched, the FFN widened to MHA's "
        f"parameter count. Bars: 95 % intervals, paired by seed; dots: single seeds. Grey: true differences this small "
        f"would likely be missed. Verdicts answer for all arms together.",
        source(trained),
        4.8,
        ncols=2,
        width_ratios=[1.45, 1],
    )
    for effect in found:
        y = _OFFSETS[effect.arm] - variants.index(effect.variant)
        _interval(left, effect, y)
        left.text(1.02, y, f"{effect.arm}: {effect.verdict}", transform=left.get_yaxis_transform(), size=7, va="center")
    _zero(left, found)
    left.set_yticks([-index for index in range(len(variants))], variants, weight="bold")
    left.set_title("Difference from MHA")
    ends = []
    for g in sorted(trained[GROUPS].unique(), reverse=True):
        variant = variant_name(heads, g)
        colour = style.variant_colour(variant)
        for arm, dash in (("plain", "-"), ("matched", ":")):
            runs = trained[(trained[GROUPS] == g) & (trained["arm"] == arm)].sort_values("seed")
            for seed, curve in zip(runs["seed"], runs["curve"], strict=True):
                seen, loss = [count / 1e6 for count, _ in curve], [loss for _, loss in curve]
                right.plot(seen, loss, dash, color=colour, linewidth=0.9, label=f"{variant}, {arm}, seed {seed:g}")
                if arm == "plain" and seed == runs["seed"].min():
                    ends.append((seen[-1], loss[-1], variant, colour))
    right.set(xlabel="tokens trained on (millions)", ylabel="loss on a validation sample (bits per byte)")
    right.set_title("Loss curves, a line per seed")
    style.label_ends(right, ends)
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
        trained = _trained(rows, machine)
    except InputError:  # loss does not depend on the machine, so another's will do; the footer names both
        others = rows[rows["kind"] == "quality"].sort_values("run")["machine"]
        if others.empty:
            raise
        trained = _trained(rows, others.iloc[-1])
    found, heads, mha = effects(trained), int(trained["shape.n_heads"].iloc[0]), speed[1]
    ratios = sorted({*speed, *(heads // effect.n_kv_heads for effect in found)})
    seeds, resolved = trained["seed"].nunique(), sum(effect.verdict in ("better", "worse") for effect in found)
    figure, (cache, time, loss) = style.canvas(
        "Sharing KV heads: memory and time it saves, quality it costs",
        f"R query heads share one KV head. Time: a decode step's attention, context {style.tokens(mha['context'])}, "
        f"batch {mha['batch']}, H = {mha['shape.n_heads']}, {mha['impl']}, in the dtype whose MHA is nearest its roof; "
        f"bars: quartiles. Loss: small models, H = {heads}, {seeds} seeds, 95 % intervals; grey: too small to be seen; "
        f"{resolved} of {len(found)} differences resolved. Time and loss share R, not G.",
        f"time: {source(decode)}\nloss: {source(trained)}",
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
    time.set(title="time (black line: predicted)", xlabel="median, % of MHA", xlim=(0, 1.55 * time.dataLim.x1))
    loss.set(title="quality (hollow: matched)")
    for axes in (cache, time):
        axes.grid(axis="y", visible=False)
    return figure
