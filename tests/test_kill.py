"""A sweep that is killed again and again loses no row, writes none twice, and ends with every row of its plan."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import attnlab
from attnlab.attention import implementations
from attnlab.explore import arms
from attnlab.measure import Point
from attnlab.results import PLAN, ROWS, row_key

ROOT = Path(attnlab.__file__).parents[1]
SEED, KILLS, BEFORE_THE_FIRST_ROW = 20261124, 20, 2
POINTS = [Point("decode", 4, g, 16, 1, 64 + 7 * i, "float32") for g in (4, 2, 1) for i in range(14)]

# `attnlab explore` without its tables, on the points above. It forks a fresh sweep for every line it reads, so that
# each costs no import, names it, and says how it ended.
SWEEPS = f"""
import os, sys
from attnlab import host
from attnlab.measure import clock
from attnlab.explore import explore
from attnlab.measure import Point
from attnlab.results import Run

clock.QUIET_SECONDS = 0.0  # a busy machine makes bad times here, and they are not looked at

def sweep():
    with host.timing(), Run(sys.argv[1]) as run:
        explore(run, {POINTS!r}, "cpu")

for line in sys.stdin:
    child = os.fork()
    if not child:
        sweep()
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def planned() -> set[str]:
    """The key of every row that the sweep is asked for."""
    proofs = [{"kind": "correctness", "impl": impl, "dtype": "float32", "device": "cpu"} for impl in implementations()]
    caches = [{**point.configuration("cache", "cpu"), "kind": "memory"} for point in POINTS]
    calls = [point.configuration(arm, "cpu") for point, arm in itertools.product(POINTS, arms())]
    return {row_key(configuration) for configuration in [*proofs, *caches, *calls]}


class Sweeps:
    """The process that starts sweeps of ``folder``, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.rows = folder / ROWS
        # a folder of its own for the lock that keeps trainings and timings apart on this machine
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder.parent)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SWEEPS, str(folder)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Sweeps":
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:  # closes its input, upon which it ends
            pass

    def start(self) -> int:
        """The process id of a new sweep."""
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> int:
        """How the sweep ended, as ``waitpid`` puts it."""
        return self._answer()

    def _answer(self) -> int:
        assert self.process.stdout
        return int(self.process.stdout.readline())

    def whole(self) -> bytes:
        """What is on disk of whole rows."""
        content = self.rows.read_bytes() if self.rows.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    def wait_for(self, count: int) -> None:
        """Until that many rows are on disk, or the sweep cannot be on its way any more."""
        patience = time.monotonic() + 60
        while self.whole().count(b"\n") < count:
            assert time.monotonic() < patience, f"no {count} rows after a minute"
            time.sleep(0.001)


@pytest.mark.slow
def test_killed_at_twenty_points_and_rerun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep takes minutes to hours and is killed by closed laptops and full queues: a row lost is a hole, a row twice
    counts twice, and a row changed afterwards is another measurement under the same name. After every fourth kill half
    a row is left behind as well, as a power cut leaves it."""
    draw = random.Random(SEED)
    plan = planned()
    inside, kept = 0, b""
    points = []
    with Sweeps(tmp_path / "run") as sweeps:
        for kill in range(KILLS):
            child = sweeps.start()
            if kill < BEFORE_THE_FIRST_ROW:
                time.sleep(draw.uniform(0, 0.5))
            else:
                sweeps.wait_for(kept.count(b"\n") + draw.randint(1, 8))
                time.sleep(draw.uniform(0, 0.004))  # the six rows of a point take about as long
            os.kill(child, signal.SIGKILL)
            assert sweeps.end() == signal.SIGKILL
            now = sweeps.whole()
            assert now.startswith(kept), "a row that was on disk is gone, or another"
            kept, count = now, now.count(b"\n")
            inside += 0 < count < len(plan)
            points.append(f"{count} rows, {sweeps.rows.stat().st_size if sweeps.rows.exists() else 0} bytes")
            if kill % 4 == 3 and count:
                with sweeps.rows.open("ab") as file:
                    file.write(kept[: draw.randint(1, 900)].split(b"\n")[0])
                points[-1] += " + half a row"
        with capsys.disabled():
            print(f"\nkilled (seed {SEED}) at: {'; '.join(points)}")
        assert inside >= 15

        for _ in range(2):  # to its end, and once more
            sweeps.start()
            assert sweeps.end() == 0
            ended = sweeps.rows.read_bytes()
            assert ended.startswith(kept) and ended.endswith(b"\n")
            rows = [json.loads(line) for line in ended.splitlines()]
            assert len(rows) == len(plan) and {row["key"] for row in rows} == plan
            assert set((tmp_path / "run" / PLAN).read_text().split()) == plan  # what publishing asks for
            assert {row["status"] for row in rows} <= {"ok", "unsupported", "implausible"}
            kept = ended
