"""How ``auto`` ranks the arms: by the table of measured seconds where it has an entry, by the stated rule elsewhere.

Tables here are made by hand, with arms in orders that no machine has; the committed one is held to its own numbers.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnlab.attention import auto, implementations, picked

Table = dict[str, list[dict[str, Any]]]
Use = Callable[..., None]


def entry(
    group_size: int, context: int, kind: str = "decode", dtype: str = "float32", **seconds: float
) -> dict[str, Any]:
    return {"kind": kind, "dtype": dtype, "group_size": group_size, "context": context, "seconds": seconds}


def call(group_size: int, context: int, kind: str = "decode", dtype: str = "float32") -> tuple[Tensor, Tensor]:
    """q and k of such a call, without memory."""
    tokens = 1 if kind == "decode" else 2
    sizes = (1, 2 * group_size, tokens, 8), (1, 2, context, 8)
    return tuple(torch.empty(size, dtype=getattr(torch, dtype), device="meta") for size in sizes)  # type: ignore[return-value]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Put a table in the place of the committed one, on a machine that can do what ``able`` says."""

    def put(table: Table, able: str = "here") -> None:
        monkeypatch.setattr(auto, "table", lambda: table)
        monkeypatch.setattr(auto, "capability", lambda device: able)
        auto._ranked.cache_clear()

    yield put
    monkeypatch.undo()
    auto._ranked.cache_clear()


def first(*asked: Any) -> str:
    return auto.ranked(*call(*asked), True)[0]


# --- the table ------------------------------------------------------------------------------------------------------


def test_arms_are_ranked_by_their_seconds(use: Use) -> None:
    """Not by their place in the file, nor by their names; behind all of them stands the arm that takes every call."""
    use({"here": [entry(2, 1024, cpp=0.03, sdpa=0.011, grouped=0.2, expanded=0.02, flex=0.012)]})
    assert auto.ranked(*call(2, 1024), True) == ("sdpa", "flex", "expanded", "cpp", "grouped", "grouped")
    use({"here": [entry(2, 1024, sdpa=0.2, expanded=0.1)]})
    assert auto.ranked(*call(2, 1024), True) == ("expanded", "sdpa", "grouped")


def test_the_nearest_entry_counts(use: Use) -> None:
    """Nearest in doublings of R and of S: 3,000 tokens are nearer to 4,096 than to 1,024, and R = 7 to 8."""
    arms = {(1, 1024): "cpp", (1, 4096): "sdpa", (8, 1024): "expanded", (8, 4096): "flex"}
    use({"here": [entry(*at, **{arm: 0.1, "grouped": 0.2}) for at, arm in arms.items()]})
    for R, S, expected in (
        (1, 1, "cpp"), (2, 1024, "cpp"), (1, 1400, "cpp"), (1, 3000, "sdpa"), (2, 10**6, "sdpa"),
        (7, 1024, "expanded"), (4, 300, "expanded"), (64, 5, "expanded"), (4, 3000, "flex"), (71, 8191, "flex"),
    ):  # fmt: skip
        assert first(R, S) == expected, (R, S)


def test_an_entrys_own_call_takes_it_wherever_it_stands(use: Use) -> None:
    """Rounding S down to a power of two, plus a half, put 1,024 as near to the entry of 2,048 as to its own, and the
    order of the file decided."""
    points = list(itertools.product((1, 2, 4, 8, 32), (128, 256, 512, 1024, 2048, 4096, 32768)))
    for seed in range(3):
        random.Random(seed).shuffle(points)
        entries = [entry(R, S, **{f"arm {R} {S}": 0.1}) for R, S in points]
        use({"here": entries})
        for R, S in points:
            assert first(R, S) == f"arm {R} {S}"


def test_another_dtype_kind_or_machine_goes_by_the_rule(use: Use) -> None:
    """torch's bfloat16 arms on a CPU are ten times slower than its float32 ones: one dtype's order says nothing about
    another's, nor decoding's about a prompt's, nor one machine's about another."""
    use({"here": [entry(2, 1024, expanded=0.1)], "there": [entry(2, 1024, "prefill", sdpa=0.1)]})
    assert first(2, 1024) == "expanded"
    assert auto.ranked(*call(2, 1024, "decode", "bfloat16"), True) == ("cpp", "grouped")
    assert auto.ranked(*call(2, 1024, "prefill"), True) == ("grouped",)
    use({"there": [entry(2, 1024, expanded=0.1)]})
    assert auto.ranked(*call(2, 1024), True) == ("cpp", "grouped")


def test_an_arm_that_cannot_run_is_passed_over(use: Use) -> None:
    """A table made on another machine of this kind, or an input that wants gradients: ``auto`` may choose, never
    refuse."""
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    use({"here": [entry(2, 64, flex=0.1, triton=0.2, expanded=0.3, cpp=0.4)]})
    assert picked(q, k, v) == "expanded"
    use({"here": [entry(2, 64, flex=0.1, cpp=0.2, triton=0.3)]})
    assert picked(q.requires_grad_(), k, v) == "grouped"
    use({"here": [entry(2, 64, cpp=0.2, sdpa=0.3)]})
    assert picked(q, k, v) == "sdpa"


# --- the rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("able", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
def test_cards_with_flash(able: str, use: Use) -> None:
    """ "sm_100" is less than "sm_80" to a comparison of strings, and so the newest cards lost flash."""
    use({})
    assert auto._ranked(able, "decode", "bfloat16", 4, 10, True) == ("sdpa", "grouped")
    assert auto._ranked(able, "prefill", "bfloat16", 4, 10, False) == ("grouped",)


def test_cards_without_flash(use: Use) -> None:
    """Before Ampere SDPA with enable_gqa takes the math path, which repeats K and V."""
    use({})
    for able in ("sm_70", "sm_75"):
        assert auto._ranked(able, "prefill", "float16", 4, 10, True) == ("grouped",)


def test_capability_of_this_cpu() -> None:
    """The key of the table: what is asked is the processor, by the names that torch has for it."""
    named, _, native = auto.capability(torch.device("cpu")).partition("+")
    assert named == torch.backends.cpu.get_cpu_capability().lower()
    assert native in ("", "bf16")


# --- the committed table --------------------------------------------------------------------------------------------


def faults(table: Table, use: Use) -> list[str]:
    """What is wrong with a table: arms that do not exist, and calls of its own whose arm is, by its own seconds, more
    than 10 % slower than the best."""
    found = []
    for able, entries in table.items():
        use(table, able)
        for own in entries:
            seconds = own["seconds"]
            found += [f"{name} does not exist: {own}" for name in seconds.keys() - {*implementations()}]
            chosen = first(own["group_size"], own["context"], own["kind"], own["dtype"])
            if not seconds.get(chosen, math.inf) <= 1.1 * min(seconds.values()):
                found.append(f"{able} takes {chosen}: {own}")
    return found


def test_the_committed_table_agrees_with_itself(use: Use) -> None:
    """An ``auto`` that takes what its own measurements call slow is worse than a rule. A table grows by hand-picked
    runs: two entries for one call, or a name that has gone, are noticed here."""
    committed = auto.table()
    assert isinstance(committed, dict)
    assert faults(committed, use) == []


def test_a_table_that_contradicts_itself_is_noticed(use: Use) -> None:
    """The check above holds nothing while the table is empty: these are what it must see, and what it must let pass."""
    near = [entry(2, 1024, cpp=0.10, sdpa=0.20), entry(2, 1100, cpp=0.109, sdpa=0.10)]
    assert faults({"here": near}, use) == []
    far = [entry(2, 1024, cpp=0.10, sdpa=0.20), entry(2, 1100, cpp=0.12, sdpa=0.10)]
    assert len(faults({"there": near, "here": far}, use)) == 1
    assert len(faults({"here": [entry(2, 1024, cpp=0.1), entry(2, 1024, cpp=0.2, sdpa=0.1)]}, use)) == 1
    assert len(faults({"here": [entry(2, 1024, cpp=0.1, ccp=0.2)]}, use)) == 1
