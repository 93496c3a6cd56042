"""What is said of a model's KV heads: every number beside one worked out by hand, never beside the code's own."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest

from attnlab import explain
from attnlab.errors import InputError
from attnlab.predict.machine import Machine
from attnlab.shapes import ModelShape

ROOT = Path(explain.__file__).parents[1]
LLAMA = ModelShape.published("llama-2-70b")
H200 = Machine.published("h200")
# Reads and multiplies in no time, so that a step costs 8 calls of a millisecond in each layer and nothing else.
CALLS_ONLY = Machine("clock", "cpu", 1e24, 1e24, {"bfloat16": 1e30}, 1e-3, 2**30)
SMALL = ModelShape(2, 24, 6, 2, 10, 34, 58, max_context=512, name="small")


def test_memory_of_llama_2_70b_by_hand() -> None:
    """2 · 80 layers · 8 heads · 128 · 2 bytes are 320 KiB, 4,096 of them 1.25 GiB; a factor of two lost (K and V, or
    the bytes of an element) would go unseen beside the library's own formula."""
    heads, token, cache, crossover = explain.memory(LLAMA, 4096)
    assert heads == "llama-2-70b is GQA-8: 64 query heads read 8 KV heads, R = 8 to each."
    assert token == "A token adds 320 KiB of bfloat16 to the KV cache; MHA 2,560 KiB (8×); MQA 40 KiB (0.125×)."
    assert cache == (
        "4,096 tokens are 1.25 GiB of cache per sequence; MHA 10.00 GiB; MQA 0.16 GiB; beside 128.48 GiB of weights."
    )
    read = 2 * (68_976_648_192 - 32_000 * 8192)  # every weight but the table of embeddings
    assert f"holds {read / (320 * 1024):,.0f} tokens" in crossover


@pytest.mark.parametrize(("kv_heads", "others"), [(64, ["MQA"]), (1, ["MHA"]), (8, ["MHA", "MQA"])])
def test_a_model_is_not_set_beside_itself(kv_heads: int, others: list[str]) -> None:
    """ "MHA 1× MHA" is a line about nothing."""
    shape = LLAMA.with_kv_heads(kv_heads)
    card = replace(H200, memory_bytes=10**12)
    lines = [*explain.memory(shape, 4096), *explain.speed(shape, card, 4096, None, "bfloat16")]
    for end in ("MHA", "MQA"):
        assert any(f"; {end} " in line for line in lines[1:3]) == (end in others)
    assert [line.split(",")[0] for line in lines[5:]] == [shape.variant, *others]
    assert "(" not in lines[5].partition("predicted")[2]  # no ratio to itself


def test_a_context_beyond_the_models_own_is_said() -> None:
    """Bytes can be counted for any context; that a model answers there is another matter."""
    assert (
        "32,768 tokens, beyond the 4,096 that the model was made for, are 10.00 GiB" in explain.memory(LLAMA, 32768)[2]
    )
    assert "beyond" not in explain.memory(LLAMA, 4096)[2]


def test_what_fits_and_how_long_it_takes_by_hand() -> None:
    """On an H200: 141 GB less the weights hold two sequences of 1.25 GiB. A step reads the weights and both, at 4.8
    TB/s, and makes 640 calls of 5 µs; q and the output are the last digit. A batch taken from another variant, or a
    step of one layer, would be off by factors."""
    room, own, mqa = explain.speed(LLAMA, H200, 4096, None, "bfloat16")
    weights, cache = 2 * 68_976_648_192, 4096 * 320 * 1024
    assert (141 * 10**9 - weights) // cache == 2
    assert room.endswith("sequences that fit: GQA-8 2, MHA 0, MQA 32.") and "h200 holds 131.3 GiB" in room
    milliseconds = 1e3 * ((weights - 2 * 32_000 * 8192 + 2 * cache) / 4.8e12 + 80 * 8 * 5e-6)
    step, total, each = (float(found) for found in re.findall(r"([\d.]+) (?:ms|tokens/s|for each)", own))
    assert step == pytest.approx(milliseconds, rel=1e-3) and "88% of it products with the weights" in own
    assert (total, each) == pytest.approx((2 / milliseconds * 1e3, 1 / milliseconds * 1e3), rel=1e-3)
    assert "MQA, predicted" in mqa and "32 sequences" in mqa and "(16×)" in mqa


def test_dollars_by_hand() -> None:
    """Sixteen calls of a millisecond for 4 tokens are 250 tokens/s; at $3.60 an hour, a tenth of a cent a second, a
    million of them take 4,000 s and cost $4. Per sequence instead of in all, or per second instead of per hour, is the
    slip that makes a price list absurd."""
    _, own, mha, mqa = explain.speed(SMALL, CALLS_ONLY, 512, 4, "bfloat16", price=3.6)
    assert own.partition(": ")[2] == (
        "4 sequences; a step of 16 ms, 100% of it fixed costs; 250 tokens/s in all, 62.5 for each; $4 per million "
        "tokens."
    )
    for line in (mha, mqa):
        assert "16 ms (1×)" in line and "250 tokens/s in all (1×)" in line and "$4 per million tokens (1×)" in line
    assert explain.dollars(2.5, 5000) == 2.5 / 3600 / 5000 * 1e6
    assert not any("$" in line for line in explain.speed(SMALL, CALLS_ONLY, 512, 4, "bfloat16"))


def test_a_prediction_names_its_roofs() -> None:
    """A number from a datasheet, quoted without saying so, is taken for a measurement."""
    for line in explain.speed(LLAMA, H200, 4096, None, "bfloat16")[1:]:
        assert "predicted from published peaks, not measured:" in line
    for line in explain.speed(SMALL, CALLS_ONLY, 512, 4, "bfloat16")[1:]:
        assert "predicted from measured roofs:" in line


def test_a_batch_that_does_not_fit_is_not_predicted() -> None:
    """A rate for 32 sequences on a card that holds two is a rate nobody will ever see."""
    _, own, mqa = explain.speed(LLAMA, H200, 4096, 32, "bfloat16")
    assert "measured: 2 sequences (32 do not fit); " in own and "measured: 32 sequences; " in mqa


def test_nothing_fits() -> None:
    """The bytes that are missing, and the number of KV heads that would help: GQA-2's weights and 2.5 GiB fit, GQA-4's
    and 5 GiB do not. "Does not fit" alone leaves one to try them all."""
    weights = {g: 2 * (68_976_648_192 - 80 * 2 * 8192 * (8 - g) * 128) for g in (8, 4, 2)}
    token = 2 * 80 * 128 * 2  # of one head
    free = {g: 141 * 10**9 - weights[g] - 32768 * token * g for g in weights}
    assert free[4] < 0 < free[2]
    assert explain.speed(LLAMA, H200, 32768, None, "bfloat16") == [
        f"h200 holds 131.3 GiB: {-free[8] / 2**30:.2f} GiB too few for one sequence; "
        "it fits as GQA-2, or with fewer KV heads, down to MQA."
    ]
    (line,) = explain.speed(LLAMA, Machine.published("h100"), 4096, 1, "bfloat16")
    assert line.endswith("; no number of KV heads fits beside 128.48 GiB of weights.")


def test_parameters_by_hand() -> None:
    """K and V of 56 heads in 80 layers: 2 · 8192 · 7168 · 80. An FFN is three matrices: two would give them back 1.5
    times."""
    lost = 80 * 2 * 8192 * 56 * 128
    line = explain.parameters(LLAMA)
    assert (
        f"leaves out {lost:,} parameters, 12.0% of MHA's; an FFN of {28672 + round(lost / 80 / 3 / 8192):,} in" in line
    )
    assert explain.parameters(LLAMA.with_kv_heads(64)) == "Nothing is shared, so no parameter is lost."


def sweep(**more: Any) -> pandas.DataFrame:
    """Eight heads, three seeds; plain arms lose 0.02, 0.04, 0.06 with four KV heads, ten times that with two, a hundred
    times with one; matched ones gain what these lose."""
    common = {"kind": "quality", "experiment": "g-sweep", "status": "ok", "run": "r", "corpus": "c", "machine": "m"}
    common |= {"tokens": 7000, "n_params": 623_488, "shape.n_heads": 8} | more
    return pandas.DataFrame(
        common | {"shape.n_kv_heads": g, "arm": arm, "seed": seed, "bits_per_byte": 2 + 0.02 * (seed + 1) * factor}
        for g, arm, factor in (
            (8, "plain", 0),
            *(
                (g, arm, sign * 10**power)
                for power, g in enumerate((4, 2, 1))
                for arm, sign in (("plain", 1), ("matched", -1))
            ),
        )
        for seed in range(3)
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "nearest", "mean"),
    [(64, 8, 8, 4), (32, 8, 4, 0.4), (9, 3, 4, 0.4), (12, 6, 2, 0.04), (128, 8, 8, 4)],
    ids=["R=8", "R=4", "R=3", "R=2", "R=16"],
)
def test_quality_is_that_of_the_nearest_ratio(heads: int, kv_heads: int, nearest: int, mean: float) -> None:
    """GQA-8 of 64 heads shares as MQA of 8 does: looked up by G its loss would be that of sharing nothing. And R = 3 is
    nearer to 4 than to 2, by ratio."""
    shape = replace(SMALL, n_heads=heads, n_kv_heads=kv_heads)
    line = explain.quality(sweep(), shape)
    half = (
        4.303 * mean / 2 / math.sqrt(3)
    )  # t of two degrees of freedom, printed tables; the deviation is half the mean
    found = re.fullmatch(
        r"Quality at R = (\d+)(.*): bits .*: plain ([+-][\d.]+) ± ([\d.]+) \((.+)\); matched (.+)", line
    )
    assert found and found[1] == str(nearest)
    assert found[2] == (
        "" if heads == nearest * kv_heads else f", of those measured the nearest to {heads // kv_heads}"
    )
    assert (float(found[3]), float(found[4])) == pytest.approx((mean, half), rel=2e-3)
    assert found[5] == "not resolvable at this scale" and found[6].startswith(f"-{mean:.4f} ± ")
    assert line.endswith(
        f"Measured at 623,488 parameters, 7,000 tokens, 3 seeds, not on small itself ({shape.n_params:,} parameters)."
    )


def test_quality_without_a_sweep() -> None:
    """A loss of zero where nothing was measured would be the best news of all; and sharing nothing costs nothing."""
    with pytest.raises(InputError, match="no g-sweep rows are finished"):
        explain.quality(sweep(experiment="recall"), SMALL)
    assert explain.quality(sweep(experiment="recall"), SMALL.with_kv_heads(6)).endswith("no quality is lost.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch must be between 1"),
        ({"price": 0.0}, "price must be a number above 0, got 0.0"),
        ({"price": math.nan}, "price must be a number above 0"),
        ({"context": 0}, "context must be between 1"),
        ({"dtype": "int8"}, "clock has no matmul rate for int8; known: bfloat16"),
    ],
    ids=["batch", "price", "price-nan", "context", "dtype"],
)
def test_what_cannot_be_explained(arguments: dict[str, Any], message: str) -> None:
    """A free card makes free tokens, and no sequence makes them at no speed: both would be printed."""
    with pytest.raises(InputError, match=re.escape(message)):
        explain.speed(**{"shape": SMALL, "card": CALLS_ONLY, "context": 9, "batch": 1, "dtype": "bfloat16"} | arguments)


def test_explaining_needs_no_torch() -> None:
    """Nor seconds of waiting for it: every sentence is arithmetic."""
    code = "import sys, attnlab.explain; print([name for name in ('torch', 'numpy', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
