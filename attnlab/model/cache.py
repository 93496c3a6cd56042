"""The KV cache: two preallocated tensors with exactly G heads, and one length.

B batch   T new tokens   S tokens held   G KV heads   D head_dim   L layers
"""

import copy

import torch
from torch import Tensor

from attnlab.errors import InputError, check_size
from attnlab.shapes import ModelShape


class KVCache:
    """Keys and values of past tokens, [L, B, G, capacity, D] each, in ``dtype``.

    Every layer of one forward pass appends at the same ``length``; the model advances it once, after its last layer, so
    that no layer owns the count. ``capacity`` is not rounded: ``nbytes`` equals ``predict.kv_cache_bytes`` to the byte.
    """

    def __init__(
        self,
        shape: ModelShape,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch, self.capacity = check_size("batch", batch), check_size("capacity", capacity)
        size = (shape.n_layers, batch, shape.n_kv_heads, capacity, shape.head_dim)
        self.k = torch.empty(size, dtype=dtype, device=device)
        self.v = torch.empty(size, dtype=dtype, device=device)
        self.length = 0
        self.starts: list[int] | None = None
        """Where each sequence begins, if they differ in length: they end together, so the shorter begin later."""

    def row(self, index: int, start: int) -> "KVCache":
        """Sequence ``index`` alone, from slot ``start`` on, as an empty cache that shares this one's memory."""
        one = copy.copy(self)
        one.k, one.v = self.k[:, index : index + 1, :, start:], self.v[:, index : index + 1, :, start:]
        one.batch, one.capacity, one.length, one.starts = 1, self.capacity - start, 0, None
        return one

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, G, T, D] behind the tokens held; return views of all of them, [B, G, length + T, D].

        Raises ``InputError`` if they do not fit (overflow, other batch, heads or head_dim); nothing is written then.
        """
        end = self.end(k.shape[2])
        slot = self.k[layer, :, :, self.length : end]
        if k.shape != slot.shape or v.shape != slot.shape:
            raise InputError(f"expected k and v of {list(slot.shape)}, got {list(k.shape)} and {list(v.shape)}")
        slot.copy_(k)
        self.v[layer, :, :, self.length : end].copy_(v)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def end(self, tokens: int) -> int:
        """How many tokens are held with so many more; raises ``InputError`` if they do not fit."""
        end = self.length + tokens
        if end > self.capacity:
            raise InputError(
                f"KV cache overflow: {self.length} tokens held + {tokens} new > capacity {self.capacity}; "
                "make it larger or reset() it"
            )
        return end

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` as held; called once per forward pass, after the last layer."""
        self.length += tokens

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self.length, self.starts = 0, None

    @property
    def nbytes(self) -> int:
        """Bytes of storage, by storage rather than by shape."""
        return self.k.untyped_storage().nbytes() + self.v.untyped_storage().nbytes()
