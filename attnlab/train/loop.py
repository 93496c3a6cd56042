"""Train one model, deterministically, killed and resumed at will."""

import contextlib
import math
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from attnlab.attention import picked
from attnlab.errors import InputError
from attnlab.model.llama import Llama, initial_deviation
from attnlab.shapes import ModelShape
from attnlab.train.loss import linear_cross_entropy
from attnlab.train.recipe import AVERAGED_SHARE, CLIP, Recipe

CURVE_POINTS = 10
CHECK_EVERY = 10  # steps between two looks at the loss: a look waits for the device
SAVE_EVERY_SECONDS = 30.0


class Task(Protocol):
    """What a model is trained on and judged by."""

    @property
    def digest(self) -> str: ...

    def batch(self, seed: int, step: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [batch, context] int64, a function of the arguments alone; a target below 0 is not
        counted."""
        ...

    def evaluate(self, model: Llama, context: int, whole: bool) -> dict[str, Any]:
        """Its measure, under its name, first; of a sample unless ``whole``."""
        ...

    def facts(self) -> dict[str, Any]:
        """What rows say of it, beside its digest."""
        ...

    def parts(self) -> list[dict[str, Any]]:
        """Where a run ends in several rows, what tells each from the others."""
        ...


def initial(shape: ModelShape, seed: int) -> Llama:
    """A model with the initial weights of ``seed``. Arms of one seed share every weight that both have: each matrix has
    numbers of its own, and one that is narrower than MHA's (fewer KV heads, a narrower FFN) has the first of them."""
    model = Llama(shape)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            generator = torch.Generator().manual_seed(
                seed * 1_000_003 + int.from_bytes(name.encode(), "big") % 1_000_003
            )
            inner = name.endswith("down_proj.weight")  # the FFN's width is its columns
            size = parameter.numel()  # torch draws by 16: of fewer, the last would be others than those of a wider one
            drawn = torch.randn(-(-size // 16) * 16, generator=generator)[:size]
            drawn = drawn.view(parameter.T.shape if inner else parameter.shape)
            into_stream = inner or name.endswith("o_proj.weight")
            drawn *= initial_deviation(shape.dim) * ((2 * shape.n_layers) ** -0.5 if into_stream else 1)
            parameter.data.copy_(drawn.T if inner else drawn)
    return model


def train(
    recipe: Recipe,
    task: Task,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    *,
    model: Llama | None = None,
    marks: tuple[int, ...] = (),
    device: torch.device | str = "cpu",
    keep: Path | None = None,
) -> dict[str, Any]:
    """Run ``recipe`` on ``task``; return the task's measure of the averaged weights, the same with "_raw" of the last
    ones, the ``curve`` of [tokens, measure of a sample] on its way, ``marks`` of [step, measure of the whole] after the
    steps asked for (0: before the first), ``seconds`` and ``tokens_per_second`` of training alone, and ``status``
    ("ok", or "diverged" with the step as ``reason``).

    ``model`` is trained in place if given, else a new one. With a ``checkpoint`` path the state is saved there every
    half minute, atomically, the one before kept; a run that finds one goes on from it to the same numbers, bit for bit
    (same machine, same thread count); one that cannot be read is as if not there. ``keep``: where the last weights are
    left. ``on_step(step, loss)`` reports. Raises ``InputError`` on a checkpoint of another recipe or other data, or one
    that cannot be written.
    """
    model = (initial(recipe.shape, recipe.seed) if model is None else model).to(device).train()
    hidden = compiled(recipe, model)
    averaged = AveragedModel(model)
    mean_model = averaged.module
    assert isinstance(mean_model, Llama)  # a copy of the model, whatever its declared type
    optimizer = recipe.optimizer(model)
    state: dict[str, Any] = {"step": 0, "curve": [], "marks": [], "seconds": 0.0}
    if checkpoint is not None and (found := _load(checkpoint, recipe, task.digest)):
        model.load_state_dict(found.pop("model"))
        averaged.load_state_dict(found.pop("averaged"))
        optimizer.load_state_dict(found.pop("optimizer"))
        state = found
    curve_at = {round(recipe.steps * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)}
    average_from = min(round((1 - AVERAGED_SHARE) * recipe.steps), recipe.steps - 1)
    losses: list[Tensor] = []
    began = saved = time.monotonic()

    def measure(judged: Llama, whole: bool) -> dict[str, Any]:
        nonlocal began
        state["seconds"] += time.monotonic() - began
        found = task.evaluate(judged, recipe.context, whole)
        began = time.monotonic()
        return found

    if 0 in marks and not state["step"]:
        state["marks"].append([0, next(iter(measure(model, True).values()))])
    for step in range(state["step"], recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        inputs, targets = (part.to(device, non_blocking=True) for part in _batch(recipe, task, step, device))
        loss = optimise(recipe, model, hidden, optimizer, inputs, targets)
        if step >= average_from:
            averaged.update_parameters(model)
        losses.append(loss)
        done = state["step"] = step + 1
        if len(losses) == CHECK_EVERY or done in curve_at or done in marks or done == recipe.steps:
            values = torch.stack(losses).tolist()
            for at, value in enumerate(values, done - len(values)):
                if not math.isfinite(value):
                    return _diverged(f"loss is {value} at step {at}", state)
            losses = []
            if on_step:
                on_step(done, values[-1])
            if done in curve_at:
                value = next(iter(measure(model, False).values()))
                if not math.isfinite(value):  # a step that broke the weights shows here before the next loss does
                    return _diverged(f"validation gives {value} after step {step}", state)
                state["curve"].append([done * recipe.batch * recipe.context, value])
            if done in marks:
                state["marks"].append([done, next(iter(measure(model, True).values()))])
            if checkpoint is not None and time.monotonic() - saved > SAVE_EVERY_SECONDS:
                state["seconds"] += time.monotonic() - began
                parts: dict[str, Any] = {"model": model, "averaged": averaged, "optimizer": optimizer}
                weights = {part: owner.state_dict() for part, owner in parts.items()}
                said = {**state, "recipe": asdict(recipe), "data": task.digest}
                _write(checkpoint, weights | said, _previous(checkpoint))
                began = saved = time.monotonic()
    last, mean = measure(model, True), measure(mean_model, True)
    name = next(iter(last))
    if not math.isfinite(last[name]):
        return _diverged(f"validation gives {last[name]} after the last step", state)
    if keep is not None:
        _write(keep, model.state_dict())
    trained = recipe.steps * recipe.batch * recipe.context
    found = {**mean, f"{name}_raw": last[name], "curve": state["curve"], "seconds": state["seconds"]}
    found |= {"tokens_per_second": trained / max(state["seconds"], 1e-9), "impl": model.impl}
    return {"status": "ok", **found, **({"marks": state["marks"]} if marks else {})}


def optimise(
    recipe: Recipe,
    model: Llama,
    hidden: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
) -> Tensor:
    """One step of ``optimizer`` on inputs and targets [batch, context]; return the loss, which waits for no device.
    ``hidden`` is the model's own, or what torch.compile made of it."""
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=inputs.device)
    for part, expected in zip(inputs.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True):
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=recipe.autocast):
            states = hidden(part).flatten(0, 1)
        if recipe.autocast:  # the last norm gives float32, at which a card multiplies slowly
            states = states.bfloat16()
        own = linear_cross_entropy(states, _head(model), expected.flatten()) / recipe.accumulate
        own.backward()
        loss += own.detach()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss


def compiled(recipe: Recipe, model: Llama) -> Callable[[Tensor], Tensor]:
    """``model.hidden`` as ``recipe`` wants it, the implementation of attention asked for once: a compiled model cannot
    ask at every call."""
    model.recompute, model.impl = recipe.recompute, _implementation(recipe, model)
    return torch.compile(model.hidden, dynamic=False) if recipe.compiled else model.hidden


def _implementation(recipe: Recipe, model: Llama) -> str:
    """What ``auto`` picks for a window."""
    shape, weight = recipe.shape, model.embed_tokens.weight
    dtype = torch.bfloat16 if recipe.autocast else weight.dtype
    with torch.device("meta"):
        heads = [torch.empty(1, n, recipe.context, shape.head_dim) for n in (shape.n_heads, shape.n_kv_heads)]
    q, k = (torch.empty(part.shape, dtype=dtype, device=weight.device, requires_grad=True) for part in heads)
    return picked(q, k, k, causal=True)


def _head(model: Llama) -> Tensor:
    return model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight


def _batch(recipe: Recipe, task: Task, step: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    batch = task.batch(recipe.seed, step, recipe.batch, recipe.context)
    return batch if torch.device(device).type == "cpu" else (batch[0].pin_memory(), batch[1].pin_memory())


def _diverged(reason: str, state: dict[str, Any]) -> dict[str, Any]:
    return {"status": "diverged", "reason": reason, "curve": state["curve"], "seconds": state["seconds"]}


# --- checkpoints ----------------------------------------------------------------------------------------------------


def _write(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """``path`` holds ``content`` or what it held before, which then goes to ``previous``, killed at any moment."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save(content, file)
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk, as a rule
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or f"no space left, or {' '.join(str(error).split())}"
        raise InputError(f"cannot save {path}: {reason}; what was saved before is safe, run again to go on") from None


def _load(path: Path, recipe: Recipe, data: str) -> dict[str, Any] | None:
    for one in (path, _previous(path)):
        try:
            state: dict[str, Any] = torch.load(one, weights_only=True)
        except (OSError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError):  # not there, or cut short
            continue
        if state.pop("recipe") != asdict(recipe) or state.pop("data", data) != data:
            raise InputError(f"{one} is the checkpoint of another recipe, shape or text; remove it to start anew")
        return state
    return None


def _previous(path: Path) -> Path:
    return path.with_suffix(".previous")


def forget(path: Path) -> None:
    """Remove a finished run's checkpoints."""
    for one in (path, _previous(path)):
        one.unlink(missing_ok=True)
