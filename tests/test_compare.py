"""Which points of two runs differ: against samples whose true ratio is known, and against runs laid out by hand."""

import math
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest

from attnlab import compare
from attnlab.compare import chosen, differences
from attnlab.errors import InputError
from attnlab.results import Run

ROUNDS = 20


def point(samples: Any, context: int, **more: Any) -> dict[str, Any]:
    """One timed row, as the table of a run holds it."""
    samples = [float(sample) for sample in samples]
    sizes = {"shape.n_heads": 6, "shape.n_kv_heads": 2, "shape.head_dim": 10, "variant": "GQA-2", "batch": 3}
    facts = {"kind": "decode", "status": "ok", "run": "r1", "machine": "m-1", "impl": "grouped", "dtype": "float32"}
    numbers = {"samples": samples, "median": float(numpy.median(samples)), "read_bandwidth": 8e9, "queries": 1}
    return {**facts, **sizes, **numbers, "context": context, **more}


def skewed(random: numpy.random.Generator, points: int, spread: float = 0.05) -> numpy.ndarray:
    """Samples [points, ROUNDS] around 1 ms as a shared machine takes them: most within ``spread``, some far above."""
    far = (random.random((points, ROUNDS)) < 0.05) * abs(random.normal(0, 0.5, (points, ROUNDS)))
    return 1e-3 * numpy.exp(random.normal(0, spread, (points, ROUNDS)) + far)


def run_of(samples: numpy.ndarray) -> pandas.DataFrame:
    return pandas.DataFrame([point(one, 7 + index) for index, one in enumerate(samples)])


@pytest.mark.parametrize("seed", range(5))
def test_what_did_not_change_is_not_named(seed: int) -> None:
    """Of 400 points judged each for itself, twenty differ by chance; a list that always has names is read by nobody.
    Each interval for itself still leaves out the truth once in twenty times."""
    random = numpy.random.default_rng(seed)
    found = differences(run_of(skewed(random, 400)), run_of(skewed(random, 400)))
    assert len(found) == 400 and found["differs"].sum() <= 1
    outside = ((found["low"] > 1) | (found["high"] < 1)).mean()
    assert 0.015 < outside < 0.085


def test_a_real_change_is_named_and_nothing_else() -> None:
    """20 % more time beside samples that are far out is what the command is for, in either direction."""
    random = numpy.random.default_rng(11)
    before, after = skewed(random, 300), skewed(random, 300)
    after[:30] *= 1.2
    after[30:60] /= 1.2
    found = differences(run_of(before), run_of(after)).sort_values("context")
    assert found["differs"][:60].sum() >= 59 and found["differs"][60:].sum() <= 1
    assert found["ratio"][:30].median() == pytest.approx(1.2, rel=0.02)
    assert found["ratio"][30:60].median() == pytest.approx(1 / 1.2, rel=0.02)
    inside = (found["low"][:30] < 1.2) & (found["high"][:30] > 1.2)
    assert inside.sum() >= 26
    assert ((found["low"] < found["ratio"]) & (found["ratio"] < found["high"])).mean() > 0.99


def test_a_change_below_the_scatter_is_not_named() -> None:
    """With samples spread over 40 % a fifth more is a guess; the ratio stands there, with an interval around one."""
    random = numpy.random.default_rng(13)
    before, after = skewed(random, 100, 0.4), skewed(random, 100, 0.4) * 1.2
    assert differences(run_of(before), run_of(after))["differs"].sum() <= 3


def test_few_samples_differ_only_by_a_lot() -> None:
    """Slow arms have five samples; percentiles of a bootstrap of five are too narrow by far."""
    random = numpy.random.default_rng(17)
    draw = random.normal(0, 0.05, (2, 400, 5))
    same = differences(run_of(numpy.exp(draw[0])), run_of(numpy.exp(draw[1])))
    assert not same["differs"].any() and ((same["low"] > 1) | (same["high"] < 1)).mean() < 0.06
    assert differences(run_of(numpy.exp(draw[0])), run_of(3 * numpy.exp(draw[1])))["differs"].mean() > 0.9


def test_an_example_by_hand() -> None:
    """Logarithms 0, 0, 1 to 4, 9 against the same and 1 more, over ten: without the ends their mean is 2 and 3; with
    the ends pulled in to 0 and 4 the squares come to 18, so the variance is 18/6 · 6 / (5 · 4), and t with eight
    degrees, since five are kept, is 2.3060."""
    logs = numpy.array([[0, 0, 1, 2, 3, 4, 9]]) / 10
    (found,) = differences(run_of(numpy.exp(logs)), run_of(numpy.exp(logs + 0.1))).to_dict("records")
    half = 2.306004 * math.sqrt(2 * 18 / 100 / 6 * 6 / (5 * 4))
    assert found["ratio"] == pytest.approx(math.exp(0.1))
    assert (math.log(found["low"]), math.log(found["high"])) == pytest.approx((0.1 - half, 0.1 + half), rel=1e-5)
    assert not found["differs"]


def test_a_coarse_clock_is_no_certainty() -> None:
    """All samples alike give an error of zero, and every last digit differs."""
    runs = [pandas.DataFrame([point([time] * ROUNDS, 7)]) for time in (1e-3, 1.001e-3, 1.02e-3)]
    assert differences(runs[0], runs[1])["differs"].tolist() == [False]
    assert differences(runs[0], runs[2])["differs"].tolist() == [True]


def test_which_points_are_set_side_by_side() -> None:
    """``auto`` has its arm's samples: counted beside it, each change is named twice. It stands for itself where it
    picked another arm."""
    sample = numpy.random.default_rng(19).normal(1, 0.01, ROUNDS)
    before = [point(sample, 7), point(sample, 7, impl="auto", picked="grouped"), point(sample, 9)]
    rows = {
        "same pick": [*before, point(sample[:2], 11)],
        "other pick": [point(sample, 7), point(sample, 7, impl="auto", picked="sdpa")],
    }
    assert [
        differences(pandas.DataFrame([*before, point(sample, 11)]), pandas.DataFrame(after))[
            ["context", "impl"]
        ].values.tolist()
        for after in rows.values()
    ] == [[[7, "grouped"], [9, "grouped"]], [[7, "grouped"], [7, "auto"]]]
    with pytest.raises(InputError, match="the two runs share no timed point; measure the same grid, dtypes and heads"):
        differences(pandas.DataFrame(before), pandas.DataFrame([point(sample, 13)]))


# --- runs by name ---------------------------------------------------------------------------------------------------


def stored(folder: Path, commit: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    row: dict[str, Any] = {"kind": "decode", "status": "ok", "machine": folder.parent.name, "median": 1.0}
    monkeypatch.setattr("attnlab.results.git_commit", lambda: commit)
    with Run(folder) as run:
        run.append(f"k{len(run.rows)}", row | more)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two roots: commit abc1234 on m-1 in two runs and dirty in a third, def5678 on m-1 and, later, on m-2."""
    runs, published = tmp_path / "runs", tmp_path / "published"
    stored(runs / "m-1" / "r1", "abc1234", monkeypatch)
    stored(runs / "m-1" / "r2", "abc1234", monkeypatch)
    stored(published / "m-1" / "r2", "abc1234", monkeypatch)
    stored(runs / "m-1" / "r3", "abc1234-dirty", monkeypatch)
    stored(runs / "m-1" / "r4", "abc1234", monkeypatch, kind="quality")
    stored(published / "m-1" / "r5", "def5678", monkeypatch)
    stored(published / "m-1" / "r5", "abc9999", monkeypatch)  # begun at one commit, continued at another
    stored(published / "m-2" / "r6", "def5678", monkeypatch)
    full = {"abc1234": "abc1234" + "0" * 33, "v1": "abc1234" + "0" * 33, "def5678": "def5678" + "1" * 33}
    monkeypatch.setattr(compare, "full_commit", lambda name: full.get(name, ""))
    return [runs, published]


def test_a_commit_is_its_newest_run_on_a_machine_that_both_have(tree: list[Path]) -> None:
    """Another machine's times would be read as the commit's, and a run counted twice as two."""
    for name in ("abc1234", "v1"):
        (before, after), said = chosen([name, "def5678"], tree)
        assert before[["machine", "run", "commit"]].values.tolist() == [["m-1", "r2", "abc1234"]]
        assert after[["machine", "run", "commit"]].values.tolist() == [["m-1", "r5", "def5678"]]
        assert said == [
            "A: r2 of m-1, commit abc1234, the newest of 2 runs at this commit",
            "B: r5 of m-1, commit def5678",
        ]
    (alone,), said = chosen(["def5678"], tree)
    assert alone["run"].tolist() == ["r6"] and said == ["A: r6 of m-2, commit def5678"]
    assert chosen(["abc1234-dirty"], tree)[1] == ["A: r3 of m-1, commit abc1234-dirty"]


def test_a_run_is_its_folder_or_its_file(tree: list[Path]) -> None:
    """Both are what people paste; rows of a continued run belong to it, whatever their commit."""
    folder = tree[1] / "m-1" / "r5"
    for name in (folder, folder / "rows.jsonl"):
        (rows,), said = chosen([str(name)], tree)
        assert len(rows) == 2 and said == ["A: r5 of m-1, commit def5678, abc9999"]


@pytest.mark.parametrize("name", ["nowhere", "abc", "abc12345-dirty", "--all", "HEAD"])
def test_a_word_that_names_no_rows_is_refused(tree: list[Path], tmp_path: Path, name: str) -> None:
    """The rows of a commit that starts like it are other rows."""
    with pytest.raises(
        InputError, match=rf"no rows\.jsonl at or below {name}, and no timed rows of a commit of that name"
    ) as error:
        chosen([name], tree)
    assert str(error.value).endswith("; commits measured there: abc1234, abc1234-dirty, abc9999, def5678")
    with pytest.raises(InputError, match="commits measured there: none"):
        chosen([name], [tmp_path / "absent"])
