"""What small training runs can show: differences from MHA, paired by seed, with what they cannot show said.

A verdict is given only where the 95 % interval excludes zero; else "not resolvable at this scale", beside the smallest
effect that these seeds would have shown. From rows alone: nothing here imports torch.
"""

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnlab.errors import InputError
from attnlab.shapes import variant_name

if TYPE_CHECKING:  # pandas costs 0.3 s to import; only whoever has rows needs it
    import pandas


@dataclass(frozen=True)
class Effect:
    """Bits per byte of one arm minus MHA's, paired by seed: ``differences`` in order of seed, and their ``mean``."""

    n_kv_heads: int
    variant: str
    arm: str
    seeds: int
    mean: float
    half_width: float
    smallest: float
    verdict: str
    differences: tuple[float, ...]


def effects(rows: "pandas.DataFrame") -> list[Effect]:
    """One ``Effect`` per (G, arm) of finished quality rows of one experiment, G descending.

    ``half_width``: of the 95 % interval, Student's t over the paired differences. ``smallest``: the true difference
    these seeds would have shown with 80 % probability, (t(0.975) + t(0.8)) · sd / √n. Raises ``InputError`` without MHA
    rows, with fewer than two pairs, and on rows that do not belong together: of several experiments, corpora,
    machines, budgets or head counts, or two of one seed.
    """
    rows = rows[rows["status"] == "ok"]
    for column in ("experiment", "corpus", "machine", "tokens", "shape.n_heads"):
        if rows[column].nunique() != 1:
            raise InputError(f"quality rows of one {column} are needed, got {sorted(rows[column].unique())}")
    heads = int(rows["shape.n_heads"].iloc[0])
    if rows.duplicated(["seed", "shape.n_kv_heads", "arm"]).any():
        raise InputError("quality rows of one run are needed: a seed of one arm is there twice")
    loss = rows.pivot(index="seed", columns=["shape.n_kv_heads", "arm"], values="bits_per_byte")
    if (heads, "plain") not in loss:
        raise InputError("no finished MHA run to compare with; let the sweep go on")
    found = []
    arms: list[Any] = loss.columns.to_list()
    for g, arm in sorted(arms, key=lambda column: (-column[0], column[1] == "matched")):
        if g == heads:
            continue
        difference = (loss[g, arm] - loss[heads, "plain"]).dropna()
        n = len(difference)
        if n < 2:
            raise InputError(f"{variant_name(heads, g)} {arm} has {n} seeds paired with MHA, at least 2 are needed")
        mean, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(n)
        half = student_t(0.975, n - 1) * error
        verdict = "not resolvable at this scale" if abs(mean) <= half else "worse" if mean > 0 else "better"
        smallest = (student_t(0.975, n - 1) + student_t(0.8, n - 1)) * error
        found.append(Effect(g, variant_name(heads, g), arm, n, mean, half, smallest, verdict, tuple(difference)))
    return found


@functools.cache
def student_t(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, by bisection on its integrated density (Simpson's rule)."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def below(t: float, panels: int = 2000) -> float:
        width = t / panels
        density = [scale * (1 + (i * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(panels + 1)]
        return 0.5 + width / 3 * (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]))

    low, high = 0.0, 1000.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return high
