"""Tables for the terminal: what a run found, what a model's memory is, how two machines compare, what quality runs
show."""

import statistics
from typing import Any

import pandas
from rich.box import SIMPLE
from rich.table import Table

from attnlab.effects import effects
from attnlab.errors import InputError, divisors
from attnlab.predict.machine import Machine
from attnlab.predict.memory import GB, GIB, KIB, decode_peak_bytes, decode_read_bytes, kv_cache_bytes, max_batch
from attnlab.results import prediction_error
from attnlab.shapes import ModelShape

POINT = ["kind", "shape.n_heads", "shape.n_kv_heads", "shape.head_dim", "batch", "context", "queries", "dtype", "impl"]


def timed(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The decode and prefill rows that hold a believable time."""
    return rows[rows["kind"].isin(["decode", "prefill"]) & (rows["status"] == "ok")]


def prediction_errors(rows: pandas.DataFrame, impl: str = "grouped", kind: str = "decode") -> pandas.Series:
    """|predicted − measured| / measured of every timed point of one implementation."""
    chosen = timed(rows)
    chosen = chosen[(chosen["impl"] == impl) & (chosen["kind"] == kind)]
    return prediction_error(chosen)


def described(facts: dict[str, Any]) -> str:
    """One line of what the machine is."""
    memory = f"{facts['memory_bytes'] / GIB:.0f} GiB"
    return f"{facts['processor']}, {facts['cores']} CPU cores, {facts['capability']}, {memory}; torch {facts['torch']}"


def roofs(machine: Machine) -> list[str]:
    """One line per roof, with its spread where it was measured."""
    spread = {name: f" (interquartile range {share:.0%})" for name, share in machine.spread.items()}
    rates = [f"multiplies {dtype} at {rate / 1e9:,.3g} Gflop/s" for dtype, rate in machine.matmul_rate.items()]
    return [
        f"reads {machine.read_bandwidth / GB:.3g} GB/s{spread.get('read_bandwidth', '')}",
        f"copies {machine.copy_bandwidth / GB:.3g} GB/s, read + write{spread.get('copy_bandwidth', '')}",
        *rates,
        f"a call costs {machine.call_seconds * 1e6:.3g} µs{spread.get('call_seconds', '')}",
    ]


def explored(rows: pandas.DataFrame) -> Table:
    """Variant, cache bytes a token costs in one layer, decode time of the usual code and of ours, prediction and its
    error."""
    decode = timed(rows)
    decode = decode[decode["kind"] == "decode"]
    if decode.empty:
        raise InputError("no timed decode rows in this run; let it go on with: attnlab explore")
    context, batch = int(decode["context"].max()), int(decode["batch"].min())
    table = Table(
        title=f"One layer's decode attention, context {context}, batch {batch}, on {decode['machine'].iloc[0]}",
        box=SIMPLE,
        pad_edge=False,
    )
    for heading in ("variant", "dtype", "KV B/token", "expanded", "auto", "predicted", "error", "roof"):
        table.add_column(heading, justify="left" if heading in ("variant", "dtype") else "right")
    chosen = decode[(decode["context"] == context) & (decode["batch"] == batch)]
    for auto in chosen[chosen["impl"] == "auto"].to_dict("records"):
        dtype, groups = auto["dtype"], int(auto["shape.n_kv_heads"])
        shape = ModelShape(1, 1, int(auto["shape.n_heads"]), groups, int(auto["shape.head_dim"]), 1, 1)
        same = chosen[
            (chosen["dtype"] == dtype) & (chosen["shape.n_kv_heads"] == groups) & (chosen["impl"] == "expanded")
        ]
        table.add_row(
            shape.variant,
            str(dtype),
            f"{shape.kv_bytes_per_token(dtype):,}",
            milliseconds(same["median"].mean()),
            milliseconds(auto["median"]),
            milliseconds(auto["predicted"]),
            f"{auto['predicted'] / auto['median'] - 1:+.0%}",
            f"{auto['fraction_of_roof']:.0%}",
        )
    return table


def error_lines(rows: pandas.DataFrame) -> list[str]:
    """Row counts by status, and the prediction's median and 90th-percentile error, one sentence each."""
    counts = ", ".join(f"{count} {status}" for status, count in rows["status"].value_counts().items())
    lines = [f"{len(rows)} rows: {counts}."]
    for kind in ("decode", "prefill"):
        errors = prediction_errors(rows, kind=kind)
        if len(errors):
            middle, high = errors.quantile([0.5, 0.9])
            lines.append(
                f"Prediction of {kind} (grouped, {len(errors)} points): "
                f"median error {middle:.0%}, 90th percentile {high:.0%}."
            )
    return lines


def milliseconds(seconds: Any) -> str:
    """As "12.3 ms", or a dash where there is no number."""
    return "–" if seconds is None or pandas.isna(seconds) else f"{seconds * 1e3:.3g} ms"


def compared(mine: pandas.DataFrame, reference: pandas.DataFrame) -> Table:
    """Geometric mean of mine / reference over the points that both timed, per kind, dtype and variant, ``auto``
    only."""
    both = _newest_points(mine).merge(_newest_points(reference), on=[*POINT, "variant"], suffixes=("", "_reference"))
    both = both[both["impl"] == "auto"].copy()
    if both.empty:
        raise InputError("the two runs share no timed point; measure the same grid, dtypes and heads")
    names = both["machine"].iloc[0], both["machine_reference"].iloc[0]
    roofs = both["read_bandwidth"].median() / GB, both["read_bandwidth_reference"].median() / GB
    table = Table(
        title=f"{names[0]} (reads {roofs[0]:.3g} GB/s) beside {names[1]} (reads {roofs[1]:.3g} GB/s)",
        caption="time ratio: this run / reference, geometric mean; below 1 this run is faster",
    )
    for heading in ("kind", "dtype", "variant", "points", "time ratio", "lowest", "highest"):
        table.add_column(heading, justify="left" if heading in ("kind", "dtype", "variant") else "right")
    both["ratio"] = both["median"] / both["median_reference"]
    both["order"] = -both["shape.n_kv_heads"]
    for _, points in both.groupby(["kind", "dtype", "order"]):
        ratios = points["ratio"].astype(float)
        numbers = (statistics.geometric_mean(ratios), ratios.min(), ratios.max())
        cells = [str(points[name].iloc[0]) for name in ("kind", "dtype", "variant")]
        table.add_row(*cells, str(len(points)), *(f"{number:.2f}×" for number in numbers))
    return table


def _newest_points(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Of each timed point its newest row: a machine may have several runs."""
    chosen = timed(rows)
    if chosen.empty:
        raise InputError(f"no timed rows in {', '.join(rows['run'].unique())}; measure some with: attnlab explore")
    chosen = chosen[[*POINT, "variant", "median", "machine", "read_bandwidth", "run"]]
    return chosen.sort_values("run").drop_duplicates(POINT, keep="last")


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
            total = decode_peak_bytes(grouped, batch, context, *arguments).total
        except InputError:  # these ranks do not fit this G
            continue
        variants.append(
            {
                "variant": grouped.variant,
                "n_kv_heads": groups,
                "kv_bytes_per_token": grouped.kv_bytes_per_token(kv_dtype),
                "kv_cache_bytes": kv_cache_bytes(grouped, batch, context, kv_dtype, tensor_parallel),
                "peak_bytes": total,
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
        title=f"{what}\nbatch {numbers['batch']}, context {numbers['context']:,}, {numbers['dtype']}, "
        f"cache {numbers['kv_dtype']}{rank}"
    )
    terms.add_column("term")
    terms.add_column("bytes", justify="right")
    terms.add_column("GiB", justify="right")
    for name, value in numbers["peak"].items():
        terms.add_row(name.replace("_", " "), f"{value:,}", f"{value / GIB:.3f}", end_section=name == "activations")
    read = numbers["read_per_step_bytes"]
    terms.add_row("read in one decode step", f"{read:,}", f"{read / GIB:.3f}")
    variants = Table(
        title="The same model with other numbers of KV heads\n"
        f"card: {numbers['card']} ({numbers['card_bytes'] / GIB:.1f} GiB)"
    )
    for heading in ("variant", "KV KiB/token", "cache GiB", "total GiB", "largest batch"):
        variants.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in numbers["variants"]:
        own = row["variant"] == numbers["variant"]
        cells = (
            f"{row['kv_bytes_per_token'] / KIB:g}",
            f"{row['kv_cache_bytes'] / GIB:.3f}",
            f"{row['peak_bytes'] / GIB:.3f}",
            f"{row['max_batch']:,}",
        )
        variants.add_row(row["variant"] + (" ←" if own else ""), *cells, style="bold" if own else "")
    return [terms, variants]


def quality(rows: pandas.DataFrame) -> Table:
    """Each arm's difference to MHA with its 95 % interval, the verdict, and the smallest effect these seeds would
    show."""
    found, done = effects(rows), rows[rows["status"] == "ok"]
    table = Table(
        title=f"bits per byte after {int(done['tokens'].iloc[0]):,} tokens: MHA's, and the others' minus MHA's",
        caption="± : 95 % interval, paired by seed; verdicts count all arms together; "
        "visible: the smallest true difference that would likely have had one",
        box=SIMPLE,
        pad_edge=False,
    )
    for heading in ("variant", "arm", "params", "seeds", "bits per byte", "visible", "verdict"):
        table.add_column(heading, justify="left" if heading in ("variant", "arm", "verdict") else "right")
    base = done[done["shape.n_kv_heads"] == done["shape.n_heads"]]
    mean, deviation = base["bits_per_byte"].mean(), base["bits_per_byte"].std()
    count = f"{int(base['n_params'].iloc[0]):,}"
    table.add_row("MHA", "plain", count, str(len(base)), f"{mean:.4f} (sd {deviation:.4f})", "", "")
    for effect in found:
        same = (done["shape.n_kv_heads"] == effect.n_kv_heads) & (done["arm"] == effect.arm)
        count = f"{int(done.loc[same, 'n_params'].iloc[0]):,}"
        difference = f"{effect.mean:+.4f} ± {effect.half_width:.4f}"
        cells = (count, str(effect.seeds), difference, f"{effect.smallest:.4f}", effect.verdict)
        table.add_row(effect.variant, effect.arm, *cells)
    return table
