"""The mistakes that are made on purpose are those they are called after, and the figure can draw their rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import attnlab
from attnlab.plots import FIGURES
from attnlab.results import load_results

ROOT = Path(attnlab.__file__).parents[1]


@pytest.mark.slow
def test_each_mistake_is_made(tmp_path: Path) -> None:
    """A wrong way that is not wrong, or a right one that is, would be published as a lesson."""
    project = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider")
    suite = (str(ROOT / "bench" / "test_mistakes.py"), "--benchmark-only", "--heads", "12", "--device", "cpu")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", *project, *suite]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    (path,) = (tmp_path / "runs").rglob("rows.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(row["name"], row["shape"]["n_kv_heads"], row["impl"]): row for row in rows}
    assert len(found) == len(rows) == 5 * 2 * 2
    for g in (12, 1):
        ways = {name: (found[name, g, "right"], found[name, g, "wrong"]) for name, *_ in found}
        right, wrong = ways["prefill-in-timer"]
        assert wrong["median"] > 5 * right["median"]
        right, wrong = ways["warm-cache"]
        assert wrong["bytes"] == right["bytes"] == 2 * 512 * g * 128 * 4
        right, wrong = ways["float32-label"]
        assert right["dtype"] == wrong["dtype"] == "bfloat16" and wrong["bytes"] == 2 * right["bytes"]
        assert wrong["error"] < 1e-4 < right["error"]  # no rounding to 8 bits
        right, wrong = ways["expanded-cache"]
        assert wrong["bytes"] == 12 // g * right["bytes"] and max(right["error"], wrong["error"]) < 1e-4
        right, wrong = ways["top-left-mask"]
        assert right["error"] < 1e-4 and wrong["error"] > 0.1
    rows_of = load_results(tmp_path / "runs")
    figure = FIGURES["five_ways_it_goes_wrong"](rows_of, rows_of["machine"].iloc[0])
    assert len(figure.axes) == 6
