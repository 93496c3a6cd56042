"""What flows through one decode step: the size of every tensor in a layer, recorded while a model runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from attnlab import host
from attnlab.model import layers
from attnlab.model.llama import Llama
from attnlab.results import Run, row_key
from attnlab.shapes import ModelShape

SHAPE = ModelShape(1, 512, 8, 8, 64, 1536, 1024)
BATCH, CONTEXT = 1, 32
_NAMED = {
    "embed_tokens": "hidden state x",
    "layers.0.input_layernorm": "normed x",
    "layers.0.self_attn": "attention's output",
    "layers.0.mlp": "feed-forward output",
    "norm": "normed last x",
}


def decode_flow(shape: ModelShape, batch: int = BATCH, context: int = CONTEXT) -> list[dict[str, Any]]:
    """``tensor`` (its name), ``dims`` and ``bytes`` of each tensor of the first layer in a decode step that leaves
    ``context`` tokens in the cache, in the order in which they come about; float32."""
    model, found = Llama(shape, impl="grouped"), list[dict[str, Any]]()
    cache = model.new_cache(batch, context)
    tokens = torch.zeros(batch, context, dtype=torch.int64)

    def note(name: str, tensor: Tensor) -> None:
        if all(each["tensor"] != name for each in found):  # the first layer's
            found.append({"tensor": name, "dims": list(tensor.shape), "bytes": tensor.nbytes})

    with torch.inference_mode():
        model(tokens[:, 1:], cache)
        step = tokens[:, :1]
        for name, said in _NAMED.items():
            model.get_submodule(name).register_forward_hook(lambda _, __, out, said=said: note(said, out))
        note("token", step)
        with _watched(note, cache):
            note("logits", model(step, cache))
    return found


def fill(run: Run) -> None:
    """Append to ``run`` what flows with 8, 2 and 1 KV heads: rows of kind "flow", one a tensor."""
    rows, facts = {}, host.describe("cpu")
    for shape in map(SHAPE.with_kv_heads, (8, 2, 1)):
        for order, found in enumerate(decode_flow(shape)):
            asked = {"kind": "flow", "shape": asdict(shape), "batch": BATCH, "context": CONTEXT, "order": order}
            rows[row_key(asked)] = facts | asked | {"variant": shape.variant, "status": "ok"} | found
    run.plan(rows)
    for key, row in rows.items():
        if key not in run:
            run.append(key, row)


@contextmanager
def _watched(note: Any, cache: Any) -> Iterator[None]:
    """Tell ``note`` what goes into the cache and into attention."""
    module: Any = layers
    attend, append = module.attend, cache.append

    def noted_append(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        note("k of this token", k)
        note("v of this token", v)
        return append(layer, k, v)

    def noted_attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        for name, tensor in (("q", q), ("K in the cache, read", k), ("V in the cache, read", v)):
            note(name, tensor)
        mixed = attend(q, k, v, **options)
        note("mixed values", mixed)
        return mixed

    module.attend, cache.append = noted_attend, noted_append
    try:
        yield
    finally:
        module.attend, cache.append = attend, append
