"""Models in and out of Hugging Face directories: ``config.json`` and safetensors, one file or several shards.

A checkpoint is untrusted input. No pickle is ever opened; the names, shapes and dtypes in every header are compared
with what the configuration asks for before a byte of weights is read; every difference is named in one error. Saving
writes a sibling directory and renames it, so a save that fails leaves what was there.
"""

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnlab.attention import DEVICES
from attnlab.errors import InputError, check_bytes, check_size
from attnlab.model.llama import Llama
from attnlab.shapes import ROPE_FACTORS, ModelShape, dtype_name, hf_window, read_hf_config

FAMILIES = ("llama", "mistral")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_VALID_DTYPES = ", ".join(map(dtype_name, _DTYPES.values()))


def load_hf(directory: str | Path, dtype: object = None, device: torch.device | str = "cpu") -> Llama:
    """The Llama in a Hugging Face directory, its weights on ``device`` in ``dtype`` (a string or a ``torch.dtype``;
    None: the checkpoint's own). Rotary frequencies stay float32.

    Runs ``llama`` (SmolLM is one) and ``mistral`` whose sliding window is absent or at least the context.
    Raises: InputError on any other model type, quantised weights, a directory of pickles, an index that points
        elsewhere, a damaged file, and missing, unexpected or mis-shaped tensors, by name.
    """
    device = _device(device)
    with opened(Path(directory)) as (config, shape, files):
        if shape.tied_embeddings:
            files.pop(_HEAD, None)
        stored = files[_EMBEDDING].get_slice(_EMBEDDING).get_dtype()
        wanted = _torch_dtype(dtype or config.get("dtype") or config.get("torch_dtype"), stored)
        # copy=True: a tensor as safetensors hands it out is a view of the mapped file, and changes when the file does.
        weights = {name: file.get_tensor(name).to(device, wanted, copy=True) for name, file in files.items()}
    with torch.device("meta"):
        model = Llama(shape)
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()}, assign=True)
    return model


def save_hf(model: Llama, directory: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write ``model`` as a directory that transformers loads (``LlamaForCausalLM``), in shards of at most
    ``max_shard_bytes`` of weights (a single larger tensor has a shard to itself).

    The directory appears complete or not at all. One that exists is replaced if it is empty or a model directory; files
    in it that are no weights (a tokenizer, a licence) are kept. transformers also wants ``n_heads`` to divide ``dim``.
    Raises: InputError if the model has q/k/v biases or q/k norms (a llama has none), if ``directory`` holds anything
        else, or if it cannot be written (full disk); what was there before is then unchanged.
    """
    check_size("max_shard_bytes", max_shard_bytes)
    if model.shape.qkv_bias or model.shape.qk_norm:
        part = "q/k/v biases" if model.shape.qkv_bias else "q/k norms"
        raise InputError(f"cannot save a model with {part} as a llama checkpoint: a llama has none")
    target = Path(directory).resolve()  # through a symbolic link, so that its target is replaced and not the link
    kept = replaceable(target)
    tensors = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    shards: list[list[str]] = [[]]
    for name, tensor in tensors.items():
        if shards[-1] and sum(tensors[held].nbytes for held in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    with replacing(target) as partial:
        write_model(partial, hf_config(model), shards, lambda name: tensors[name].detach().cpu().contiguous())
        for file in kept:
            shutil.copy2(file, partial / file.name)


# --- reading --------------------------------------------------------------------------------------------------------


@contextmanager
def opened(directory: Path) -> Iterator[tuple[dict[str, Any], ModelShape, dict[str, Any]]]:
    """A directory's configuration, its shape, and each tensor's name with the open safetensors file that holds it: the
    headers agree with the configuration, and no weights are in memory. Raises InputError as ``load_hf`` does."""
    if not directory.is_dir():
        raise InputError(f"no directory {directory}; give a directory that holds config.json and {_SINGLE}")
    config = read_hf_config(directory)
    shape = _runnable_shape(config)
    with ExitStack() as stack:
        files = _open(directory, stack)
        _compare(shape, {name: file.get_slice(name) for name, file in files.items()}, directory)
        head = files.get(_HEAD) if shape.tied_embeddings else None
        if head is not None and not torch.equal(head.get_tensor(_HEAD), files[_EMBEDDING].get_tensor(_EMBEDDING)):
            raise InputError(f"{directory}: config.json ties {_HEAD} to {_EMBEDDING}, but the two differ")
        yield config, shape, files


def _runnable_shape(config: Mapping[str, Any]) -> ModelShape:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"cannot run model_type {family!r}; valid: {', '.join(FAMILIES)} (SmolLM is a llama)")
    if (window := hf_window(config)) is not None:
        raise InputError(
            f"cannot run {family!r} with a sliding window of {window} tokens inside a context of "
            f"{config.get('max_position_embeddings')}: every layer here attends to its whole context"
        )
    if config.get("quantization_config"):
        raise InputError(f"cannot run quantised weights (quantization_config in config.json); valid: {_VALID_DTYPES}")
    return ModelShape.from_hf(config)


def _open(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor's name with the open file that holds it. Opening checks a file's header against its size."""
    paths, index = [directory / _SINGLE], {}
    if not paths[0].is_file():
        index = _weight_map(directory)
        paths = [directory / name for name in sorted(set(index.values()))]
    files: dict[str, Any] = {}
    for path in paths:
        if not path.is_file():
            raise InputError(f"{directory / _INDEX} names {path.name}, which is not there")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged: {error}") from None
        for name in file.keys():  # noqa: SIM118  # not a mapping
            if name in files:
                raise InputError(f"{path} holds {name}, and so does another shard")
            if index.get(name, path.name) != path.name:
                raise InputError(f"{path} holds {name}, which {_INDEX} places in {index[name]}")
            files[name] = file
    if lacking := sorted(set(index) - set(files)):
        raise InputError(f"{directory / _INDEX} names tensors that its files lack: {_some(lacking)}")
    # Rotary tables, which old checkpoints store, are computed here.
    return {name: file for name, file in files.items() if not name.endswith(".rotary_emb.inv_freq")}


def _weight_map(directory: Path) -> dict[str, str]:
    path = directory / _INDEX
    if not path.is_file():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise InputError(
                f"{directory} holds its weights only as pickles ({_some(pickles)}), which can run code when opened and "
                f"are never read here; expected {_SINGLE}, as transformers' save_pretrained writes it"
            )
        raise InputError(f"{directory} holds no weights: expected {_SINGLE} or {_INDEX}")
    index = read_hf_config(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise InputError(f"{path} holds no weight_map of tensor names to files")
    for name in index.values():
        plain = isinstance(name, str) and name.endswith(".safetensors") and name.isprintable()
        if not plain or "/" in name or "\\" in name or ".." in name:
            raise InputError(f"{path} names the file {name!r}; valid: a plain name in its directory, *.safetensors")
    return index


def _compare(shape: ModelShape, stored: Mapping[str, Any], directory: Path) -> None:
    """Raise one InputError that names every difference between what is stored and what ``shape`` asks for."""
    # A configuration may ask for sizes at which even a model without memory, and its rotary table, cannot be built.
    elements = sum(math.prod(part.get_shape()) for part in stored.values())
    check_bytes("the model that config.json describes", 8 * shape.n_params)
    if shape.n_layers > len(stored) or shape.head_dim > elements:
        raise InputError(
            f"{directory}: config.json describes {shape.n_layers:,} layers with a head_dim of {shape.head_dim:,}, but "
            f"the files hold {len(stored):,} tensors of {elements:,} elements in all"
        )
    with torch.device("meta"):
        expected = {hf_name(name): list(tensor.shape) for name, tensor in Llama(shape).state_dict().items()}
    optional = {_HEAD: expected[_EMBEDDING]} if shape.tied_embeddings else {}
    problems = []
    if missing := [name for name in expected if name not in stored]:
        problems.append(f"missing {_some(missing)}")
    if unexpected := sorted(name for name in stored if name not in expected and name not in optional):
        problems.append(f"unexpected {_some(unexpected)}")
    shapes = {**expected, **optional}
    found = {name: part.get_shape() for name, part in stored.items() if name in shapes}
    if odd := [f"{name} of {found[name]}, expected {shapes[name]}" for name in found if found[name] != shapes[name]]:
        problems.append(f"mis-shaped {_some(odd, '; ')}")
    kinds = {name: stored[name].get_dtype() for name in found}
    if odd := [f"{name} of {kind}" for name, kind in kinds.items() if kind not in _DTYPES]:
        problems.append(f"not of {_VALID_DTYPES}: {_some(odd)}")
    if problems:
        raise InputError(f"{directory} does not hold the tensors of its config.json: " + "; ".join(problems))


def _torch_dtype(dtype: object, stored: str) -> torch.dtype:
    name = dtype_name(dtype or _DTYPES[stored])
    if name not in map(dtype_name, _DTYPES.values()):
        raise InputError(f"a model cannot compute in {name}; valid: {_VALID_DTYPES}")
    return getattr(torch, name)


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}; valid: {', '.join(DEVICES)}") from None
    if found.type not in DEVICES or (found.type == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"device {str(found)!r} is not available here; valid: cpu, and cuda where there is one")
    return found


def hf_name(name: str) -> str:
    """transformers' name of a parameter; ours is that without "model."."""
    return name if name == _HEAD else f"model.{name}"


def _some(names: Iterable[str], separator: str = ", ") -> str:
    """The first few of a list that a hostile file may have made long, without its control characters."""
    names = list(names)
    shown = separator.join(name if name.isprintable() else repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- writing --------------------------------------------------------------------------------------------------------


def replaceable(target: Path) -> list[Path]:
    """Files of an existing ``target`` that a save keeps; raises InputError unless it is empty or a model directory."""
    if not target.exists():
        return []
    if not target.is_dir():
        raise InputError(f"{target} is a file; give a directory")
    files = list(target.iterdir())
    if files and "model_type" not in (read_hf_config(target) if (target / "config.json").is_file() else {}):
        raise InputError(f"{target} is not empty and not a model directory; give a new, an empty or a model directory")
    if folders := sorted(path.name for path in files if path.is_dir()):
        raise InputError(f"replacing {target} would delete its folders ({_some(folders)}); give another directory")
    return [path for path in files if path.suffix != ".safetensors" and path.name not in (_INDEX, "config.json")]


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder to write into, which takes ``target``'s place when the block ends, and is gone if the block fails.

    Raises: InputError if something cannot be written (full disk); what was there before is then unchanged.
    """
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for file in [*partial.iterdir(), partial]:
            _fsync(file)
        old = _swap(partial, target)
        _fsync(target.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise InputError(f"cannot save to {target}: {error}; what was there is unchanged") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if old is not None:
        shutil.rmtree(old)


def write_model(
    directory: Path, config: Mapping[str, Any], shards: list[list[str]], tensor_of: Callable[[str], Tensor]
) -> None:
    """config.json, and one file for each list of names; no more than one shard's tensors are asked for at a time, and
    each file is read back and compared. Raises OSError or SafetensorError."""
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(directory / file, {name: tensor_of(name) for name in names})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> int:
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.copymode(path.with_name("config.json"), path)  # safetensors makes files only their owner may read
    with safe_open(path, framework="pt") as written:
        for name, tensor in tensors.items():  # as bytes: a NaN differs from itself
            if not torch.equal(written.get_tensor(name).view(torch.uint8), tensor.view(torch.uint8)):
                raise OSError(f"{path.name} does not hold what was written as {name}")
    return sum(tensor.nbytes for tensor in tensors.values())


def hf_config(model: Llama) -> dict[str, Any]:
    """What transformers' config.json says of this model."""
    shape = model.shape
    dtype = dtype_name(model.embed_tokens.weight.dtype)
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := shape.rope_scaling) is not None:
        rope = {"rope_type": scaling.kind, "original_max_position_embeddings": scaling.original_context}
        rope |= {name: getattr(scaling, name) for name in ROPE_FACTORS}
    return {
        "_name_or_path": shape.name,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": shape.n_layers,
        "hidden_size": shape.dim,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_dim,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied_embeddings,
        "max_position_embeddings": shape.max_context,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # A shape knows no special tokens; unsaid, transformers would stop at token 2.
        "bos_token_id": None,
        "eos_token_id": None,
        # Both spellings: transformers before version 5 reads the first of each pair, later ones the second.
        "rope_theta": shape.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": shape.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(partial: Path, target: Path) -> Path | None:
    """Put the complete ``partial`` in ``target``'s place; return where the former content is now, if there was any."""
    if not target.exists():
        os.rename(partial, target)
        return None
    old = partial.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(old, target)
        raise
    return old
