"""The command line: the numbers it prints, and every mistake as one line on stderr with exit code 2.

Commands run in this process, through the same ``main`` that the console script calls; two run as programs.
"""

import json
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import attnlab
from attnlab import cli, host, measure, report, results
from attnlab import explore as explore_module
from attnlab.measure import Inputs, Point
from attnlab.model.checkpoint import save_hf
from attnlab.model.convert import to_grouped
from attnlab.model.llama import Llama
from attnlab.predict.machine import Machine
from attnlab.predict.memory import decode_peak_bytes
from attnlab.results import ROWS, Run
from attnlab.shapes import ModelShape

ROOT = Path(attnlab.__file__).parents[1]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line; its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return exit.value.code, captured.out, captured.err

    return run


@pytest.fixture
def refused(command: Command) -> Callable[..., str]:
    """Run a command line that must be refused, in one line; the line."""

    def run(*arguments: object) -> str:
        code, out, err = command(*arguments)
        assert code == 2, err
        *before, line = err.splitlines(keepends=True)
        assert line.startswith("attnlab: error: ") and line.endswith("\n")
        assert all(re.match(r"\[\d+/\d+] ", step) for step in before)  # progress of what was on its way
        assert out == "" or arguments[0] in ("generate", "explore")
        return line

    return run


@pytest.fixture(autouse=True)
def somewhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing here may be written into the repository, or wait for a training on this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host, "TRAINING_LOCK", tmp_path / "training.lock")
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "published")
    monkeypatch.setenv("COLUMNS", "100")


# --- asking ---------------------------------------------------------------------------------------------------------


def test_version_and_help(command: Command) -> None:
    """The first two things anybody types."""
    assert command("--version") == (0, f"attnlab {attnlab.__version__}\n", "")
    code, out, err = command()
    assert (code, err) == (0, "")
    for name in ("explore", "machine", "memory", "generate", "eval", "compare", "figures", "quality", "results"):
        assert re.search(rf"^  {name}  ", out, re.MULTILINE), name
    assert command("--help")[:2] == (0, out)


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


def test_a_measured_machine_is_a_card(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """``attnlab machine --out`` writes what ``--card`` reads; a reader's own card counts as much as a published one."""
    machine = Machine("mine", "cpu", 12.3e9, 9.8e9, {"float32": 98e9}, 7e-6, 123_456_789)
    asked: list[Any] = []
    monkeypatch.setattr(measure, "measure_machine", lambda *arguments: asked.append(arguments) or machine)
    code, out, err = command("machine", "--device", "cpu", "--dtypes", "fp32, bf16", "--out", "mine.json")
    assert (code, err, asked) == (0, "", [("cpu", ("float32", "bfloat16"))])
    assert out.startswith("reads 12.3 GB/s\n") and out.endswith("written to mine.json\n")
    numbers = json.loads(command("memory", "llama-2-7b", "--card", "mine.json", "--json")[1])
    assert (numbers["card"], numbers["card_bytes"]) == ("mine", 123_456_789)


# --- mistakes -------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no-command": (["quality"], "Missing command"),
    "unknown-command": (["explode"], "No such command 'explode'"),
    "unknown-option": (["memory", "llama-2-7b", "--btch", "3"], "No such option: --btch"),
    "no-model": (["memory"], "Missing argument 'MODEL'"),
    "unknown-model": (["memory", "llama2-70b"], "unknown model 'llama2-70b'; did you mean llama-2-70b or "),
    "long-model": (["memory", "x" * 5000], "unknown model 'xxx"),
    "G-not-a-divisor": (["memory", "llama-2-7b", "--kv-heads", "5"], "valid: 1, 2, 4, 8, 16, 32"),
    "G-zero": (["memory", "llama-2-7b", "--kv-heads", "0"], "n_kv_heads must be between 1 and 2^40, got 0"),
    "P-fits-no-H": (["memory", "llama-2-70b", "--tensor-parallel", "3"], "valid: 1, 2, 4, 8, 16, 32, 64"),
    "P-fits-no-G": (["memory", "llama-7b", "--kv-heads", "1", "--tensor-parallel", "64"], "valid: 1, 2, 4, 8, 16, 32"),
    "batch-zero": (["memory", "llama-2-7b", "--batch", "0"], "batch must be between 1 and 2^40, got 0"),
    "batch-negative": (["memory", "llama-2-7b", "--batch", "-3"], "batch must be between 1"),
    "batch-a-word": (["memory", "llama-2-7b", "--batch", "many"], "Invalid value for '--batch'"),
    "batch-a-fraction": (["memory", "llama-2-7b", "--batch", "1.5"], "Invalid value for '--batch'"),
    "batch-absurd": (["memory", "llama-2-7b", "--batch", str(2**40 + 1)], "batch must be between 1 and 2^40"),
    "bytes-absurd": (["memory", "llama-2-7b", "--batch", str(2**40), "--context", str(2**30)], "more than 2^63 bytes"),
    "context-zero": (["memory", "llama-2-7b", "--context", "0"], "context must be between 1"),
    "context-a-word": (
        ["memory", "llama-2-7b", "--context", "long"],
        "--context must be a whole number or max_context",
    ),
    "context-a-fraction": (["memory", "llama-2-7b", "--context", "1.5"], "whole number or max_context, got '1.5'"),
    "context-two-signs": (["memory", "llama-2-7b", "--context", "--5"], "whole number or max_context, got '--5'"),
    "context-superscript": (["memory", "llama-2-7b", "--context", "²"], "whole number or max_context, got '²'"),
    "context-endless": (["memory", "llama-2-7b", "--context", "9" * 5000], "must be a whole number or max_context"),
    "unknown-dtype": (["memory", "llama-2-7b", "--dtype", "float31"], "unknown dtype 'float31'; did you mean float32"),
    "unknown-kv-dtype": (["memory", "llama-2-7b", "--kv-dtype", "int4"], "unknown dtype 'int4'; did you mean int8"),
    "unknown-card": (["memory", "llama-2-7b", "--card", "h300"], "unknown machine 'h300'; did you mean h"),
    "card-a-folder": (["memory", "llama-2-7b", "--card", "."], ". is not a machine file"),
    "unknown-grid": (["explore", "--grid", "quik"], "unknown grid 'quik'; did you mean quick? valid: quick, full"),
    "unknown-dtypes": (["explore", "--dtypes", "float32,flot16"], "unknown dtype 'flot16'; did you mean float16"),
    "no-dtypes": (["explore", "--dtypes", ""], "unknown dtype ''"),
    "dtype-not-timed": (["explore", "--dtypes", "int8"], "unknown dtype 'int8'; valid: float32, bfloat16, float16"),
    "heads-zero": (["explore", "--heads", "0"], "heads must be between 1"),
    "unknown-device": (["explore", "--device", "mps"], "device 'mps' is not supported; valid: auto, cpu, cuda"),
    "machine-dtype": (["machine", "--dtypes", "bf17"], "unknown dtype 'bf17'; did you mean bf"),
    "no-run": (["compare"], "Missing argument 'MY_RUN'"),
    "absent-run": (
        ["compare", "nowhere"],
        "no rows.jsonl at or below nowhere; give a run's folder, or make one with: ",
    ),
    "absent-rows": (["figures", "--results", "nowhere"], "no rows.jsonl at or below nowhere"),
    "absent-sweep": (["quality", "report", "nowhere"], "no rows.jsonl at or below nowhere"),
    "absent-runs": (["quality", "status", "--runs", "nowhere"], "no rows.jsonl at or below nowhere"),
    "absent-finished-run": (["results", "publish", "nowhere"], "nowhere is not a run: it has no rows.jsonl with rows"),
    "absent-directory": (["generate", "nowhere", "hello"], "no directory nowhere; give a directory that holds"),
    "absent-text": (["eval", ".", "--text", "nowhere.txt"], "cannot read nowhere.txt: No such file or directory"),
    "text-a-folder": (["eval", ".", "--text", "."], "cannot read .: Is a directory"),
    "no-text": (["eval", "."], "Missing option '--text'"),
    "seeds-zero": (["quality", "run", "--quick", "--seeds", "none"], "Invalid value for '--seeds'"),
    "tokens-negative": (["quality", "run", "--tokens", "-1"], "tokens must be between 1"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    """A traceback says where the program stood, not what to type; a box breaks every log it lands in."""
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["explore", "--device", "cuda"],
        ["machine", "--device", "cuda"],
        ["generate", ".", "hello", "--device", "cuda"],
        ["eval", ".", "--text", "text", "--device", "cuda"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_cuda_asked_for_and_absent(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    """Running on the CPU instead, in silence, makes rows that say cuda."""
    (tmp_path / "text").write_text("x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA was asked for, but torch finds no CUDA device here; valid: cpu, auto" in refused(*arguments)


def a_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    with Run(folder) as run:
        for index, row in enumerate(rows):
            run.append(str(index), row)
    return folder


@pytest.mark.parametrize("how", ["damaged", "foreign", "no-rows"])
def test_rows_that_cannot_be_read(refused: Callable[..., str], tmp_path: Path, how: str) -> None:
    """From every command that reads rows: the file and the line, so that it can be looked at."""
    folder = a_run(tmp_path / "r", [{"kind": "quality", "machine": "m-1"}] * 2)
    text = (folder / ROWS).read_text()
    (folder / ROWS).write_text(
        {"damaged": text[:30] + "\n" + text, "foreign": text.replace('"schema": 1', '"schema": 9', 1), "no-rows": ""}[
            how
        ]
    )
    expected = {
        "damaged": "r/rows.jsonl, line 1: not a row of attnlab",
        "foreign": "r/rows.jsonl, line 1: schema 9, this version reads schema 1",
        "no-rows": "no",
    }[how]
    commands = [("compare", folder), ("figures", "--results", folder), ("quality", "report", folder)]
    for arguments in [*commands, ("quality", "status", "--runs", folder), ("results", "publish", folder)]:
        assert expected in refused(*arguments)


def test_rows_of_another_kind(refused: Callable[..., str], tmp_path: Path) -> None:
    """A speed run has no seeds and a sweep no times: neither may end in a KeyError."""
    speed = a_run(tmp_path / "speed", [timed("auto", 2, 1.0)])
    sweep = a_run(tmp_path / "sweep", [{"kind": "quality", "status": "ok", "machine": "m-1"}])
    assert "no finished quality runs at" in refused("quality", "report", speed)
    assert "no finished quality runs at" in refused("quality", "status", "--runs", speed)
    assert "no timed rows in sweep; measure some with: attnlab explore" in refused("compare", speed, sweep)
    assert "no timed rows in sweep" in refused("compare", sweep, speed)
    assert "no headline machine is published" in refused("compare", speed)


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


def test_ctrl_c_says_how_to_go_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C people ask whether it is all lost."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "memory_numbers", interrupted)
    code, out, err = command("memory", "llama-2-7b")
    assert (code, out) == (130, "")
    assert err.strip() == "attnlab: stopped; run the same command again to go on"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug reported as the user's mistake is never mended."""
    monkeypatch.setattr(report, "memory_numbers", lambda *_: {}["absent"])
    with pytest.raises(KeyError, match="absent"):
        cli.main(["memory", "llama-2-7b"])


# --- models ---------------------------------------------------------------------------------------------------------


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


# --- runs -----------------------------------------------------------------------------------------------------------


def timed(impl: str, g: int, median: float, **more: Any) -> dict[str, Any]:
    """One decode row as ``explore`` writes it, as far as tables need it."""
    shape = {"n_heads": 6, "n_kv_heads": g, "head_dim": 10}
    facts = {"kind": "decode", "status": "ok", "machine": "m-1", "shape": shape, "variant": f"GQA-{g}", "batch": 2}
    numbers = {"median": median, "predicted": median, "fraction_of_roof": 0.5, "read_bandwidth": 8e9}
    return {**facts, **numbers, "context": 7, "queries": 1, "dtype": "float32", "impl": impl, **more}


def test_compare_with_another_run_or_the_headline(command: Command, tmp_path: Path) -> None:
    """Mine over theirs, not theirs over mine, whichever way the reference is named."""
    mine = a_run(tmp_path / "mine", [timed("auto", 2, 3.0), timed("auto", 3, 1.0)])
    theirs = a_run(tmp_path / "published" / "m-2" / "r1", [timed("auto", 2, 2.0, machine="m-2")])
    (tmp_path / "published" / "headline.txt").write_text("m-2\n")
    for arguments in ((mine, theirs), (mine,)):
        code, out, err = command("compare", *arguments)
        assert (code, err) == (0, "") and re.search(r"decode +│ +float32 +│ +GQA-2 +│ +1 +│ +1\.50×", out)
        assert "GQA-3" not in out and "m-1 (reads 8 GB/s) beside m-2" in out


def test_publish(command: Command, refused: Callable[..., str], tmp_path: Path) -> None:
    """Under the machine's name; once."""
    run = a_run(tmp_path / "runs" / "m-1" / "r1", [timed("auto", 2, 3.0)])
    target = tmp_path / "published" / "m-1" / "r1"
    assert command("results", "publish", run) == (0, f"{target}\n", "")
    assert (target / ROWS).read_bytes() == (run / ROWS).read_bytes()
    assert f"{target} is published already" in refused("results", "publish", run)


def test_quality_status_and_report(command: Command, tmp_path: Path) -> None:
    """How far a sweep is, and what it shows; of several, the newest."""
    common = {"kind": "quality", "status": "ok", "experiment": "e", "corpus": "c", "machine": "m-1", "tokens": 7000}
    rows = [
        common
        | {"shape": {"n_heads": 6, "n_kv_heads": g}, "arm": "plain", "seed": seed, "n_params": 1000 * g}
        | {"bits_per_byte": 2 + seed / 10 + (g == 2) * (0.5 + seed / 100)}
        for g in (6, 2)
        for seed in range(3)
    ]
    a_run(tmp_path / "runs" / "m-1" / "r1-quality", rows[:4])
    a_run(tmp_path / "runs" / "m-1" / "r2-quality", rows)
    code, out, err = command("quality", "status")
    assert (code, err) == (0, "")
    assert out == "".join(
        f"{run}: {count} runs finished; G=6 plain ×3, G=2 plain ×{count - 3}\n"
        for run, count in (("r1-quality", 4), ("r2-quality", 6))
    )
    code, out, err = command("quality", "report", "runs")
    assert (code, err) == (0, "") and "+0.5100" in out and "worse" in out and "2,000" in out


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> dict[str, Machine]:
    """``explore`` in a second: three points, roofs that take no time to measure (change ``["roofs"]`` to move them)."""
    name = host.describe("cpu")["machine"]
    state = {"roofs": Machine(name, "cpu", 1e15, 1e15, {"float32": 1e18}, 1e-9, 2**40)}
    points = [Point("decode", 6, g, 10, 2, 37, "float32") for g in (6, 2, 1)]
    monkeypatch.setattr(explore_module, "grid", lambda name, device, dtypes, heads: points)
    monkeypatch.setattr(explore_module, "measure_machine", lambda *_: state["roofs"])
    monkeypatch.setattr(explore_module, "refreshed", lambda *_: state["roofs"])
    monkeypatch.setattr(measure, "refreshed", lambda *_: state["roofs"])
    monkeypatch.setattr(explore_module, "new_inputs", lambda facts: Inputs("cpu", 10_007))
    monkeypatch.setattr(explore_module, "awkward_cases", lambda: [(12, 4, 64, 3, 17, True)])
    monkeypatch.setattr(host, "wait_for_quiet", lambda seconds: "")
    return state


EXPLORE = ("explore", "--device", "cpu", "--no-figures")


def test_explore_shows_what_it_found_and_goes_on(
    command: Command, small_grid: dict[str, Machine], tmp_path: Path
) -> None:
    """The main job: a table, the paths, exit code 0; the second time nothing is measured again."""
    code, out, err = command(*EXPLORE)
    assert code == 0
    assert re.search(r"^\W*MHA\W+float32\W+480\b", out, re.M) and re.search(r"^\W*MQA\W+float32\W+80\b", out, re.M)
    assert re.search(r"^26 rows: 22 ok, 4 unsupported\.$", out, re.M)
    assert "Prediction of decode (grouped, 3 points): median error" in out
    path = Path(re.search(r"^rows: (.+)$", out, re.MULTILINE)[1])  # type: ignore[index]
    assert path.parent.name.endswith("-speed") and path.parts[0] == "runs"
    assert "[0/11] roofs of this machine" in err and "[10/11] MQA decode ctx37 b2 fp32" in err
    before = path.read_bytes()
    assert before.count(b"\n") == 26
    with path.open("ab") as file:
        file.write(b'{"schema": 1, "run"')  # as a power cut leaves it
    code, again, _ = command(*EXPLORE)
    assert code == 0 and path.read_bytes() == before
    assert re.search(r"^cut off a torn last line of 19 bytes in .+; its point is done again$", again, re.M)
    assert [path.parent.name for path in Path("runs").rglob(ROWS)] == [path.parent.name]


@pytest.mark.parametrize("all_of_them", [False, True])
def test_explore_fails_when_a_point_beats_its_roof(
    command: Command, small_grid: dict[str, Machine], monkeypatch: pytest.MonkeyPatch, all_of_them: bool
) -> None:
    """Numbers that cannot be must not end like numbers that can: a script would publish them."""
    slow = small_grid["roofs"].__class__(**{**vars(small_grid["roofs"]), "read_bandwidth": 1.0})
    if all_of_them:
        small_grid["roofs"] = slow
    else:
        fill = explore_module.fill_point
        monkeypatch.setattr(
            explore_module,
            "fill_point",
            lambda run, point, *more: fill(run, point, *more[:-1], slow if point.n_kv_heads == 1 else more[-1]),
        )
        monkeypatch.setattr(measure, "refreshed", lambda machine, dtype: machine)
    code, out, _ = command(*EXPLORE)
    assert code == 1
    assert out.endswith("some points beat their roof and are not believed: see status implausible in the rows\n")
    assert f"{15 if all_of_them else 5} implausible" in out and ("MHA" in out) != all_of_them


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_explore_on_a_full_disk(refused: Callable[..., str], command: Command, small_grid: dict[str, Machine]) -> None:
    """Somebody who makes room wants to know that the morning's rows are still there."""
    with full_disk(6000):
        line = refused(*EXPLORE)
    found = re.search(
        r"cannot write to runs/.*/rows\.jsonl: No space left on device; the (\d+) rows before are safe, rerun", line
    )
    assert found and int(found[1]) > 3
    (path,) = Path("runs").rglob(ROWS)
    safe = path.read_bytes()
    assert safe.count(b"\n") == int(found[1]) and safe.endswith(b"\n")
    assert command(*EXPLORE)[0] == 0
    assert path.read_bytes().startswith(safe) and path.read_bytes().count(b"\n") == 26


def test_explore_beside_a_training(refused: Callable[..., str], small_grid: dict[str, Machine]) -> None:
    """Refused before anything is measured, and without an empty run that the next one would continue."""
    with host.training():
        assert "a training or another timing is running on this machine" in refused(*EXPLORE)
    assert not Path("runs").exists()


def test_explore_of_another_machines_run(refused: Callable[..., str], small_grid: dict[str, Machine]) -> None:
    """A folder that was copied along: two machines under one name."""
    folder = results.run_folder(Path("runs"), host.describe("cpu")["machine"], suffix="-speed")
    a_run(folder, [])
    small_grid["roofs"].__class__(**{**vars(small_grid["roofs"]), "name": "another"}).save(folder / "machine.json")
    assert "was begun on another, this is" in refused(*EXPLORE)


# --- as a program ---------------------------------------------------------------------------------------------------


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_a_program_that_answers_without_torch() -> None:
    """``python -m attnlab`` works from a clone, and asking costs no import of torch: seconds, and 200 MB. (That help
    comes within 0.3 s is shown in test_architecture.)"""
    done = program("-X", "importtime", "-m", "attnlab", "memory", "llama-2-7b", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["variant"] == "MHA"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "attnlab.cli" in imported and "torch" not in imported


def test_a_program_that_is_refused() -> None:
    """One line, exit code 2; through the real standard error, which no test has replaced."""
    done = program("-m", "attnlab", "memory", "llama2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("attnlab: error: unknown model 'llama2'; did you mean ")
    assert done.stderr.count("\n") == 1
