"""The time model, held against counts made one query at a time, tensors' own sizes, and numbers worked by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attnlab import Llama, ModelShape, predict_decode, predict_prefill
from attnlab.attention import expanded
from attnlab.errors import InputError, divisors
from attnlab.predict.machine import Machine, published_machines
from attnlab.predict.time import attention_bytes, attention_flops, least_seconds, training_flops

SHAPE = ModelShape(n_layers=3, dim=17, n_heads=12, n_kv_heads=4, head_dim=10, ffn_dim=19, vocab_size=23)
MINE = Machine("m", "cpu", 7e9, 5e9, {"float32": 1.1e11, "bfloat16": 1.3e9}, 1.7e-5, 2**34)


def counted_flops(shape: ModelShape, batch: int, queries: int, context: int) -> int:
    """Two products, a multiplication and an addition each, over head_dim, for every pair that the mask lets through."""
    seen = torch.ones(queries, context).tril(context - queries).sum().int().item()
    return batch * shape.n_heads * seen * 2 * (2 * shape.head_dim)


def tensor_bytes(shape: ModelShape, batch: int, queries: int, context: int, dtype: torch.dtype) -> dict[str, int]:
    """Of q and the output, and of K and V, as the tensors themselves say."""
    q = torch.empty(batch, shape.n_heads, queries, shape.head_dim, dtype=dtype, device="meta")
    k = torch.empty(batch, shape.n_kv_heads, context, shape.head_dim, dtype=dtype, device="meta")
    return {"own": 2 * q.nbytes, "kv": 2 * k.nbytes}


@pytest.mark.parametrize("groups", divisors(12))
@pytest.mark.parametrize(("batch", "context"), [(1, 31), (7, 31), (1, 1021), (7, 1021)])
def test_decode_has_r_flop_per_byte(groups: int, batch: int, context: int) -> None:
    """The sentence the whole roofline stands on: in 16 bit, R flop per byte of cache, whatever B and S. Bytes at H
    heads, or R taken for G, make it a constant 1, or turn it over."""
    shape = SHAPE.with_kv_heads(groups)
    sizes = tensor_bytes(shape, batch, 1, context, torch.bfloat16)
    prediction = predict_decode(shape, MINE, batch, context)
    assert prediction.flops == counted_flops(shape, batch, 1, context)
    assert prediction.bytes == sizes["own"] + sizes["kv"]
    assert prediction.flops == 12 // groups * sizes["kv"]
    assert predict_decode(shape, MINE, batch, context, torch.float32).bytes == 2 * prediction.bytes


@pytest.mark.parametrize(("queries", "context"), [(1, 1), (1, 13), (3, 13), (13, 13), (12, 13)])
def test_flops_are_of_the_pairs_that_the_mask_lets_through(queries: int, context: int) -> None:
    """T · S charges prefill twice what causal attention needs; T · S / 2 forgets the diagonal and every past."""
    assert attention_flops(SHAPE, 5, queries, context) == counted_flops(SHAPE, 5, queries, context)


def test_prefill_is_one_causal_call_over_its_own_tokens() -> None:
    """Prefill predicted with T = 1, or decode with T = S, would be off by S."""
    prefill = predict_prefill(SHAPE, MINE, 5, 13, "float32")
    sizes = tensor_bytes(SHAPE, 5, 13, 13, torch.float32)
    assert prefill.flops == counted_flops(SHAPE, 5, 13, 13)
    assert prefill.bytes == sizes["own"] + sizes["kv"]


@pytest.mark.parametrize("groups", divisors(12))
@pytest.mark.parametrize("queries", [1, 13])
def test_expanded_pays_for_the_copies_that_it_makes(groups: int, queries: int) -> None:
    """Repeating K and V reads G heads, writes H and reads H again: charged as if it read G, the arm that loses looks
    merely slow. But where nothing is copied (G = H, and a single head, which torch repeats by a stride of zero) nothing
    may be charged either: the implementation's own tensors say which."""
    shape = SHAPE.with_kv_heads(groups)
    q = torch.empty(5, 12, queries, 10, dtype=torch.bfloat16)
    k, v = torch.empty(2, 5, groups, 13, 10, dtype=torch.bfloat16).unbind()
    written = sum(
        new.untyped_storage().nbytes()
        for new, old in zip(expanded._repeated(q, k, v), (k, v), strict=True)
        if new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr()
    )
    assert (written > 0) == (1 < groups < 12)
    least = 2 * q.nbytes + k.nbytes + v.nbytes
    assert attention_bytes(shape, 5, queries, 13, "bfloat16", "grouped") == least
    assert attention_bytes(shape, 5, queries, 13, "bfloat16", "expanded") == least + 2 * written
    predict = predict_decode if queries == 1 else predict_prefill
    assert predict(shape, MINE, 5, 13, impl="expanded").bytes == least + 2 * written


def test_seconds_by_hand() -> None:
    """Adding what overlaps, or taking the copy roof or the wrong dtype's rate: 7 GB/s, 110 Gflop/s, 17 µs a call.
    q and output are 2 · 5 · 12 · 10, K and V 2 · 5 · 4 · 1021 · 10 elements; pairs cost 4 · 5 · 12 · 10 · 1021 flop."""
    decode = predict_decode(SHAPE, MINE, 5, 1021, "float32")
    assert decode.terms == {
        "bandwidth": pytest.approx(4 * (1200 + 408_400) / 7e9),
        "compute": pytest.approx(2_450_400 / 1.1e11),
        "fixed": 1.7e-5,
    }
    assert decode.seconds == pytest.approx(4 * 409_600 / 7e9 + 1.7e-5)
    assert decode.binding == "bandwidth"
    prefill = predict_prefill(SHAPE, MINE, 5, 1021, "float32")
    assert prefill.seconds == pytest.approx(4 * 5 * 12 * 10 * (1021 * 1022 // 2) / 1.1e11 + 1.7e-5)
    assert predict_decode(SHAPE, MINE, 1, 1).binding == "fixed"


RATED = replace(
    MINE,
    rates={
        "decode 32 float32 2": 4e10,
        "decode 32 float32 8": 1e10,
        "product float32 1": 2e10,
        "product float32 16": 8e10,
    },
    layer_seconds=3e-6,
    step_seconds=5e-6,
)


def test_measured_rates_take_the_place_of_the_roof_for_our_own_code_alone() -> None:
    """A roofline calls every kernel as fast as a large product; the rates are of ours, so no other arm may have them.
    R = 3 lies between 2 and 8: 4e10 to 1e10 flop/s, by powers."""
    rate = 4e10 * 0.25 ** (math.log(3 / 2) / math.log(8 / 2))
    assert RATED.rate("decode 32", "float32", 3) == pytest.approx(rate)
    assert RATED.rate("decode 32", "float32", 1) == 4e10 and RATED.rate("decode 32", "float32", 64) == pytest.approx(
        1e10
    )
    assert RATED.rate("decode 32", "bfloat16", 3) == RATED.compute_roof("bfloat16")
    own, other = (predict_decode(SHAPE, RATED, 5, 1021, "float32", impl=impl) for impl in ("auto", "grouped"))
    assert other == predict_decode(SHAPE, MINE, 5, 1021, "float32")
    reading, computing = 4 * 409_600 / 7e9, 2_450_400 / rate
    assert own.terms == {"bandwidth": pytest.approx(reading), "compute": pytest.approx(computing), "fixed": 1.7e-5}
    assert own.seconds == pytest.approx((reading**3 + computing**3) ** (1 / 3) + 1.7e-5)
    assert least_seconds(SHAPE, RATED, 5, 1, 1021, "float32") == pytest.approx(reading)


def test_a_whole_step_counts_what_a_layer_costs_by_itself() -> None:
    """Dozens of small calls per layer, which no roofline knows, are most of a small model's step."""
    shape = ModelShape(3, 20, 12, 4, 10, 28, 32, tied_embeddings=True)
    step = predict_decode(shape, RATED, 2, 101, "float32", scope="model")
    assert step.terms["fixed"] == pytest.approx(5e-6 + 3 * 3e-6)
    reading, computing = 4 * (shape.n_params + 2 * 20) / 7e9, 2 * 2 * shape.n_params / (2e10 * 4**0.25)
    assert step.terms["weights"] == pytest.approx((reading**3 + computing**3) ** (1 / 3))
    assert step.seconds == pytest.approx(sum(step.terms.values()))


@pytest.mark.parametrize("name", published_machines())
@pytest.mark.parametrize("groups", [32, 8, 1])
def test_decode_waits_for_memory_and_prefill_for_arithmetic(name: str, groups: int) -> None:
    """One roof for both is the commonest mistake in explanations of GQA: sharing heads speeds up decoding, and leaves
    a long prefill as it was."""
    shape = ModelShape.published("llama-2-7b")
    decode = [predict_decode(shape.with_kv_heads(g), Machine.published(name), 64, 4096) for g in (32, groups)]
    prefill = [predict_prefill(shape.with_kv_heads(g), Machine.published(name), 4, 4096) for g in (32, groups)]
    assert [p.binding for p in decode] == ["bandwidth"] * 2 and [p.binding for p in prefill] == ["compute"] * 2
    ratio = decode[0].terms["bandwidth"] / decode[1].terms["bandwidth"]
    assert ratio == pytest.approx(32 / groups, rel=0.01)
    assert prefill[0].seconds == prefill[1].seconds


def test_a_whole_decode_step_of_llama_2_7b_by_hand() -> None:
    """One sequence, context 4096, bfloat16, on an H100: weights read once less the embedding table (131,072,000
    parameters, of which one row of 4096), 32 layers of K and V, 8 calls a layer. A table counted as read, weights per
    sequence, or one layer's attention taken for the model's shows in the digits."""
    step = predict_decode(ModelShape.published("llama-2-7b"), Machine.published("h100"), 1, 4096, scope="model")
    attention = 32 * 2 * (2 * 32 * 128 + 2 * 4096 * 32 * 128)
    weights = 2 * (6_738_415_616 - 131_072_000 + 4096)
    assert (attention, weights) == (2_148_007_936, 13_214_695_424)
    assert step.bytes == attention + weights == 15_362_703_360
    assert step.flops == 32 * 4 * 32 * 128 * 4096 + 2 * (6_738_415_616 - 131_072_000) == 15_362_170_880
    assert step.terms == {
        "weights": pytest.approx(3.944685e-3, rel=1e-6),
        "attention": pytest.approx(6.411964e-4, rel=1e-6),
        "fixed": pytest.approx(8 * 32 * 5e-6),
    }
    assert step.seconds == pytest.approx(4.58588e-3 + 1.28e-3, rel=1e-5) and step.binding == "weights"
    batch = predict_decode(ModelShape.published("llama-2-7b"), Machine.published("h100"), 7, 4096, scope="model")
    assert batch.bytes == 7 * attention + weights + 6 * 2 * 4096
    assert batch.flops == 7 * step.flops


def test_a_whole_prefill_of_llama_2_7b_by_hand() -> None:
    """The head multiplies the last position only (32000 · 4096 parameters), every other matrix every token; charged for
    every token too, it would add 2 % here and a fifth to a small model with a large vocabulary."""
    prefill = predict_prefill(ModelShape.published("llama-2-7b"), Machine.published("h100"), 1, 4096, scope="model")
    body, head = 6_738_415_616 - 2 * 131_072_000, 131_072_000
    attention = 32 * 4 * 32 * 128 * (4096 * 4097 // 2)
    assert prefill.flops == attention + 2 * (4096 * body + head) == 57_452_999_475_200
    assert prefill.binding == "weights"
    assert prefill.seconds == pytest.approx(57_452_999_475_200 / 989e12 + 1.28e-3)


def test_a_tied_table_is_the_head_and_is_multiplied() -> None:
    """Left out with the embedding table, the head of a small model is a fifth of its work."""
    tied, untied = (replace(SHAPE, tied_embeddings=tied) for tied in (True, False))
    for predict in (predict_decode, predict_prefill):
        assert predict(tied, MINE, 3, 7, scope="model") == predict(untied, MINE, 3, 7, scope="model")


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("predict", [predict_decode, predict_prefill])
@pytest.mark.parametrize("card", [MINE, Machine.published("h200")], ids=["cpu", "h200"])
def test_more_kv_heads_are_never_faster(scope: str, predict: object, card: Machine) -> None:
    """A model that says otherwise somewhere has a term upside down."""
    for batch, context in [(1, 1), (1, 997), (13, 997), (101, 8191)]:
        seconds = [
            predict(SHAPE.with_kv_heads(g), card, batch, context, scope=scope).seconds  # type: ignore[operator]
            for g in divisors(12)
        ]
        assert seconds == sorted(seconds)


@pytest.mark.parametrize("predict", [predict_decode, predict_prefill])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 5), r"batch must be between 1 and 2\^40, got 0"),
        ((5, -1), r"context must be between 1 and 2\^40, got -1"),
        ((5, 2**40 + 1), r"context must be between 1 and 2\^40"),
        ((2.0, 5), "batch must be a whole number, got 2.0"),
        ((5, True), "context must be a whole number, got True"),
        ((2**40, 2**40), r"what attention moves comes to more than 2\^63 bytes"),
        ((5, 7, "fp7"), "unknown dtype 'fp7'"),
        ((5, 7, "float64"), "h100 has no matmul rate for float64; known: bfloat16, float16, float32"),
        ((5, 7, "int8"), "h100 has no matmul rate for int8"),
        ((5, 7, "bfloat16", "models"), "unknown scope 'models'; did you mean model[?] valid: layer, model"),
    ],
)
def test_bad_input_is_one_line(predict: object, arguments: tuple[object, ...], said: str) -> None:
    """A zero context predicted zero seconds, a float batch fractional bytes, an unknown dtype somebody else's rate."""
    with pytest.raises(InputError, match=said):
        predict(SHAPE, Machine.published("h100"), *arguments)  # type: ignore[operator]


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_training_flops_are_those_that_torch_counts(groups: int, tied: bool) -> None:
    """6 flops a parameter and token is the usual count: it takes an untied table for a product, and forgets attention.
    torch counts the products of a forward and a backward pass as they run: those of masked pairs too, norms not."""
    shape, batch, context = ModelShape(3, 17, 6, groups, 10, 19, 23, tied_embeddings=tied), 5, 13
    model = Llama(shape, "expanded")
    tokens = torch.zeros(batch, context, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    masked = 3 * attention_flops(shape, 3, 1, 1) * context * (context - 1) // 2
    norms = 6 * context * sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert training_flops(shape, context) * context == counter.get_total_flops() / batch - masked + norms
