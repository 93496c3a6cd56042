"""What most code does: repeat K and V to H heads, then call torch's SDPA. The thing to beat.

The copy alone writes and reads R times the cache, so every byte that sharing heads saved is spent again. (A single
head, G = 1, is repeated by a stride of zero, without a copy; that is what the usual spelling comes to.)
"""

from torch import Tensor

from attnlab.attention import torch_sdpa


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """q [B, H, T, D], k and v [B, G, S, D] -> [B, H, T, D]."""
    return torch_sdpa.attend(q, *_repeated(q, k, v), causal=causal, scale=scale)


def backend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> str:
    """The torch backend that the call takes."""
    return torch_sdpa.backend(q, *_repeated(q, k, v), causal=causal, scale=scale)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, H, D = q.shape[0], q.shape[1], q.shape[3]
    G, S = k.shape[1], k.shape[2]
    if G == H:
        return k, v
    # The quicker of the two usual spellings (Hugging Face's repeat_kv); repeat_interleave gives the same heads.
    k, v = (x[:, :, None].expand(B, G, H // G, S, D).reshape(B, H, S, D) for x in (k, v))
    return k, v
