"""Tables for the terminal: what a run found, a model's memory, two machines compared."""

import statistics
from collections.abc import Iterable
from typing import Any

import pandas
from rich.box import SIMPLE
from rich.table import Column, Table

from attnlab.errors import InputError, divisors
from attnlab.predict.machine import Machine
from attnlab.predict.memory import GB, GIB, KIB, decode_peak_bytes, decode_read_bytes, max_batch
from attnlab.results import prediction_error
from attnlab.shapes import ModelShape

POINT = ["kind", "shape.n_heads", "shape.n_kv_heads", "shape.head_dim", "batch", "context", "queries", "dtype", "impl"]
NAMED = 20
PEAK_ERROR = 0.03  # the largest error that a predicted peak may have
PLAIN: Any = {"box": SIMPLE, "pad_edge": False}


def columns(texts: Iterable[str], numbers: Iterable[str]) -> list[str | Column]:
    """Columns of text, then of numbers."""
    return [*texts, *(Column(name, justify="right") for name in numbers)]


def timed(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The decode and prefill rows that hold a believable time."""
    return rows[rows["kind"].isin(["decode", "prefill"]) & (rows["status"] == "ok")]


def prediction_errors(rows: pandas.DataFrame, impl: str = "auto", kind: str = "decode") -> pandas.Series:
    """|predicted − measured| / measured of every timed point of one implementation."""
    chosen = timed(rows)
    chosen = chosen[(chosen["impl"] == impl) & (chosen["kind"] == kind)]
    return prediction_error(chosen.reindex(columns=["predicted", "median"]))  # a run just begun has neither


def described(facts: dict[str, Any]) -> str:
    """One line of what the machine is."""
    memory = f"{facts['memory_bytes'] / GIB:.0f} GiB"
    return f"{facts['processor']}, {facts['cores']} CPU cores, {facts['capability']}, {memory}; torch {facts['torch']}"


def roofs(machine: Machine) -> list[str]:
    """One line per roof, with its spread where it was measured."""
    spread = {name: f" (interquartile range {share:.0%})" for name, share in machine.spread.items()}
    return [
        f"reads {machine.read_bandwidth / GB:.3g} GB/s{spread.get('read_bandwidth', '')}",
        f"copies {machine.copy_bandwidth / GB:.3g} GB/s, read + write{spread.get('copy_bandwidth', '')}",
        *(f"multiplies {dtype} at {rate / 1e9:,.3g} Gflop/s" for dtype, rate in machine.matmul_rate.items()),
        f"a call costs {machine.call_seconds * 1e6:.3g} µs{spread.get('call_seconds', '')}",
    ]


def explored(rows: pandas.DataFrame) -> Table:
    """Variant, cache bytes of a token in one layer, decode time of the usual code and of ours, prediction and error."""
    decode = timed(rows)
    decode = decode[decode["kind"] == "decode"]
    if decode.empty:
        raise InputError("no timed decode rows in this run; let it go on with: attnlab explore")
    context, batch = int(decode["context"].max()), int(decode["batch"].min())
    table = Table(
        *columns(("variant", "dtype"), ("KV B/token", "expanded", "auto", "predicted", "error", "roof")),
        title=f"One layer's decode attention, context {context}, batch {batch}, on {decode['machine'].iloc[0]}",
        **PLAIN,
    )
    chosen = decode[(decode["context"] == context) & (decode["batch"] == batch)]
    if "unsteady" in chosen and chosen["unsteady"].eq(True).any():
        table.caption = "~ unsteady: the quartiles are far apart"
    expanded = chosen[chosen["impl"] == "expanded"].groupby(["dtype", "shape.n_kv_heads"])["median"].mean()
    for auto in chosen[chosen["impl"] == "auto"].to_dict("records"):
        dtype, groups = auto["dtype"], int(auto["shape.n_kv_heads"])
        shape = ModelShape(1, 1, int(auto["shape.n_heads"]), groups, int(auto["shape.head_dim"]), 1, 1)
        table.add_row(
            shape.variant,
            str(dtype),
            f"{shape.kv_bytes_per_token(dtype):,}",
            milliseconds(expanded.get((dtype, groups))),
            milliseconds(auto["median"]) + ("~" if auto.get("unsteady") is True else ""),
            milliseconds(auto["predicted"]),
            f"{auto['predicted'] / auto['median'] - 1:+.0%}",
            f"{auto['fraction_of_roof']:.0%}",
        )
    return table


def arms(rows: pandas.DataFrame) -> tuple[Table, str]:
    """The smallest batch's decode time by dtype, G and context, ours beside every other implementation's, and the share
    of the binding roof; and a sentence on the quickest that auto did not pick, of all batches: mean and worst point."""
    decode = timed(rows)
    decode = decode[(decode["kind"] == "decode") & (decode["impl"] != "reference")]
    point = ["dtype", "shape.n_kv_heads", "variant", "context", "batch"]
    medians = decode.pivot_table("median", point, "impl", sort=False).drop(columns="auto").reset_index()
    points = decode[decode["impl"] == "auto"].merge(medians, on=point).to_dict("records")
    ours = sorted({str(row["picked"]) for row in points})
    others = [name for name in medians.columns if name not in point and [name] != ours]
    first = min(row["batch"] for row in points)
    table = Table(
        *columns(("dtype", "variant"), ("context", "ours", *others, "binding")),
        title=f"Decode attention of one layer, batch {first:.0f}, on {points[0]['machine']}",
        caption=f"ours: auto, which takes {', '.join(ours)}; binding: bytes/s over the binding roof, the lesser of the "
        "read bandwidth and half the rate of products over their intensity",
        **PLAIN,
    )
    ratios: dict[str, float] = {}
    for row in points:
        named = f"{row['variant']} {row['dtype']}, context {row['context']:.0f}, batch {row['batch']:.0f}"
        rivals = [row[name] for name in others if name != row["picked"] and row[name] == row[name]]
        ratios |= {named: min(rivals) / row["median"]} if rivals else {}
        if row["batch"] == first:
            times = (milliseconds(row[name]) for name in ("median", *others))
            share = row["bytes"] / row["median"] / row["binding_roof"]
            table.add_row(row["dtype"], row["variant"], f"{row['context']:.0f}", *times, f"{share:.0%}")
    worst = min(ratios, key=lambda name: ratios[name])
    return table, (
        f"The quickest other implementation takes {statistics.geometric_mean(ratios.values()):.2f} times as long as "
        f"ours (geometric mean of {len(ratios)} points), at least {ratios[worst]:.2f}: {worst}."
    )


def error_lines(rows: pandas.DataFrame) -> list[str]:
    """Row counts by status, and the prediction's median and 90th-percentile error, one sentence each."""
    counts = ", ".join(f"{count} {status}" for status, count in rows["status"].value_counts().items())
    lines = [f"{len(rows)} rows: {counts}."]
    for kind in ("decode", "prefill"):
        errors = prediction_errors(rows, kind=kind)
        if len(errors):
            lines.append(error_line(f"{kind} (auto, {len(errors)} points)", errors))
    return lines


def error_line(what: str, errors: pandas.Series) -> str:
    """How well the times of ``what`` were predicted."""
    return f"Prediction of {what}: median error {errors.median():.0%}, 90th percentile {errors.quantile(0.9):.0%}."


def milliseconds(seconds: Any) -> str:
    """As "12.3 ms", or a dash where there is no number."""
    return "–" if seconds is None or pandas.isna(seconds) else f"{seconds * 1e3:.3g} ms"


def compared(mine: pandas.DataFrame, reference: pandas.DataFrame) -> Table:
    """Geometric mean of mine / reference over ``auto``'s points that both timed, per kind, dtype and variant."""
    both = newest_points(mine).merge(newest_points(reference), on=[*POINT, "variant"], suffixes=("", "_reference"))
    both = both[both["impl"] == "auto"].copy()
    if both.empty:
        raise InputError("the two runs share no timed point; measure the same grid, dtypes and heads")
    names = both["machine"].iloc[0], both["machine_reference"].iloc[0]
    roofs = both["read_bandwidth"].median() / GB, both["read_bandwidth_reference"].median() / GB
    table = Table(
        *columns(("kind", "dtype", "variant"), ("points", "time ratio", "lowest", "highest")),
        title=f"{names[0]} (reads {roofs[0]:.3g} GB/s) beside {names[1]} (reads {roofs[1]:.3g} GB/s)",
        caption="time ratio: this run / reference, geometric mean; below 1 this run is faster",
    )
    both["ratio"] = (both["median"] / both["median_reference"]).astype(float)
    both["order"] = -both["shape.n_kv_heads"]
    for (kind, dtype, _), points in both.groupby(["kind", "dtype", "order"]):
        ratios = points["ratio"]
        numbers = (statistics.geometric_mean(ratios), ratios.min(), ratios.max())
        cells = map(str, (kind, dtype, points["variant"].iloc[0], len(points)))
        table.add_row(*cells, *(f"{number:.2f}×" for number in numbers))
    return table


def newest_points(rows: pandas.DataFrame, *more: str) -> pandas.DataFrame:
    """Of each timed point its newest row, with columns ``more`` where they are: a machine may have several runs."""
    chosen = timed(rows)
    if chosen.empty:
        raise InputError(f"no timed rows in {', '.join(rows['run'].unique())}; measure some with: attnlab explore")
    chosen = chosen.reindex(columns=[*POINT, "variant", "median", "machine", "read_bandwidth", "run", *more])
    return chosen.sort_values("run").drop_duplicates(POINT, keep="last")


def differing(found: pandas.DataFrame) -> tuple[str, Table]:
    """Of ``compare.differences`` a sentence on all points, and those that differ, slowest first, at most ``NAMED``."""
    drift, named = found["ratio"].median(), found[found["differs"]].sort_values("ratio", ascending=False)
    slower = int((named["ratio"] > 1).sum())
    summary = (
        f"{len(found)} points: B/A is {statistics.geometric_mean(found['ratio']):.2f}× (geometric mean) and "
        f"{drift:.2f}× in the median point, which is the machine's drift where the code is the same; "
        f"{len(named)} of them differ significantly, B slower in {slower} and faster in {len(named) - slower}."
    )
    more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
    table = Table(
        *columns(("point", "impl"), ("B/A", "95 % interval", "less drift")),
        caption="time ratio B/A with its 95 % interval, and what is left of it without the drift; "
        f"~ unsteady: quartiles far apart{more}",
        **PLAIN,
    )
    alike = len(found[["shape.n_heads", "shape.head_dim"]].drop_duplicates()) == 1
    for row in named.head(NAMED).to_dict("records"):
        heads = "" if alike else f" H{row['shape.n_heads']:.0f} D{row['shape.head_dim']:.0f}"
        table.add_row(
            f"{row['variant']} {row['kind']}{heads} ctx{row['context']:.0f} b{row['batch']:.0f} {short(row['dtype'])}",
            row["impl"],
            f"{row['ratio']:.2f}×{'~' if row['unsteady'] else ''}",
            f"{row['low']:.2f}–{row['high']:.2f}",
            f"{row['ratio'] / drift:.2f}×",
        )
    return summary, table


def short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "fp")


def memory_numbers(
    shape: ModelShape, batch: int, context: int, dtype: str, kv_dtype: str, tensor_parallel: int, card: Machine
) -> dict[str, Any]:
    """Every number that ``attnlab memory`` prints: terms in bytes per rank, and the same for each G of the shape."""
    arguments = (dtype, kv_dtype, tensor_parallel)
    peak = decode_peak_bytes(shape, batch, context, *arguments)
    variants = []
    for groups in reversed(divisors(shape.n_heads)):
        grouped = shape.with_kv_heads(groups)
        try:
            held = decode_peak_bytes(grouped, batch, context, *arguments)
        except InputError:  # these ranks do not fit this G
            continue
        variants.append(
            {
                "variant": grouped.variant,
                "n_kv_heads": groups,
                "kv_bytes_per_token": grouped.kv_bytes_per_token(kv_dtype),
                "kv_cache_bytes": held.kv_cache,
                "peak_bytes": held.total,
                "max_batch": max_batch(grouped, card.memory_bytes, context, *arguments),
            }
        )
    return {
        "model": shape.name,
        "variant": shape.variant,
        "n_params": shape.n_params,
        "batch": batch,
        "context": context,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "tensor_parallel": tensor_parallel,
        "kv_bytes_per_token": shape.kv_bytes_per_token(kv_dtype),
        "peak": {**peak.terms(), "total": peak.total},
        "read_per_step_bytes": decode_read_bytes(shape, batch, context, *arguments),
        "card": card.name,
        "card_bytes": card.memory_bytes,
        "variants": variants,
    }


def memory_tables(numbers: dict[str, Any]) -> list[Table]:
    """The terms of one decode step, and all variants beside each other."""
    rank = f", each of {numbers['tensor_parallel']} ranks" if numbers["tensor_parallel"] > 1 else ""
    what = f"{numbers['model'] or 'model'} ({numbers['variant']}, {numbers['n_params']:,} parameters)"
    terms = Table(
        *columns(["term"], ("bytes", "GiB")),
        title=f"{what}\nbatch {numbers['batch']}, context {numbers['context']:,}, {numbers['dtype']}, "
        f"cache {numbers['kv_dtype']}{rank}",
    )
    for name, value in {**numbers["peak"], "read in one decode step": numbers["read_per_step_bytes"]}.items():
        terms.add_row(name.replace("_", " "), f"{value:,}", f"{value / GIB:.3f}", end_section=name == "activations")
    variants = Table(
        *columns(["variant"], ("KV KiB/token", "cache GiB", "total GiB", "largest batch")),
        title="The same model with other numbers of KV heads\n"
        f"card: {numbers['card']} ({numbers['card_bytes'] / GIB:.1f} GiB)",
    )
    for row in numbers["variants"]:
        own = row["variant"] == numbers["variant"]
        variants.add_row(
            row["variant"] + (" ←" if own else ""),
            f"{row['kv_bytes_per_token'] / KIB:g}",
            *(f"{row[name] / GIB:.3f}" for name in ("kv_cache_bytes", "peak_bytes")),
            f"{row['max_batch']:,}",
            style="bold" if own else "",
        )
    return [terms, variants]


def memory_proof(rows: pandas.DataFrame) -> tuple[Table, list[str]]:
    """Rows of ``attnlab prove-memory`` beside their predictions, of those that differ in sizes only the one predicted
    worst; and a sentence for each peak that is off by more than ``PEAK_ERROR``, and each limit by more than a step."""
    worst: dict[tuple[str, ...], tuple[float, tuple[str, ...]]] = {}
    doubts, capacities = [], set()
    for row in rows[rows["kind"].isin(["peak", "limit"]) & (rows["status"] == "ok")].to_dict("records"):
        if row["kind"] == "peak":
            name, sizes = row["scope"], f"{row['batch']:.0f}×{row['context']:.0f}"
            predicted, measured = (f"{row[which] / 1e6:.2f} MB" for which in ("predicted_bytes", "measured_bytes"))
            error = row["predicted_bytes"] / row["measured_bytes"] - 1
            off = abs(row["predicted_bytes"] - row["measured_bytes"]) > PEAK_ERROR * row["measured_bytes"]
            last = f"{error:+.1%}", f"{row['predicted_working'] / row['measured_working'] - 1:+.1%}"
        else:
            name, sizes = row["what"], f"at {row['context' if row['what'] == 'batch' else 'batch']:.0f}"
            predicted, measured = (f"{row[which]:,.0f}" for which in ("predicted", "measured"))
            error = row["predicted"] // row["step"] - row["measured"] // row["step"]
            off = abs(error) > 1
            last = f"{error:+.0f} steps", ""
            capacities.add(f"{row['capacity_bytes'] / GIB:g}")
        key = name, row["variant"], short(row["dtype"])
        if off:
            doubts.append(f"{' '.join(key)} {sizes}: predicted {predicted}, measured {measured}")
        if key not in worst or abs(error) > worst[key][0]:
            worst[key] = abs(error), (f"{name} {sizes}", *key[1:], predicted, measured, *last)
    table = Table(
        *columns(("what", "variant", "dtype"), ("predicted", "measured", "error", "working")),
        title="Bytes at the peak (batch × context)"
        + (f", and what fits {', '.join(sorted(capacities))} GiB" if capacities else ""),
        caption="working: the error without weights and cache, whose bytes are exact; a step: one sequence, or "
        "a 256th of the context",
        **PLAIN,
    )
    for _, cells in worst.values():
        table.add_row(*cells)
    return table, doubts
