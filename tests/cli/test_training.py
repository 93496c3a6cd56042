"""Commands that train, on real text: a folder of pieces of this Python's own sources."""

import email
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnlab.model.checkpoint import load_hf, save_hf
from attnlab.model.llama import Llama
from attnlab.results import Run, load_results
from attnlab.shapes import ModelShape
from attnlab.train.corpus import prepare
from attnlab.train.loop import initial
from attnlab.train.tokenizer import Tokenizer

Command = Callable[..., tuple[int, str, str]]
REPOSITORY = Path(__file__).parent.parent.parent
SOURCES = "".join(path.read_text() for path in sorted(Path(email.__file__).parent.glob("*.py")))[:360_000]
ODD = "x = 1984\t# \u2581grüßt 斑馬 🦓\r\n\0\ufeff<s>  "


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents, of which some go to validation."""
    root = tmp_path_factory.mktemp("texts") / "text"
    root.mkdir()
    for index in range(60):
        (root / f"p{index}.py").write_text(SOURCES[index * 6000 :][:6000])
    return root


@pytest.fixture(scope="session")
def vocabulary(texts: Path) -> bytes:
    return Tokenizer.train([path.read_text() for path in sorted(texts.iterdir())], 1024).model


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda content: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


# --- tokenizers -----------------------------------------------------------------------------------------------------


def test_a_tokenizer_trained_and_used(command: Command, stdin: Callable[[bytes], None], texts: Path) -> None:
    """Text that a terminal would alter comes back byte for byte, through stdin and stdout."""
    code, out, err = command("tokenizer", "train", "own/tokenizer.model", "--text", texts, "--vocab-size", 1031)
    words = Tokenizer.load("own")
    assert (code, out, err) == (0, f"own/tokenizer.model: 1,031 tokens, digest {words.digest}\n", "")
    for text in (ODD, "", SOURCES[:9999]):
        stdin(text.encode())
        code, tokens, err = command("tokenizer", "encode", "own")
        assert (code, err) == (0, "") and [int(token) for token in tokens.split()] == words.encode(text)
        stdin(tokens.encode())
        assert command("tokenizer", "decode", "own/tokenizer.model") == (0, text, "")


@pytest.mark.slow
def test_a_round_trip_through_pipes(vocabulary: bytes) -> None:
    """In processes of their own: what stdout's encoding or newline translation would alter."""
    Path("tokenizer.model").write_bytes(vocabulary)
    attnlab = f"{sys.executable} -m attnlab tokenizer"
    line = f"{attnlab} encode tokenizer.model | {attnlab} decode tokenizer.model"
    plain = environment() | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], input=ODD.encode(), capture_output=True, env=plain)
    assert (done.returncode, done.stdout, done.stderr) == (0, ODD.encode(), b"")


def test_tokenizers_that_are_refused(
    refused: Callable[..., str], stdin: Callable[[bytes], None], texts: Path, vocabulary: bytes
) -> None:
    """Every one in a line, without SentencePiece's own words on stderr."""
    Path("t.model").write_bytes(vocabulary)
    Path("junk.model").write_bytes(b"junk")
    Path("small.txt").write_text("abc")
    for arguments, said in (
        (("train", "o", "--text", texts, "--vocab-size", 512), "vocab_size must be between 1024"),
        (("train", "o", "--text", texts, "--vocab-size", 40000), "must be between 1,024 and 32,768, got 40,000"),
        (("train", "o", "--text", "small.txt"), "no vocabulary of 1,024 can be learned from this text"),
        (("train", "o", "--text", "absent"), "absent holds no text; give a folder"),
        (("train", "t.model/o", "--text", texts), "cannot write t.model/o"),
        (("encode", "absent"), "cannot read the tokenizer absent: No such file"),
        (("encode", "junk.model"), "not a SentencePiece model"),
    ):
        assert said in refused("tokenizer", *arguments)
    assert not Path("o").exists()
    for verb, content, said in (
        ("encode", b"caf\xe9", "the text is not UTF-8"),
        ("decode", b"3 4 five", "expected whole numbers with spaces between: .*'five'"),
        ("decode", b"\xff", "expected whole numbers"),
        ("decode", b"3 1024", "token 1024 is not below the vocabulary's 1,024"),
        ("decode", b"-1", "token -1 is not below"),
    ):
        stdin(content)
        assert re.search(said, refused("tokenizer", verb, "t.model"))


# --- sweeps ---------------------------------------------------------------------------------------------------------


def a_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    with Run(folder) as run:
        for index, row in enumerate(rows):
            run.append(str(index), row)
    return folder


def test_quality_status_and_report(command: Command, tmp_path: Path) -> None:
    """How far a sweep is, what of it failed, and what it shows; of several, the newest."""
    common = {"kind": "quality", "status": "ok", "experiment": "e", "corpus": "c", "machine": "m-1", "tokens": 7000}
    rows = [
        common
        | {"shape": {"n_heads": 6, "n_kv_heads": g}, "arm": "plain", "seed": seed, "n_params": 1000 * g}
        | {"bits_per_byte": 2 + seed / 10 + (g == 2) * (0.5 + seed / 100)}
        for g in (6, 2)
        for seed in range(3)
    ]
    a_run(tmp_path / "runs" / "m-1" / "r1-quality", rows[:4])
    failed = rows[0] | {"status": "diverged", "seed": 3}
    a_run(tmp_path / "runs" / "m-1" / "r2-quality", [*rows, failed])
    code, out, err = command("quality", "status")
    assert (code, err) == (0, "")
    assert out == "".join(
        f"{run}, e: {said}\n"
        for run, said in (
            ("r1-quality", "4 rows; G=6 plain ×3, G=2 plain ×1"),
            ("r2-quality", "7 rows; G=6 plain ×4, G=2 plain ×3; 1 diverged"),
        )
    )
    code, out, err = command("quality", "report", "runs")
    assert (code, err) == (0, "") and "+0.5100" in out and "worse" in out and "2,000" in out


def test_sweeps_that_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    """Before a corpus is built: building one takes minutes."""
    for arguments, said in (
        (("--experiments", "g-swep"), "unknown experiment 'g-swep'; did you mean g-sweep?"),
        (("--size", "huge"), "unknown size 'huge'"),
        (
            ("--size", "34m", "--experiments", "scale"),
            "unknown experiment for size 34m 'scale'; did you mean recall?",
        ),
        (("--size", "quick", "--experiments", "recall"), "unknown experiment for size quick 'recall'"),
        (("--text", "absent"), "absent holds no text"),
    ):
        for verb in ("plan", "run"):
            assert said in refused("quality", verb, *arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_sweep_of_ones_own_text(command: Command, texts: Path) -> None:
    """The whole road from a folder of files to verdicts, every option on it, and nothing done twice."""
    sweep = ("--size", "0.3m", "--experiments", "g-sweep", "--seeds", 2, "--tokens", 3 * 4 * 256, "--text", texts)
    code, out, _ = command("quality", "plan", *sweep)
    assert code == 0 and re.search(r"g-sweep +14 .* 0 of 14\b", out) and not list(Path("runs").rglob("rows.jsonl"))
    code, out, err = command("quality", "run", *sweep)
    assert code == 0 and "Traceback" not in err and "GQA-2" in out and "MQA" in out
    rows = load_results(Path("runs"))
    assert len(rows) == 14 and set(rows["experiment"]) == {"g-sweep"} and (rows["status"] == "ok").all()
    assert rows["bits_per_byte"].between(1, 9).all() and (rows["tokens"] == 3072).all()
    assert re.search(r"g-sweep +14 .* 14 of 14\b", command("quality", "plan", *sweep)[1])
    assert command("quality", "run", *sweep)[0] == 0 and len(load_results(Path("runs"))) == 14


# --- one model ------------------------------------------------------------------------------------------------------


def a_model(directory: Path, vocabulary: bytes | None, vocab_size: int = 1024) -> Path:
    shape = ModelShape(2, 24, 6, 6, 4, 40, vocab_size, max_context=64, tied_embeddings=True)
    save_hf(initial(shape, 3), directory)
    if vocabulary:
        (directory / "tokenizer.model").write_bytes(vocabulary)
    return directory


OPTIONS = ("--batch", 4, "--context", 32, "--rate", 0.01, "--device", "cpu")


@pytest.mark.slow
def test_a_converted_model_trained_on(command: Command, texts: Path, vocabulary: bytes) -> None:
    """What it prints is what a reader gets who loads the directory that it wrote; the text is the model's tokens."""
    a_model(Path("mha"), vocabulary)
    assert command("convert", "mha", "gqa", "--kv-heads", 2)[0] == 0
    code, out, err = command("uptrain", "gqa", "out", "--tokens", 32 * 4 * 60, "--text", texts, *OPTIONS)
    assert code == 0, err
    before, after = map(float, re.fullmatch(r"out: ([\d.]+) → ([\d.]+) bits per byte .*\n", out).groups())  # type: ignore[union-attr]
    assert after < before - 0.5
    model, corpus = (
        load_hf("out", "float32", "cpu"),
        prepare(str(texts), 1024, Path("runs/corpora"), Tokenizer.load("out")),
    )
    assert model.shape.n_kv_heads == 2 and Tokenizer.load("out").model == vocabulary
    assert corpus.evaluate(model, 32, whole=True)["bits_per_byte"] == pytest.approx(after, abs=1e-4)
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_killed_uptraining_goes_on(command: Command, texts: Path, vocabulary: bytes) -> None:
    """From its own checkpoint, to the same weights; and never from one that another model or text left for this OUT,
    for the recipe in a checkpoint names neither."""
    a_model(Path("a"), vocabulary)
    a_model(Path("b"), vocabulary)
    torch.manual_seed(5)
    save_hf(Llama(load_hf("b", "float32", "cpu").shape), "b")
    saving = "import attnlab.train.loop as l, attnlab.cli as c; l.SAVE_EVERY_SECONDS = 0.0; c.main()"
    arguments = [str(part) for part in ("--tokens", 32 * 4 * 100, "--text", texts, *OPTIONS)]
    killed = subprocess.Popen([sys.executable, "-c", saving, "uptrain", "a", "out", *arguments], env=environment())
    deadline = time.monotonic() + 200
    while not list(Path().glob(".out.*.previous")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    (left,) = Path().glob(".out.*.previous")
    assert 0 < torch.load(left, weights_only=True)["step"] < 100 and not Path("out").exists()
    said = []
    for model, out in (("b", "out"), ("a", "whole"), ("a", "out")):
        code, line, _ = command("uptrain", model, out, *arguments)
        assert code == 0 and left.exists() == (out != "out" or model == "b")
        said.append(line.partition(": ")[2])
        Path(out).rename(f"{model}-{out}")
    assert said[0] != said[1] == said[2]
    whole, resumed = (load_hf(name, "float32", "cpu").state_dict() for name in ("a-whole", "a-out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_models_that_are_not_trained(refused: Callable[..., str], texts: Path, vocabulary: bytes) -> None:
    """Nothing is written before all of it is known to be right."""
    a_model(Path("m"), vocabulary)
    a_model(Path("mute"), None)
    a_model(Path("narrow"), vocabulary, 1000)
    for model, out, tokens, more, said in (
        ("m", "m", 9999, (), "m exists; give a new directory"),
        ("absent", "o", 9999, (), "absent"),
        ("mute", "o", 9999, (), "cannot read the tokenizer mute/tokenizer.model"),
        ("narrow", "o", 9999, (), "narrow: 1,024 tokens, but the model has 1,000"),
        ("m", "o", 128, (), "tokens=128 are 1 steps of 4 × 32 tokens; at least 2 are needed"),
        ("m", "o", 9999, ("--rate", 0), "peak_rate must be a number above 0"),
        ("m", "o", 10**8, ("--batch", 20000), "fewer than a batch of 20000"),
    ):
        assert said in refused("uptrain", model, out, "--tokens", tokens, "--text", texts, *OPTIONS, *more)
    assert not Path("o").exists()
    config = json.loads(Path("m/config.json").read_text())
    assert config["num_key_value_heads"] == 6
