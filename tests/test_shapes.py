"""Shapes, held against published counts, against transformers' own models, and against every kind of bad input.

published_shapes.json: shapes with exact parameter counts and KV bytes per token, collected from the papers and from the
models' own config.json and safetensors headers.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from attnlab import ModelShape, matched_ffn_dim, published_names
from attnlab.errors import InputError, divisors
from attnlab.shapes import ELEMENT_BYTES, RopeScaling, dtype_name, element_bytes, variant_name

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published_shapes.json").read_text())

# H = 12, G = 4, head_dim not dim / H; the rest different primes where transformers' own checks let them
SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "intermediate_size": 47,
    "vocab_size": 101,
    "max_position_embeddings": 97,
}
LLAMA = {**SIZES, "model_type": "llama", "rms_norm_eps": 1e-5}
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "phi3": transformers.Phi3Config,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def _hf(family: str, **changes: Any) -> transformers.PretrainedConfig:
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "sliding_window": None}
    return CONFIGS[family](**{**SIZES, **tokens, **changes})


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_to_the_last_parameter(name: str) -> None:
    """Totals quoted elsewhere differ by rotary buffers, tied heads or padding; these are exact or wrong."""
    facts = dict(PUBLISHED[name])
    shape = ModelShape.published(name)
    assert shape.n_params == facts.pop("n_params")
    assert shape.kv_bytes_per_token("bfloat16") == facts.pop("kv_bytes_per_token_16bit")
    assert {field: getattr(shape, field) for field in facts} == facts
    assert shape.name == name


def test_every_published_model_is_held_and_no_other() -> None:
    """A model added to the library without its published count beside it would be trusted unseen."""
    assert published_names() == list(PUBLISHED)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", CONFIGS)
def test_counts_equal_those_of_transformers(family: str, tied: bool) -> None:
    """Qwen2's q/k/v biases and Qwen3's norms are in no config key, Phi-3 fuses its matrices: the oracle is the model
    that transformers builds from the same configuration (on the meta device), head_dim apart from dim / H."""
    config = _hf(family, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert ModelShape.from_hf(config.to_dict()).n_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("n_heads", [7, 12, 16])
def test_n_params_and_cache_fall_together_as_heads_are_shared(n_heads: int) -> None:
    """K and V are 2 · d · D parameters and 2 · D cached numbers per head and layer: losing one without the other is a
    shape that no model has."""
    full = ModelShape(3, 23, n_heads, n_heads, 10, 47, 101)
    for g in divisors(n_heads):
        shared = full.with_kv_heads(g)
        lost = n_heads - g
        assert full.n_params - shared.n_params == 3 * 2 * 23 * 10 * lost
        assert full.kv_bytes_per_token("float32") - shared.kv_bytes_per_token("float32") == 3 * 2 * 10 * 4 * lost
        assert (shared.group_size, shared.n_heads, shared.ffn_dim) == (n_heads // g, n_heads, 47)


def test_variant_names() -> None:
    """G = H is MHA even when both are 1, where MQA would be as true."""
    assert [variant_name(12, g) for g in divisors(12)] == ["MQA", "GQA-2", "GQA-3", "GQA-4", "GQA-6", "MHA"]
    assert ModelShape.published("llama-3-8b").variant == "GQA-8"
    assert variant_name(1, 1) == "MHA"


def test_dtypes_are_strings_or_torch_dtypes() -> None:
    """Bytes must follow the tensor's own dtype, not a label beside it: every spelling counts as torch stores it."""
    assert {dtype_name(d) for d in (torch.bfloat16, "bfloat16", "bf16", "torch.bfloat16")} == {"bfloat16"}
    for name in ELEMENT_BYTES:
        dtypes = [torch.float8_e4m3fn, torch.float8_e5m2] if name == "float8" else [getattr(torch, name)]
        for dtype in dtypes:
            assert element_bytes(dtype) == element_bytes(name) == torch.empty(1, dtype=dtype).element_size()


# --- matching parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_matched_ffn_width_is_the_best_integer(seed: int) -> None:
    """A width rounded down, or to a multiple, leaves the arms of a comparison unequal: both neighbours must be no
    better, whether the FFN is widened or narrowed."""
    rng = random.Random(seed)
    heads = rng.choice([6, 7, 12, 16])
    start = ModelShape(
        n_layers=rng.randint(1, 5),
        dim=rng.randint(5, 60),
        n_heads=heads,
        n_kv_heads=rng.choice(divisors(heads)),
        head_dim=rng.randint(1, 20),
        ffn_dim=rng.randint(300, 700),
        vocab_size=101,
        qkv_bias=rng.random() < 0.5,
    )
    for g in divisors(heads):
        matched = start.with_kv_heads(g, match_params=True)
        assert matched.n_kv_heads == g
        gap, *neighbours = (
            abs(replace(matched, ffn_dim=matched.ffn_dim + step).n_params - start.n_params) for step in (0, -1, 1)
        )
        assert gap <= min(neighbours)
    assert start.with_kv_heads(start.n_kv_heads, match_params=True) == start


def test_matching_reproduces_the_mqa_paper() -> None:
    """Shazeer 2019, section 4: 18 attention layers going from 8 KV heads to 1 pay for 12 two-matrix FFNs of 4096 →
    5440, exactly. A helper that assumes SwiGLU's three matrices cannot say this."""
    saved = 18 * 2 * 7 * 128 * 1024
    assert saved == 33_030_144 == 12 * 2 * 1024 * (5440 - 4096)
    assert matched_ffn_dim(4096, saved, 1024, 12, matrices=2) == 5440
    assert matched_ffn_dim(5440, -saved, 1024, 12, matrices=2) == 4096


def test_llama_2_widened_its_ffn_more_than_matching_needs() -> None:
    """Llama 2, table 18, widens ×1.33 (MQA) and ×1.3 (GQA-8) "to keep the parameter count similar"; matching a SwiGLU
    of 8/3 · d exactly needs only ×1.24 and ×1.22, so the paper's own arms are larger than its MHA."""
    mha = ModelShape.published("llama-2-34b").with_kv_heads(64)
    for g, factor in ((1, 1.24), (8, 1.22)):
        matched = mha.with_kv_heads(g, match_params=True)
        assert round(matched.ffn_dim / mha.ffn_dim, 2) == factor
        assert abs(matched.n_params / mha.n_params - 1) < 1e-5


# --- Hugging Face configurations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_reads_what_this_transformers_writes(family: str, tmp_path: Path) -> None:
    """A key that a save leaves out because it equals the family's default must come back as that default: dict, file
    and directory agree, and every field is the one asked for."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = _hf(family, tie_word_embeddings=True, rms_norm_eps=3e-6, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    shape = ModelShape.from_hf(tmp_path)
    assert shape == ModelShape.from_hf(tmp_path / "config.json") == ModelShape.from_hf(config.to_dict())
    assert shape == ModelShape(
        n_layers=3,
        dim=48,
        n_heads=12,
        n_kv_heads=4,
        head_dim=10,
        ffn_dim=47,
        vocab_size=101,
        tied_embeddings=True,
        max_context=97,
        rope_theta=500000.0,
        norm_eps=3e-6,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_reads_what_older_transformers_wrote(family: str) -> None:
    """Published checkpoints carry the old spelling: rope_theta at top level, torch_dtype, rope_scaling null."""
    old = {**SIZES, "model_type": family, "rope_theta": 500000, "rope_scaling": None, "torch_dtype": "float16"}
    new = {
        **SIZES,
        "model_type": family,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "dtype": "float16",
    }
    assert ModelShape.from_hf(old) == ModelShape.from_hf(new)
    assert ModelShape.from_hf(old).rope_theta == 500000.0


LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
        {
            "rope_theta": 5e5,
            "original_max_position_embeddings": 8192,
            "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k[0] != "o"},
        },
    ],
    ids=["rope_scaling", "rope_parameters", "original-at-top"],
)
def test_llama_3_rope_scaling_in_every_spelling(spelling: dict[str, Any]) -> None:
    """A scaling that is not found is silently no scaling, and only long contexts tell."""
    shape = ModelShape.from_hf({**LLAMA, **spelling})
    assert shape.rope_theta == 5e5
    assert shape.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192) == RopeScaling("llama3", 8.0)
    assert shape.rope_scaling == ModelShape.published("llama-3.1-405b").rope_scaling


def test_other_rope_scalings_are_counted_and_named() -> None:
    """Phi-3's longrope changes no count; forgetting its name would let the model run without it."""
    for key in ("type", "rope_type"):
        shape = ModelShape.from_hf(
            {**SIZES, "model_type": "phi3", "rope_scaling": {key: "longrope", "long_factor": [1.0]}}
        )
        assert shape.rope_scaling == RopeScaling("longrope")


def test_missing_or_null_kv_heads_and_head_dim() -> None:
    """LLaMA 1's configuration has neither key, others hold null: MHA, and dim / H; but never dim / H where head_dim is
    given (Qwen3, LMCache thread)."""
    for absent in ({}, {"num_key_value_heads": None, "head_dim": None}):
        config = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "head_dim")} | absent
        shape = ModelShape.from_hf(config)
        assert (shape.n_kv_heads, shape.head_dim, shape.variant) == (12, 4, "MHA")
    assert ModelShape.from_hf(LLAMA).head_dim == 10


WINDOWED = {**SIZES, "model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}


def test_a_sliding_window_is_said_and_counted_as_absent() -> None:
    """Mistral 7B v0.1 keeps 4096 of 32768 tokens; its cache is counted whole, and the reader is told so, at the
    caller's line."""
    with pytest.warns(UserWarning, match="sliding window of 4096 tokens counted as if absent") as caught:
        shape = ModelShape.from_hf(WINDOWED)
    assert caught[0].filename == __file__
    assert shape == ModelShape.from_hf({**WINDOWED, "sliding_window": None})
    with pytest.warns(UserWarning, match="sliding window"):
        ModelShape.from_hf({**WINDOWED, "model_type": "qwen2", "use_sliding_window": True})
    with pytest.warns(UserWarning, match="4096"):  # transformers' own default for a mistral that says nothing
        ModelShape.from_hf({name: value for name, value in WINDOWED.items() if name != "sliding_window"})


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 32768},
        {"sliding_window": None},
        {"model_type": "qwen2", "use_sliding_window": False},
        {"model_type": "qwen2"},
        {"model_type": "qwen3"},
    ],
    ids=str,
)
def test_a_window_that_hides_nothing_is_not_mentioned(changes: dict[str, Any]) -> None:
    """Qwen lists a window that it does not use; a warning there teaches readers to ignore warnings (they are errors
    here, so any would fail this test)."""
    ModelShape.from_hf({**WINDOWED, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, r"'mixtral': it has experts \(num_local_experts=8\)"),
        ({"model_type": "qwen2_moe", "num_experts": 60}, r"experts \(num_experts=60\)"),
        (
            {"model_type": "deepseek_v2", "n_routed_experts": 64, "kv_lora_rank": 512},
            r"experts \(n_routed_experts=64\)",
        ),
        ({"model_type": "minicpm3", "kv_lora_rank": 256}, r"multi-head latent attention \(kv_lora_rank=256\)"),
        ({"attention_bias": True}, "'llama' with attention_bias=true"),
        ({"model_type": "qwen3", "attention_bias": True}, "'qwen3' with attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu': expected silu"),
        ({"model_type": "gemma2"}, "model_type 'gemma2'; valid: llama, mistral, phi3, qwen2, qwen3"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": None}, "model_type None"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_be_counted_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    """A count that leaves out experts, a latent or biases looks right and is wrong by a factor."""
    with pytest.raises(InputError, match=message):
        ModelShape.from_hf({**LLAMA, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 5}, r"n_kv_heads=5 does not divide n_heads=12; valid: 1, 2, 3, 4, 6, 12"),
        ({"num_attention_heads": 0}, "num_attention_heads must be between 1"),
        ({"num_attention_heads": 49, "num_key_value_heads": 49, "head_dim": None}, "head_dim must be between 1"),
        ({"hidden_size": "48"}, "hidden_size must be a whole number, got '48'"),
        ({"intermediate_size": 47.5}, "ffn_dim must be a whole number"),
        ({"max_position_embeddings": None}, "max_context must be a whole number, got None"),
        ({"sliding_window": "4k"}, "sliding_window must be a whole number, got '4k'"),
        ({"rope_theta": "1e4"}, "rope_theta must be a number above 0, got '1e4'"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number above 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a number above 0"),
        ({"rope_scaling": "linear"}, "must be a JSON object, got 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "llama3 rope factor must be a number"),
        ({"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k[0] != "o"}}, "original_max_position_embeddings"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_damaged_values_are_one_line_not_a_traceback(changes: dict[str, Any], message: str) -> None:
    """A downloaded configuration is untrusted input: any value in it may be of the wrong type."""
    with pytest.raises(InputError, match=message):
        ModelShape.from_hf({**LLAMA, **changes})


def test_missing_keys_are_listed() -> None:
    """One round trip per missing key is a nuisance; all are named at once."""
    with pytest.raises(InputError, match="lacks num_hidden_layers, vocab_size"):
        ModelShape.from_hf({k: v for k, v in LLAMA.items() if k not in ("num_hidden_layers", "vocab_size")})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not json", "not a readable JSON file"),
        (b"\xff\xfe\x00", "not a readable JSON file"),
        (b"[" * 100_000, "not a readable JSON file"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not a readable JSON file"),
        (b"[1, 2]", "holds list, expected a JSON object"),
    ],
    ids=["cut", "not-utf-8", "nested", "huge-number", "list"],
)
def test_a_file_that_is_no_configuration_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    """Each of these raised something other than an input error in one reader or another."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        ModelShape.from_hf(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The path that was looked for, with the file name, not the directory that was given."""
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        with pytest.raises(
            InputError, match=rf"no config.json at .*{tmp_path.name}/config.json; give a config.json or"
        ):
            ModelShape.from_hf(source)


# --- bad input ------------------------------------------------------------------------------------------------------

GOOD = ModelShape(3, 23, 12, 4, 10, 47, 101)


@pytest.mark.parametrize("bad", [0, -1, True, 2.0, "8", None, 2**40 + 1])
@pytest.mark.parametrize(
    "field", ["n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_context"]
)
def test_a_size_is_a_whole_number_from_1_to_2_to_the_40(field: str, bad: object) -> None:
    """True counts as 1, and 2.0 divides as 2 does, until an index or a loop meets them."""
    with pytest.raises(InputError, match=rf"{field} must be (a whole number|between 1 and 2\^40), got"):
        replace(GOOD, **{field: bad})


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), "1e4", None, True])
@pytest.mark.parametrize("field", ["rope_theta", "norm_eps"])
def test_rates_are_numbers_above_0(field: str, bad: object) -> None:
    """A NaN passes every comparison but ``not x > 0``."""
    with pytest.raises(InputError, match=f"{field} must be a number above 0"):
        replace(GOOD, **{field: bad})


def test_groups_that_do_not_divide_the_heads_list_the_divisors() -> None:
    """At 2^40 heads too, where counting up to them would take hours."""
    with pytest.raises(InputError, match=r"n_kv_heads=5 does not divide n_heads=12; valid: 1, 2, 3, 4, 6, 12$"):
        GOOD.with_kv_heads(5)
    with pytest.raises(InputError, match=r"n_kv_heads=24 does not divide n_heads=12"):
        GOOD.with_kv_heads(24, match_params=True)
    with pytest.raises(InputError, match=r"valid: 1, 2, 4, 8, .*, 549755813888, 1099511627776$"):
        replace(GOOD, n_heads=2**40, n_kv_heads=3)
    for n in range(1, 200):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


def test_ranks_that_fit_neither_list_the_valid_ones() -> None:
    """P must divide H; among those, it must divide G or be a multiple of it (6 of 12 heads, 4 groups: neither)."""
    for p in (5, 6, 24):
        with pytest.raises(InputError, match=rf"tensor_parallel={p} does not fit .* valid: 1, 2, 4, 12$"):
            GOOD.per_rank(p)
    for bad in (0, -2, True, 2.0):
        with pytest.raises(InputError, match="tensor_parallel must be"):
            GOOD.per_rank(bad)  # type: ignore[arg-type]
    assert GOOD.per_rank(1) == GOOD


def test_an_unknown_model_is_answered_with_the_nearest() -> None:
    """Fuzzy look-up guesses; this asks."""
    with pytest.raises(InputError, match=r"unknown model 'llama2-70b'; did you mean llama-2-70b"):
        ModelShape.published("llama2-70b")
    with pytest.raises(InputError, match=r"unknown model 'zzz'; valid: llama-7b, .*smollm2-1.7b$"):
        ModelShape.published("zzz")


def test_matching_refuses_what_it_cannot_divide_by() -> None:
    """Zero layers end in a ZeroDivisionError, and an FFN too narrow to pay for more heads in a negative width."""
    with pytest.raises(InputError, match="layers must be between 1"):
        matched_ffn_dim(4096, 1000, 1024, 0)
    with pytest.raises(InputError, match=r"ffn_dim must be between 1 and 2\^40, got -"):
        replace(GOOD.with_kv_heads(1), ffn_dim=5).with_kv_heads(12, match_params=True)
