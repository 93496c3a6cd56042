"""The parts of a block against float64 arithmetic written out here, and against the papers' definitions."""

import math

import pytest
import torch

from attnlab.errors import InputError
from attnlab.model.layers import Attention, RMSNorm, SwiGLU, product, rope_frequencies, rotate, rotation
from attnlab.shapes import ModelShape, RopeScaling


def shape_of(**changes) -> ModelShape:
    sizes = {"n_layers": 1, "dim": 15, "n_heads": 3, "n_kv_heads": 1, "head_dim": 14, "ffn_dim": 17, "vocab_size": 11}
    return ModelShape(**{**sizes, **changes})


def test_rms_norm_divides_by_the_root_mean_square():
    """A norm that subtracts the mean (LayerNorm), adds eps after the root, or reduces over another axis, trains nearly
    as well: only numbers tell."""
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    norm = RMSNorm(5, eps=0.25)
    norm.weight.data = torch.tensor([1.0, -2.0, 3.0, 0.5, 7.0])
    rows = [
        [w * v / math.sqrt(sum(u * u for u in row) / 5 + 0.25) for v, w in zip(row, norm.weight.tolist(), strict=True)]
        for row in x.double().reshape(6, 5).tolist()
    ]
    torch.testing.assert_close(
        norm(x).double().reshape(6, 5), torch.tensor(rows, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_rms_norm_of_float16_does_not_overflow():
    """Squares of a float16 activation above 255 are infinite in float16, and the layer then returns zeros."""
    x = torch.tensor([300.0, -400.0], dtype=torch.float16)
    expected = torch.tensor([300.0, -400.0]) / math.sqrt((300**2 + 400**2) / 2)
    torch.testing.assert_close(RMSNorm(2, 1e-5).half()(x).float(), expected, rtol=1e-3, atol=0)


def test_rotation_turns_each_pair_by_position_times_frequency():
    """Positions that start one late, frequencies of the other end, or interleaved pairs (2i, 2i + 1) instead of Hugging
    Face's (i, i + D/2) cancel in a model tested against itself."""
    shape = shape_of(rope_theta=500.0)
    x = torch.randn(1, 2, 3, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = rotate(x.transpose(1, 2), rotation(rope_frequencies(shape), torch.arange(11, 14), torch.float64))
    turned = turned.transpose(1, 2)
    for t in range(3):
        for i in range(7):
            angle = (11 + t) * 500.0 ** (-2 * i / 14)
            a, b = x[0, :, t, i], x[0, :, t, i + 7]
            torch.testing.assert_close(turned[0, :, t, i], a * math.cos(angle) - b * math.sin(angle), rtol=0, atol=2e-6)
            torch.testing.assert_close(
                turned[0, :, t, i + 7], b * math.cos(angle) + a * math.sin(angle), rtol=0, atol=2e-6
            )


def test_position_zero_is_not_turned():
    """The off-by-one that relative positions hide: a first token at position 1."""
    x = torch.randn(1, 1, 1, 14)
    assert torch.equal(rotate(x, rotation(rope_frequencies(shape_of()), torch.tensor([0]), torch.float32)), x)


def test_scores_depend_on_the_distance_alone():
    """Query and key turned in opposite directions give scores that change when both move on."""
    q, k = torch.randn(2, 1, 1, 1, 14, generator=torch.Generator().manual_seed(2))
    frequencies = rope_frequencies(shape_of())

    def score(query_at: int, key_at: int) -> float:
        by = [rotation(frequencies, torch.tensor([at]), torch.float32) for at in (query_at, key_at)]
        turned = [rotate(q, by[0]), rotate(k, by[1])]
        return (turned[0] * turned[1]).sum().item()

    assert score(5, 2) == pytest.approx(score(40, 37), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-2)


def test_llama3_scaling_keeps_short_waves_and_slows_long_ones():
    """The three bands of Llama 3.1 (kept, blended, divided by the factor), written out per pair; the blend's ends are
    easily swapped."""
    scaling = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=512)
    shape = shape_of(head_dim=62, rope_theta=10000.0, rope_scaling=scaling)
    expected, bands = [], set()
    for i in range(31):
        plain = 10000.0 ** (-2 * i / 62)
        waves = 512 * plain / (2 * math.pi)  # wavelengths within the original context
        if waves > 4.0:
            expected.append(plain)
            bands.add("kept")
        elif waves < 1.0:
            expected.append(plain / 8.0)
            bands.add("slowed")
        else:
            smooth = (waves - 1.0) / 3.0
            expected.append((1 - smooth) * plain / 8.0 + smooth * plain)
            bands.add("blended")
    assert bands == {"kept", "slowed", "blended"}
    torch.testing.assert_close(rope_frequencies(shape), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 13}, "even head_dim, got 13"),
        ({"rope_scaling": RopeScaling("yarn")}, "'yarn' can be counted but not run"),
    ],
)
def test_what_cannot_be_rotated_is_refused(changes, message):
    """A scaling that is read and ignored gives fluent text and wrong numbers beyond the trained context."""
    with pytest.raises(InputError, match=message):
        rope_frequencies(shape_of(**changes))


def test_swiglu_gates_with_silu_of_gate_proj():
    """Gate and up are interchangeable by shape; swapped, a checkpoint loads and speaks nonsense."""
    torch.manual_seed(3)
    layer, x = SwiGLU(5, 7).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    gate, up, down = (p.weight.detach() for p in (layer.gate_proj, layer.up_proj, layer.down_proj))
    gated = x @ gate.T
    expected = (gated / (1 + torch.exp(-gated)) * (x @ up.T)) @ down.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_one_product_for_q_k_and_v_holds_no_byte_twice_and_can_still_be_trained(qkv_bias):
    """A fused copy of the weights doubles a model's memory, goes stale when the weights change, and, made under
    inference mode, can never be trained again: seen wherever fusing is an afterthought."""
    torch.manual_seed(4)
    layer = Attention(shape_of(qkv_bias=qkv_bias))
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    if qkv_bias:
        for projection in projections:
            torch.nn.init.normal_(projection.bias)
    x = torch.randn(2, 3, layer.q_proj.in_features)
    apart = torch.cat([projection(x) for projection in projections], -1)
    with torch.inference_mode():
        torch.testing.assert_close(product(x, *projections), apart)
    storages = {projection.weight.untyped_storage().data_ptr() for projection in projections}
    assert len(storages) == 1
    assert projections[0].weight.untyped_storage().nbytes() == 4 * sum(p.weight.numel() for p in projections)
    assert not any(projection.weight.is_inference() for projection in projections)
    product(x, *projections).sum().backward()
    assert all(projection.weight.grad is not None for projection in projections)
    with torch.no_grad():
        layer.k_proj.weight.mul_(2)  # an optimiser's step: the one matrix must see it
        apart = torch.cat([projection(x) for projection in projections], -1)
        torch.testing.assert_close(product(x, *projections), apart)
        layer.v_proj.weight.data = torch.randn_like(layer.v_proj.weight)  # a loaded weight, in memory of its own
        apart = torch.cat([projection(x) for projection in projections], -1)
        torch.testing.assert_close(product(x, *projections), apart)
    product(x, *projections).sum().backward()
    assert all(projection.weight.grad is not None for projection in projections)
