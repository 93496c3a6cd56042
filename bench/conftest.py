"""What the suites share: the grid as test parameters, one run of rows, and samples replayed through a virtual timer.

pytest-benchmark runs all rounds of one test in one go, which would time arms minutes apart. Here the first test of a
point measures all its arms interleaved; each test then replays its own samples, so that pytest-benchmark's table, JSON
and ``compare`` show interleaved medians. Options: --device --dtype --grid --heads (see ../conftest.py).
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attnlab import host
from attnlab.errors import InputError
from attnlab.explore import arms, fill_point, grid, new_inputs
from attnlab.measure import Point, measure_machine, refreshed
from attnlab.predict.machine import Machine
from attnlab.results import MACHINE, Run, row_key, run_folder

QUICK_CONTEXT = 4096


class VirtualClock:
    """A timer that only the replayed samples advance."""

    __name__ = "samples taken in turn"  # pytest-benchmark names its timer in the JSON
    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = VirtualClock()
FOLDER = pytest.StashKey[Path]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "point" not in metafunc.fixturenames:
        return
    option = metafunc.config.option
    kind = metafunc.module.KIND
    points = [point for point in grid(option.grid, _device(option), option.dtype, option.heads) if point.kind == kind]
    if option.grid == "quick":
        points = [point for point in points if point.context <= QUICK_CONTEXT]
    ids = [f"{p.shape.variant}-ctx{p.context}-b{p.batch}-{arm}-{p.short_dtype}" for p in points for arm in arms()]
    metafunc.parametrize(("point", "arm"), [(point, arm) for point in points for arm in arms()], ids=ids)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "replay" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def _device(option: Any) -> str:
    return host.resolve_device(option.device)


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Iterator[Run]:
    """A fresh run below runs/: what pytest-benchmark shows is also rows that the figures can draw."""
    name = host.describe(_device(pytestconfig.option))["machine"]
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(host.timing())
            opened = stack.enter_context(Run(run_folder(Path("runs"), name, fresh=True, suffix="-bench")))
        except InputError as error:  # once, and not for each of a hundred tests
            pytest.exit(str(error), returncode=2)
        pytestconfig.stash[FOLDER] = opened.folder
        yield opened


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if FOLDER in config.stash:
        terminalreporter.write_line(f"rows: {config.stash[FOLDER]}")


@pytest.fixture(scope="session")
def machine(run: Run, pytestconfig: pytest.Config) -> Machine:
    """This machine's roofs, measured once."""
    measured = measure_machine(_device(pytestconfig.option), tuple(pytestconfig.option.dtype))
    measured.save(run.folder / MACHINE)
    return measured


@pytest.fixture(scope="session")
def measured(run: Run, machine: Machine) -> Callable[[Point, str], dict[str, Any]]:
    """The row of (point, arm); the first arm asked for measures all arms of the point."""
    facts = host.describe(machine.device)
    inputs = new_inputs(facts)
    roofs: dict[tuple[str, int], Machine] = {}

    def row(point: Point, arm: str) -> dict[str, Any]:
        key = row_key(point.configuration(arm, machine.device))
        if key not in run:
            group = point.dtype, point.n_kv_heads
            if group not in roofs:
                roofs[group] = refreshed(machine, point.dtype, point.head_dim)
            fill_point(run, point, facts, inputs, roofs[group])
        return run[key]

    return row


@pytest.fixture
def replay(benchmark: Any) -> Callable[[dict[str, Any]], None]:
    """Hand a measured row to pytest-benchmark; a row without a time is a skip with its reason."""

    def show(row: dict[str, Any]) -> None:
        if row["status"] not in ("ok", "implausible"):
            pytest.skip(f"{row['status']}: {row['reason']}")
        samples = iter(row["samples"])

        def target() -> None:
            CLOCK.now += next(samples)

        shown = ("backend", "picked", "predicted", "fraction_of_roof", "binding", "bytes", "error", "load", "status")
        benchmark.extra_info.update({name: row[name] for name in shown if name in row})
        benchmark.pedantic(target, rounds=len(row["samples"]), iterations=1)
        assert row["status"] == "ok", row["reason"]

    return show
