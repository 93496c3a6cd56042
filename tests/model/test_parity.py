"""Against transformers, the independent oracle: the same random checkpoint, loaded by both, gives the same numbers.

Weights are larger than at a usual start, so that attention is sharp and the greedy tokens are not decided by rounding.
"""

import pytest
import torch
import transformers

from attnlab import ModelShape, generate, load_hf, save_hf, to_grouped
from attnlab.model.llama import Llama

TOLERANCE = 2e-4
VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 97,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 29,
}
FAMILIES = {
    "llama": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 14},
    "narrow heads": {"head_dim": 2, "num_key_value_heads": 3},
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "theta 500000": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "head_dim": 14},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE, "head_dim": 14},
    "mistral": {"sliding_window": None, "head_dim": 14},
}


def hf_model(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(len(name))
    family = transformers.MistralConfig if name == "mistral" else transformers.LlamaConfig
    config = family(**{**SIZES, **FAMILIES[name]})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def from_disk(directory) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def tokens_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_equal_logits(ours: Llama, theirs: transformers.PreTrainedModel) -> None:
    tokens = tokens_of(2, 83)
    expected = theirs(tokens).logits
    assert expected.std() > 1, "logits must be far from zero for their difference to mean anything"
    assert (ours(tokens) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, name):
    """Rotary pairs in another order, heads tiled instead of repeated, head_dim taken as dim / H, an ignored theta or
    scaling: each gives a model that agrees with itself and with no checkpoint."""
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    assert ours.shape.n_kv_heads == theirs.config.num_key_value_heads
    assert_equal_logits(ours, theirs)
    prompt = tokens_of(3, 11)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=23, do_sample=False)
    assert torch.equal(generate(ours, prompt, 23), expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("theirs_at_most", "ours_at_most"), [("5GB", 5 * 10**9), ("20KB", 10**4)], ids=["one", "sharded"]
)
def test_there_and_back(tmp_path, name, theirs_at_most, ours_at_most):
    """A configuration that only its writer reads, or shards that only its writer can put together."""
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=theirs_at_most)
    save_hf(load_hf(tmp_path / "theirs"), tmp_path / "ours", max_shard_bytes=ours_at_most)
    if theirs_at_most == "20KB":
        assert all(len(list((tmp_path / side).glob("*.safetensors"))) > 2 for side in ("theirs", "ours"))
    back = from_disk(tmp_path / "ours")
    assert isinstance(back, transformers.LlamaForCausalLM)
    tokens = tokens_of(2, 83)
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-5)
    assert back.config.eos_token_id is None


def test_bfloat16_checkpoints_load_as_bfloat16(tmp_path):
    """Weights silently widened to float32 double the memory that is about to be measured; narrowed, they change."""
    theirs = hf_model("llama").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert_equal_logits(load_hf(tmp_path, dtype="float32"), from_disk(tmp_path).float())


def test_converted_models_open_in_transformers(tmp_path):
    """The point of converting is to go on elsewhere: transformers must read G heads and compute the same."""
    hf_model("mha").save_pretrained(tmp_path / "mha")
    grouped = to_grouped(load_hf(tmp_path / "mha"), 2)
    save_hf(grouped, tmp_path / "grouped")
    theirs = from_disk(tmp_path / "grouped")
    assert theirs.config.num_key_value_heads == 2
    assert_equal_logits(grouped, theirs)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_biases_and_norms_of_q_and_k_stand_where_qwen_has_them(family):
    """The two options of a shape that no Llama checkpoint exercises: a bias after the rotation, or a norm over all
    heads at once, has the same parameters."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**SIZES, **({"head_dim": 14} if family == "Qwen3" else {}))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
    ours = Llama(ModelShape.from_hf(config.to_dict()))
    ours.load_state_dict({name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()})
    assert_equal_logits(ours, theirs)
