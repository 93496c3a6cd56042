"""The decode kernel against a loop over heads in float64: not collected by itself, run by test_triton_decode.py.

Triton decides when it is imported whether its interpreter or a card runs a kernel, so these cases have a process of
their own: with TRITON_INTERPRET=1 on a CPU, without it on CUDA.
"""

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from attnlab.attention import attend, backend, supports, triton_decode
from attnlab.attention.triton_decode import Options

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 0.11  # not D ** -0.5 of any D here
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# R, D, dtype: all of them on a card; the slow interpreter gets every pair, and a third of the triples
CALLS = [
    (R, D, dtype)
    for (i, R), (j, D), (n, dtype) in itertools.product(*map(enumerate, ((1, 3, 4, 7, 8), (64, 128, 256), DTYPES)))
    if DEVICE == "cuda" or (i + j + n) % 3 == 0
]


def by_head(x: Tensor) -> Tensor:
    """[B, G, S, D] as the start of a longer cache of that layout; NaN beyond."""
    B, G, S, D = x.shape
    longer = x.new_full((B, G, S + 17, D), float("nan"))
    longer[:, :, :S] = x
    return longer[:, :, :S]


def by_token(x: Tensor) -> Tensor:
    """[B, G, S, D] as the start of a longer cache [B, S, G, D]; NaN beyond."""
    B, G, S, D = x.shape
    longer = x.new_full((B, S + 17, G, D), float("nan"))
    longer[:, :S] = x.transpose(1, 2)
    return longer[:, :S].transpose(1, 2)


def inputs(B: int, G: int, R: int, S: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(hash((B, G, R, S, D)))
    q, k, v = (torch.randn(n, generator=generator) for n in ((B, G * R, 1, D), (B, G, S, D), (B, G, S, D)))
    return tuple(x.to(dtype).to(DEVICE) for x in (q * 2, k, v))  # type: ignore[return-value]


def decode(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
    return triton_decode.attend(q, k, v, causal=True, scale=SCALE, **given)


def loop(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], step: torch.dtype | None = None) -> Tensor:
    """One head at a time: query head h reads the first ``lengths[b]`` tokens of KV head h // R; none of them answer 0.
    With ``step``, every intermediate is rounded to that dtype."""

    def rounded(x: Tensor) -> Tensor:
        return x if step is None else x.to(step).to(x.dtype)

    out = torch.zeros(q.shape, dtype=q.dtype)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        n, g = lengths[b], h * k.shape[1] // q.shape[1]
        if n:
            scores = rounded(rounded(k[b, g, :n] @ q[b, h, 0]) * SCALE)
            out[b, h, 0] = rounded(rounded(scores.softmax(0)) @ v[b, g, :n])
    return out


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], what: str) -> None:
    """``out`` is the loop's, within twice what computing in q's dtype costs the loop, one rounding of the result, and
    one of the largest score in float32, since base 2 asks for another product."""
    exact = loop(*(x.cpu().double() for x in (q, k, v)), lengths)
    low = loop(*(x.cpu().float() for x in (q, k, v)), lengths, step=q.dtype).double()
    grouped = q.cpu().double().unflatten(1, (k.shape[1], -1)).squeeze(3)
    score = SCALE * (grouped @ k.cpu().double().transpose(2, 3)).abs().max()
    eps = torch.finfo(q.dtype).eps + torch.finfo(torch.float32).eps * score
    budget = 2 * (low - exact).abs().max() + eps * exact.abs().max()
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    error = (out.cpu().double() - exact).abs().max()
    assert error <= budget, f"{what}: off by {error:.1e}, allowed {budget:.1e}"


@pytest.mark.parametrize(("R", "D", "dtype"), CALLS)
def test_equals_a_loop_over_heads(R: int, D: int, dtype: str) -> None:
    """Padded rows that leak, a last block read past its end, a stride taken for another: each shows at one size only.
    Contexts below a block, of whole blocks, of some and a bit; one chunk, and three of which the last is empty."""
    for S, splits, layout in ((5, 1, by_head), (128, 1, by_token), (101, 1, by_head), (301, 3, by_token)):
        q, k, v = inputs(2, 3, R, S, D, DTYPES[dtype])
        views = layout(k), layout(v)
        assert views[0].stride(2) == (D if layout is by_head else 3 * D) and not views[0].is_contiguous()
        check(decode(q, *views, splits=splits), q, k, v, [S, S], f"{S} tokens, {splits} splits")


@every_dtype
@pytest.mark.parametrize("splits", [1, 4])
def test_lengths_of_a_ragged_batch(splits: int, dtype: torch.dtype) -> None:
    """One length too many reads what another sequence left behind, here NaN. 0 is a free slot of a batch: it answers 0
    and must not be NaN, which would end in a whole batch's loss or norm."""
    lengths = [0, 1, 63, 64, 65, 256, 257, 613]
    q, k, v = inputs(len(lengths), 2, 3, 613, 64, dtype)
    dirty_k, dirty_v = k.clone(), v.clone()
    for b, n in enumerate(lengths):
        dirty_k[b, :, n:], dirty_v[b, :, n:] = float("nan"), float("nan")
    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    out = decode(q, dirty_k, dirty_v, lengths=on_device, splits=splits)
    assert not out[0].any()
    check(out, q, k, v, lengths, f"{splits} splits")


@pytest.mark.parametrize("splits", [2, 5, 7])
def test_many_full_splits(splits: int) -> None:
    """Weights of the splits that are not those of the whole softmax agree when all splits look alike; here the keys of
    each token are longer than the last one's, so that almost all weight lies at the end."""
    q, k, v = inputs(1, 2, 5, 1907, 64, torch.float32)
    k = k * torch.linspace(0, 3, 1907, device=DEVICE)[:, None]
    check(decode(q, k, v, splits=splits), q, k, v, [1907], f"{splits} splits")


@pytest.mark.parametrize("chosen", [Options(16, 4, 2, 1), Options(128, 8, 2, 4)], ids=str)
def test_options_change_speed_alone(chosen: Options) -> None:
    """A tuner picks by time; an option that changed the result would be picked as gladly."""
    q, k, v = inputs(2, 3, 4, 701, 128, torch.float16)
    check(decode(q, k, v, chosen=chosen), q, k, v, [701, 701], str(chosen))


def test_large_scores_and_large_values() -> None:
    """A softmax that does not subtract the largest score overflows at 128 in base 2, and only with such scores."""
    q, k, v = inputs(1, 1, 3, 300, 64, torch.float32)
    for splits in (1, 2):
        check(decode(q * 100, k, v, splits=splits), q * 100, k, v, [300], f"{splits} splits")


def test_it_is_an_implementation_like_the_others() -> None:
    """By its name, for both values of ``causal``, whatever the strides of q; and a call it cannot take is refused."""
    q, k, v = inputs(2, 3, 4, 301, 64, torch.bfloat16)
    for view in (q, q.transpose(1, 2).contiguous().transpose(1, 2), q.transpose(1, 3).contiguous().transpose(1, 3)):
        for causal in (False, True):
            assert supports("triton", view, k, v, causal) == (True, "")
            check(attend(view, k, v, causal=causal, impl="triton", scale=SCALE), q, k, v, [301, 301], f"{causal=}")
    assert backend("triton", q, k, v) == "triton"
    strided = k.transpose(2, 3).contiguous().transpose(2, 3)
    cases = [
        ((q[:, :, [0, 0, 0]], k, v), "T = 1 query token, got 3"),
        ((q.double(), k.double(), v.double()), "got float64"),
        ((q[..., :48], k[..., :48], v[..., :48]), "got 48"),
        ((q, strided, v), "stride 1 along head_dim"),
        ((q, k, strided), "stride 1 along head_dim"),
        ((q, k, v.clone().requires_grad_()), "no backward pass"),
    ]
    for qkv, reason in cases:
        able, why = supports("triton", *qkv)
        assert not able and reason in why


if DEVICE == "cuda":

    @pytest.mark.parametrize(("B", "splits"), [(2, 4), (64, 1)])
    def test_a_captured_call_follows_growing_lengths(B: int, splits: int) -> None:
        """A graph fixes grid and scratch; what it must not fix is how long the sequences are."""
        q, k, v = inputs(B, 8, 4, 2048, 128, torch.bfloat16)
        lengths = torch.full((B,), 1, dtype=torch.int32, device=DEVICE)
        decode(q, k, v, lengths=lengths, splits=splits)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = decode(q, k, v, lengths=lengths, splits=splits)
        for length in (1, 700, 2048):
            lengths.fill_(length)
            graph.replay()
            check(out, q, k, v, [length] * B, f"{length} tokens")
