"""Rows as training sweeps leave them, made up: no two numbers alike, and some seeds missing."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy
import pytest

RUN = "20270301-000000-quality"
BASE = {
    "schema": 1,
    "run": RUN,
    "machine": "zen-2c",
    "device": "cpu",
    "processor": "Zen",
    "torch": "2.13.0",
    "kind": "quality",
    "status": "ok",
    "corpus": "c",
}
METHODS = ("mean", "first", "random", "aligned")
SIZES = {"n_layers": (2, 3, 5), "dim": (24, 60, 84)}
TOKENS = ["def", "▁f", "(", "$x", ")\n", "→", "é"]


def quality_rows(
    heads: int = 6, groups: tuple[int, ...] = (2, 1), seeds: int = 3, noise: float = 0.003, length: int = 7
) -> Iterator[dict[str, Any]]:
    """Rows of all experiments; the last seed of the last point of ``recall`` and of ``uptraining`` is yet to come."""
    random = numpy.random.default_rng(11)
    every, numbers = (heads, *groups), itertools.count()

    def row(experiment: str, g: int, seed: int, arm: str = "plain", **more: Any) -> dict[str, Any]:
        shape = {"n_layers": 3, "dim": 60, "n_heads": heads, "n_kv_heads": g, "head_dim": 10} | more.pop("shape", {})
        own = {"key": f"q{next(numbers)}", "experiment": experiment, "arm": arm, "seed": seed, "shape": shape}
        return BASE | own | {"tokens": 7_000_000, "n_params": 530_000} | more

    def cost(g: int) -> float:
        return 0.01 * math.log2(heads / g)

    for g, arm, seed in itertools.product(every, ("plain", "matched"), range(seeds)):
        if g < heads or arm == "plain":
            loss = 1.6 + 0.02 * seed + cost(g) * (1 if arm == "plain" else 0.4) + noise * random.normal()
            curve = [[n * 500_000, loss + 2 * math.exp(-n / 3) + 2 * noise * random.normal()] for n in range(1, 15)]
            more = {
                "bits_per_byte": loss,
                "bits_per_byte_raw": loss + 0.0071,
                "gzip_bits": 1.67,
                "xz_bits": 1.4,
                "curve": curve,
            }
            yield row("g-sweep", g, seed, arm, **more)
    for budget, size, g, seed in itertools.product(("fixed", "per-parameter"), range(3), every, range(seeds)):
        shape = {name: values[size] for name, values in SIZES.items()}
        whole = (210_000, 530_000, 1_470_000)[size]
        tokens, b = (7_000_000, 0.08) if budget == "fixed" else (4 * whole, 0.15)
        loss = 1.6 * (whole / 530_000) ** -b * (1 + cost(g) / 2) * (1 + 0.01 * seed + noise * random.normal())
        params = whole - 11_000 * (1 + size) * (heads - g)
        more = {"budget": budget, "shape": shape, "n_params": params, "tokens": tokens, "bits_per_byte": loss}
        yield row("scale", g, seed, **more)
    sizes, forms = ((64, 5), (128, 11), (256, 23)), ((1, 16), (3, 8))
    points = [*itertools.product(forms, every, sizes, range(seeds), (1e-3, 4e-3))]
    for (relations, head_dim), g, (context, pairs), seed, rate in points:
        if (rate == 4e-3 or seed == 0) and (g, relations, pairs, seed) != (groups[-1], 3, 23, seeds - 1):
            accuracy = 1 / (1 + math.exp(relations * (pairs / 23 - 0.2 * math.log2(2 * g + 1)) * 5))
            accuracy = (accuracy + 0.01 * random.random()) / 1.02 + (1e-3 - rate)
            own = {"relations": relations, "pairs": pairs, "context": context, "peak_rate": rate, "accuracy": accuracy}
            yield row("recall", g, seed, shape={"head_dim": head_dim}, **own)
    alphas = (0, 0.01, 0.05, 0.1, 0.2)
    arms = [(heads, "continued"), *itertools.product(groups, METHODS)]
    for (g, arm), alpha, seed in itertools.product(arms, alphas, range(seeds)):
        if (g, arm, alpha, seed) != (groups[-1], METHODS[-1], alphas[-1], seeds - 1):
            rank = (*METHODS, "continued").index(arm)
            broken = 0 if arm == "continued" else (2.1, 2.6, 3.1, 0.7)[rank] * (1 + cost(g) * 9)
            loss = 1.6 - 0.1 * alpha + broken * math.exp(-12 * math.sqrt(alpha)) + (cost(g) + noise * random.normal())
            yield row("uptraining", g, seed, arm, alpha=alpha, parent="q0", bits_per_byte=loss)
    for head, (place, method) in itertools.product(range(2), enumerate(("before", *METHODS))):
        scores = random.normal(size=(length, length)) * (4 - place / 2) + numpy.triu(
            numpy.full((length, length), -1e9), 1
        )
        weights = numpy.exp(scores - scores.max(axis=1, keepdims=True))
        own = {"method": method, "n_kv_heads": groups[0], "layer": 1, "head": head}
        attention = (weights / weights.sum(axis=1, keepdims=True)).tolist()
        tokens = [TOKENS[i % len(TOKENS)] for i in range(length)]
        drawn = {"kind": "conversion", "key": f"q{next(numbers)}", "attention": attention, "tokens": tokens}
        yield BASE | own | drawn


@pytest.fixture(scope="session")
def trained() -> list[dict[str, Any]]:
    """Rows of one run of all experiments of one machine."""
    return list(quality_rows())


@pytest.fixture(scope="session")
def noiseless() -> list[dict[str, Any]]:
    """The same without noise."""
    return list(quality_rows(noise=0))
