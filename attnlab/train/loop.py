"""Train one model, deterministically, killed and resumed at will."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from attnlab.model.llama import Llama
from attnlab.train.corpus import Corpus
from attnlab.train.evaluate import bits_per_byte
from attnlab.train.recipe import Recipe

CURVE_POINTS = 10
CURVE_BYTES, FINAL_BYTES = 32_768, 524_288
SAVE_EVERY_SECONDS = 30.0


def train(
    recipe: Recipe,
    corpus: Corpus,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Run ``recipe``; return ``bits_per_byte`` on validation text, the ``curve`` of [tokens, bits per byte] on its way,
    ``seconds`` of this process, and ``status`` ("ok", or "diverged" with the step as ``reason``). With a ``checkpoint``
    path the state is saved there every half minute, atomically, and a run that finds one goes on from it to the same
    numbers, bit for bit (same machine, same thread count). ``on_step(step, loss)`` reports."""
    torch.manual_seed(recipe.seed)
    model = Llama(recipe.shape)
    optimizer = recipe.optimizer(model)
    start, curve, began, saved = 0, [], time.monotonic(), time.monotonic()
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, curve = state["step"], state["curve"]
    evaluate_at = {round(recipe.steps * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)}
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        windows = corpus.batch(recipe.seed, step, recipe.batch, recipe.context)
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        if not math.isfinite(loss.item()):
            return _diverged(f"loss is {loss.item()} at step {step}", curve)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step + 1 in evaluate_at:
            bits = bits_per_byte(model, corpus.validation[:CURVE_BYTES], recipe.context)
            if not math.isfinite(bits):  # a step that broke the weights shows here before its successor's loss does
                return _diverged(f"validation loss is {bits} after step {step}", curve)
            curve.append([(step + 1) * recipe.batch * recipe.context, bits])
        if on_step:
            on_step(step + 1, loss.item())
        if checkpoint is not None and time.monotonic() - saved > SAVE_EVERY_SECONDS:
            _save(checkpoint, model, optimizer, step + 1, curve)
            saved = time.monotonic()
    final = bits_per_byte(model, corpus.validation[:FINAL_BYTES], recipe.context)
    if not math.isfinite(final):
        return _diverged(f"validation loss is {final} after the last step", curve)
    return {"status": "ok", "bits_per_byte": final, "curve": curve, "seconds": time.monotonic() - began}


def _diverged(reason: str, curve: list[Any]) -> dict[str, Any]:
    return {"status": "diverged", "reason": reason, "curve": curve}


def _save(path: Path, model: Llama, optimizer: torch.optim.Optimizer, step: int, curve: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "curve": curve}
    torch.save(state, partial)
    os.replace(partial, path)
