"""The arm that ``impl="auto"`` takes: a rule, stated, and recorded by whoever measures.

Measured on a 2-core AVX2 CPU (LOG.md, 2026-11-24): folding a group into rows is never slower than SDPA's ``enable_gqa``
and up to 25 times faster in bf16. On CUDA the flash backend packs groups itself for 16-bit inputs without a mask; for
float32 ``enable_gqa`` falls to the math path, which repeats K and V, so the fold is taken there too.
"""

import torch
from torch import Tensor


def pick(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    """Name of the implementation for this call; q [B, H, T, D], k and v [B, G, S, D]."""
    half = q.device.type == "cuda" and q.element_size() == 2
    if half and (not causal or q.shape[2] in (1, k.shape[2])) and torch.cuda.get_device_capability(q.device) >= (8, 0):
        return "sdpa"  # older cards have no flash, and enable_gqa falls to the math path there too
    return "grouped"
