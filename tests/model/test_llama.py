"""The whole model: its size, its start, its dtype, its errors. Its numbers are compared with transformers in
test_parity."""

import pytest
import torch

from attnlab.attention import implementations, supports
from attnlab.errors import InputError
from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape


def shape_of(**changes) -> ModelShape:
    sizes = {"n_layers": 3, "dim": 17, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "ffn_dim": 19, "vocab_size": 23}
    return ModelShape(**{**sizes, **changes})


@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("tied_embeddings", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("extra", [{}, {"qkv_bias": True}, {"qk_norm": True}], ids=["plain", "qkv_bias", "qk_norm"])
def test_parameters_equal_the_shapes_count(n_kv_heads, tied_embeddings, extra):
    """Published totals hide rotary buffers and tied heads; the module's parameters are counted one by one."""
    shape = shape_of(n_kv_heads=n_kv_heads, tied_embeddings=tied_embeddings, **extra)
    model = Llama(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.n_params
    assert list(model.buffers()) == []


def test_weights_start_as_said():
    """An initialisation that visits a block's projections before scaling them, or twice, changes training from its
    first step and no test of shapes sees it."""
    torch.manual_seed(0)
    model = Llama(shape_of(n_layers=8, dim=64, n_heads=8, head_dim=16, ffn_dim=192, vocab_size=256, qkv_bias=True))
    block, expected = model.layers[5], (2 / (5 * 64)) ** 0.5
    for weight in (
        model.embed_tokens.weight,
        model.lm_head.weight,
        block.self_attn.q_proj.weight,
        block.mlp.up_proj.weight,
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
        assert weight.std().item() == pytest.approx(expected / 4, rel=0.05)  # 1 / sqrt(2 · 8)
    assert not block.self_attn.k_proj.bias.any()
    assert (model.norm.weight == 1).all()


def test_bfloat16_keeps_rotary_frequencies_and_late_logits():
    """`.to(bfloat16)` that also casts the rotary frequencies turns late positions by the wrong angle: seen in a widely
    used library, where logits drifted by 2 to 60 percent with the context. The same rounded weights in float32 are the
    oracle."""
    torch.manual_seed(1)
    shape = shape_of(n_layers=1, n_heads=3, n_kv_heads=1, head_dim=16, max_context=4096)
    model = Llama(shape)
    for projection in (model.layers[0].self_attn.q_proj, model.layers[0].self_attn.k_proj):
        torch.nn.init.normal_(projection.weight, std=0.5)  # attention sharp enough to feel a wrong angle
    for weight in (model.layers[0].self_attn.v_proj.weight, model.layers[0].self_attn.o_proj.weight):
        torch.nn.init.normal_(weight, std=0.5)
    model = model.to(torch.bfloat16)
    assert model._frequencies.dtype == torch.float32
    wide = Llama(shape)
    wide.load_state_dict(model.state_dict())  # copies into float32
    tokens = torch.randint(23, (1, 3001))
    with torch.no_grad():
        narrow_logits, wide_logits = (m.logits(m.hidden(tokens)[:, -200:]).float() for m in (model, wide))
        drifted = Llama(shape)
        drifted.load_state_dict(model.state_dict())
        drifted._frequencies = drifted._frequencies.bfloat16().float()
        drifted_logits = drifted.logits(drifted.hidden(tokens)[:, -200:])

    def error(logits: torch.Tensor) -> float:
        return ((logits - wide_logits).norm() / wide_logits.norm()).item()

    assert error(drifted_logits) > 0.05, "the mistake this test is for must be visible at these positions"
    assert error(narrow_logits) < error(drifted_logits) / 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_every_dtype_stays_itself(dtype):
    """A float32 rotary table or norm that promotes its input makes a half model compute and cache in float32."""
    model = Llama(shape_of()).to(dtype)
    cache = model.new_cache(1, 5)
    assert model(torch.zeros(1, 5, dtype=torch.int64), cache).dtype == cache.k.dtype == dtype


@pytest.mark.parametrize("impl", implementations())
def test_impl_reaches_every_layer(impl):
    """A model that ignores ``impl`` would benchmark one arm under five names: an implementation gives the same logits,
    and one that cannot run here raises instead of falling back."""
    torch.manual_seed(2)
    model, oracle = Llama(shape_of(), impl), Llama(shape_of(), "reference")
    oracle.load_state_dict(model.state_dict())
    tokens = torch.randint(23, (2, 7))
    q, k = torch.empty(2, 6, 7, 10), torch.empty(2, 2, 7, 10)
    if supports(impl, q, k, k, causal=True)[0]:
        torch.testing.assert_close(model(tokens), oracle(tokens), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(InputError, match=f"impl='{impl}' cannot run here"):
            model(tokens)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(5, dtype=torch.int64), torch.zeros(1, 5), torch.zeros(1, 5, 1, dtype=torch.int64)]
)
def test_tokens_of_another_kind_are_refused(tokens):
    """One sequence without a batch axis would be taken for a batch, and floats fail deep inside the embedding."""
    with pytest.raises(InputError, match=r"expected tokens \[B, T\] of integers"):
        Llama(shape_of())(tokens)
