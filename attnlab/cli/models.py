"""Commands about a model: what it stores, what it says, how well it predicts a text."""

import itertools
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from attnlab.cli.options import PLAIN, Device, Model, card_of, shape_of, show, tokens_of
from attnlab.errors import InputError
from attnlab.shapes import dtype_name

app = typer.Typer(**PLAIN)

Tokens = Annotated[str, typer.Option(help="Tokens per sequence, as 4096 or 32k (32·1024), or max_context.")]
Card = Annotated[str, typer.Option(help="A published card or a file from attnlab machine --out.")]


@app.command()
def memory(
    model: Model,
    context: Tokens = "max_context",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "bfloat16",
    kv_dtype: Annotated[str | None, typer.Option(help="Of the cache; the weights' unless given.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Another number of KV heads G.")] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share the model.")] = 1,
    card: Card = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers as JSON, bytes as integers.")] = False,
) -> None:
    """What a model stores and reads when it decodes, and what each number of KV heads would make of it.

    Example: attnlab memory llama-2-70b --context 4096 --batch 32
    """
    from attnlab import report

    shape = shape_of(model)
    if kv_heads is not None:
        shape = shape.with_kv_heads(kv_heads)
    dtype, tokens = dtype_name(dtype), tokens_of(context, shape)
    numbers = report.memory_numbers(
        shape, batch, tokens, dtype, dtype_name(kv_dtype or dtype), tensor_parallel, card_of(card)
    )
    if as_json:
        print(json.dumps(numbers, indent=1))
        return
    show(*report.memory_tables(numbers))


@app.command()
def explain(
    model: Model,
    kv_heads: Annotated[int | None, typer.Option(help="Another number of KV heads G.")] = None,
    context: Tokens = "max_context",
    batch: Annotated[int | None, typer.Option(help="Sequences; as many as fit unless given.")] = None,
    card: Card = "h100",
    dtype: Annotated[str, typer.Option(help="Of weights and cache.")] = "bfloat16",
    price: Annotated[float | None, typer.Option(help="Dollars that an hour of the card costs.")] = None,
) -> None:
    """Say in a dozen sentences what a model's KV heads cost and save: memory, speed, money, quality.

    Example: attnlab explain llama-3-8b --kv-heads 2 --context 32k --price 2.50
    """
    from attnlab import explain as said
    from attnlab.results import load_results

    shape, dtype = shape_of(model), dtype_name(dtype)
    if kv_heads is not None:
        shape = shape.with_kv_heads(kv_heads)
    tokens = tokens_of(context, shape)
    lines = said.memory(shape, tokens, dtype) + said.speed(shape, card_of(card), tokens, batch, dtype, price)
    try:
        quality = said.quality(load_results(), shape)
    except InputError as error:  # a copy without rows, or with none of a finished sweep
        quality = f"Quality: not measured ({error})."
    print("\n".join([*lines, said.parameters(shape), quality]))


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
    """Continue a prompt; print prefill and per-token times on stderr.

    Example: attnlab generate DIR "Once upon a time" --kv-heads 8
    """
    import statistics
    import time

    import torch

    from attnlab.model.checkpoint import load_hf
    from attnlab.model.convert import to_grouped
    from attnlab.model.generate import generate as continue_tokens
    from attnlab.train.evaluate import load_tokenizer

    model = load_hf(directory, dtype, device)
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


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A Hugging Face model directory.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    kv_heads: Annotated[int, typer.Option(help="KV heads G; must divide the present number.")],
    method: Annotated[str, typer.Option(help="mean, first, random or aligned.")] = "mean",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a model directory.")] = False,
    seed: Annotated[int, typer.Option(help="Of random.")] = 0,
) -> None:
    """Share KV heads in a checkpoint, shard by shard; then train it a little, for much is lost at first.

    Example: attnlab convert DIR OUT --kv-heads 4 --method aligned
    """
    from attnlab.model.convert import convert_directory

    shape = convert_directory(source, target, kv_heads, method, force=force, seed=seed)
    before, dtype = shape_of(str(source)), "bfloat16"
    print(
        f"{target}: {before.variant} → {shape.variant} ({method}), KV cache per token in {dtype} "
        f"{before.kv_bytes_per_token(dtype):,} → {shape.kv_bytes_per_token(dtype):,} bytes"
    )


@app.command(name="eval")
def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face model directory.")],
    text: Annotated[Path, typer.Option(help="The text to read.")],
    context: Annotated[int | None, typer.Option(help="Tokens to look back on; the model's unless given.")] = None,
    device: Device = "auto",
) -> None:
    """Bits per byte of a model on a text of yours.

    Example: attnlab eval DIR --text FILE
    """
    from attnlab.errors import check_size
    from attnlab.model.checkpoint import load_hf
    from attnlab.train.evaluate import bits_per_byte, tokenized

    try:
        content = text.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {text}: {error.strerror}") from None
    model = load_hf(directory, device=device)
    tokens, predicted_bytes = tokenized(model, directory, content)
    longest = model.shape.max_context
    window = longest if context is None else min(check_size("context", context), longest)
    bits = bits_per_byte(model, tokens, window, predicted_bytes)
    print(f"{bits:.4f} bits per byte ({len(tokens):,} tokens for {len(content):,} bytes, context {window})")
