"""Whole-model decoding: tokens per second over batch until memory ends, and time per token over G."""

from typing import Any

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnlab.errors import InputError
from attnlab.plots import style
from attnlab.plots.rows import GROUPS, SIZES, crossing, dtypes, few
from attnlab.plots.speed import USUAL, curve, label, panelled
from attnlab.predict.memory import traffic_crossover_tokens
from attnlab.results import OURS, newest
from attnlab.shapes import ModelShape, variant_name

_SHAPE = [f"shape.{n}" for n in ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")]
# Of MHA's time per sample by G / H: T5-XXL with 64 heads (arXiv 2305.13245, table 1)
_PUBLISHED = {1: 100.0, 1 / 8: 100 * 0.28 / 1.51, 1 / 64: 100 * 0.24 / 1.51}
_RINGS = "Rings: a step reads more cache than weights"


def _generated(rows: pandas.DataFrame, machine: str) -> pandas.DataFrame:
    """Whole-model rows, those without room too; ``evens``: B · S at which a step reads as much cache as weights."""
    found = newest(rows, "generate", machine)
    found = found[found["status"].isin(["ok", "oom", "too_big"])]
    if not found["status"].eq("ok").any():
        raise InputError(f"no generate rows of {machine} ended well")
    found = found[found["dtype"].isin(dtypes(found))].astype(dict.fromkeys([*SIZES, *_SHAPE], int))
    models = zip(*(found[name] for name in (*_SHAPE, "dtype")), strict=True)
    return found.assign(evens=[traffic_crossover_tokens(ModelShape(*sizes), dtype) for *sizes, dtype in models])


@style.styled
def generation(rows: pandas.DataFrame, machine: str) -> Figure:
    """Tokens per second over batch, one line per variant, of the model that was measured at most batches; a panel per
    dtype and context."""
    found = _generated(rows, machine)
    batches = found.groupby("shape.name")["batch"].nunique()
    if batches.max() < 2:
        raise InputError(f"generate rows of {machine} have one batch only, a curve needs two")
    found = found[(found["shape.name"] == batches.idxmax()) & found["context"].isin(few(found["context"], 3))]
    rates = {"median": "median", "q25": "q75", "q75": "q25", "predicted": "predicted"}
    found = found.assign(**{name: found["batch"] / found[of] for name, of in rates.items()}).sort_values("batch")
    heads = int(found["shape.n_heads"].iloc[0])
    figure, panels = panelled(
        found,
        ("dtype", "context"),
        "batch",
        "Fewer KV heads: more tokens per second, room for more sequences",
        f"Decode steps of {batches.idxmax()} (H = {heads}) at a fixed context. Colours: attnlab, medians, bars from "
        f"first to third quartile; dashed: predicted; grey: transformers, the better of its caches. {_RINGS} from here "
        f"on. Crosses: the first batch that did not fit.",
        "tokens per second",
    )
    for axes, panel, ends in panels:
        for g in sorted(panel[GROUPS].unique(), reverse=True):
            variant, arms = variant_name(heads, g), panel[panel[GROUPS] == g]
            ok, (colour, marker) = arms[arms["status"] == "ok"], style.variant_look(variant)
            theirs = ok[ok["impl"] != OURS].sort_values("median").groupby("batch", as_index=False).last()
            if not theirs.empty:
                curve(axes, "batch", theirs, f"{variant}, transformers", style.IMPLEMENTATIONS[USUAL], ms=4, lw=1)
            mine, failed = ok[ok["impl"] == OURS], arms[(arms["impl"] == OURS) & (arms["status"] != "ok")]
            x = y = panel["median"].min()  # where nothing fits
            if not mine.empty:
                curve(axes, "batch", mine, variant, (colour, marker), predicted=True)
                x, y = mine["batch"].iloc[-1], mine["median"].iloc[-1]
                even = mine["evens"].iloc[0] / mine["context"].iloc[0]
                if mine["batch"].iloc[0] <= even <= x:
                    _ring(axes, even, crossing(mine["batch"], mine["median"], even), colour)
            if not failed.empty:
                end = failed["batch"].min()
                axes.plot([end if mine.empty else x, end], [y, y], ":", color=colour, lw=1, label="no room")
                axes.plot(end, y, "x", color=colour, ms=8, mew=2.4, label=f"{variant}, out of memory")
                x = end
            ends.append((x, y, variant, colour))
        style.log_axis(axes, "x", sorted(found["batch"].unique()))
    label(panels)
    return figure


@style.styled
def time_per_group(rows: pandas.DataFrame, machine: str) -> Figure:
    """Time per token over G / H, of MHA's, one line per context, a panel per dtype and (model, batch); in grey what the
    GQA paper published."""
    found, point = _generated(rows, machine), ["dtype", "model", "context"]
    found = found[(found["impl"] == OURS) & (found["status"] == "ok")].sort_values(GROUPS, ascending=False)
    found = found.assign(part=found[GROUPS] / found["shape.n_heads"])
    found = found.assign(model=found["shape.name"] + ", batch " + found["batch"].astype(str))
    contexts = few(found["context"], 3)
    found = found[found["model"].isin(few(found["model"], 3)) & found["context"].isin(contexts)]
    whole = found[found["part"] == 1].set_index(point)[["median", "predicted"]].add_suffix("_whole")
    found = found.join(whole, on=point).dropna(subset=["median_whole"])
    if found["part"].nunique() < 2:
        raise InputError(f"generate rows of {machine} have no two G with MHA among them, a curve needs two")
    share = {name: 100 * found[name] / found["median_whole"] for name in ("median", "q25", "q75")}
    figure, panels = panelled(
        found.assign(**share, predicted=100 * found["predicted"] / found["predicted_whole"]),
        ("dtype", "model"),
        "part",
        "What a token costs a whole model with fewer KV heads",
        f"Time of a decode step in % of MHA's, one line per context; bars: first to third quartile; dashed: predicted. "
        f"At the ends: context, and MHA's time. {_RINGS}. Grey: the GQA paper's T5-XXL (table 1: time per sample on "
        f"TPU v4, 64 heads).",
        "time per token (% of MHA's)",
    )
    for axes, panel, ends in panels:
        axes.plot([*_PUBLISHED], [*_PUBLISHED.values()], "d:", color="#A39E93", lw=1, label="GQA paper")
        for context, colour in zip(contexts, style.RAMP[-len(contexts) :], strict=True):
            line = panel[panel["context"] == context]
            if line.empty:
                continue
            curve(axes, "part", line, f"context {context}", (colour, "o"), predicted=True)
            more = line[line["batch"] * line["context"] > line["evens"]]
            _ring(axes, more["part"], more["median"], colour)
            text = f"{style.tokens(context)}: {1e3 * line['median_whole'].iloc[0]:.3g} ms"
            ends.append((line["part"].iloc[-1], line["median"].iloc[-1], text, colour))
        style.log_axis(axes, "x", [1, 1 / 4, 1 / 16, 1 / 64], lambda part: f"1/{1 / part:g}" if part < 1 else "1")
        style.log_axis(axes, "y", [5, 10, 20, 50, 100])
        axes.set_xlim(1.3, 1 / 80)
        style.label_ends(axes, ends)
    return figure


def _ring(axes: Axes, x: Any, y: Any, colour: str) -> None:
    axes.plot(x, y, "o", ms=10, mfc="none", color=colour, label="more cache than weights")
