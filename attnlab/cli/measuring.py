"""Commands that measure this machine."""

import math
from pathlib import Path
from typing import Annotated

import typer

from attnlab.cli.options import PLAIN, RUNS, Device, Dtypes, Fresh, Minutes, Runs, dtypes_of, ending, filling, show

app = typer.Typer(**PLAIN)


@app.command()
def explore(
    device: Device = "auto",
    dtypes: Dtypes = "float32,bfloat16",
    heads: Annotated[int, typer.Option(help="Query heads H.")] = 32,
    grid: Annotated[str, typer.Option(help="quick (minutes) or full.")] = "quick",
    runs: Runs = RUNS,
    fresh: Fresh = False,
    minutes: Minutes = math.inf,
    peers: Annotated[str, typer.Option(help="Other people's kernels to time too: names with commas, or all.")] = "",
    figures: Annotated[bool, typer.Option(help="Draw the figures at the end.")] = True,
) -> None:
    """Measure this machine: roofs, correctness, cache bytes, decode and prefill over groups, context and batch.

    Example: attnlab explore --dtypes bfloat16 --minutes 5
    """
    from attnlab import host, report
    from attnlab.explore import explore as fill
    from attnlab.explore import grid as points_of
    from attnlab.explore import named_peers
    from attnlab.predict.machine import Machine
    from attnlab.results import MACHINE, load_results

    points, also = points_of(grid, device, dtypes_of(dtypes), heads), named_peers(peers)
    print(report.described(host.describe(device)), flush=True)
    with filling(device, "speed", runs, fresh, minutes) as (run, advance):
        fill(run, points, device, advance, also)
    print("\n".join(report.roofs(Machine.load(run.folder / MACHINE))))
    rows = load_results(run.folder)
    if figures:
        from attnlab.plots import draw_all

        paths = draw_all(rows, run.folder / "figures")
        print(f"{len(paths)} figure files in {run.folder / 'figures'}")
    if (report.timed(rows)["kind"] == "decode").any():
        show(report.explored(rows))
    print("\n".join([*report.error_lines(rows), ending(run)]))
    if (rows["status"] == "implausible").any():
        print("some points beat their roof and are not believed: see status implausible in the rows")
        raise typer.Exit(1)


@app.command()
def prove_memory(device: Device = "auto", runs: Runs = RUNS, fresh: Fresh = False, minutes: Minutes = math.inf) -> None:
    """Measure bytes at the peak, and the batch and context where memory really ends, beside their predictions.

    Example: attnlab prove-memory --device cpu
    """
    from attnlab import report
    from attnlab.measure.memory import proofs, prove
    from attnlab.results import load_results

    with filling(device, "memory", runs, fresh, minutes, alone=False) as (run, advance):
        prove(run, proofs(device), advance)
    table, doubts = report.memory_proof(load_results(run.folder))
    show(table)
    print("\n".join([*doubts, ending(run)]))
    if doubts:
        raise typer.Exit(1)


@app.command()
def flow(runs: Runs = RUNS, fresh: Fresh = False) -> None:
    """Record the size of every tensor in one decode step, with 8, 2 and 1 KV heads.

    Example: attnlab flow --fresh
    """
    from rich.table import Table

    from attnlab import report
    from attnlab.measure.flow import fill
    from attnlab.results import load_results

    with filling("cpu", "flow", runs, fresh, math.inf, alone=False) as (run, _):
        fill(run)
    table = Table(*report.columns(("variant", "tensor"), ("size", "bytes")), **report.PLAIN)
    for row in load_results(run.folder).to_dict("records"):
        table.add_row(row["variant"], row["tensor"], str(row["dims"]), f"{row['bytes']:,}")
    show(table)
    print(ending(run))


@app.command()
def generation(
    device: Device = "auto",
    dtypes: Dtypes = "float32,bfloat16",
    grid: Annotated[str, typer.Option(help="quick (minutes) or full.")] = "quick",
    runs: Runs = RUNS,
    fresh: Fresh = False,
    minutes: Minutes = math.inf,
) -> None:
    """Time whole models: a decode step and the first token, beside transformers' caches on the same weights.

    Example: attnlab generation --dtypes float32
    """
    from attnlab import generated, host
    from attnlab.measure.generation import cells, fill
    from attnlab.results import load_results

    chosen = cells(grid, device, dtypes_of(dtypes))
    with filling(device, "generation", runs, fresh, minutes) as (run, advance):
        fill(run, chosen, host.describe(device), advance)
    found = generated.ratios(load_results(run.folder))
    if len(found):
        show(generated.table(found))
        print("\n".join(generated.summary(found)))
    print(ending(run))


@app.command()
def tune(device: Device = "auto", runs: Runs = RUNS, fresh: Fresh = False, minutes: Minutes = math.inf) -> None:
    """Measure which implementation is fastest here, and write the table that impl="auto" goes by.

    Example: attnlab tune --minutes 4
    """
    from attnlab import tune as tuning
    from attnlab.attention.auto import TABLE

    with filling(device, "tune", runs, fresh, minutes) as (run, advance):
        tuning.tune(run, device, advance)
    print(ending(run))
    if not run.left():
        print(f"{tuning.write(run, device)} entries written to {TABLE}")


@app.command()
def machine(
    device: Device = "auto",
    dtypes: Dtypes = "float32,bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the roofs as JSON, for --card.")] = None,
) -> None:
    """Measure this machine's roofs: read and copy bandwidth, matmul rates, the cost of a call.

    Example: attnlab machine --out my.json
    """
    from attnlab import host, report
    from attnlab.measure import measure_machine

    with host.timing():
        measured = measure_machine(device, tuple(dtypes_of(dtypes)))
    print("\n".join(report.roofs(measured)))
    if out:
        measured.save(out)
        print(f"written to {out}")
