"""Conversion to fewer KV heads, against the heads written out one by one; of directories, against transformers."""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnlab.errors import InputError
from attnlab.model import checkpoint
from attnlab.model.checkpoint import load_hf, save_hf
from attnlab.model.convert import METHODS, convert_directory, to_grouped
from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape

D = 10


def model_of(n_kv_heads: int = 12, **changes) -> Llama:
    torch.manual_seed(n_kv_heads)
    model = Llama(ModelShape(2, 17, 12, n_kv_heads, D, 19, 23, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def is_kv(name: str) -> bool:
    return "k_proj" in name or "v_proj" in name


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 4, 6, 12])
def test_each_group_becomes_one_head(n_kv_heads, method):
    """Pooling strided heads (h, h + G, …) instead of contiguous ones, seen in a published conversion, gives right
    shapes and a model whose groups belong to other query heads."""
    model = model_of(12, qkv_bias=True)
    grouped = to_grouped(model, n_kv_heads, method)
    assert grouped.shape == model.shape.with_kv_heads(n_kv_heads)
    size = 12 // n_kv_heads
    for name, after in grouped.state_dict().items():
        before = model.state_dict()[name]
        if not is_kv(name):
            assert torch.equal(after, before), name
            continue
        for head in range(n_kv_heads):
            group = [before[h * D : (h + 1) * D].double() for h in range(head * size, (head + 1) * size)]
            expected = sum(group) / size if method == "mean" else group[0]
            torch.testing.assert_close(after[head * D : (head + 1) * D].double(), expected, rtol=1e-5, atol=1e-6)


def logits_of(model: Llama, tokens: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(46).view(2, 23) % 23 if tokens is None else tokens)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [False, True])
def test_as_many_heads_as_before_change_nothing(method, bias):
    """Turned by half a rounding error, or scaled by a norm that is nearly 1, a model that needs no conversion comes
    out another. Only a fresh draw may change it."""
    model = model_of(6, qkv_bias=bias)
    for name, tensor in to_grouped(model, 6, method).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]) != (method == "random" and is_kv(name)), name


def test_chains_of_means_are_the_mean():
    """A second conversion that groups the first one's heads in another order pools strangers."""
    model = model_of(12).double()
    twice, once = to_grouped(to_grouped(model, 6), 2).state_dict(), to_grouped(model, 2).state_dict()
    for name, tensor in once.items():
        torch.testing.assert_close(twice[name], tensor, rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", ["mean", "first", "aligned"])
def test_repeated_heads_convert_back_to_the_same_logits(method):
    """The one conversion that loses nothing: a grouped model spelt out with H heads, whose groups must be the very
    heads that its query heads read."""
    grouped = model_of(3).double()
    state = {
        name: tensor.unflatten(0, (3, D)).repeat_interleave(4, dim=0).flatten(0, 1) if is_kv(name) else tensor
        for name, tensor in grouped.state_dict().items()
    }
    spelt_out = Llama(grouped.shape.with_kv_heads(12)).double()
    spelt_out.load_state_dict(state)
    expected = logits_of(grouped)
    for model in (spelt_out, to_grouped(spelt_out, 3, method)):
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-11 * expected.abs().max().item())


def turned(model: Llama, n_kv_heads: int, noise: float = 0.0) -> Llama:
    """``model`` with each KV head spelt out as several, each turned its own way: K in every plane (i, i + D/2) by an
    angle and a number, with its query heads; V by an orthogonal matrix, undone in O. Plus relative noise."""
    torch.manual_seed(41)
    shape = model.shape.with_kv_heads(n_kv_heads)
    copies, reads = n_kv_heads // model.shape.n_kv_heads, shape.group_size
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in range(shape.n_layers):
        for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
            for part in "kv":
                name = f"layers.{layer}.self_attn.{part}_proj.{kind}"
                heads = state[name].unflatten(0, (-1, D)).repeat_interleave(copies, dim=0)
                state[name] = (heads + noise * heads.std() * torch.randn_like(heads)).flatten(0, 1)
        q, k, v = (
            [state[f"layers.{layer}.self_attn.{part}_proj.{kind}"] for kind in ("weight", "bias")[: 1 + shape.qkv_bias]]
            for part in "qkv"
        )
        o = state[f"layers.{layer}.self_attn.o_proj.weight"]
        for head in range(n_kv_heads):
            own = slice(head * D, (head + 1) * D)
            readers = [slice(h * D, (h + 1) * D) for h in range(head * reads, (head + 1) * reads)]
            turn = torch.zeros(D, D, dtype=o.dtype)
            sizes = torch.rand(D // 2, dtype=o.dtype) + 0.5
            for i, angle in enumerate(torch.rand(D // 2, dtype=o.dtype) * 2 * math.pi):
                j, cos, sin = i + D // 2, angle.cos(), angle.sin()
                turn[i, i], turn[i, j], turn[j, i], turn[j, j] = cos, -sin, sin, cos
            size = torch.cat((sizes, sizes))[:, None]
            orthogonal = torch.linalg.qr(torch.randn(D, D, dtype=o.dtype)).Q
            for matrix in k:
                matrix[own] = (size * turn @ matrix[own].reshape(D, -1)).view_as(matrix[own])
            for matrix in q:
                for reader in readers:
                    matrix[reader] = (turn / size @ matrix[reader].reshape(D, -1)).view_as(matrix[reader])
            for matrix in v:
                matrix[own] = orthogonal @ matrix[own]
            for reader in readers:
                o[:, reader] = o[:, reader] @ orthogonal.T
    spelt_out = Llama(shape, model.impl).to(o.dtype)
    spelt_out.load_state_dict(state)
    return spelt_out


@pytest.mark.parametrize("present", [12, 6])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
def test_heads_that_differ_by_a_turn_are_one_head(present, bias):
    """What "aligned" is for. Pairs (i, i + 1) in place of (i, i + D/2), Q turned backwards, or with its group's and not
    its own head's turn, O transposed, a bias forgotten, a norm lost: each gives other logits. Their mean is far off."""
    model = model_of(3, qkv_bias=bias).double()
    spelt_out, expected = turned(model, present), logits_of(model)
    torch.testing.assert_close(logits_of(spelt_out), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits_of(to_grouped(spelt_out, 3, "aligned")), expected, rtol=0, atol=1e-9)
    for method in ("mean", "first"):
        assert (logits_of(to_grouped(spelt_out, 3, method)) - expected).abs().max() > 0.1 * expected.std()


def test_sixteen_bit_heads_are_turned_in_float32():
    """Turned and summed in bfloat16, the error would be that of several roundings; so it is that of one."""
    model = turned(model_of(3).double(), 12).to(torch.bfloat16)
    exact = to_grouped(copy.deepcopy(model).double(), 3, "aligned").state_dict()
    for name, tensor in to_grouped(model, 3, "aligned").state_dict().items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), exact[name], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 6])
def test_aligned_heads_keep_their_norm_and_come_nearer_than_a_mean(n_kv_heads):
    """Heads near orthogonal have a mean that is 1/√R of them, so attention goes flat; and turning onto the wrong
    neighbour would be no better than not turning."""
    base = model_of(1).double()
    model = turned(base, 12, noise=0.3)
    expected = logits_of(model)
    aligned, mean = (to_grouped(model, n_kv_heads, method) for method in ("aligned", "mean"))
    assert (logits_of(aligned) - expected).square().mean() < 0.3 * (logits_of(mean) - expected).square().mean()
    for layer, (before, after) in enumerate(zip(model.layers, aligned.layers, strict=True)):
        seen = before.input_layernorm.weight
        k = [(block.self_attn.k_proj.weight * seen).unflatten(0, (-1, 2, D // 2)) for block in (before, after)]
        v = [(block.self_attn.v_proj.weight * seen).unflatten(0, (-1, D)) for block in (before, after)]
        for heads, axes in ((k, (2, 4)), (v, (2, 3))):
            squares = [x.unflatten(0, (n_kv_heads, -1)).square().sum(axes).mean(1) for x in heads]
            torch.testing.assert_close(squares[1], squares[0], rtol=1e-10, atol=0, msg=f"layer {layer}")


def test_an_all_zero_head_is_aligned_without_a_nan():
    """Pruned heads have norm 0, by which nothing may be divided."""
    model = model_of(12)
    with torch.no_grad():
        for part in ("k", "v"):
            getattr(model.layers[0].self_attn, f"{part}_proj").weight[: 4 * D].zero_()
            getattr(model.layers[1].self_attn, f"{part}_proj").weight[:D].zero_()
    assert logits_of(to_grouped(model, 3, "aligned")).isfinite().all()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
def test_a_calibration_text_says_which_inputs_matter(bias):
    """Heads that agree, up to a turn, on all that a text lets them see, and differ elsewhere: by their weights they are
    strangers, by what they make of the text they are one."""
    torch.manual_seed(43)
    model = Llama(ModelShape(1, 17, 12, 3, D, 19, 23, qkv_bias=bias)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        model.embed_tokens.weight[:, 5:] = 0  # only five of the 17 inputs are ever other than 0
        spelt_out = turned(model, 12)
        for part in "kv":
            weight = getattr(spelt_out.layers[0].self_attn, f"{part}_proj").weight
            weight[:, 5:] = 3 * torch.randn_like(weight[:, 5:])
    tokens = torch.arange(23).view(1, 23)
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(spelt_out), expected, rtol=0, atol=1e-10)
    calibrated = to_grouped(spelt_out, 3, "aligned", calibration=tokens)
    torch.testing.assert_close(logits_of(calibrated), expected, rtol=0, atol=1e-8)
    assert (logits_of(to_grouped(spelt_out, 3, "aligned")) - expected).abs().max() > 0.1 * expected.std()
    assert not spelt_out.layers[0].input_layernorm._forward_hooks
    with pytest.raises(InputError, match="calibration text is of use to method 'aligned' only, got 'mean'"):
        to_grouped(spelt_out, 3, "mean", calibration=tokens)


def test_the_model_returned_is_new_and_the_input_untouched():
    """Weights shared with the original would be trained along with the copy."""
    model = model_of(6)
    before = copy.deepcopy(model.state_dict())
    grouped = to_grouped(model.eval(), 6)
    assert grouped.training is False
    with torch.no_grad():
        for parameter in grouped.parameters():
            assert parameter.requires_grad
            parameter.add_(1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(grouped.state_dict()[name], before[name] + 1), name


def test_random_draws_k_and_v_anew_from_the_initial_distribution():
    """The paper's weakest baseline: it must know nothing of the old heads, keep Q and O, and repeat under its seed."""
    model = model_of(12, qkv_bias=True)
    first, again, other = (to_grouped(model, 4, "random", seed=seed).state_dict() for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        if not is_kv(name):
            assert torch.equal(tensor, model.state_dict()[name]), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            assert tensor.std().item() == pytest.approx((2 / (5 * model.shape.dim)) ** 0.5, rel=0.15)
            assert not torch.equal(tensor, other[name]), name
    k, v = (first[f"layers.0.self_attn.{part}_proj.weight"] for part in "kv")
    assert not torch.equal(k, v)


def test_bfloat16_heads_are_pooled_in_float32():
    """Adding in bfloat16 loses whatever is 256 times smaller than the running sum: the mean of 256, 1, 1, 1 is 64.75,
    which rounds to 65, but to 64 if every sum is rounded."""
    model = model_of(4).to(torch.bfloat16)
    weight = model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        weight.unflatten(0, (4, D)).copy_(torch.tensor([256.0, 1, 1, 1]).view(4, 1, 1).expand(4, D, 17))
    pooled = to_grouped(model, 1).layers[0].self_attn.k_proj.weight
    assert pooled.dtype == torch.bfloat16
    assert (pooled == torch.tensor(64.75).bfloat16()).all()


def test_q_and_k_norms_and_the_implementation_stay():
    """The norms of Qwen3-like models are shared by all heads; a conversion that drops them, or the model's impl, loses
    them without a word."""
    model = model_of(6, qk_norm=True)
    model.impl = "reference"
    grouped = to_grouped(model, 2)
    assert grouped.impl == "reference"
    assert torch.equal(grouped.layers[1].self_attn.k_norm.weight, model.layers[1].self_attn.k_norm.weight)


@pytest.mark.parametrize(
    ("n_kv_heads", "method", "message"),
    [
        (5, "mean", "n_kv_heads=5 does not divide the model's 6 KV heads; valid: 1, 2, 3, 6$"),
        (12, "mean", "n_kv_heads=12 does not divide the model's 6 KV heads"),  # H, but more than there are
        (0, "mean", "n_kv_heads must be between 1"),
        (2, "means", "unknown method 'means'; did you mean mean"),
    ],
)
def test_bad_input_is_one_clear_error(n_kv_heads, method, message):
    """A number that divides H but not the present G would split heads across groups."""
    with pytest.raises(InputError, match=message):
        to_grouped(model_of(6), n_kv_heads, method)


def test_norms_of_q_and_k_cannot_be_turned():
    """Such a norm weighs each axis of a head for itself, after the projection: turned, a head is another."""
    with pytest.raises(InputError, match=r"q/k norms cannot be aligned.*valid: mean, first, random$"):
        to_grouped(model_of(6, qk_norm=True), 2, "aligned")


# --- directories ----------------------------------------------------------------------------------------------------


def hf_directory(directory, family: str = "Llama", shard: str = "5GB", **changes):
    """As transformers writes it, with files beside the weights."""
    torch.manual_seed(47)
    sizes = {"vocab_size": 61, "hidden_size": 36, "intermediate_size": 37, "num_hidden_layers": 11, "head_dim": 14}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 6, "max_position_embeddings": 97}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, initializer_range=0.3, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory, max_shard_size=shard)
    for name in ("tokenizer.json", "LICENSE", "pytorch_model.bin"):
        (directory / name).write_text(name)
    (directory / "original").mkdir()


DIRECTORIES = {
    "llama": {},
    "tied, a tensor or two per shard": {"shard": "10KB", "tie_word_embeddings": True},
    "mistral in shards": {"family": "Mistral", "shard": "200KB", "sliding_window": None},
    "bfloat16": {"dtype": torch.bfloat16, "shard": "100KB"},
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", "mean"),
        ("tied, a tensor or two per shard", "random"),
        ("tied, a tensor or two per shard", "aligned"),
        ("mistral in shards", "aligned"),
        ("bfloat16", "first"),
        ("bfloat16", "aligned"),
    ],
)
def test_a_converted_directory_is_what_to_grouped_makes_of_it(tmp_path, name, method):
    """Shard by shard, a layer's matrices lie in different files, and layers.10 stands before layers.2: a random draw
    that goes by their order, or a layer put together from two, gives another model. transformers must load it."""
    hf_directory(tmp_path / "in", **DIRECTORIES[name])
    shape = convert_directory(tmp_path / "in", tmp_path / "new" / "out", 2, method, seed=5)
    expected = to_grouped(load_hf(tmp_path / "in"), 2, method, seed=5)
    out = load_hf(tmp_path / "new" / "out")
    assert shape == out.shape == expected.shape
    for parameter, tensor in expected.state_dict().items():
        assert torch.equal(out.state_dict()[parameter], tensor), parameter
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "out", attn_implementation="eager")
    assert type(theirs).__name__ == ("MistralForCausalLM" if "mistral" in name else "LlamaForCausalLM")
    tokens = torch.randint(61, (2, 83), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        logits_of(theirs.float(), tokens).logits, logits_of(out.float(), tokens), rtol=0, atol=2e-4
    )
    shards = [len(list(path.glob("*.safetensors"))) for path in (tmp_path / "in", tmp_path / "new" / "out")]
    assert shards[0] == shards[1] and (shards[0] > 2) == ("shard" in DIRECTORIES[name])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_everything_but_the_heads_is_kept(tmp_path):
    """A model without its tokenizer, or with special tokens that nobody set, is not the one that was converted. Other
    weights are not copied: they have the old heads, and a reader may prefer them."""
    hf_directory(tmp_path / "in", shard="100KB", eos_token_id=7)
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_dim": 14, "its_own": [1, "ü"]}))
    convert_directory(tmp_path / "in", tmp_path / "out", 3)
    config, kept = (json.loads((tmp_path / where / "config.json").read_text()) for where in ("out", "in"))
    assert config == kept | {"num_key_value_heads": 3} and config["its_own"] == [1, "ü"]
    names = {file.name for file in (tmp_path / "out").iterdir() if file.suffix != ".safetensors"}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "LICENSE",
    }
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_head_dim_is_said_and_other_dtypes_stay(tmp_path):
    """dim / H is a guess that a config.json without head_dim leaves to its reader; a norm in float32 beside 16-bit
    matrices is as its author wanted it."""
    save_hf(Llama(ModelShape(2, 24, 12, 6, 2, 19, 23)).to(torch.bfloat16), tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_dim": None}))
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["model.norm.weight"] = torch.rand(24)
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    assert convert_directory(tmp_path / "in", tmp_path / "out", 2, "aligned").head_dim == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["head_dim"] == 2
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["model.norm.weight"], tensors["model.norm.weight"])
    assert {name for name, tensor in out.items() if tensor.dtype != torch.bfloat16} == {"model.norm.weight"}
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_conversion_that_is_stopped_leaves_nothing_or_the_old(tmp_path, monkeypatch):
    """Ctrl-C in the second shard, or a file that does not hold what was written into it, must not leave half a model
    under the right name, nor cost the one that was there."""
    hf_directory(tmp_path / "in", shard="100KB")
    convert_directory(tmp_path / "in", tmp_path / "old", 3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    calls = []

    def stopped(tensors, path, **options):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save_file(tensors, path, **options)

    def damaged(tensors, path, **options):
        save_file(tensors, path, **options)
        with path.open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))

    for save, error, message in (
        (stopped, KeyboardInterrupt, None),
        (damaged, InputError, "does not hold what was written as .*; what was there is unchanged"),
    ):
        monkeypatch.setattr(checkpoint, "save_file", save)
        for where in ("new", "old"):
            calls.clear()
            with pytest.raises(error, match=message):
                convert_directory(tmp_path / "in", tmp_path / where, 2, force=True)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "old"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    (tmp_path / "old" / "stale.txt").write_text("of the former model")
    convert_directory(tmp_path / "in", tmp_path / "old", 2, force=True)
    assert load_hf(tmp_path / "old").shape.n_kv_heads == 2 and not (tmp_path / "old" / "stale.txt").exists()


MEASURE = """
import re, sys, threading, time
import torch

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def watch():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.005)

idle, peaks, done = anonymous(), [], False
watcher = threading.Thread(target=watch)
watcher.start()
from attnlab.model.convert import convert_directory
convert_directory(*sys.argv[1:3], 2, sys.argv[3])
done = True
watcher.join()
print(max(peaks) - idle)
"""


@pytest.mark.slow
def test_memory_stays_below_a_shard_and_a_third(tmp_path):
    """Loading the model, or keeping what is written for a comparison later, asks of a 70B checkpoint's user a machine
    that holds it. Pages of mapped files are the system's to drop and do not count. A layer lies in two shards here."""
    shape = ModelShape(10, 2048, 16, 16, 128, 5632, 8192)
    with torch.device("meta"):
        model = Llama(shape).to(torch.bfloat16)
    sizes = {checkpoint.hf_name(name): tensor for name, tensor in model.state_dict().items()}
    names = list(sizes)
    cut = names.index("model.layers.5.self_attn.k_proj.weight")
    source, largest = tmp_path / "in", 0
    source.mkdir()
    (source / "config.json").write_text(json.dumps(checkpoint.hf_config(model)))
    shards = {"a.safetensors": names[:cut], "b.safetensors": names[cut:]}
    for file, held in shards.items():
        save_file({name: torch.empty_like(sizes[name], device="cpu").normal_() for name in held}, source / file)
        largest = max(largest, sum(sizes[name].nbytes for name in held))
        assert sum(sizes[name].nbytes for name in held) > 512 * 2**20
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    layer = sum(tensor.nbytes for name, tensor in sizes.items() if name.startswith("model.layers.0."))
    try:
        for method in ("mean", "aligned"):
            command = [sys.executable, "-c", MEASURE, source, tmp_path / "out", method]
            done = subprocess.run(command, cwd=Path(checkpoint.__file__).parents[2], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert int(done.stdout) < 1.3 * largest + (layer if method == "aligned" else 0)
            shutil.rmtree(tmp_path / "out")
    finally:
        shutil.rmtree(tmp_path)  # two gigabytes, which pytest would keep for three runs
