"""Recall from context, as a task: facts first, then questions, and nothing can be known but by looking back.

``relations=1`` is multi-query associative recall (MQAR) as in Zoology (arXiv 2312.04927, figure 2): keys, each followed
by its value; behind them every key once more, at gaps that follow a power law, with zeros between. The target where a
key comes again is its value. Unlike there, a model trains on short and long sequences in turn: on the longest alone
none here learns to look anything up within minutes.

``relations=r`` is the harder form. A fact is r keys, each from its own part of the vocabulary, and then the value; a
question is one of the r, drawn at random. So each value must be found by any of r names, and one KV head has its
``head_dim`` numbers for all of them, while G heads can share them out.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.errors import InputError, check_size
from attnlab.model.llama import Llama

POWER = 0.01  # chance of a gap i is proportional to i^(POWER - 1), as Zoology's
HELD_OUT = 2**31  # torch seeds a CPU generator with 32 bits: training has the lower half of them, evaluation the rest
CHUNKS, CHUNK = 8, 64  # held-out sequences of each setting: 512, of which a quick look takes the first 64


@dataclass(frozen=True)
class Recall:
    """Facts in each of the ``settings`` (length of a sequence, pairs). Keys are the lower half of the vocabulary
    without 0, in ``relations`` equal parts, and values the upper half. Raises ``InputError`` where a relation has fewer
    keys than pairs are asked for, or a length does not hold them."""

    settings: tuple[tuple[int, int], ...]
    relations: int = 1
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        for name, size in (("relations", self.relations), ("vocab_size", self.vocab_size)):
            check_size(name, size)
        for length, pairs in self.settings:
            check_size("pairs", pairs)
            if self._keys < pairs:
                raise InputError(
                    f"a vocabulary of {self.vocab_size} has {self._keys} keys for each of {self.relations} relations, "
                    f"and {pairs} pairs need as many; at least {2 * self.relations * pairs + 2} symbols would do"
                )
            told = pairs * (self.relations + 1)
            if (check_size("length", length) - told) // 2 < pairs:
                raise InputError(
                    f"{pairs} pairs of {self.relations} relations take {told} tokens to tell and {2 * pairs} to ask, "
                    f"which a length of {length} does not hold"
                )

    @property
    def _keys(self) -> int:
        """Of one relation."""
        return (self.vocab_size // 2 - 1) // self.relations

    @property
    def digest(self) -> str:
        """Names the data: all of it follows from these numbers."""
        sizes = "-".join(f"{length}x{pairs}" for length, pairs in self.settings)
        return f"recall-{sizes}-{self.relations}-{self.vocab_size}"

    def facts(self) -> dict[str, Any]:
        """What rows say of it."""
        return {"relations": self.relations, "task_vocab": self.vocab_size}

    def parts(self) -> list[dict[str, Any]]:
        """A row for each setting."""
        return [{"context": length, "pairs": pairs} for length, pairs in self.settings]

    def batch(self, seed: int, step: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        """Fresh inputs and targets for one step, as many sequences of the setting whose turn it is as make batch ×
        context tokens, int64, −100 where nothing is asked; a function of the arguments alone."""
        length, pairs = self.settings[step % len(self.settings)]
        return self._draw((seed * 1_000_003 + step) % HELD_OUT, max(1, batch * context // length), length, pairs)

    def evaluate(self, model: Llama, context: int, whole: bool) -> dict[str, Any]:
        """``accuracy``: share of the questions of held-out sequences whose likeliest token is the value, the mean over
        settings, and each one's in ``parts``; the same sequences for every model."""
        device, parts = model.embed_tokens.weight.device, []
        with torch.inference_mode():
            for part in self.parts():
                right = asked = 0
                for chunk in range(CHUNKS if whole else 1):
                    inputs, targets = self._draw(HELD_OUT + chunk, CHUNK, part["context"], part["pairs"])
                    at = targets >= 0
                    found = model.logits(model.hidden(inputs.to(device))[at.to(device)]).argmax(-1).cpu()
                    right += int((found == targets[at]).sum())
                    asked += int(at.sum())
                parts.append({**part, "accuracy": right / asked})
        return {"accuracy": sum(part["accuracy"] for part in parts) / len(parts), "parts": parts}

    def _draw(self, seed: int, batch: int, length: int, pairs: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def distinct(weights: Tensor) -> Tensor:
            return torch.multinomial(weights.expand(batch, -1), pairs, generator=generator)  # [batch, pairs]

        half, told = self.vocab_size // 2, pairs * (self.relations + 1)
        keys = torch.stack([distinct(torch.ones(self._keys)) + 1 + r * self._keys for r in range(self.relations)], -1)
        values = distinct(torch.ones(self.vocab_size - half)) + half
        inputs = F.pad(torch.cat([keys, values[..., None]], -1).flatten(1), (0, length - told))
        # a question takes two places, as a fact of MQAR does: itself, and one where the model's answer would stand
        gaps = torch.arange(1, (length - told) // 2 + 1)
        at = told + 2 * distinct(gaps ** (POWER - 1))
        relation = torch.randint(self.relations, (batch, pairs, 1), generator=generator)
        inputs.scatter_(1, at, keys.gather(2, relation)[..., 0])
        return inputs, torch.full((batch, length), -100).scatter_(1, at, values)
