"""The recipe, held against the numbers of the LLaMA papers."""

import pytest
import torch

from attnlab.errors import InputError
from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape
from attnlab.train.recipe import Recipe, peak_rate

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


def test_at_scale_the_warm_up_is_2000_steps():
    """LLaMA's 2000 steps are 5 % of a run of 40,000; a share of the steps alone would warm up 12,500 of its 250,000."""
    assert recipe(40_000).warm_up == recipe(250_000).warm_up == 2000
    assert recipe(39_000).warm_up == 1950 and recipe(3_900).warm_up == 195
    rate = recipe(250_000, peak_rate=3e-4).rate
    assert [rate(step) for step in (0, 999, 1999)] == pytest.approx([1.5e-7, 1.5e-4, 3e-4])
    assert rate(2000) == pytest.approx(3e-4) and rate(249_999) == pytest.approx(3e-5)


def test_a_constant_schedule_stays_at_the_peak():
    """Training on goes on at the rate that was given: a cosine here would anneal a second time."""
    rate = recipe(40, peak_rate=0.01, schedule="constant").rate
    assert [rate(step) for step in range(40)] == pytest.approx([0.005, *[0.01] * 39])


def test_the_learning_rate_by_size_meets_what_was_published():
    """Tables 2 of both papers: 3e-4 for 7B and 13B, 1.5e-4 for 33B, 34B, 65B and 70B. Smaller models want more, never
    less, and nothing jumps below 7B."""
    assert [peak_rate(int(n * 1e9)) for n in (7, 13, 33, 34, 65, 70)] == [3e-4] * 2 + [1.5e-4] * 4
    sizes = [ModelShape.published(f"llama-{name}").n_params for name in ("2-7b", "2-13b", "2-34b", "2-70b")]
    assert [peak_rate(n) for n in sizes] == pytest.approx([3e-4, 3e-4, 1.5e-4, 1.5e-4], rel=0.02)
    rates = [peak_rate(10**exponent) for exponent in range(5, 11)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == 3e-4 and rates[0] < 0.01


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
    """torch's default of 0.999 for the second moment, or 1e-8 for eps, is the usual slip: 0.95 is what LLaMA used, and
    1e-5 Llama 2."""
    optimizer = recipe(5).optimizer(Llama(SHAPE))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.95), 1e-5)}


def test_a_last_partial_step_is_dropped():
    """Rounding up trains one arm longer than its row says."""
    assert Recipe(SHAPE, 0, 5 * 21 + 20, batch=3, context=7).steps == 5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tokens": 41}, r"41 are 1 steps of 3 × 7 tokens; at least 2 are needed, one of them after the warm-up"),
        ({"tokens": 20}, r"tokens=20 are 0 steps of 3 × 7 tokens; at least 2 are needed"),
        ({"tokens": 0}, "tokens must be between 1 and"),
        ({"tokens": 2e6}, "tokens must be a whole number, got 2000000.0"),
        ({"batch": 0}, "batch must be between 1 and"),
        ({"context": -7}, "context must be between 1 and"),
        ({"accumulate": 2}, "accumulate=2 does not divide the batch of 3"),
        ({"accumulate": 0}, "accumulate must be between 1 and"),
        ({"peak_rate": 0}, "peak_rate must be a number above 0, got 0"),
        ({"peak_rate": float("nan")}, "peak_rate must be a number above 0, got nan"),
        ({"schedule": "cosin"}, "did you mean cosine"),
    ],
)
def test_a_budget_that_cannot_be_spent_is_refused(wrong, said):
    """A budget below one step trained nothing and reported the loss of random weights; a batch of 0 divided by it."""
    with pytest.raises(InputError, match=said):
        Recipe(SHAPE, 0, **{"tokens": 1000, "batch": 3, "context": 7, **wrong})
