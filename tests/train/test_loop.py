"""One training run: the numbers of a loop written plainly, the same ones every time, killed or not."""

import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.errors import InputError
from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape
from attnlab.train import loop
from attnlab.train.loop import initial, train
from attnlab.train.recipe import Recipe

ROOT = Path(__file__).parents[2]
SHAPE = ModelShape(2, 17, 6, 2, 4, 23, 29, tied_embeddings=True)
RECIPE = Recipe(SHAPE, seed=3, tokens=40 * 3 * 7, batch=3, context=7, peak_rate=0.02)
SHORT = replace(RECIPE, tokens=20 * 3 * 7, peak_rate=0.004)
MARKS = (0, 13, 40)


class Letters:
    """A task: letters, the first of them likelier than the last. It remembers what it was asked."""

    digest = "letters"

    def __init__(self) -> None:
        self.asked: list[Tensor] = []
        self.judged: list[dict[str, Tensor]] = []

    def batch(self, seed: int, step: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        tokens = self.letters(1000 * seed + step, batch, context)
        self.asked.append(tokens)
        return tokens[:, :-1], tokens[:, 1:]

    def evaluate(self, model: Llama, context: int, whole: bool) -> dict[str, Any]:
        if whole:
            self.judged.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        tokens = self.letters(77_777, 11, context)
        with torch.no_grad():
            return {"nats": F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:]).item()}

    def facts(self) -> dict[str, Any]:
        return {}

    def parts(self) -> list[dict[str, Any]]:
        return [{}]

    @staticmethod
    def letters(seed: int, batch: int, context: int) -> Tensor:
        drawn = torch.rand(batch, context + 1, generator=torch.Generator().manual_seed(seed))
        return (drawn**2 * SHAPE.vocab_size).long()


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is looked at, and the state saved, after every step."""
    monkeypatch.setattr(loop, "CHECK_EVERY", 1)
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("seconds", "tokens_per_second")}


def run(recipe: Recipe = RECIPE, checkpoint: Path | None = None, **more: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """Numbers of a run, and its last and averaged weights."""
    task = Letters()
    found = numbers(train(recipe, task, checkpoint, **more))
    return found, [tensor for weights in task.judged[-2:] for tensor in weights.values()]


def same(one: tuple[dict[str, Any], list[Tensor]], other: tuple[dict[str, Any], list[Tensor]]) -> bool:
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


# --- what a step does -------------------------------------------------------------------------------------------------


def plain(recipe: Recipe, batches: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[float]]:
    """The loop, written again with the papers' numbers, schedule, AdamW and clip spelt out: losses [steps], all weights
    after each step [steps, n], and gradient norms."""
    model = initial(recipe.shape, recipe.seed).to(dtype)
    model.impl = "reference"
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    losses, weights, norms = [], [], []
    for step, tokens in enumerate(batches):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.sqrt(sum(gradient.pow(2).sum() for gradient in gradients))
        warm_up, last = 1, len(batches) - 1  # 5 % of 20 steps
        rate = 1.0 if step < warm_up else 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / (last - warm_up))
        with torch.no_grad():
            for p, gradient, m, v in zip(parameters, gradients, first, second, strict=True):
                gradient = gradient * (1 / norm).clamp(max=1)
                m.mul_(0.9).add_(0.1 * gradient)
                v.mul_(0.95).add_(0.05 * gradient**2)
                p.mul_(1 - recipe.peak_rate * rate * (0.1 if p.ndim == 2 else 0))
                spread = (v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-5
                p.sub_(recipe.peak_rate * rate * m / (1 - 0.9 ** (step + 1)) / spread)
        losses.append(loss.item())
        norms.append(norm.item())
        weights.append(torch.cat([p.detach().flatten() for p in parameters]))
    return torch.tensor(losses, dtype=torch.float64), torch.stack(weights), norms


def test_a_run_is_that_of_a_plain_loop(every_step):
    """A clip, a zeroed gradient, a decayed norm, a learning rate of the step before: each trains too, only worse. Held
    against a loop in float64, with four times the error that the same loop has in float32; so are the averaged weights,
    those after each of the last fifth of the steps."""
    task, losses = Letters(), []
    train(SHORT, task, on_step=lambda step, loss: losses.append(loss))
    exact, weights, norms = plain(SHORT, task.asked, torch.float64)
    usual, usual_weights, _ = plain(SHORT, task.asked, torch.float32)
    assert max(norms) > max(1.5 * min(norms), 1.5)  # AdamW does not feel a constant factor: the clip must vary by step
    allowed = 4 * (usual - exact).abs().max() + 1e-6
    assert (torch.tensor(losses, dtype=torch.float64) - exact).abs().max() < allowed
    allowed = 4 * (usual_weights - weights).abs().max() + 1e-7
    last, averaged = (torch.cat([tensor.flatten() for tensor in judged.values()]) for judged in task.judged)
    assert (last - weights[-1]).abs().max() < allowed
    assert (averaged - weights[16:].mean(0)).abs().max() < allowed < (averaged - weights[15:].mean(0)).abs().max()


def calls(model: Llama, inside: str) -> list[int]:
    """Sequences in each call of a part of ``model`` that is made for training, as they come."""
    seen: list[int] = []

    def hook(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            seen.append(len(inputs[0]))

    model.get_submodule(inside).register_forward_pre_hook(hook)
    return seen


def test_accumulated_parts_are_one_batch():
    """A sum over parts instead of their mean is a batch whose clip, and so whose steps, are others."""
    whole, parts = initial(SHAPE, 3), initial(SHAPE, 3)
    seen = calls(whole, "embed_tokens"), calls(parts, "embed_tokens")
    losses: tuple[list[float], list[float]] = [], []
    one = run(SHORT, model=whole, on_step=lambda _, loss: losses[0].append(loss))
    other = run(replace(SHORT, accumulate=3), model=parts, on_step=lambda _, loss: losses[1].append(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # where every step is clipped, nothing else shows a factor
    assert set(seen[0]) == {3} and set(seen[1]) == {1} and len(seen[1]) == 3 * len(seen[0]) == 60
    assert one[0]["curve"] == [[tokens, pytest.approx(nats, rel=1e-5)] for tokens, nats in other[0]["curve"]]
    for a, b in zip(one[1], other[1], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_recomputing_changes_no_bit():
    """Gradient checkpointing trades time for memory and nothing else; that it happens is seen by each block running
    twice."""
    kept, again = initial(SHAPE, 3), initial(SHAPE, 3)
    seen = calls(kept, "layers.1"), calls(again, "layers.1")
    assert same(run(SHORT, model=kept), run(replace(SHORT, recompute=True), model=again))
    assert (len(seen[0]), len(seen[1])) == (20, 40)


def test_autocast_multiplies_in_bfloat16_and_keeps_float32():
    """Weights and moments in bfloat16 lose every small step; nothing in bfloat16 is no autocast."""
    one, other = run(SHORT), run(replace(SHORT, autocast=True))
    assert 0 < abs(one[0]["nats"] - other[0]["nats"]) < 0.02 * one[0]["nats"]
    assert {tensor.dtype for tensor in other[1]} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in other[1])


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch's compiler itself
def test_a_compiled_run_is_the_same_run(tmp_path, every_step):
    """What the compiler makes of the model must learn as the model does, and go on from a checkpoint bit for bit."""
    compiled = replace(SHORT, compiled=True)
    one, other = run(SHORT), run(compiled)
    assert one[0]["nats"] == pytest.approx(other[0]["nats"], rel=1e-4)
    with pytest.raises(Killed):
        train(compiled, Letters(), tmp_path / "run.pt", until(7))
    assert same(run(compiled, tmp_path / "run.pt"), other)


# --- what a run reports -----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_bit_for_bit():
    """A run that cannot be repeated cannot be doubted; another seed must differ, or three seeds are one."""
    first = run()
    assert first[0]["status"] == "ok" and same(run(), first)
    other = run(replace(RECIPE, seed=4))
    assert not any(a[1] == b[1] for a, b in zip(first[0]["curve"], other[0]["curve"], strict=True))


def test_the_curve_and_the_marks(every_step):
    """Curves drawn against steps of different size, or that stop before the end, cannot be laid over each other; and a
    mark that is taken a step late judges more training than its row says."""
    task, losses = Letters(), []
    result = train(RECIPE, task, on_step=lambda step, loss: losses.append((step, loss)), marks=MARKS)
    assert [tokens for tokens, _ in result["curve"]] == [4 * 21 * point for point in range(1, 11)]
    assert result["curve"][-1][1] == result["nats_raw"] != result["nats"]  # here a sample is the whole
    assert [step for step, _ in losses] == list(range(1, 41))
    assert [step for step, _ in result["marks"]] == [0, 13, 40]
    assert result["marks"][0][1] == Letters().evaluate(initial(SHAPE, 3), 7, True)["nats"]
    assert result["marks"][2][1] == result["nats_raw"] < result["marks"][0][1]
    until_13 = Letters()
    with pytest.raises(Killed):
        train(RECIPE, until_13, on_step=until(14), marks=MARKS)
    assert len(until_13.asked) == 14
    assert all(torch.equal(a, b) for a, b in zip(task.judged[1].values(), until_13.judged[1].values(), strict=True))
    assert result["tokens_per_second"] == pytest.approx(40 * 21 / result["seconds"])


@pytest.mark.parametrize(
    ("steps", "said"),
    [(40, "loss is nan at step 2"), (4, "validation gives nan after step 1")],
    ids=["between points of the curve", "at a point of the curve"],
)
def test_a_diverged_run_says_at_which_step(steps, said):
    """A NaN that reaches the rows cannot be written as JSON, ends the whole sweep with a traceback, and takes the other
    runs' hours along; where the curve has a point after the fatal step, the NaN is met there first."""
    result = train(replace(RECIPE, tokens=steps * 21, peak_rate=1e30), Letters())
    assert (result["status"], result["reason"]) == ("diverged", said)
    assert "nats" not in result
    json.dumps(result, allow_nan=False)


# --- initial values ---------------------------------------------------------------------------------------------------


def test_the_shortest_run_is_judged_by_what_it_trained():
    """Of two steps none lay in the last fifth, over which weights are averaged: the loss told was that of the weights
    before the first step."""
    found = train(replace(RECIPE, tokens=2 * 3 * 7), Letters())
    assert found["nats"] == found["nats_raw"] != Letters().evaluate(initial(SHAPE, 3), 7, True)["nats"]


def test_arms_of_one_seed_share_weights_and_data():
    """Differences to MHA are taken seed by seed: with other weights or data per arm the pairing removes nothing. What
    is narrower has the first rows (KV heads, FFN) of what is wider, though torch draws 16 numbers at a time and no
    size here is a multiple of it."""
    wide, narrow = SHAPE.with_kv_heads(6), SHAPE.with_kv_heads(1, match_params=True)
    assert narrow.ffn_dim > wide.ffn_dim
    one, other = initial(wide, 3).state_dict(), initial(narrow, 3).state_dict()
    for name, a in one.items():
        b = other[name]
        rows, columns = (min(sizes) for sizes in zip(a.shape, b.shape, strict=True)) if a.ndim == 2 else (len(a), 0)
        assert torch.equal(a[:rows, :columns], b[:rows, :columns]) if a.ndim == 2 else torch.equal(a, b), name
        assert a.shape == b.shape or any(part in name for part in ("k_proj", "v_proj", "gate", "up_proj", "down_proj"))
    tasks = Letters(), Letters()
    for task, shape in zip(tasks, (wide, narrow), strict=True):
        train(replace(SHORT, shape=shape), task)
    assert torch.equal(torch.stack(tasks[0].asked), torch.stack(tasks[1].asked))


def test_initial_values_are_those_of_the_paper_and_all_different():
    """One generator state for every matrix makes layers copies of each other; the two matrices that write into the
    residual stream are smaller by √(2L); norms begin at one."""
    shape = ModelShape(2, 97, 6, 3, 16, 101, 211)
    one, other = initial(shape, 3).state_dict(), initial(shape, 4).state_dict()
    firsts = set()
    for name, tensor in one.items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
            continue
        deviation = (2 / (5 * 97)) ** 0.5
        expected = deviation / 2 if name.endswith(("o_proj.weight", "down_proj.weight")) else deviation
        assert tensor.std().item() == pytest.approx(expected, rel=4 / (2 * tensor.numel()) ** 0.5), name
        assert abs(tensor.mean().item()) < 4 * expected / tensor.numel() ** 0.5, name
        firsts |= {round(one[name][0, 0].item() / expected, 6), round(other[name][0, 0].item() / expected, 6)}
    assert len(firsts) == 2 * sum(tensor.ndim == 2 for tensor in one.values())


# --- killed, resumed, and other misfortunes ---------------------------------------------------------------------------


class Killed(Exception):
    """What a test throws into a run."""


def until(last: int) -> Any:
    def on_step(step: int, loss: float) -> None:
        if step == last:
            raise Killed

    return on_step


def files(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.parent.iterdir())


def test_an_interrupted_run_ends_with_the_same_numbers(tmp_path, every_step):
    """A resumed run that restarts its schedule, forgets AdamW's moments, the average or the marks, repeats or skips a
    batch, or loses its curve ends elsewhere, by less than anyone would notice: interrupted four times here, before and
    inside the averaging, and equal bit for bit. Two checkpoints are kept, the last two."""
    undisturbed, checkpoint, steps = run(marks=MARKS), tmp_path / "deep" / "run.pt", []

    def noted(last: int) -> Any:
        return lambda step, loss: (steps.append(step), until(last)(step, loss))

    for last in (4, 14, 35, 38):
        with pytest.raises(Killed):
            train(RECIPE, Letters(), checkpoint, noted(last), marks=MARKS)
        assert files(checkpoint) == ["run.previous", "run.pt"]
        saved = (torch.load(checkpoint.with_suffix(end), weights_only=True)["step"] for end in (".previous", ".pt"))
        assert list(saved) == [last - 2, last - 1]
    assert same(run(checkpoint=checkpoint, on_step=noted(99), marks=MARKS), undisturbed)
    assert steps == sorted([*range(1, 41), 4, 14, 35, 38])  # a step that was not saved is done again, no other
    loop.forget(checkpoint)
    assert files(checkpoint) == []


@pytest.mark.parametrize("damage", [b"", b"half a", bytes(500), None], ids=["empty", "text", "zeros", "cut short"])
def test_a_damaged_checkpoint_is_as_if_not_there(tmp_path, every_step, damage):
    """After a power failure the newest file may be there without its content: the one before it is why two are kept.
    With neither the run begins anew, to the same numbers."""
    checkpoint, undisturbed = tmp_path / "run.pt", run(SHORT)
    with pytest.raises(Killed):
        train(SHORT, Letters(), checkpoint, until(9))
    for one, begins_at in ((checkpoint, 8), (tmp_path / "run.previous", 1)):
        checkpoint.write_bytes(checkpoint.read_bytes()[:3000] if damage is None else damage)
        one.write_bytes(one.read_bytes()[:3000] if damage is None else damage)
        seen: list[int] = []
        with pytest.raises(Killed):
            train(SHORT, Letters(), checkpoint, lambda step, _: seen.append(step) or until(begins_at)(step, 0.0))  # noqa: B023
        assert seen == [begins_at]
    assert same(run(SHORT, checkpoint), undisturbed)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, every_step):
    """The state of hours, overwritten by half of itself, when the disk is full: what was saved before stays as it was,
    and the run goes on from it once there is room."""
    checkpoint, limits = tmp_path / "run.pt", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int, _: float) -> None:
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint.stat().st_size // 2, limits[1]))

    try:
        with pytest.raises(InputError, match=r"cannot save .*run\.pt: .*; what was saved before is safe") as caught:
            train(SHORT, Letters(), checkpoint, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert files(checkpoint) == ["run.previous", "run.pt"]
    assert torch.load(checkpoint, weights_only=True)["step"] == 6
    assert same(run(SHORT, checkpoint), run(SHORT))


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, every_step):
    """A traceback from inside torch after the first half minute of training."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot save .*run\.pt: (Not a directory|File exists)"):
        train(SHORT, Letters(), tmp_path / "file" / "run.pt")


@pytest.mark.parametrize(
    ("other", "data"),
    [
        (replace(SHORT, shape=SHAPE.with_kv_heads(3)), "letters"),
        (replace(SHORT, peak_rate=0.005), "letters"),
        (SHORT, "digits"),
    ],
    ids=["shape", "recipe", "text"],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, every_step, other, data):
    """Loaded all the same, another shape is a traceback and another rate or text a number that nothing explains."""
    with pytest.raises(Killed):
        train(SHORT, Letters(), tmp_path / "run.pt", until(3))
    task = Letters()
    task.digest = data
    with pytest.raises(InputError, match=r"run\.pt is the checkpoint of another recipe, shape or text; remove it"):
        train(other, task, tmp_path / "run.pt")


# Each line of input is a run in a process of its own, forked so that none pays for imports, and killed as asked.
KILLER = """
import hashlib, json, os, signal, sys, time
from pathlib import Path

import torch
import torch._dynamo  # else every run's first step would

from attnlab.train import loop
from tests.train.test_loop import MARKS, RECIPE, Letters, numbers

loop.CHECK_EVERY, loop.SAVE_EVERY_SECONDS = 3, -1.0
torch.set_num_threads(1)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying(real, at, half=None):
    calls = []

    def fake(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            if half:
                half(*arguments)
            die()
        return real(*arguments)

    return fake


def half_saved(content, file):
    file.write(b"half of a checkpoint")
    file.flush()


def run(folder, fault, at):
    if fault == "replace":
        os.replace = dying(os.replace, at)
    elif fault == "save":
        torch.save = dying(torch.save, at, half_saved)
    result = loop.train(
        RECIPE, Letters(), folder / "run.pt", lambda step, _: fault == "step" and step >= at and die(),
        marks=MARKS, keep=folder / "last.pt",
    )
    weights = torch.load(folder / "last.pt", weights_only=True)
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights.values())).hexdigest()
    (folder / "result.json").write_text(json.dumps([numbers(result), digest]))


for line in sys.stdin:
    folder, fault, at = json.loads(line)
    child = os.fork()
    if not child:
        run(Path(folder), fault, at)
        os._exit(0)
    if fault == "clock":
        time.sleep(at)
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_no_number(tmp_path):
    """kill -9 between steps, in the middle of writing a checkpoint, between putting the old one aside and the new one
    in its place, and whenever a clock says: the curve, the marks, both final numbers and every weight are those of a
    run that nobody disturbed."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    faults: list[tuple[str, float]] = [("step", 2), ("replace", 1), ("save", 1), ("replace", 3), ("step", 9)]
    faults += [("clock", seconds) for seconds in (0.02, 0.05, 0.1)]
    faults += [("replace", 2), ("save", 3), ("replace", 4), ("step", 33), ("step", 39)]
    none = ("nothing", 0.0)
    lines = [(str(undisturbed), *none), *((str(killed), *fault) for fault in [*faults, none])]
    done = subprocess.run(
        [sys.executable, "-c", KILLER],
        input="".join(json.dumps(line) + "\n" for line in lines),
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    codes = list(map(int, done.stdout.split()))
    assert codes[0] == codes[-1] == 0 and len(codes) == len(faults) + 2, done.stderr
    for (fault, _), code in zip(faults, codes[1:-1], strict=True):
        assert code == -9 or fault == "clock", faults  # the clock may come too late
    assert (killed / "result.json").read_text() == (undisturbed / "result.json").read_text()
