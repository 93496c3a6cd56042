"""What small training runs can show: differences from MHA, paired by seed, with what they cannot show said.

Each arm has its own 95 % interval. A verdict answers for all arms of a sweep together: of six intervals at 95 % one in
four sweeps would have some exclude zero by chance, the likelier the fewer the seeds, so "better" and "worse" need the
interval at 1 - 5 %/arms (Bonferroni) to exclude it. "Equal within ±x" needs that interval, which holds zero and reaches
to x, to lie within ``EQUAL`` of MHA's loss. Else "not resolvable at this scale", beside the smallest effect that would
likely have had a verdict. From rows alone: nothing here imports torch.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnlab.errors import InputError
from attnlab.shapes import variant_name

if TYPE_CHECKING:  # pandas costs 0.3 s to import; only whoever has rows needs it
    import pandas

EQUAL = 0.01  # of MHA's loss: published effects at small scale are 0.1 to 1 % of it
UNRESOLVED = "not resolvable at this scale"


@dataclass(frozen=True)
class Effect:
    """Bits per byte of one arm minus MHA's, paired by seed: ``differences`` in order of seed, and their ``mean``."""

    n_kv_heads: int
    variant: str
    arm: str
    seeds: int
    mean: float
    half_width: float
    corrected: float
    bootstrap: tuple[float, float]
    smallest: float
    verdict: str
    differences: tuple[float, ...]


@dataclass(frozen=True)
class Spread:
    """Of one measure of loss (``column``) the standard deviation over seeds, of a difference between arms that share no
    seed, and of one paired by seed; bits per byte, pooled over the arms of a sweep."""

    column: str
    seeds: float
    unpaired: float
    paired: float


def finished(rows: "pandas.DataFrame", experiment: str, machine: str | None = None) -> "pandas.DataFrame":
    """The finished rows of ``experiment`` in the newest run (of ``machine``) that has any, sizes as int. Raises
    ``InputError`` if there are none."""
    found = rows[(rows.get("experiment", rows["kind"]) == experiment) & (rows["status"] == "ok")]
    found = found if machine is None else found[found["machine"] == machine]
    if found.empty:
        said = f" of {machine}" if machine else ""
        raise InputError(f"no {experiment} rows{said} are finished; let their sweep go on")
    found = found[found["run"] == found["run"].max()]
    # Beside rows without a shape pandas holds sizes as floats; beside conversions', whose tokens are words, as objects.
    return found.infer_objects().astype(dict.fromkeys(("shape.n_kv_heads", "shape.n_heads", "seed"), int))


def effects(rows: "pandas.DataFrame", experiment: str | None = None) -> list[Effect]:
    """One ``Effect`` per (G, arm) of finished quality rows of one ``experiment`` (None: they hold but one), G
    descending; arms of fewer than two pairs are left out, and named by ``too_few``.

    ``half_width``: of the arm's own 95 % interval, Student's t over the paired differences. ``bootstrap``: the same by
    percentiles of resampled pairs, a check on t's normal differences that no verdict uses: from few seeds it is too
    narrow (of three it is their range, which holds the true mean in 75 % of cases; of five, in about 83 %).

    ``corrected``: half width at 1 - 5 %/m, m arms in the rows. These intervals hold all m true differences at once in
    95 % of sweeps, so whatever is read off them needs no further correction: direction where zero is outside (also
    where the whole interval is smaller than ``EQUAL``: a small effect is one), else equality within the interval's
    reach. For equality alone two one-sided tests would allow 1 - 10 %/m: "equal" is the harder to get.
    ``smallest``: the true difference that would have been "better" or "worse" with about 80 % probability (for few
    seeds less: simulated, 70 % with three and 74 % with five),
    (t(1 - 0.025/m) + t(0.8)) · sd / √n.

    Raises ``InputError`` without MHA rows, without any arm of two pairs, and on rows that do not belong together: of
    several experiments, corpora, machines, budgets or head counts, or two of one seed.
    """
    import numpy

    heads, base, arms = _paired(rows, experiment, "bits_per_byte")
    margin, found = EQUAL * float(base.mean()), []
    for (g, arm), difference in arms.items():
        n = len(difference)
        if n < 2:
            continue
        mean, half = float(difference.mean()), half_width(difference)
        needed = half_width(difference, 1 - 0.025 / len(arms))
        resampled = numpy.random.default_rng(0).choice(difference, (2_000, n)).mean(axis=1)
        low, high = map(float, numpy.quantile(resampled, (0.025, 0.975)))
        smallest = needed + half_width(difference, 0.8)
        numbers = (n, mean, half, needed, (low, high), smallest, verdict(mean, needed, margin))
        found.append(Effect(g, variant_name(heads, g), arm, *numbers, tuple(difference)))
    if not found:
        got = ", ".join(too_few(rows, experiment)) or "none"
        raise InputError(f"at least 2 seeds paired with MHA are needed, got {got}")
    return found


def verdict(mean: float, half_width: float, margin: float) -> str:
    """Of a difference whose interval is already corrected for everything judged beside it; above 0 is worse."""
    if abs(mean) > half_width:
        return "worse" if mean > 0 else "better"
    reach = abs(mean) + half_width
    return f"equal within ±{math.ceil(1e4 * reach) / 1e4:.4f}" if reach <= margin else UNRESOLVED


def too_few(rows: "pandas.DataFrame", experiment: str | None = None) -> list[str]:
    """The arms that ``effects`` leaves out, each with its number of pairs: "MQA matched (1)"."""
    heads, _, arms = _paired(rows, experiment, "bits_per_byte")
    return [f"{variant_name(heads, g)} {arm} ({len(pairs)})" for (g, arm), pairs in arms.items() if len(pairs) < 2]


def spreads(rows: "pandas.DataFrame", experiment: str | None = None) -> list[Spread]:
    """What pairing, averaging the weights and the whole validation text each buy: ``Spread`` of ``bits_per_byte``, of
    ``bits_per_byte_raw`` (last weights) and of the end of ``curve`` (a sample of the text), as far as rows have them.
    Raises ``InputError`` as ``effects`` does."""
    rows, found = rows[_chosen(rows, experiment)], []
    if "curve" in rows:
        rows = rows.assign(sample=rows["curve"].map(lambda curve: curve[-1][1]))
    for column in ("bits_per_byte", "bits_per_byte_raw", "sample"):
        if column in rows and rows[column].notna().all():
            _, base, arms = _paired(rows, experiment, column)
            apart = _pooled([base, *(base.add(pairs).dropna() for pairs in arms.values())])
            found.append(Spread(column, apart, math.sqrt(2) * apart, _pooled(list(arms.values()))))
    return found


def _pooled(groups: "Sequence[pandas.Series[float]]") -> float:
    """The standard deviation within ``groups``."""
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
    return math.sqrt(squares / max(1, sum(max(0, len(group) - 1) for group in groups)))


def _chosen(rows: "pandas.DataFrame", experiment: str | None) -> "pandas.Series[bool]":
    return (rows["status"] == "ok") & (True if experiment is None else rows["experiment"] == experiment)


def _paired(
    rows: "pandas.DataFrame", experiment: str | None, column: str
) -> "tuple[int, pandas.Series[float], dict[tuple[int, str], pandas.Series[float]]]":
    """H, MHA's ``column`` by seed, and each arm's minus MHA's, of the seeds that both have."""
    rows = rows[_chosen(rows, experiment)]
    for same in ("experiment", "corpus", "machine", "tokens", "shape.n_heads"):
        if rows[same].nunique() != 1:
            raise InputError(f"quality rows of one {same} are needed, got {sorted(rows[same].dropna().unique())}")
    rows = rows.astype({"shape.n_heads": int, "shape.n_kv_heads": int})  # floats beside rows that have no shape
    heads = int(rows["shape.n_heads"].iloc[0])
    if rows.duplicated(["seed", "shape.n_kv_heads", "arm"]).any():
        raise InputError("quality rows of one run and size are needed: a seed of one arm is there twice")
    loss = rows.pivot(index="seed", columns=["shape.n_kv_heads", "arm"], values=column)
    if (heads, "plain") not in loss:
        raise InputError("no finished MHA run to compare with; let the sweep go on")
    base, columns = loss[heads, "plain"].dropna(), list[Any](loss.columns)
    arms = sorted((name for name in columns if name[0] != heads), key=lambda name: (-name[0], name[1] == "matched"))
    return heads, base, {name: (loss[name] - base).dropna() for name in arms}


def half_width(values: "Sequence[float] | pandas.Series[float]", probability: float = 0.975) -> float:
    """Of the interval of the mean of ``values`` that leaves out 1 - ``probability`` at either side."""
    import numpy

    return student_t(probability, len(values) - 1) * float(numpy.std(values, ddof=1)) / math.sqrt(len(values))


@functools.cache
def student_t(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution. With t = √ν · tan θ its density over θ is cos(θ)^(ν - 1), here summed in
    small steps."""
    import numpy

    edges = numpy.linspace(-math.pi / 2, math.pi / 2, 200_001)
    below = numpy.append(0, numpy.cumsum(numpy.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1)))
    return math.sqrt(freedom) * math.tan(float(numpy.interp(probability, below / below[-1], edges)))
