"""The compiled kernels against float64, at their edges; and what becomes of a compiler that is missing, fails or dies.

Nothing here is collected where there can be no library (no Linux, no AVX2, no compiler); that ``supports`` then says so
is tested everywhere, in ``attention/test_cpp.py``. A build's faults are made in fresh processes with folders of their
own; where the product does not matter, the "compiler" is a script that copies the library built before.

    B batch   S key/value tokens   G KV heads   R query heads per KV head   D head_dim   M rows   N outputs   K inputs
"""

import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attnlab import native
from attnlab.attention import attend

__test__ = (
    platform.system() == "Linux"
    and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    and shutil.which(os.environ.get("CXX") or "c++") is not None
)
ROOT = Path(native.__file__).parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALVES = {name: DTYPES[name] for name in ("bf16", "fp16")}
EPS = 2.0**-23  # of float32, in which the kernels compute

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Until a test asks for two; and torch's number is put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*size: int, seed: int = 3) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def inputs(B: int, G: int, R: int, S: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (B, G * R, 1, D), (B, G, S, D), (B, G, S, D)
    return tuple(random(*size, seed=3 + i).to(dtype) for i, size in enumerate(sizes))  # type: ignore[return-value]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """softmax(q kᵀ scale) v in ``dtype``, a group's heads being its rows."""
    q, k, v = q.to(dtype).unflatten(1, (k.shape[1], -1)).squeeze(3), k.to(dtype), v.to(dtype)
    return ((q @ k.mT * scale).softmax(-1) @ v).flatten(1, 2).unsqueeze(2)


def allowed(exact: Tensor, in_float32: Tensor, dtype: torch.dtype) -> Tensor:
    """Four times what float32 makes of it in torch's order of summation, and one rounding to ``dtype``."""
    own = (in_float32.double() - exact).abs().max()
    once = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    return 4 * own + EPS * exact.abs().max() + once * exact.abs()


def check(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact, in_float32 = attention(q, k, v, scale), attention(q, k, v, scale, torch.float32)
    out = native.decode(q, k, v, scale)
    assert (out.shape, out.dtype, out.is_contiguous()) == (q.shape, q.dtype, True)
    excess = (out.double() - exact).abs() - allowed(exact, in_float32, q.dtype)
    assert excess.max() <= 0, f"{excess.max():.1e} too far: q {list(q.shape)}, k {list(k.shape)}"
    return out


# --- decode: sizes --------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("D", [8, 24, 40, 128, 256])
def test_every_size(D: int, dtype: torch.dtype) -> None:
    """Blocks of tokens, tiles of tokens, four rows at once, eight vectors at once: each loop has a ragged end, and a
    mistake in one of them shows at a few of these sizes alone."""
    B, G, most = 2, 3, 32
    for S in (1, 31, 32, 33, 255, 257, 1031):
        q, k, v = inputs(B, G, most, S, D, dtype)
        exact, in_float32 = (attention(q, k, v, D**-0.5, x) for x in (torch.float64, torch.float32))
        within = allowed(exact, in_float32, dtype)
        for R in (*range(1, 10), 12, most):
            first = (slice(None), slice(None), slice(R))  # of every group
            rows, expected, budget = (x.unflatten(1, (G, most))[first].flatten(1, 2) for x in (q, exact, within))
            error = (native.decode(rows, k, v, D**-0.5).double() - expected).abs()
            assert (error <= budget).all(), f"off by {error.max():.1e} at {R=} {S=}"


@every_dtype
@pytest.mark.parametrize(("B", "G"), [(1, 1), (2, 3)], ids=["one-head", "six-heads"])
def test_splits_of_the_context_are_merged(B: int, G: int, dtype: torch.dtype) -> None:
    """Splits have different maxima and the last ones of a long context are empty: merged as if they were alike, the
    result is a plausible mean. Two threads split, one does not; both are right, and alike to within rounding."""
    for S, D, R in ((257, 128, 5), (1031, 64, 1), (1031, 128, 12), (8209, 24, 5)):
        q, k, v = inputs(B, G, R, S, D, dtype)
        k[:, :, S // 3 :] *= 3  # so that the largest scores are not in the first split
        torch.set_num_threads(1)
        whole = check(q, k, v)
        torch.set_num_threads(2)
        split = check(q, k, v)
        torch.testing.assert_close(split, whole, rtol=torch.finfo(dtype).eps, atol=2e-6)


def _splits(monkeypatch: pytest.MonkeyPatch, B: int, G: int, S: int, threads: int) -> tuple[int, int]:
    """(splits, threads) that the library is called with; D is 64, in float32."""
    seen = []
    real = native._function("decode", torch.float32)

    def watched(q: int, k: int, v: int, out: int, scale: float, sizes: int, threads: int) -> None:
        seen.append(((ctypes.c_int64 * 14).from_address(sizes)[5], threads))
        real(q, k, v, out, scale, sizes, threads)

    torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        patch.setattr(native, "_function", lambda name, dtype: watched)
        native.decode(*inputs(B, G, 2, S, 64, torch.float32), 1.0)
    return seen[0]


def test_one_sequence_with_one_kv_head_keeps_every_core_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a task per KV head MQA at batch 1 runs on one core, as torch's kernels do. The results never tell."""
    splits, threads = _splits(monkeypatch, 1, 1, 8192, threads=2)
    assert threads == 2
    assert splits >= 2 * threads
    assert _splits(monkeypatch, 4, 8, 1024, threads=2) == (1, 2)  # enough tasks without
    assert _splits(monkeypatch, 1, 1, 8192, threads=1) == (1, 1)
    assert _splits(monkeypatch, 1, 1, 61, threads=2) == (1, 1)  # too little work for a second thread


# --- decode: memory as it lies --------------------------------------------------------------------------------------


def _cache(x: Tensor) -> Tensor:
    """x [B, G, S, D] as a slice of a longer cache, NaN before and behind it."""
    B, G, S, D = x.shape
    around = torch.full((B + 1, G, S + 9, D), float("nan"), dtype=x.dtype)
    around[1:, :, 2 : S + 2] = x
    return around[1:, :, 2 : S + 2]


def _by_token(x: Tensor) -> Tensor:
    """x [B, G, S, D] as it comes from a projection of q, k and v in one: [B, S, heads, D], NaN in the others."""
    B, G, S, D = x.shape
    around = torch.full((B, S, G + 5, D), float("nan"), dtype=x.dtype)
    around[:, :, 3 : G + 3] = x.transpose(1, 2)
    return around[:, :, 3 : G + 3].transpose(1, 2)


def _unaligned(x: Tensor) -> Tensor:
    """x at an address that no vector is aligned to, each row's end followed by one NaN."""
    *size, D = x.shape
    around = torch.full((x.numel() // D * (D + 1) + 1,), float("nan"), dtype=x.dtype)[1:].view(*size, D + 1)
    around[..., :D] = x
    return around[..., :D]


@every_dtype
@pytest.mark.parametrize("layout", [_cache, _by_token, _unaligned])
@pytest.mark.parametrize("threads", [1, 2])
def test_tensors_are_read_as_they_lie(threads: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """A stride that is assumed reads a neighbour's numbers, here NaN, for q as for k and v; an aligned load of what is
    not aligned ends the process."""
    q, k, v = inputs(2, 3, 5, 521, 40, dtype)
    torch.set_num_threads(threads)
    expected = native.decode(q, k, v, 0.37)
    views = layout(q), layout(k), layout(v)
    assert not any(x.is_contiguous() for x in views)
    assert torch.equal(native.decode(*views, 0.37), expected)
    assert torch.equal(native.decode(q, views[1], v, 0.37), expected)  # k and v need not lie alike
    check(*views, 0.37)


def test_a_sequence_shared_by_a_batch_needs_no_copy() -> None:
    """A stride of 0 is a stride too."""
    q, k, v = inputs(5, 2, 3, 67, 16, torch.bfloat16)
    k, v = (x[:1].expand_as(x) for x in (k, v))
    assert torch.equal(check(q, k, v), native.decode(q, k.contiguous(), v.contiguous(), 0.25))


# --- decode: numbers ------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("threads", [1, 2])
def test_nan_reaches_the_heads_that_read_it_and_no_other(threads: int, dtype: torch.dtype) -> None:
    """max() and min() of vectors drop NaN or keep it depending on the order of their arguments: a kernel that drops it
    hides the mistake that made it. Every other number is untouched, to the bit."""
    B, G, R, S, D = 2, 3, 5, 521, 40
    torch.set_num_threads(threads)
    clean = inputs(B, G, R, S, D, dtype)
    expected = native.decode(*clean, 0.3)
    b, g, d, rows = 1, 2, 21, slice(2 * R, 3 * R)
    for t in (0, 15, 16, 31, 32, 260, S - 1):
        for which, at, hit in (
            (1, (b, g, t, d), (b, rows, 0)),  # k: every element of the group's heads
            (2, (b, g, t, d), (b, rows, 0, d)),  # v: this element of them
            (0, (b, g * R + 1, 0, d), (b, g * R + 1, 0)),  # q: this head
        ):
            qkv = [x.clone() for x in clean]
            qkv[which][at] = float("nan")
            out, wanted = native.decode(*qkv, 0.3), expected.clone()
            wanted[hit] = float("nan")
            torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)


def test_the_exponential() -> None:
    """Two keys, the value of one being 1 and of the other 0, answer e^-x / (1 + e^-x): the polynomial's error over the
    whole range, to 4e-7 and the rounding of x, and 0 where float32 has no normal number left."""
    x = torch.cat((torch.linspace(0, 87, 5003), torch.linspace(88, 2000, 101)))
    q, k, v = torch.zeros(1, len(x), 1, 8), torch.zeros(1, len(x), 2, 8), torch.zeros(1, len(x), 2, 8)
    q[..., 0], k[0, :, 1, 0], v[0, :, 1] = 1, -x, 1
    out = native.decode(q, k, v, 1.0)[0, :, 0].double()
    exact = torch.sigmoid(-x.double())[:, None]
    assert ((out - exact).abs() <= exact * (4e-7 + 2 * EPS * x.double())[:, None] + 2.0**-126).all()
    assert (out[x > 89] == 0).all()


PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "increasing": lambda t: t / 8,
    "decreasing": lambda t: -t / 8,
    "first": lambda t: 300.0 * (t == 0),
    "last": lambda t: 300.0 * (t == len(t) - 1),
    "one-of-a-block": lambda t: 300.0 * (t == 47),
    "+1e4": lambda t: 1e4 + 0 * t,
    "-1e4": lambda t: -1e4 + 0 * t,
    "±1e4": lambda t: 1e4 * (1 - 2 * (t % 2)),
    "one-1e4": lambda t: 1e4 * (2.0 * (t == 700) - 1),
}


@every_dtype
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_scores_of_any_size_and_order(pattern: str, threads: int, dtype: torch.dtype) -> None:
    """An online softmax goes wrong where a later block's maximum is far above or far below all before it: e^score
    overflows, or what was summed is not scaled down."""
    S, D = 1031, 64
    q, k, v = torch.zeros(1, 6, 1, D), torch.zeros(1, 2, S, D), random(1, 2, S, D)
    q[..., 5], k[..., 5] = 1, PATTERNS[pattern](torch.arange(S).float())
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    torch.set_num_threads(threads)
    out, exact = native.decode(q, k, v, 1.0).double(), attention(q, k, v, 1.0)
    # A score is rounded in base 2, thrice: so are both it and the maximum, and a weight is off by their sum.
    rounded = 6 * EPS / 2 * k.abs().max().item() * v.abs().max().item()
    torch.testing.assert_close(out, exact, rtol=torch.finfo(dtype).eps, atol=2 * rounded + 4 * EPS)


@pytest.mark.parametrize("threads", [1, 2])
def test_scores_that_overflow_to_minus_infinity_weigh_nothing(threads: int) -> None:
    """A first block whose scores are all -inf leaves -inf as the maximum, and -inf - -inf is NaN: float32's SDPA
    answers the mean of the others. A whole split of them must not count either."""
    S, D, visible = 1031, 32, 5
    q, k, v = torch.zeros(1, 3, 1, D), torch.zeros(1, 1, S, D), random(1, 1, S, D)
    q[..., 0], k[..., 0] = 1e20, -1e20
    k[:, :, -visible:] = 0
    torch.set_num_threads(threads)
    out = native.decode(q, k, v, 1.0)
    torch.testing.assert_close(out, v[:, :, -visible:].mean(2, keepdim=True).expand_as(out), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k.expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1)))


@every_half
def test_finite_numbers_never_make_nan(dtype: torch.dtype) -> None:
    """The largest numbers that the dtype and float32's sums allow, of both signs, in q, k and v."""
    large = 65504.0 if dtype == torch.float16 else 1e17
    for sign in (1, -1):
        q, k, v = (x.sign().mul(large) for x in inputs(2, 3, 4, 67, 24, torch.float32))
        k[:, :, ::2] = k[:, :, ::2].abs() * sign
        out = native.decode(q.to(dtype), k.to(dtype), v.to(dtype), 1.0)
        assert out.isfinite().all()
        assert out.abs().max() <= torch.tensor(large).to(dtype)


def neighbours(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The finite numbers of a 16-bit dtype, and the next ones away from 0; their middle is a tie. Without
    bfloat16's last binade, where float32 cannot hold a sum of two."""
    bits = torch.arange(0, 0x7BF8 if dtype == torch.float16 else 0x7F00, dtype=torch.int16)
    a, b = bits.view(dtype), (bits + 1).view(dtype)
    return torch.cat((a, -a)), torch.cat((b, -b))


@every_half
def test_results_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """Truncated results are biased: the mean of every two neighbours, subnormal ones included, is a tie and must go
    where torch rounds it."""
    a, b = neighbours(dtype)
    v = torch.stack((a.view(-1, 8), b.view(-1, 8)), 1)[None]  # [1, G, 2, 8]
    out = native.decode(torch.zeros(1, v.shape[1], 1, 8, dtype=dtype), torch.zeros_like(v), v, 1.0)
    expected = ((a.double() + b.double()) / 2).float().to(dtype)
    assert torch.equal(out.flatten().view(torch.int16), expected.view(torch.int16))


# --- linear ---------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("K", [8, 72, 136, 520])
def test_linear(K: int, dtype: torch.dtype) -> None:
    """Rows four at once in panels of 64, outputs in blocks of 32, each with a ragged end: against float64, element by
    element, to one rounding of the result and those of a float32 sum: of eight partial ones, then three more. And, but
    for the sum's order, never further off than torch's own product."""
    for M in (*range(1, 10), 15, 16, 17, 32, 65, 129):
        for N in (8, 24, 40, 104):
            x, weight = random(M, K, seed=M).to(dtype), random(N, K, seed=N).to(dtype)
            exact = x.double() @ weight.double().T
            summed = (K / 8 + 3) * EPS / 2 * (x.double().abs() @ weight.double().abs().T)
            once = torch.finfo(dtype).eps / 2 * exact.abs() if dtype != torch.float32 else 0.0
            torch.set_num_threads(1 + M % 2)
            out = native.linear(x, weight)
            assert (out.shape, out.dtype) == ((M, N), dtype)
            error = (out.double() - exact).abs()
            assert (error <= once + summed).all(), f"off by {error.max():.1e} at {M=} {N=}"
            theirs = (F.linear(x, weight).double() - exact).abs()
            assert error.mean() <= theirs.mean() + summed.mean()


@every_half
def test_linear_takes_any_leading_axes(dtype: torch.dtype) -> None:
    """A model's x is [B, T, dim], or every other token of it, and its weight may be a part of a joined one."""
    x, joined = random(3, 14, 40).to(dtype)[:, ::2], random(56, 40).to(dtype)
    out = native.linear(x, joined[16:40])
    assert torch.equal(out, native.linear(x.reshape(21, 40), joined[16:40].clone()).view(3, 7, 24))
    torch.testing.assert_close(out, F.linear(x.float(), joined[16:40].float()).to(dtype), rtol=1e-2, atol=1e-3)


@every_half
def test_linear_rounds_to_nearest_even_and_overflows_to_infinity(dtype: torch.dtype) -> None:
    """Ties as above; beyond the largest number there is infinity, and NaN stays NaN of either sign."""
    a, b = neighbours(dtype)
    weight = torch.zeros(len(a), 8, dtype=dtype)
    weight[:, 2], weight[:, 5] = a, b
    x = torch.full((1, 8), 0.5, dtype=dtype)
    expected = ((a.double() + b.double()) / 2).float().to(dtype)
    assert torch.equal(native.linear(x, weight)[0].view(torch.int16), expected.view(torch.int16))

    most, nan = torch.finfo(dtype).max, float("nan")
    edges = torch.zeros(8, 8, dtype=dtype)
    edges[:5, 0] = torch.tensor([most, most, -most, -most, 0])
    edges[:5, 1] = torch.tensor([0, most, -most, 0, 0])
    edges[4, 7] = nan
    out = native.linear(torch.ones(1, 8, dtype=dtype), edges)[0].tolist()
    assert out[:4] == [most, float("inf"), -float("inf"), -most]
    assert out[4] != out[4]
    assert out[5:] == [0, 0, 0]
    assert native.linear(torch.tensor([-nan, *[0.0] * 7], dtype=dtype)[None], edges).isnan().all()


def test_what_linear_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that the kernel cannot do, or that wants gradients, belongs to torch: the kernel checks nothing, and would
    read whatever lies behind a weight that is too short."""
    monkeypatch.setattr(native, "capability", lambda device: "avx2")
    x, weight = torch.zeros(2, 3, 16, dtype=torch.bfloat16), torch.zeros(24, 16, dtype=torch.bfloat16)
    assert not native.takes(x, weight)  # gradients are on
    with torch.no_grad():
        assert native.takes(x, weight)
        assert native.takes(x.half(), weight.half())
        assert native.takes(x.float(), weight.float())  # few rows
        assert native.takes(x.new_zeros(257, 16), weight)
        for others in (
            (x.new_zeros(257, 16).float(), weight.float()),
            (x.double(), weight.double()),
            (x, weight.half()),
            (x[..., :8], weight),
            (x[..., :12], weight[:, :12].contiguous()),
            (x, weight[:20]),
            (x, torch.zeros(16, 24, dtype=torch.bfloat16).T),
            (x.to("meta"), weight.to("meta")),
        ):
            assert not native.takes(*others)
        monkeypatch.setattr(native, "capability", lambda device: "avx512+bf16")
        assert not native.takes(x, weight)  # torch's own product is the faster one


# --- RMSNorm --------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("K", [8, 40, 520])
def test_rms_norm(K: int, dtype: torch.dtype) -> None:
    """Rows of 1 to 60,000: squares of the largest overflow float16; a row of zeros stays zeros, and one with NaN is all
    NaN, alone. One rounding of the result, and what float32 makes of the sum."""
    scales = torch.tensor([1, 0, 3e-3, 60000, 1, 17, 1]).view(7, 1)
    x, weight, eps = (random(5, 7, K).clamp(-1, 1) * scales).to(dtype), random(K, seed=5).to(dtype), 1e-5
    x[2, 4, 3] = float("nan")
    for given in (x, x.transpose(0, 1), torch.stack((x, x), -1)[..., 1], x.repeat(1, 1, 1, 31, 1)):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, wide = native.rms_norm(given, weight, eps), given.double()
            exact = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
            assert (out.shape, out.dtype) == (given.shape, dtype)
            assert torch.equal(out.isnan(), given.isnan().any(-1, keepdim=True).expand_as(given))
            assert (out[given.abs().sum(-1) == 0] == 0).all()
            rtol = 4 * EPS + (torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0)
            torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=2.0**-25, equal_nan=True)


def test_what_rms_norm_takes() -> None:
    """As for ``linear``: nothing is checked below, and no gradient comes out."""
    x, weight = torch.zeros(2, 3, 16), torch.zeros(16)
    assert not native.normalises(x, weight)  # gradients are on
    with torch.no_grad():
        assert native.normalises(x, weight)
        for others in (
            (x.double(), weight.double()),
            (x.half(), weight),
            (x[..., :8], weight),
            (x[..., :12], weight[:12]),
            (x.to("meta"), weight.to("meta")),
        ):
            assert not native.normalises(*others)


# --- building -------------------------------------------------------------------------------------------------------

LINE = "attnlab: compiling the CPU decode kernel (once, some seconds)\n"

# What a user's process does: asks, decodes with auto, and insists on cpp.
USER = """
import json, torch
from attnlab.attention import attend, picked, supports
from attnlab.errors import InputError
q, k, v = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 37, 8), torch.randn(2, 3, 37, 8)
exact = attend(q.double(), k.double(), v.double(), impl="reference")
able, reason = supports("cpp", q, k, v)
said = ""
try:
    assert (attend(q, k, v, impl="cpp") - exact).abs().max() < 1e-5
except InputError as error:
    said = str(error)
assert (attend(q, k, v) - exact).abs().max() < 1e-5
print(json.dumps([able, reason, said, picked(q, k, v)]))
"""


def start(code: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A fresh process that leads a group of its own and runs ``code`` in ``folder``; ``result`` awaits its end."""
    command, pipe, environment = [sys.executable, "-c", code], subprocess.PIPE, {**environment, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, cwd=folder, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def result(process: subprocess.Popen[str]) -> tuple[Any, str]:
    """(what it printed, its stderr)."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out), err


class Machine:
    """A machine on which nothing has been built: ``folder`` is its cache, ``compiler`` a script in place of c++."""

    def __init__(self, home: Path) -> None:
        self.folder, self.compiler, self.mark = home / "cache" / "torch_extensions", home / "compiler", home / "mark"
        found, reason = native.library()
        assert found is not None, reason
        self.built = found._name
        self.environment = {"CXX": str(self.compiler), "TORCH_EXTENSIONS_DIR": str(self.folder)}

    def install(self, *lines: str) -> str:
        """Make the compiler a script of ``lines``, in which $out is what it is to write and $built a whole library."""
        head = ["#!/bin/sh", 'for out; do :; done; echo "$@" > arguments', f"built={self.built}", f"mark={self.mark}"]
        self.compiler.write_text("\n".join([*head, *lines]) + "\n")
        self.compiler.chmod(0o755)
        return str(self.compiler)

    def start(self, code: str = USER, **changed: str) -> subprocess.Popen[str]:
        return start(code, self.compiler.parent, {**os.environ, **self.environment, **changed})

    def works(self, **changed: str) -> str:
        """The library is used; returns stderr."""
        answer, err = result(self.start(**changed))
        assert answer == [True, "", "", "cpp"]
        return err

    def refuses(self, **changed: str) -> tuple[str, str]:
        """cpp refuses with a reason and auto works all the same; returns the reason and stderr."""
        (able, reason, said, picked), err = result(self.start(**changed))
        assert not able
        assert said == f"impl='cpp' cannot run here: {reason}"
        assert picked != "cpp"
        return reason, err

    def files(self) -> list[str]:
        """What is in the cache, ended by a slash if it is a folder; a library's name is attnlab_*.so."""
        found = sorted(p.name + "/" * p.is_dir() for p in self.folder.iterdir()) if self.folder.exists() else []
        return [re.sub(r"^attnlab_[0-9a-f]{16}\.so$", "attnlab_*.so", name) for name in found]


GOOD = 'cp "$built" "$out"'


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.slow
def test_a_machine_builds_once(machine: Machine) -> None:
    """The real compiler, from nothing: the first process says on stderr what takes some seconds and the next ones say
    nothing, and one file is left."""
    environment = {"CXX": os.environ.get("CXX") or "c++"}
    assert machine.works(**environment) == LINE
    assert machine.files() == ["attnlab_*.so"]
    assert machine.works(**environment) == ""
    assert machine.files() == ["attnlab_*.so"]


def test_the_name_holds_source_flags_and_compiler(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library left by another version of the source, or made by another compiler, must not be taken for this one.
    Three scripts stand for compilers here, and the library is asked for anew each time, in this process."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(machine.folder))
    monkeypatch.chdir(machine.folder.parents[1])
    names = set()

    def build() -> int:
        found, reason = native.library.__wrapped__()
        assert found is not None, reason
        names.add(found._name)
        return len(names)

    monkeypatch.setenv("CXX", machine.install(GOOD))
    assert build() == 1
    assert build() == 1
    monkeypatch.setenv("CXX", machine.install(GOOD) + " -DOTHER")
    assert build() == 2
    assert (machine.compiler.parent / "arguments").read_text().startswith("-DOTHER -O3 ")
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-g"])
    assert build() == 3
    other = machine.compiler.with_name("other.cpp")
    other.write_text(native.SOURCE.read_text() + "\n")
    monkeypatch.setattr(native, "SOURCE", other)
    assert build() == 4
    assert machine.files() == ["attnlab_*.so"] * 4


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"CXX": "/nonexistent/c++ -g"}, id="CXX"),
        pytest.param({"CXX": "", "PATH": ""}, id="PATH", marks=pytest.mark.slow),
    ],
)
def test_no_compiler_is_a_reason(machine: Machine, changed: dict[str, str]) -> None:
    """Most machines that run Python have no compiler: auto goes on without, and asking for cpp says what to install."""
    reason, err = machine.refuses(**changed)
    name = changed["CXX"].partition(" ")[0] or "c++"
    assert reason == f"cpp needs a C++ compiler, and there is no '{name}' (install g++, or name one in CXX)"
    assert err == ""
    assert machine.files() == []


@pytest.mark.slow
def test_a_processor_without_avx2_is_a_reason(machine: Machine) -> None:
    """Built anyway, the library would end the process with an illegal instruction."""
    reason, err = machine.refuses(ATEN_CPU_CAPABILITY="default")
    assert reason == "cpp needs Linux and a CPU with AVX2, this is Linux with DEFAULT"
    assert err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["echo 'x.cpp:1: error: no' >&2; echo more >&2; exit 3"],
            r" failed with exit code 3: x\.cpp:1: error: no",
        ),
        (['head -c 1000 "$built" > "$out"; kill -9 $$'], " failed with exit code -9: it said nothing"),
        (["exit 0"], r"cpp cannot build in .*No such file.* \(TORCH_EXTENSIONS_DIR names another folder\)"),
    ],
    ids=["fails", "is killed", "writes nothing"],
)
def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing(
    machine: Machine, lines: list[str], expected: str
) -> None:
    """Half a library under the final name is loaded by every process to come; and once the compiler is repaired nothing
    need be removed by hand."""
    machine.install(*lines)
    reason, err = machine.refuses()
    assert re.search(expected + "$", reason)
    assert err == LINE
    assert machine.files() == []
    machine.install(GOOD)
    assert machine.works() == LINE
    assert machine.files() == ["attnlab_*.so"]
    assert machine.works() == ""


def test_a_compiler_that_hangs_is_a_reason(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A licence server that does not answer would hold up the first token for ever."""
    monkeypatch.setattr(native, "_BUILD_SECONDS", 0.5)
    monkeypatch.setenv("CXX", machine.install("exec sleep 60"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(machine.folder))
    monkeypatch.chdir(machine.folder.parents[1])
    assert native.library.__wrapped__() == (None, f"{machine.compiler} took more than 0.5 s")
    assert machine.files() == []


@pytest.mark.parametrize("where", [pytest.param("below a file", marks=pytest.mark.slow), "name too long"])
def test_a_folder_that_cannot_be_written_is_a_reason(machine: Machine, tmp_path: Path, where: str) -> None:
    """A read-only home, or root's in a container that runs as somebody else: looking whether the file is there raises
    as well, and not only OSErrors that pathlib takes for "no"."""
    machine.install(GOOD)
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache" if where == "below a file" else tmp_path / ("x" * 300)
    reason, err = machine.refuses(TORCH_EXTENSIONS_DIR=str(folder))
    assert reason.startswith(f"cpp cannot build in {folder}: ")
    assert reason.endswith("(TORCH_EXTENSIONS_DIR names another folder)")
    assert err == ""


def test_where_the_library_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where torch keeps extensions; a user without a home, as containers make them, gets a reason, not a traceback."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert native._folder() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native._folder() == tmp_path / "torch_extensions"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native._folder() == tmp_path / ".cache" / "torch_extensions"
    monkeypatch.delenv("HOME")

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    found, reason = native.library.__wrapped__()
    assert found is None
    assert reason.startswith("has nowhere to build: ")
    assert reason.endswith("(TORCH_EXTENSIONS_DIR names a folder)")


def _until(seen: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not seen():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_process_killed_while_compiling_is_in_nobodys_way(machine: Machine) -> None:
    """torch's own loader leaves a lock that the next process waits for, for ever. Here it builds; what was left is
    never loaded, and goes with the first build after it can be no living one's."""
    machine.install('head -c 1000 "$built" > "$out"; touch "$mark"; exec sleep 120')
    process = machine.start()
    try:
        _until(machine.mark.exists, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        (left,) = machine.folder.iterdir()
        assert [path.stat().st_size for path in left.iterdir()] == [1000]

        machine.install(GOOD)
        assert machine.works() == LINE
        assert sorted(machine.files()) == sorted(["attnlab_*.so", f"{left.name}/"])  # perhaps it is still being written
        for path in machine.folder.glob("*.so"):
            path.unlink()
        long_ago = time.time() - 3 * native._BUILD_SECONDS
        os.utime(left, (long_ago, long_ago))
        assert machine.works() == LINE
        assert machine.files() == ["attnlab_*.so"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its compiler
        process.communicate()


@pytest.mark.slow
def test_four_first_processes_at_once(machine: Machine) -> None:
    """A test runner's workers all build at once: here no compiler ends before all four have begun. All work, and one
    file is left."""
    machine.mark.mkdir()
    wait = "n=0; while [ $(ls $mark | wc -l) -lt 4 ] && [ $n -lt 2400 ]; do sleep 0.05; n=$((n+1)); done"
    machine.install("touch $mark/$$", wait, GOOD)
    for process in [machine.start() for _ in range(4)]:
        assert result(process) == ([True, "", "", "cpp"], LINE)
    assert len(list(machine.mark.iterdir())) == 4
    assert machine.files() == ["attnlab_*.so"]


# Each damaged file is met by a process of its own, forked from one that has loaded nothing.
DAMAGED = """
import os
from pathlib import Path
from attnlab import native

def ask(expected=None):
    child = os.fork()
    if not child:
        found, _ = native.library()
        os._exit(0 if found and expected in (None, Path(found._name).read_bytes()) else 1)
    return os.waitpid(child, 0)[1]

assert ask() == 0
(path,) = Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*.so")
whole = path.read_bytes()
damaged = {str(n): whole[:n] for n in (0, 10, 500, 1000, len(whole) // 2, len(whole) - 33, len(whole) - 1)}
half = len(whole) // 2
damaged |= {"zeros behind": whole[:half] + bytes(len(whole) - half), "zeros": bytes(len(whole))}
damaged |= {"one bit": whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :], "text": b"half a library"}
for name, data in damaged.items():
    path.unlink()
    path.write_bytes(data)
    status = ask(whole)
    assert status == 0, f"{name}: {status}"
print(len(damaged))
"""


@pytest.mark.slow
def test_a_damaged_library_is_built_anew(machine: Machine) -> None:
    """A power cut or a full disk can leave a file of the right name and half its length: to load it kills the process
    with a bus error, at once or at its first call, and does so in every process to come."""
    machine.install(GOOD)
    assert result(machine.start(DAMAGED)) == (11, LINE * 12)


def test_a_library_of_another_world_is_a_reason(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home shared by machines: a whole file that this one's loader refuses."""
    monkeypatch.setenv("CXX", machine.install('echo "not for here" > "$out"'))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(machine.folder))
    monkeypatch.chdir(machine.folder.parents[1])
    found, reason = native.library.__wrapped__()
    assert found is None
    assert re.fullmatch(r".*attnlab_[0-9a-f]{16}\.so cannot be loaded \(.+\); remove it to build it anew", reason)


def test_an_empty_cxx_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CXX= command` is how a shell unsets it for one command."""
    monkeypatch.setenv("CXX", "  ")
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.library.__wrapped__()[1].startswith("needs a C++ compiler, and there is no 'c++'")


# --- together with torch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpp", "auto"])
def test_one_operator_is_dispatched(impl: str) -> None:
    """In a small model a step of decoding is torch's overhead, a microsecond or more for each operator: a call makes
    its output and nothing else, no view, no copy. Of torch's memory it takes as much: neither K nor V is repeated."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = inputs(2, 3, 5, 521, 32, dtype)
        for given in ((q, k, v), (_by_token(q), _cache(k), _cache(v))):
            attend(*given, causal=True, impl=impl)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
                attend(*given, causal=True, impl=impl)
            assert [event.name for event in prof.events() if event.name != "[memory]"] == ["aten::empty"]
            taken = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
            assert [size for size in taken if size > 0] == [q.nbytes]


# Threads are counted before anything runs, after torch has used three, and after the library has.
TOGETHER = """
import json, os, re, torch
from attnlab import native
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
counts = [count()]
torch.ones(2**22).exp()
counts.append(count())
native.decode(torch.ones(1, 4, 1, 64), torch.ones(1, 1, 8192, 64), torch.ones(1, 1, 8192, 64), 1.0)
counts.append(count())
files = {line.split()[-1] for line in open("/proc/self/maps")}
print(json.dumps([counts, sorted(file for file in files if re.search(r"/lib[a-z]*omp[^/]*$", file))]))
"""


@pytest.mark.slow
def test_torchs_threads_are_shared(tmp_path: Path) -> None:
    """A second OpenMP runtime (LLVM's beside GNU's, say) keeps a second pool, whose threads spin on the cores that
    torch's are to run on next. (A second copy of the same one would lie idle: its names are those of torch's copy.)"""
    (counts, runtimes), _ = result(start(TOGETHER, tmp_path, {**os.environ}))
    assert counts[1] == counts[0] + 2, "torch did not use three threads"
    assert counts[2] == counts[1]
    assert len({re.split(r"[.-]", Path(file).name)[0] for file in runtimes}) == 1, runtimes


# K and V are 48 MB each; what the process holds at most may not grow by a quarter of one.
RESIDENT = """
import json, resource, torch
from attnlab import native
q, k, v = (torch.ones(size, dtype=torch.float16) for size in ((3, 64, 1, 64), (3, 4, 31250, 64), (3, 4, 31250, 64)))
torch.set_num_threads(2)
native.decode(q, k[:, :, :1031], v[:, :, :1031], 1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
native.decode(q, k, v, 1.0)
print(json.dumps([k.nbytes // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


@pytest.mark.slow
def test_decode_holds_no_copy_of_k_or_v(tmp_path: Path) -> None:
    """Memory that C++ takes is not torch's to count: the operating system counts it. A copy of K, converted to float32
    or repeated for its heads, would be seen."""
    (k, grown), _ = result(start(RESIDENT, tmp_path, {**os.environ}))
    assert grown < k / 4, f"{grown} KiB more, k is {k}"


def test_the_end_of_memory_is_an_exception_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    """An exception of C++ that leaves a function called by ctypes ends the process, and a sweep with it; in torch's
    words it becomes a row. The address space is capped below what the rows of this product need."""
    code = """
import resource, torch
from attnlab import native
from attnlab.measure.clock import out_of_memory
torch.set_num_threads(1)
x, w = torch.ones(64, 2**20, dtype=torch.bfloat16), torch.ones(8, 2**20, dtype=torch.bfloat16)
native.linear(x[:1], w)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 2**26, held + 2**26))
try:
    native.linear(x, w)
except RuntimeError as error:
    print(out_of_memory(error))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "native linear: not enough memory: you tried to allocate memory for its scratch\n", (
        done.stderr
    )
