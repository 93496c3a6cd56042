"""The text of the course and the oracle of every test: grouped attention in plain PyTorch.

It computes in at least float32 (float64 stays float64) and materialises every score: slow and large on purpose.
"""

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """q [B, H, T, D], k and v [B, G, S, D] -> [B, H, T, D]; query head h reads KV head h // R with R = H / G."""
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, narrow = q.to(wide), k.to(wide), v.to(wide), q.dtype
    q = q.reshape(B, G, H // G, T, D)
    scores = torch.einsum("bgrtd,bgsd->bgrts", q, k) * scale
    if causal:  # bottom-right aligned: query i sees keys <= S - T + i, the last query sees them all
        future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores = scores.masked_fill(future, float("-inf"))
    weights = scores.softmax(-1)
    return torch.einsum("bgrts,bgsd->bgrtd", weights, v).reshape(B, H, T, D).to(narrow)
