"""LLaMA with G key/value heads (arXiv 2302.13971, 2307.09288): embeddings, blocks, a norm, a head.

B batch   T new tokens   S tokens attended over
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnlab import native
from attnlab.errors import InputError
from attnlab.model.cache import KVCache
from attnlab.model.layers import Block, RMSNorm, product, rope_frequencies, rotation
from attnlab.shapes import ModelShape


def initial_deviation(dim: int) -> float:
    """Standard deviation of a matrix's first weights, √(2 / 5d) (arXiv 1910.05895, section 2.2): 0.01 at the width of a
    7B model, and 0.056 at 128, where the usual constant of 0.02 learns much more slowly (LOG.md)."""
    return math.sqrt(2 / (5 * dim))


class Llama(nn.Module):
    """``Llama(shape)(tokens)``: [B, T] int64 -> logits [B, T, vocab].

    ``impl`` names the attention implementation of every layer ("auto" unless said). Weights start normal with
    ``initial_deviation``, the two projections back into the residual stream scaled by 1/√(2L) (GPT-2's rule).
    """

    def __init__(self, shape: ModelShape, impl: str = "auto") -> None:
        super().__init__()
        self.shape, self.impl = shape, impl
        self.recompute = False
        """Gradient checkpointing: a backward pass computes each block again instead of finding what it kept."""
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = RMSNorm(shape.dim, shape.norm_eps)
        self.lm_head = None if shape.tied_embeddings else nn.Linear(shape.dim, shape.vocab_size, bias=False)
        # Not a buffer: `.to(bfloat16)` would cast it, and logits then drift with position.
        self._frequencies = rope_frequencies(shape)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=initial_deviation(self.shape.dim))
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # checked on the line above
        if isinstance(module, Block):
            for projection in (module.self_attn.o_proj, module.mlp.down_proj):
                if not projection.weight.is_meta:
                    with torch.no_grad():
                        projection.weight.mul_((2 * self.shape.n_layers) ** -0.5)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, vocab]. With a cache, tokens follow those it holds and are appended to it.

        Raises ``InputError`` on tokens that are not [B, T] integers, or that overflow the cache.
        """
        return self.logits(self.hidden(tokens, cache))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens [B, T] -> last hidden states [B, T, dim], before the head; ``generate`` heads only the last."""
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise InputError(f"expected tokens [B, T] of integers, got {list(tokens.shape)} of {tokens.dtype}")
        x = self.embed_tokens(tokens)
        if self._frequencies.device != x.device:
            self._frequencies = rope_frequencies(self.shape, x.device)
        positions = torch.arange(tokens.shape[1], device=x.device) + (cache.length if cache else 0)
        if cache is not None and cache.starts is not None:
            positions = positions - torch.tensor(cache.starts, device=x.device)[:, None]
        by = rotation(self._frequencies, positions, x.dtype)
        again = self.recompute and torch.is_grad_enabled()
        for index, block in enumerate(self.layers):
            inputs = x, by, cache, index, self.impl
            x = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, dim] -> logits [B, T, vocab], by the head or the tied embedding table."""
        if self.lm_head is not None:
            return product(hidden, self.lm_head)
        weight = self.embed_tokens.weight
        return native.linear(hidden, weight) if native.takes(hidden, weight) else F.linear(hidden, weight)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache of this model's shape, dtype and device."""
        weight = self.embed_tokens.weight
        return KVCache(self.shape, batch, capacity, weight.dtype, weight.device)
