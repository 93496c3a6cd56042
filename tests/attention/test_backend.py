"""``backend()`` tells which kernel torch takes; here torch's own profiler says which one really ran."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from attnlab.attention import attend, backend, picked

# operators whose presence in a trace names the backend; the CPU's flash kernel has a name of its own
OPERATORS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_attention_math": "math",
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# T queries, S keys, causal, D
CALLS = {
    "decode": (1, 11, True, 16),
    "past": (3, 11, True, 16),
    "prompt": (5, 5, True, 16),
    "unmasked": (3, 11, False, 16),
    "odd-head_dim": (3, 11, True, 23),
    "wide-head_dim": (1, 11, True, 256),
}


def _inputs(T: int, S: int, D: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        torch.randn(size, device=device).to(dtype) for size in ((2, 12, T, D), (2, 4, S, D), (2, 4, S, D))
    )


def _ran(impl: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        attend(q, k, v, causal=causal, impl=impl)
    return {OPERATORS[e.key] for e in prof.key_averages() if e.key in OPERATORS}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("impl", ["expanded", "sdpa", "grouped", "auto"])
def test_backend_is_what_the_profiler_saw(impl: str, call: str, dtype: torch.dtype, device: str) -> None:
    """A row that says "flash" while the math path ran, three times slower, is how enable_gqa misled people (PyTorch
    PR 181528): the name must come from the same call that is timed."""
    T, S, causal, D = CALLS[call]
    qkv = _inputs(T, S, D, dtype, device)
    named = backend(impl, *qkv, causal=causal)
    assert _ran(impl, *qkv, causal) == (set() if named == "native" else {named})
    assert named != "native" or picked(*qkv, causal) == "cpp"


@pytest.mark.parametrize(("impl", "expected"), [("sdpa", "math"), ("grouped", "math"), ("expanded", "flash")])
def test_backend_follows_the_layout(impl: str, expected: str) -> None:
    """A K whose last axis is strided rules the fused CPU kernel out, unless repeating has made a fresh tensor of it:
    a constant answer per implementation would be wrong here."""
    q, k, v = _inputs(3, 11, 16, torch.float32, "cpu")
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    for causal in (False, True):
        assert _ran(impl, q, k, v, causal) == {backend(impl, q, k, v, causal=causal)} == {expected}


@pytest.mark.parametrize("impl", ["expanded", "sdpa", "grouped"])
def test_backend_follows_the_callers_choice(impl: str) -> None:
    """torch lets a caller pin a backend around the call; the answer inside is the pinned one."""
    qkv = _inputs(3, 11, 16, torch.float32, "cpu")
    assert backend(impl, *qkv, causal=True) == "flash"
    with sdpa_kernel(SDPBackend.MATH):
        assert _ran(impl, *qkv, True) == {backend(impl, *qkv, causal=True)} == {"math"}


def test_plain_operators_are_called_torch() -> None:
    """The reference calls no SDPA at all, and must not borrow the name of a backend."""
    qkv = _inputs(3, 11, 16, torch.float32, "cpu")
    assert backend("reference", *qkv, causal=True) == "torch"
    assert _ran("reference", *qkv, True) == set()
