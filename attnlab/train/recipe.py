"""LLaMA's recipe (arXiv 2302.13971, section 2.3; 2307.09288, section 2.2) for minutes: what is the same, what is not.

The same: AdamW (0.9, 0.95), eps 1e-5, weight decay 0.1 on matrices only, clip 1.0, linear warm-up, cosine to 10 % of
the peak. Not: the peak rate follows ``peak_rate`` below, since small models want more than LLaMA's 3e-4; 2000 steps of
warm-up are 5 % of the steps where those are few; and a run is also judged by the average of its last weights, which
takes the noise of the last steps out of a comparison.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from attnlab.errors import InputError, check_choice, check_positive, check_size
from attnlab.shapes import ModelShape

WARM_UP_STEPS, WARM_UP_SHARE = 2000, 0.05
CLIP = 1.0
AVERAGED_SHARE = 0.2
"""Of a run's steps: the last weights that are averaged."""
COMPILED_FROM = 1_400_000
"""Parameters from which torch.compile pays for itself here; smaller models gain less than it costs to compile."""


def peak_rate(n_params: int) -> float:
    """Learning rate by size: 3e-4 at 7 billion parameters and more as LLaMA's 7B and 13B, half of it from 30 billion on
    as its 33B and 65B, and below 7 billion larger by the power 0.28 of the size, which meets what 0.6 million
    parameters were tuned to here (4e-3; LOG.md)."""
    if n_params >= 30e9:
        return 1.5e-4
    return 3e-4 * max(1.0, 7e9 / n_params) ** 0.28


@dataclass(frozen=True)
class Recipe:
    """One training run, whole: every number that comes out of it follows from this and its data. A step is ``batch``
    sequences of ``context`` tokens, in ``accumulate`` parts. ``schedule``: "cosine", or "constant" at ``peak_rate``
    after the warm-up. ``recompute``: gradient checkpointing. ``autocast``: matrices multiply in bfloat16."""

    shape: ModelShape
    seed: int
    tokens: int
    batch: int = 4
    context: int = 256
    peak_rate: float = 4e-3
    schedule: str = "cosine"
    accumulate: int = 1
    recompute: bool = False
    autocast: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "context", "accumulate"):
            check_size(name, getattr(self, name))
        check_positive("peak_rate", self.peak_rate)
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        if self.batch % self.accumulate:
            raise InputError(f"accumulate={self.accumulate} does not divide the batch of {self.batch} sequences")
        if self.steps <= self.warm_up:
            raise InputError(
                f"tokens={self.tokens} are {self.steps} steps of {self.batch} × {self.context} tokens; at least "
                f"{self.warm_up + 1} are needed, one of them after the warm-up"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps of batch × context tokens; a last partial step is dropped."""
        return self.tokens // (self.batch * self.context)

    @property
    def warm_up(self) -> int:
        return max(1, min(WARM_UP_STEPS, round(WARM_UP_SHARE * self.steps)))

    def rate(self, step: int) -> float:
        """Learning rate of step 0 … steps - 1."""
        if step < self.warm_up:
            return self.peak_rate * (step + 1) / self.warm_up
        if self.schedule == "constant":
            return self.peak_rate
        progress = (step - self.warm_up) / max(1, self.steps - 1 - self.warm_up)
        return self.peak_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """Fused AdamW; norms are not decayed."""
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        norms = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.peak_rate, betas=(0.9, 0.95), eps=1e-5, fused=True)
