"""Tables of what training runs showed: differences with their intervals, and what the runs cannot say; without torch.

± is always a mean's 95 % interval by Student's t over seeds. Differences are paired: each seed's own MHA is taken off.
"""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas
from rich.table import Table

from attnlab.effects import EQUAL, effects, finished, half_width, spreads, too_few, verdict
from attnlab.errors import InputError
from attnlab.predict.time import training_flops
from attnlab.report import PLAIN, columns
from attnlab.results import stored_rows
from attnlab.scaling import scale_rows, scale_worth
from attnlab.shapes import variant_name

if TYPE_CHECKING:  # imports torch
    from attnlab.train.quality import Planned

USUAL_MFU = 0.35
PACKERS = "gzip", "xz"
MEASURES = {
    "bits_per_byte": "whole text, averaged weights",
    "bits_per_byte_raw": "whole text, last weights",
    "sample": "a sample of the text, at the end of the curve",
}


def quality_tables(rows: pandas.DataFrame) -> list[Table]:
    """The tables of every experiment that ``rows`` hold, each from the newest run that has it. What cannot be judged
    yet is a table's title; raises ``InputError`` where nothing can."""
    tables: dict[str, Callable[[pandas.DataFrame], list[Table]]] = {
        "uptraining": lambda own: [uptraining(pandas.concat([own, rows[rows["experiment"] == "g-sweep"]]))],
        "recall": lambda own: [recall(own)],
        "scale": lambda own: [scale(own, budget) for budget in sorted(own["budget"].unique())],
        "context": lambda own: [context(own)],
    }
    rows, found, problems = rows[rows["kind"] == "quality"], [], []
    rows = rows[rows["run"] == rows.groupby("experiment")["run"].transform("max")]
    for experiment, own in rows.groupby("experiment", sort=False):
        try:
            found += tables.get(str(experiment), lambda own: [quality(own), noise(own)])(own)
        except InputError as error:
            problems.append(f"{experiment}: {error}")
    if not found:
        raise InputError("; ".join(problems) or "no quality rows")
    return [*found, *(Table(title=problem) for problem in problems)]


def quality(rows: pandas.DataFrame, experiment: str | None = None) -> Table:
    """Each arm's difference to MHA with its 95 % interval, the smallest effect these seeds would show, the verdict."""
    found, missing = effects(rows, experiment), too_few(rows, experiment)
    rows = rows if experiment is None else rows[rows["experiment"] == experiment]
    done = rows[rows["status"] == "ok"]
    base = done[done["shape.n_kv_heads"] == done["shape.n_heads"]]
    loss, heads = base["bits_per_byte"], base["shape.n_heads"].iloc[0]
    checked = sum(not effect.bootstrap[0] <= 0 <= effect.bootstrap[1] for effect in found)
    alone = sum(abs(effect.mean) > effect.half_width for effect in found)
    notes = [
        "± : 95 % interval, paired by seed; verdicts count all arms together; visible: the smallest true difference "
        "that would likely have been better or worse",
        f"equal: all of the interval behind the verdict within {EQUAL:.0%} of MHA's loss, {EQUAL * loss.mean():.4f}",
        f"{alone} of {len(found)} intervals exclude zero by themselves, {checked} by a bootstrap, too narrow for few "
        "seeds",
        *([f"too few pairs yet: {', '.join(missing)}"] if missing else []),
        *([f"{failed} runs did not end well"] if (failed := len(rows) - len(done)) else []),
        *(
            f"{packer} -9 of the same text: {done[f'{packer}_bits'].iloc[0]:.3f}"
            for packer in PACKERS
            if "gzip_bits" in done
        ),
    ]
    table = Table(
        *columns(("variant", "arm"), ("params", "seeds", "bits per byte", "visible")),
        "verdict",
        title=f"bits per byte after {int(done['tokens'].iloc[0]):,} tokens: MHA's, and the others' minus MHA's",
        caption="; ".join(notes),
        **PLAIN,
    )
    params = done.groupby(["shape.n_kv_heads", "arm"])["n_params"].first().map("{:,.0f}".format)
    said = f"{loss.mean():.4f} (sd {loss.std():.4f})"
    table.add_row("MHA", "plain", params[heads, "plain"], str(len(base)), said, "", "")
    for effect in found:
        said, count = f"{effect.mean:+.4f} ± {effect.half_width:.4f}", params[effect.n_kv_heads, effect.arm]
        seen = f"{effect.smallest:.4f}", effect.verdict
        table.add_row(effect.variant, effect.arm, count, str(effect.seeds), said, *seen)
    return table


def noise(rows: pandas.DataFrame, experiment: str | None = None) -> Table:
    """What calms the differences of a sweep: pairs, averaged weights, the whole text."""
    table = Table(
        *columns(["loss on"], ("over seeds", "unpaired", "paired", "seeds saved")),
        title="What calms the noise: standard deviations in bits per byte",
        caption="unpaired, paired: of a difference between two arms; seeds saved: how many times as many seeds it "
        "would take without pairs",
        **PLAIN,
    )
    for spread in spreads(rows, experiment):
        numbers = (f"{number:.4f}" for number in (spread.seeds, spread.unpaired, spread.paired))
        saved = f"{(spread.unpaired / spread.paired) ** 2:.1f}×" if spread.paired else "–"
        table.add_row(MEASURES[spread.column], *numbers, saved)
    return table


def uptraining(rows: pandas.DataFrame) -> Table:
    """Each conversion's loss minus that of MHA trained on for as many steps with the same seed, by share of the
    original steps; from scratch too, where ``rows`` hold the sweep that a converted MHA belongs to."""
    done = _named(rows, "uptraining")
    loss = _once(done, ["parent", "seed"], ["variant", "arm", "alpha"], "bits_per_byte")
    if "continued" not in done["arm"].values:
        raise InputError("no finished run of MHA continued to compare with; let the experiment go on")
    shares = sorted(done["alpha"].unique())
    at = {share: loss if share else loss.groupby("parent").mean() for share in shares}  # no step, no order of the data

    def of(variant: str, method: str, share: float) -> "pandas.Series[float]":
        return at[share].get((variant, method, share), pandas.Series(math.nan, at[share].index))

    note = "± : over orders of the data; it leaves out the luck of the MHA that all come from"
    sweep = rows[(rows["experiment"] == "g-sweep") & (rows["status"] == "ok")]
    if sweep["key"].isin(done["parent"]).any():
        try:
            plain = [effect for effect in effects(sweep) if effect.arm == "plain"]
            said = (f"{effect.variant} {effect.mean:+.4f} ± {effect.half_width:.4f}" for effect in plain)
            note += f"; from scratch, plain, averaged weights, minus MHA: {', '.join(said)}"
        except InputError as error:
            note += f"; from scratch: {error}"
    table = Table(
        *columns(["variant"], (f"α = {share:g}" for share in shares)),
        title="bits per byte after more training, by share of the original steps: MHA's, and converted minus MHA's",
        caption=note,
        collapse_padding=True,  # six columns of intervals in a terminal of 100
        **PLAIN,
    )
    whole = "MHA", "continued"
    table.add_row(" ".join(whole), *(interval(of(*whole, share), "") for share in shares), end_section=True)
    for variant, own in done[done["arm"] != "continued"].groupby("variant", sort=False):
        for method in own["arm"].unique():
            cells = (interval(of(str(variant), method, share) - of(*whole, share)) for share in shares)
            table.add_row(f"{variant} {method}", *cells)
    return table


def recall(rows: pandas.DataFrame) -> Table:
    """Accuracy (0 to 1) by setting and variant, each ``at_best_rate``, and a verdict on the smallest G."""
    done = _named(rows, "recall")
    names, setting = list(done["variant"].unique()), ["relations", "pairs", "context", "shape.head_dim"]
    if len(names) < 2:
        raise InputError(f"recall rows of two variants are needed, got {names[0]}; let the experiment go on")
    found = {
        key: {str(name): at_best_rate(one) for name, one in own.groupby("variant")}
        for key, own in done.groupby(setting)
    }
    table = Table(
        *columns((), ("relations", "pairs", "length", "D", *names, f"{names[0]} - {names[-1]}")),
        "verdict",
        title="Recall: share of answers that are right",
        caption=f"± : over seeds, each variant at its own best rate; verdict: on {names[-1]}, all settings together",
        **PLAIN,
    )
    nothing = pandas.Series(dtype=float)
    for key, accuracy in found.items():
        lost = (accuracy.get(names[0], nothing) - accuracy.get(names[-1], nothing)).dropna()
        half = half_width(lost, 1 - 0.025 / len(found)) if len(lost) > 1 else math.inf
        said = verdict(float(lost.mean()), half, EQUAL) if len(lost) > 1 else "too few seeds"
        cells = (interval(accuracy.get(name, nothing), "", 3) for name in names)
        table.add_row(*(f"{number:.0f}" for number in key), *cells, interval(lost, "+", 3), said)
    return table


def at_best_rate(rows: pandas.DataFrame) -> "pandas.Series[float]":
    """Accuracy by seed, at the peak rate that most seeds ran; of several such, the best on the first seed. Seeds that
    tried several rates are left out where three others remain: the best of several tries flatters."""
    rates = _once(rows, ["seed"], ["peak_rate"], "accuracy").sort_index()
    best = max(rates, key=lambda rate: (rates[rate].count(), rates[rate].fillna(-1).iloc[0]))
    found = rates[best].dropna()
    others = found[rates.count(axis=1).loc[found.index] == 1]
    return others if len(others) >= 3 else found


def scale(rows: pandas.DataFrame, budget: str) -> Table:
    """Loss by size and variant for one ``budget``, and what each variant's difference is worth."""
    done = scale_rows(rows, budget)
    logs = done.pivot_table("log", ["size", "tokens", "seed"], ["variant", "arm"], sort=False)
    others = [name for name in logs.columns if name[0] != "MHA"]
    try:
        law, worths = scale_worth(rows, budget)
    except InputError as error:
        worths, caption = [], str(error)
    else:
        what = "parameters" if budget == "fixed" else "parameters, and with them tokens,"
        caption = (
            f"MHA's loss: {law.a:.4g} · N^-{law.b:.4f} (standard error {law.error:.4f}); a floor below it could not be "
            f"told apart. Worth (95 % interval): with how many % more {what} MHA would have the variant's loss"
        )
    table = Table(
        *columns((), ("size", "tokens", "MHA", *(" ".join(name) for name in others))),
        title=f"Scale, {budget} budget: MHA's bits per byte, and the others' over MHA's less 1, in %",
        caption=caption,
        **PLAIN,
    )
    sizes = [(key, own.droplevel(["size", "tokens"])) for key, own in logs.groupby(level=["size", "tokens"])]
    for (size, tokens), own in sizes:
        base = own["MHA", "plain"]
        cells = (interval(100 * (own[name] - base).map(math.expm1), "+", 2) for name in others)
        last = size == sizes[-1][0][0]
        table.add_row(f"{size:,.0f}", f"{tokens:,.0f}", interval(base.map(math.exp), ""), *cells, end_section=last)
    if worths:
        table.add_row("parameters, %", "", "", *(f"{100 * worth.params:+.1f}" for worth in worths))
        for name in ("offset", "worth"):
            each = [(getattr(worth, name), *getattr(worth, f"{name}_interval")) for worth in worths]
            cells = (f"{100 * mean:+.1f} ({100 * low:+.1f}, {100 * high:+.1f})" for mean, low, high in each)
            table.add_row(f"{'loss' if name == 'offset' else name}, %", "", "", *cells)
    return table


def context(rows: pandas.DataFrame) -> Table:
    """Loss by position in the context: MHA's, and the others' minus MHA's."""
    done = _named(rows, "context").explode("positions", ignore_index=True)
    done[["first", "last", "bits"]] = done["positions"].to_list()
    loss = _once(done, ["first", "last", "seed"], ["variant"], "bits")
    if "MHA" not in loss:
        raise InputError("no finished MHA run to compare with; let the experiment go on")
    others = [str(name) for name in loss if name != "MHA"]
    table = Table(
        *columns((), ("positions", "MHA", *others)),
        title="bits per byte by position: MHA's, and the others' minus MHA's",
        **PLAIN,
    )
    for (first, last), own in loss.groupby(level=["first", "last"]):
        cells = (interval(own[name] - own["MHA"]) for name in others)
        table.add_row(f"{first:.0f}–{last:.0f}", interval(own["MHA"], ""), *cells)
    return table


def interval(values: "pandas.Series[float]", sign: str = "+", digits: int = 4) -> str:
    """ "+0.0400 ± 0.0497": the mean and its 95 % interval; one value alone has none, and no value is a dash."""
    values = values.dropna()
    if values.empty:
        return "–"
    said = f"{values.mean():{sign}.{digits}f}"
    return f"{said} ± {half_width(values):.{digits}f}" if len(values) > 1 else said


def _named(rows: pandas.DataFrame, experiment: str) -> pandas.DataFrame:
    """The finished rows of ``experiment`` with their ``variant``, G descending."""
    done = finished(rows, experiment)
    done = done.assign(variant=list(map(variant_name, done["shape.n_heads"], done["shape.n_kv_heads"])))
    return done.sort_values("shape.n_kv_heads", ascending=False, kind="stable")


def _once(rows: pandas.DataFrame, index: list[str], names: list[str], values: str) -> pandas.DataFrame:
    """``rows`` as a table, in which every place has one row at most."""
    if rows.duplicated([*index, *names]).any():
        raise InputError(f"rows of one run are needed: some share {', '.join([*index, *names])}")
    return rows.pivot_table(values, index, names, sort=False)


def plan_table(planned: "list[Planned]", folder: Path, rate: float) -> Table:
    """Runs, tokens and predicted hours by experiment, and what ``folder`` holds of it, for a machine that multiplies at
    ``rate`` flop/s with all its cores."""
    done = {row["key"]: row for row in stored_rows(folder)}
    shares = [row["mfu"] for row in done.values() if "mfu" in row]
    share = statistics.median(shares) if shares else USUAL_MFU
    table = Table(
        *columns(["experiment"], ("runs", "million tokens", "hours", "done")),
        title="Planned training",
        caption=f"hours: at {share:.0%} of the rate of matrix products measured now ("
        + ("as the runs so far" if shares else "as small models here")
        + "), evaluation not counted",
        **PLAIN,
    )
    for experiment in dict.fromkeys(run.experiment for run in planned):
        own = [run for run in planned if run.experiment == experiment]
        tokens = sum(run.recipe.tokens for run in own)
        flops = sum(run.recipe.tokens * training_flops(run.recipe.shape, run.recipe.context) for run in own)
        ended = sum(all(key in done for key in run.row_keys()) for run in own)
        hours = flops / (rate * share) / 3600
        table.add_row(experiment, str(len(own)), f"{tokens / 1e6:.1f}", f"{hours:.1f}", f"{ended} of {len(own)}")
    return table
