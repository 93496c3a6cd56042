"""What decoding fuses: several projections into one matrix, and on a CPU a whole block into one call.

A small model's block costs forty small calls, hundreds of microseconds of Python and dispatch that no arithmetic
hides. ``native.block`` does the same in one; ``layers`` remains the text of what is computed, and a test holds the two
together.
"""

from typing import Any

import torch
from torch import Tensor, nn

from attnlab import native
from attnlab.attention import auto
from attnlab.model.cache import KVCache


def one_matrix(projections: tuple[nn.Linear, ...]) -> Tensor:
    """The weights of ``projections`` one behind the other, [sum of outputs, inputs]: a view where they lie so already,
    else they are laid so, and become views of the result."""
    first, inputs, outputs = projections[0].weight, projections[0].in_features, 0
    where, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for projection in projections:
        weight = projection.weight
        here = weight.untyped_storage().data_ptr() == storage and weight.storage_offset() == where + outputs * inputs
        if not here or not weight.is_contiguous():
            break
        outputs += projection.out_features
    else:
        return first.as_strided((outputs, inputs), (inputs, 1))
    with torch.inference_mode(False), torch.no_grad():  # parameters that are inference tensors could not be trained
        joined = torch.cat([projection.weight for projection in projections])
        for projection, piece in zip(projections, joined.split([p.out_features for p in projections]), strict=True):
            projection.weight.data = piece
    return joined


class Addresses:
    """Where ``native.block`` finds a block's six matrices and vectors; found anew when a parameter has moved."""

    def __init__(self) -> None:
        self.seen: tuple[int, ...] = ()
        self.array: Any = None

    def of(self, block: Any) -> Any:
        attention, mlp = block.self_attn, block.mlp
        parts: tuple[tuple[Any, ...], ...] = (
            *((block.input_layernorm,), (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,)),
            *((block.post_attention_layernorm,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)),
        )
        if self.seen != _where(parts):
            for part in parts:
                if isinstance(part[0], nn.Linear):
                    one_matrix(part)
            self.seen, self.array = _where(parts), native.addresses([part[0].weight for part in parts])
        return self.array


def _where(parts: tuple[tuple[Any, ...], ...]) -> tuple[int, ...]:
    # _parameters: a module's own look-up of an attribute takes longer than everything else here
    return tuple(module._parameters["weight"].data_ptr() for part in parts for module in part)


def takes(block: Any, x: Tensor, cache: KVCache, impl: str) -> bool:
    """Whether one call can do this: a step of one token per sequence on a CPU that ``native`` serves, where ``impl`` is
    or picks the C++ loop, of a block without biases and norms on q and k."""
    shape, weights = (
        block.shape,
        (block.self_attn.o_proj.weight, block.mlp.gate_proj.weight, block.mlp.down_proj.weight),
    )
    return (
        x.shape[1] == 1
        and x.shape[0] == cache.batch
        and cache.starts is None
        and cache.k.dtype == x.dtype
        and not (shape.qkv_bias or shape.qk_norm or shape.head_dim % (2 * native.LANES))
        and native.takes(x, weights[1])
        and all(weight.dtype == x.dtype and weight.shape[1] % native.LANES == 0 for weight in weights)
        and (impl == "cpp" or (impl == "auto" and auto.decodes(x, shape.group_size, cache.length + 1) == "cpp"))
    )


def step(block: Any, x: Tensor, by: tuple[Tensor, Tensor], cache: KVCache, layer: int) -> Tensor:
    """x [B, 1, dim] -> [B, 1, dim] as ``Block.forward``, K and V appended; for what ``takes`` says. Raises
    ``InputError`` on a cache that is full."""
    k, v, end = cache.k[layer], cache.v[layer], cache.end(1)
    return native.block(x, block.shape, block.addresses.of(block), *by, k, v, end)
