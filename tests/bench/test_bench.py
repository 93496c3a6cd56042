"""The suites as a user runs them: what pytest-benchmark shows is what was measured, and is in the rows."""

import fcntl
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import attnlab

ROOT = Path(attnlab.__file__).parents[1]
SUITES = {"test_decode", "test_prefill", "test_memory", "test_generate", "test_mistakes", "test_train"}


def run_pytest(folder: Path, *arguments: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    """pytest on this project in ``folder``, where rows land; the lock of trainings and timings is in ``temporary``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    environment.pop("PYTEST_ADDOPTS", None)
    project = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *project, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_what_is_shown_is_what_was_measured(tmp_path: Path) -> None:
    """pytest-benchmark runs all rounds of one test in one go: timed by itself, arms would be minutes apart. They are
    measured in turn and replayed, and a replay can lie: another arm's samples, a round more or less, its own clock."""
    chosen = "GQA-4-ctx1024-b1 or GQA-4-ctx256-b1 or GQA-4-ctx128-b1 or MQA-float32"
    options = ("--heads", "8", "--dtype", "float32", "-k", chosen, "-rs", "--benchmark-json", "shown.json")
    done = run_pytest(tmp_path, str(ROOT / "bench"), "--benchmark-only", *options, temporary=tmp_path)
    shown = {entry["name"]: entry for entry in json.loads((tmp_path / "shown.json").read_text())["benchmarks"]}

    (path,) = (tmp_path / "runs").rglob("rows.jsonl")
    assert path.parent.name.endswith("-bench")
    assert f"\nrows: {path.parent.relative_to(tmp_path)}\n" in done.stdout
    assert (path.parent / "machine.json").exists()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    beyond = any(row["status"] == "implausible" for row in rows)  # on a busy machine
    assert done.returncode == beyond, done.stdout + done.stderr
    expected = {}
    for row in rows:
        point = f"{row['variant']}-ctx{row['context']}-b{row['batch']}"
        if row["kind"] == "generate":
            expected[f"test_step[{point}-{row['impl']}-float32]"] = row
        elif row["status"] in ("ok", "implausible"):
            expected[f"test_{row['kind']}[{point}-{row['impl']}-fp32]"] = row
    assert "test_decode[GQA-4-ctx1024-b1-grouped-fp32]" in expected
    assert "test_prefill[GQA-4-ctx256-b1-expanded-fp32]" in expected
    replayed = set(expected) & set(shown)
    assert set(shown) - replayed == {"test_append[MQA-float32]"}  # which pytest-benchmark times itself
    assert {name for name in expected if "MHA" not in name and "MQA" not in name} == replayed
    for name in replayed:
        samples, stats = expected[name]["samples"], shown[name]["stats"]
        assert stats["rounds"] == len(samples)
        assert stats["median"] == pytest.approx(statistics.median(samples), rel=1e-9)
        assert (stats["min"], stats["max"]) == pytest.approx((min(samples), max(samples)), rel=1e-9)
        assert shown[name]["options"]["timer"] == "samples taken in turn"
        assert shown[name]["extra_info"]["predicted"] == expected[name]["predicted"]

    arms = {entry["extra_info"]["picked"] for name, entry in shown.items() if name.startswith("test_decode")}
    assert arms == {"reference", "expanded", "sdpa", "grouped", "cpp"}
    assert "unsupported: flex needs CUDA" in done.stdout
    stored = shown["test_append[MQA-float32]"]["extra_info"]
    assert stored["stored_bytes"] == stored["predicted_bytes"] == 2 * 4 * 4 * 1024 * 128 * 4


@pytest.mark.slow
def test_beside_a_training_nothing_is_measured(tmp_path: Path) -> None:
    """Said once, not as an error of each of a hundred tests."""
    with (tmp_path / "attnlab-training.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        done = run_pytest(tmp_path, str(ROOT / "bench" / "test_decode.py"), "--benchmark-only", temporary=tmp_path)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("a training or another timing is running on this machine") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_flag_decides_what_is_collected(tmp_path: Path) -> None:
    """``pytest`` must not spend five minutes measuring, nor ``pytest --benchmark-only`` find nothing to measure."""
    for arguments in (["--benchmark-only"], []):
        done = run_pytest(ROOT, "--collect-only", "-q", *arguments, temporary=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
        assert {Path(file).parts[0] for file in files} == {"bench" if arguments else "tests"}
        if arguments:
            assert {Path(file).stem for file in files} == SUITES


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--dtype=float31", "unknown dtype 'float31'; valid, with commas between: float32, bfloat16, float16"),
        ("--dtype=float32,", "unknown dtype ''"),
        ("--heads=0", "expected a whole number above 0, got '0'"),
        ("--grid=quik", "invalid choice: 'quik'"),
        ("--device=mps", "invalid choice: 'mps'"),
    ],
)
def test_a_wrong_option_is_said_before_anything_is_measured(tmp_path: Path, option: str, message: str) -> None:
    """Collected, it would fail in each of a hundred tests."""
    done = run_pytest(ROOT, "--benchmark-only", option, temporary=tmp_path)
    assert done.returncode == 4 and message in done.stderr and "Traceback" not in done.stderr
