"""The parts of a LLaMA block: RMSNorm, rotary positions, SwiGLU, grouped attention.

Module names are those of Hugging Face checkpoints, so that a state dict is a checkpoint.

    B batch   T new tokens   H query heads   G KV heads   D head_dim
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab import native
from attnlab.attention import attend
from attnlab.errors import InputError
from attnlab.model import fused
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
        if native.normalises(x, self.weight):
            return native.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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


def rotation(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """For ``rotate``: cos and signed sin at ``positions`` [T] or [B, T] -> [..., T, 1, D] each; angles in float32, cast
    at the end."""
    angles = positions.to(torch.float32)[..., None, None] * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate each pair (i, i + D/2) of x [B, T, heads, D]: Hugging Face's layout of Llama's q and k."""
    cos, sin = by
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def product(x: Tensor, *projections: nn.Linear) -> Tensor:
    """x [..., inputs] times all ``projections``, their outputs one behind the other. Without gradients it is one
    product with one matrix, which the projections' weights become views of at the first call: no byte is held twice."""
    if torch.is_grad_enabled():
        outputs = [projection(x) for projection in projections]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    weight = fused.one_matrix(projections)
    out = native.linear(x, weight) if native.takes(x, weight) else F.linear(x, weight)
    if projections[0].bias is not None:
        out += torch.cat([projection.bias for projection in projections])
    return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202). [B, T, dim] -> [B, T, dim]."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = product(x, self.gate_proj, self.up_proj).chunk(2, -1)
        return product(F.silu(gate) * up, self.down_proj)


class Attention(nn.Module):
    """Project, rotate, cache, and call ``attend``: G is a number, so MHA, GQA and MQA are this one class."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = shape.n_heads, shape.n_kv_heads, shape.head_dim
        q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.dim, q, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.dim, kv, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.dim, kv, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(q, shape.dim, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else None

    def forward(self, x: Tensor, by: Rotation, cache: KVCache | None, layer: int, impl: str) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]; attends over the cache's tokens and these T, and appends these."""
        qkv = product(x, self.q_proj, self.k_proj, self.v_proj).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2G, D]
        qk, v = qkv.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.n_heads, self.n_kv_heads), 2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 2)
        q, k = rotate(qk, by).to(v.dtype).split((self.n_heads, self.n_kv_heads), 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if cache is None or cache.starts is None:
            mixed = attend(q, k, v, causal=True, impl=impl)
        else:  # sequences of different lengths: each over its own tokens
            one = [(q[b : b + 1], k[b : b + 1, :, at:], v[b : b + 1, :, at:]) for b, at in enumerate(cache.starts)]
            mixed = torch.cat([attend(*row, causal=True, impl=impl) for row in one])
        return product(mixed.transpose(1, 2).flatten(2), self.o_proj)


class Block(nn.Module):
    """Pre-norm residual block. [B, T, dim] -> [B, T, dim]."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.dim, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.dim, shape.norm_eps)
        self.mlp = SwiGLU(shape.dim, shape.ffn_dim)
        self.shape = shape
        self.addresses = fused.Addresses()

    def forward(self, x: Tensor, by: Rotation, cache: KVCache | None, layer: int, impl: str) -> Tensor:
        if cache is not None and fused.takes(self, x, cache, impl):
            return fused.step(self, x, by, cache, layer)
        x = x + self.self_attn(self.input_layernorm(x), by, cache, layer, impl)
        return x + self.mlp(self.post_attention_layernorm(x))
