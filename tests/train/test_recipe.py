"""The recipe, held against the numbers of LLaMA's section 2.3."""

import pytest
import torch

from attnlab.errors import InputError
from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape
from attnlab.train.recipe import Recipe

SHAPE = ModelShape(2, 20, 6, 2, 4, 23, 31)


def recipe(steps: int, **more) -> Recipe:
    return Recipe(SHAPE, 0, steps * 3 * 7, batch=3, context=7, **more)


def test_warm_up_and_cosine_by_hand():
    """A warm-up that starts at 0 wastes a step, a cosine to 0 instead of 10 % or one that counts the warm-up in ends
    elsewhere: 100 steps, so 5 of warm-up and 94 intervals of cosine."""
    rate = recipe(100, peak_rate=0.01).rate
    assert [rate(step) for step in range(5)] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert rate(5) == pytest.approx(0.01)
    assert rate(5 + 47) == pytest.approx(0.0055)  # half way: (1 + 0.1) / 2
    assert rate(99) == pytest.approx(0.001)
    assert all(rate(step) > rate(step + 1) for step in range(5, 99))


@pytest.mark.parametrize("steps", [3, 19, 20, 21, 40])
def test_short_runs_reach_the_peak_and_end_at_a_tenth(steps):
    """A warm-up rounded to 0 steps divides by zero; the quick sweep must follow the same curve."""
    rate = recipe(steps, peak_rate=0.01).rate
    assert max(rate(step) for step in range(steps)) == pytest.approx(0.01)
    assert rate(steps - 1) == pytest.approx(0.001)


@pytest.mark.parametrize("shape", [SHAPE, ModelShape(2, 20, 6, 1, 4, 23, 31, tied_embeddings=True, qkv_bias=True)])
def test_weight_decay_is_on_matrices_alone(shape):
    """Decayed norms and biases are pulled to zero; a parameter in no group never learns, and one in both learns
    twice."""
    model = Llama(shape)
    optimizer = recipe(5).optimizer(model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        vector = "norm" in name or name.endswith("bias")
        assert decay[id(parameter)] == (0.0 if vector else 0.1), name


def test_the_optimiser_is_that_of_the_paper():
    """torch's default of 0.999 for the second moment is the usual slip: 0.95 is what LLaMA used."""
    optimizer = recipe(5).optimizer(Llama(SHAPE))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}


def test_a_last_partial_step_is_dropped():
    """Rounding up trains one arm longer than its row says."""
    assert Recipe(SHAPE, 0, 5 * 21 + 20, batch=3, context=7).steps == 5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tokens": 41}, r"tokens=41 is less than two steps of 3 × 7 tokens"),
        ({"tokens": 0}, "tokens must be between 1 and"),
        ({"tokens": 2e6}, "tokens must be a whole number, got 2000000.0"),
        ({"batch": 0}, "batch must be between 1 and"),
        ({"context": -7}, "context must be between 1 and"),
    ],
)
def test_a_budget_that_cannot_be_spent_is_refused(wrong, said):
    """A budget below one step trained nothing and reported the loss of random weights; a batch of 0 divided by it."""
    with pytest.raises(InputError, match=said):
        Recipe(SHAPE, 0, **{"tokens": 1000, "batch": 3, "context": 7, **wrong})
