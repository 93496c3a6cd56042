"""Commands that read rows, and the sweeps of trainings that write them."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnlab.cli.options import PLAIN, RUNS, Runs, show
from attnlab.errors import InputError

if TYPE_CHECKING:
    import pandas

app = typer.Typer(**PLAIN)
quality_app = typer.Typer(help="Train variants beside each other and say what their loss shows.", **PLAIN)
results_app = typer.Typer(help="Published rows.", **PLAIN)
app.add_typer(quality_app, name="quality")
app.add_typer(results_app, name="results")


@app.command()
def compare(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or rows.jsonl, or a commit.")],
    after: Annotated[str | None, typer.Argument(metavar="AFTER", help="Another; else the headline machine.")] = None,
) -> None:
    """Name the points whose times differ between two runs or commits; or set a run beside the published one."""
    from attnlab import report
    from attnlab.compare import chosen, differences
    from attnlab.results import PUBLISHED, headline, load_results

    tables, said = chosen([run, after] if after else [run], [RUNS, PUBLISHED])
    if after is None:
        show(report.compared(tables[0], load_results(PUBLISHED / headline())))
        return
    found = differences(*tables)
    summary, table = report.differing(found)
    print("\n".join([*said, summary]))
    if found["differs"].any():
        show(table)


@app.command()
def figures(
    results: Annotated[Path | None, typer.Option(help="Rows to draw; the published ones unless given.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("figures"),
    only: Annotated[str | None, typer.Option(help="One figure by name.")] = None,
) -> None:
    """Draw every figure from rows: SVG and PNG, the same bytes for the same rows."""
    from attnlab.plots import draw_all
    from attnlab.results import load_results

    for path in draw_all(load_results(results), out, only=only):
        print(path)


@quality_app.command("run")
def quality_run(
    quick: Annotated[bool, typer.Option("--quick", help="A toy model: the machinery in a minute.")] = False,
    seeds: Annotated[int, typer.Option(help="Runs per arm.")] = 3,
    tokens: Annotated[int, typer.Option(help="Training tokens of each run.")] = 2_000_000,
    runs: Runs = RUNS,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start a new sweep instead of continuing the newest.")] = False,
) -> None:
    """Train MHA, GQA and MQA, plain and parameter-matched; resumable, about an hour on two cores."""
    from attnlab import host, report
    from attnlab.progress import progress
    from attnlab.results import load_results, run_folder
    from attnlab.train.quality import plan, quick_plan, run_sweep

    planned = quick_plan() if quick else plan(seeds=seeds, tokens=tokens)
    folder = run_folder(runs, host.describe("cpu")["machine"], fresh=fresh, suffix="-quick" if quick else "-quality")
    print(f"{len(planned)} runs; rows go to {folder}", file=sys.stderr)
    with progress() as advance:
        run_sweep(
            folder, planned, report=lambda label, step, steps, loss: advance(f"{label}, loss {loss:.3f}", step, steps)
        )
    show(report.quality(load_results(folder)))


@quality_app.command("status")
def quality_status(runs: Runs = RUNS) -> None:
    """Finished runs of every sweep below a folder."""
    rows = _quality_rows(runs)
    for run, sweep in rows.groupby("run"):
        arms = Counter(zip(sweep["shape.n_kv_heads"].astype(int), sweep["arm"], strict=True))
        counts = ", ".join(f"G={g} {arm} ×{count}" for (g, arm), count in arms.items())
        print(f"{run}: {len(sweep)} runs finished; {counts}")


@quality_app.command("report")
def quality_report(
    results: Annotated[Path | None, typer.Argument(help="A run's folder; else the newest published sweep.")] = None,
) -> None:
    """Differences to MHA with intervals, verdicts, and the smallest effect that could have been seen."""
    from attnlab import report

    rows = _quality_rows(results)
    show(report.quality(rows[rows["run"] == rows["run"].max()]))


@results_app.command("publish")
def results_publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
) -> None:
    """Copy a finished run under bench/results/, where the figures find it."""
    from attnlab.results import publish

    print(publish(run))


def _quality_rows(path: Path | None) -> "pandas.DataFrame":
    from attnlab.results import load_results

    rows = load_results(path)
    rows = rows[rows["kind"] == "quality"]
    if rows.empty:
        where = path or "the published rows"
        raise InputError(f"no finished quality runs at {where}; train some with: attnlab quality run")
    return rows
