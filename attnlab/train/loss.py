"""Cross entropy behind the head without ever holding the scores of all tokens: a few rows at a time, in a cache.

Scores, softmax and gradients of [N, vocab] are four passes over memory that nothing else needs, and on a card they are
the largest tensors of a training step. Here each block of rows is multiplied, scored and turned into its gradients
while it lies in a cache; what is kept for the backward pass is the gradients themselves.

    N tokens   V vocabulary
"""

from typing import Any

import torch
from torch import Tensor

SCORES = 2**18  # held at once: 1 MiB of float32 fits a core's second-level cache
SCORES_ON_CARD = 2**26


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over targets of −ln softmax(hidden · weightᵀ)[target], in float32. hidden [N, dim], weight [V, dim], targets
    [N] int64, where a negative one is not counted; NaN where none is. Waits for no device."""
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        n, matrix = (targets >= 0).sum(), weight.to(hidden.dtype)
        rows = max(1, (SCORES if hidden.device.type == "cpu" else SCORES_ON_CARD) // len(weight))
        to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(matrix, dtype=torch.float32)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), rows):
            part, expected = hidden[start : start + rows], targets[start : start + rows, None]
            counted, expected = expected >= 0, expected.clamp_min(0)
            scores = (part @ matrix.T).float()
            level = scores.logsumexp(-1, keepdim=True)
            total += torch.where(counted, level - scores.gather(1, expected), 0).sum()
            # the gradient, softmax minus one at the target, in the scores' own memory; not counted: over infinity
            gradient = scores.sub_(level).exp_().scatter_add_(1, expected, -torch.ones_like(level)).div_(n / counted)
            gradient = gradient.to(hidden.dtype)
            torch.mm(gradient, matrix, out=to_hidden[start : start + rows])
            if hidden.dtype == torch.float32:
                to_weight.addmm_(gradient.T, part)
            else:  # a sum of 16 bits would be rounded once a block
                to_weight += gradient.T @ part
        ctx.save_for_backward(to_hidden, to_weight.to(weight.dtype))
        return total / n

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        to_hidden, to_weight = ctx.saved_tensors
        return to_hidden * gradients[0].to(to_hidden.dtype), to_weight * gradients[0], None
