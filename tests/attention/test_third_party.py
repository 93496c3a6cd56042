"""Other people's kernels: absent ones are told apart from refusals, and each is handed K and V as its documentation
asks. The packages run on CUDA alone; here their documented calls are worked out in plain PyTorch in their place."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import FlexKernelOptions

from attnlab.attention import attend, flex, implementations, peers, supports, third_party
from attnlab.errors import InputError

SIZES = ((3, 10, 1, 64), (3, 2, 112, 64), (3, 2, 112, 64))  # R = 5


def _inputs(*, by_token: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """K and V as views of longer caches [B, G, S, D] or [B, S, G, D]."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(size, generator=generator) for size in SIZES)
    for x in (k, v):
        B, G, S, D = x.shape
        longer = torch.full((B, S + 16, G, D) if by_token else (B, G, S + 16, D), float("nan"))
        view = longer[:, :S].transpose(1, 2) if by_token else longer[:, :, :S]
        view.copy_(x)
        x.set_(view)  # type: ignore[call-overload]
    return q, k, v


def test_peers_are_named_but_not_ours() -> None:
    """A sweep goes over ``implementations()``: somebody else's kernel in it would be timed, and drawn, as ours."""
    assert peers() == ["flex_tuned", "flash", "cudnn", "xformers", "flashinfer"]
    assert not set(peers()) & set(implementations())


@pytest.mark.parametrize("peer", peers())
def test_a_peer_that_cannot_run_raises_with_the_reason(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU none can; one that fell back would be slower than ours under its own name."""
    q, k, v = _inputs()
    monkeypatch.setattr(third_party, "find_spec", lambda package: SimpleNamespace(name=package))
    able, reason = supports(peer, q, k, v)
    assert not able and "CUDA" in reason
    with pytest.raises(InputError, match=f"^impl='{peer}' cannot run here: "):
        attend(q, k, v, impl=peer)


@pytest.mark.parametrize("package", ["xformers", "flashinfer"])
def test_an_absent_package_is_told(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Not installed" and "does not take this call" are mended in different ways."""
    monkeypatch.setattr(third_party, "find_spec", lambda name: None)
    assert supports(package, *_inputs()) == (False, f"the package {package} is not installed")


@pytest.mark.parametrize("by_token", [False, True])
def test_xformers_gets_its_layout_without_a_copy(by_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout is [B, tokens, G, R, D] with K and V repeated by a stride of zero, by which it knows a group; repeated
    in memory they would cost R times the reading, and what was timed would be ``expanded``."""
    q, k, v = _inputs(by_token=by_token)

    def forward(query: Tensor, key: Tensor, value: Tensor, *, scale: float, op: object) -> Tensor:
        assert op is fmha.triton_splitk.FwOp
        for mine, given in ((key, k), (value, v)):
            assert mine.stride(3) == 0 and mine.data_ptr() == given.data_ptr()
        scores = torch.einsum("bmgrd,bngrd->bgrmn", query, key) * scale
        return torch.einsum("bgrmn,bngrd->bmgrd", scores.softmax(-1), value)

    fmha: Any = ModuleType("xformers.ops.fmha")
    fmha.memory_efficient_attention_forward, fmha.triton_splitk = forward, SimpleNamespace(FwOp=object())
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(fmha=fmha))
    out = third_party.PEERS["xformers"].attend(q, k, v, causal=True, scale=0.3)
    torch.testing.assert_close(out, attend(q, k, v, impl="reference", scale=0.3))


class PagedDecode:
    """FlashInfer's wrapper by its documentation: sequence b has the pages ``indices[indptr[b]:indptr[b + 1]]`` of
    [page, G, 16, D], the last of them filled up to ``last_page_len[b]``."""

    planned = 0

    def __init__(self, workspace: Tensor, kv_layout: str, use_tensor_cores: bool) -> None:
        assert (workspace.dtype, kv_layout, use_tensor_cores) == (torch.uint8, "HND", True)

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, H: int, G: int, D: int, page: int, **given: Any
    ) -> None:
        assert {x.dtype for x in (indptr, indices, last_page_len)} == {torch.int32}
        assert given == {"q_data_type": torch.float32, "sm_scale": 0.3} and (H, G, D, page) == (10, 2, 64, 16)
        self.tables = indptr.tolist(), indices.tolist(), last_page_len.tolist()
        PagedDecode.planned += 1

    def run(self, q: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        indptr, indices, last = self.tables
        rows = []
        for b, query in enumerate(q):
            own = indices[indptr[b] : indptr[b + 1]]
            k, v = (torch.cat([x[i] for i in own], 1)[:, : 16 * (len(own) - 1) + last[b]] for x in pages)
            rows.append(attend(query[None, :, None], k[None], v[None], impl="reference", scale=0.3)[0, :, 0])
        return torch.stack(rows)


@pytest.mark.parametrize("by_token", [False, True])
def test_flashinfer_gets_a_dense_cache_as_pages(by_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages cut wrongly belong to another head, another sequence or nobody; and a plan made at every call, on the host,
    would be what is timed."""
    module: Any = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = PagedDecode
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    third_party._plan.cache_clear()
    q, k, v = _inputs(by_token=by_token)
    before = PagedDecode.planned
    for _ in range(2):
        out = third_party.PEERS["flashinfer"].attend(q, k, v, causal=True, scale=0.3)
        torch.testing.assert_close(out, attend(q, k, v, impl="reference", scale=0.3))
    assert PagedDecode.planned == before + 1
    third_party._plan.cache_clear()


def test_flashinfer_says_what_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that do not tile the context would read beyond it, and what compiles at its first call needs a compiler."""
    refusal = third_party._flashinfer_refusal
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    q, k, v = (x.half() for x in _inputs())
    assert refusal(q, k, v) == ""
    assert "in whole pages of 16 tokens" in refusal(q, k[:, :, :97], v[:, :, :97])
    assert "lie alike" in refusal(q, k, v.transpose(1, 2).contiguous().transpose(1, 2))
    assert "16 bits" in refusal(q.float(), k.float(), v.float()) and "64, 128 or 256" in refusal(
        *(x[..., :48] for x in (q, k, v))
    )
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(third_party.shutil, "which", lambda name: None)
    monkeypatch.setattr(third_party, "find_spec", importlib.util.find_spec)
    assert refusal(q, k, v) == "flashinfer compiles at its first call, and there is no nvcc"


def test_flex_tuned_differs_from_flex_by_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names for one kernel, options dropped on the way, or misspelt, as which they are ignored: then "tuned or not,
    it is slow" is said of a kernel that nobody has tuned."""
    given = []
    monkeypatch.setattr(flex, "_compiled", lambda: lambda *_, **options: given.append(options.pop("kernel_options")))
    for arm in (flex, flex.TUNED):
        arm.attend(*_inputs(), causal=True, scale=0.3)
    assert given == [None, {"BLOCK_N": 64, "num_stages": 3, "num_warps": 4}]
    assert set(given[1]) <= FlexKernelOptions.__annotations__.keys()
