"""Real text as tokens: the Python standard library's sources, which every reader has, or one's own files.

A corpus is built once into one file, atomically, and read as a memory map: the tokenizer, learned from the training
documents alone, tokens of training and validation text, and a header that says what they were made from. Documents go
to one side whole, by a hash of their path; near-duplicates (most lines shared) follow the first of them, since a text
seen in training validates nothing. Loss is told in bits per byte, so that vocabularies compare; gzip and xz, which read
the same validation bytes without any training, are told beside it.
"""

import glob
import gzip
import hashlib
import lzma
import os
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnlab.errors import InputError
from attnlab.model.llama import Llama
from attnlab.train.evaluate import bits_by_position, bits_per_byte
from attnlab.train.tokenizer import Tokenizer

# Python sources that are there without a download: some 30 MB everywhere, and hundreds where torch is installed.
OWN = {"stdlib": "stdlib", "site-packages": "purelib"}
VALIDATION_SHARE = 1 / 25
SPLIT_RULE = "1: by sha256 of the path, 1 in 25; files that share half of their lines stay together"
VOCABULARY_TEXT = 2**25  # characters; more change a vocabulary little and take SentencePiece many minutes
SAMPLE_TOKENS = 32_768  # what a point of a curve is measured on


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of training and validation text, [N] each, a document's end after each document; what they stand for."""

    path: Path
    train: Tensor
    validation: Tensor
    tokenizer: Tokenizer
    header: dict[str, str]

    def __reduce__(self) -> Any:
        return load, (self.path,)  # another process maps the file instead of getting a copy

    @property
    def digest(self) -> str:
        """Names text, vocabulary and split: rows of different corpora must not be compared."""
        return self.header["digest"]

    def batch(self, seed: int, step: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step, [batch, context] int64 each. A function of its arguments alone: windows in an
        order drawn from ``seed``, none twice in a pass (which leaves out the few that fill no batch), so that arms of
        one seed see the same text in the same order and a resumed run goes on exactly where it stopped."""
        windows = (len(self.train) - 1) // context
        if batch > windows:
            raise InputError(
                f"the training text has {windows} windows of {context} tokens, fewer than a batch of {batch}"
            )
        per_pass = windows // batch
        order = _order(windows, seed, step // per_pass)
        at = step % per_pass * batch
        starts = order[at : at + batch, None] * context
        tokens = self.train[starts + torch.arange(context + 1)].long()
        return tokens[:, :-1], tokens[:, 1:]

    def evaluate(self, model: Llama, context: int, whole: bool) -> dict[str, Any]:
        """Bits per byte on the validation text, or on its beginning; of the whole also by ``positions`` in a window:
        [first, last, bits per byte], the bytes of a token taken alike everywhere."""
        if not whole:
            tokens = self.validation[:SAMPLE_TOKENS]
            text_bytes = len(self.tokenizer.decode(tokens.tolist()).encode())
            return {"bits_per_byte": bits_per_byte(model, tokens, context, text_bytes)}
        bits, counts = bits_by_position(model, self.validation, context)
        text_bytes = int(self.header["validation_bytes"])
        spans = [(0, min(7, context - 1))] + [(at, min(2 * at, context) - 1) for at in _doublings(8, context)]
        share = text_bytes / counts.sum().item()
        sums = [(a, b, bits[a : b + 1].sum().item(), counts[a : b + 1].sum().item() * share) for a, b in spans]
        by = [[a, b, cost / stood_for] for a, b, cost, stood_for in sums if stood_for]  # a short text ends before some
        return {"bits_per_byte": bits.sum().item() / text_bytes, "positions": by}

    def parts(self) -> list[dict[str, Any]]:
        """A run on text ends in one row."""
        return [{}]

    def facts(self) -> dict[str, Any]:
        """What rows say of it."""
        said = {name: float(self.header[name]) for name in ("gzip_bits", "xz_bits")}
        return said | {"validation_bytes": int(self.header["validation_bytes"]), "tokenizer": self.tokenizer.digest}


def _doublings(first: int, end: int) -> list[int]:
    return [first << i for i in range(end.bit_length()) if first << i < end]


@lru_cache(4)
def _order(windows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def prepare(source: str, vocab_size: int, folder: Path, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus of ``source`` (a name in ``OWN``, a folder, a file, a glob, or a saved Hugging Face data set) with a
    vocabulary of ``vocab_size``, from its file in ``folder``, made first if need be. Raises ``InputError`` where the
    text is empty, binary, too small, or has changed since its tokens were made."""
    documents = dict(read_documents(source))
    text_digest = _digest(f"{name}\0{text}" for name, text in documents.items())
    name = hashlib.sha256(f"{source}\0{vocab_size}".encode()).hexdigest()[:8]
    vocabulary = tokenizer.digest if tokenizer else str(vocab_size)
    path = folder / f"{Path(source).stem.strip('*') or 'text'}-{vocabulary}-{name}.safetensors"
    if not path.exists():
        _build(path, documents, text_digest, vocab_size, tokenizer)
    corpus = load(path)
    if corpus.header["text"] != text_digest:
        raise InputError(
            f"{source} has changed since the tokens in {path} were made; remove that file to make them anew"
        )
    return corpus


def load(path: Path) -> Corpus:
    """The corpus in a file that ``prepare`` made, its tokens memory-mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            parts = {name: file.get_tensor(name) for name in ("train", "validation", "tokenizer")}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no readable corpus: {error}; remove it to make it anew") from None
    tokenizer = Tokenizer(parts["tokenizer"].numpy().tobytes())
    if header.get("split") != SPLIT_RULE or header.get("tokenizer") != tokenizer.digest:
        raise InputError(f"{path} was made by another split rule or tokenizer; remove it to make it anew")
    return Corpus(path, parts["train"], parts["validation"], tokenizer, header)


def read_documents(source: str) -> Iterable[tuple[str, str]]:
    """(name, text) of every document, by name. Files that are no UTF-8 text are left out, of a user's own counted in a
    warning."""
    signs = ("dataset_info.json", "dataset_dict.json")
    if source not in OWN and any((Path(source) / sign).exists() for sign in signs):
        yield from _data_set(source)
        return
    root = Path(sysconfig.get_paths()[OWN[source]] if source in OWN else source)
    if source in OWN:
        others = {"site-packages", "dist-packages"}
        paths = [path for path in root.rglob("*.py") if not others & set(path.relative_to(root).parts)]
    elif root.is_dir():
        paths = [
            path for path in root.rglob("*") if not any(part.startswith(".") for part in path.relative_to(root).parts)
        ]
    else:
        names = [source] if root.is_file() else glob.glob(source, recursive=True)  # a name may hold signs of a glob
        paths, root = [Path(name) for name in names], Path(".")
    found, strange = 0, []
    for path in sorted(path for path in paths if path.is_file()):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            strange.append(name)
            continue
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        if "\0" in text:
            strange.append(name)
        elif text:
            found += 1
            yield name, text
    if strange and source not in OWN and found:
        warnings.warn(f"{len(strange)} files of {source} are no UTF-8 text and left out, as {strange[0]}", stacklevel=2)
    if not found:
        what = f"only binary files, as {strange[0]}" if strange else "no text"
        raise InputError(
            f"{source} holds {what}; give a folder, a file or a glob of UTF-8 text files, or {' or '.join(OWN)}"
        )


def _data_set(source: str) -> Iterable[tuple[str, str]]:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise InputError("reading a Hugging Face data set needs: pip install 'attnlab[datasets]'") from None
    try:
        stored = load_from_disk(source)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the data set {source}: {error}") from None
    if isinstance(stored, dict):
        if "train" not in stored:
            raise InputError(f"{source} has no part 'train', only {', '.join(stored)}")
        stored = stored["train"]
    if "text" not in stored.column_names:
        raise InputError(f"{source} has no column 'text', only {', '.join(stored.column_names)}")
    for index, text in enumerate(stored["text"]):
        if text:
            yield f"{index:09d}", text


def _build(
    path: Path, documents: dict[str, str], text_digest: str, vocab_size: int, tokenizer: Tokenizer | None
) -> None:
    leader = near_duplicates(documents)
    sides: tuple[list[str], list[str]] = ([], [])
    for name, text in documents.items():
        first = int.from_bytes(hashlib.sha256(leader[name].encode()).digest()[:8], "big")
        sides[first < VALIDATION_SHARE * 2**64].append(text)
    if not all(sides):
        raise InputError(
            f"{len(documents)} documents are too few to keep some for validation; give more, or smaller ones"
        )
    if tokenizer is None:  # learned from as much text as it takes, spread over all
        every = -(-sum(map(len, sides[0])) // VOCABULARY_TEXT)
        tokenizer = Tokenizer.train(sides[0][::every], vocab_size)
    dtype = torch.int16 if tokenizer.vocab_size <= 2**15 else torch.int32
    tensors = {
        side: torch.cat([torch.tensor([*tokenizer.encode(text), tokenizer.end], dtype=dtype) for text in texts])
        for side, texts in zip(("train", "validation"), sides, strict=True)
    }
    tensors["tokenizer"] = torch.frombuffer(bytearray(tokenizer.model), dtype=torch.uint8)
    content = "".join(sides[1]).encode()
    header = {
        "split": SPLIT_RULE,
        "text": text_digest,
        "tokenizer": tokenizer.digest,
        "documents": str(len(documents)),
        "train_bytes": str(sum(len(text.encode()) for text in sides[0])),
        "validation_bytes": str(len(content)),
        "gzip_bits": str(8 * len(gzip.compress(content, 9)) / len(content)),
        "xz_bits": str(8 * len(lzma.compress(content, preset=9)) / len(content)),
        "digest": hashlib.sha256(f"{text_digest}{tokenizer.digest}{SPLIT_RULE}".encode()).hexdigest()[:16],
    }
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, header)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def near_duplicates(documents: dict[str, str]) -> dict[str, str]:
    """Name of each document -> name of the first one whose lines it mostly shares (its own where none is): all of them,
    or at least half of the distinct lines of the shorter one, lines that are everywhere (in more than 20 documents) not
    counted."""
    lines = {
        name: {line.strip() for line in text.split("\n") if len(line.strip()) > 3} for name, text in documents.items()
    }
    where: dict[str, list[str]] = defaultdict(list)
    for name, own in lines.items():
        for line in own:
            where[line].append(name)
    rare = {line: names for line, names in where.items() if len(names) <= 20}
    size = {name: sum(line in rare for line in own) for name, own in lines.items()}
    shared: dict[tuple[str, str], int] = defaultdict(int)
    for names in rare.values():
        for index, one in enumerate(names):
            for other in names[index + 1 :]:
                shared[one, other] += 1
    first_with: dict[str, str] = {}
    leader = {name: first_with.setdefault(documents[name], name) for name in sorted(documents)}
    for (one, other), count in sorted(shared.items()):
        if 2 * count >= min(size[one], size[other]):
            first, second = _top(leader, one), _top(leader, other)
            leader[max(first, second)] = min(first, second)
    return {name: _top(leader, name) for name in documents}


def _top(leader: dict[str, str], name: str) -> str:
    while leader[name] != name:
        name = leader[name]
    return name


def _digest(parts: Iterable[str]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() + b"\0")
    return whole.hexdigest()[:16]
