"""A block in one call against the same block in forty: ``layers`` is the text, ``native.block`` must say the same."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from attnlab import native
from attnlab.errors import InputError
from attnlab.model import fused
from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape

SIZES: dict[str, Any] = {"dim": 40, "n_heads": 6, "head_dim": 16, "ffn_dim": 56, "vocab_size": 23}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TAKEN = native.library()[0] is not None and native.capability(torch.device("cpu")) == "avx2"


def model_of(dtype: torch.dtype, groups: int = 2, **changes: Any) -> Llama:
    torch.manual_seed(groups)
    model = Llama(ModelShape(3, n_kv_heads=groups, **{**SIZES, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return model.to(dtype)


def logits(model: Llama, tokens: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of a prefill of seven tokens and five single steps, and the caches that they leave."""
    model.impl = impl
    cache = model.new_cache(tokens.shape[0], 13)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    with torch.inference_mode():
        parts = [model(tokens[:, :7], cache), *(model(tokens[:, t : t + 1], cache) for t in range(7, 12))]
    return torch.cat(parts, 1), cache.k, cache.v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_call_says_what_forty_say(
    monkeypatch: pytest.MonkeyPatch, batch: int, groups: int, dtype: torch.dtype
) -> None:
    """A second text of the model drifts from the first: a rotation by the wrong sign, gate for up, K and V written one
    slot late. Logits and caches of both, no further from the float32 model than the forty; ``grouped`` never takes the
    one call."""
    calls = []
    block = native.block
    monkeypatch.setattr(native, "block", lambda *a: calls.append(1) or block(*a))
    model, tokens = model_of(dtype, groups), torch.randint(23, (batch, 12))
    many = logits(model, tokens, "grouped")
    assert calls == []
    one = logits(model, tokens, "auto")
    assert len(calls) == (3 * 5 if TAKEN else 0)
    exact = logits(copy.deepcopy(model).float(), tokens, "grouped")
    for found, expected, true in zip(one, many, exact, strict=True):
        found, expected, true = (x[..., :12, :].float() for x in (found, expected, true))
        own = (expected - true).norm()  # what forty calls lose to rounding; in float32 next to nothing
        assert (found - true).norm() <= 1.25 * own + 2e-6 * true.norm()


def test_weights_that_move_are_found_again() -> None:
    """Addresses kept from a first call read freed memory after a load, a cast or a conversion."""
    model, tokens = model_of(torch.float32), torch.randint(23, (2, 12))
    logits(model, tokens, "auto")
    other = model_of(torch.float32, 2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(
        logits(model, tokens, "auto")[0], logits(other, tokens, "grouped")[0], rtol=1e-4, atol=1e-4
    )
    half = model.to(torch.bfloat16)
    found, expected = logits(half, tokens, "auto")[0], logits(half, tokens, "grouped")[0]
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    "changes", [{"qkv_bias": True}, {"qk_norm": True}, {"head_dim": 8}, {"ffn_dim": 53}, {"dim": 36}], ids=str
)
def test_what_one_call_cannot_do_is_done_in_forty(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """Biases, norms on q and k, odd sizes: the loop would read past a row, or leave a term out."""
    monkeypatch.setattr(native, "block", lambda *_: pytest.fail("this block is beyond it"))
    model, tokens = model_of(torch.float32, **changes), torch.randint(23, (2, 12))
    torch.testing.assert_close(
        logits(model, tokens, "auto")[0], logits(model, tokens, "grouped")[0], rtol=1e-4, atol=1e-4
    )


def test_gradients_and_other_implementations_pass_it_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """An explicit ``impl`` is what runs; and a step whose gradient is wanted has one."""
    monkeypatch.setattr(native, "block", lambda *_: pytest.fail("nobody asked for it"))
    model, tokens = model_of(torch.float32), torch.randint(23, (2, 12))
    logits(model, tokens, "sdpa")
    assert model(tokens[:, :1], model.new_cache(2, 3)).requires_grad


def test_weights_that_do_not_lie_row_by_row_give_the_same_logits() -> None:
    """Transposed storage, as some loaders leave it, was read as if it were not: other logits, without a word."""
    model, tokens = model_of(torch.float32), torch.randint(23, (1, 12))
    expected = logits(copy.deepcopy(model), tokens, "grouped")[0]
    for block in model.layers:
        for part in (block.self_attn.q_proj, block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.down_proj):
            part.weight.data = part.weight.data.T.contiguous().T
    for impl in ("grouped", "auto"):
        torch.testing.assert_close(logits(model, tokens, impl)[0], expected)


def test_a_full_cache_is_refused_before_anything_is_written() -> None:
    """The loop writes where it is told: past the end it is somebody else's memory."""
    model = model_of(torch.float32)
    cache = model.new_cache(1, 2)
    with torch.inference_mode():
        model(torch.zeros(1, 2, dtype=torch.int64), cache)
        with pytest.raises(InputError, match="KV cache overflow: 2 tokens held"):
            model(torch.zeros(1, 1, dtype=torch.int64), cache)


def test_no_step_allocates_a_second_set_of_weights() -> None:
    """Joined matrices are the parameters themselves."""
    model = model_of(torch.bfloat16)
    logits(model, torch.randint(23, (1, 12)), "auto")
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == 2 * model.shape.n_params
    assert fused.one_matrix((model.layers[0].mlp.gate_proj, model.layers[0].mlp.up_proj)).data_ptr() in storages
