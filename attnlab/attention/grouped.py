"""Share K and V without a copy: the R query heads of a group become R rows of one product with its single KV head.

Without a mask (decoding: T = 1) a group's R · T queries are folded into rows, so K and V are read once for all of them.
With a causal mask each query has its own diagonal; the group's head is then broadcast to R heads by a stride of zero,
which torch's fused kernels follow without materialising it. (A cache's K and V are viewed as they lie; K and V straight
from a projection are interleaved by token and are laid out by head once, at G heads.)
"""

from torch import Tensor

from attnlab.attention import torch_sdpa


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """q [B, H, T, D], k and v [B, G, S, D] -> [B, H, T, D]."""
    rows = torch_sdpa.attend(*_shared(q, k, v, causal), causal=causal and q.shape[2] > 1, scale=scale)
    return rows.reshape(q.shape)


def backend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> str:
    """The torch backend that the call takes."""
    return torch_sdpa.backend(*_shared(q, k, v, causal), causal=causal and q.shape[2] > 1, scale=scale)


def _shared(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    if not causal or T == 1:
        return q.reshape(B, G, H // G * T, D), k, v
    q = q.reshape(B * G, H // G, T, D)
    k, v = (x.reshape(B * G, 1, S, D).expand(B * G, H // G, S, D) for x in (k, v))
    return q, k, v
