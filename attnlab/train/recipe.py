"""LLaMA's recipe (arXiv 2302.13971, section 2.3), scaled to minutes: what is the same, and what is not.

The same: AdamW (0.9, 0.95), weight decay 0.1 on matrices, clip 1.0, linear warm-up, cosine to 10 % of the peak.
Not: the peak rate is higher, as small models want (4e-3, not tuned per variant), and the warm-up is 5 % of the steps.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from attnlab.errors import InputError, check_size
from attnlab.shapes import ModelShape


@dataclass(frozen=True)
class Recipe:
    """One training run, whole: shape, seed and budget in tokens decide every number that comes out of it."""

    shape: ModelShape
    seed: int
    tokens: int
    batch: int = 8
    context: int = 256
    peak_rate: float = 4e-3

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "context"):
            check_size(name, getattr(self, name))
        if self.steps < 2:
            raise InputError(f"tokens={self.tokens} is less than two steps of {self.batch} × {self.context} tokens")

    @property
    def steps(self) -> int:
        """Optimiser steps of batch × context tokens; a last partial step is dropped."""
        return self.tokens // (self.batch * self.context)

    def rate(self, step: int) -> float:
        """Learning rate of step 0 … steps - 1."""
        warm_up = max(1, self.steps // 20)
        if step < warm_up:
            return self.peak_rate * (step + 1) / warm_up
        progress = (step - warm_up) / max(1, self.steps - 1 - warm_up)
        return self.peak_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """Fused AdamW; norms are not decayed."""
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        norms = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.peak_rate, betas=(0.9, 0.95), fused=True)
