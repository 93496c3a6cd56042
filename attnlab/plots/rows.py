"""Which rows a figure draws: the newest run's, those that ended well, of sizes that can stand in one panel."""

from collections.abc import Iterable
from typing import Any

import numpy
import pandas

from attnlab.errors import InputError
from attnlab.results import newest
from attnlab.shapes import element_bytes

GROUPS = "shape.n_kv_heads"
SIZES = ("batch", "context", GROUPS, "shape.n_heads", "shape.head_dim")


def timed(rows: pandas.DataFrame, kind: str, machine: str) -> pandas.DataFrame:
    """The ``kind`` rows of ``machine`` that may be drawn: status ok, of the (H, D) that most of them have, and of those
    the newest run's. Raises ``InputError`` if there are none."""
    chosen = rows[(rows["kind"] == kind) & (rows["machine"] == machine) & (rows["status"] == "ok")]
    if chosen.empty:
        raise InputError(f"no {kind} rows of {machine} ended well")
    # Beside rows of a kind without such a size, pandas holds it as a float.
    chosen = chosen.astype(dict.fromkeys(SIZES, int))
    return newest(commonest(chosen, ["shape.n_heads", "shape.head_dim"]), kind, machine)


def commonest(rows: pandas.DataFrame, columns: list[str]) -> pandas.DataFrame:
    """The rows that share the most frequent values in ``columns``; of equally frequent ones, the smallest."""
    for column in columns:
        counts = rows[column].value_counts()
        rows = rows[rows[column] == min(counts[counts == counts.max()].index)]
    return rows


def few(values: Iterable[Any], count: int) -> list[Any]:
    """At most ``count`` (≥ 2) of the distinct values, smallest and largest among them, evenly picked between."""
    distinct = sorted(set(values))
    if len(distinct) <= count:
        return distinct
    return [distinct[round(i * (len(distinct) - 1) / (count - 1))] for i in range(count)]


def dtypes(rows: pandas.DataFrame) -> list[str]:
    """A dtype of each width, widest first; of one width bfloat16, where it is there."""
    by_width = {element_bytes(dtype): dtype for dtype in sorted(rows["dtype"].unique(), reverse=True)}
    return [by_width[width] for width in sorted(by_width, reverse=True)]


def best_arm(rows: pandas.DataFrame) -> str:
    """What a user gets: ``auto`` where it was measured, else ``grouped``. Raises ``InputError`` if neither was."""
    for arm in ("auto", "grouped"):
        if (rows["impl"] == arm).any():
            return arm
    raise InputError("neither auto nor grouped was measured")


def contenders(rows: pandas.DataFrame, count: int = 7) -> list[str]:
    """The implementations to draw as lines: all, or of more than ``count`` those that are fastest over all sizes, with
    ``grouped`` and ``expanded`` to compare with."""
    rows = rows[rows["impl"] != "auto"]
    best = rows.groupby(["dtype", *SIZES])["median"].transform("min")
    slowness = (rows["median"] / best).groupby(rows["impl"]).median().sort_values(kind="stable")
    kept = [name for name in slowness.index if name in ("grouped", "expanded")]
    return kept + [name for name in slowness.index if name not in kept][: count - len(kept)]


def crossing(x: Iterable[float], y: Iterable[float], at: float) -> float:
    """Where a curve through (x, y), x rising, straight between its points on logarithmic axes, is ``at`` high at x; NaN
    outside of the points. Swap x and y for the place where a rising curve reaches a height."""
    return float(numpy.exp(numpy.interp(numpy.log(at), numpy.log([*x]), numpy.log([*y]), numpy.nan, numpy.nan)))


def source(rows: pandas.DataFrame) -> str:
    """The footer: what measured these rows, in which dtype, and the runs they come from."""
    first = rows.iloc[0]
    device = "CPU" if first["device"] == "cpu" else "GPU"
    if "dtype" in rows and rows["dtype"].notna().all():
        kinds = rows["dtype"]
    else:  # of training, which says only where its products are of 16 bits
        kinds = rows.get("autocast", rows["run"]).eq(True).map({True: "bfloat16", False: "float32"})
    runs = ", ".join(sorted(rows["run"].unique()))
    machine = f"{device}: {first['processor']} ({first['machine']})"
    return f"{machine} · {', '.join(sorted(kinds.unique()))} · torch {first['torch']} · rows: {runs}"
