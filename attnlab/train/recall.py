"""Recall from context, as a task: facts first, then questions, and nothing can be known but by looking back.

``relations=1`` is multi-query associative recall (MQAR) as in Zoology (arXiv 2312.04927): ``pairs`` keys, each followed
by its value; behind them every key once more, at gaps that follow a power law, random tokens between. The target where
a key comes again is its value.

``relations=r`` is the harder form. A fact is r keys, each from its own part of the vocabulary, and then the value; a
question is one of the r, drawn at random. So each value must be found by any of r names, and one KV head has its
``head_dim`` numbers for all of them, while G heads can share them out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlab.errors import InputError, check_size
from attnlab.model.llama import Llama

POWER = 0.01  # chance of a gap i is proportional to i^(POWER - 1), as Zoology's
HELD_OUT = 2**31  # torch seeds a CPU generator with 32 bits: training has the lower half of them, evaluation the rest
CHUNKS, CHUNK = 16, 64  # held-out sequences: 1024, of which a quick look takes the first 64


@dataclass(frozen=True)
class Recall:
    """``pairs`` facts. Keys are the lower half of the vocabulary, in ``relations`` equal parts; values, and what stands
    between questions, the upper half (Zoology fills with any token), so that no key comes again by chance. Raises
    ``InputError`` where a relation has fewer keys than there are ``pairs``."""

    pairs: int
    relations: int = 1
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        for name in ("pairs", "relations", "vocab_size"):
            check_size(name, getattr(self, name))
        if self._keys < self.pairs:
            raise InputError(
                f"a vocabulary of {self.vocab_size} has {self._keys} keys for each of {self.relations} relations, and "
                f"{self.pairs} pairs need as many; at least {2 * self.relations * self.pairs} symbols would do"
            )

    @property
    def _keys(self) -> int:
        """Of one relation."""
        return self.vocab_size // 2 // self.relations

    @property
    def digest(self) -> str:
        """Names the data: all of it follows from these numbers."""
        return f"recall-{self.pairs}-{self.relations}-{self.vocab_size}"

    def facts(self) -> dict[str, Any]:
        """What rows say of it."""
        return {"pairs": self.pairs, "relations": self.relations, "task_vocab": self.vocab_size}

    def batch(self, seed: int, step: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        """Fresh inputs and targets for one step, [batch, context] int64 each, −100 where nothing is asked; a function
        of the arguments alone. Raises ``InputError`` on a context that does not hold facts and questions."""
        return self._draw((seed * 1_000_003 + step) % HELD_OUT, batch, context)

    def evaluate(self, model: Llama, context: int, whole: bool) -> dict[str, Any]:
        """``accuracy``: share of the questions of held-out sequences whose likeliest token is the value; the same
        sequences for every model."""
        right = asked = 0
        device = model.embed_tokens.weight.device
        with torch.inference_mode():
            for chunk in range(CHUNKS if whole else 1):
                inputs, targets = self._draw(HELD_OUT + chunk, CHUNK, context)
                at = targets >= 0
                found = model.logits(model.hidden(inputs.to(device))[at.to(device)]).argmax(-1).cpu()
                right += int((found == targets[at]).sum())
                asked += int(at.sum())
        return {"accuracy": right / asked}

    def _draw(self, seed: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        told = self.pairs * (self.relations + 1)
        if (context - told) // 2 < self.pairs:
            raise InputError(
                f"{self.pairs} pairs of {self.relations} relations take {told} tokens to tell and "
                f"{2 * self.pairs} to ask, which a context of {context} does not hold"
            )
        generator = torch.Generator().manual_seed(seed)

        def distinct(weights: Tensor) -> Tensor:
            return torch.multinomial(weights.expand(batch, -1), self.pairs, generator=generator)  # [batch, pairs]

        half = self.vocab_size // 2
        keys = torch.stack([distinct(torch.ones(self._keys)) + r * self._keys for r in range(self.relations)], -1)
        values = distinct(torch.ones(self.vocab_size - half)) + half
        facts = torch.cat([keys, values[..., None]], -1).flatten(1)
        inputs = torch.randint(half, self.vocab_size, (batch, context), generator=generator)
        inputs[:, :told] = facts
        # a question takes two places, as a fact of MQAR does: itself, and one where the model's answer would stand
        gaps = torch.arange(1, (context - told) // 2 + 1)
        at = told + 2 * distinct(gaps ** (POWER - 1))
        relation = torch.randint(self.relations, (batch, self.pairs, 1), generator=generator)
        inputs.scatter_(1, at, keys.gather(2, relation)[..., 0])
        return inputs, torch.full((batch, context), -100).scatter_(1, at, values)
