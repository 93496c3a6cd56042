"""Tables in the terminal, against rows small enough to work out by hand."""

import io
import math
from typing import Any

import pandas
import pytest
from rich.console import Console
from rich.table import Table

from attnlab.errors import InputError
from attnlab.predict.machine import Machine
from attnlab.predict.memory import decode_peak_bytes, decode_read_bytes, kv_cache_bytes, max_batch
from attnlab.report import (
    arms,
    compared,
    described,
    differing,
    error_lines,
    explored,
    memory_numbers,
    memory_proof,
    memory_tables,
    milliseconds,
    prediction_errors,
    roofs,
)
from attnlab.shapes import ModelShape


def row(impl: str, g: int, median: float, **more: Any) -> dict[str, Any]:
    """One decode row of H = 6 and D = 10 at context 7, batch 2."""
    names = {6: "MHA", 1: "MQA"}
    return {
        "kind": "decode",
        "status": "ok",
        "run": "r1",
        "machine": "m-1",
        "shape.n_heads": 6,
        "shape.n_kv_heads": g,
        "shape.head_dim": 10,
        "variant": names.get(g, f"GQA-{g}"),
        "batch": 2,
        "context": 7,
        "queries": 1,
        "dtype": "float32",
        "impl": impl,
        "median": median,
        "predicted": median,
        "fraction_of_roof": 0.5,
        "read_bandwidth": 8e9,
    } | more


def lines(table: Table) -> list[list[str]]:
    """The table's lines at 100 columns, each cut into its words."""
    console = Console(width=100, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text.replace(" … ", ""), "a cell was cut"
    return [line.replace("│", " ").replace("┃", " ").split() for line in text.split("\n")]


# --- what a run found -----------------------------------------------------------------------------------------------


def test_explored_shows_the_row_it_names() -> None:
    """The time of another dtype, context or batch in the right column looks like any other time."""
    rows = pandas.DataFrame(
        [
            row("auto", 6, 0.0080, predicted=0.0100, fraction_of_roof=0.811, context=9),
            row("auto", 2, 0.0040, predicted=0.0030, fraction_of_roof=0.622, context=9),
            row("expanded", 6, 0.0081, context=9),
            row("expanded", 2, 0.0123, context=9),
            row("grouped", 2, 0.0555, context=9),
            row("auto", 2, 0.0016, predicted=0.0020, dtype="bfloat16", context=9),
            row("auto", 2, 0.0777, context=7),  # a shorter context
            row("auto", 2, 0.0888, context=9, batch=4),  # a larger batch
            row("auto", 2, 0.0999, context=9, kind="prefill", queries=9),
            row("auto", 1, 0.0001, context=9, status="implausible"),
            row("auto", 1, math.nan, context=11, status="oom"),
        ]
    )
    shown = lines(explored(rows))
    assert ["MHA", "float32", "480", "8.1", "ms", "8", "ms", "10", "ms", "+25%", "81%"] in shown
    assert ["GQA-2", "float32", "160", "12.3", "ms", "4", "ms", "3", "ms", "-25%", "62%"] in shown
    assert ["GQA-2", "bfloat16", "80", "–", "1.6", "ms", "2", "ms", "+25%", "50%"] in shown
    assert sum("ms" in line for line in shown) == 3
    title = " ".join(word for line in shown[:3] for word in line)
    assert "context 9, batch 2" in title and "m-1" in title


def test_explored_marks_what_was_unsteady() -> None:
    """A time whose quartiles are far apart reads like any other. Rows that were written before the field are steady."""
    rows = pandas.DataFrame([row("auto", 6, 0.008, unsteady=True), row("auto", 2, 0.004, unsteady=False)])
    table = explored(pandas.concat([rows, pandas.DataFrame([row("auto", 1, 0.002)])]))
    assert [line[5:7] for line in lines(table) if "float32" in line] == [["ms~", "8"], ["ms", "4"], ["ms", "2"]]
    assert table.caption == "~ unsteady: the quartiles are far apart"
    assert explored(rows[1:]).caption is explored(rows[1:].drop(columns="unsteady")).caption is None


def test_a_run_without_times_is_one_clear_error() -> None:
    """An empty table with headings says that nothing was slow."""
    with pytest.raises(InputError, match="no timed decode rows in this run; let it go on with: attnlab explore"):
        explored(pandas.DataFrame([row("auto", 2, math.nan, status="oom"), row("auto", 2, 1.0, kind="prefill")]))


def test_prediction_errors_are_relative_to_what_was_measured() -> None:
    """Relative to the prediction, or with a sign that cancels, a bad model looks good. Rows nobody believes are left
    out."""
    rows = pandas.DataFrame(
        [
            row("auto", 6, 2.0, predicted=1.0),  # 50 %
            row("auto", 2, 1.0, predicted=2.0),  # 100 %
            row("auto", 1, 4.0, predicted=3.0),  # 25 %
            row("auto", 1, 1.0, predicted=9.0, status="implausible"),
            row("grouped", 6, 1.0, predicted=9.0),
            row("auto", 3, 10.0, predicted=9.0, kind="prefill"),  # 10 %
        ]
    )
    assert list(prediction_errors(rows)) == [0.5, 1.0, 0.25]
    assert list(prediction_errors(rows, impl="grouped")) == [8.0]
    assert list(prediction_errors(rows, kind="prefill")) == pytest.approx([0.1])
    assert error_lines(rows) == [
        "6 rows: 5 ok, 1 implausible.",
        "Prediction of decode (auto, 3 points): median error 50%, 90th percentile 90%.",
        "Prediction of prefill (auto, 1 points): median error 10%, 90th percentile 10%.",
    ]
    assert error_lines(rows[rows["status"] != "ok"]) == ["1 rows: 1 implausible."]


def test_milliseconds() -> None:
    """A missing time is a dash, not nan."""
    assert [milliseconds(x) for x in (0.0123456, 2.5e-6, 3.0)] == ["12.3 ms", "0.0025 ms", "3e+03 ms"]
    assert [milliseconds(x) for x in (None, math.nan)] == ["–", "–"]


def test_a_machine_in_a_few_lines() -> None:
    """GB for GiB, or flop/s for Gflop/s, and the reader compares another machine."""
    facts = {
        "processor": "EPYC",
        "cores": 2,
        "capability": "avx2",
        "memory_bytes": 24 * 2**30,
        "torch": "2.13.0",
    }
    assert described(facts) == "EPYC, 2 CPU cores, avx2, 24 GiB; torch 2.13.0"
    machine = Machine(
        "m", "cpu", 12.3e9, 9.87e9, {"float32": 98.7e9, "bfloat16": 1.5e9}, 7e-6, 2, spread={"read_bandwidth": 0.04}
    )
    assert roofs(machine) == [
        "reads 12.3 GB/s (interquartile range 4%)",
        "copies 9.87 GB/s, read + write",
        "multiplies float32 at 98.7 Gflop/s",
        "multiplies bfloat16 at 1.5 Gflop/s",
        "a call costs 7 µs",
    ]


# --- two machines ---------------------------------------------------------------------------------------------------


def test_compared_is_a_geometric_mean_of_shared_points() -> None:
    """An arithmetic mean of ratios depends on which machine stands below the line; points that one of the two has not
    timed, or other sizes, are no comparison at all."""
    mine = pandas.DataFrame(
        [
            row("auto", 2, 8.0),
            row("auto", 2, 1.0, context=9),
            row("auto", 1, 3.0),
            row("auto", 2, 1.0, dtype="bfloat16"),
            row("auto", 6, 5.0, status="implausible"),
            row("grouped", 2, 100.0),
            row("auto", 2, 5.0, context=11),  # which the reference lacks
            row("auto", 2, 6.0, kind="prefill", queries=7),
        ]
    )
    reference = pandas.DataFrame(
        [
            row("auto", 2, 2.0),
            row("auto", 2, 1.0, context=9),
            row("auto", 1, 6.0),
            row("auto", 2, 4.0, dtype="bfloat16"),
            row("auto", 6, 5.0),
            row("grouped", 2, 1.0),
            row("auto", 2, 3.0, kind="prefill", queries=7),
        ]
    ).assign(machine="m-2", read_bandwidth=16e9)
    table = compared(mine, reference)
    shown = lines(table)
    # ratios 4 and 1: their geometric mean is 2, the arithmetic one 2.5
    assert [line for line in shown if line and line[0] in ("decode", "prefill")] == [
        ["decode", "bfloat16", "GQA-2", "1", "0.25×", "0.25×", "0.25×"],
        ["decode", "float32", "GQA-2", "2", "2.00×", "1.00×", "4.00×"],
        ["decode", "float32", "MQA", "1", "0.50×", "0.50×", "0.50×"],
        ["prefill", "float32", "GQA-2", "1", "2.00×", "2.00×", "2.00×"],
    ]
    assert table.title == "m-1 (reads 8 GB/s) beside m-2 (reads 16 GB/s)"


def test_compared_takes_each_points_newest_row() -> None:
    """A published machine has a run per release: each point would count once per run, and the old ones as much as the
    new."""
    old = [row("auto", 2, 1.0, run="20260101"), row("auto", 1, 4.0, run="20260101")]
    new = [row("auto", 2, 8.0, run="20260102"), row("auto", 6, 9.0, run="20260102")]
    for rows in (old + new, new + old):
        shown = lines(compared(pandas.DataFrame([row("auto", 2, 4.0), row("auto", 1, 4.0)]), pandas.DataFrame(rows)))
        assert ["decode", "float32", "GQA-2", "1", "0.50×", "0.50×", "0.50×"] in shown
        assert ["decode", "float32", "MQA", "1", "1.00×", "1.00×", "1.00×"] in shown


def test_runs_that_share_nothing_are_one_clear_error() -> None:
    """An empty table says that the machines are alike; rows of a training sweep lack even the columns."""
    mine = pandas.DataFrame([row("auto", 2, 1.0)])
    with pytest.raises(InputError, match="the two runs share no timed point; measure the same grid, dtypes and heads"):
        compared(mine, pandas.DataFrame([row("auto", 2, 1.0, context=9)]))
    trained = pandas.DataFrame([{"kind": "quality", "status": "ok", "run": "r7", "machine": "m-1"}])
    for pair in ((mine, trained), (trained, mine)):
        with pytest.raises(InputError, match="no timed rows in r7; measure some with: attnlab explore"):
            compared(*pair)


def test_differing_names_the_slowest_first() -> None:
    """Behind twenty points that gained, the one that lost is the one to be read. What is left out is counted."""
    common = {"kind": "decode", "shape.n_heads": 6, "shape.n_kv_heads": 2, "shape.head_dim": 10, "variant": "GQA-2"}
    common |= {"batch": 3, "queries": 1, "dtype": "bfloat16", "impl": "sdpa", "low": 0.4, "high": 1.6}
    ratios = [0.5, 0.8, 1.6, *[1.0] * 3]
    found = pandas.DataFrame(
        [common | {"context": 7 + i, "ratio": ratio, "differs": ratio != 1} for i, ratio in enumerate(ratios)]
    ).assign(unsteady=[True, *[False] * 5])
    summary, table = differing(found)
    assert summary.startswith("6 points: B/A is 0.93× (geometric mean) and 1.00× in the median point")
    assert summary.endswith("3 of them differ significantly, B slower in 1 and faster in 2.")
    assert [line for line in lines(table) if "sdpa" in line] == [
        ["GQA-2", "decode", "ctx9", "b3", "bf16", "sdpa", "1.60×", "0.40–1.60", "1.60×"],
        ["GQA-2", "decode", "ctx8", "b3", "bf16", "sdpa", "0.80×", "0.40–1.60", "0.80×"],
        ["GQA-2", "decode", "ctx7", "b3", "bf16", "sdpa", "0.50×~", "0.40–1.60", "0.50×"],
    ]
    many = pandas.concat([found.assign(context=found["context"] + 10 * i) for i in range(11)]).assign(ratio=1.1)
    many.loc[many["context"] == 7, ["ratio", "shape.head_dim"]] = 2.2, 11
    _, table = differing(many)
    shown = lines(table)
    assert sum("sdpa" in line for line in shown) == 20 and "and 13 more" in str(table.caption)
    assert ["GQA-2", "decode", "H6", "D11", "ctx7", "b3", "bf16", "sdpa", "2.20×~", "0.40–1.60", "2.00×"] in shown


# --- memory ---------------------------------------------------------------------------------------------------------

SHAPE = ModelShape(3, 26, 12, 4, 10, 34, 58, name="small")
CARD = Machine("card", "cuda", 1.0, 1.0, {"float32": 1.0}, 1.0, 10**6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_numbers_are_the_models(ranks: int) -> None:
    """A table that computes bytes by itself will one day disagree with the predictor it stands for."""
    numbers = memory_numbers(SHAPE, 5, 7, "bfloat16", "float8", ranks, CARD)
    arguments = ("bfloat16", "float8", ranks)
    peak = decode_peak_bytes(SHAPE, 5, 7, *arguments)
    assert numbers["peak"] == {**peak.terms(), "total": peak.total}
    assert numbers["read_per_step_bytes"] == decode_read_bytes(SHAPE, 5, 7, *arguments)
    assert numbers["kv_bytes_per_token"] == 2 * 3 * 4 * 10  # one byte each
    assert (numbers["model"], numbers["variant"], numbers["n_params"]) == ("small", "GQA-4", SHAPE.n_params)
    assert (numbers["card"], numbers["card_bytes"]) == ("card", 10**6)
    # two ranks cannot share three heads evenly
    assert [variant["n_kv_heads"] for variant in numbers["variants"]] == [
        g for g in (12, 6, 4, 3, 2, 1) if g != 3 or ranks == 1
    ]
    for variant in numbers["variants"]:
        shape = SHAPE.with_kv_heads(variant["n_kv_heads"])
        assert variant == {
            "variant": shape.variant,
            "n_kv_heads": shape.n_kv_heads,
            "kv_bytes_per_token": shape.kv_bytes_per_token("float8"),
            "kv_cache_bytes": kv_cache_bytes(shape, 5, 7, "float8", ranks),
            "peak_bytes": decode_peak_bytes(shape, 5, 7, *arguments).total,
            "max_batch": max_batch(shape, 10**6, 7, *arguments),
        }


def test_memory_tables_show_the_numbers() -> None:
    """MiB under GiB, or the wrong variant marked as the model's own."""
    numbers = memory_numbers(ModelShape.published("llama-2-7b"), 3, 4096, "bfloat16", "bfloat16", 1, CARD)
    terms, variants = (lines(table) for table in memory_tables(numbers))
    assert ["kv", "cache", "6,442,450,944", "6.000"] in terms  # 2 · 32 · 32 · 128 · 2 bytes, 3 × 4096 tokens
    assert ["total", f"{numbers['peak']['total']:,}", f"{numbers['peak']['total'] / 2**30:.3f}"] in terms
    read = numbers["read_per_step_bytes"]
    assert ["read", "in", "one", "decode", "step", f"{read:,}", f"{read / 2**30:.3f}"] in terms
    own = [line for line in variants if "←" in line]
    assert len(own) == 1 and own[0][:4] == ["MHA", "←", "512", "6.000"]
    assert [line[0] for line in variants if line and line[0].startswith(("M", "GQA"))] == [
        *("MHA", "GQA-16", "GQA-8", "GQA-4", "GQA-2", "MQA")
    ]
    assert ["MQA", "16", "0.188"] in [line[:3] for line in variants]


# --- memory, proven -------------------------------------------------------------------------------------------------


def peak(scope: str, predicted: int, measured: int, **more: Any) -> dict[str, Any]:
    """A peak of 10 MB stored beside which the rest works."""
    working = {"predicted_working": predicted - 10**7, "measured_working": measured - 10**7}
    sizes = {"batch": 2, "context": 7, "predicted_bytes": predicted, "measured_bytes": measured}
    about = {"kind": "peak", "status": "ok", "scope": scope, "variant": "MQA", "dtype": "bfloat16"}
    return {**about, **sizes, **working, **more}


def limit(what: str, predicted: int, measured: int, step: int) -> dict[str, Any]:
    """A limit in 3 GiB at 5 sequences or 11 tokens."""
    fixed = {"context": 11} if what == "batch" else {"batch": 5}
    found = {"predicted": predicted, "measured": measured, "step": step, "capacity_bytes": 3 * 2**30}
    return {"kind": "limit", "status": "ok", "what": what, "variant": "MHA", "dtype": "float32", **fixed, **found}


def test_a_proof_shows_the_worst_of_its_kind() -> None:
    """Weights hide what the rest is off by, and a mean hides one bad point: the worst is shown, beside the error of
    what is neither weights nor cache. An end of memory is judged in steps, not in percent."""
    rows = [peak("decode", 11_000_000, 11_000_000), peak("decode", 12_100_000, 12_000_000, batch=3)]
    rows += [peak("decode", 11_990_000, 12_000_000), limit("batch", 29, 30, 1), limit("context", 1000, 970, 10)]
    rows += [{"kind": "memory", "status": "ok"}, {"kind": "limit", "status": "unsupported"}]
    table, doubts = memory_proof(pandas.DataFrame(rows))
    assert lines(table)[4:7] == [
        ["decode", "3×7", "MQA", "bf16", "12.10", "MB", "12.00", "MB", "+0.8%", "+5.0%"],
        ["batch", "at", "11", "MHA", "fp32", "29", "30", "-1", "steps"],
        ["context", "at", "5", "MHA", "fp32", "1,000", "970", "+3", "steps"],
    ]
    assert table.title == "Bytes at the peak (batch × context), and what fits 3 GiB"
    assert doubts == ["context MHA fp32 at 5: predicted 1,000, measured 970"]


def test_a_proof_says_which_peak_is_off() -> None:
    """Too low ends in a crash and too high wastes a card, so both count; 3 % itself is still within the promise."""
    rows = [peak("prefill", size, 10**8) for size in (103 * 10**6, 97 * 10**6, 1031 * 10**5, 969 * 10**5)]
    _, doubts = memory_proof(pandas.DataFrame(rows))  # nothing but peaks: a run that was stopped early
    assert doubts == [f"prefill MQA bf16 2×7: predicted {size} MB, measured 100.00 MB" for size in ("103.10", "96.90")]


def test_ours_stands_beside_the_quickest_of_the_others() -> None:
    """A comparison with the slowest rival, with the oracle, or with oneself under another name, flatters. Of two
    rivals the quicker counts at each point; auto's own pick and the reference are no rivals."""
    common = {"picked": "cpp", "binding_roof": 1e9, "bytes": 5e8}
    rows = pandas.DataFrame(
        [
            *(row("auto", g, 1.0, **common) for g in (6, 2)),
            *(row("cpp", g, 1.0) for g in (6, 2)),
            *(row("sdpa", 6, 4.0), row("grouped", 6, 2.0), row("sdpa", 2, 8.0), row("grouped", 2, 9.0)),
            *(row("reference", g, 0.1) for g in (6, 2)),
            *(row("auto", 6, 1.0, batch=4, **common), row("sdpa", 6, 0.5, batch=4)),
        ]
    )
    table, said = arms(rows)
    assert [line for line in lines(table) if line and line[0] == "float32"] == [
        ["float32", "MHA", "7", "1e+03", "ms", "4e+03", "ms", "2e+03", "ms", "50%"],
        ["float32", "GQA-2", "7", "1e+03", "ms", "8e+03", "ms", "9e+03", "ms", "50%"],
    ]
    table, _ = arms(rows.assign(picked=["grouped", *rows["picked"][1:]]))  # picked there, a rival elsewhere
    assert ["float32", "GQA-2", "7", "1e+03", "ms", "1e+03", "ms", "8e+03", "ms", "9e+03", "ms", "50%"] in lines(table)
    assert said == (
        "The quickest other implementation takes 2.00 times as long as ours (geometric mean of 3 points), at least "
        "0.50: MHA float32, context 7, batch 4."
    )
