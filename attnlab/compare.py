"""Which points of two runs differ: B over A, each with a 95 % interval from both lists of samples.

Samples are skewed and some lie far out, so a list counts as the mean of its logarithms without the three of twenty at
either end, and two lists are set side by side by Welch's interval for such means (Yuen, Biometrika 61, 1974). Where a
twentieth lies far out it sees 20 % in 99 of 100 points, with the plain mean in 70; of five samples a bootstrap would be
too sure. A point differs where the interval at 1 - 5 %/points leaves out 1 (Bonferroni, as in ``attnlab.effects``).
All this holds the scatter within two runs; how far two hours of a shared machine lie apart is the drift, the median
ratio of all points, and is said apart.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy
import pandas

from attnlab.effects import student_t
from attnlab.errors import InputError
from attnlab.report import POINT, newest_points, timed
from attnlab.results import ROWS, full_commit, load_results

TRIMMED = 0.15  # of the samples at either end: three of twenty, none of five
LEAST_SAMPLES = 3
LEAST_ERROR = 1e-3  # equal samples show a coarse clock, not certainty


def differences(before: pandas.DataFrame, after: pandas.DataFrame) -> pandas.DataFrame:
    """One line per point that both timed: sizes, ``ratio`` (of medians, after / before), ``low`` and ``high`` of its
    95 % interval, ``differs``, ``unsteady`` (in either). ``auto`` is left out where it picked the same arm in both,
    being that arm's samples again. Raises ``InputError`` if they share no point with at least three samples."""
    sides = [newest_points(rows, "samples", "picked", "unsteady") for rows in (before, after)]
    both = sides[0].merge(sides[1], on=[*POINT, "variant"], suffixes=("_before", "_after"))
    enough = (both["samples_before"].str.len() >= LEAST_SAMPLES) & (both["samples_after"].str.len() >= LEAST_SAMPLES)
    both = both[enough & ((both["impl"] != "auto") | (both["picked_before"] != both["picked_after"]))].copy()
    if both.empty:
        raise InputError("the two runs share no timed point; measure the same grid, dtypes and heads")
    found = map(_log_ratio, both["samples_before"], both["samples_after"])
    tests = [(log, error, student_t(0.975, df), student_t(1 - 0.025 / len(both), df)) for log, error, df in found]
    middle, error, own, needed = numpy.array(tests).T
    both["ratio"] = both["median_after"] / both["median_before"]
    both["low"], both["high"] = numpy.exp(middle - own * error), numpy.exp(middle + own * error)
    both["differs"] = numpy.abs(middle) > needed * error
    both["unsteady"] = both["unsteady_before"].eq(True) | both["unsteady_after"].eq(True)
    return both[[*POINT, "variant", "ratio", "low", "high", "differs", "unsteady"]]


def _log_ratio(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, int]:
    """log(after / before) of trimmed means, its standard error, and the degrees of freedom, rounded down."""
    parts = []
    for samples in (before, after):
        logs = numpy.sort(numpy.log(samples))
        cut, n = int(TRIMMED * len(logs)), len(logs)
        kept, clipped = logs[cut : n - cut], logs.clip(logs[cut], logs[n - cut - 1])
        parts.append((kept.mean(), clipped.var(ddof=1) * (n - 1) / (len(kept) * (len(kept) - 1)), len(kept) - 1))
    (a, va, fa), (b, vb, fb) = parts
    freedom = (va + vb) ** 2 / (va**2 / fa + vb**2 / fb) if va + vb else min(fa, fb)
    return float(b - a), max(math.sqrt(va + vb), LEAST_ERROR), max(1, int(freedom + 1e-9))


def chosen(words: Sequence[str], roots: Sequence[Path]) -> tuple[list[pandas.DataFrame], list[str]]:
    """The rows that each of ``words`` names, a run's folder, a ``rows.jsonl`` or a commit, and a line on each. A
    commit's rows are looked for below ``roots``: of several runs the newest counts, of several machines one that all of
    ``words`` have. Raises ``InputError`` on a word that names no rows."""
    tables, said = [_rows_of(word, roots) for word in words], []
    shared = set.intersection(*(set(rows["machine"]) for rows in tables))
    common = tables[-1][tables[-1]["machine"].isin(shared)].sort_values("run")["machine"].tail(1)
    for index, (word, rows) in enumerate(zip(words, tables, strict=True)):
        several = ""
        if not Path(word).exists():
            rows = rows[rows["machine"].isin(common)] if shared else rows
            tables[index] = rows[rows["run"] == rows["run"].max()]
            count = rows["run"].nunique()
            several = f", the newest of {count} runs at this commit" if count > 1 else ""
        run, machine, commit = (", ".join(tables[index][name].unique()) for name in ("run", "machine", "commit"))
        said.append(f"{'AB'[index]}: {run} of {machine}, commit {commit}{several}")
    return tables, said


def _rows_of(word: str, roots: Sequence[Path]) -> pandas.DataFrame:
    path = Path(word)
    if path.exists():
        return load_results(path.parent if path.is_file() else path)
    trees = [load_results(root) for root in roots if any(root.rglob(ROWS))]
    rows = timed(pandas.concat(trees)) if trees else pandas.DataFrame(columns=["commit"])
    full = full_commit(word)
    found = rows[[commit == word or bool(commit and full.startswith(commit)) for commit in rows["commit"]]]
    if found.empty:
        known = ", ".join(sorted(rows["commit"].unique())) or "none"
        raise InputError(
            f"no {ROWS} at or below {word}, and no timed rows of a commit of that name below "
            f"{' or '.join(map(str, roots))}; commits measured there: {known}"
        )
    return found.drop_duplicates(["machine", "run", "key"])  # a published run is a copy
