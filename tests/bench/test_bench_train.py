"""The plain loop that ours is timed against: slower, or faster, but the same model."""

import pytest
import torch
import torch.nn.functional as F

from attnlab.shapes import ModelShape
from attnlab.train.loop import initial
from bench.test_train import CONTEXT, Plain

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "input_layernorm")


def test_the_plain_model_is_the_same_model():
    """A baseline that computes less is beaten by less: on our weights it gives our loss, and our gradient."""
    shape = ModelShape(2, 24, 4, 4, 6, 37, 101, tied_embeddings=True)
    ours, plain = initial(shape, 0), Plain(shape)
    ours_of = dict(ours.named_parameters())
    pairs = {"embed.weight": "embed_tokens.weight", "norm.weight": "norm.weight"}
    for layer in range(2):
        for place, name in enumerate((*NAMES, "post_attention_layernorm")):
            part = "self_attn." if name[0] in "qkvo" else "" if name.endswith("norm") else "mlp."
            pairs[f"layers.{layer}.{place}.weight"] = f"layers.{layer}.{part}{name}.weight"
    assert pairs.keys() == dict(plain.named_parameters()).keys() and set(pairs.values()) == set(ours_of)
    plain.load_state_dict({name: ours_of[own].detach() for name, own in pairs.items()}, strict=False)
    tokens = torch.randint(101, (3, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    theirs = plain(inputs, targets)
    mine = F.cross_entropy(ours(inputs).flatten(0, 1), targets.flatten())
    assert theirs.item() == pytest.approx(mine.item(), rel=1e-6)
    theirs.backward(), mine.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, ours_of[pairs[name]].grad, rtol=2e-3, atol=1e-6, msg=name)
