"""Checkpoint directories: what is written is read back; what is damaged, foreign or hostile is named and nothing is
run.

That transformers reads and writes the same directories is shown in test_parity.
"""

import errno
import json
import pickle
import resource
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnlab.errors import InputError
from attnlab.model import checkpoint
from attnlab.model.checkpoint import load_hf, save_hf
from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape, RopeScaling

INDEX = "model.safetensors.index.json"
ROPE = RopeScaling("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32)
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def model_of(seed: int = 0, **changes) -> Llama:
    torch.manual_seed(seed)
    sizes = {"n_layers": 2, "dim": 18, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "ffn_dim": 19, "vocab_size": 23}
    return Llama(ModelShape(**{**sizes, **changes}))


def edit_json(path: Path, **changes) -> None:
    """Set keys of a JSON file; a value of ... removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(path: Path, **changes) -> None:
    """Set tensors of a safetensors file; None removes."""
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def assert_same(left: Llama, right: Llama) -> None:
    assert left.shape == right.shape
    states = left.state_dict(), right.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype
        assert torch.equal(tensor, states[1][name]), name


# --- both ways ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_embeddings": True}, {"rope_theta": 500000.0, "rope_scaling": ROPE, "max_context": 97, "name": "a/b"}],
    ids=["untied", "tied", "llama3"],
)
@pytest.mark.parametrize("shard", [5 * 10**9, 3000], ids=["one-file", "sharded"])
def test_what_is_saved_is_read_back(tmp_path, changes, dtype, shard):
    """A field of the shape that is not written, or written under a name that is not read, comes back as its default."""
    model = model_of(**changes).to(dtype)
    save_hf(model, tmp_path / "new" / "model", max_shard_bytes=shard)
    loaded = load_hf(tmp_path / "new" / "model")
    assert_same(loaded, model)
    assert loaded._frequencies.dtype == torch.float32
    assert torch.equal(loaded._frequencies, model._frequencies)
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "model"]


def test_shards_hold_every_tensor_once_and_no_more_than_asked(tmp_path):
    """A shard that starts over without resetting its size, or a tensor larger than a shard, loses or doubles
    tensors."""
    model = model_of()
    save_hf(model, tmp_path / "m", max_shard_bytes=3000)
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "m").glob("*.safetensors")}
    assert len(shards) > 3
    assert sorted(shards) == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert {name: file for file, tensors in shards.items() for name in tensors} == index["weight_map"]
    assert sum(len(tensors) for tensors in shards.values()) == len(model.state_dict())
    sizes = {file: sum(tensor.nbytes for tensor in tensors.values()) for file, tensors in shards.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values()) == model.shape.n_params * 4
    assert all(size <= 3000 or len(shards[file]) == 1 for file, size in sizes.items())
    first = {file: next(name for name, home in index["weight_map"].items() if home == file) for file in sizes}
    full = zip(sorted(sizes), sorted(sizes)[1:], strict=False)
    assert all(sizes[file] + shards[after][first[after]].nbytes > 3000 for file, after in full)
    assert any(size > 3000 for size in sizes.values()) and any(len(tensors) > 1 for tensors in shards.values())


@pytest.mark.parametrize("spelling", [("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")])
def test_either_spelling_of_the_configuration_is_whole(tmp_path, spelling):
    """transformers 4 reads rope_theta, rope_scaling and torch_dtype, version 5 rope_parameters and dtype; what one of
    them does not find becomes a default, and the model rambles."""
    model = model_of(rope_theta=500000.0, rope_scaling=ROPE).to(torch.float16)
    save_hf(model, tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", **dict.fromkeys(spelling, ...))
    assert_same(load_hf(tmp_path / "m"), model)


def test_weights_say_their_format(saved):
    """transformers before version 5 refuses a safetensors file that does not say it is PyTorch's."""
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("asked", ["bf16", torch.bfloat16])
def test_dtype_is_the_checkpoints_unless_asked(tmp_path, asked):
    """transformers calls it dtype, and called it torch_dtype; files written before either go by their tensors."""
    model = model_of()
    save_hf(model, tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    assert load_hf(tmp_path / "m", dtype=asked).norm.weight.dtype == torch.bfloat16
    for keys, expected in [
        ({"dtype": ..., "torch_dtype": ...}, torch.float32),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, torch.bfloat16),
    ]:
        edit_json(config, **keys)
        loaded = load_hf(tmp_path / "m")
        assert {p.dtype for p in loaded.parameters()} == {expected}
        assert torch.equal(loaded.embed_tokens.weight, model.embed_tokens.weight.to(expected))


def test_loaded_weights_do_not_hang_on_the_file(tmp_path):
    """safetensors hands out views of the mapped file: writing to it afterwards would change, or crash, the model."""
    model = model_of()
    save_hf(model, tmp_path / "m")
    loaded = load_hf(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    with file.open("r+b") as open_file:
        open_file.write(b"\0" * file.stat().st_size)
    assert_same(loaded, model)


def test_a_tied_checkpoint_may_store_its_head(tmp_path):
    """Many tied checkpoints store the head as well. The same numbers are accepted; others would be dropped without a
    word."""
    model = model_of(tied_embeddings=True)
    save_hf(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    edit_tensors(file, **{"lm_head.weight": model.embed_tokens.weight.detach().clone()})
    assert_same(load_hf(tmp_path / "m"), model)
    edit_tensors(file, **{"lm_head.weight": model.embed_tokens.weight.detach() + 1})
    with pytest.raises(InputError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but the two differ"):
        load_hf(tmp_path / "m")


def test_rotary_tables_of_old_checkpoints_are_ignored(tmp_path):
    """Llama 1 and 2 conversions store inv_freq in every layer, some of them rounded to 16 bit."""
    model = model_of()
    save_hf(model, tmp_path / "m")
    edit_tensors(
        tmp_path / "m" / "model.safetensors", **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    )
    assert_same(load_hf(tmp_path / "m"), model)


# --- damaged, foreign, hostile --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    save_hf(model_of(), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path) -> Path:
    save_hf(model_of(), tmp_path / "s", max_shard_bytes=3000)
    return tmp_path / "s"


@pytest.mark.parametrize(
    "damage", ["truncated", "cut in the header", "empty", "too long", "header length", "huge tensor", "no JSON"]
)
def test_a_damaged_file_is_named(saved, damage):
    """A download that broke off, or a header that promises 2^62 bytes, must not end in a traceback or an allocation."""
    file = saved / "model.safetensors"
    data = file.read_bytes()
    header = json.dumps({K_PROJ: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(
        {
            "truncated": data[:-1],
            "cut in the header": data[:50],
            "empty": b"",
            "too long": data + b"\0",
            "header length": struct.pack("<Q", 2**62) + data[8:],
            "huge tensor": struct.pack("<Q", len(header)) + header + b"\0" * 4,
            "no JSON": struct.pack("<Q", 4) + b"[[[[" + data,
        }[damage]
    )
    with pytest.raises(InputError, match=r"model\.safetensors is damaged: "):
        load_hf(saved)


def test_every_wrong_tensor_is_named_in_one_error(saved):
    """One error at a time, or a strict=False load, leaves layers at random weights or the user at the third attempt."""
    edit_tensors(
        saved / "model.safetensors",
        **{
            "model.norm.weight": None,
            K_PROJ: torch.ones(60, 18),  # spelt out for 6 heads
            "model.layers.7.mlp.up_proj.weight": torch.ones(19, 18),
            "lm_head.weight": torch.ones(23, 18, dtype=torch.int8),
        },
    )
    with pytest.raises(InputError) as caught:
        load_hf(saved)
    message = str(caught.value)
    assert "missing model.norm.weight;" in message
    assert "unexpected model.layers.7.mlp.up_proj.weight;" in message
    assert f"mis-shaped {K_PROJ} of [60, 18], expected [20, 18];" in message
    assert "not of float64, float32, bfloat16, float16: lm_head.weight of I8" in message
    assert "\n" not in message


def test_a_hostile_list_of_names_stays_one_line(saved):
    """A thousand unexpected tensors, or escape sequences in a name, are not printed to a terminal as they come."""
    names = [f"\x1b[2J{number}\n" for number in range(1000)]
    edit_tensors(saved / "model.safetensors", **{name: torch.ones(1) for name in names})
    with pytest.raises(InputError, match="and 995 more") as caught:
        load_hf(saved)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 2**40}, {"head_dim": 2**40}, {"hidden_size": 2**40, "vocab_size": 2**40}],
    ids=["layers", "head_dim", "vocabulary"],
)
def test_an_absurd_configuration_allocates_nothing(saved, changes):
    """The model that config.json asks for is built, if only to compare names: 2^40 layers would never finish."""
    edit_json(saved / "config.json", **changes)
    with pytest.raises(InputError, match=r"config\.json describes"):
        load_hf(saved)


@pytest.mark.parametrize(
    "name",
    [
        "../m/model.safetensors",
        "/tmp/a.safetensors",
        "sub/a.safetensors",
        "/etc/passwd",
        "a\\b.safetensors",
        "..safetensors",
        "a.bin",
        "a\0.safetensors",
        "",
        5,
        None,
        ["a"],
    ],
)
def test_an_index_cannot_point_elsewhere(sharded, name):
    """A shard name is joined to the directory and opened: one with a path reads any file of the user's."""
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json names the file .*; valid: a plain name in its directory"):
        load_hf(sharded)


def test_an_index_that_disagrees_with_its_files_is_refused(sharded):
    """Shards of two models in one directory, a shard not downloaded, a tensor in two shards: each loads something."""
    index = json.loads((sharded / INDEX).read_text())
    first, second = "model-00001-of", "model-00002-of"
    files = {key: next(sharded.glob(f"{key}*")) for key in (first, second)}
    home = index["weight_map"]

    def refused(weight_map: object, message: str) -> None:
        (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            load_hf(sharded)

    refused({}, "holds no weight_map")
    refused([1], "holds no weight_map")
    refused(home | {"model.extra": files[first].name}, "names tensors that its files lack: model.extra")
    refused(home | {"model.norm.weight": "absent.safetensors"}, "names absent.safetensors, which is not there")
    refused(home | {"model.embed_tokens.weight": files[second].name}, f"{first}.* which .* places in {second}")
    # In neither's listing, but stored twice
    edit_tensors(files[second], **{"model.embed_tokens.weight": torch.ones(23, 18)})
    del home["model.embed_tokens.weight"]
    refused(home, "embed_tokens.weight, and so does another shard")


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_never_opened(saved, name, tmp_path):
    """A .bin checkpoint runs whatever code its author put in when it is opened."""
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    with pytest.raises(InputError, match=rf"only as pickles \({name}\), which can run code when opened"):
        load_hf(saved)
    assert not (tmp_path / "sprung").exists()
    (saved / name).unlink()
    with pytest.raises(InputError, match=r"holds no weights: expected model\.safetensors or"):
        load_hf(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "cannot run model_type 'qwen2'; valid: llama, mistral"),
        ({"model_type": "qwen3"}, "cannot run model_type 'qwen3'"),
        ({"model_type": "phi3"}, "cannot run model_type 'phi3'"),
        ({"model_type": "gpt2"}, "cannot run model_type 'gpt2'"),
        ({"model_type": ...}, "cannot run model_type None"),
        ({"model_type": "mistral", "sliding_window": 31}, "cannot run 'mistral' with a sliding window of 31 tokens"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_local_experts": 8}, "experts"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": ...},
            "'yarn' can be counted but not run",
        ),
        ({"num_key_value_heads": 4}, "does not divide n_heads=6; valid: 1, 2, 3, 6"),
        ({"dtype": "int8"}, "cannot compute in int8; valid: float64"),
        ({"dtype": "float31"}, "unknown dtype 'float31'"),
    ],
)
def test_another_architecture_is_refused_by_name(saved, changes, message):
    """A Qwen2 loaded as a Llama drops its biases, a window is ignored, a rope scaling is skipped: all speak
    fluently."""
    edit_json(saved / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        load_hf(saved)


def test_a_window_as_long_as_the_context_is_none(saved):
    """Mistral 7B v0.2 and later have none or one that never bites: they run."""
    for window in (None, 4096, 5000):
        edit_json(saved / "config.json", model_type="mistral", sliding_window=window)
        assert_same(load_hf(saved), model_of())


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("absent", {}, "no directory .*absent; give a directory"),
        ("m/config.json", {}, "no directory .*; give a directory"),
        ("m", {"dtype": "float8"}, "cannot compute in float8"),
        ("m", {"device": "gpu"}, "unknown device 'gpu'; valid: cpu, cuda"),
        ("m", {"device": "meta"}, "device 'meta' is not available here"),
    ],
)
def test_what_cannot_be_loaded_is_said(saved, where, options, message):
    """A wrong path or device is the commonest mistake of all."""
    with pytest.raises(InputError, match=message):
        load_hf(saved.parent / where, **options)


# --- saving over something ------------------------------------------------------------------------------------------


@contextmanager
def full_disk():
    """No file can grow beyond 4 KiB, which the operating system enforces as it enforces a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_on(monkeypatch, target: object, name: str, call: int, error: BaseException) -> None:
    """Let the ``call``-th call of ``target.name`` raise ``error``."""
    real, calls = getattr(target, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, failing)


def test_a_save_that_fails_leaves_what_was_there(saved, monkeypatch):
    """Writing into the directory itself, or removing it first, loses the only good checkpoint when the disk is full,
    when the user presses Ctrl-C after the first shard, or when the new directory cannot be moved into place."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    other = model_of(seed=1)

    def unchanged() -> bool:
        return [p.name for p in saved.parent.iterdir()] == ["m"] and before == {
            p.name: p.read_bytes() for p in saved.iterdir()
        }

    with (
        full_disk(),
        pytest.raises(InputError, match=r"cannot save to .*File too large.*; what was there is unchanged"),
    ):
        save_hf(other, saved)
    assert unchanged()
    for target, name, call, error in [
        (Path, "write_text", 1, OSError(errno.ENOSPC, "No space left on device")),
        (checkpoint, "save_file", 3, KeyboardInterrupt()),
        (checkpoint.os, "fsync", 2, OSError(errno.EIO, "Input/output error")),
        (checkpoint.os, "rename", 1, OSError(errno.EACCES, "Permission denied")),
        (checkpoint.os, "rename", 2, OSError(errno.EACCES, "Permission denied")),
        (checkpoint.os, "rename", 2, KeyboardInterrupt()),
    ]:
        with monkeypatch.context() as patch:
            fail_on(patch, target, name, call, error)
            with pytest.raises((InputError, KeyboardInterrupt)) as caught:
                save_hf(other, saved, max_shard_bytes=3000)
        assert isinstance(caught.value, KeyboardInterrupt) or str(error) in str(caught.value)
        assert unchanged(), (name, call)
    save_hf(other, saved)
    assert_same(load_hf(saved), other)


def test_a_failed_first_save_leaves_nothing(tmp_path):
    """Half a model under the right name is worse than none."""
    with full_disk(), pytest.raises(InputError, match="cannot save"):
        save_hf(model_of(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_replacing_a_model_leaves_no_old_weights_and_keeps_its_other_files(saved):
    """An old single file beside new shards would be loaded in their place, and a tokenizer belongs to its vocabulary,
    not to the weights."""
    (saved / "tokenizer.json").write_text("{}")
    (saved / "LICENSE").write_text("free")
    other = model_of(seed=1)
    save_hf(other, saved, max_shard_bytes=3000)
    assert not (saved / "model.safetensors").exists()
    assert (saved / "tokenizer.json").read_text() == "{}" and (saved / "LICENSE").read_text() == "free"
    assert_same(load_hf(saved), other)
    save_hf(load_hf(saved), saved)  # onto itself
    assert sorted(p.name for p in saved.iterdir()) == ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
    assert_same(load_hf(saved), other)
    assert [p.name for p in saved.parent.iterdir()] == ["m"]


def test_a_link_to_a_model_directory_stays_a_link(saved, tmp_path):
    """Renaming onto a symbolic link replaces the link and leaves the old model where everyone else looks."""
    (tmp_path / "latest").symlink_to(saved)
    save_hf(model_of(seed=1), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert_same(load_hf(saved), model_of(seed=1))


def test_only_a_model_directory_is_replaced(saved, tmp_path):
    """`attnlab convert IN .` in a home directory must not delete it."""
    model = model_of()
    (tmp_path / "notes").mkdir()
    save_hf(model, tmp_path / "notes")  # empty: fine
    shutil.rmtree(tmp_path / "notes")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    (saved / "original").mkdir()
    for where, message in [
        ("notes", "not empty and not a model directory; give a new, an empty or a model directory"),
        ("file", "is a file; give a directory"),
        ("m", r"would delete its folders \(original\)"),
        ("file/below", "cannot save to"),
    ]:
        with pytest.raises(InputError, match=message):
            save_hf(model, tmp_path / where)
    (tmp_path / "notes" / "config.json").write_text('{"colour": "blue"}')
    with pytest.raises(InputError, match="not a model directory"):
        save_hf(model, tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear"


@pytest.mark.parametrize(("changes", "part"), [({"qkv_bias": True}, "q/k/v biases"), ({"qk_norm": True}, "q/k norms")])
def test_what_a_llama_does_not_have_is_not_saved_as_one(tmp_path, changes, part):
    """A reader would ignore the biases, or refuse the file, long after the model that had them is gone."""
    with pytest.raises(InputError, match=f"cannot save a model with {part} as a llama"):
        save_hf(model_of(**changes), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_no_bytes_is_refused(tmp_path):
    """Zero would put every tensor in a shard of its own by accident."""
    with pytest.raises(InputError, match="max_shard_bytes must be between 1"):
        save_hf(model_of(), tmp_path / "m", max_shard_bytes=0)


def test_weights_are_as_readable_as_the_configuration(saved):
    """safetensors creates files that only their owner may read: a model saved for a group was closed to it."""
    assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode
