"""Commands that measure: what they print, what they leave behind, how they end."""

import functools
import json
import math
import re
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from attnlab import explore as explore_module
from attnlab import host, measure, report, results
from attnlab.attention import implementations
from attnlab.measure import Inputs, Point, memory
from attnlab.predict.machine import Machine
from attnlab.results import ROWS, Run

Command = Callable[..., tuple[int, str, str]]
POINTS = [Point("decode", 6, g, 10, 2, 37, "float32") for g in (6, 2, 1)]
ALL = len(explore_module.planned(POINTS, "cpu"))
STEPS = len(implementations()) + 2 * len(POINTS)  # a proof of each implementation, a cache and times of each point


def test_a_measured_machine_is_a_card(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """``attnlab machine --out`` writes what ``--card`` reads; a reader's own card counts as much as a published one."""
    machine = Machine("mine", "cpu", 12.3e9, 9.8e9, {"float32": 98e9}, 7e-6, 123_456_789)
    asked: list[Any] = []
    monkeypatch.setattr(measure, "measure_machine", lambda *arguments: asked.append(arguments) or machine)
    code, out, err = command("machine", "--device", "cpu", "--dtypes", "fp32, bf16", "--out", "mine.json")
    assert (code, err, asked) == (0, "", [("cpu", ("float32", "bfloat16"))])
    assert out.startswith("reads 12.3 GB/s\n") and out.endswith("written to mine.json\n")
    numbers = json.loads(command("memory", "llama-2-7b", "--card", "mine.json", "--json")[1])
    assert (numbers["card"], numbers["card_bytes"]) == ("mine", 123_456_789)


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> dict[str, Machine]:
    """``explore`` in a second: three points, roofs that take no time to measure (change ``["roofs"]`` to move them)."""
    name = host.describe("cpu")["machine"]
    state = {"roofs": Machine(name, "cpu", 1e15, 1e15, {"float32": 1e18}, 1e-9, 2**40)}
    monkeypatch.setattr(explore_module, "grid", lambda name, device, dtypes, heads: POINTS)
    monkeypatch.setattr(explore_module, "measure_machine", lambda *_: state["roofs"])
    monkeypatch.setattr(explore_module, "refreshed", lambda *_: state["roofs"])
    monkeypatch.setattr(measure, "refreshed", lambda *_: state["roofs"])
    monkeypatch.setattr(explore_module, "new_inputs", lambda facts: Inputs("cpu", 10_007))
    monkeypatch.setattr(explore_module, "awkward_cases", lambda: [(12, 4, 64, 3, 17, True)])
    monkeypatch.setattr(host, "wait_for_quiet", lambda seconds: "")
    return state


EXPLORE = ("explore", "--device", "cpu", "--no-figures")


def test_explore_shows_what_it_found_and_goes_on(
    command: Command, small_grid: dict[str, Machine], tmp_path: Path
) -> None:
    """The main job: a table, the paths, exit code 0; the second time nothing is measured again."""
    code, out, err = command(*EXPLORE)
    assert code == 0
    assert re.search(r"^\W*MHA\W+float32\W+480\b", out, re.M) and re.search(r"^\W*MQA\W+float32\W+80\b", out, re.M)
    assert re.search(rf"^{ALL} rows: \d+ ok, \d+ unsupported\.$", out, re.M)
    assert "Prediction of decode (auto, 3 points): median error" in out
    path = Path(re.search(r"^rows: (.+)$", out, re.MULTILINE)[1])  # type: ignore[index]
    assert path.parent.name.endswith("-speed") and path.parts[0] == "runs"
    assert f"[0/{STEPS}] roofs of this machine" in err and f"[{STEPS - 1}/{STEPS}] MQA decode ctx37 b2 fp32" in err
    before = path.read_bytes()
    assert before.count(b"\n") == ALL
    with path.open("ab") as file:
        file.write(b'{"schema": 1, "run"')  # as a power cut leaves it
    code, again, _ = command(*EXPLORE)
    assert code == 0 and path.read_bytes() == before
    assert re.search(r"^cut off a torn last line of 19 bytes in .+; its point is done again$", again, re.M)
    assert [path.parent.name for path in Path("runs").rglob(ROWS)] == [path.parent.name]


def test_explore_stops_when_its_minutes_are_over(
    command: Command, refused: Callable[..., str], small_grid: dict[str, Machine]
) -> None:
    """A queue gives a job nine minutes: what was measured is kept and shown, the exit code is that of a job that went
    well, and nobody publishes the half of it."""
    code, out, err = command(*EXPLORE, "--minutes", 0)
    assert (code, err.count("\n")) == (0, 2)  # the roofs and the first proof
    assert out.endswith(f"-speed/rows.jsonl\n{ALL - 1} planned rows are left: run it again to go on\n")
    (path,) = Path("runs").rglob(ROWS)
    assert f"-speed is unfinished: {ALL - 1} of {ALL} planned rows are missing; let it go" in refused(
        "results", "publish", path.parent
    )
    before = path.read_bytes()
    code, out, err = command(*EXPLORE, "--minutes", 7)
    assert code == 0 and out.endswith("-speed/rows.jsonl\ncomplete: every planned row is there\n")
    assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == ALL
    assert command("results", "publish", path.parent)[0] == 0


def test_ctrl_c_inside_a_timed_round(
    command: Command, small_grid: dict[str, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual way to end a sweep of minutes: the point whose rounds were under way leaves no row, half measured, and
    is measured whole by the next call; every row before it stays."""
    real, calls = measure.interleaved, Counter[str]()

    def interrupted(timed: dict[str, Callable[[], object]], *more: Any) -> dict[str, list[float]]:
        def call(arm: str) -> object:
            calls[arm] += 1
            if arm == "grouped" and calls[arm] == 20 + 7:  # of the second point the seventh round
                raise KeyboardInterrupt  # as the signal does, unless whoever started this had it ignored
            return timed[arm]()

        return real({arm: functools.partial(call, arm) for arm in timed}, *more)

    monkeypatch.setattr(measure, "interleaved", interrupted)
    monkeypatch.setattr(measure, "SLOW_FACTOR", math.inf)  # however busy the machine is
    code, _, err = command(*EXPLORE)
    assert code == 130 and err.endswith("attnlab: stopped; run the same command again to go on\n")
    assert calls["grouped"] == 27 and calls["expanded"] == 20 + 7
    (path,) = Path("runs").rglob(ROWS)
    before = path.read_bytes()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [row["variant"] for row in rows if row["kind"] == "decode"] == ["MHA"] * len(
        explore_module.arms()
    ) and before.endswith(b"\n")
    code, out, _ = command(*EXPLORE)
    assert code == 0 and f"{ALL} rows: " in out and path.read_bytes().startswith(before)
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(rows) == len({row["key"] for row in rows}) == ALL
    assert {row["rounds"] for row in rows if row.get("impl") == "grouped" and row["kind"] == "decode"} == {20}


@pytest.mark.parametrize("all_of_them", [False, True])
def test_explore_fails_when_a_point_beats_its_roof(
    command: Command, small_grid: dict[str, Machine], monkeypatch: pytest.MonkeyPatch, all_of_them: bool
) -> None:
    """Numbers that cannot be must not end like numbers that can: a script would publish them."""
    slow = small_grid["roofs"].__class__(**{**vars(small_grid["roofs"]), "read_bandwidth": 1.0})
    if all_of_them:
        small_grid["roofs"] = slow
    else:
        fill = explore_module.fill_point
        monkeypatch.setattr(
            explore_module,
            "fill_point",
            lambda run, point, facts, inputs, roofs, also: fill(
                run, point, facts, inputs, slow if point.n_kv_heads == 1 else roofs, also
            ),
        )
        monkeypatch.setattr(measure, "refreshed", lambda machine, *_: machine)
    code, out, _ = command(*EXPLORE)
    assert code == 1
    assert out.endswith("some points beat their roof and are not believed: see status implausible in the rows\n")
    (path,) = Path("runs").rglob(ROWS)
    timed = [row for row in map(json.loads, path.read_text().splitlines()) if "median" in row]
    beaten = [row for row in timed if all_of_them or row["shape"]["n_kv_heads"] == 1]
    assert {row["status"] for row in beaten} == {"implausible"} and len(timed) >= 15
    assert f" {len(beaten)} implausible" in out and ("MHA" in out) != all_of_them


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_explore_on_a_full_disk(refused: Callable[..., str], command: Command, small_grid: dict[str, Machine]) -> None:
    """Somebody who makes room wants to know that the morning's rows are still there."""
    with full_disk(6000):
        line = refused(*EXPLORE)
    found = re.search(
        r"cannot write to runs/.*/rows\.jsonl: No space left on device; the (\d+) rows before are safe, rerun", line
    )
    assert found and int(found[1]) > 3
    (path,) = Path("runs").rglob(ROWS)
    safe = path.read_bytes()
    assert safe.count(b"\n") == int(found[1]) and safe.endswith(b"\n")
    assert command(*EXPLORE)[0] == 0
    assert path.read_bytes().startswith(safe) and path.read_bytes().count(b"\n") == ALL


def test_explore_beside_a_training(refused: Callable[..., str], small_grid: dict[str, Machine]) -> None:
    """Refused before anything is measured, and without an empty run that the next one would continue."""
    with host.training():
        assert "a training or another timing is running on this machine" in refused(*EXPLORE)
    assert not Path("runs").exists()


def test_explore_of_another_machines_run(refused: Callable[..., str], small_grid: dict[str, Machine]) -> None:
    """A folder that was copied along: two machines under one name."""
    folder = results.run_folder(Path("runs"), host.describe("cpu")["machine"], suffix="-speed")
    with Run(folder):
        pass
    small_grid["roofs"].__class__(**{**vars(small_grid["roofs"]), "name": "another"}).save(folder / "machine.json")
    assert "was begun on another, this is" in refused(*EXPLORE)


def test_prove_memory_shows_what_is_proven_and_goes_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks beside predictions, then a table; the second time nothing is weighed again; time may end it between."""
    one = next(asked for asked in memory.proofs("cpu") if asked["kind"] == "peak")
    shape = {**one["shape"], "dim": 64, "ffn_dim": 173, "vocab_size": 331}
    asked = [{**one, "shape": shape, "context": 7, "batch": batch} for batch in (3, 5)]
    monkeypatch.setattr(memory, "proofs", lambda device: asked)
    code, out, err = command("prove-memory", "--device", "cpu", "--minutes", "0")
    assert code == 0 and "1 planned rows are left: run it again to go on" in out
    assert re.search(r"^ *decode 3×7 +MHA +fp32 +(\d\.\d\d MB) +\1 +.0\.0% +.0\.0% *$", out, re.M)
    code, out, err = command("prove-memory", "--device", "cpu")
    assert code == 0 and "are left" not in out and "[1/2] peak of decode, MHA float32" in err
    path = Path(re.search(r"^rows: (.+)$", out, re.MULTILINE)[1])  # type: ignore[index]
    assert path.parent.name.endswith("-memory") and path.read_bytes().count(b"\n") == 2
    monkeypatch.setattr(report, "PEAK_ERROR", -1.0)
    code, out, _ = command("prove-memory", "--device", "cpu")
    assert code == 1 and "decode MHA fp32 5×7: predicted" in out
    assert path.read_bytes().count(b"\n") == 2
