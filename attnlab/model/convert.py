"""From many key/value heads to fewer: the checkpoint conversion of GQA (arXiv 2305.13245, section 2.1).

The G heads are cut into contiguous groups, as query heads read them, and each group's K and V projections become one.
Q and O stay. On decoders with rotary positions pooling alone loses most of the quality (KV heads are near orthogonal,
so their mean is short and attention goes flat): train a little afterwards.

    G KV heads before   D head_dim
"""

import torch
from torch import Tensor

from attnlab.errors import InputError, check_choice, check_size, divisors
from attnlab.model.llama import Llama

METHODS = ("mean", "first", "random")
_INITIAL_DEVIATION = 0.02


def to_grouped(model: Llama, n_kv_heads: int, method: str = "mean", seed: int = 0) -> Llama:
    """A new model with ``n_kv_heads`` KV heads, on ``model``'s device and in its dtype; ``model`` is untouched.

    Args:
        n_kv_heads: must divide the present number.
        method: "mean" pools each group's K and V projection matrices (biases too), "first" keeps the group's first
            head, "random" draws K and V anew from the initial distribution (the paper's baselines).
        seed: of "random".
    Raises: InputError on a number that does not divide, or an unknown method.
    """
    check_choice("method", method, METHODS)
    present = model.shape.n_kv_heads
    if present % check_size("n_kv_heads", n_kv_heads):
        valid = ", ".join(map(str, divisors(present)))
        raise InputError(f"n_kv_heads={n_kv_heads} does not divide the model's {present} KV heads; valid: {valid}")
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias")):
            weights[name] = _fewer(tensor, n_kv_heads, present, method, generator)
        else:
            weights[name] = tensor.clone()
    with torch.device("meta"):
        grouped = Llama(model.shape.with_kv_heads(n_kv_heads), model.impl)
    grouped.load_state_dict(weights, assign=True)
    return grouped.train(model.training)


def _fewer(tensor: Tensor, n_kv_heads: int, present: int, method: str, generator: torch.Generator) -> Tensor:
    """A projection [G · D, dim] or its bias [G · D] -> the same with ``n_kv_heads`` for G."""
    groups = tensor.unflatten(0, (n_kv_heads, present // n_kv_heads, -1))
    if method == "mean":
        return groups.mean(1).flatten(0, 1)  # torch sums 16-bit numbers in float32
    first = groups[:, 0].flatten(0, 1).clone()
    if method == "first":
        return first
    deviation = 0.0 if tensor.ndim == 1 else _INITIAL_DEVIATION
    return (torch.randn(first.shape, generator=generator) * deviation).to(first)
