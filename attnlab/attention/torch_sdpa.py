"""Not an implementation but what three of them call: torch's scaled_dot_product_attention, with the one mask rule of
this library, and the question which backend it takes.

SDPA's own ``is_causal`` is aligned top-left: right only for T = S. With a past (T < S) it hides keys the query must
see, so a bottom-right mask is passed instead; a single query (T = 1) sees every key and needs no mask at all.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """q [B, H, T, D], k and v [B, G, S, D] -> [B, H, T, D]; ``enable_gqa`` only where G < H."""
    return F.scaled_dot_product_attention(q, k, v, **arguments(q, k, causal, scale))


def backend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> str:
    """The backend torch chooses for exactly this call ("flash", "cudnn", "efficient", "math"), by asking torch."""
    choice = torch._fused_sdp_choice(q, k, v, **arguments(q, k, causal, scale))
    return SDPBackend(choice).name.partition("_")[0].lower()


def arguments(q: Tensor, k: Tensor, causal: bool, scale: float) -> dict[str, Any]:
    """What SDPA is passed beside q, k and v: scale, ``enable_gqa``, and ``is_causal`` or a mask where one is due."""
    T, S = q.shape[2], k.shape[2]
    given: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if causal and T == S and T > 1:
        given["is_causal"] = True
    elif causal and T > 1:
        given["attn_mask"] = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return given
