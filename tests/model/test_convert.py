"""Conversion to fewer KV heads, against the heads written out one by one."""

import copy

import pytest
import torch

from attnlab.errors import InputError
from attnlab.model.convert import to_grouped
from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape

D = 10


def model_of(n_kv_heads: int = 12, **changes) -> Llama:
    torch.manual_seed(n_kv_heads)
    model = Llama(ModelShape(2, 17, 12, n_kv_heads, D, 19, 23, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def is_kv(name: str) -> bool:
    return "k_proj" in name or "v_proj" in name


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 4, 6, 12])
def test_each_group_becomes_one_head(n_kv_heads, method):
    """Pooling strided heads (h, h + G, …) instead of contiguous ones, seen in a published conversion, gives right
    shapes and a model whose groups belong to other query heads."""
    model = model_of(12, qkv_bias=True)
    grouped = to_grouped(model, n_kv_heads, method)
    assert grouped.shape == model.shape.with_kv_heads(n_kv_heads)
    size = 12 // n_kv_heads
    for name, after in grouped.state_dict().items():
        before = model.state_dict()[name]
        if not is_kv(name):
            assert torch.equal(after, before), name
            continue
        for head in range(n_kv_heads):
            group = [before[h * D : (h + 1) * D].double() for h in range(head * size, (head + 1) * size)]
            expected = sum(group) / size if method == "mean" else group[0]
            torch.testing.assert_close(after[head * D : (head + 1) * D].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["mean", "first"])
def test_repeated_heads_convert_back_to_the_same_logits(method):
    """The one conversion that loses nothing: a grouped model spelt out with H heads, whose groups must be the very
    heads that its query heads read."""
    grouped = model_of(3)
    state = {
        name: tensor.unflatten(0, (3, D)).repeat_interleave(4, dim=0).flatten(0, 1) if is_kv(name) else tensor
        for name, tensor in grouped.state_dict().items()
    }
    spelt_out = Llama(grouped.shape.with_kv_heads(12))
    spelt_out.load_state_dict(state)
    back = to_grouped(spelt_out, 3, method)
    tokens = torch.randint(23, (2, 7))
    with torch.no_grad():
        logits, expected, middle = back(tokens), grouped(tokens), spelt_out(tokens)
    tolerance = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(middle, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


def test_the_model_returned_is_new_and_the_input_untouched():
    """Weights shared with the original would be trained along with the copy."""
    model = model_of(6)
    before = copy.deepcopy(model.state_dict())
    grouped = to_grouped(model.eval(), 6)
    assert grouped.training is False
    with torch.no_grad():
        for parameter in grouped.parameters():
            assert parameter.requires_grad
            parameter.add_(1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(grouped.state_dict()[name], before[name] + 1), name


def test_random_draws_k_and_v_anew_from_the_initial_distribution():
    """The paper's weakest baseline: it must know nothing of the old heads, keep Q and O, and repeat under its seed."""
    model = model_of(12, qkv_bias=True)
    first, again, other = (to_grouped(model, 4, "random", seed=seed).state_dict() for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        if not is_kv(name):
            assert torch.equal(tensor, model.state_dict()[name]), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.15)
            assert not torch.equal(tensor, other[name]), name
    k, v = (first[f"layers.0.self_attn.{part}_proj.weight"] for part in "kv")
    assert not torch.equal(k, v)


def test_bfloat16_heads_are_pooled_in_float32():
    """Adding in bfloat16 loses whatever is 256 times smaller than the running sum: the mean of 256, 1, 1, 1 is 64.75,
    which rounds to 65, but to 64 if every sum is rounded."""
    model = model_of(4).to(torch.bfloat16)
    weight = model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        weight.unflatten(0, (4, D)).copy_(torch.tensor([256.0, 1, 1, 1]).view(4, 1, 1).expand(4, D, 17))
    pooled = to_grouped(model, 1).layers[0].self_attn.k_proj.weight
    assert pooled.dtype == torch.bfloat16
    assert (pooled == torch.tensor(64.75).bfloat16()).all()


def test_q_and_k_norms_and_the_implementation_stay():
    """The norms of Qwen3-like models are shared by all heads; a conversion that drops them, or the model's impl, loses
    them without a word."""
    model = model_of(6, qk_norm=True)
    model.impl = "reference"
    grouped = to_grouped(model, 2)
    assert grouped.impl == "reference"
    assert torch.equal(grouped.layers[1].self_attn.k_norm.weight, model.layers[1].self_attn.k_norm.weight)


@pytest.mark.parametrize(
    ("n_kv_heads", "method", "message"),
    [
        (5, "mean", "n_kv_heads=5 does not divide the model's 6 KV heads; valid: 1, 2, 3, 6$"),
        (12, "mean", "n_kv_heads=12 does not divide the model's 6 KV heads"),  # H, but more than there are
        (0, "mean", "n_kv_heads must be between 1"),
        (2, "means", "unknown method 'means'; did you mean mean"),
    ],
)
def test_bad_input_is_one_clear_error(n_kv_heads, method, message):
    """A number that divides H but not the present G would split heads across groups."""
    with pytest.raises(InputError, match=message):
        to_grouped(model_of(6), n_kv_heads, method)
