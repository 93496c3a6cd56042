"""The command line as a whole: help, and every mistake as one line on stderr with exit code 2.

Commands run in this process; two run as programs.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

import attnlab
from attnlab import cli, report
from attnlab.cli import measuring, models, rows, training, workshop

ROOT = Path(attnlab.__file__).parents[1]
Command = Callable[..., tuple[int, str, str]]


def test_version_and_help(command: Command) -> None:
    """The first two things anybody types."""
    assert command("--version") == (0, f"attnlab {attnlab.__version__}\n", "")
    code, out, err = command()
    assert (code, err) == (0, "")
    for name in (
        "explore",
        "machine",
        "memory",
        "explain",
        "doctor",
        "lab",
        "generate",
        "eval",
        "compare",
        "figures",
        "quality",
        "results",
    ):
        assert re.search(rf"^  {name}  ", out, re.MULTILINE), name
    assert command("--help")[:2] == (0, out)


def commands(part: ModuleType) -> list[tuple[str, Any]]:
    """Every command of a part of the command line, groups' too: what is typed after ``attnlab``, and its function."""
    groups = [("", part.app), *((f"{group.name} ", group.typer_instance) for group in part.app.registered_groups)]
    return [
        (before + (one.name or one.callback.__name__.replace("_", "-")), one.callback)
        for before, app in groups
        for one in app.registered_commands
    ]


WITH_EXAMPLES = [found for part in (measuring, models, rows, training, workshop) for found in commands(part)]


@pytest.mark.parametrize(("name", "function"), WITH_EXAMPLES, ids=[name for name, _ in WITH_EXAMPLES])
def test_every_example_can_be_typed(name: str, function: Any) -> None:
    """An example with last month's option is the first thing a newcomer copies. It fits a line, so that it can be."""
    line = function.__doc__.rstrip().splitlines()[-1].strip()
    program, *words = shlex.split(line.removeprefix("Example: ").partition(" < ")[0])
    assert line.startswith("Example: ") and program == "attnlab" and len(line) <= 76
    command: Any = typer.main.get_command(cli.app)
    for word in name.split():
        assert words.pop(0) == word
        command = command.commands[word]
    command.make_context(name, words)  # raises on an option that is none, and on one that is missing


def test_a_shell_completes_commands() -> None:
    """Completion that is installed and says nothing: a shell asks the program itself, by a variable of its name."""
    asked = {"_ATTNLAB_COMPLETE": "complete_bash", "COMP_WORDS": "attnlab exp", "COMP_CWORD": "1"}
    done = program("-m", "attnlab", **asked)
    assert (done.stdout.split(), done.stderr) == (["explore", "explain"], "")


def test_completion_is_the_roots_alone(command: Command) -> None:
    """On every command its two options would be a third of the help."""
    assert "--install-completion" in command("--help")[1]
    for name in (["memory"], ["quality"], ["quality", "run"]):
        assert "completion" not in command(*name, "--help")[1]


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
    "context-no-number": (["memory", "llama-2-7b", "--context", "k"], "got 'k'; k means 1024 and M 1024², as in 32k"),
    "context-other-unit": (["explain", "llama-2-7b", "--context", "32G"], "got '32G'; k means 1024"),
    "context-k-of-a-fraction": (["memory", "llama-2-7b", "--context", "1.5k"], "max_context, got '1.5k'"),
    "context-absurd": (["memory", "llama-2-7b", "--context", "9999999M"], "context must be between 1 and 2^40"),
    "explain-G": (["explain", "llama-2-7b", "--kv-heads", "5"], "valid: 1, 2, 4, 8, 16, 32"),
    "explain-batch": (["explain", "llama-2-7b", "--batch", "0"], "batch must be between 1 and 2^40, got 0"),
    "explain-card": (["explain", "llama-2-7b", "--card", "h300"], "unknown machine 'h300'; did you mean h"),
    "explain-rate": (["explain", "llama-2-7b", "--dtype", "int8"], "h100 has no matmul rate for int8; known: bfloat16"),
    "explain-price": (["explain", "llama-2-7b", "--price", "-1"], "price must be a number above 0, got -1.0"),
    "port-zero": (["lab", "--port", "0"], "Invalid value for '--port'"),
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
    "no-run": (["compare"], "Missing argument 'RUN'"),
    "absent-run": (
        ["compare", "nowhere"],
        "no rows.jsonl at or below nowhere, and no timed rows of a commit of that name below runs or ",
    ),
    "absent-rows": (["figures", "--results", "nowhere"], "no rows.jsonl at or below nowhere"),
    "absent-sweep": (["quality", "report", "nowhere"], "no rows.jsonl at or below nowhere"),
    "absent-runs": (["quality", "status", "--runs", "nowhere"], "no rows.jsonl at or below nowhere"),
    "absent-finished-run": (["results", "publish", "nowhere"], "nowhere is not a run: it has no rows.jsonl with rows"),
    "absent-directory": (["generate", "nowhere", "hello"], "no directory nowhere; give a directory that holds"),
    "absent-text": (["eval", ".", "--text", "nowhere.txt"], "cannot read nowhere.txt: No such file or directory"),
    "text-a-folder": (["eval", ".", "--text", "."], "cannot read .: Is a directory"),
    "no-text": (["eval", "."], "Missing option '--text'"),
    "seeds-zero": (["quality", "run", "--size", "quick", "--seeds", "none"], "Invalid value for '--seeds'"),
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


def program(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
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
