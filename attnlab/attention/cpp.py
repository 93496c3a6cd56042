"""A decode step in C++ on the CPU: K and V are read once, as they are stored, for all R query heads of a group.

``native.cpp`` has the loop, ``native.py`` builds it. Tasks are (sequence, KV head, split of the context), so that one
sequence with one KV head keeps every core busy too, which torch's kernels do not do.
"""

import torch
from torch import Tensor

from attnlab import native


def supports(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[bool, str]:
    """Whether this call can run, and why not; builds the library the first time."""
    if q.device.type != "cpu":
        return False, f"cpp runs on the CPU, these tensors are on {q.device.type}"
    if q.shape[2] != 1:
        return False, f"cpp decodes: it takes one query token, got {q.shape[2]}"
    if q.dtype not in native.DTYPES:
        return False, f"cpp takes {', '.join(map(str, native.DTYPES))}, got {q.dtype}"
    if q.shape[3] % native.LANES:
        return False, f"cpp needs a head_dim that is a multiple of {native.LANES}, got {q.shape[3]}"
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return False, "cpp needs the elements of a head to lie next to each other"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False, "cpp has no gradient"
    found, reason = native.library()
    return found is not None, reason and f"cpp {reason}"


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """q [B, H, 1, D], k and v [B, G, S, D] -> [B, H, 1, D]; a single query sees every key, causal or not."""
    return native.decode(q, k, v, scale)


def backend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> str:
    """The compiled loop."""
    return "native"
