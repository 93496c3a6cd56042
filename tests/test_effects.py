"""The statistics of small training runs, held against printed tables and against an example worked by hand."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest

from attnlab.effects import effects, student_t
from attnlab.errors import InputError

MHA = [2.00, 2.10, 2.30]  # of seeds 0, 1, 2
DIFFERENCES = {
    (2, "plain"): [0.02, 0.04, 0.06],  # mean 0.04, standard deviation 0.02
    (2, "matched"): [0.12, 0.13, 0.14],
    (1, "plain"): [-0.11, -0.13, -0.12],
}


def quality_rows(differences: dict[tuple[int, str], list[float]], **more: Any) -> pandas.DataFrame:
    common = {"status": "ok", "experiment": "e", "corpus": "c", "machine": "m", "tokens": 7, "shape.n_heads": 6} | more
    losses = {(6, "plain"): MHA}
    for arm, values in differences.items():
        losses[arm] = [mha + difference for mha, difference in zip(MHA, values, strict=False)]
    return pandas.DataFrame(
        [
            common | {"shape.n_kv_heads": g, "arm": arm, "seed": seed, "bits_per_byte": loss}
            for (g, arm), seeds in losses.items()
            for seed, loss in enumerate(seeds)
        ]
    )


@pytest.mark.parametrize(
    ("probability", "freedom", "printed"),
    [
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.8, 2, 1.061),
        (0.975, 1, 12.706),
        (0.975, 30, 2.042),
        (0.95, 7, 1.895),
        (1 - 0.025 / 6, 2, 10.886),
    ],
)
def test_student_t_is_the_printed_table(probability: float, freedom: int, printed: float) -> None:
    """A normal quantile (1.96) in place of t with 2 degrees of freedom halves the interval of three seeds."""
    assert student_t(probability, freedom) == pytest.approx(printed, abs=5.01e-4)


def test_an_example_by_hand() -> None:
    """Three differences 0.02, 0.04, 0.06: an unpaired spread, or n for n - 1, would give another interval."""
    plain, matched, mqa = effects(quality_rows(DIFFERENCES))
    assert (plain.variant, plain.arm, plain.n_kv_heads, plain.seeds) == ("GQA-2", "plain", 2, 3)
    assert plain.differences == pytest.approx((0.02, 0.04, 0.06))
    assert plain.mean == pytest.approx(0.04)
    assert plain.half_width == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)  # 0.0497
    # three arms: t(1 - 0.025/3) with 2 degrees of freedom is 7.6488
    assert plain.smallest == pytest.approx((7.6488 + 1.0607) * 0.02 / math.sqrt(3), rel=1e-4)  # 0.1006
    assert plain.verdict == "not resolvable at this scale"
    assert (matched.arm, matched.verdict) == ("matched", "worse")
    assert matched.half_width == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)
    assert (mqa.variant, mqa.mean, mqa.verdict) == ("MQA", pytest.approx(-0.12), "better")


def test_one_lucky_arm_among_several_has_no_verdict() -> None:
    """Of six intervals at 95 % some exclude zero by chance in one sweep of four, above all where three seeds happen to
    lie close together: the first sweep of this project had such an arm."""
    lucky = {(1, "plain"): [0.0055, 0.0075, 0.0102]}
    others = {(g, arm): [-0.02, 0.0, 0.02] for g in (3, 2) for arm in ("plain", "matched")}
    (alone,) = effects(quality_rows(lucky))
    among = effects(quality_rows(lucky | others))[-1]
    assert abs(alone.mean) > alone.half_width == pytest.approx(among.half_width)
    assert (alone.verdict, among.verdict) == ("worse", "not resolvable at this scale")


def test_seeds_are_paired_by_number_and_not_by_order() -> None:
    """Sweeps finish out of order: pairing by position compares one seed's luck with another's."""
    shuffled = quality_rows(DIFFERENCES).sample(frac=1, random_state=5)
    assert effects(shuffled) == effects(quality_rows(DIFFERENCES))


def test_a_diverged_run_is_left_out_with_its_pair() -> None:
    """A diverged seed's loss, or its MHA partner alone, must not enter a mean."""
    rows = quality_rows(DIFFERENCES)
    rows.loc[(rows["arm"] == "plain") & (rows["shape.n_kv_heads"] == 2) & (rows["seed"] == 2), "status"] = "diverged"
    plain = effects(rows)[0]
    assert (plain.seeds, plain.mean) == (2, pytest.approx(0.03))
    assert plain.half_width == pytest.approx(12.7062 * 0.01, rel=1e-4)  # sd 0.01414 over sqrt 2


@pytest.mark.parametrize("column", ["experiment", "corpus", "machine", "tokens", "shape.n_heads"])
def test_rows_that_do_not_belong_together_are_refused(column: str) -> None:
    """Averaging over two corpora or two budgets gives a number that looks like any other."""
    rows = quality_rows(DIFFERENCES)
    rows.loc[rows.index[0], column] = 3 if column in ("tokens", "shape.n_heads") else "other"
    with pytest.raises(InputError, match=f"rows of one {column} are needed, got"):
        effects(rows)


def test_what_is_too_little_is_refused() -> None:
    """A half-finished sweep must say what it lacks, not end in NaN intervals."""
    rows = quality_rows(DIFFERENCES)
    with pytest.raises(InputError, match="no finished MHA run to compare with"):
        effects(rows[rows["shape.n_kv_heads"] < 6])
    with pytest.raises(InputError, match="MQA plain has 1 seeds paired with MHA, at least 2 are needed"):
        effects(quality_rows({(1, "plain"): [0.5]}))
    with pytest.raises(InputError, match="a seed of one arm is there twice"):
        effects(pandas.concat([rows, rows]))
    with pytest.raises(InputError, match="one experiment are needed, got \\[\\]"):
        effects(rows[rows["status"] == "oom"])


def test_statistics_come_without_torch() -> None:
    """Figures and tables import them; torch would cost a second and 200 MB for a mean of three numbers."""
    root = Path(__file__).parent.parent
    code = "import sys, attnlab.effects; assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
