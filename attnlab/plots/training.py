"""What training runs show beside differences between variants: scale, recall, conversion and training back.

Each figure draws one experiment of one run, also while its sweep is not whole, and says how many seeds are there.
Dots are single seeds, lines go through their means.
"""

from typing import Any

import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attnlab.effects import finished
from attnlab.errors import InputError
from attnlab.plots import style
from attnlab.plots.quality import estimate, seeds
from attnlab.plots.rows import GROUPS, commonest, few, source
from attnlab.results import newest
from attnlab.scaling import SIZE, scale_worth
from attnlab.shapes import variant_name
from attnlab.trained import at_best_rate

_METHODS = {
    "mean": ("#AA4499", "s"),
    "first": ("#999933", "^"),
    "random": ("#8F8A80", "X"),
    "aligned": (style.INK, "o"),
}


def _means(axes: Axes, rows: pandas.DataFrame, x: str, y: str, name: str, look: tuple[str, str], **line: Any) -> Any:
    """Seeds as dots, a line through their means; what ``style.label_ends`` needs to name it."""
    colour, marker = look
    axes.plot(rows[x], rows[y], ".", color=colour, ms=4, mew=0, alpha=0.7, label=f"{name}, seeds")
    means = rows.groupby(x)[y].mean()
    axes.plot(means.index, means, marker=marker, color=colour, ms=4, label=name, **line)
    return means.index[-1], means.iloc[-1], name, colour


@style.styled
def scale_vs_variant(rows: pandas.DataFrame, machine: str) -> Figure:
    """Loss over parameters with a fitted power law, and how many per cent of MHA's parameters a variant is worth."""
    done = finished(rows, "scale", machine)
    names = list(map(variant_name, done["shape.n_heads"], done[GROUPS]))
    done = done.assign(variant=names, millions=done["n_params"] / 1e6)
    budgets = sorted(done["budget"].unique())
    figure, grid = style.canvas(
        "Scale against variant: how many parameters is a KV head worth?",
        f"{seeds(done, [*SIZE, GROUPS, 'arm', 'budget'])}. Above: loss over each model's own parameters; hollow: FFN "
        f"widened to MHA's count; dashed: MHA's power law. Below: MHA would have the variant's loss with so many per "
        f"cent more or fewer parameters (95 % intervals over seeds); bars: how many more or fewer it has.",
        source(done),
        6.6,
        nrows=2,
        ncols=len(budgets),
        squeeze=False,
        height_ratios=[1.6, 1],
    )
    for (above, below), budget in zip(grid.T, budgets, strict=True):
        mine, ends = done[done["budget"] == budget], []
        for (g, arm), runs in sorted(mine.groupby(["variant", "arm"]), key=lambda item: -item[1][GROUPS].iloc[0]):
            look, name = style.variant_look(g), g if arm == "plain" else f"{g}, {arm}"
            hollow = {} if arm == "plain" else {"mfc": style.PAPER, "ls": ":"}
            end = _means(above, runs, "millions", "bits_per_byte", name, look, lw=1, **hollow)
            ends += [end] if arm == "plain" else []
        style.log_axis(above, "x")
        style.log_axis(above, "y", MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(*above.get_ylim()))
        share = mine[mine["variant"] == "MHA"].eval("tokens / n_params").median()
        spent = f"{mine['tokens'].iloc[0] / 1e6:g} M" if budget == "fixed" else f"{share:.2g} per parameter"
        above.set(title=f"tokens: {spent}", xlabel="parameters (millions)", ylabel="loss (bits per byte)")
        style.label_ends(above, ends)
        _worth(above, below, done, budget)
    return figure


def _worth(above: Axes, below: Axes, done: pandas.DataFrame, budget: str) -> None:
    """The law as a line, what each variant is worth as an interval; or why there is no law."""
    try:
        law, found = scale_worth(done, budget)
    except InputError as lacking:
        below.text(0.5, 0.5, str(lacking), transform=below.transAxes, ha="center", color=style.MUTED, wrap=True)
        below.set_axis_off()
        return
    sizes = done[done["variant"] == "MHA"]["millions"].agg(["min", "max"])
    above.plot(sizes, law.a * (1e6 * sizes) ** -law.b, "--", color=style.INK, lw=1.2, label="law")
    above.text(0.03, 0.04, f"loss ∝ N$^{{-{law.b:.3f}}}$, standard error {law.error:.3f}", transform=above.transAxes)
    for y, worth in enumerate(found):
        colour = style.variant_colour(worth.variant)
        low, value, high = (100 * part for part in (worth.worth_interval[0], worth.worth, worth.worth_interval[1]))
        below.barh(y, 100 * worth.params, height=0.4, color=style.GRID, label=f"{worth.variant}, {worth.arm}, has")
        estimate(below, value, [[value - low], [high - value]], y, worth.variant, worth.arm)
        look: dict[str, Any] = {"transform": below.get_yaxis_transform(), "va": "center", "color": style.darker(colour)}
        below.text(1.03, y, f"{value:+.1f} %".replace("-", "−"), **look)
    names = [worth.variant if worth.arm == "plain" else f"{worth.variant}, {worth.arm}" for worth in found]
    below.set_yticks(range(len(found)), names, weight="bold")
    below.axvline(0, color=style.INK, lw=1, label="MHA")
    below.set(xlabel="worth, % of MHA's parameters", ylim=(len(found) - 0.4, -0.6))
    below.grid(axis="y", visible=False)


@style.styled
def recall(rows: pandas.DataFrame, machine: str) -> Figure:
    """Share of recalled values over key-value pairs, a line per G, a panel per form of the task."""
    done, point = finished(rows, "recall", machine), ["relations", "shape.head_dim", "context", "pairs", GROUPS]
    parts = [
        own.drop_duplicates("seed").set_index("seed").assign(percent=100 * at_best_rate(own)).dropna(subset="percent")
        for _, own in done.groupby(point)
    ]
    done = pandas.concat(parts).reset_index()
    forms = sorted(set(zip(done["relations"], done["shape.head_dim"], strict=True)))
    figure, panels = style.canvas(
        "Recall: how many pairs a model with fewer KV heads can look up",
        f"Values recalled right after reading key-value pairs, over the number of pairs (below it the tokens of a "
        f"sequence). {seeds(done, point)} at the best of the learning rates tried; dots: seeds, lines: means. "
        f"{done['shape.n_layers'].iloc[0]:g} layers. Harder: any of several keys may be asked for a value. Dashed: any "
        f"value that was read, at random.",
        source(done),
        4.3,
        ncols=len(forms),
        sharey=True,
        squeeze=False,
    )
    for axes, (relations, head_dim) in zip(panels[0], forms, strict=True):
        mine = done[(done["relations"] == relations) & (done["shape.head_dim"] == head_dim)]
        sizes = sorted(set(zip(mine["pairs"], mine["context"], strict=True)))
        mine = mine.assign(place=[sizes.index(size) for size in zip(mine["pairs"], mine["context"], strict=True)])
        guess = [100 / pairs for pairs, _ in sizes]
        axes.plot(range(len(sizes)), guess, "--", color=style.MUTED, lw=1, label="guess")
        ends = [(len(sizes) - 1, guess[-1], "guess", style.MUTED)]
        for (g, heads), runs in sorted(mine.groupby([GROUPS, "shape.n_heads"]), reverse=True):
            variant = variant_name(heads, g)
            ends.append(_means(axes, runs, "place", "percent", variant, style.variant_look(variant)))
        axes.set_xticks(range(len(sizes)), [f"{pairs:g}\n{context:g}" for pairs, context in sizes])
        axes.set(ylim=(-4, 104), xlabel="pairs, and tokens of the sequence")
        plain = "plain: 1 key a value" if relations == 1 else f"harder: {relations:g} keys a value"
        axes.set_title(f"{plain}, D = {head_dim:g}")
        style.label_ends(axes, ends)
    panels[0, 0].set_ylabel("recalled right (%)")
    return figure


@style.styled
def uptraining(rows: pandas.DataFrame, machine: str) -> Figure:
    """Loss of converted models over the share of the training they get back, per target and method of conversion."""
    done = finished(rows, "uptraining", machine)
    heads = int(done["shape.n_heads"].iloc[0])
    done = done.assign(percent=100 * done["alpha"])
    mha, converted = done[done["arm"] == "continued"], done[done["arm"] != "continued"]
    targets = sorted(converted[GROUPS].unique(), reverse=True)
    if not targets:
        raise InputError(f"uptraining rows of {machine} hold no converted model yet")
    parents = rows[rows["key"].isin(done["parent"])]["run"]
    scratch = rows[(rows["experiment"] == "g-sweep") & (rows["arm"] == "plain") & rows["run"].isin(parents)]
    scratch = scratch[(scratch["status"] == "ok") & scratch[GROUPS].isin(targets)]
    last = "bits_per_byte_raw"  # as in the curves; averaged weights are better by as much as methods differ
    band = f"band: trained so from scratch, {seeds(scratch, [GROUPS])}" if len(scratch) else "no from-scratch rows"
    more = done[done["alpha"] > 0] if done["alpha"].any() else done  # before training there is no order of the data
    orders = f"{seeds(more, [GROUPS, 'arm', 'percent'])} of data order"
    figure, grid = style.canvas(
        "Converted to fewer KV heads, then trained back",
        f"MHA (H = {heads}) converted by each method, then α of its own steps more; {orders}: dots; lines: means. "
        f"Dashed: the MHA itself with the same extra steps; {band}. Below: the same, near MHA.",
        source(done),
        6.4,
        nrows=2,
        ncols=len(targets),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    named: list[style.End] = []
    for column, g in zip(grid.T, targets, strict=True):
        mine, levels = converted[converted[GROUPS] == g], scratch[scratch[GROUPS] == g][last]
        for axes in column:
            if len(levels):
                colour = style.variant_colour(variant_name(heads, g))
                axes.axhspan(levels.min(), levels.max(), color=colour, alpha=0.25, lw=0, label="from scratch")
            arms = [(mha, "MHA", style.variant_look("MHA"))]
            arms += [(mine[mine["arm"] == name], name, look) for name, look in _METHODS.items()]
            named = [
                _means(axes, runs, "percent", "bits_per_byte", name, look, ls="--" if name == "MHA" else "-")
                for runs, name, look in arms
                if len(runs)
            ]
        column[0].set_title(variant_name(heads, g))
        column[1].set_xlabel("α (% of the original steps)")
        column[1].xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    alphas = sorted(done["alpha"].unique())
    late = done[done["alpha"] >= alphas[len(alphas) // 2]]["bits_per_byte"]
    near = pandas.concat([late, scratch[last]])
    pad = 0.1 * (near.max() - near.min()) or 0.01
    grid[1, 0].set_ylim(near.min() - pad, near.max() + pad)
    style.log_axis(grid[0, 0], "y", MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(*grid[0, 0].get_ylim()))
    for axes in grid[:, -1]:
        style.label_ends(axes, named)
    for axes in grid[:, 0]:
        axes.set_ylabel("loss (bits per byte)")
    return figure


@style.styled
def conversion(rows: pandas.DataFrame, machine: str) -> Figure:
    """Attention of the query heads of one group, before and after conversion by each method."""
    done = newest(rows[rows["status"] == "ok"], "conversion", machine)
    after = done[done.get("method", done["kind"]) != "before"]
    lacking = InputError(f"no conversion rows of {machine} with a head's attention before and after")
    if after.empty:
        raise lacking
    after = commonest(after, ["n_kv_heads", "layer"])
    layer, groups = after["layer"].iloc[0], after["n_kv_heads"].iloc[0]
    before = done[(done["method"] == "before") & (done["layer"] == layer)]
    methods = ["before", *(name for name in _METHODS if name in set(after["method"]))]
    maps = pandas.concat([before, after]).drop_duplicates(["head", "method"]).set_index(["head", "method"])["attention"]
    heads = few({head for head, _ in maps.index if all((head, method) in maps for method in methods)}, 4)
    if not heads:
        raise lacking
    shown = (token.encode("unicode_escape").decode().replace("\\u2581", "␣") for token in before["tokens"].iloc[0])
    read = " ".join(token.replace(" ", "␣").replace("$", r"\$") for token in shown)
    figure, grid = style.canvas(
        "What conversion does to attention, before any training back",
        f"Query heads that come to share one of {groups:g} KV heads, layer {layer:g}: each token (down) attends to "
        f"those up to it (across). Under a map: the share of attention that went elsewhere, mean over tokens. Text: "
        f"{read}",
        source(after),
        1.7 + 1.45 * len(heads),
        nrows=len(heads),
        ncols=len(methods),
        squeeze=False,
    )
    ramp: dict[str, Any] = {"cmap": LinearSegmentedColormap.from_list("ramp", style.RAMP), "norm": PowerNorm(0.5, 0, 1)}
    for line, head in zip(grid, heads, strict=True):
        for axes, method in zip(line, methods, strict=True):
            weights, old = numpy.array(maps[head, method]), numpy.array(maps[head, "before"])
            image = axes.imshow(weights, **ramp)
            axes.set(xticks=[], yticks=[], title=method if head == heads[0] else "")
            if method == "before":
                axes.set_ylabel(f"query head {head:g}")
            else:
                axes.set_xlabel(f"{50 * numpy.abs(weights - old).sum(axis=1).mean():.0f} % elsewhere")
    figure.colorbar(image, ax=grid, label="attention weight", shrink=0.8, ticks=[0, 0.1, 0.5, 1])
    return figure
