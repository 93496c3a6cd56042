"""PyTorch's FlexAttention, compiled (arXiv 2412.05496): a CUDA arm.

On a CPU each new shape costs seconds of compilation, so ``supports`` says no there. Decoding packs a group's R heads
into one block and needs R to be a power of two. The mask is rebuilt only when T or S changes. On Hopper the default is
not pipelined; ``TUNED`` is the same arm with options that are, a peer to be timed beside it.
"""

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def supports(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[bool, str]:
    """Whether this call can run, and why not."""
    if q.device.type != "cuda":
        return False, f"flex needs CUDA: on {q.device.type} every new shape costs seconds of compilation"
    if q.shape[-1] & (q.shape[-1] - 1) or q.shape[-1] < 16:
        return False, f"flex needs a head_dim that is a power of two and at least 16, got {q.shape[-1]}"
    group_size = q.shape[1] // k.shape[1]
    if q.shape[2] == 1 and group_size & (group_size - 1):
        return False, f"flex decoding needs a power of two of query heads per KV head, got {group_size}"
    return True, ""


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, kernel_options: dict[str, Any] | None = None
) -> Tensor:
    """q [B, H, T, D], k and v [B, G, S, D] -> [B, H, T, D]."""
    from torch._dynamo import config as dynamo_config  # a second to import, and of use on CUDA alone

    mask = _bottom_right(q.shape[2], k.shape[2], q.device) if causal and q.shape[2] > 1 else None
    # A sweep compiles for many shapes; beyond dynamo's limit of a few it would run eagerly, every score materialised.
    with dynamo_config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20):
        given = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1], "kernel_options": kernel_options}
        return _compiled()(q, k, v, block_mask=mask, **given)


def backend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> str:
    """FlexAttention is always its own Triton kernel."""
    return "triton"


@cache
def _compiled():  # type: ignore[no-untyped-def]  # torch.compile has no precise type
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)  # fails rather than falling back in silence


@cache
def _bottom_right(T: int, S: int, device: torch.device) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: j <= i + (S - T), None, None, T, S, device=str(device))


PIPELINED = {"BLOCK_N": 64, "num_stages": 3, "num_warps": 4}
TUNED = SimpleNamespace(attend=partial(attend, kernel_options=PIPELINED), supports=supports, backend=backend)
