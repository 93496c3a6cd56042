"""Commands that train: sweeps of variants, one converted model, a tokenizer."""

import math
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnlab.cli.options import PLAIN, RUNS, Device, Fresh, Minutes, Runs, show
from attnlab.errors import InputError

if TYPE_CHECKING:
    import pandas

    from attnlab.train.quality import Planned

app = typer.Typer(**PLAIN)
quality_app = typer.Typer(help="Train variants beside each other and say what their loss shows.", **PLAIN)
tokenizer_app = typer.Typer(help="LLaMA's kind of tokenizer, for your text.", **PLAIN)
app.add_typer(quality_app, name="quality")
app.add_typer(tokenizer_app, name="tokenizer")

CORPORA = Path("runs/corpora")
Names = Annotated[str, typer.Option("--experiments", help="Names with commas between, or all.")]
Size = Annotated[str, typer.Option(help="Of the g-sweep: quick (a toy, a minute in all), 0.3m … 1.7m, 34m for a card.")]
Seeds = Annotated[int | None, typer.Option(help="Of each arm of the g-sweep; 5 unless given.")]
Tokens = Annotated[int | None, typer.Option(help="Training tokens of each run of the g-sweep; 4 million unless given.")]
Text = Annotated[str, typer.Option(help="stdlib, site-packages, a folder, file, glob, or saved Hugging Face data set.")]
TokenizerFile = Annotated[Path, typer.Argument(metavar="TOKENIZER", help="A tokenizer.model, or its directory.")]


@quality_app.command("plan")
def quality_plan(
    experiments: Names = "all",
    size: Size = "0.6m",
    seeds: Seeds = None,
    tokens: Tokens = None,
    text: Text = "stdlib",
    runs: Runs = RUNS,
    device: Device = "cpu",
) -> None:
    """Runs, tokens and predicted hours of every experiment, and what is done of it; nothing is started.

    Example: attnlab quality plan --experiments g-sweep --seeds 3
    """
    folder = _folder(runs, size, False, device)
    _show_plan(_declared(folder, experiments, text, size, seeds, tokens, device), folder, device)


@quality_app.command("run")
def quality_run(
    experiments: Names = "all",
    size: Size = "0.6m",
    seeds: Seeds = None,
    tokens: Tokens = None,
    text: Text = "stdlib",
    runs: Runs = RUNS,
    fresh: Fresh = False,
    minutes: Minutes = math.inf,
    device: Device = "cpu",
    tensorboard: Annotated[Path | None, typer.Option(help="Write losses there too, for TensorBoard.")] = None,
) -> None:
    """Train what the experiments declare, side by side, one process per core; killed, it goes on where it was.

    Example: attnlab quality run --size quick
    """
    from attnlab.progress import progress
    from attnlab.results import Run, load_results
    from attnlab.train.quality import run_sweep
    from attnlab.trained import quality_tables

    folder = _folder(runs, size, fresh, device)
    planned = _declared(folder, experiments, text, size, seeds, tokens, device)
    _show_plan(planned, folder, device)
    print(f"rows go to {folder}", file=sys.stderr)
    write = _tensorboard(tensorboard)
    with progress(minutes) as advance:

        def report(label: str, step: int, steps: int, loss: float, state: str) -> None:
            write(label, loss, step)
            advance(f"{label}, loss {loss:.3f}, {state}", step, steps)

        for last in dict.fromkeys(run.experiment for run in planned):
            trained = -1
            while len(planned) > trained:  # rows of some runs decide what others of their experiment there are
                trained = len(planned)
                with Run(folder) as run:
                    run.plan(key for each in planned for key in each.row_keys())
                end = max(index for index, each in enumerate(planned, 1) if each.experiment == last)
                run_sweep(folder, planned[:end], report, device)
                planned = _declared(folder, experiments, text, size, seeds, tokens, device)
    show(*quality_tables(load_results(folder)))


@quality_app.command("status")
def quality_status(runs: Runs = RUNS) -> None:
    """Rows of every sweep below a folder, by experiment and arm: one a run, of uptraining one an α, of recall one a
    setting; and how many diverged.

    Example: attnlab quality status --runs runs
    """
    for (run, experiment), sweep in _quality_rows(runs).groupby(["run", "experiment"], sort=False):
        arms = Counter(zip(sweep["shape.n_kv_heads"].astype(int), sweep["arm"], strict=True))
        counts = ", ".join(f"G={g} {arm} ×{count}" for (g, arm), count in arms.items())
        lost = f"; {failed} diverged" if (failed := int((sweep["status"] != "ok").sum())) else ""
        print(f"{run}, {experiment}: {len(sweep)} rows; {counts}{lost}")


@quality_app.command("report")
def quality_report(
    results: Annotated[Path | None, typer.Argument(help="A run's folder; else the newest published sweeps.")] = None,
) -> None:
    """Differences to MHA with intervals, verdicts, and the smallest effect that could have been seen.

    Example: attnlab quality report
    """
    from attnlab.trained import quality_tables

    show(*quality_tables(_quality_rows(results)))


@app.command()
def uptrain(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face model directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the trained model goes.")],
    tokens: Annotated[int, typer.Option(help="Training tokens.")],
    text: Text = "stdlib",
    rate: Annotated[float, typer.Option(help="Learning rate, constant after its warm-up.")] = 3e-5,
    batch: Annotated[int, typer.Option(help="Sequences in a step.")] = 8,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    recompute: Annotated[bool, typer.Option("--recompute", help="Gradient checkpointing.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a model on, as a converted one needs; killed, it goes on where it was.

    Example: attnlab uptrain OUT TRAINED --tokens 10000000
    """
    from attnlab import host
    from attnlab.model.checkpoint import load_hf, save_hf
    from attnlab.progress import progress
    from attnlab.results import row_key
    from attnlab.train.corpus import prepare
    from attnlab.train.loop import forget, train
    from attnlab.train.recipe import Recipe
    from attnlab.train.tokenizer import Tokenizer

    if out.exists():
        raise InputError(f"{out} exists; give a new directory")
    words = Tokenizer.load(directory)
    model = load_hf(directory, "float32", device)
    if words.vocab_size > model.shape.vocab_size:
        raise InputError(f"{directory}: {words.vocab_size:,} tokens, but the model has {model.shape.vocab_size:,}")
    corpus = prepare(text, words.vocab_size, CORPORA, words)
    again, autocast = recompute, device == "cuda"
    recipe = Recipe(model.shape, seed, tokens, batch, context, rate, "constant", recompute=again, autocast=autocast)
    start = row_key({"model": str(directory.resolve()), "corpus": corpus.digest})  # what the recipe does not say
    checkpoint = out.with_name(f".{out.name}.{start}.pt")
    with host.training(), progress() as advance:
        result = train(
            recipe,
            corpus,
            checkpoint,
            lambda step, loss: advance(f"loss {loss:.3f}", step, recipe.steps),
            model=model,
            marks=(0,),
            device=device,
        )
    if result["status"] != "ok":
        raise InputError(f"the training diverged: {result['reason']}; give a smaller --rate than {rate:g}")
    save_hf(model, out)
    words.save(out / "tokenizer.model")
    forget(checkpoint)
    print(f"{out}: {result['marks'][0][1]:.4f} → {result['bits_per_byte_raw']:.4f} bits per byte of validation text")


@tokenizer_app.command("train")
def tokenizer_train(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The tokenizer.model to write.")],
    vocab_size: Annotated[int, typer.Option(help="1,024 to 32,768.")] = 1024,
    text: Text = "stdlib",
) -> None:
    """Learn a vocabulary from a text.

    Example: attnlab tokenizer train tokenizer.model --text FOLDER
    """
    from attnlab.train.corpus import read_documents
    from attnlab.train.tokenizer import Tokenizer

    words = Tokenizer.train((document for _, document in read_documents(text)), vocab_size)
    words.save(out)
    print(f"{out}: {words.vocab_size:,} tokens, digest {words.digest}")


@tokenizer_app.command("encode")
def tokenizer_encode(tokenizer: TokenizerFile) -> None:
    """Text on stdin to tokens on stdout, as numbers.

    Example: attnlab tokenizer encode tokenizer.model < text.txt
    """
    from attnlab.train.tokenizer import Tokenizer

    words = Tokenizer.load(tokenizer)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the text is not UTF-8: {error}") from None
    print(*words.encode(text))


@tokenizer_app.command("decode")
def tokenizer_decode(tokenizer: TokenizerFile) -> None:
    """Tokens on stdin, as numbers, to text on stdout.

    Example: attnlab tokenizer decode tokenizer.model < tokens.txt
    """
    from attnlab.train.tokenizer import Tokenizer

    words = Tokenizer.load(tokenizer)
    try:
        tokens = [int(number) for number in sys.stdin.read().split()]
    except ValueError as error:
        raise InputError(f"expected whole numbers with spaces between: {error}") from None
    sys.stdout.buffer.write(words.decode(tokens).encode())


def _declared(
    folder: Path, experiments: str, text: str, size: str, seeds: int | None, tokens: int | None, device: str
) -> "list[Planned]":
    from attnlab.results import stored_rows
    from attnlab.train.corpus import prepare
    from attnlab.train.sweeps import SIZES, chosen, declared

    names = chosen(experiments, size)  # before a corpus is built, which takes minutes
    corpus = prepare(text, SIZES[size].vocab_size, CORPORA)
    budget = {name: value for name, value in (("seeds", seeds), ("tokens", tokens)) if value is not None}
    return declared(names, corpus, size, stored_rows(folder), budget, autocast=device == "cuda")


def _folder(runs: Path, size: str, fresh: bool, device: str) -> Path:
    from attnlab import host
    from attnlab.results import run_folder

    suffix = "-quick" if size == "quick" else "-quality"
    return run_folder(runs, host.describe(device)["machine"], fresh=fresh, suffix=suffix)


def _show_plan(planned: "list[Planned]", folder: Path, device: str) -> None:
    from attnlab.measure.roofs import matmul_rate
    from attnlab.trained import plan_table

    show(plan_table(planned, folder, matmul_rate("bfloat16" if device == "cuda" else "float32", device)))


def _tensorboard(folder: Path | None) -> Any:
    if folder is None:
        return lambda label, loss, step: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs: pip install tensorboard") from None
    writer = SummaryWriter(str(folder))
    return lambda label, loss, step: writer.add_scalar(f"loss/{label}", loss, step)


def _quality_rows(path: Path | None) -> "pandas.DataFrame":
    from attnlab.results import load_results

    rows = load_results(path)
    rows = rows[rows["kind"] == "quality"]
    if rows.empty:
        where = path or "the published rows"
        raise InputError(f"no finished quality runs at {where}; train some with: attnlab quality run")
    return rows
