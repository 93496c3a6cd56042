"""Maps of attention before and after conversion: those that the model itself computes."""

import torch

from attnlab.attention import attend
from attnlab.shapes import ModelShape
from attnlab.train.loop import initial
from attnlab.train.maps import attention_weights

SHAPE = ModelShape(3, 40, 6, 2, 10, 31, 101)


def test_maps_are_the_attention_that_the_model_computes(monkeypatch):
    """A map drawn from unrotated keys, or of tiled heads, looks as good as the right one. Put to the values of the same
    layer, the weights must give what its attention gave."""
    model = initial(SHAPE, 1)
    for parameter in model.parameters():  # else attention is nearly flat, and any two maps agree
        parameter.data.mul_(5)
    tokens = torch.randint(101, (13,), generator=torch.Generator().manual_seed(2))
    calls = []

    def watched(q, k, v, **options):
        out = attend(q, k, v, **options)
        calls.append((v[0], out[0]))
        return out

    monkeypatch.setattr("attnlab.model.layers.attend", watched)
    weights = attention_weights(model, tokens, 1)
    values, mixed = calls[1]
    assert weights.shape == (6, 13, 13) and not weights.triu(1).any()
    torch.testing.assert_close(weights @ values.repeat_interleave(3, 0), mixed, atol=1e-5, rtol=1e-5)
    assert weights[:, 12].std(0).max() > 0.02  # heads that differ


def test_a_hook_does_not_stay():
    """A hook left behind keeps every later input alive."""
    model = initial(SHAPE, 1)
    attention_weights(model, torch.arange(5), 0)
    assert not model.layers[0].self_attn._forward_pre_hooks
