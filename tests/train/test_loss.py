"""The loss behind the head: cross entropy's value and gradients, and never the scores of all tokens at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnlab.train import loss as module
from attnlab.train.loss import linear_cross_entropy

N, DIM, V = 37, 5, 11


def inputs(ignored: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, targets; sharp scores, so that a softmax taken wrongly shows."""
    generator = torch.Generator().manual_seed(7)
    hidden, weight = 2 * torch.randn(N, DIM, generator=generator), torch.randn(V, DIM, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.randperm(N, generator=generator)[:ignored]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def oracle(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, scale: float) -> tuple[Tensor, ...]:
    """torch's own loss of all scores, and its gradients, computed in ``dtype``."""
    h, w = (part.detach().to(dtype).requires_grad_() for part in (hidden, weight))
    value = F.cross_entropy(h @ w.T, targets)
    return value.detach(), *torch.autograd.grad(value * scale, (h, w))


@pytest.mark.parametrize("rows", [1, 3, N, 1000], ids=lambda rows: f"{rows} rows at once")
@pytest.mark.parametrize("ignored", [0, 13], ids=["all counted", "13 ignored"])
def test_value_and_gradients_are_those_of_cross_entropy(monkeypatch, rows, ignored):
    """A mean over a block instead of over all, a last block that is short, an ignored target that counts in the mean,
    or an outer factor that the backward pass forgets (gradient accumulation, a scaled loss) trains all the same, at
    another rate. Held against float64, with as much error as float32's own loss makes."""
    monkeypatch.setattr(module, "SCORES", rows * V + 1)
    hidden, weight, targets = inputs(ignored)
    value = linear_cross_entropy(hidden, weight, targets)
    got = value.detach(), *torch.autograd.grad(value * 1.7, (hidden, weight))
    exact = oracle(hidden, weight, targets, torch.float64, 1.7)
    usual = oracle(hidden, weight, targets, torch.float32, 1.7)
    for mine, right, other in zip(got, exact, usual, strict=True):
        allowed = 4 * (other - right).abs().max().item() + 4 * torch.finfo(torch.float32).eps * right.abs().max().item()
        assert (mine - right).abs().max().item() <= allowed
    assert not got[1][targets < 0].any() and got[0].dtype == torch.float32


def test_sixteen_bits_are_summed_in_thirty_two(monkeypatch):
    """With the weight's gradient summed in bfloat16, each block of rows rounded it once more: of 37 rows one by one it
    lost several times what one product of bfloat16 does."""
    hidden, weight, targets = inputs()
    exact = oracle(hidden.bfloat16(), weight.bfloat16(), targets, torch.float64, 1.0)[2]
    off = []
    for rows in (1, N):
        monkeypatch.setattr(module, "SCORES", rows * V + 1)
        (got,) = torch.autograd.grad(linear_cross_entropy(hidden.bfloat16(), weight, targets), weight)
        off.append((got - exact).norm() / exact.norm())
    assert off[0] < 1.5 * off[1] < 0.01


def test_a_table_used_twice_gets_both_gradients():
    """With tied embeddings the same matrix is the table at the bottom and the head at the top: whoever writes the
    head's gradient instead of adding it loses the other one."""
    _, _, targets = inputs()
    table = torch.randn(V, DIM, generator=torch.Generator().manual_seed(8), requires_grad=True)
    tokens = torch.randint(V, (N,), generator=torch.Generator().manual_seed(9))
    linear_cross_entropy(F.embedding(tokens, table).sin(), table, targets).backward()
    mine, exact = table.grad, table.detach().double().requires_grad_()
    F.cross_entropy(F.embedding(tokens, exact).sin() @ exact.T, targets).backward()
    assert mine is not None and exact.grad is not None
    assert (mine - exact.grad).abs().max() < 1e-6


class Largest(TorchDispatchMode):
    """The most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_the_scores_of_all_tokens_are_never_held(monkeypatch):
    """The [N, V] scores, and as many gradients, are the largest tensors of a training step: one stray operation on all
    of them brings the memory back, and no number changes."""
    monkeypatch.setattr(module, "SCORES", 7 * V)
    hidden, weight, targets = inputs()
    with Largest() as mine:
        linear_cross_entropy(hidden, weight, targets).backward()
    with Largest() as usual:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    assert usual.elements == N * V  # or the counting sees nothing
    assert mine.elements == N * DIM < N * V


def test_a_mean_over_nothing_is_not_a_number():
    """Zero would be read as a perfect model; to ask how many there are would wait for the device at every step."""
    hidden, weight, targets = inputs(N)
    assert linear_cross_entropy(hidden, weight, torch.full_like(targets, -100)).isnan()
