"""A text that every reader of this already has: the Python standard library's own sources, as bytes.

Bytes are the vocabulary (256 symbols), so loss in bits per byte needs no tokenizer. Files go to training or validation
whole, by a hash of their path, so the split is the same on every machine with the same Python.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from attnlab.errors import InputError

VALIDATION_SHARE = 1 / 25


@dataclass(frozen=True)
class Corpus:
    """Training and validation text as uint8 tensors of bytes."""

    train: Tensor
    validation: Tensor

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of the whole text: rows of different corpora must not be compared."""
        return hashlib.sha256(torch.cat([self.train, self.validation]).numpy().data).hexdigest()[:16]

    def batch(self, seed: int, step: int, batch: int, context: int) -> Tensor:
        """``batch`` random windows of ``context`` + 1 bytes, [batch, context + 1] int64. A function of (seed, step)
        alone: arms of one seed see the same data in the same order, and a resumed run goes on exactly where it
        stopped."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - context, (batch, 1), generator=generator)
        return self.train[starts + torch.arange(context + 1)].long()


def standard_library(max_bytes: int | None = None) -> Corpus:
    """The ``.py`` sources of the running Python without site-packages; ``max_bytes`` keeps the first files only."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if "site-packages" in relative or "dist-packages" in relative:
            continue
        text = path.read_bytes()
        first = int.from_bytes(hashlib.sha256(relative.encode()).digest()[:8], "big")
        parts[first < VALIDATION_SHARE * 2**64].append(text)
        total += len(text)
        if max_bytes is not None and total >= max_bytes and all(parts):
            break
    if not all(parts):
        raise InputError(f"no Python sources below {root}; the quality runs need the standard library's .py files")
    train, validation = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return Corpus(train, validation)
