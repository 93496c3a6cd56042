"""Rows of whole-model decoding, set side by side: ours beside transformers', cell by cell; without torch."""

import math
from statistics import geometric_mean

import pandas
from rich.table import Table

from attnlab.report import PLAIN, columns, error_line, short
from attnlab.results import DYNAMIC, OURS, STATIC, prediction_error

CELL = ("shape.name", "shape.n_kv_heads", "dtype", "batch", "context")
LONG = 1000  # tokens from which a context counts as long


def ratios(rows: pandas.DataFrame) -> pandas.DataFrame:
    """One line per cell whose own step was timed: its row, with ``dynamic`` and ``static``, transformers' time of a
    step over ours, and ``first``, the same of a first token; not a number where that was not timed."""
    timed = rows[(rows["kind"] == "generate") & (rows["status"] == "ok") & rows["impl"].isin((OURS, DYNAMIC, STATIC))]
    median = timed.pivot_table("median", list(CELL), "impl", sort=False)
    ours = timed[timed["impl"] == OURS].set_index(list(CELL))
    ours["dynamic"], ours["static"] = (median.get(arm, math.nan) / median[OURS] for arm in (DYNAMIC, STATIC))
    ours["first"] = math.nan
    if "first_token" in timed and timed["first_token"].notna().any():
        first = timed.pivot_table("first_token", list(CELL), "impl", sort=False)
        ours["first"] = first.get(DYNAMIC, math.nan) / first[OURS]
    return ours.reset_index()


def summary(cells: pandas.DataFrame) -> list[str]:
    """Sentences on ``ratios``: geometric mean and worst cell against each cache, and how well time was predicted."""
    lines = []
    for name in ("dynamic", "static", "first"):
        some = cells[cells[name].notna()]
        if some.empty:
            continue
        long = some[some["context"] >= LONG]
        worst = some.nsmallest(1, name).iloc[0]
        what = "the first token" if name == "first" else f"a step with transformers' {name} cache"
        far = "" if long.empty else f", {geometric_mean(long[name]):.2f} at {LONG} tokens and more"
        lines.append(
            f"{what} takes {geometric_mean(some[name]):.2f} times as long as here (geometric mean of {len(some)} "
            f"cells{far}), at least {worst[name]:.2f}: "
            f"{worst['shape.name']} {worst['variant']} {worst['dtype']}, batch {worst['batch']:.0f}, context "
            f"{worst['context']:.0f}."
        )
    return [*lines, error_line(f"a step ({len(cells)} cells)", prediction_error(cells))]


def table(cells: pandas.DataFrame) -> Table:
    """``ratios`` for the terminal."""
    numbers = ("batch", "context", "ms", "tok/s", "dynamic", "static", "first", "pred.")
    table = Table(
        *columns(("model", "variant", "dtype"), numbers),
        title="A decode step of whole models, and transformers' time over ours on the same weights",
        caption="first: the first token; pred.: predicted over measured",
        **PLAIN,
    )
    for row in cells.to_dict("records"):
        times = (f"×{row[name]:.2f}" if row[name] == row[name] else "" for name in ("dynamic", "static", "first"))
        table.add_row(
            *(row["shape.name"], row["variant"], short(row["dtype"]), f"{row['batch']:.0f}", f"{row['context']:.0f}"),
            *(f"{row['median'] * 1e3:.1f}", f"{row['tokens_per_second']:.0f}"),
            *times,
            f"{row['predicted'] / row['median']:.2f}",
        )
    return table
