"""The command line. A mistake is one line on stderr and exit code 2; a bug keeps its traceback.

Heavy imports stand inside the commands, so that ``attnlab --help`` does not wait for torch.
"""

import itertools
import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnlab.errors import InputError, check_choice
from attnlab.shapes import ModelShape, dtype_name

if TYPE_CHECKING:
    import pandas

_plain: Any = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
app = typer.Typer(help="What sharing key/value heads buys and costs, predicted and measured.", **_plain)
quality_app = typer.Typer(help="Train variants beside each other and say what their loss shows.", **_plain)
results_app = typer.Typer(help="Published rows.", **_plain)
app.add_typer(quality_app, name="quality")
app.add_typer(results_app, name="results")

RUNS = Path("runs")
STOPPED = 130  # the shell's exit code for Ctrl-C
# typer hands its parser's usage errors out only through BadParameter's bases
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A published name, a config.json, or a model directory.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtypes = Annotated[str, typer.Option(help="Comma-separated dtypes.")]
Runs = Annotated[Path, typer.Option("--runs", help="Where runs are kept.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 where a check failed, 2 on a mistake, 130 on Ctrl-C."""
    warnings.showwarning = lambda message, *_, **__: print(f"attnlab: note: {message}", file=sys.stderr)
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="attnlab", standalone_mode=False)
    except (_UsageError, InputError) as error:
        text = error.format_message() if isinstance(error, _UsageError) else str(error)  # type: ignore[attr-defined]
        print(f"attnlab: error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    if code == STOPPED:  # what typer makes of Ctrl-C, in some of its versions
        print("attnlab: stopped; run the same command again to go on", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from attnlab import __version__

        print(f"attnlab {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def _shape(model: str) -> ModelShape:
    return ModelShape.from_hf(model) if os.path.exists(model) else ModelShape.published(model)


def _card(card: str) -> Any:
    from attnlab.predict.machine import Machine

    return Machine.load(card) if os.path.exists(card) else Machine.published(card)


@app.command()
def explore(
    device: Device = "auto",
    dtypes: Dtypes = "float32,bfloat16",
    heads: Annotated[int, typer.Option(help="Query heads H.")] = 32,
    grid: Annotated[str, typer.Option(help="quick (minutes) or full.")] = "quick",
    runs: Runs = RUNS,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start a new run instead of continuing the newest.")] = False,
    figures: Annotated[bool, typer.Option(help="Draw the figures at the end.")] = True,
) -> None:
    """Measure this machine: roofs, correctness, cache bytes, decode and prefill over groups, context and batch."""
    from rich.console import Console

    from attnlab import host, report
    from attnlab.explore import explore as fill
    from attnlab.explore import grid as points_of
    from attnlab.progress import progress
    from attnlab.results import Run, load_results, run_folder

    device = host.resolve_device(device)
    facts = host.describe(device)
    points = points_of(grid, device, _dtypes(dtypes), heads)
    folder = run_folder(runs, facts["machine"], fresh=fresh, suffix="-speed")
    print(report.described(facts), flush=True)
    with host.timing(), Run(folder) as run, progress() as advance:
        if run.repaired:
            print(run.repaired)
        machine = fill(run, points, device, advance)
    for line in report.roofs(machine):
        print(line)
    rows = load_results(folder)
    if figures:
        from attnlab.plots import draw_all

        paths = draw_all(rows, folder / "figures")
        print(f"{len(paths)} figure files in {folder / 'figures'}")
    timed = report.timed(rows)
    if (timed["kind"] == "decode").any():
        Console().print(report.explored(rows))
    for line in report.error_lines(rows):
        print(line)
    print(f"rows: {folder / 'rows.jsonl'}")
    if (rows["status"] == "implausible").any():
        print("some points beat their roof and are not believed: see status implausible in the rows")
        raise typer.Exit(1)


@app.command()
def machine(
    device: Device = "auto",
    dtypes: Dtypes = "float32,bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the roofs as JSON, for --card.")] = None,
) -> None:
    """Measure this machine's roofs: read and copy bandwidth, matmul rates, the cost of a call."""
    from attnlab import host, report
    from attnlab.measure import measure_machine

    with host.timing():
        measured = measure_machine(host.resolve_device(device), tuple(_dtypes(dtypes)))
    print("\n".join(report.roofs(measured)))
    if out:
        measured.save(out)
        print(f"written to {out}")


@app.command()
def memory(
    model: Model,
    context: Annotated[str, typer.Option(help="Tokens per sequence, or max_context.")] = "max_context",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "bfloat16",
    kv_dtype: Annotated[str | None, typer.Option(help="Of the cache; the weights' unless given.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Another number of KV heads G.")] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share the model.")] = 1,
    card: Annotated[str, typer.Option(help="A published card or a file from attnlab machine --out.")] = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers as JSON, bytes as integers.")] = False,
) -> None:
    """What a model stores and reads when it decodes, and what each number of KV heads would make of it."""
    from attnlab import report

    shape = _shape(model)
    if kv_heads is not None:
        shape = shape.with_kv_heads(kv_heads)
    tokens = shape.max_context if context == "max_context" else _whole("--context", context)
    dtype = dtype_name(dtype)
    numbers = report.memory_numbers(
        shape, batch, tokens, dtype, dtype_name(kv_dtype or dtype), tensor_parallel, _card(card)
    )
    if as_json:
        print(json.dumps(numbers, indent=1))
        return
    from rich.console import Console

    for table in report.memory_tables(numbers):
        Console().print(table)


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face model directory with a tokenizer.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="The most that are generated.")] = 64,
    kv_heads: Annotated[int | None, typer.Option(help="Mean-pool K and V to this many heads first.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The checkpoint's unless given.")] = None,
    device: Device = "auto",
) -> None:
    """Continue a prompt; print prefill and per-token times on stderr."""
    import statistics
    import time

    import torch

    from attnlab import host
    from attnlab.model.checkpoint import load_hf
    from attnlab.model.convert import to_grouped
    from attnlab.model.generate import generate as continue_tokens
    from attnlab.train.evaluate import load_tokenizer

    model = load_hf(directory, dtype, host.resolve_device(device))
    tokenizer = load_tokenizer(directory)
    if kv_heads is not None:
        model = to_grouped(model, kv_heads)
    ids = list(tokenizer(prompt)["input_ids"])
    tokens = torch.tensor([ids], dtype=torch.int64, device=model.embed_tokens.weight.device)
    # decoded together with the prompt: alone, many tokenizers drop the space before the first new word
    shown = tokenizer.decode(ids, skip_special_tokens=True)
    stamps = [time.perf_counter()]

    def on_token(step: torch.Tensor) -> None:
        nonlocal shown
        ids.append(int(step[0]))  # also waits for the device, so that the stamp is true
        stamps.append(time.perf_counter())
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text

    print(prompt, end="", flush=True)
    continue_tokens(
        model, tokens, max_new_tokens, temperature=temperature, seed=seed, eos=tokenizer.eos_token_id, on_token=on_token
    )
    print()
    steps = [after - before for before, after in itertools.pairwise(stamps[1:])]
    each = f"; then {statistics.median(steps) * 1e3:.2f} ms per token (median of {len(steps)})" if steps else ""
    first = f"{model.shape.variant}: prefill of {tokens.shape[1]} tokens and the first token"
    print(f"{first} {(stamps[1] - stamps[0]) * 1e3:.1f} ms{each}", file=sys.stderr)


@app.command(name="eval")
def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face model directory.")],
    text: Annotated[Path, typer.Option(help="The text to read.")],
    context: Annotated[
        int | None, typer.Option(help="Tokens a prediction may look back on; the model's unless given.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Bits per byte of a model on a text of yours."""
    from attnlab import host
    from attnlab.errors import check_size
    from attnlab.model.checkpoint import load_hf
    from attnlab.train.evaluate import bits_per_byte, tokenized

    try:
        content = text.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {text}: {error.strerror}") from None
    model = load_hf(directory, device=host.resolve_device(device))
    tokens, predicted_bytes = tokenized(model, directory, content)
    window = min(
        check_size("context", context) if context is not None else model.shape.max_context, model.shape.max_context
    )
    bits = bits_per_byte(model, tokens, window, predicted_bytes)
    print(f"{bits:.4f} bits per byte ({len(tokens):,} tokens for {len(content):,} bytes, context {window})")


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(metavar="MY_RUN", help="A run's folder.")],
    reference: Annotated[
        Path | None, typer.Argument(help="Another run; the published headline machine unless given.")
    ] = None,
) -> None:
    """Set a run beside another, or beside the published one."""
    from rich.console import Console

    from attnlab import report
    from attnlab.results import PUBLISHED, headline, load_results

    mine = load_results(run)
    theirs = load_results(reference) if reference else load_results(PUBLISHED / headline())
    Console().print(report.compared(mine, theirs))


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
    from rich.console import Console

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
    Console().print(report.quality(load_results(folder)))


@quality_app.command("status")
def quality_status(runs: Runs = RUNS) -> None:
    """Finished runs of every sweep below a folder."""
    rows = _quality_rows(runs)
    for run, sweep in rows.groupby("run"):
        arms = Counter(zip(sweep["shape.n_kv_heads"].astype(int), sweep["arm"], strict=True))
        print(
            f"{run}: {len(sweep)} runs finished; "
            + ", ".join(f"G={g} {arm} ×{count}" for (g, arm), count in arms.items())
        )


@quality_app.command("report")
def quality_report(
    results: Annotated[
        Path | None, typer.Argument(help="A run's folder; the newest published sweep unless given.")
    ] = None,
) -> None:
    """Differences to MHA with intervals, verdicts, and the smallest effect that could have been seen."""
    from rich.console import Console

    from attnlab import report

    rows = _quality_rows(results)
    Console().print(report.quality(rows[rows["run"] == rows["run"].max()]))


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
        raise InputError(
            f"no finished quality runs at {path or 'the published rows'}; train some with: attnlab quality run"
        )
    return rows


def _dtypes(text: str) -> list[str]:
    names = [dtype_name(name.strip()) for name in text.split(",")]
    return [check_choice("dtype", name, ("float32", "bfloat16", "float16")) for name in names]


def _whole(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option} must be a whole number or max_context, got {text[:40]!r}") from None
