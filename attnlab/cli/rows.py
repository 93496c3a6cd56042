"""Commands that read rows."""

from pathlib import Path
from typing import Annotated

import typer

from attnlab.cli.options import PLAIN, RUNS, show

app = typer.Typer(**PLAIN)
results_app = typer.Typer(help="Published rows.", **PLAIN)
app.add_typer(results_app, name="results")


@app.command()
def compare(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or rows.jsonl, or a commit.")],
    after: Annotated[str | None, typer.Argument(metavar="AFTER", help="Another; else the headline machine.")] = None,
) -> None:
    """Name the points whose times differ between two runs or commits; or set a run beside the published one.

    Example: attnlab compare HEAD~1 HEAD
    """
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
    style: Annotated[str, typer.Option(help="blog, slide (1920 pixels wide) or paper (PDF on white).")] = "blog",
) -> None:
    """Draw every figure from rows, for light pages and dark ones, and a gallery of them: same rows, same bytes.

    Example: attnlab figures --only quality --style slide --out slides
    """
    from attnlab.plots import draw_all
    from attnlab.results import load_results

    for path in draw_all(load_results(results), out, only=only, kind=style):
        print(path)


@app.command()
def page(
    results: Annotated[Path | None, typer.Option(help="Rows to show; the published ones unless given.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("figures/explorer.html"),
) -> None:
    """Write the explorer: one HTML file that predicts for any shape and shows what was measured.

    Example: attnlab page --out explorer.html
    """
    from attnlab.page import write
    from attnlab.results import load_results

    write(load_results(results), out)
    print(out)


@app.command()
def post(
    results: Annotated[Path | None, typer.Option(help="Rows to tell of; the published ones unless given.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write, beside the figures.")] = Path("figures/post.md"),
) -> None:
    """Write the blog post, with every number put in from rows; one that no row supports is an error.

    Example: attnlab post --out figures/post.md
    """
    from attnlab.errors import write_whole
    from attnlab.post import build
    from attnlab.results import load_results

    write_whole(out, build(load_results(results)))
    print(out)


@results_app.command("publish")
def results_publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    partial: Annotated[bool, typer.Option("--partial", help="Of an unfinished run, what is there.")] = False,
) -> None:
    """Copy a finished run under bench/results/, where the figures find it.

    Example: attnlab results publish runs/MACHINE/RUN
    """
    from attnlab.results import publish

    print(publish(run, partial=partial))
