"""Five ways in which a benchmark of shared heads goes wrong, each made on purpose and timed in turn with the right way.

What each wrong way claims about G, ``attnlab.plots.five_ways_it_goes_wrong`` draws beside what is true. The mistakes
stand here, so that the library holds none of them.

    B batch   T query tokens   S context   H query heads   G KV heads   R = H / G   D head_dim
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import host
from attnlab.attention import attend
from attnlab.errors import divisors
from attnlab.explore import new_inputs
from attnlab.measure import Inputs, Point, clock, decode_step, relative_error, tolerance
from attnlab.measure.clock import interleaved, quartiles
from attnlab.measure.generation import new_model
from attnlab.predict.machine import Machine
from attnlab.results import Run, row_key
from attnlab.shapes import ModelShape, dtype_name, variant_name

WAYS = ("right", "wrong")
ROUNDS, CHUNK = 11, 64  # samples of a way; T where a prompt is read in chunks
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}  # of all but the mistake about dtypes


class Way(NamedTuple):
    """A call to time, and what its row says beside its times."""

    call: Callable[[], object]
    facts: dict[str, Any]


def _decode(rotation: list[tuple[Tensor, Tensor, Tensor]]) -> Way:
    """A decode step's attention, over one (q, k, v) of ``rotation`` after the other; checked before it is timed."""
    turn, (q, k, v) = itertools.cycle(rotation), rotation[0]
    error, allowed = relative_error(attend(q, k, v), q, k, v, causal=False), tolerance(dtype_name(q.dtype))
    assert error <= allowed, f"error {error:.2g}, at most {allowed:.2g} is allowed"
    return Way(lambda: attend(*next(turn)), {"bytes": k.nbytes + v.nbytes, "error": error})


def prefill_in_timer(point: Point, inputs: Inputs) -> tuple[Way, Way]:
    """A step of a small model at S; wrong: the prompt of S tokens is read inside the timer too.
    (The model has one layer: its weights may stay in a cache, and the K and V of few heads, in both ways alike.)"""
    shape = ModelShape(1, 128, point.n_heads, point.n_kv_heads, 64, 512, 512, max_context=point.context + 1)
    model = new_model(shape, point.dtype, inputs.device)
    cache = model.new_cache(point.batch, point.context + 1)
    prompt = torch.zeros(point.batch, point.context, dtype=torch.int64, device=inputs.device)
    step = decode_step(model, point.batch, point.context, cache)

    def prefill_and_step() -> None:
        cache.length = 0
        with torch.inference_mode():
            model.hidden(prompt, cache)
        step()

    prefill_and_step()  # so that the cache holds the prompt
    return Way(step, {"bytes": cache.nbytes}), Way(prefill_and_step, {"bytes": cache.nbytes})


def warm_cache(point: Point, inputs: Inputs) -> tuple[Way, Way]:
    """K and V that come from memory, as at every step of a model; wrong: the same ones again and again."""
    rotation = inputs.rotation(point)
    return _decode(rotation), _decode(rotation[:1])


def float32_label(point: Point, inputs: Inputs) -> tuple[Way, Way]:
    """bfloat16 tensors; wrong: the label says so, the tensors were left in torch's default."""
    return _decode(inputs.rotation(point)), _decode(inputs.rotation(replace(point, dtype="float32")))


def expanded_cache(point: Point, inputs: Inputs) -> tuple[Way, Way]:
    """G heads stored; wrong: K and V are repeated to H heads before they are stored."""
    rotation, size = inputs.rotation(point), point.n_heads // point.n_kv_heads
    repeated = [(q, *(x.repeat_interleave(size, 1) for x in kv)) for q, *kv in rotation[:2]]
    return _decode(rotation), _decode(repeated)


def top_left_mask(point: Point, inputs: Inputs) -> tuple[Way, Way]:
    """The last T of S tokens see all before them; wrong: torch's ``is_causal``, which is aligned top-left, so that they
    see the first T keys at most."""
    rotation = inputs.rotation(point)
    _, k, v = rotation[0]
    turn = itertools.cycle([(k, v) for _, k, v in rotation])
    q = torch.randn(point.batch, point.n_heads, CHUNK, point.head_dim, generator=torch.Generator().manual_seed(0)).to(k)

    def right(k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, causal=True)

    def wrong(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])

    errors = [relative_error(function(k, v), q, k, v, causal=True) for function in (right, wrong)]
    assert errors[0] <= tolerance(point.dtype) < 0.1 < errors[1]
    size = {"bytes": k.nbytes + v.nbytes, "queries": CHUNK}
    return (
        Way(lambda: right(*next(turn)), {**size, "error": errors[0]}),
        Way(lambda: wrong(*next(turn)), {**size, "error": errors[1]}),
    )


# What makes the two ways; (B, S) on the CPU and on CUDA; how many calls a sample takes the mean of
MISTAKES: dict[str, tuple[Callable[[Point, Inputs], tuple[Way, Way]], dict[str, tuple[int, int]], int]] = {
    "prefill-in-timer": (prefill_in_timer, {"cpu": (2, 1024), "cuda": (16, 2048)}, 1),
    "warm-cache": (warm_cache, {"cpu": (1, 512), "cuda": (1, 2048)}, 5),
    "float32-label": (float32_label, {"cpu": (1, 4096), "cuda": (32, 4096)}, 2),
    "expanded-cache": (expanded_cache, {"cpu": (1, 4096), "cuda": (32, 4096)}, 2),
    "top-left-mask": (top_left_mask, {"cpu": (1, 4096), "cuda": (8, 4096)}, 2),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    heads = metafunc.config.option.heads
    groups = [g for g in reversed(divisors(heads)) if g in {heads, 8, 1}]
    cases = list(itertools.product(MISTAKES, groups, WAYS))
    ids = [f"{name}-{variant_name(heads, g)}-{way}" for name, g, way in cases]
    metafunc.parametrize(("name", "groups", "way"), cases, ids=ids)


def test_mistake(
    name: str,
    groups: int,
    way: str,
    run: Run,
    machine: Machine,
    replay: Callable[[Any], None],
    benchmark: Any,
    pytestconfig: pytest.Config,
) -> None:
    device = machine.device
    make, sizes, calls = MISTAKES[name]
    dtype = "bfloat16" if make is float32_label else DTYPE[device]
    point = Point("decode", pytestconfig.option.heads, groups, 128, *sizes[device], dtype)
    keys = {each: row_key(_configuration(name, point, each, device)) for each in WAYS}
    if keys[way] not in run:
        facts = host.describe(device)
        for each, row in zip(WAYS, _measured(make, point, new_inputs(facts), calls), strict=True):
            row["read_bandwidth"] = machine.read_bandwidth
            run.append(keys[each], {**facts, **_configuration(name, point, each, device), **row})
    benchmark.group = f"{name} {point.shape.variant}"
    replay(run[keys[way]])


def _configuration(name: str, point: Point, way: str, device: str) -> dict[str, Any]:
    return {**point.configuration(way, device), "kind": "mistake", "name": name}


def _measured(
    make: Callable[[Point, Inputs], tuple[Way, Way]], point: Point, inputs: Inputs, calls: int
) -> list[dict[str, Any]]:
    """The rows of the right and of the wrong way, timed in turn."""
    ways = dict(zip(WAYS, make(point, inputs), strict=True))
    if inputs.device == "cuda" and calls > 1:  # a replayed graph goes through the rotation whole
        calls = max(10, len(inputs.rotation(point)))
    for way in ways.values():
        way.call()
    busy, load = host.wait_for_quiet(clock.QUIET_SECONDS), host.Load()
    samples = interleaved(
        {name: way.call for name, way in ways.items()}, dict.fromkeys(WAYS, ROUNDS), inputs.device, calls
    )
    rows = []
    for name, way in ways.items():
        q25, median, q75 = quartiles(samples[name])
        times = {"median": median, "q25": q25, "q75": q75, "samples": samples[name], "rounds": ROUNDS}
        rows.append(
            {"status": "ok", "variant": point.shape.variant, **times, **way.facts, "load": load.cores(), "busy": busy}
        )
    return rows
