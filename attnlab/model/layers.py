"""The parts of a LLaMA block: RMSNorm, rotary positions, SwiGLU, grouped attention.

Module names are those of Hugging Face checkpoints, so that a state dict is a checkpoint.

    B batch   T new tokens   H query heads   G KV heads   D head_dim
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attention import attend
from attnlab.errors import InputError
from attnlab.model.cache import KVCache
from attnlab.shapes import ModelShape

Rotation = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) · weight (arXiv 1910.07467), the mean square in float32. [..., size] -> [..., size]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


def rope_frequencies(shape: ModelShape, device: torch.device | str = "cpu") -> Tensor:
    """Radians per token of each of the D/2 pairs (arXiv 2104.09864), always float32: rounded to bfloat16 they drift
    with position. Llama-3 scaling as in arXiv 2407.21783. Raises ``InputError`` on a scaling that is not computed here.
    """
    if shape.head_dim % 2:
        raise InputError(f"rotary positions need an even head_dim, got {shape.head_dim}")
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64, device=device).float() / shape.head_dim
    frequencies = 1.0 / shape.rope_theta**exponents
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind != "llama3":
        raise InputError(f"rope scaling {scaling.kind!r} can be counted but not run; valid: default, llama3")
    wavelength = 2 * math.pi / frequencies
    # 0 where the wavelength exceeds the slow end (divide by factor), 1 below the fast end (keep), linear between
    keep = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = keep.clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rotation(frequencies: Tensor, start: int, tokens: int, dtype: torch.dtype) -> Rotation:
    """cos and sin of positions start … start + tokens - 1, [tokens, D] each: angles in float32, cast at the end."""
    positions = torch.arange(start, start + tokens, device=frequencies.device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate each pair (i, i + D/2) of x [B, heads, T, D]: Hugging Face's layout of Llama's q and k."""
    cos, sin = by
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202). [B, T, dim] -> [B, T, dim]."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Project, rotate, cache, and call ``attend``: G is a number, so MHA, GQA and MQA are this one class."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.dim, q, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.dim, kv, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.dim, kv, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(q, shape.dim, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()

    def forward(self, x: Tensor, by: Rotation, cache: KVCache | None, layer: int, impl: str) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]; attends over the cache's tokens and these T, and appends these."""
        q = rotate(self.q_norm(self._heads(self.q_proj(x))), by)
        k = rotate(self.k_norm(self._heads(self.k_proj(x))), by)
        v = self._heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        mixed = attend(q, k, v, causal=True, impl=impl)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm residual block. [B, T, dim] -> [B, T, dim]."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.dim, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.dim, shape.norm_eps)
        self.mlp = SwiGLU(shape.dim, shape.ffn_dim)

    def forward(self, x: Tensor, by: Rotation, cache: KVCache | None, layer: int, impl: str) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), by, cache, layer, impl)
        return x + self.mlp(self.post_attention_layernorm(x))
