"""Samples: in turn, as many as asked for, and their quartiles."""

import time
from collections.abc import Callable

import pytest
import torch

from attnlab.measure.clock import interleaved, quartiles

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only what is timed advances, by the returned function."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    return spend


def test_arms_take_turns() -> None:
    """All of A, then all of B: a machine that slows down in between decides who wins."""
    calls: list[str] = []
    arms = {name: (lambda name=name: calls.append(name)) for name in "ABC"}
    seconds = interleaved(arms, {"A": 4, "B": 4, "C": 2}, "cpu")
    assert "".join(calls) == "ABCABCABAB"
    assert {name: len(samples) for name, samples in seconds.items()} == {"A": 4, "B": 4, "C": 2}
    assert all(sample > 0 for samples in seconds.values() for sample in samples)


def test_each_sample_is_that_calls_own_time(virtual: Callable[[float], None]) -> None:
    """A sample that includes its neighbour, or lands in its neighbour's list, makes the arms look alike."""
    counted = iter(range(1, 100))
    arms = {"A": lambda: virtual(next(counted)), "B": lambda: virtual(100 * next(counted))}
    assert interleaved(arms, {"A": 3, "B": 2}, "cpu") == {"A": [1, 3, 5], "B": [200, 400]}


def test_a_sample_of_several_calls_is_per_call(virtual: Callable[[float], None]) -> None:
    """Forgetting to divide is a machine eight times slower."""
    counted = iter([1.0, 2.0, 6.0, 5.0, 7.0, 9.0])
    assert interleaved({"A": lambda: virtual(next(counted))}, {"A": 2}, "cpu", 3) == {"A": [3.0, 7.0]}


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([3.0, 1.0, 2.0, 5.0, 4.0], (2.0, 3.0, 4.0)),
        ([4.0, 1.0, 3.0, 2.0], (1.75, 2.5, 3.25)),
        ([7.0] * 20, (7.0, 7.0, 7.0)),
        ([float(i) for i in range(1, 21)], (5.75, 10.5, 15.25)),
    ],
)
def test_quartiles_of_known_samples(samples: list[float], expected: tuple[float, float, float]) -> None:
    """Worked by hand with linear interpolation between ranks, as numpy does; unsorted, as samples come."""
    assert quartiles(samples) == pytest.approx(expected)
    assert list(quartiles(samples)) == pytest.approx(torch.tensor(samples).quantile(torch.tensor([0.25, 0.5, 0.75])))


@pytest.mark.parametrize("device", DEVICES)
def test_samples_are_real_work_on_the_device(device: str) -> None:
    """On CUDA a launch from Python costs more than a small kernel takes, so a sample is a graph of all calls, replayed:
    what was captured but never replayed, or replayed once for all samples, would be a very fast kernel."""
    done = torch.zeros((), device=device)
    seconds = interleaved({"A": lambda: done.add_(1)}, {"A": 5}, device, calls_per_sample=4)
    assert int(done) == 5 * 4 + (3 if device == "cuda" else 0)  # 3 to warm up the graph's own stream
    assert len(seconds["A"]) == 5 and all(0 < sample < 1 for sample in seconds["A"])
