"""One training run: the same numbers every time, killed or not, and the numbers of a loop written plainly."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape
from attnlab.train import loop
from attnlab.train.corpus import Corpus
from attnlab.train.evaluate import bits_per_byte
from attnlab.train.loop import train
from attnlab.train.recipe import Recipe

SHAPE = ModelShape(2, 20, 6, 2, 4, 23, 256, tied_embeddings=True)
RECIPE = Recipe(SHAPE, seed=3, tokens=11 * 3 * 7, batch=3, context=7, peak_rate=0.02)


class Recorder(Corpus):
    """A corpus that remembers which windows were asked for."""

    def batch(self, seed: int, step: int, batch: int, context: int) -> torch.Tensor:
        windows = super().batch(seed, step, batch, context)
        self.__dict__.setdefault("asked", []).append(windows)
        return windows


def a_corpus() -> Recorder:
    text = torch.randint(97, 123, (2, 499), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Recorder(*text)


def numbers(result: dict) -> dict:
    return {name: value for name, value in result.items() if name != "seconds"}


def test_the_same_seed_gives_the_same_run_bit_for_bit():
    """A run that cannot be repeated cannot be doubted; another seed must differ, or three seeds are one."""
    first, losses = train(RECIPE, a_corpus()), []
    assert numbers(train(RECIPE, a_corpus(), on_step=lambda step, loss: losses.append((step, loss)))) == numbers(first)
    assert first["status"] == "ok" and first["seconds"] > 0
    assert [step for step, _ in losses] == list(range(1, 12))
    other: list[float] = []
    train(replace(RECIPE, seed=4), a_corpus(), on_step=lambda step, loss: other.append(loss))
    assert all(loss != elsewhere for (_, loss), elsewhere in zip(losses, other, strict=True))


def test_the_curve_is_ten_points_and_ends_with_the_budget():
    """Curves drawn against steps of different size, or that stop before the end, cannot be laid over each other."""
    result = train(replace(RECIPE, tokens=40 * 21), a_corpus())
    assert [tokens for tokens, _ in result["curve"]] == [4 * 21 * point for point in range(1, 11)]
    assert result["curve"][-1][1] == result["bits_per_byte"]  # this validation text fits both evaluations whole
    assert result["curve"][0][1] > result["curve"][-1][1]


def test_losses_are_those_of_a_plain_loop():
    """A clip, a zeroed gradient or a learning rate left out trains too, only worse: the loop is written again here with
    the paper's numbers, AdamW and the clip spelt out."""
    seen: list[float] = []
    text = a_corpus()
    result = train(RECIPE, text, on_step=lambda step, loss: seen.append(loss))

    torch.manual_seed(3)
    model = Llama(SHAPE)
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    losses, norms = [], []
    for step, windows in enumerate(text.asked):
        loss = F.cross_entropy(model(windows[:, :-1]).transpose(1, 2), windows[:, 1:])
        losses.append(loss.item())
        gradients = dict(zip(first, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        norm = torch.sqrt(sum(gradient.pow(2).sum() for gradient in gradients.values()))
        norms.append(norm.item())
        rate = RECIPE.rate(step)
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient = gradients[name] * (1 / norm).clamp(max=1)
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.95 * second[name] + 0.05 * gradient**2
                p *= 1 - rate * (0.1 if p.ndim == 2 else 0)
                mean, spread = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
                p -= rate * mean / (spread.sqrt() + 1e-8)
    assert max(norms) > 2 * min(norms) > 2  # AdamW does not feel a constant factor, so the clip must vary by step
    assert seen == pytest.approx(losses, rel=2e-4)
    assert result["bits_per_byte"] == pytest.approx(bits_per_byte(model, text.validation, 7), rel=2e-4)


def test_arms_of_one_seed_see_the_same_data():
    """Differences to MHA are taken seed by seed: with other data per arm the pairing removes nothing."""
    one, other, next_seed = a_corpus(), a_corpus(), a_corpus()
    train(RECIPE, one)
    train(replace(RECIPE, shape=SHAPE.with_kv_heads(1, match_params=True)), other)
    train(replace(RECIPE, seed=4), next_seed)
    assert torch.equal(torch.stack(one.asked), torch.stack(other.asked))
    assert not torch.equal(torch.stack(one.asked), torch.stack(next_seed.asked))


class Killed(Exception):
    """What a test throws into a run."""


def test_an_interrupted_run_ends_with_the_same_numbers(tmp_path, monkeypatch):
    """A resumed run that restarts its schedule, forgets AdamW's moments, repeats or skips a batch, or loses its curve
    ends elsewhere, by less than anyone would notice: interrupted twice here, and equal bit for bit."""
    undisturbed = train(RECIPE, a_corpus())
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0.0)
    checkpoint, steps = tmp_path / "deep" / "run.pt", []

    def until(last: int):
        def on_step(step: int, loss: float) -> None:
            steps.append(step)
            if step == last:
                raise Killed

        return on_step

    for last in (4, 8):
        with pytest.raises(Killed):
            train(RECIPE, a_corpus(), checkpoint, until(last))
    resumed = train(RECIPE, a_corpus(), checkpoint, until(99))
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11]  # the step that was not saved is done again, no other
    assert numbers(resumed) == numbers(undisturbed)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["run.pt"]


def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """Written in place, the checkpoint is garbage exactly when it is needed."""
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0.0)
    checkpoint, save, saved = tmp_path / "run.pt", torch.save, []

    def torn(state: object, path) -> None:
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half a")
            raise Killed
        save(state, path)

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(Killed):
        train(RECIPE, a_corpus(), checkpoint)
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    assert numbers(train(RECIPE, a_corpus(), checkpoint)) == numbers(train(RECIPE, a_corpus()))


@pytest.mark.parametrize(
    ("tokens", "said"),
    [(40 * 21, "loss is nan at step 2"), (2 * 21, "validation loss is nan after step 1")],
    ids=["between points of the curve", "at a point of the curve"],
)
def test_a_diverged_run_says_at_which_step(tokens, said):
    """A NaN that reaches the rows cannot be written as JSON, ends the whole sweep with a traceback, and takes the other
    runs' hours along; where the curve has a point after the fatal step, the NaN is met there first."""
    result = train(replace(RECIPE, tokens=tokens, peak_rate=1e30), a_corpus())
    assert (result["status"], result["reason"]) == ("diverged", said)
    assert "bits_per_byte" not in result
    json.dumps(result, allow_nan=False)
