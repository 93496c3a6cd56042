"""The main job on a grid of minutes cut down to milliseconds: every kind of row, once, and enough in it to doubt it."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from attnlab import explore as explore_module
from attnlab import host
from attnlab.attention import attend, implementations, peers
from attnlab.errors import InputError, divisors
from attnlab.explore import DTYPES, arms, awkward_cases, explore, grid, named_peers
from attnlab.measure import Inputs, Point
from attnlab.model.cache import KVCache
from attnlab.predict.machine import Machine
from attnlab.predict.memory import kv_cache_bytes
from attnlab.results import MACHINE, Run, load_results
from attnlab.shapes import ModelShape

POINTS = [
    Point(kind, 6, g, 8, 2, 37, dtype)
    for dtype, g, kind in itertools.product(("float32", "bfloat16"), (6, 3, 1), ("decode", "prefill"))
]
REAL_INPUTS = explore_module.new_inputs
CUDA_ONLY = {"flex", "triton"}
HUGE = Point("decode", 6, 2, 8, 2**20, 2**30, "float32")


def quick_roofs(device: str, dtypes: tuple[str, ...] = DTYPES) -> Machine:
    """In place of seconds of measuring: roofs that nothing comes near, under this machine's name."""
    return Machine(host.describe(device)["machine"], device, 1e15, 1e15, dict.fromkeys(dtypes, 1e18), 1e-9, 2**40)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore_module, "measure_machine", quick_roofs)
        patch.setattr(explore_module, "refreshed", lambda machine, *_: machine)
        patch.setattr(explore_module, "new_inputs", lambda facts: Inputs(facts["device"], 10_007))
        patch.setattr(host, "wait_for_quiet", lambda seconds: "")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # on a busy machine two threads wait for each other longer than these points take
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, told: list[tuple[str, int, int]]) -> Path:
    """One finished run."""
    folder = tmp_path_factory.mktemp("runs") / "20260101-000000-speed"
    with Run(folder) as run:
        explore(run, [*POINTS, HUGE], "cpu", lambda *step: told.append(step))
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> pandas.DataFrame:
    return load_results(folder)


@pytest.fixture
def few_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what comes after the proofs."""
    monkeypatch.setattr(explore_module, "awkward_cases", lambda: [(12, 4, 64, 3, 17, True)])


# --- the grid -------------------------------------------------------------------------------------------------------


def test_the_quick_grid_is_what_was_promised() -> None:
    """A sweep that leaves out one corner answers one question less, and nobody misses the row."""
    points = grid("quick", "cpu")
    assert len(set(points)) == len(points)
    assert {(p.n_heads, p.head_dim) for p in points} == {(32, 128)}
    decode = {(p.n_kv_heads, p.context, p.batch, p.dtype) for p in points if p.kind == "decode"}
    wanted = itertools.product((32, 8, 4, 1), (1024, 4096, 16384), (1, 4), ("float32", "bfloat16"))
    assert decode == set(wanted)
    prefill = [p for p in points if p.kind == "prefill"]
    assert {p.n_kv_heads for p in prefill} == {32, 8, 4, 1} and {p.dtype for p in prefill} == {"float32", "bfloat16"}
    assert {p.queries for p in prefill} == {256, 512} and all(p.queries == p.context for p in prefill)


def test_points_that_share_roofs_stand_together() -> None:
    """Roofs are measured when (dtype, G) changes: a grid ordered otherwise measures them before every point."""
    for name in ("quick", "full"):
        groups = [key for key, _ in itertools.groupby(grid(name, "cpu"), lambda p: (p.dtype, p.n_kv_heads))]
        assert len(groups) == len(set(groups))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_full_grid_holds_the_quick_one(device: str) -> None:
    """Rows of a quick run must find their partners in a full run, and every divisor its place between the ends."""
    full = grid("full", device, heads=12)
    assert {p.n_kv_heads for p in full} == set(divisors(12))
    assert {p.n_kv_heads for p in grid("quick", device, heads=12)} == {12, 4, 1}
    assert set(grid("quick", device, heads=12)) <= set(full)


def test_a_grid_that_cannot_be_is_one_clear_error() -> None:
    """Better before the roofs are measured than after."""
    with pytest.raises(InputError, match="unknown grid 'quik'; did you mean quick"):
        grid("quik", "cpu")
    with pytest.raises(InputError, match="heads must be between 1"):
        grid("quick", "cpu", heads=0)
    with pytest.raises(InputError, match="unknown dtype 'float31'"):
        grid("quick", "cpu", ["float31"])


# --- the rows -------------------------------------------------------------------------------------------------------


def test_every_point_and_every_arm_is_a_row(rows: pandas.DataFrame) -> None:
    """What cannot run or would not fit is a row too; a hole in a curve looks like choice."""
    assert set(rows["kind"]) == {"correctness", "memory", "decode", "prefill"}
    timed = rows[rows["kind"].isin(["decode", "prefill"])]
    columns = ["kind", "shape.n_kv_heads", "batch", "context", "dtype", "impl"]
    found = set(timed[columns].itertuples(index=False, name=None))
    wanted = {(p.kind, p.n_kv_heads, p.batch, p.context, p.dtype, arm) for p in [*POINTS, HUGE] for arm in arms()}
    assert found == wanted and len(timed) == len(wanted)
    assert set(arms()) == {"reference", "expanded", "sdpa", "grouped", "cpp", "flex", "triton", "auto"}
    for kind, unable in (("decode", CUDA_ONLY), ("prefill", {*CUDA_ONLY, "cpp"})):
        some = timed[(timed["kind"] == kind) & (timed["context"] == 37)]
        status = {arm: set(some[some["impl"] == arm]["status"]) for arm in arms()}
        assert status == {arm: {"unsupported" if arm in unable else "ok"} for arm in arms()}
    huge = rows[rows["context"] == 2**30]
    assert set(huge["status"]) == {"too_big"} and set(huge["kind"]) == {"decode", "memory"}
    failed = rows[rows["status"] != "ok"]
    assert failed["reason"].str.len().gt(10).all() and rows[rows["status"] == "ok"]["reason"].isna().all()


# what a reader needs to redraw a row, and to doubt it
FIELDS = {
    "its name": ["run", "key", "schema"],
    "the question": [
        *("kind", "variant", "shape.n_heads", "shape.n_kv_heads", "shape.head_dim"),
        *("batch", "context", "queries", "dtype"),
    ],
    "the answer": ["impl", "picked", "backend", "median", "q25", "q75", "rounds", "samples", "error", "tolerance"],
    "the prediction": ["predicted", "terms.bandwidth", "terms.compute", "terms.fixed", "binding", "bytes", "flops"],
    "the roofs": ["fraction_of_roof", "read_bandwidth", "copy_bandwidth", "matmul_rate"],
    "the circumstances": ["load", "busy", "threads", "unsteady"],
    "the machine": ["machine", "device", "processor", "cores", "capability", "memory_bytes", "last_level_cache_bytes"],
    "the software": ["os", "python", "torch", "numpy", "commit", "time"],
    "how it ended": ["status"],
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_timed_row_holds_enough_to_redraw_and_to_doubt_it(rows: pandas.DataFrame, fields: list[str]) -> None:
    """What is not in the row when it is written cannot be asked for when it looks odd. Load may be unknown, not
    absent."""
    timed = rows[rows["kind"].isin(["decode", "prefill"]) & (rows["status"] == "ok")]
    assert not set(fields) - set(timed.columns)
    filled = [field for field in fields if field != "load" or host.Load().cores() is not None]
    assert timed[filled].notna().all().all()


def test_correctness_rows_cover_what_can_be_run(rows: pandas.DataFrame, folder: Path) -> None:
    """An implementation that was never compared must not look like one that passed."""
    proofs = rows[rows["kind"] == "correctness"].set_index(["impl", "dtype"])
    assert set(proofs.index) == set(itertools.product(implementations(), ("float32", "bfloat16")))
    for (impl, _), row in proofs.iterrows():
        cases = 0 if impl in CUDA_ONLY else 16 if impl == "cpp" else 48  # a third of the cases has one query
        assert (row["status"], row["cases"]) == ("ok" if cases else "unsupported", cases)
        assert 0 <= row["error"] <= row["tolerance"] and (row["error"] > 0) == (impl not in CUDA_ONLY)
    assert proofs.loc[("flex", "float32"), "reason"].startswith("flex needs CUDA")


def test_peers_are_proved_and_timed_when_they_are_named(few_proofs: None, tmp_path: Path) -> None:
    """A rival that is left out without a word, or timed in a run of its own, says nothing about ours."""
    assert named_peers("") == [] and named_peers("all") == peers() and named_peers("cudnn, flash") == ["cudnn", "flash"]
    with pytest.raises(InputError, match="unknown peer 'flsh'; did you mean flash"):
        named_peers("cudnn,flsh")
    with Run(tmp_path / "run") as run:
        explore(run, POINTS[:1], "cpu", also=["flash"])
    rows = load_results(tmp_path / "run")
    assert sorted(rows[rows["impl"] == "flash"]["kind"]) == ["correctness", "decode"]
    assert set(rows[rows["impl"] == "flash"]["status"]) == {"unsupported"}
    assert set(rows[rows["kind"] == "decode"]["impl"]) == {*arms(), "flash"}


def test_the_awkward_cases_are_awkward() -> None:
    """G of 1 and H alone, T = S alone, or no mask at all, and every known mistake passes."""
    cases = list(awkward_cases())
    assert {(H, G) for H, G, *_ in cases} == {(12, 1), (12, 2), (12, 3), (12, 4), (12, 6), (12, 12), (7, 1), (7, 7)}
    assert {causal for *_, causal in cases} == {True, False}
    kinds = {("one" if T == 1 else "past" if T < S else "none", causal) for _, _, _, T, S, causal in cases}
    assert len(kinds) == 6


def test_an_implementation_that_is_wrong_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No number on a red check. The mistake here is a mask aligned top-left, which only T < S can show."""

    def top_left(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        if options["impl"] == "grouped" and options["causal"] and q.shape[2] > 1:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return attend(q, k, v, **options)

    monkeypatch.setattr(explore_module, "attend", top_left)
    with Run(tmp_path / "r") as run:
        with pytest.raises(
            AssertionError, match=r"grouped float32: error .* at H=12 G=1 D=64 T=3 S=17 causal=True, at"
        ):
            explore(run, POINTS[:1], "cpu")
        assert {row["impl"] for row in run.rows} == {"reference", "expanded", "sdpa"}


def test_caches_are_weighed(rows: pandas.DataFrame) -> None:
    """Predicted bytes are only worth something beside the bytes of a cache that exists."""
    memory = rows[(rows["kind"] == "memory") & (rows["status"] == "ok")]
    assert len(memory) == 6
    assert (memory["allocated_bytes"] == memory["predicted_bytes"]).all()
    for row in memory.to_dict("records"):
        by_hand = 2 * 2 * 2 * row["shape.n_kv_heads"] * 37 * 8 * (4 if row["dtype"] == "float32" else 2)
        assert row["allocated_bytes"] == by_hand  # K and V, two layers, two sequences
    too_big = rows[(rows["kind"] == "memory") & (rows["status"] == "too_big")]
    shape = ModelShape(2, 1, 6, 2, 8, 1, 1)
    assert list(too_big["predicted_bytes"]) == [kv_cache_bytes(shape, 2**20, 2**30, "float32")]


@pytest.mark.usefixtures("few_proofs")
def test_a_cache_that_is_not_what_was_predicted_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row with two different numbers and the status "ok" would be read by nobody."""

    class Rounded(KVCache):
        def __init__(self, shape: ModelShape, batch: int, capacity: int, *more: Any) -> None:
            super().__init__(shape, batch, -(-capacity // 64) * 64, *more)

    monkeypatch.setattr(explore_module, "KVCache", Rounded)
    with (
        Run(tmp_path / "r") as run,
        pytest.raises(AssertionError, match="MHA decode ctx37 b2 fp32: a cache of 98304 by"),
    ):
        explore(run, POINTS[:1], "cpu")


# --- going on -------------------------------------------------------------------------------------------------------


def test_progress_names_every_step(folder: Path, told: list[tuple[str, int, int]]) -> None:
    """Minutes without a word look like a hang."""
    proofs = 2 * len(implementations())
    total = proofs + 7 + 13
    assert [done for _, done, _ in told] == [0, *range(total)] and {step[2] for step in told} == {total}
    words = [what for what, _, _ in told]
    assert words[0] == "roofs of this machine" and words[1] == "correctness reference float32"
    assert words[1 + proofs] == "cache bytes MHA decode ctx37 b2 fp32" and words[-2] == "MQA prefill ctx37 b2 bf16"


def test_a_second_call_adds_nothing(folder: Path, rows: pandas.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming that measures again never ends, and gives each point two answers."""
    before = (folder / "rows.jsonl").read_bytes(), (folder / MACHINE).read_bytes()
    monkeypatch.setattr(explore_module, "measure_machine", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(explore_module, "measure_point", lambda *_: pytest.fail("measured again"))
    with Run(folder) as run:
        assert explore(run, [*POINTS, HUGE], "cpu") == quick_roofs("cpu")
    assert ((folder / "rows.jsonl").read_bytes(), (folder / MACHINE).read_bytes()) == before


def test_only_missing_arms_are_measured(folder: Path, rows: pandas.DataFrame, tmp_path: Path) -> None:
    """A kill between two rows of one point must cost these rows and no others."""
    lines = (folder / "rows.jsonl").read_bytes().splitlines(keepends=True)
    lost = [i for i, line in enumerate(lines) if json.loads(line)["kind"] == "decode"][8:11]
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "rows.jsonl").write_bytes(b"".join(line for i, line in enumerate(lines) if i not in lost))
    with Run(tmp_path / "r") as run:
        explore(run, [*POINTS, HUGE], "cpu")
        assert [row["key"] for row in run.rows[-3:]] == [json.loads(lines[i])["key"] for i in lost]
        assert len(run.rows) == len(lines)


def test_a_run_of_another_machine_is_refused(tmp_path: Path) -> None:
    """A folder copied along with a clone would mix two machines' rows under one name."""
    other = Machine("another-8c-avx512", "cpu", 1.0, 1.0, {"float32": 1.0}, 1.0, 1)
    with Run(tmp_path / "r") as run:
        other.save(run.folder / MACHINE)
        with pytest.raises(
            InputError, match=r"r was begun on another-8c-avx512, this is .*; start another run with --fr"
        ):
            explore(run, POINTS[:1], "cpu")
        assert run.rows == []


@pytest.mark.usefixtures("few_proofs")
def test_dtypes_may_be_added_to_a_run(tmp_path: Path) -> None:
    """A run begun with ``--dtypes float32`` and continued without: its roofs know no bfloat16, and on CUDA no point of
    it could be predicted."""
    with Run(tmp_path / "r") as run:
        first = explore(run, POINTS[:1], "cpu")
        assert set(first.matmul_rate) == {"float32"}
        second = explore(run, [POINTS[0], POINTS[6]], "cpu")
        assert second == dataclasses.replace(first, matmul_rate={"float32": 1e18, "bfloat16": 1e18})
        assert Machine.load(run.folder / MACHINE) == second


@pytest.mark.usefixtures("few_proofs")
def test_each_group_of_points_has_its_own_roofs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that slows down during a sweep makes its last points inefficient, unless its roofs are measured beside
    each group."""
    fresh = itertools.count(2)
    monkeypatch.setattr(
        explore_module,
        "refreshed",
        lambda machine, *_: dataclasses.replace(machine, read_bandwidth=next(fresh) * 1e15),
    )
    with Run(tmp_path / "r") as run:
        explore(run, POINTS, "cpu")
        timed = [row for row in run.rows if row["kind"] in ("decode", "prefill") and row["status"] == "ok"]
    found = {(row["dtype"], row["shape"]["n_kv_heads"], row["read_bandwidth"]) for row in timed}
    groups = itertools.product(("float32", "bfloat16"), (6, 3, 1))
    assert found == {(*group, (2 + i) * 1e15) for i, group in enumerate(groups)}


def test_rotation_goes_past_the_last_level_cache() -> None:
    """With one copy of K and V the cache is measured instead of the memory."""
    facts = host.describe("cpu")
    assert REAL_INPUTS(facts).rotation_bytes >= 2 * facts["last_level_cache_bytes"]
    assert REAL_INPUTS(facts | {"device": "cuda"}).rotation_bytes >= 250 * 10**6  # five times the L2 of a large card
