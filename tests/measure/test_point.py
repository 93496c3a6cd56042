"""What is timed: its name, its inputs and the memory it needs."""

import itertools
import json

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attnlab.attention import attend
from attnlab.errors import InputError
from attnlab.measure.point import Inputs, Point
from attnlab.predict.machine import Machine
from attnlab.predict.time import predict_decode, predict_prefill
from attnlab.shapes import ELEMENT_BYTES

ROTATION = 100_003
# fits the rotation many times, a few times, not once
POINTS = {
    "small": Point("decode", 6, 3, 10, 2, 7, "bfloat16"),
    "fp32": Point("decode", 6, 3, 10, 2, 7, "float32"),
    "prefill": Point("prefill", 6, 2, 14, 3, 11, "float32"),
    "half": Point("decode", 7, 7, 22, 5, 61, "float16"),
    "large": Point("decode", 6, 1, 62, 5, 211, "float32"),
}
each_point = pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)


# --- inputs ---------------------------------------------------------------------------------------------------------


def _bytes(copy: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in copy)


@each_point
def test_a_copy_is_cold_when_its_turn_comes_again(point: Point) -> None:
    """A cache of K and V that stays in the processor's own cache is read at that cache's speed, and the bytes that
    sharing saves then cost next to nothing."""
    rotation = Inputs("cpu", ROTATION).rotation(point)
    each = _bytes(rotation[0])
    between = (len(rotation) - 1) * each  # what the others move through the cache before this one's turn
    assert between >= ROTATION or (len(rotation) == 1 and each >= ROTATION)
    assert between <= ROTATION + 2 * each  # memory is not ours to waste either


@each_point
def test_copies_do_not_overlap(point: Point) -> None:
    """Views that share memory warm each other."""
    pieces = [piece for copy in Inputs("cpu", ROTATION).rotation(point) for piece in copy]
    assert all(piece.is_contiguous() for piece in pieces)
    spans = sorted((piece.data_ptr(), piece.data_ptr() + piece.nbytes) for piece in pieces)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@each_point
def test_tensors_are_what_the_label_says(point: Point) -> None:
    """A label that says bf16 over tensors in fp32 has been published elsewhere. One ``Inputs`` serves a whole sweep, so
    it must not hand on the last point's dtype."""
    inputs = Inputs("cpu", ROTATION)
    for other in POINTS.values():
        for p in (point, other):
            q, k, v = inputs.rotation(p)[-1]
            assert {x.dtype for x in (q, k, v)} == {getattr(torch, p.dtype)}
            assert {x.element_size() for x in (q, k, v)} == {ELEMENT_BYTES[p.dtype]}
            assert q.shape == (p.batch, p.n_heads, p.context if p.kind == "prefill" else 1, p.head_dim)
            assert k.shape == v.shape == (p.batch, p.n_kv_heads, p.context, p.head_dim)


def test_inputs_are_random_and_every_head_is_another() -> None:
    """With all-ones, or one head repeated, a wrong implementation gives the right answer."""
    q, k, v = (x.double() for x in Inputs("cpu", ROTATION).rotation(POINTS["large"])[0])
    for x in (q, k, v):
        assert abs(float(x.mean())) < 0.1 and abs(float(x.std()) - 1) < 0.1
    rows = torch.cat([x.flatten(0, 1)[:, 0] for x in (q, k, v)])  # each head's first token
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert all(
        map(torch.equal, Inputs("cpu", 1).rotation(POINTS["fp32"])[0], Inputs("cpu", 1).rotation(POINTS["fp32"])[0])
    )


def test_memory_is_kept_between_points() -> None:
    """Drawing gigabytes of random numbers again for each of a hundred points takes longer than timing them."""
    inputs = Inputs("cpu", ROTATION)
    first = inputs.rotation(POINTS["large"])[0][0].data_ptr()
    assert inputs.rotation(POINTS["fp32"])[0][0].data_ptr() == first


# --- what it needs and what it is called ----------------------------------------------------------------------------


def _peak_bytes(point: Point, impl: str) -> int:
    """Inputs, and the most that one call holds beside them, by torch's own allocation events."""
    q, k, v = Inputs("cpu", 1).rotation(point)[0]
    causal = point.kind == "prefill"
    attend(q, k, v, causal=causal, impl=impl)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        output = attend(q, k, v, causal=causal, impl=impl)
    assert output.shape == q.shape
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return _bytes((q, k, v)) + peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_kv_heads", [12, 4, 1], ids=["MHA", "GQA-4", "MQA"])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("impl", ["reference", "expanded", "grouped"])
def test_needed_bytes_are_what_the_call_allocates(impl: str, kind: str, n_kv_heads: int, dtype: str) -> None:
    """Too little, and a point that is tried takes the machine down; too much, and one that fits becomes ``too_big``.
    Repeating a single head costs nothing: torch makes it a view. Only a kernel's scratch is left out."""
    point = Point(kind, 12, n_kv_heads, 62, 2, 331 if kind == "prefill" else 2003, dtype)
    needed, real = point.needed_bytes(impl), _peak_bytes(point, impl)
    scratch = 0 if impl == "reference" else 2**18 * torch.get_num_threads()
    assert real - scratch <= needed <= real + 2 * point.context


def test_bigger_than_any_memory_is_only_a_number() -> None:
    """Whether a point fits is asked before anything is allocated."""
    point = Point("prefill", 32, 1, 128, 1024, 2**20, "float32")
    assert point.needed_bytes("reference") > 2 * 1024 * 32 * 2**40 * 4
    assert point.needed_bytes("reference") > point.needed_bytes("expanded") == point.needed_bytes("auto") > 2**40


@pytest.mark.parametrize(
    ("point", "label"),
    [
        (Point("decode", 32, 8, 128, 1, 4096, "bf16"), "GQA-8 decode ctx4096 b1 bf16"),
        (Point("prefill", 7, 7, 11, 3, 5, torch.float32), "MHA prefill ctx5 b3 fp32"),  # type: ignore[arg-type]
        (Point("decode", 7, 1, 11, 3, 5, "half"), "MQA decode ctx5 b3 fp16"),
    ],
)
def test_labels(point: Point, label: str) -> None:
    """The progress bar, errors and ids show it; a dtype under two names would be two points."""
    assert point.label == label


def test_a_configuration_holds_what_makes_a_point_another() -> None:
    """What is left out of a key makes two points share it, and the second is never measured."""
    base = {"kind": "decode", "n_heads": 6, "n_kv_heads": 3, "head_dim": 10, "batch": 2, "context": 7}
    changes = [{"kind": "prefill"}, {"n_heads": 9}, {"n_kv_heads": 1}, {"head_dim": 11}, {"batch": 1}, {"context": 8}]
    points = [Point(**(base | change), dtype="float32") for change in [{}, *changes]]  # type: ignore[arg-type]
    points.append(Point(**base, dtype="bfloat16"))  # type: ignore[arg-type]
    configurations = [point.configuration("grouped", "cpu") for point in points]
    configurations += [points[0].configuration("sdpa", "cpu"), points[0].configuration("grouped", "cuda")]
    assert len({json.dumps(configuration, sort_keys=True) for configuration in configurations}) == 10
    assert configurations[0]["shape"] == {"n_heads": 6, "n_kv_heads": 3, "head_dim": 10}
    assert (configurations[0]["queries"], configurations[1]["queries"]) == (1, 7)


def test_a_point_is_predicted_as_its_kind() -> None:
    """A prefill predicted as a decode step is off by the length of the prompt."""
    machine = Machine("m", "cpu", 1e9, 1e9, {"float32": 1e9}, 1e-6, 2**30)
    for point, function in ((POINTS["fp32"], predict_decode), (POINTS["prefill"], predict_prefill)):
        expected = function(point.shape, machine, point.batch, point.context, "float32", impl="expanded")
        assert point.predict(machine, "expanded") == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "train"}, "unknown kind 'train'; valid: decode, prefill"),
        ({"n_kv_heads": 4}, "n_kv_heads=4 does not divide n_heads=6; valid: 1, 2, 3, 6"),
        ({"batch": 0}, "batch must be between 1"),
        ({"context": -1}, "context must be between 1"),
        ({"context": 1.5}, "context must be a whole number"),
        ({"head_dim": 0}, "head_dim must be between 1"),
        ({"dtype": "float31"}, r"unknown dtype 'float31'; did you mean float32"),
    ],
)
def test_bad_points_are_one_clear_error(changes: dict[str, object], message: str) -> None:
    """Better now than in the middle of a sweep."""
    base = {
        "kind": "decode",
        "n_heads": 6,
        "n_kv_heads": 3,
        "head_dim": 10,
        "batch": 2,
        "context": 7,
        "dtype": "float32",
    }
    with pytest.raises(InputError, match=message):
        Point(**(base | changes))  # type: ignore[arg-type]
