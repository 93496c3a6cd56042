"""Figures of training runs, read back: they say what the rows say, of the right run, paired by the right seed."""

import itertools
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from attnlab.effects import effects
from attnlab.errors import InputError
from attnlab.model.convert import METHODS
from attnlab.plots import FIGURES, draw_all, style, training

TARGETS = {"GQA-2": 2, "MQA": 1}
EXPERIMENTS = {
    "quality": "g-sweep",
    "quality_curves": "g-sweep",
    "scale_vs_variant": "scale",
    "recall": "recall",
    "uptraining": "uptraining",
    "conversion": "conversion",
}


@pytest.fixture
def rows(trained: list[dict[str, Any]]) -> pandas.DataFrame:
    return pandas.json_normalize(trained)


def draw(name: str, rows: pandas.DataFrame) -> Figure:
    return FIGURES[name](rows, "zen-2c")


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> x, y of every line, every error bar's middle among them."""
    found = {line.get_label(): line for line in axes.get_lines()}
    found |= {bars.get_label(): bars.lines[0] for bars in axes.containers if isinstance(bars, ErrorbarContainer)}
    return {label: tuple(numpy.asarray(part).tolist() for part in line.get_data()) for label, line in found.items()}


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts).replace("\n", " ").replace("\xa0", " ")


def of(rows: pandas.DataFrame, **values: Any) -> pandas.DataFrame:
    for column, value in values.items():
        rows = rows[rows["shape.n_kv_heads" if column == "g" else column] == value]
    return rows


# --- which rows -----------------------------------------------------------------------------------------------------


def test_the_newest_run_that_has_the_experiment(rows: pandas.DataFrame) -> None:
    """The newest run of all held another experiment, and the figure was gone; or an old sweep's seeds joined in."""
    old = of(rows, experiment="g-sweep").assign(run="20260101-000000-quality", bits_per_byte=9.0)
    newer = of(rows, experiment="recall").assign(run="20280101-000000-quality")
    failed = of(rows, experiment="g-sweep").assign(run="20290101-000000-quality", status="diverged")
    figure = draw("quality", pandas.concat([old, rows, newer, failed]))
    assert "rows: 20270301-000000-quality" in words(figure)
    means = [effect.mean for effect in effects(rows, "g-sweep")]
    drawn = [bars.lines[0].get_xdata()[0] for bars in figure.axes[0].containers if isinstance(bars, ErrorbarContainer)]
    assert drawn == pytest.approx(means)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_absent_rows_leave_a_figure_out(rows: pandas.DataFrame, name: str, tmp_path: Path) -> None:
    """A table without the columns of an experiment is what every user has who only timed something."""
    said: list[str] = []
    bare = pandas.DataFrame([{"kind": "decode", "status": "ok", "machine": "zen-2c", "run": "r", "key": "k"}])
    others = rows[(rows["experiment"] != EXPERIMENTS[name]) & (rows["kind"] != EXPERIMENTS[name])]
    for table in (bare, others):
        assert draw_all(table, tmp_path, only=name, say=said.append) == []
    assert len(said) == 2 and said[0] == said[1]
    assert said[0].startswith(f"{name}.zen-2c is not drawn: no {EXPERIMENTS[name]} rows of zen-2c")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_sweep_under_way_is_drawn_or_named(rows: pandas.DataFrame, name: str) -> None:
    """Rows are published as they come: the first, a third and all but the last of them must not end in a traceback."""
    own = rows[(rows["experiment"] == EXPERIMENTS[name]) | (rows["kind"] == EXPERIMENTS[name])]
    for count in (1, 2, len(own) // 3, len(own) - 1):
        try:
            figure = draw(name, own[:count])
        except InputError as lacking:
            assert count <= 2 and "\n" not in str(lacking)
        else:
            assert name == "conversion" or "seed" in words(figure)


# --- numbers, read back ---------------------------------------------------------------------------------------------


def test_quality_shows_intervals_seeds_and_what_was_missed(rows: pandas.DataFrame) -> None:
    """A mean without its interval, or the matched arm in place of the plain one, is a claim nobody can check."""
    figure = draw("quality", rows)
    (axes,) = figure.axes
    found = effects(rows, "g-sweep")
    arms = [(effect.variant, effect.arm) for effect in found]
    assert arms == list(itertools.product(TARGETS, ("plain", "matched")))
    dots = [line for line in axes.get_lines() if line.get_label() == "seeds"]
    missed = [bar for bars in axes.containers if bars.get_label() == "missed" for bar in bars]
    for effect, seeds, bar in zip(found, dots, missed, strict=True):
        bars = next(bars for bars in axes.containers if bars.get_label() == f"{effect.variant}, {effect.arm}")
        ((low, _), (high, _)) = bars.lines[2][0].get_segments()[0]
        assert (low, high) == pytest.approx((effect.mean - effect.half_width, effect.mean + effect.half_width))
        own = [
            of(rows, experiment="g-sweep", g=g, arm=arm).set_index("seed")["bits_per_byte"]
            for g, arm in ((effect.n_kv_heads, effect.arm), (6, "plain"))
        ]
        assert list(seeds.get_xdata()) == pytest.approx(list(own[0] - own[1]))
        assert (bar.get_x(), bar.get_width()) == pytest.approx((-effect.smallest, 2 * effect.smallest))
        said = f"{effect.arm}  {effect.mean:+.4f} ± {effect.half_width:.4f}\n{effect.verdict}".replace("-", "−")
        assert said in [text.get_text() for text in axes.texts]
        hollow = bars.lines[0].get_markerfacecolor() == style.PAPER
        assert hollow == (effect.arm == "matched") and bars.lines[0].get_color() == style.variant_colour(effect.variant)
    some = rows[(rows["arm"] != "matched") | (rows["shape.n_kv_heads"] != 1) | (rows["seed"] == 2)]
    assert "Too few pairs yet: MQA matched (1)" in words(draw("quality", some))


def test_curves_are_paired_by_seed_and_token(rows: pandas.DataFrame) -> None:
    """Rows in another order of seeds, or a run resumed with one point less, moved a difference to its neighbour."""
    shuffled = rows.sample(frac=1, random_state=5).reset_index(drop=True)
    cut = shuffled.index[(shuffled["shape.n_kv_heads"] == 1) & (shuffled["seed"] == 1) & (shuffled["arm"] == "plain")]
    cut = cut[shuffled.loc[cut, "experiment"] == "g-sweep"]
    shuffled.loc[cut, "curve"] = shuffled.loc[cut, "curve"].map(lambda curve: curve[1:])
    left, right = draw("quality_curves", shuffled).axes
    curves = {
        (row["shape.n_kv_heads"], row["arm"], row["seed"]): dict(row["curve"])
        for row in of(shuffled, experiment="g-sweep").to_dict("records")
    }
    tokens = [n * 500_000 for n in range(2, 15)]
    drawn = lines(right)["MQA, plain"]
    assert drawn[0] == pytest.approx([n / 1e6 for n in tokens])
    for arm, values in (("plain", drawn[1]), ("matched", lines(right)["MQA, matched"][1][1:])):
        gaps = [[curves[1, arm, seed][n] - curves[6, "plain", seed][n] for seed in range(3)] for n in tokens]
        assert values == pytest.approx([sum(gap) / 3 for gap in gaps])
    assert sum(line.get_label() == "MQA, seeds" for line in left.get_lines()) == 3
    assert lines(left)["gzip"][1] == [1.67, 1.67] and lines(left)["xz"][1] == [1.4, 1.4]
    ends = of(rows, experiment="g-sweep", g=1, arm="plain")["bits_per_byte"]
    assert lines(left)["MQA, averaged"] == ([7], [pytest.approx(ends.mean())])
    assert "gzip" not in lines(draw("quality_curves", rows.drop(columns=["gzip_bits", "xz_bits"])).axes[0])


def test_worth_is_what_the_rows_were_made_with(noiseless: list[dict[str, Any]]) -> None:
    """loss = a · N^-b · (1 + offset) of N of MHA: the sign of b, a natural logarithm or a budget's rows in the other's
    panel give other per cents."""
    figure = draw("scale_vs_variant", pandas.json_normalize(noiseless))
    for above, below, b in zip(figure.axes[:2], figure.axes[2:], (0.08, 0.15), strict=True):
        seen = lines(below)
        for variant, halvings in (("GQA-2", numpy.log2(3)), ("MQA", numpy.log2(6))):
            worth = 100 * ((1 + 0.005 * halvings) ** (-1 / b) - 1)
            assert seen[f"{variant}, plain"][0] == [pytest.approx(worth)]
            assert f"{worth:+.1f} %".replace("-", "−") in [text.get_text() for text in below.texts]
        millions, losses = lines(above)["law"]
        assert millions == [0.21, 1.47]
        assert losses == pytest.approx([1.6 * (size / 0.53) ** -b * 1.01**0.99 for size in millions], rel=1e-3)
        assert f"loss ∝ N$^{{-{b:.3f}}}$" in " ".join(text.get_text() for text in above.texts)
        sizes = [(whole - 11_000 * k * 5) / 1e6 for k, whole in ((1, 210_000), (2, 530_000), (3, 1_470_000))]
        assert lines(above)["MQA"][0] == pytest.approx(sizes)
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["tokens: 7 M", "tokens: 4 per parameter"]


def test_recall_counts_the_seeds_of_the_best_rate(rows: pandas.DataFrame) -> None:
    """The rate that lost the trial, tried on one seed, pulled every mean; and a missing seed was not said."""
    figure = draw("recall", rows)
    assert "2 to 3 seeds (partial)" in words(figure)
    own = of(rows, experiment="recall", peak_rate=4e-3)
    titles = ("plain: 1 key a value, D = 16", "harder: 3 keys a value, D = 8")
    for axes, relations, title in zip(figure.axes, (1, 3), titles, strict=True):
        assert axes.get_title(loc="left") == title
        for variant, g in (("MHA", 6), *TARGETS.items()):
            mine = of(own, relations=relations, g=g)
            means = 100 * mine.groupby("pairs")["accuracy"].mean()
            assert lines(axes)[variant] == ([0, 1, 2], pytest.approx(list(means)))
            assert sorted(lines(axes)[f"{variant}, seeds"][1]) == pytest.approx(sorted(100 * mine["accuracy"]))
        assert [label.get_text() for label in axes.get_xticklabels()] == ["5\n64", "11\n128", "23\n256"]
        assert lines(axes)["guess"] == ([0, 1, 2], pytest.approx([100 / 5, 100 / 11, 100 / 23]))


def test_training_says_in_which_dtype_it_multiplied(rows: pandas.DataFrame) -> None:
    """A card's sweep, trained under autocast, was labelled float32."""
    assert "· float32 ·" in words(draw("quality", rows))
    assert "· bfloat16 ·" in words(draw("quality", rows.assign(autocast=True)))


def test_uptraining_sets_methods_beside_mha_and_scratch(rows: pandas.DataFrame) -> None:
    """Another target's level behind a panel, or MHA without its extra steps, decides whether training back was enough.
    A sweep that is no relative of the converted MHA is no level to reach."""
    figure = draw("uptraining", rows)
    assert "2 to 3 seeds (partial) of data order" in words(figure) and "from scratch, 3 seeds" in words(figure)
    own, levels = of(rows, experiment="uptraining"), of(rows, experiment="g-sweep", arm="plain")
    for column, (variant, g) in enumerate(TARGETS.items()):
        for axes in figure.axes[column::2]:
            for label, arm, heads in (("MHA", "continued", 6), *((method, method, g) for method in METHODS)):
                mine = of(own, arm=arm, g=heads)
                percents, means = lines(axes)[label]
                assert percents == pytest.approx([0, 1, 5, 10, 20])
                assert means == pytest.approx(list(mine.groupby("alpha")["bits_per_byte"].mean()))
            (band,) = [patch for patch in axes.patches if patch.get_label() == "from scratch"]
            level = of(levels, g=g)["bits_per_byte_raw"]  # last weights, as the curves are
            assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((level.min(), level.max()))
        assert figure.axes[column].get_title(loc="left") == variant
    near, late = figure.axes[2].get_ylim(), own[own["alpha"] >= 0.05]["bits_per_byte"]
    assert near[0] < late.min() and late.max() < near[1] < 2.1
    orphan = draw("uptraining", rows.assign(parent="elsewhere"))
    assert "no from-scratch rows" in words(orphan) and not orphan.axes[0].patches


def test_conversion_draws_each_map_and_how_much_moved(rows: pandas.DataFrame) -> None:
    """Heads or methods in another order look just as plausible. A token with a $ began a formula."""
    figure = draw("conversion", rows)
    assert r"Text: def ␣f ( \$x )\n \u2192 \xe9" in words(figure)
    own = of(rows, kind="conversion").set_index(["head", "method"])["attention"]
    for axes, (head, method) in zip(figure.axes, itertools.product((0, 1), ("before", *METHODS)), strict=False):
        (image,) = axes.get_images()
        assert image.get_array().tolist() == own[head, method]
        assert axes.get_title(loc="left") == (method if head == 0 else "")
        moved = sum(
            max(0, new - old)
            for new_line, old_line in zip(own[head, method], own[head, "before"], strict=True)
            for new, old in zip(new_line, old_line, strict=True)
        )
        assert axes.get_xlabel() == ("" if method == "before" else f"{100 * moved / 7:.0f} % elsewhere")
    for lacking in (rows[rows["method"] != "before"], rows[~rows["method"].isin(METHODS)]):
        with pytest.raises(InputError, match="no conversion rows of zen-2c with a head's attention before and after"):
            draw("conversion", lacking)


def test_every_method_has_a_look() -> None:
    """A method without an ink was left out of its figures without a word."""
    assert tuple(training._METHODS) == METHODS


def test_published_numbers_are_the_tables() -> None:
    """A digit lost on the way from a paper is quoted from then on; and matched or not must stand at each panel."""
    figure = FIGURES["published_quality"]()
    gqa, cla, deepseek, llama = figure.axes
    assert {name: (x[0], y[0]) for name, (x, y) in lines(gqa).items()} == {
        "MHA-Large": (0.37, 46.0),
        "MHA-XXL": (1.51, 47.2),
        "GQA-8-XXL": (0.28, 47.1),
        "MQA-XXL": (0.24, 46.6),
    }
    assert lines(cla)["perplexity"][1] == [13.15, 13.36, 13.52, 13.54]
    ticks = [label.get_text() for label in cla.get_xticklabels()]
    assert ticks == ["MHA\n160 KiB", "GQA-4\n40 KiB", "GQA-2\n20 KiB", "MQA\n10 KiB"]
    assert lines(deepseek)["MMLU"][1] == [45.2, 41.2, 37.9] and lines(deepseek)["BBH"][1] == [37.0, 35.6, 33.2]
    mha = [71.0, 79.3, 48.2, 75.1, 71.2, 43.0, 12.4, 44.7, 28.0, 4.9, 7.9]
    mqa = [70.6, 79.0, 47.9, 74.5, 71.6, 41.9, 14.5, 42.8, 26.5, 4.8, 7.3]
    gqa_8 = [69.4, 78.8, 48.6, 75.4, 72.1, 42.5, 14.0, 46.2, 26.9, 5.3, 7.9]
    for variant, scores in (("MQA", mqa), ("GQA-8", gqa_8)):
        assert lines(llama)[variant][0] == pytest.approx([a - b for a, b in zip(scores, mha, strict=True)])
    names = [label.get_text() for label in llama.get_yticklabels()]
    assert names[0] == "BoolQ  71.0" and names[8] == "MMLU  28.0" and names[10] == "HumanEval  7.9"
    sources = ("2305.13245), table 1", "2405.12981), table 1", "2405.04434), table 8", "2307.09288), table 18")
    matched = ("not matched", "not matched", "matched by number of layers", "matched by FFN")
    for axes, source, how in zip(figure.axes, sources, matched, strict=True):
        assert axes.get_title(loc="left").endswith(source)
        assert any(how in text.get_text() for text in axes.texts)
