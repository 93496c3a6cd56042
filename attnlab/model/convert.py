"""From many key/value heads to fewer: the checkpoint conversion of GQA (arXiv 2305.13245, section 2.1), and one better.

The KV heads are cut into contiguous groups, as query heads read them, and each group's K and V projections become one.
Pooling them as they are loses most of a decoder with rotary positions: its heads are near orthogonal, so their mean is
short and attention goes flat. Yet a head can be turned without changing what the model says, if its readers turn with
it: K by a complex factor per frequency pair, which is all that commutes with rotary positions, undone in Q; V by any
matrix, undone in O. "aligned" turns the heads of a group onto each other, and only then averages.

    G groups   R KV heads in each   D head_dim   I inputs (dim, and one for a bias)
"""

import re
import shutil
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.errors import InputError, check_choice, check_size, divisors
from attnlab.model.checkpoint import hf_name, opened, replaceable, replacing, write_model
from attnlab.model.llama import Llama, initial_deviation
from attnlab.shapes import ModelShape

METHODS = ("mean", "first", "random", "aligned")
_ROUNDS = 5
_PROJECTION = re.compile(r"(layers\.\d+\.)self_attn\.([qkvo]_proj\.(?:weight|bias))")
_OTHER_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def to_grouped(
    model: Llama, n_kv_heads: int, method: str = "mean", seed: int = 0, calibration: Tensor | None = None
) -> Llama:
    """A new model with ``n_kv_heads`` KV heads, on ``model``'s device and in its dtype; ``model`` is untouched.

    Args:
        n_kv_heads: must divide the present number.
        method: "mean" pools each group's K and V projection matrices (biases too), "first" keeps the group's first
            head, "random" draws K and V anew from the initial distribution (the paper's baselines). "aligned" turns a
            group's heads onto each other before it averages them, and keeps their norms; it changes Q and O as well.
        seed: of "random".
        calibration: of "aligned": tokens [B, T]; heads are then compared by what they make of them, not by weights.
    Raises: InputError on a number that does not divide, an unknown method, or "aligned" and q/k norms.
    """
    if calibration is not None and method != "aligned":
        raise InputError(f"a calibration text is of use to method 'aligned' only, got {method!r}")
    stored = model.state_dict()
    converted = _converter(model.shape, n_kv_heads, method, seed, stored.__getitem__, _inputs(model, calibration))
    weights = {name: converted(name).clone() for name in stored}
    with torch.device("meta"):
        grouped = Llama(model.shape.with_kv_heads(n_kv_heads), model.impl)
    grouped.load_state_dict(weights, assign=True)
    return grouped.train(model.training)


def convert_directory(
    source: str | Path, target: str | Path, n_kv_heads: int, method: str = "mean", *, force: bool = False, seed: int = 0
) -> ModelShape:
    """Convert a Hugging Face directory as ``to_grouped`` does, one tensor at a time ("aligned": one layer): no more
    than what changes of one shard is in memory. Shards stay as they are; a tokenizer and other files are copied, and
    config.json differs only in its number of KV heads (and says ``head_dim``). Returns the new shape.

    ``target`` appears complete, read back and compared, or not at all.
    Raises: InputError where ``load_hf`` or ``to_grouped`` do, on a ``target`` that exists (with ``force``: that is not
        a model directory) or is ``source``, or that cannot be written; what was there is then unchanged.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    if source == target:
        raise InputError(f"cannot convert {source} onto itself; give another directory to write to")
    if target.exists() and not force:
        raise InputError(f"{target} exists; give a new directory, or --force (force=True) to replace it")
    replaceable(target)
    with opened(source) as (config, shape, files):
        converted = _converter(
            *(shape, n_kv_heads, method, seed),
            lambda name: files[hf_name(name)].get_tensor(hf_name(name)),
        )
        shards: dict[int, list[str]] = {}
        for name, file in files.items():
            shards.setdefault(id(file), []).append(name)
        config |= {"num_key_value_heads": n_kv_heads, "head_dim": shape.head_dim}
        with replacing(target) as partial:
            write_model(partial, config, [*shards.values()], lambda name: converted(name.removeprefix("model.")))
            for file in source.iterdir():
                if file.is_file() and file.name != "config.json" and not file.name.endswith(_OTHER_WEIGHTS):
                    shutil.copy2(file, partial / file.name)
            with opened(partial) as (_, written, _):
                return written


def _converter(
    shape: ModelShape,
    n_kv_heads: int,
    method: str,
    seed: int,
    stored: Callable[[str], Tensor],
    inputs: dict[str, Tensor] | None = None,
) -> Callable[[str], Tensor]:
    """A function from a parameter's name to its converted value, given one to its present value."""
    check_choice("method", method, METHODS)
    if shape.n_kv_heads % check_size("n_kv_heads", n_kv_heads):
        valid = ", ".join(map(str, divisors(shape.n_kv_heads)))
        raise InputError(
            f"n_kv_heads={n_kv_heads} does not divide the model's {shape.n_kv_heads} KV heads; valid: {valid}"
        )
    if method == "aligned" and shape.qk_norm:
        raise InputError(
            f"a model with q/k norms cannot be aligned: they fix the axes; valid: {', '.join(METHODS[:3])}"
        )

    @lru_cache(maxsize=1)  # a layer's projections are asked for one after the other, as a rule
    def aligned(layer: str) -> dict[str, Tensor]:
        names = [f"{part}_proj.weight" for part in "qkvo"] + [f"{part}_proj.bias" for part in "qkv" if shape.qkv_bias]
        # A projection reads what was normalised and then scaled by this weight.
        seen = inputs[layer] if inputs else stored(f"{layer}input_layernorm.weight")
        return _aligned({name: stored(f"{layer}self_attn.{name}") for name in names}, shape, n_kv_heads, seen)

    def converted(name: str) -> Tensor:
        tensor, projection = stored(name), _PROJECTION.fullmatch(name)
        if projection is None or (n_kv_heads == shape.n_kv_heads and method != "random"):
            return tensor
        if method == "aligned":
            return aligned(projection[1])[projection[2]]
        if projection[2][0] in "qo":
            return tensor
        groups = tensor.unflatten(0, (n_kv_heads, shape.n_kv_heads // n_kv_heads, -1))
        if method == "mean":
            return groups.mean(1).flatten(0, 1)  # torch sums 16-bit numbers in float32
        first = groups[:, 0].flatten(0, 1)
        if method == "first":
            return first
        # A seed of its own for each name: the same draw, whatever the order
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        deviation = 0.0 if tensor.ndim == 1 else initial_deviation(shape.dim)
        return (torch.randn(first.shape, generator=generator) * deviation).to(first)

    return converted


def _aligned(layer: dict[str, Tensor], shape: ModelShape, n_kv_heads: int, seen: Tensor) -> dict[str, Tensor]:
    """One layer's projections by name -> the same, converted; ``seen`` as ``_consensus`` has it, or one bias short."""
    G, R, D = n_kv_heads, shape.n_kv_heads // n_kv_heads, shape.head_dim
    precise = torch.promote_types(layer["o_proj.weight"].dtype, torch.float32)

    def rows(part: str) -> Tensor:
        columns = [layer[f"{part}_proj.weight"]]
        if shape.qkv_bias:  # one more column, of an input that is always 1
            columns.append(layer[f"{part}_proj.bias"][:, None])
        return torch.cat(columns, 1).to(precise)

    seen = seen.to(precise)
    if seen.ndim == 1 and shape.qkv_bias:
        seen = F.pad(seen, (0, 1), value=1.0)
    k = torch.complex(*rows("k").unflatten(0, (G, R, 2, D // 2)).unbind(2))  # [G, R, D/2, I], pairs (i, i + D/2)
    q = torch.complex(*rows("q").unflatten(0, (G, R, shape.group_size, 2, D // 2)).unbind(3))
    k, turns = _consensus(k.transpose(1, 2)[..., None, :], seen)  # [G, D/2, 1, I] and [G, D/2, R, 1, 1]
    q = q * turns[..., 0, 0].conj().transpose(1, 2)[:, :, None, :, None]
    v, turns = _consensus(rows("v").unflatten(0, (G, R, D)), seen)
    o = layer["o_proj.weight"].to(precise).unflatten(1, (G, R, -1, D))
    new = {
        "q": torch.stack((q.real, q.imag), 3).flatten(0, -2),
        "k": torch.stack((k.real, k.imag), 1).flatten(0, -2),
        "v": v.flatten(0, 1),
        "o": torch.einsum("igrhd,grde->igrhe", o, turns).flatten(1),
    }
    split = {f"{part}_proj.bias": new[part][:, -1] for part in "qkv" if shape.qkv_bias}
    split |= {f"{part}_proj.weight": matrix[:, : layer[f"{part}_proj.weight"].shape[1]] for part, matrix in new.items()}
    return {name: tensor.to(layer[name].dtype).contiguous() for name, tensor in split.items()}


def _consensus(heads: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """heads [..., R, n, I] -> one head [..., n, I], and what makes each of it, [..., R, n, n]: unitary times a number.

    Generalised Procrustes (Gower 1975): every head is turned onto the sum of all, by the unitary part of their product,
    some rounds over; head 0 is not turned. The sum gets the norm of the heads (root mean square), each turn the ratio
    of its head's norm to it: norms stay, and of heads that differ by a unitary map and a number nothing is lost.
    Inputs count as ``seen`` says: [I], their scales, or [N, I], examples of them.
    """
    R, n = heads.shape[-3:-1]
    rows = (heads * seen if seen.ndim == 1 else heads @ seen.T.to(heads)).flatten(-3, -2)
    gram = rows @ rows.mH  # all that the rounds need, [..., R·n, R·n]
    gram = gram.to(torch.promote_types(gram.dtype, torch.float64))
    tiny = torch.finfo(torch.float32).tiny  # a head of zeros stays one
    norms = gram.diagonal(dim1=-2, dim2=-1).real.unflatten(-1, (R, n)).sum(-1).sqrt()
    norm = norms.square().mean(-1, keepdim=True).sqrt()
    onto = gram[..., :n]  # at first onto head 0
    for _ in range(_ROUNDS):
        u, _, vh = torch.linalg.svd(onto.unflatten(-2, (R, n)))
        turns = u @ vh
        turns = turns @ turns[..., :1, :, :].mH
        onto = gram @ turns.flatten(-3, -2)
    length = (turns.flatten(-3, -2).conj() * onto).sum((-2, -1), keepdim=True).real.clamp_min(0).sqrt()  # of the sum
    common = (turns.mH.to(heads) @ heads).sum(-3) * (norm[..., None] / length.clamp_min(tiny)).to(heads)
    return common, (turns * (norms / norm.clamp_min(tiny))[..., None, None]).to(heads)


def _inputs(model: Llama, tokens: Tensor | None) -> dict[str, Tensor]:
    """What each layer's attention reads, by the layer's name: examples [N, I] with the covariance that ``tokens`` give
    it. Raises InputError on tokens that the model does not read."""
    seen: dict[str, Tensor] = {}

    def look(name: str, read: Tensor) -> None:
        x = read.flatten(0, 1).to(torch.promote_types(read.dtype, torch.float32))
        seen[name] = torch.linalg.qr(F.pad(x, (0, int(model.shape.qkv_bias)), value=1.0), mode="r").R

    if tokens is not None:
        with ExitStack() as stack, torch.no_grad():
            for i, block in enumerate(model.layers):
                norm: torch.nn.Module = block.input_layernorm  # type: ignore[assignment]  # a Block's
                hook = norm.register_forward_hook(lambda _, __, read, name=f"layers.{i}.": look(name, read))
                stack.callback(hook.remove)
            model(tokens)
    return seen
