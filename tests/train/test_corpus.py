"""The text, its split and its batches: what must be alike between machines, between arms, and after a restart."""

import sysconfig
from pathlib import Path

import pytest
import torch

from attnlab.errors import InputError
from attnlab.train import corpus as module
from attnlab.train.corpus import Corpus, standard_library


def a_library(root: Path, names: list[str]) -> Path:
    """A tree of sources, each file a single line that names it three times."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<{name}>" * 3)
    return root


def read(root: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int | None = None) -> tuple[list[str], list[str]]:
    """Lines of training and of validation text."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    text = standard_library(max_bytes)
    train, validation = (part.numpy().tobytes().decode().split("\n") for part in (text.train, text.validation))
    return train, validation


FILES = [f"{folder}m{number}.py" for folder in ("", "json/", "test/deep/") for number in range(101)]


def test_files_go_whole_to_one_side(tmp_path, monkeypatch):
    """A split inside files, or by random lines, shows the model its validation text: every file stands whole in
    exactly one part, and about one in 25 in validation."""
    train, validation = read(a_library(tmp_path, FILES), monkeypatch)
    assert sorted(train + validation) == sorted(f"<{name}>" * 3 for name in FILES)
    assert 0.01 < len(validation) / len(FILES) < 0.08


def test_the_split_is_the_same_wherever_the_library_lies(tmp_path, monkeypatch):
    """Python's own hash() is salted, absolute paths differ, and a folder's order is the file system's: each of them
    gives every machine its own validation set, and losses that cannot be compared. The names are written down here,
    because published rows were evaluated on the text that this rule picks."""
    here = read(a_library(tmp_path / "usr/lib", FILES), monkeypatch)
    there = read(a_library(tmp_path / "opt", FILES[::-1]), monkeypatch)
    assert here == there
    held_out = [f"m{n}" for n in (15, 5, 61, 74, 81, 85, 93)] + [f"json/m{n}" for n in (32, 4, 47, 70, 76)]
    held_out += [f"test/deep/m{n}" for n in (12, 64, 86, 99)]
    assert sorted(here[1]) == sorted(f"<{name}.py>" * 3 for name in held_out)


def test_a_new_file_moves_no_other(tmp_path, monkeypatch):
    """A split by position (every 25th file) reshuffles everything when a Python release adds one module."""
    before, _ = read(a_library(tmp_path, FILES), monkeypatch)
    after, _ = read(a_library(tmp_path, ["aaa.py"]), monkeypatch)
    assert set(before) <= set(after)


def test_only_the_standard_library_is_read(tmp_path, monkeypatch):
    """Installed packages differ from reader to reader; so would the corpus."""
    extra = ["site-packages/torch/a.py", "dist-packages/b.py", "__pycache__/c.pyc", "README.txt"]
    train, validation = read(a_library(tmp_path, FILES + extra), monkeypatch)
    assert len(train) + len(validation) == len(FILES)


def test_a_small_corpus_has_both_parts(tmp_path, monkeypatch):
    """Cut short before the first validation file, evaluation would have nothing to read."""
    train, validation = read(a_library(tmp_path, FILES), monkeypatch, max_bytes=1)
    assert validation[0] and train[0] and len(train) + len(validation) < len(FILES)


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    """Some distributions ship byte code alone: one line, not an empty tensor."""
    with pytest.raises(InputError, match="no Python sources below"):
        read(a_library(tmp_path, ["zip.pyc"]), monkeypatch)


def test_the_text_of_this_python():
    """The real thing: large enough to train on, bytes as they lie on disk, about 4 % held out."""
    text = standard_library()
    assert len(text.train) > 8_000_000
    share = len(text.validation) / (len(text.train) + len(text.validation))
    assert abs(share - module.VALIDATION_SHARE) < 0.02
    assert b"def dataclass(" in text.train.numpy().tobytes() + text.validation.numpy().tobytes()


def a_corpus(length: int = 997) -> Corpus:
    generator = torch.Generator().manual_seed(5)
    return Corpus(*torch.randint(256, (2, length), generator=generator, dtype=torch.uint8))


def test_a_batch_is_a_function_of_seed_and_step_alone():
    """A generator that lives through the run gives a resumed run other data than an undisturbed one, and torch's
    global generator gives other data to a model with more weights to initialise."""
    text, order = a_corpus(), [(3, 11), (0, 0), (3, 12), (0, 11)]
    first = {pair: text.batch(*pair, 5, 7) for pair in order}
    torch.manual_seed(13)
    torch.randn(17)
    state = torch.get_rng_state()
    for pair in reversed(order):
        assert torch.equal(text.batch(*pair, 5, 7), first[pair])
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_and_steps_see_different_data():
    """One seed for all makes three "seeds" one run and the interval a lie; one batch for all steps overfits."""
    text = a_corpus()
    batches = [text.batch(seed, step, 5, 7) for seed in (0, 1, 2) for step in (0, 1, 2)]
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 9


def test_windows_are_stretches_of_training_text():
    """A window from validation text, with a gap, or one byte short (so that a target is missing), trains quietly."""
    text, context = Corpus(torch.arange(19, dtype=torch.uint8), torch.full((19,), 99, dtype=torch.uint8)), 7
    seen = set()
    for step in range(50):
        windows = text.batch(1, step, 3, context)
        assert windows.shape == (3, context + 1) and windows.dtype == torch.int64
        assert torch.equal(windows, windows[:, :1] + torch.arange(context + 1))
        seen |= set(windows[:, 0].tolist())
    assert seen == set(range(19 - context))  # the last byte is reached, and nothing beyond it


def test_the_digest_tells_corpora_apart():
    """Rows of two Python releases look alike but for this: one changed byte, or text moved between the parts."""
    text, other = a_corpus(), a_corpus()
    assert text.digest == other.digest and len(text.digest) == 16
    changed = text.train.clone()
    changed[500] ^= 1
    assert Corpus(changed, text.validation).digest != text.digest
    assert Corpus(text.validation, text.train).digest != text.digest
