"""Tables of training runs, against rows small enough to work out by hand."""

import math
from typing import Any

import pandas
import pytest
from rich.table import Table

from attnlab.errors import InputError
from attnlab.trained import at_best_rate, context, interval, noise, quality, quality_tables, recall, scale, uptraining


def trained(g: int, losses: list[float], experiment: str = "g-sweep", **more: Any) -> list[dict[str, Any]]:
    """A row per loss, of seeds 0, 1, …, for G of H = 6."""
    common = {"kind": "quality", "status": "ok", "corpus": "c", "machine": "m", "tokens": 7000, "run": "r1"}
    shape = {"shape.n_layers": 2, "shape.dim": 67, "shape.n_heads": 6, "shape.n_kv_heads": g, "shape.head_dim": 11}
    own = {"experiment": experiment, "arm": "plain", "n_params": 1000 * g}
    return [
        common | shape | own | {"seed": seed, "key": f"{g}-{seed}", "bits_per_byte": loss} | more
        for seed, loss in enumerate(losses)
    ]


def cells(table: Table, *keys: int) -> dict[Any, tuple[str, ...]]:
    """The cells of each line, under those of the columns ``keys``."""
    found = list(zip(*(column._cells for column in table.columns), strict=True))
    return {tuple(line[key] for key in keys) if len(keys) > 1 else line[keys[0]]: line for line in found}


SWEEP = (
    trained(6, [2.0, 2.1, 2.3])
    + trained(2, [2.02, 2.14, 2.36])  # + 0.02, 0.04, 0.06
    + trained(2, [2.12, 2.23, 2.44], arm="matched", n_params=6001)
)


def test_quality_shows_differences_with_their_intervals() -> None:
    """A difference without its interval, or beside another arm's parameters, is a claim nobody can weigh."""
    table = quality(pandas.DataFrame(SWEEP))
    assert table.title == "bits per byte after 7,000 tokens: MHA's, and the others' minus MHA's"
    found = cells(table, 0, 1)
    # two arms: t(1 - 0.0125) with 2 degrees of freedom is 6.2053
    visible = f"{(6.2053 + 1.0607) * 0.02 / math.sqrt(3):.4f}"
    assert found["GQA-2", "plain"][2:] == ("2,000", "3", "+0.0400 ± 0.0497", visible, "not resolvable at this scale")
    assert found["GQA-2", "matched"][2:5] == ("6,001", "3", "+0.1300 ± 0.0248") and "worse" in found["GQA-2", "matched"]
    assert found["MHA", "plain"][2:5] == ("6,000", "3", "2.1333 (sd 0.1528)")
    assert "within 1% of MHA's loss, 0.0213" in str(table.caption)
    assert "1 of 2 intervals exclude zero by themselves, 2 by a bootstrap" in str(table.caption)


def test_quality_says_what_is_missing() -> None:
    """A partial sweep, or one that lost runs, must not look like a whole one."""
    rows = SWEEP + trained(1, [2.5]) + trained(3, [9.0], status="diverged") + trained(3, [1.0], "other")
    caption = str(quality(pandas.DataFrame(rows), "g-sweep").caption)
    assert "too few pairs yet: MQA plain (1); 1 runs did not end well" in caption
    assert "too few" not in str(quality(pandas.DataFrame(SWEEP)).caption)


def test_a_sweep_that_cannot_be_judged_is_one_clear_error() -> None:
    """Every run diverged, or MHA is still to come: the table's title must not fail first."""
    with pytest.raises(InputError, match="quality rows of one experiment are needed"):
        quality(pandas.DataFrame(trained(6, [2.0, 2.1], status="diverged")))
    with pytest.raises(InputError, match="g-sweep: no finished MHA run to compare with"):
        quality_tables(pandas.DataFrame(trained(2, [2.0, 2.1])))
    with pytest.raises(InputError, match="no quality rows"):
        quality_tables(pandas.DataFrame(trained(2, [2.0], kind="decode")))


def test_noise_says_how_many_seeds_pairing_saves() -> None:
    """Variances add and not deviations: half the spread is worth four times the seeds."""
    rows = trained(6, [2.0, 2.2, 2.4]) + trained(2, [2.0, 2.3, 2.4])  # differences 0, 0.1, 0
    (line,) = cells(noise(pandas.DataFrame(rows)), 0).values()
    seeds = math.sqrt((0.08 + 0.0866667) / 4)  # squares about each mean: 0.2² + 0.2²; 0.2333² + 0.0667² + 0.1667²
    paired = math.sqrt(2 * (0.1 / 3) ** 2 + (0.2 / 3) ** 2) / math.sqrt(2)
    saved = f"{2 * seeds**2 / paired**2:.1f}×"  # 25.0
    assert line == ("whole text, averaged weights", f"{seeds:.4f}", f"{math.sqrt(2) * seeds:.4f}", "0.0577", saved)


# --- uptraining -----------------------------------------------------------------------------------------------------


def uptrained(g: int, arm: str, alpha: float, losses: list[float], **more: Any) -> list[dict[str, Any]]:
    return trained(g, losses, "uptraining", arm=arm, alpha=alpha, parent="6-0", **more)


def test_uptraining_is_held_against_mha_with_the_same_steps_and_order() -> None:
    """Against the MHA it came from, a converted model gets the extra steps for free; against another order of the data
    it gets that order's luck."""
    rows = uptrained(6, "continued", 0, [1.9]) + uptrained(6, "continued", 0.05, [1.80, 1.60, 1.70])
    rows += uptrained(2, "mean", 0, [4.0]) + uptrained(2, "mean", 0.05, [1.92, 1.74, 1.86])  # + 0.12, 0.14, 0.16
    rows += uptrained(2, "random", 0, [5.0, 5.1, 5.2]) + uptrained(1, "mean", 0.05, [2.0])
    table = uptraining(pandas.DataFrame(rows).sample(frac=1, random_state=3))
    assert [column.header for column in table.columns] == ["variant", "α = 0", "α = 0.05"]
    found = cells(table, 0)
    assert next(iter(found)) == "MHA continued"
    assert found["MHA continued"][1:] == ("1.9000", "1.7000 ± 0.2484")
    assert found["GQA-2 mean"][1:] == ("+2.1000", "+0.1400 ± 0.0497")
    assert found["GQA-2 random"][1:] == ("+3.2000", "–")  # before any step there is no order of the data
    assert found["MQA mean"][1:] == ("–", "+0.2000")
    assert "from scratch" not in str(table.caption)


def test_from_scratch_stands_beside_uptraining_where_it_is_the_same_model() -> None:
    """A sweep of another model is no reference for this one."""
    rows = uptrained(6, "continued", 0.05, [1.8, 1.6]) + uptrained(2, "mean", 0.05, [1.9, 1.8])
    caption = str(uptraining(pandas.DataFrame(SWEEP + rows)).caption)
    assert caption.endswith("from scratch, plain, averaged weights, minus MHA: GQA-2 +0.0400 ± 0.0497")
    begun = str(uptraining(pandas.DataFrame(SWEEP[:1] + rows)).caption)
    assert begun.endswith("from scratch: at least 2 seeds paired with MHA are needed, got none")
    other = [row | {"key": f"other {index}"} for index, row in enumerate(SWEEP)]
    assert "from scratch" not in str(uptraining(pandas.DataFrame(other + rows)).caption)
    with pytest.raises(InputError, match="no finished run of MHA continued to compare with"):
        uptraining(pandas.DataFrame(uptrained(2, "mean", 0.05, [1.9, 1.8])))
    with pytest.raises(InputError, match="rows of one run are needed: some share parent, seed, variant, arm, alpha"):
        uptraining(pandas.DataFrame(rows + rows))


# --- recall ---------------------------------------------------------------------------------------------------------


def recalled(g: int, rate: float, accuracy: list[float], pairs: int = 4, **more: Any) -> list[dict[str, Any]]:
    common = {"relations": 1, "pairs": pairs, "context": 64, "peak_rate": rate}
    return [
        row | common | {"accuracy": value, "bits_per_byte": math.nan} | more
        for row, value in zip(trained(g, accuracy, "recall"), accuracy, strict=True)
    ]


def test_recall_takes_the_rate_that_was_chosen_and_leaves_the_choice_out() -> None:
    """The mean over all rates blames a variant for rates nobody would use; the best of all runs takes luck for a rate;
    and the seed that chose has been the best of several, which three seeds need not carry along."""
    chosen = recalled(1, 3e-3, [0.9, 0.5, 0.6, 0.7])
    tried = recalled(1, 1e-3, [0.2]) + recalled(1, 1e-2, [0.95])  # better still, but not what the seeds were spent on
    assert list(at_best_rate(pandas.DataFrame(tried + chosen))) == [0.5, 0.6, 0.7]
    assert list(at_best_rate(pandas.DataFrame(tried + chosen[:3]))) == [0.9, 0.5, 0.6]  # two others are too few
    assert list(at_best_rate(pandas.DataFrame(tried))) == [0.95]
    both = recalled(1, 1e-3, [0.4, 0.9, 0.9]) + recalled(1, 3e-3, [0.5, 0.1, 0.1])  # as many seeds: the first chooses
    assert list(at_best_rate(pandas.DataFrame(both).sample(frac=1, random_state=1))) == [0.5, 0.1, 0.1]


def test_recall_compares_the_ends_in_each_setting() -> None:
    """Settings judged one by one find a difference by chance; and nothing separating is a result that must be said."""
    rows = recalled(6, 1e-3, [1.0, 1.0, 0.998]) + recalled(2, 1e-3, [0.99]) + recalled(1, 1e-3, [1.0, 0.999, 0.998])
    rows += recalled(6, 1e-3, [0.9, 0.8, 0.7], 8) + recalled(1, 1e-3, [0.5, 0.39, 0.31], 8)
    rows += recalled(6, 1e-3, [0.9, 0.8, 0.7], 16) + recalled(1, 1e-3, [0.88, 0.79, 0.69], 16)
    table = recall(pandas.DataFrame(rows))
    headers = [column.header for column in table.columns]
    assert headers == ["relations", "pairs", "length", "D", "MHA", "GQA-2", "MQA", "MHA - MQA", "verdict"]
    four, eight, sixteen = (cells(table, 1)[pairs] for pairs in ("4", "8", "16"))
    assert four[3:7] == ("11", "0.999 ± 0.003", "0.990", "0.999 ± 0.002")
    # three settings: t(1 - 0.025/3) with 2 degrees of freedom is 7.6488; 0.000333 + 7.6488 · 0.000577 / √3 = 0.00288
    assert four[8] == "equal within ±0.0029"
    assert eight[7:] == ("+0.400 ± 0.025", "worse")
    assert sixteen[5:] == ("–", "0.787 ± 0.236", "+0.013 ± 0.014", "not resolvable at this scale")
    assert cells(recall(pandas.DataFrame(rows[:5])), 1)["4"][8] == "too few seeds"
    with pytest.raises(InputError, match="recall rows of two variants are needed, got MHA"):
        recall(pandas.DataFrame(rows[:3]))


# --- scale, context, all of them ------------------------------------------------------------------------------------


def scaled(sizes: dict[int, int], budget: str = "fixed") -> list[dict[str, Any]]:
    """MHA at 7 · N^-0.13, MQA 2 % above with 5 % fewer parameters; ``sizes``: parameters of MHA -> layers."""
    return [
        row
        for size, layers in sizes.items()
        for g, worse, fewer in ((6, 1.0, 1.0), (1, 1.02, 0.95))
        for row in trained(g, [7 * size**-0.13 * worse] * 2, "scale", n_params=size * fewer, budget=budget)
        for row["shape.n_layers"] in [layers]
    ]


def test_scale_shows_sizes_and_what_a_difference_is_worth() -> None:
    """A worth without the parameters that a variant saved anyway looks like a loss where it is a gain."""
    table = scale(pandas.DataFrame(scaled({211_000: 2, 431_000: 3, 1_499_000: 5})), "fixed")
    assert [column.header for column in table.columns] == ["size", "tokens", "MHA", "MQA plain"]
    found = cells(table, 0)
    assert found["211,000"][1:] == ("7,000", f"{7 * 211_000**-0.13:.4f} ± 0.0000", "+2.00 ± 0.00")
    assert found["parameters, %"][3] == "-5.0"
    assert found["loss, %"][3] == "+2.0 (+2.0, +2.0)"
    assert found["worth, %"][3] == f"{100 * (1.02 ** (-1 / 0.13) - 1):.1f} (-14.1, -14.1)"  # -14.1
    assert str(table.caption).startswith("MHA's loss: 7 · N^-0.1300 (standard error 0.0000)")


def test_two_sizes_are_shown_without_a_law() -> None:
    """A partial experiment shows what it has, and says what it has not."""
    table = scale(pandas.DataFrame(scaled({211_000: 2, 431_000: 3})), "fixed")
    assert list(cells(table, 0)) == ["211,000", "431,000"]
    assert table.caption == "a power law with its error needs 3 sizes, got 2"


def test_context_is_compared_position_by_position() -> None:
    """Spans of another seed, or MHA's in place of a difference, are numbers like any other."""
    rows = [
        row | {"positions": [[1, 64, 2.0 + luck + worse], [65, 131, 1.5 - luck + 2 * worse]]}
        for g, worse in ((6, 0.0), (2, 0.25))
        for row, luck in zip(trained(g, [1.7, 1.8], "context"), (0.0, 0.1), strict=True)
    ]
    table = context(pandas.DataFrame(rows))
    assert list(cells(table, 0).values()) == [
        ("1–64", "2.0500 ± 0.6353", "+0.2500 ± 0.0000"),
        ("65–131", "1.4500 ± 0.6353", "+0.5000 ± 0.0000"),
    ]
    with pytest.raises(InputError, match="no finished MHA run to compare with"):
        context(pandas.DataFrame(rows[2:]))


def test_an_interval_needs_two_values() -> None:
    """A single seed's "± nan", or "± 0", claims to know what it does not."""
    assert interval(pandas.Series([0.25, math.nan])) == "+0.2500"
    assert interval(pandas.Series([], dtype=float)) == "–"
    assert interval(pandas.Series([0.1, 0.3]), "", 1) == "0.2 ± 1.3"  # 12.7062 · 0.1414 / √2


def test_every_experiment_has_its_table_from_its_newest_run() -> None:
    """Published rows hold old sweeps too, and a sweep that has only begun must not hide the finished ones."""
    old = [row | {"run": "r0", "bits_per_byte": 9.0} for row in SWEEP]
    rows = old + SWEEP + trained(2, [2.0], "begun") + [{"kind": "decode", "run": "r9", "status": "ok"}]
    rows += recalled(6, 1e-3, [1.0, 0.9]) + recalled(1, 1e-3, [0.8, 0.9])
    rows += scaled({211_000: 2, 431_000: 3}) + scaled({211_000: 2}, "per-parameter")
    rows += uptrained(6, "continued", 0.05, [1.8, 1.6]) + uptrained(2, "mean", 0.05, [1.9, 1.8])
    rows += [row | {"positions": [[1, 64, 2.0]]} for g in (6, 1) for row in trained(g, [1.7], "context")]
    titles = [str(table.title).partition(":")[0] for table in quality_tables(pandas.DataFrame(rows))]
    assert titles == [
        "bits per byte after 7,000 tokens",
        "What calms the noise",
        "Recall",
        "Scale, fixed budget",
        "Scale, per-parameter budget",
        "bits per byte after more training, by share of the original steps",
        "bits per byte by position",
        "begun",
    ]
    first, *_ = quality_tables(pandas.DataFrame(rows))
    assert cells(first, 0, 1)["MHA", "plain"][4] == "2.1333 (sd 0.1528)"
