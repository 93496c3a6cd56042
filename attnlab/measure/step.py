"""One decode step of a whole model at a fixed context, ready to time: neither prefill nor growth is in the timer."""

from collections.abc import Callable

import torch
from torch import Tensor

from attnlab.model.cache import KVCache
from attnlab.model.llama import Llama


def decode_step(model: Llama, batch: int, context: int, cache: KVCache | None = None) -> Callable[[], Tensor]:
    """One decode step of ``model`` at a fixed context, ready to time: the cache (a new one unless given) is filled
    beforehand, with noise, and set back after every step. Returns logits [B, 1, vocab]."""
    if cache is None:
        cache = noise_cache(model, batch, context + 1)
    cache.length = context
    token = torch.zeros(batch, 1, dtype=torch.int64, device=cache.k.device)

    def step() -> Tensor:
        with torch.inference_mode():
            logits = model(token, cache)
        cache.length = context
        return logits

    return step


def noise_cache(model: Llama, batch: int, capacity: int) -> KVCache:
    """A cache whose every slot holds noise: no kernel may profit from zeros or from untouched pages."""
    cache = model.new_cache(batch, capacity)
    cache.k.normal_()
    cache.v.normal_()
    return cache
