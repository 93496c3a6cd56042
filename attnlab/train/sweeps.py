"""What is declared to be trained: five experiments, each a list of runs, the most valuable seeds first.

g-sweep      every G, plain and matched, on real text: what sharing costs
uptraining   one MHA checkpoint made into fewer heads by every method, and trained back
recall       associative recall, where few KV heads should hurt first
scale        the same variants at several sizes: what else would buy that loss
context      loss by position in a longer window
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from attnlab.errors import check_choice, check_size, divisors
from attnlab.model.convert import METHODS
from attnlab.shapes import ModelShape
from attnlab.train.loop import Task
from attnlab.train.quality import Planned
from attnlab.train.recall import Recall
from attnlab.train.recipe import COMPILED_FROM, Recipe, peak_rate

# Sizes by layers, dim, FFN and vocabulary; eight heads, so that G has four values. Those of ``SCALE`` two cores can
# train dozens of times; "quick" is a toy, and the last is for a card.
SIZES = {
    name: ModelShape(layers, dim, 8, 8, dim // 8, ffn, vocabulary, tied_embeddings=True, max_context=1024, name=name)
    for name, layers, dim, ffn, vocabulary in (
        ("quick", 2, 32, 64, 1024),
        ("0.3m", 2, 96, 256, 1024),
        ("0.6m", 3, 128, 256, 1024),
        ("1.1m", 3, 160, 416, 1024),
        ("1.7m", 4, 192, 384, 1024),
        ("34m", 8, 512, 1408, 16384),
    )
}
SCALE = ("0.3m", "0.6m", "1.1m", "1.7m")
SWEEP_SIZE, SWEEP_TOKENS, SWEEP_SEEDS = "0.6m", 4_000_000, 5
EVEN = "1.1m"  # tokens that grow with the size, about 4 per parameter, are the fixed ones there: one training
# A model so small that a run takes two minutes of one core; three forms of the task. What a fact asks of one KV head
# grows with the relations and with the pairs, what it holds with its width. In a vocabulary of 128 nobody learns the
# harder forms in these minutes; in one of 32 MHA does.
RECALL_SHAPE = ModelShape(2, 64, 8, 8, 16, 128, 128, tied_embeddings=True, max_context=256, name="recall")
RECALL_FORMS = (  # head_dim, relations, vocabulary, (length, pairs) in turn
    (16, 1, 128, ((16, 4), (64, 4), (128, 8), (256, 16))),
    (16, 3, 32, ((16, 2), (24, 4), (36, 5))),
    (8, 3, 32, ((16, 2), (24, 4), (36, 5))),
)
RECALL_TOKENS = 3_000_000
RECALL_RATES, RECALL_LOWEST, RECALL_LEARNED = (2e-3, 4e-3, 8e-3), 2.5e-4, 0.99
ALPHAS = (0.0, 0.01, 0.05, 0.1, 0.2)
EXPERIMENTS = ("g-sweep", "uptraining", "recall", "scale", "context")


def recipe(shape: ModelShape, seed: int, tokens: int, **more: Any) -> Recipe:
    """LLaMA's recipe at this size, so named; every arm at the learning rate of its MHA."""
    size = SIZES[shape.name].n_params if shape.name in SIZES else shape.n_params
    rated: dict[str, Any] = {"peak_rate": round(peak_rate(size), 6), "compiled": size >= COMPILED_FROM}
    if size > 10_000_000:  # steps of 32k tokens, which a card needs to be busy
        rated |= {"batch": 32, "context": 1024}
    return Recipe(shape, seed, tokens, **(rated | more))


def g_sweep(
    text: Task,
    shape: ModelShape = SIZES[SWEEP_SIZE],
    seeds: int = SWEEP_SEEDS,
    tokens: int = SWEEP_TOKENS,
    **more: Any,
) -> list[Planned]:
    """Every G that divides H × plain and matched × seeds, whole seeds first: a partial sweep is still paired."""
    runs = []
    for seed in range(check_size("seeds", seeds)):
        for g in reversed(divisors(shape.n_heads)):
            for arm in ("plain",) if g == shape.n_heads else ("plain", "matched"):
                grouped = shape.with_kv_heads(g, match_params=arm == "matched")
                runs.append(Planned("g-sweep", arm, recipe(grouped, seed, tokens, **more), text))
    return runs


def uptraining(parent: Planned, seeds: int = 3) -> list[Planned]:
    """The MHA run ``parent``, converted by every method to every smaller G, and itself, trained on for a fifth of its
    steps at the rate its schedule ended with, on text in another order."""
    shape, before = parent.recipe.shape, parent.recipe
    tokens = round(max(ALPHAS) * before.steps) * before.batch * before.context
    after = replace(before, tokens=tokens, schedule="constant", peak_rate=round(0.1 * before.peak_rate, 8))
    runs = []
    for seed in range(check_size("seeds", seeds)):
        order = replace(after, seed=1000 + seed)
        runs.append(Planned("uptraining", "continued", order, parent.task, (), parent, ALPHAS))
        for g in [g for g in reversed(divisors(shape.n_heads)) if g < shape.n_heads]:
            for method in METHODS:
                grouped = replace(order, shape=shape.with_kv_heads(g))
                runs.append(Planned("uptraining", method, grouped, parent.task, (), parent, ALPHAS))
    return runs


def recall(rows: Iterable[Mapping[str, Any]]) -> list[Planned]:
    """Every setting and G at every rate on one seed; where ``rows`` hold those, half the lowest too as long as that is
    the best and has not learned the task; and then three other seeds at the best."""
    accuracy: dict[str, float] = {row["key"]: row.get("accuracy", 0.0) for row in rows}
    runs = []
    for head_dim, relations, words, settings in RECALL_FORMS:
        task = Recall(settings, relations, words)
        for g in reversed(divisors(RECALL_SHAPE.n_heads)):
            shape = replace(RECALL_SHAPE, n_kv_heads=g, head_dim=head_dim, vocab_size=words)
            made = [Recipe(shape, 0, RECALL_TOKENS, peak_rate=rate) for rate in RECALL_RATES]
            tries = [Planned("recall", "plain", one, task) for one in made]
            while all(key in accuracy for run in tries for key in run.row_keys()):
                reached = [statistics.mean(accuracy[key] for key in run.row_keys()) for run in tries]
                best = tries[reached.index(max(reached))].recipe
                lowest = min(run.recipe.peak_rate for run in tries)
                if best.peak_rate > lowest or max(reached) >= RECALL_LEARNED or lowest <= RECALL_LOWEST:
                    runs += [Planned("recall", "plain", replace(best, seed=seed), task) for seed in (1, 2, 3)]
                    break
                tries.append(Planned("recall", "plain", replace(best, peak_rate=lowest / 2), task))
            runs += tries
    return runs


def scale(text: Task, seeds: int = 3, tokens: int = SWEEP_TOKENS, **more: Any) -> list[Planned]:
    """Sizes × {MHA, GQA-2, MQA}, on as many tokens each, and on tokens that grow with the size."""
    runs = []
    for shape in map(SIZES.__getitem__, SCALE):  # whole sizes first: a partial sweep is still a law
        budgets = {"fixed": tokens, "per-parameter": tokens * shape.n_params // SIZES[EVEN].n_params}
        for seed in range(check_size("seeds", seeds)):
            for budget, count in budgets.items():
                for g in (shape.n_heads, 2, 1):
                    one = recipe(shape.with_kv_heads(g), seed, count, **more)
                    runs.append(Planned("scale", "plain", one, text, (("budget", budget),)))
    return runs


def context(text: Task, seeds: int = 3, tokens: int = SWEEP_TOKENS, **more: Any) -> list[Planned]:
    """MHA and MQA on windows of 1024 tokens; rows tell loss by position."""
    shape = SIZES[SWEEP_SIZE]
    return [
        Planned("context", "plain", recipe(shape.with_kv_heads(g), seed, tokens, context=1024, batch=1, **more), text)
        for seed in range(check_size("seeds", seeds))
        for g in (shape.n_heads, 1)
    ]


def quick(text: Task, seeds: int = 2, tokens: int = 65_536, **more: Any) -> list[Planned]:
    """The machinery in a minute: a toy model, a toy budget, the same code."""
    runs = g_sweep(text, SIZES["quick"], seeds, tokens, context=64, **more)
    return runs + uptraining(runs[0], 2)


def chosen(names: str, size: str) -> list[str]:
    """The experiments in ``names`` (with commas between, or "all"), as far as a text in the vocabulary of ``size`` can
    serve them. Raises ``InputError`` for a name that is none, and for one that cannot be had at that size."""
    same = SIZES[check_choice("size", size, SIZES)].vocab_size == SIZES[SWEEP_SIZE].vocab_size
    valid = EXPERIMENTS[:2] if size == "quick" else EXPERIMENTS if same else EXPERIMENTS[:3]
    for name in (found := list(valid) if names == "all" else names.split(",")):
        check_choice("experiment", name, EXPERIMENTS)
        check_choice(f"experiment for size {size}", name, valid)
    return found


def declared(
    names: list[str],
    text: Task,
    size: str = SWEEP_SIZE,
    rows: Iterable[Mapping[str, Any]] = (),
    budget: Mapping[str, int] | None = None,
    **more: Any,
) -> list[Planned]:
    """The runs of the experiments that ``chosen`` gave, in the order in which they are worth most; ``size`` is the
    g-sweep's and its uptraining's, as are ``seeds`` and ``tokens`` in ``budget``; ``rows`` are there already."""
    if size == "quick":
        runs = quick(text, **(budget or {}), **more)
        return [run for run in runs if run.experiment in names]
    sweep = g_sweep(text, SIZES[size], **(budget or {}), **more)
    whole = {
        "g-sweep": lambda: sweep,
        "uptraining": lambda: uptraining(sweep[0]),
        "recall": lambda: recall(rows),
        "scale": lambda: scale(text, **more),
        "context": lambda: context(text, **more),
    }
    return [run for name in EXPERIMENTS if name in names for run in whole[name]()]
