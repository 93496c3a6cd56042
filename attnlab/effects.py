"""What small training runs can show: differences from MHA, paired by seed, with what they cannot show said.

Each arm has its own 95 % interval. A verdict answers for all arms of a sweep together: of six intervals at 95 % one in
four sweeps would have some exclude zero by chance, the likelier the fewer the seeds, so "better" and "worse" need the
interval at 1 - 5 %/arms (Bonferroni) to exclude it. Else "not resolvable at this scale", beside the smallest effect
that would likely have had a verdict. From rows alone: nothing here imports torch.
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

    ``half_width``: of the arm's own 95 % interval, Student's t over the paired differences. ``verdict``: with m arms,
    by t(1 - 0.025/m). ``smallest``: the true difference that would have had a verdict with 80 % probability,
    (t(1 - 0.025/m) + t(0.8)) · sd / √n. Raises ``InputError`` without MHA rows, with fewer than two pairs, and on rows
    that do not belong together: of several experiments, corpora, machines, budgets or head counts, or two of one seed.
    """
    rows = rows[rows["status"] == "ok"]
    for column in ("experiment", "corpus", "machine", "tokens", "shape.n_heads"):
        if rows[column].nunique() != 1:
            raise InputError(f"quality rows of one {column} are needed, got {sorted(rows[column].unique())}")
    rows = rows.astype({"shape.n_heads": int, "shape.n_kv_heads": int})  # floats beside rows that have no shape
    heads = int(rows["shape.n_heads"].iloc[0])
    if rows.duplicated(["seed", "shape.n_kv_heads", "arm"]).any():
        raise InputError("quality rows of one run are needed: a seed of one arm is there twice")
    loss = rows.pivot(index="seed", columns=["shape.n_kv_heads", "arm"], values="bits_per_byte")
    if (heads, "plain") not in loss:
        raise InputError("no finished MHA run to compare with; let the sweep go on")
    found = []
    columns: list[Any] = loss.columns.to_list()
    arms = [column for column in columns if column[0] != heads]
    for g, arm in sorted(arms, key=lambda column: (-column[0], column[1] == "matched")):
        difference = (loss[g, arm] - loss[heads, "plain"]).dropna()
        n = len(difference)
        if n < 2:
            raise InputError(f"{variant_name(heads, g)} {arm} has {n} seeds paired with MHA, at least 2 are needed")
        mean, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(n)
        half = student_t(0.975, n - 1) * error
        needed = student_t(1 - 0.025 / len(arms), n - 1) * error
        verdict = "not resolvable at this scale" if abs(mean) <= needed else "worse" if mean > 0 else "better"
        smallest = needed + student_t(0.8, n - 1) * error
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
