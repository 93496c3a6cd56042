"""Commands about a model: the numbers they print are the model's."""

import json
import math
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from attnlab import report
from attnlab.model.checkpoint import load_hf, save_hf
from attnlab.model.convert import to_grouped
from attnlab.model.llama import Llama
from attnlab.predict.machine import Machine
from attnlab.predict.memory import decode_peak_bytes
from attnlab.shapes import ModelShape

Command = Callable[..., tuple[int, str, str]]


def test_memory_as_json_is_the_predictors(command: Command) -> None:
    """A script reads these: bytes are whole numbers, and every option reaches the predictor."""
    options = ("--batch", 3, "--context", 4096, "--dtype", "fp16", "--kv-dtype", "fp8", "--tensor-parallel", 2)
    code, out, err = command("memory", "llama-2-70b", *options, "--card", "a100-80gb", "--json")
    assert (code, err) == (0, "")
    numbers = json.loads(out)
    shape, card = ModelShape.published("llama-2-70b"), Machine.published("a100-80gb")
    assert numbers == report.memory_numbers(shape, 3, 4096, "float16", "float8", 2, card)
    assert numbers["peak"]["kv_cache"] == 3 * 4096 * 2 * 80 * 4 * 128  # four of eight heads, one byte each


def test_memory_defaults(command: Command) -> None:
    """The model's whole context, one sequence, 16 bit; another G is another model."""
    numbers = json.loads(command("memory", "llama-2-7b", "--json")[1])
    assert (numbers["context"], numbers["batch"], numbers["dtype"], numbers["kv_dtype"]) == (
        *(4096, 1),
        *("bfloat16", "bfloat16"),
    )
    assert numbers["peak"]["kv_cache"] == 2 * 32 * 32 * 128 * 2 * 4096 and numbers["card"] == "h100"
    shape = ModelShape.published("llama-2-7b").with_kv_heads(8)
    grouped = json.loads(command("memory", "llama-2-7b", "--kv-heads", 8, "--json")[1])
    assert grouped["variant"] == "GQA-8"
    assert grouped["peak"]["total"] == decode_peak_bytes(shape, 1, 4096).total


def test_memory_prints_tables(command: Command) -> None:
    """For people: the terms, and all variants beside each other."""
    code, out, err = command("memory", "llama-3-8b")
    assert (code, err) == (0, "")
    assert "llama-3-8b (GQA-8, 8,030,261,248 parameters)" in out and "GQA-8 ←" in out
    assert re.search(r"kv cache +│ +1,073,741,824 │ +1\.000", out)


@pytest.mark.parametrize(("said", "tokens"), [("32k", 32 * 1024), ("32K", 32 * 1024), ("1M", 1024**2), ("7", 7)])
def test_contexts_in_k_are_powers_of_two(command: Command, said: str, tokens: int) -> None:
    """A model card's 32k is 32,768: with a k of 1000 a full context would not fit what was called enough for it."""
    numbers = json.loads(command("memory", "llama-2-70b", "--context", said, "--json")[1])
    assert numbers["context"] == tokens and numbers["peak"]["kv_cache"] == tokens * 320 * 1024


def test_explain_says_what_was_asked(command: Command) -> None:
    """Every option reaches its sentence; without published rows quality is not measured, and not zero."""
    options = ("--kv-heads", 1, "--context", "8k", "--batch", 3, "--card", "h200", "--dtype", "fp32", "--price", 4.5)
    code, out, err = command("explain", "llama-2-7b", *options)
    heads, token, cache, _, room, own, mha, parameters, quality = out.splitlines()
    assert (code, err) == (0, "") and heads.startswith("llama-2-7b is MQA: 32 query heads read 1 KV head, R = 32")
    assert token.startswith("A token adds 32 KiB of float32 ") and cache.startswith("8,192 tokens, beyond the 4,096 ")
    assert room.startswith("h200 holds 131.3 GiB") and mha.startswith(
        "MHA, predicted from published peaks, not measured"
    )
    assert "measured: 3 sequences; a step of " in own
    (tokens,) = (float(found) for found in re.findall(r"([\d.]+) tokens/s in all", own))
    (dollars,) = (float(found) for found in re.findall(r"\$([\d.]+) per million", own))
    assert dollars == pytest.approx(4.5 / 3600 / tokens * 1e6, rel=1e-3)
    assert parameters.startswith(f"Sharing leaves out {32 * 2 * 4096 * 31 * 128:,} parameters")
    assert quality.startswith("Quality: not measured (no rows.jsonl at or below ")


def test_explain_without_options(command: Command) -> None:
    """The model's own heads and context, as many sequences as fit, and no price that nobody gave."""
    code, out, err = command("explain", "llama-3-8b")
    assert (code, err) == (0, "") and "$" not in out
    assert "is GQA-8: " in out and "8,192 tokens are 1.00 GiB of cache" in out and "h100 holds 80.0 GiB" in out
    fit = (80 * 2**30 - 2 * 8_030_261_248) // 2**30  # activations are MiB, and what is left over is 0.04 GiB more
    assert f"sequences that fit: GQA-8 {fit}, " in out and f"not measured: {fit} sequences; " in out


CONFIG = {
    "model_type": "mistral",
    "num_hidden_layers": 2,
    "hidden_size": 26,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 34,
    "vocab_size": 58,
    "max_position_embeddings": 8192,
    "sliding_window": None,
}


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("window", [None, 4095])
def test_memory_of_ones_own_model(command: Command, tmp_path: Path, window: int | None) -> None:
    """A config.json or the directory around it. A window that is counted as absent is said, on stderr, where it does
    not end up in a script's JSON."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG | {"sliding_window": window}))
    for model in (tmp_path / "m", tmp_path / "m" / "config.json"):
        code, out, err = command("memory", model, "--json")
        numbers = json.loads(out)
        assert code == 0 and numbers["peak"]["kv_cache"] == 2 * 2 * 2 * 10 * 2 * 8192
        if window is None:
            assert err == ""
        else:
            assert err.startswith("attnlab: note: sliding window of 4095 tokens counted as if absent: ")
            assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "cannot run model_type 'gpt2'; valid: llama, mistral"),
        ({"model_type": "qwen3"}, "qwen3"),
        ({"num_local_experts": 8}, "it has experts (num_local_experts=8)"),
        ({"sliding_window": 7}, "sliding window"),
        (None, "no config.json at"),
    ],
    ids=["gpt2", "qwen3", "experts", "window", "none"],
)
def test_a_checkpoint_of_another_architecture(
    refused: Callable[..., str], tmp_path: Path, config: dict[str, Any] | None, message: str
) -> None:
    """Loaded all the same, its numbers would be those of no model at all."""
    (tmp_path / "m").mkdir()
    (tmp_path / "text").write_text("some text")
    if config is not None:
        (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG | config))
    for arguments in (("eval", tmp_path / "m", "--text", tmp_path / "text"), ("generate", tmp_path / "m", "hello")):
        assert message in refused(*arguments)


def lively(vocab: int, n_kv_heads: int = 3) -> Llama:
    """Weights large enough that what comes next depends on the context."""
    torch.manual_seed(17)
    model = Llama(ModelShape(2, 18, 6, n_kv_heads, 10, 19, vocab, max_context=23))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize(("context", "window"), [(None, 23), (7, 7), (99, 23)])
def test_eval_is_bits_per_byte(command: Command, tmp_path: Path, context: int | None, window: int) -> None:
    """Nats for bits, a mean of means over windows, or a first byte counted as predicted: each gives another model.
    Here the same number by numpy, window by window; the last window is shorter."""
    save_hf(model := lively(256), tmp_path / "m")
    content = "Wörter, 101 € and more: ".encode() * 3
    (tmp_path / "text").write_bytes(content)
    options = [] if context is None else ["--context", context]
    code, out, err = command("eval", tmp_path / "m", "--text", tmp_path / "text", *options)
    assert (code, err) == (0, "")
    bits = 0.0
    for start in range(0, len(content) - 1, window):
        read = content[start : start + window + 1]
        with torch.no_grad():
            logits = model.double()(torch.tensor([list(read[:-1])]))[0].numpy()
        chances = numpy.exp(logits - logits.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        bits -= sum(math.log2(chances[i, byte]) for i, byte in enumerate(read[1:]))
    n = len(content)
    expected = f"{bits / (n - 1):.4f} bits per byte ({n} tokens for {n} bytes, context {window})\n"
    assert (n - 1) % window and out == expected


def test_eval_of_too_little(refused: Callable[..., str], tmp_path: Path) -> None:
    """Nothing can be predicted of an empty text, or of one byte."""
    save_hf(lively(256), tmp_path / "m")
    for text, message in ((b"", "the text is empty"), (b"x", "the text has 1 tokens, at least 2 are needed")):
        (tmp_path / "text").write_bytes(text)
        assert message in refused("eval", tmp_path / "m", "--text", tmp_path / "text")
    (tmp_path / "text").write_bytes(b"enough")
    for context, message in (("0", "context must be between 1"), ("-2", "context must be between 1")):
        assert message in refused("eval", tmp_path / "m", "--text", tmp_path / "text", "--context", context)


WORDS = ["<end>", *("the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "from", "dog", "to")]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose tokenizer has a token per word."""
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("talker") / "m"
    save_hf(lively(len(WORDS)), directory)
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return directory


def continued(model: Llama, prompt: list[str], new: int) -> list[str]:
    """Greedy without a cache, until ``<end>``."""
    tokens = [WORDS.index(word) for word in prompt]
    for _ in range(new):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] == 0:
            break
    return [WORDS[token] for token in tokens if token]


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_generate_continues_the_prompt(command: Command, talker: Path, kv_heads: int | None) -> None:
    """Printed as it comes, each word once; a step's time on stderr, where it is not part of the text."""
    model = lively(len(WORDS))
    if kv_heads:
        model = to_grouped(model, kv_heads)
    options = ["--kv-heads", kv_heads] if kv_heads else []
    code, out, err = command("generate", talker, "the cat sat", "--max-new-tokens", 9, *options)
    expected = continued(model, ["the", "cat", "sat"], 9)
    assert (code, out) == (0, " ".join(expected) + "\n")
    assert len(set(expected[3:])) > 2  # else a loop of one word would pass
    variant = "MQA" if kv_heads else "GQA-3"
    times = r"prefill of 3 tokens and the first token [\d.]+ ms; then [\d.]+ ms per token \(median of \d\)"
    assert re.fullmatch(rf"{variant}: {times}\n", err)


def test_generate_refuses_what_does_not_fit(refused: Callable[..., str], talker: Path, tmp_path: Path) -> None:
    """The cache would overflow in the middle of a sentence."""
    assert "3 prompt tokens + 21 new = 24 exceed the model's context of 23; valid: max_new_tokens up to 20" in refused(
        "generate", talker, "the cat sat", "--max-new-tokens", 21
    )
    assert "the prompt is empty" in refused("generate", talker, "")
    assert "n_kv_heads=2 does not divide the model's 3 KV heads; valid: 1, 3" in refused(
        "generate", talker, "the", "--kv-heads", 2
    )
    assert "temperature must be 0" in refused("generate", talker, "the", "--max-new-tokens", 2, "--temperature", -1)
    assert "a model cannot compute in int8" in refused("generate", talker, "the", "--dtype", "int8")
    save_hf(lively(len(WORDS)), tmp_path / "mute")
    assert "no readable tokenizer in" in refused("generate", tmp_path / "mute", "the")


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory``, hidden ones too."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", [None, "first", "random", "aligned"])
def test_convert_writes_what_to_grouped_makes(
    command: Command, talker: Path, tmp_path: Path, method: str | None
) -> None:
    """The method and the seed reach the conversion, and the result talks: its tokenizer came along."""
    options = [] if method is None else ["--method", method, "--seed", 5]
    code, out, err = command("convert", talker, tmp_path / "m", "--kv-heads", 1, *options)
    said = f"{tmp_path / 'm'}: GQA-3 → MQA ({method or 'mean'}), KV cache per token in bfloat16 240 → 80 bytes\n"
    assert (code, out, err) == (0, said, "")
    expected, written = to_grouped(lively(len(WORDS)), 1, method or "mean", 5), load_hf(tmp_path / "m")
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in written.state_dict().items())
    code, out, _ = command("generate", tmp_path / "m", "the cat sat", "--max-new-tokens", 9)
    assert (code, out) == (0, " ".join(continued(expected, ["the", "cat", "sat"], 9)) + "\n")


def test_convert_refuses_what_it_cannot_do(refused: Callable[..., str], command: Command, tmp_path: Path) -> None:
    """Each in one line, with nothing written: a model that takes an hour to convert is not replaced by accident."""
    save_hf(lively(23), tmp_path / "m")
    save_hf(lively(23, 1), tmp_path / "taken")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    before = contents(tmp_path)
    new, g = tmp_path / "new", ("--kv-heads", 1)
    for arguments, message in (
        ((tmp_path / "m", new, "--kv-heads", 2), "n_kv_heads=2 does not divide the model's 3 KV heads; valid: 1, 3"),
        ((tmp_path / "m", new, "--kv-heads", 6), "n_kv_heads=6 does not divide"),
        ((tmp_path / "m", new, "--kv-heads", 0), "n_kv_heads must be between 1"),
        ((tmp_path / "m", new), "Missing option '--kv-heads'"),
        ((tmp_path / "m", new, *g, "--method", "alinged"), "unknown method 'alinged'; did you mean aligned?"),
        ((tmp_path / "m", tmp_path / "taken", *g), "taken exists; give a new directory, or --force"),
        ((tmp_path / "m", tmp_path / "notes", *g, "--force"), "not empty and not a model directory"),
        ((tmp_path / "m", tmp_path / "m", *g, "--force"), "onto itself; give another directory"),
        ((tmp_path / "m", tmp_path / "link", *g, "--force"), "onto itself; give another directory"),
        ((tmp_path / "m", tmp_path / "m" / "config.json" / "x", *g), "cannot save to"),
        ((tmp_path / "absent", new, *g), "no directory"),
        ((tmp_path / "notes", new, *g), "no config.json at"),
    ):
        assert message in refused("convert", *arguments)
        assert contents(tmp_path) == before
    assert command("convert", tmp_path / "m", tmp_path / "taken", *g, "--force")[0] == 0
    assert load_hf(tmp_path / "taken").shape == lively(23).shape.with_kv_heads(1)


def test_a_full_disk_costs_no_model(refused: Callable[..., str], tmp_path: Path) -> None:
    """Here no file may grow beyond 4 KiB, which the system enforces as it enforces a full disk."""
    save_hf(lively(23), tmp_path / "m")
    save_hf(lively(23, 1), tmp_path / "taken")
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        for out in ("new", "taken"):
            said = refused("convert", tmp_path / "m", tmp_path / out, "--kv-heads", 1, "--force")
            assert "cannot save to" in said and "File too large" in said and "what was there is unchanged" in said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before
