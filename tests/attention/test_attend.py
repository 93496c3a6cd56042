"""Every implementation against a loop over heads, in float64, written here and sharing no line with the library.

Tolerances are not chosen: they are twice the error that the same loop makes when it computes in the tested dtype, plus
one rounding of the result. Sizes differ from each other, so that no two axes can be swapped unnoticed.
"""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attnlab import KVCache, ModelShape
from attnlab.attention import attend, implementations, peers, supports
from attnlab.errors import InputError

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = [(H, G) for H in (12, 16, 7) for G in range(1, H + 1) if H % G == 0]
# T, S, causal: one key; decoding; a few tokens behind a past; a prompt; and without a mask, T below and above S
SPANS = [(1, 1, True), (1, 11, True), (3, 11, True), (5, 5, True), (3, 11, False), (5, 3, False)]


def _runs(impl: str, T: int, dtype: torch.dtype, device: str) -> bool:
    q, kv = torch.ones(1, 4, T, 16, dtype=dtype, device=device), torch.ones(1, 2, 5, 16, dtype=dtype, device=device)
    return supports(impl, q.requires_grad_(dtype == torch.float64), kv, kv, True)[0]


HERE = [impl for impl in implementations() if any(_runs(impl, 1, torch.float32, device) for device in DEVICES)]

every_impl = pytest.mark.parametrize("impl", [*HERE, "auto"])
every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are tiny: a second thread only waits for the first, ten times as long as the work takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loop(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None, step: torch.dtype | None = None
) -> Tensor:
    """Attention, one head at a time: query head h reads KV head h // R, query i the keys up to S - T + i.

    With ``step``, every intermediate is rounded to that dtype: what computing in it costs.
    """
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    hidden = torch.tensor([[causal and j > S - T + i for j in range(S)] for i in range(T)])
    heads = []
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            scores = _rounded(_rounded(q[b, h] @ k[b, g].T, step) * scale, step).masked_fill(hidden, float("-inf"))
            heads.append(_rounded(_rounded(scores.softmax(-1), step) @ v[b, g], step))
    return torch.stack(heads).reshape(B, H, T, D)


def _rounded(x: Tensor, step: torch.dtype | None) -> Tensor:
    return x if step is None else x.to(step).to(x.dtype)


def inputs(H: int, G: int, T: int, S: int, D: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(hash((H, G, T, S, D)))  # the hash of integers is the same in every run
    sizes = (2, H, T, D), (2, G, S, D), (2, G, S, D)
    return tuple(torch.randn(size, generator=generator).to(dtype).to(device) for size in sizes)


def exact_and_budget(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> tuple[Tensor, float]:
    """The float64 result, and the largest error that q's dtype excuses."""
    exact = loop(*(x.cpu().double() for x in (q, k, v)), causal, scale)
    low = loop(*(x.cpu().float() for x in (q, k, v)), causal, scale, step=q.dtype)
    own = (low.double() - exact).abs().max().item()
    return exact, 2 * own + torch.finfo(q.dtype).eps * exact.abs().max().item()


@cache
def case(
    H: int, G: int, T: int, S: int, D: int, causal: bool, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], Tensor, float]:
    qkv = inputs(H, G, T, S, D, dtype)
    return qkv, *exact_and_budget(*qkv, causal)


def check(
    impl: str, qkv: tuple[Tensor, ...], causal: bool, exact: Tensor, budget: float, scale: float | None = None
) -> None:
    """The call equals ``exact`` within ``budget``; where this implementation says no, it must raise and say why."""
    able, reason = supports(impl, *qkv, causal)
    if not able:
        with pytest.raises(InputError) as caught:
            attend(*qkv, causal=causal, impl=impl, scale=scale)
        assert reason in str(caught.value)
        return
    out = attend(*qkv, causal=causal, impl=impl, scale=scale)
    assert (out.shape, out.dtype, out.device) == (qkv[0].shape, qkv[0].dtype, qkv[0].device)
    error = (out.double().cpu() - exact).abs().max().item()
    assert error <= budget, (
        f"off by {error:.1e}, allowed {budget:.1e}: q {list(qkv[0].shape)}, k {list(qkv[1].shape)}, {causal=}"
    )


@every_device
@every_dtype
@pytest.mark.parametrize(("H", "G"), HEADS, ids=[f"{G}-of-{H}" for H, G in HEADS])
@every_impl
def test_equals_a_loop_over_heads(impl: str, H: int, G: int, dtype: torch.dtype, device: str) -> None:
    """Tests on G = 1 and G = H alone passed for years over a wrong head map: every divisor, with and without a past."""
    for T, S, causal in SPANS:
        qkv, exact, budget = case(H, G, T, S, 16, causal, dtype)
        check(impl, tuple(x.to(device) for x in qkv), causal, exact, budget)


@every_device
@every_dtype
@pytest.mark.parametrize("D", [7, 16, 23, 64, 256])
@every_impl
def test_every_head_dim(impl: str, D: int, dtype: torch.dtype, device: str) -> None:
    """Kernels pad or refuse odd head sizes; the default scale must follow D, not a padded D."""
    for T, S, causal in SPANS:
        qkv, exact, budget = case(12, 4, T, S, D, causal, dtype)
        check(impl, tuple(x.to(device) for x in qkv), causal, exact, budget)


@every_device
@every_impl
def test_long_rows(impl: str, device: str) -> None:
    """Kernels work in blocks of up to 512 keys and 256 queries: sizes that leave a ragged last block of each."""
    qkv, exact, budget = case(6, 2, 259, 521, 16, True, torch.float32)
    check(impl, tuple(x.to(device) for x in qkv), True, exact, budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_reference_rounds_once(dtype: torch.dtype) -> None:
    """An oracle that computes in bf16 excuses every error of bf16: whatever the inputs' dtype, the reference computes
    in float32 or wider, so that only its last rounding shows."""
    for T, S, causal in SPANS:
        qkv, exact, _ = case(12, 4, T, S, 64, causal, dtype)
        out = attend(*qkv, causal=causal, impl="reference").double()
        assert ((out - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()


@every_device
@pytest.mark.parametrize("scale", [0.37, 1.0])
@every_impl
def test_scale(impl: str, scale: float, device: str) -> None:
    """A scale that is dropped on the way to a kernel leaves D ** -0.5, here 0.25."""
    for T, S, causal in SPANS:
        qkv = inputs(12, 4, T, S, 16, torch.float32, device)
        check(impl, qkv, causal, *exact_and_budget(*qkv, causal, scale), scale)


# --- cases that one can check with a pencil -------------------------------------------------------------------------


@every_device
@pytest.mark.parametrize(
    ("G", "expected"),
    [(1, [30, 40, 45, 48]), (2, [30, 40, 90, 96]), (4, [30, 80, 135, 192])],
    ids=["MQA", "GQA-2", "MHA"],
)
@every_impl
def test_by_hand(impl: str, G: int, expected: list[float], device: str) -> None:
    """Four query heads, two keys, scale 1. Query head h is ln(h + 1), the keys are 0 and 1, so their weights are
    1 / (h + 2) and (h + 1) / (h + 2). The first value is 0; the second, of KV head g, is 60 · (g + 1). Head h
    therefore answers 60 · (g + 1) · (h + 1) / (h + 2) with g = h // R:

        h + 1 / h + 2 · 60     30   40   45   48
        G = 1, g = 0 0 0 0     30   40   45   48
        G = 2, g = 0 0 1 1     30   40   90   96      (heads tiled, g = 0 1 0 1, would give 30 80 45 96)
        G = 4, g = 0 1 2 3     30   80  135  192
    """
    q, k, v = torch.zeros(1, 4, 1, 16), torch.zeros(1, G, 2, 16), torch.zeros(1, G, 2, 16)
    q[0, :, 0, 0] = torch.log(torch.arange(1.0, 5.0))
    k[0, :, 1, 0] = 1
    v[0, :, 1, 0] = 60 * torch.arange(1.0, G + 1)
    for causal in (False, True):
        out = attend(q.to(device), k.to(device), v.to(device), causal=causal, impl=impl, scale=1.0)
        assert out[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)


@every_device
@every_impl
def test_heads_are_repeated_not_tiled(impl: str, device: str) -> None:
    """Tiled heads, (r g) for (g r), agree at G = 1 and G = H and train well; published weights then give nonsense (seen
    in x-transformers). With KV head g holding the value g, head h must answer h // R, whatever q and k are."""
    for H, G in HEADS:
        for T, S, causal in ((1, 11, True), (3, 11, True), (8, 8, False)):
            q, k, _ = inputs(H, G, T, S, 16, torch.float32, device)
            v = torch.arange(G, device=device).float()[None, :, None, None].expand(2, G, S, 16)
            if supports(impl, q, k, v, causal)[0]:
                out = attend(q, k, v, causal=causal, impl=impl)
                heads = (torch.arange(H, device=device) // (H // G)).float()
                torch.testing.assert_close(out, heads[None, :, None, None].expand_as(out), rtol=1e-5, atol=1e-5)


@every_device
@pytest.mark.parametrize(("T", "S"), [(1, 7), (3, 7), (7, 7), (5, 131)])
@every_impl
def test_causal_is_aligned_bottom_right(impl: str, T: int, S: int, device: str) -> None:
    """SDPA's is_causal is top-left: with a past it shows query i the keys 0 … i. All keys equal and the value of key j
    being j, query i must answer the mean of 0 … S - T + i, which is (S - T + i) / 2; top-left would give i / 2."""
    q, k, _ = inputs(4, 2, T, S, 16, torch.float32, device)
    v = torch.arange(S, device=device).float()[None, None, :, None].expand(2, 2, S, 16)
    if not supports(impl, q, k, v, True)[0]:  # check() has seen that it says so
        return
    out = attend(q, torch.ones_like(k), v, causal=True, impl=impl)
    means = torch.tensor([(S - T + i) / 2 for i in range(T)], device=device)
    torch.testing.assert_close(out, means[None, None, :, None].expand_as(out), rtol=1e-5, atol=1e-5)


# --- memory as it lies ----------------------------------------------------------------------------------------------


def _from_cache(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    G, S, D = k.shape[1:]
    cache = KVCache(ModelShape(2, 1, G, G, D, 1, 1), 2, S + 6, k.dtype, k.device)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    return q, *cache.append(1, k, v)


def _from_projections(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))


def _last_axis_strided(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))


@every_device
@pytest.mark.parametrize("layout", [_from_cache, _from_projections, _last_axis_strided])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_impl
def test_inputs_that_are_views(
    impl: str, dtype: torch.dtype, layout: Callable[..., tuple[Tensor, ...]], device: str
) -> None:
    """Real K and V are never fresh tensors: they are views of a longer cache, whose unused part is NaN here, or of a
    projection. A kernel that trusts strides it was not given reads its neighbour's numbers."""
    for T, S, causal in SPANS[1:]:
        qkv, exact, budget = case(12, 4, T, S, 16, causal, dtype)
        views = layout(*(x.to(device) for x in qkv))
        assert S == 1 or not views[1].is_contiguous()
        check(impl, views, causal, exact, budget)


def _peak_bytes(call: Callable[[], Tensor]) -> int:
    """Largest sum of bytes that ``call`` has allocated at once, scratch inside kernels included."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("T", "S", "causal"), [(1, 512, True), (3, 512, True), (3, 512, False), (128, 128, True)])
def test_grouped_never_expands_k_and_v(T: int, S: int, causal: bool) -> None:
    """A group-sharing kernel that repeats K and V inside gives the right numbers and spends every byte saved; only the
    allocator can tell. ``expanded`` is the control: it must hold both repeated tensors, ``grouped`` not even one."""
    B, H, G, D = 2, 16, 2, 32
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, G, S, D), torch.randn(B, G, S, D)
    repeated, output = k.nbytes * H // G, q.nbytes
    peak = {
        impl: _peak_bytes(lambda impl=impl: attend(q, k, v, causal=causal, impl=impl))
        for impl in ("grouped", "expanded")
    }
    assert peak["expanded"] >= 2 * repeated + output
    assert peak["grouped"] < output + repeated / 2


@pytest.mark.parametrize(("T", "S", "causal"), [(1, 11, True), (1, 11, False), (3, 11, False)])
def test_grouped_folds_a_group_into_the_rows_of_one_product(T: int, S: int, causal: bool) -> None:
    """The fold is why ``grouped`` is fast and is invisible in its numbers: without a mask the kernel must see G heads
    of R · T queries, never H heads."""
    q, k, v = inputs(12, 4, T, S, 16, torch.float32)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
        attend(q, k, v, causal=causal, impl="grouped")
    seen = [event.input_shapes[:3] for event in prof.events() if event.name == "aten::scaled_dot_product_attention"]
    assert seen == [[[2, 4, 3 * T, 16], [2, 4, S, 16], [2, 4, S, 16]]]


# --- gradients ------------------------------------------------------------------------------------------------------


differentiable = pytest.mark.parametrize("impl", [*(i for i in HERE if _runs(i, 3, torch.float64, "cpu")), "auto"])


@pytest.mark.parametrize("G", [1, 2, 6])
@differentiable
def test_gradients(impl: str, G: int) -> None:
    """A fold that is right forwards can drop the sum over a group's heads backwards: gradients of q, k and v against
    those of the loop, in float64."""
    for T, S, causal in SPANS:
        own = [x.requires_grad_() for x in inputs(6, G, T, S, 16, torch.float64)]
        weight = torch.randn(2, 6, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        expected = torch.autograd.grad((loop(*own, causal) * weight).sum(), own)
        got = torch.autograd.grad((attend(*own, causal=causal, impl=impl) * weight).sum(), own)
        for name, mine, loops in zip("qkv", got, expected, strict=True):
            torch.testing.assert_close(mine, loops, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"d{name}: {m}")


@differentiable
def test_gradients_are_finite_differences(impl: str) -> None:
    """The loop's own gradients come from autograd too; differences of outputs do not."""
    qkv = [x[:1].clone().requires_grad_() for x in inputs(4, 2, 2, 5, 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, causal=True, impl=impl), qkv)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_an_implementation_that_cannot_run_raises_with_the_reason() -> None:
    """An explicit request that falls back in silence puts the wrong name on a measurement."""
    qkv = inputs(12, 4, 3, 11, 16, torch.float32)
    able, reason = supports("flex", *qkv, True)
    assert not able
    assert reason == "flex needs CUDA: on cpu every new shape costs seconds of compilation"
    with pytest.raises(InputError, match=f"^impl='flex' cannot run here: {reason}$"):
        attend(*qkv, causal=True, impl="flex")


def test_an_unknown_implementation_lists_the_valid_ones() -> None:
    """And the nearest names, as everywhere."""
    qkv = inputs(12, 4, 3, 11, 16, torch.float32)
    valid = ", ".join(["auto", *implementations(), *peers()])
    for call in (lambda: attend(*qkv, impl="groupd"), lambda: supports("groupd", *qkv)):
        with pytest.raises(
            InputError,
            match=rf"'groupd'; did you mean grouped\? valid: {valid}$",
        ):
            call()


def test_auto_runs_wherever_grouped_does() -> None:
    """``auto`` is what a reader gets without asking: it may choose, never refuse."""
    for dtype in (*DTYPES.values(), torch.float64):
        for T, S, causal in SPANS:
            for H, G in HEADS:
                qkv = inputs(H, G, T, S, 5, dtype)
                assert supports("grouped", *qkv, causal) == supports("auto", *qkv, causal) == (True, "")
                assert attend(*qkv, causal=causal).isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_a_scale_is_above_0(scale: float) -> None:
    """torch's CPU kernel multiplies the masked -inf by the scale: at 0 or below a causal call answers NaN, silently."""
    qkv = inputs(12, 4, 1, 5, 16, torch.float32)
    for impl in (*HERE, "auto"):
        with pytest.raises(InputError, match="scale must be a number above 0, got"):
            attend(*qkv, causal=True, impl=impl, scale=scale)


def _q(*size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (
            _q(2, 12, 3, 16),
            _q(2, 5, 11, 16),
            _q(2, 5, 11, 16),
            "5 KV heads do not divide 12 query heads; valid: 1, 2, 3, 4, 6",
        ),
        (_q(2, 12, 3, 16), _q(2, 24, 11, 16), _q(2, 24, 11, 16), "24 KV heads do not divide 12"),
        (_q(12, 3, 16), _q(4, 11, 16), _q(4, 11, 16), "got 3, 3 and 3 dimensions"),
        (_q(2, 12, 3, 16), _q(2, 4, 11, 16), _q(2, 4, 13, 16), r"k and v must both be \[2, G, S, 16\]"),
        (_q(2, 12, 3, 16), _q(3, 4, 11, 16), _q(3, 4, 11, 16), r"got k \[3, 4, 11, 16\]"),
        (_q(2, 12, 3, 16), _q(2, 4, 11, 17), _q(2, 4, 11, 17), r"must both be \[2, G, S, 16\]"),
        (_q(2, 12, 0, 16), _q(2, 4, 11, 16), _q(2, 4, 11, 16), "every size must be at least 1"),
        (_q(2, 12, 3, 16), _q(2, 4, 0, 16), _q(2, 4, 0, 16), "every size must be at least 1"),
        (_q(2, 12, 3, 16, dtype=torch.bfloat16), _q(2, 4, 11, 16), _q(2, 4, 11, 16), "must share one floating dtype"),
        (*(_q(2, 4, 3, 16, dtype=torch.int64),) * 3, "must share one floating dtype"),
        (*(_q(2, 4, 3, 16, device="meta"),) * 3, "must share one device of"),
        (_q(2, 12, 12, 16), _q(2, 4, 11, 16), _q(2, 4, 11, 16), "at least as many keys as queries, got T=12 > S=11"),
    ],
    ids=["G∤H", "G>H", "3D", "k≠v", "batch", "head_dim", "T=0", "S=0", "dtypes", "integers", "device", "T>S"],
)
@pytest.mark.parametrize("impl", ["auto", "reference", "grouped"])
def test_tensors_that_do_not_fit_are_refused_alike(impl: str, q: Tensor, k: Tensor, v: Tensor, message: str) -> None:
    """Broadcasting makes something of most wrong shapes, and each kernel something else: one check is before all."""
    with pytest.raises(InputError, match=message):
        attend(q, k, v, causal=True, impl=impl)
    able, reason = supports(impl, q, k, v, True)
    assert not able
    assert reason
