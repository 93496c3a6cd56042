"""Peers: other people's kernels, timed beside ours when they are asked for by name.

    flash, cudnn   torch's SDPA held to one of its CUDA backends, with ``enable_gqa``
    xformers       xFormers' Triton split-K; K and V repeated to R heads by a stride of zero, which it folds back
    flashinfer     FlashInfer's batch decode over pages, the call of its that takes a batch

A dense cache is one of pages already, of 16 tokens of every KV head each, through strides: nothing is copied for
FlashInfer. It plans at the first call of a shape, which no timing or graph sees.

    B batch   S key/value tokens   H query heads   G KV heads   R = H / G   D head_dim
"""

import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnlab.attention import torch_sdpa

PAGE = 16


def _arm(attend: Any, supports: Any, ran: str) -> SimpleNamespace:
    """What the file of an implementation defines."""
    return SimpleNamespace(attend=attend, supports=supports, backend=lambda *_, **__: ran)


def _pinned(kind: SDPBackend, takes: Callable[[SDPAParams], bool]) -> SimpleNamespace:
    def supports(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[bool, str]:
        given = torch_sdpa.arguments(q, k, causal, 1.0)
        mask, diagonal = given.get("attn_mask"), given.get("is_causal", False)
        able = q.device.type == "cuda" and takes(SDPAParams(q, k, v, mask, 0.0, diagonal, given["enable_gqa"]))
        return able, "" if able else f"torch's CUDA backend {kind.name} does not take this call"

    def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
        with sdpa_kernel(kind):
            return torch_sdpa.attend(q, k, v, causal=causal, scale=scale)

    return _arm(attend, supports, kind.name.partition("_")[0].lower())


def _decoder(package: str, refusal: Callable[..., str], attend: Any, ran: str) -> SimpleNamespace:
    def supports(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[bool, str]:
        if find_spec(package) is None:
            return False, f"the package {package} is not installed"
        if q.device.type != "cuda" or q.shape[2] != 1:
            return False, f"{package} decodes on CUDA here: it needs T = 1, got {q.shape[2]} on {q.device.type}"
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return False, f"{package} has no backward pass here: call it under torch.no_grad()"
        reason = refusal(q, k, v)
        return not reason, reason

    return _arm(attend, supports, ran)


def _xformers_inputs(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """As [B, 1, G, R, D] and [B, S, G, R, D]."""
    B, G, S, D = k.shape
    wide = [x.transpose(1, 2)[:, :, :, None].expand(B, S, G, q.shape[1] // G, D) for x in (k, v)]
    return [q.reshape(B, 1, G, -1, D), *wide]


def _xformers_refusal(q: Tensor, k: Tensor, v: Tensor) -> str:
    from xformers.ops import fmha

    return "; ".join(fmha.triton_splitk.FwOp.not_supported_reasons(fmha.Inputs(*_xformers_inputs(q, k, v))))


def _xformers(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    from xformers.ops import fmha

    inputs = _xformers_inputs(q, k, v)
    return fmha.memory_efficient_attention_forward(*inputs, scale=scale, op=fmha.triton_splitk.FwOp).reshape(q.shape)


def _flashinfer_refusal(q: Tensor, k: Tensor, v: Tensor) -> str:
    if not (shutil.which("nvcc") or os.environ.get("CUDA_HOME") or find_spec("flashinfer_jit_cache")):
        return "flashinfer compiles at its first call, and there is no nvcc"
    if q.element_size() != 2 or q.shape[3] not in (64, 128, 256):
        return f"flashinfer takes 16 bits and a head_dim of 64, 128 or 256, got {q.dtype} and {q.shape[3]}"
    if k.stride() != v.stride() or k.stride(3) != 1 or k.shape[2] % PAGE or k.stride(0) % (PAGE * k.stride(2)):
        return f"flashinfer needs K and V that lie alike, in whole pages of {PAGE} tokens"
    return ""


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    B, G, S, D = k.shape
    apart = k.stride(0) // (PAGE * k.stride(2))  # pages from one sequence's first to the next one's
    size = ((B - 1) * apart + S // PAGE, G, PAGE, D)
    pages = tuple(x.as_strided(size, (PAGE * x.stride(2), x.stride(1), x.stride(2), 1)) for x in (k, v))
    return _plan(q.device, q.dtype, q.shape[1], k.shape, apart, scale).run(q[:, :, 0], pages)[:, :, None]


@lru_cache(maxsize=2)  # each holds 128 MiB of scratch, as its documentation advises
def _plan(device: torch.device, dtype: torch.dtype, H: int, shape: torch.Size, apart: int, scale: float) -> Any:
    import flashinfer

    B, G, S, D = shape
    scratch = torch.zeros(2**27, dtype=torch.uint8, device=device)
    # Its kernel for tensor cores takes any R; the other only 1, 2, 3, 4 and 8.
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(scratch, "HND", use_tensor_cores=H // G >= 4)
    pages = torch.arange(S // PAGE) + torch.arange(B)[:, None] * apart
    bounds, last = torch.arange(B + 1) * (S // PAGE), torch.full((B,), PAGE)
    wrapper.plan(bounds.int(), pages.flatten().int(), last.int(), H, G, D, PAGE, q_data_type=dtype, sm_scale=scale)
    return wrapper


PEERS = {
    "flash": _pinned(SDPBackend.FLASH_ATTENTION, can_use_flash_attention),
    "cudnn": _pinned(SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention),
    "xformers": _decoder("xformers", _xformers_refusal, _xformers, "triton"),
    "flashinfer": _decoder("flashinfer", _flashinfer_refusal, _flashinfer, "cuda"),
}
