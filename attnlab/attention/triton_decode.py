"""A decode kernel of our own, in Triton: one code path from MHA to MQA, every byte of K and V read once.

A program takes one (sequence, KV head) and a chunk of the context. It loads a block of K and V once and serves the R
query heads of the group as the rows of one product, padded to at least 16: MHA's single row leaves tensor cores idle,
which costs nothing while memory is what binds. Where B · G programs would not fill the card, the context is split; each
split leaves its result and log-sum-exp in float32, and a second, small kernel combines them. Grid and scratch follow
from B, G and the number of splits, and lengths may lie on the device: a call can be captured in a CUDA graph. Triton
is imported at the first call; with TRITON_INTERPRET=1 its interpreter runs the kernel on a CPU, for tests.

    B batch   S key/value tokens   H query heads   G KV heads   R = H / G   D head_dim
"""

from __future__ import annotations  # those of the kernels name a module that is imported late

import importlib.util
import math
import os
from functools import cache
from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
tl: Any = None  # triton.language, from the first call on


class Options(NamedTuple):
    """Tokens of a block (at D = 128 in 16 bit; fewer where they are longer), warps, pipeline stages, and the programs
    per SM that splitting aims at."""

    block: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 2


_TUNED: dict[str, Options] = {}  # what was measured to be best, by compute capability


def options(capability: str) -> Options:
    """The options for a card of compute capability "sm_90", say; the default where none were tuned."""
    return _TUNED.get(capability, Options())


def candidates() -> list[Options]:
    """The options worth timing; with each of them two programs fit an SM's shared memory."""
    fit = [(block, stages) for block in (32, 64, 128) for stages in (2, 3, 4) if block * (stages - 1) <= 192]
    return [Options(block, warps, stages, programs) for block, stages in fit for warps in (4, 8) for programs in (2, 4)]


def supports(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[bool, str]:
    """Whether this call can run, and why not."""
    D = q.shape[3]
    if q.shape[2] != 1:
        return False, f"triton only decodes: it needs T = 1 query token, got {q.shape[2]}"
    if q.dtype not in DTYPES:
        return False, f"triton takes float16, bfloat16 and float32, got {str(q.dtype).removeprefix('torch.')}"
    if D & (D - 1) or not 16 <= D <= 256:
        return False, f"triton needs a head_dim that is a power of two from 16 to 256, got {D}"
    if k.stride(3) != 1 or v.stride(3) != 1:
        return False, "triton needs each key and value contiguous in memory: stride 1 along head_dim"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False, "triton has no backward pass: call it under torch.no_grad()"
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False, "triton needs CUDA (TRITON_INTERPRET=1 runs it on a CPU, slowly, for tests)"
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    return True, ""


def backend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> str:
    """Always its own kernel."""
    return "triton"


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, lengths: Tensor | None = None,
    chosen: Options | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """q [B, H, 1, D], k and v [B, G, S, D] -> [B, H, 1, D]; one query sees every key, ``causal`` or not. ``lengths``
    [B], int32 on the device: the tokens of each sequence, at most S (one of none answers 0). ``chosen`` and ``splits``
    overrule the table and the rule."""
    (B, H, _, D), (G, S) = q.shape, k.shape[1:3]
    main, combine, interpreted = _kernels()
    sms, tuned = _card(q.device)
    chosen = chosen or tuned
    splits = splits or split_count(B * G, S, H // G, chosen.programs * sms)
    q = q if q.stride(3) == 1 else q.contiguous()
    out = torch.empty(B, H, 1, D, dtype=q.dtype, device=q.device)
    partial, lse = out, None
    if splits > 1:
        partial, lse = (torch.empty(B * H, splits, n, dtype=torch.float32, device=q.device) for n in (D, 1))
    constants, warps = compiled_for(H // G, D, q.dtype, chosen, interpreted)
    strides = (q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3])
    with torch.cuda.device_of(q):
        given = (q, k, v, partial, lse, lengths, S, scale * math.log2(math.e), G, *strides)
        main[B * G, splits](*given, **constants, num_warps=warps)
        if lse is not None:
            width, padded = min(D, 32), 1 << (splits - 1).bit_length()
            combine[B * H, D // width](out, partial, lse, splits, D=D, WIDTH=width, SPLITS=padded)
    return out


def split_count(pairs: int, context: int, group_size: int, programs: int) -> int:
    """Splits of each of ``pairs`` = B · G contexts that give ``programs`` or a few more: one if the pairs are enough,
    and none so short that its R results cost more than a sixteenth of its keys and values."""
    return max(1, min(-(-programs // pairs), context // _least_chunk(group_size)))


def _least_chunk(group_size: int) -> int:
    return max(256, 32 * group_size)


def compiled_for(R: int, D: int, dtype: torch.dtype, chosen: Options, interpreted: bool) -> tuple[dict[str, Any], int]:
    """The constants that the kernel is compiled with, and its warps."""
    narrow = dtype.itemsize == 2
    block = max(16, min(chosen.block, chosen.block * (128 if narrow else 32) // D))  # float32 fills registers
    rows = max(16, 1 << (R - 1).bit_length())
    # The interpreter keeps bfloat16 as integers and would multiply those.
    product = tl.float32 if interpreted else getattr(tl, str(dtype).removeprefix("torch."))
    constants = {"R": R, "D": D, "ROWS": rows, "BLOCK": block, "STAGES": chosen.stages, "LEAST": _least_chunk(R)}
    return {**constants, "PRODUCT": product}, chosen.warps * (1 if narrow and rows * D < 128 * 128 else 2)


@cache
def _card(device: torch.device) -> tuple[int, Options]:
    if device.type == "cpu":
        return 132, Options()  # interpreted: there is no card to ask
    card = torch.cuda.get_device_properties(device)
    return card.multi_processor_count, options(f"sm_{card.major}{card.minor}")


@cache
def _kernels() -> tuple[Any, Any, bool]:
    """The two kernels, compiled at their first launch, and whether it is the interpreter that runs them."""
    global tl
    import triton
    import triton.language as tl

    # Not compiled anew where one of these becomes 1, or a multiple of 16, as a growing context does.
    kernels = (triton.jit(kernel, do_not_specialize=["S", "G", "splits"]) for kernel in (_attend, _combine))
    return *kernels, triton.knobs.runtime.interpret


# --- what runs on the device ----------------------------------------------------------------------------------------


@no_type_check
def _attend(
    q, k, v, out, lse, lengths, S, scale, G, q_b, q_h, k_b, k_g, k_s, v_b, v_g, v_s, R: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, LEAST: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """A chunk of one (sequence, KV head), for its R query heads. out [B, H, splits, D] is the result where there is one
    split, and ``lse`` then None; ``scale`` holds log2(e), for a softmax of powers of two; ``q_b``, … are strides."""
    pair, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, g = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    length = S if lengths is None else tl.load(lengths + b)
    chunk = tl.cdiv(tl.maximum(tl.cdiv(length, splits), LEAST), BLOCK) * BLOCK
    start = tl.minimum(split * chunk, length)
    end = tl.minimum(start + chunk, length)
    whole = start + (end - start) // BLOCK * BLOCK

    r, n, d = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, D)
    queries = q + b * q_b + (g * R + r[:, None]) * q_h + d
    queries = tl.load(queries, r[:, None] < R, 0.0).to(PRODUCT)
    k += b * k_b + g * k_g + start.to(tl.int64) * k_s
    v += b * v_b + g * v_g + start.to(tl.int64) * v_s
    k_block, v_block = n[:, None] * k_s + d, n[:, None] * v_s + d

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for TAIL in tl.static_range(2):  # whole blocks without a mask; then what is left, with one
        for at in tl.range(whole if TAIL else start, end if TAIL else whole, BLOCK, num_stages=1 if TAIL else STAGES):
            seen = at + n < end
            keys = tl.load(k + k_block, seen[:, None], 0.0) if TAIL else tl.load(k + k_block)
            scores = tl.dot(queries, tl.trans(keys.to(PRODUCT)), input_precision="ieee") * scale
            scores = tl.where(seen, scores, float("-inf")) if TAIL else scores
            risen = tl.maximum(top, tl.max(scores, 1))
            weights, shrink = tl.exp2(scores - risen[:, None]), tl.exp2(top - risen)
            total, top = total * shrink + tl.sum(weights, 1), risen
            # Not read where unseen: a cache holds anything there, and zero times NaN is NaN.
            values = tl.load(v + v_block, seen[:, None], 0.0) if TAIL else tl.load(v + v_block)
            weights, values = weights.to(values.dtype).to(PRODUCT), values.to(PRODUCT)
            acc = tl.dot(weights, values, acc * shrink[:, None], input_precision="ieee")
            k += BLOCK * k_s
            v += BLOCK * v_s

    row = (pair * R + r) * splits + split
    total = tl.where(total > 0, total, 1.0)  # of no tokens: zeros, weighing 2 ** -inf
    tl.store(out + row[:, None] * D + d, acc / total[:, None], r[:, None] < R)
    if lse is not None:
        tl.store(lse + row, top + tl.log2(total), r < R)


@no_type_check
def _combine(out, partial, lse, splits, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """WIDTH columns of one row of the result: the splits', each by its share of the softmax's sum."""
    row, n = tl.program_id(0), tl.arange(0, SPLITS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    logs = tl.load(lse + row * splits + n, n < splits, float("-inf"))
    results = tl.load(partial + (row * splits + n[:, None]) * D + d, n[:, None] < splits, 0.0)
    top = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(top > float("-inf"), top, 0.0))
    total = tl.sum(weights, 0)
    tl.store(out + row * D + d, tl.sum(weights[:, None] * results, 0) / tl.where(total > 0, total, 1.0))
