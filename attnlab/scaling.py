"""Scale against variant: how loss falls with size, and how many parameters a variant's difference is worth.

loss = a · N^-b, a straight line in logarithms. Variants share b and differ in a, so a variant's loss is MHA's times one
factor, 1 + offset, at every size; and MHA with 1 + worth times the parameters would have that loss,
(1 + worth)^-b = 1 + offset. A floor that no size gets below cannot be told from a smaller b over one decade of sizes,
so nothing here says what larger models would do. From rows alone, without torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnlab.effects import half_width
from attnlab.errors import InputError, check_choice
from attnlab.shapes import variant_name

if TYPE_CHECKING:
    import pandas

SIZE = ["shape.n_layers", "shape.dim"]  # what names a size, whatever a variant's own number of parameters


@dataclass(frozen=True)
class PowerLaw:
    """loss = ``a`` · N^-``b``; ``error`` is the standard error of b."""

    a: float
    b: float
    error: float


@dataclass(frozen=True)
class Worth:
    """One variant beside MHA of the same layers and width, as shares (0.01 is 1 %): its own ``params`` and its loss
    (``offset``), each over MHA's less 1, and ``worth``; the last two each with its own 95 % interval (low, high)."""

    variant: str
    arm: str
    params: float
    offset: float
    offset_interval: tuple[float, float]
    worth: float
    worth_interval: tuple[float, float]


def power_law(sizes: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Least squares in logarithms. Give one loss per size, the mean over seeds: how far a size lies off the line is
    shared by its seeds, which would make b look surer than it is. Raises ``InputError`` for fewer than three sizes."""
    import numpy

    if len(set(sizes)) < 3:
        raise InputError(f"a power law with its error needs 3 sizes, got {len(set(sizes))}")
    (slope, start), covariance = numpy.polyfit(numpy.log(sizes), numpy.log(losses), 1, cov=True)
    return PowerLaw(math.exp(start), -float(slope), math.sqrt(covariance[0, 0]))


def scale_rows(rows: "pandas.DataFrame", budget: str) -> "pandas.DataFrame":
    """The finished rows of experiment "scale" with one ``budget``, G descending and MHA's ``size`` ascending, and the
    columns ``variant``, ``size`` (parameters of MHA of these layers and width) and ``log`` (of the loss). Raises
    ``InputError`` for an unknown budget, two rows of one seed, and variants of one size that saw different numbers of
    tokens."""
    import numpy

    rows = rows[(rows["experiment"] == "scale") & (rows["status"] == "ok")]
    rows = rows[rows["budget"] == check_choice("budget", budget, sorted(rows["budget"].unique()))]
    rows = rows.assign(
        variant=list(map(variant_name, rows["shape.n_heads"].astype(int), rows["shape.n_kv_heads"].astype(int))),
        log=numpy.log(rows["bits_per_byte"].astype(float)),
    )
    mha = rows[rows["variant"] == "MHA"].drop_duplicates(SIZE)[[*SIZE, "n_params"]]
    rows = rows.merge(mha.rename(columns={"n_params": "size"}), on=SIZE)
    rows = rows.sort_values(["shape.n_kv_heads", "size"], ascending=[False, True], kind="stable")
    if rows.duplicated(["seed", "size", "variant", "arm"]).any():
        raise InputError("scale rows of one run are needed: a size of one seed is there twice")
    if (rows.groupby("size")["tokens"].nunique() > 1).any():
        raise InputError("variants of one size must have seen the same number of tokens to be compared")
    return rows


def scale_worth(rows: "pandas.DataFrame", budget: str) -> tuple[PowerLaw, list[Worth]]:
    """MHA's law over its own parameter counts, with the b of all variants, and each other variant's ``Worth``, from the
    rows that ``scale_rows`` takes. Where tokens grow with size a worth is one of both together.

    Only what is whole counts: a size of one seed whose variants are all there. Seeds are the replicates: each gives its
    own b and offsets over its sizes, and intervals are Student's t over those, since runs of one seed share their data
    order at every size. ``worth`` is averaged as log(1 + worth) = -log(1 + offset) / b. Raises ``InputError`` for fewer
    than three whole sizes or two seeds of two sizes, and where loss does not fall with size.
    """
    import numpy

    rows = scale_rows(rows, budget)
    logs = rows.pivot_table("log", ["size", "seed"], ["variant", "arm"], sort=False).dropna()
    by_size = logs.groupby("size").mean()
    law = power_law(list(by_size.index), list(numpy.exp(by_size.mean(axis=1))))
    by_seed = [seed for _, seed in logs.groupby("seed") if len(seed) > 1]
    if len(by_seed) < 2:
        raise InputError(f"2 seeds with 2 whole sizes each are needed for an interval, got {len(by_seed)}")
    sizes = [numpy.log(seed.index.get_level_values("size").to_numpy(float)) for seed in by_seed]
    pairs = zip(sizes, by_seed, strict=True)
    slopes = numpy.array([-numpy.polyfit(size, seed.mean(axis=1), 1)[0] for size, seed in pairs])
    if min(slopes.min(), law.b) <= 0:
        raise InputError("loss does not fall with size here, so no number of parameters makes up for a variant")

    def interval(values: Any) -> tuple[float, tuple[float, float]]:
        mean, half = values.mean(), half_width(values)
        return math.expm1(mean), (math.expm1(mean - half), math.expm1(mean + half))

    params, found = (rows["n_params"] / rows["size"] - 1).groupby([rows["variant"], rows["arm"]]).mean(), []
    for variant, arm in [name for name in list[Any](logs.columns) if name[0] != "MHA"]:
        offsets = numpy.array([(seed[variant, arm] - seed["MHA", "plain"]).mean() for seed in by_seed])
        own = float(params[variant, arm])
        found.append(Worth(variant, arm, own, *interval(offsets), *interval(-offsets / slopes)))
    middle = float(numpy.log(by_size.index.to_numpy(float)).mean())
    return PowerLaw(math.exp(by_size["MHA", "plain"].mean() + law.b * middle), law.b, law.error), found
