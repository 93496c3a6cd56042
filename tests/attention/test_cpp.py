"""What the C++ arm refuses, and with which words. Its numbers are tested with every implementation's in
``test_attend.py``, its kernels in ``test_native.py``."""

import os
import platform
import shutil

import pytest
import torch
from torch import Tensor

from attnlab.attention import attend, backend, cpp, picked, supports
from attnlab.errors import InputError

# Asked without asking the library, so that one that no longer builds is seen.
HERE = (
    platform.system() == "Linux"
    and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    and shutil.which(os.environ.get("CXX") or "c++") is not None
)


def inputs(
    T: int = 1, S: int = 11, D: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """q, k, v of 2 sequences, 6 query heads and 3 KV heads."""
    generator = torch.Generator().manual_seed(7)
    sizes = (2, 6, T, D), (2, 3, S, D), (2, 3, S, D)
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def spread(index: int) -> list[Tensor]:
    """Inputs of which one has a gap behind each number."""
    return [torch.stack((x, x), -1)[..., 0] if i == index else x for i, x in enumerate(inputs())]


def test_it_runs_where_it_can() -> None:
    """All other tests of the kernel are about what ``supports`` allows: were that nothing, they would be green."""
    able, reason = supports("cpp", *inputs())
    assert able == HERE, reason
    if able:
        assert (reason, backend("cpp", *inputs()), picked(*inputs())) == ("", "native", "cpp")
    else:
        assert reason.startswith("cpp needs ")
        assert picked(*inputs()) == "grouped"


GAPS = "cpp needs the elements of a head to lie next to each other"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (inputs(T=3), "cpp decodes: it takes one query token, got 3"),
        (inputs(dtype=torch.float64), "cpp takes torch.float32, torch.bfloat16, torch.float16, got torch.float64"),
        (inputs(D=20), "cpp needs a head_dim that is a multiple of 8, got 20"),
        (spread(0), GAPS),
        (spread(1), GAPS),
        (spread(2), GAPS),
    ],
    ids=["T", "float64", "head_dim", "q-spread", "k-spread", "v-spread"],
)
def test_every_reason(given: list[Tensor], expected: str) -> None:
    """The kernel checks nothing. What it cannot do is refused before, in the words that asking for it raises; ``auto``
    takes another."""
    assert supports("cpp", *given) == (False, expected)
    with pytest.raises(InputError, match=f"^impl='cpp' cannot run here: {expected}$"):
        attend(*given, impl="cpp")
    assert picked(*given) != "cpp"


def test_the_device_is_a_reason() -> None:
    """Asked of the arm itself: ``attend`` lets through cpu and cuda alone, and a pointer into the wrong memory ends the
    process."""
    assert cpp.supports(*inputs(device="meta"), True) == (False, "cpp runs on the CPU, these tensors are on meta")


@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
def test_gradients_are_refused_not_dropped(which: int) -> None:
    """An output without a history trains nothing and says nothing: while gradients are on, an input that wants one is
    not for cpp, and ``auto`` gives it to an arm that has them."""
    qkv = inputs()
    qkv[which].requires_grad_()
    assert supports("cpp", *qkv) == (False, "cpp has no gradient")
    with pytest.raises(InputError, match=r"^impl='cpp' cannot run here: cpp has no gradient$"):
        attend(*qkv, impl="cpp")
    attend(*qkv).sum().backward()
    assert qkv[which].grad is not None
    assert qkv[which].grad.abs().sum() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_are_no_obstacle_while_gradients_are_off(mode: type[torch.no_grad]) -> None:
    """A model's projections want gradients at other times: generating must not lose the fast arm to that."""
    qkv = [x.requires_grad_() for x in inputs()]
    exact = attend(*(x.detach().double() for x in qkv), impl="reference")
    with mode():
        assert supports("cpp", *qkv)[0] == HERE
        assert picked(*qkv) == ("cpp" if HERE else "grouped")
        out = attend(*qkv, impl="cpp" if HERE else "auto")
    assert not out.requires_grad
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
