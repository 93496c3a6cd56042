"""The law of size and what a variant is worth, held against planted laws and against intervals counted over many."""

import math
from typing import Any

import numpy
import pandas
import pytest

from attnlab.effects import student_t
from attnlab.errors import InputError
from attnlab.scaling import power_law, scale_rows, scale_worth

SIZES = {211_000: (2, 67), 431_000: (3, 97), 1_499_000: (5, 193)}  # MHA's parameters -> layers, width
OFFSETS = {6: 0.0, 2: 0.004, 1: 0.011}  # logarithms of a variant's loss over MHA's, by G of H = 6


def scale_frame(
    random: numpy.random.Generator | None = None, seeds: int = 3, own: float = 0.0, shared: float = 0.0, b: float = 0.13
) -> pandas.DataFrame:
    """Losses 7 · N^-b · exp(offset), with noise in the logarithm that variants share and noise of their own."""
    random, rows = random or numpy.random.default_rng(0), []
    for seed in range(seeds):
        for size, (layers, dim) in SIZES.items():
            luck = shared * random.normal()
            for g, offset in OFFSETS.items():
                log = math.log(7) - b * math.log(size) + offset + luck + own * random.normal()
                common = {"experiment": "scale", "status": "ok", "budget": "fixed", "arm": "plain", "tokens": 5000}
                shape = {"shape.n_layers": layers, "shape.dim": dim, "shape.n_heads": 6, "shape.n_kv_heads": g}
                more = {"seed": seed, "n_params": size * (1 - 0.01 * (6 - g)), "bits_per_byte": math.exp(log)}
                rows.append(common | shape | more)
    return pandas.DataFrame(rows)


def test_a_planted_law_comes_back() -> None:
    """A fit of losses instead of their logarithms weighs small models more, and has another b."""
    sizes = [211e3, 431e3, 811e3, 1499e3]
    law = power_law(sizes, [7.3 * size**-0.127 for size in sizes])
    assert (law.a, law.b) == pytest.approx((7.3, 0.127))
    assert law.error == pytest.approx(0, abs=1e-8)


def test_the_error_of_b_holds_what_it_promises() -> None:
    """With n sizes b has n - 2 degrees of freedom: taken as known, or with n of them, the error of four is far too
    small."""
    random, sizes = numpy.random.default_rng(5), numpy.array([2e5, 4e5, 8e5, 16e5])
    t, held = student_t(0.975, 2), 0
    for _ in range(1000):
        law = power_law(sizes, 7 * sizes**-0.13 * numpy.exp(0.01 * random.normal(size=4)))
        held += abs(law.b - 0.13) <= t * law.error
    assert 930 < held < 970


def test_a_variant_is_worth_the_parameters_that_bring_mha_to_its_loss() -> None:
    """Without noise the planted numbers, exactly: the sign turned round, or a variant's own parameters taken for its
    size, would say that a worse variant is worth more."""
    law, worths = scale_worth(scale_frame(), "fixed")
    assert (law.a, law.b) == pytest.approx((7, 0.13))
    assert [(worth.variant, worth.arm) for worth in worths] == [("GQA-2", "plain"), ("MQA", "plain")]
    for worth, g in zip(worths, (2, 1), strict=True):
        assert worth.offset == pytest.approx(math.exp(OFFSETS[g]) - 1)
        assert worth.params == pytest.approx(-0.01 * (6 - g))
        assert worth.worth < 0
        for size in SIZES:
            assert law.a * (size * (1 + worth.worth)) ** -law.b == pytest.approx(7 * size**-0.13 * math.exp(OFFSETS[g]))
        assert worth.worth_interval == pytest.approx((worth.worth, worth.worth))


def test_an_example_by_hand() -> None:
    """Two seeds of which MQA is 1 % and 3 % worse at every size: the mean in logarithms, t with one degree of freedom;
    sizes counted as replicates would give five."""
    rows = scale_frame(seeds=2)
    mqa = rows["shape.n_kv_heads"] == 1
    rows.loc[mqa, "bits_per_byte"] *= math.exp(-OFFSETS[1]) * rows["seed"].map({0: 1.01, 1: 1.03})
    _, (_, worth) = scale_worth(rows, "fixed")
    logs = math.log(1.01), math.log(1.03)
    mean, half = sum(logs) / 2, 12.7062 * (logs[1] - logs[0]) / 2  # t · sd / √2, sd being the distance over √2
    assert worth.offset == pytest.approx(math.exp(mean) - 1)
    assert worth.offset_interval == pytest.approx((math.exp(mean - half) - 1, math.exp(mean + half) - 1), rel=1e-4)
    ends = math.exp(-(mean + half) / 0.13) - 1, math.exp(-(mean - half) / 0.13) - 1
    assert worth.worth_interval == pytest.approx(ends, rel=1e-4)


@pytest.mark.slow
def test_the_interval_of_a_worth_holds_what_it_promises() -> None:
    """Luck that all variants of a seed share must cancel, and what is left must be held in 95 % of cases."""
    random, held, true, widths = numpy.random.default_rng(9), 0, math.expm1(-OFFSETS[1] / 0.13), []
    for _ in range(400):
        _, (_, mqa) = scale_worth(scale_frame(random, own=0.001, shared=0.01), "fixed")
        held += mqa.worth_interval[0] <= true <= mqa.worth_interval[1]
        widths.append(mqa.offset_interval[1] - mqa.offset_interval[0])
    assert 365 < held < 394  # 95 % of 400 is 380, a standard error 4.4
    assert numpy.median(widths) < 0.005  # sd √2 · 0.001 / √(3 · 3) · 2 · 4.3 = 0.004; unpaired it would be 0.04


def test_only_what_is_whole_counts() -> None:
    """A size whose MQA is still to come, taken with the variants it has, would bend the law and the offsets."""
    rows, partial = scale_frame(seeds=3), scale_frame(seeds=4)
    last = partial["seed"] == 3
    partial.loc[last, "bits_per_byte"] *= partial["shape.dim"]
    partial.loc[last & (partial["shape.n_kv_heads"] == 1), "status"] = "diverged"
    assert scale_worth(partial, "fixed") == scale_worth(rows, "fixed")
    rows.loc[0, "budget"] = "per-parameter"
    assert len(scale_rows(rows, "per-parameter")) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.assign(tokens=rows["tokens"] - rows.index % 2), "must have seen the same number of tokens"),
        (lambda rows: rows.assign(bits_per_byte=1 / rows["bits_per_byte"]), "loss does not fall with size here"),
        (lambda rows: rows[rows["shape.n_layers"] < 5], "needs 3 sizes, got 2"),
        (lambda rows: rows[rows["seed"] == 0], "2 seeds with 2 whole sizes each are needed for an interval, got 1"),
        (lambda rows: pandas.concat([rows, rows[:1]]), "a size of one seed is there twice"),
        (lambda rows: rows.assign(budget="fixes"), "unknown budget 'fixed'; did you mean fixes"),
    ],
    ids=["tokens", "rising", "sizes", "seeds", "twice", "budget"],
)
def test_what_has_no_answer_is_refused(change: Any, message: str) -> None:
    """Arms of other budgets, or a law that rises, give a worth that looks like any other."""
    with pytest.raises(InputError, match=message):
        scale_worth(change(scale_frame()), "fixed")
