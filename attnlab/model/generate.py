"""Tokens out of a model, one forward pass each: a prefill of the prompt, then single steps on the KV cache.

The head is applied to the last position only, and no pass is spent on the last token, whose successor nobody asked for.

    B batch   T prompt tokens   V vocabulary
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnlab.errors import InputError, check_size
from attnlab.model.cache import KVCache
from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape


def generate(
    model: Llama,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    lengths: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos: int | None = None,
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue ``tokens`` [B, T] -> int64 [B, T + new] on the model's device, prompt included.

    Args:
        max_new_tokens: the most that are generated; ``new`` is less only when every row has met ``eos``.
        lengths: how many tokens of each row are its prompt, the last ones (whatever stands to their left is not read);
            each row is continued as it would be alone. None: all of them.
        temperature: 0 takes the likeliest token (greedy; ``top_k``, ``top_p`` and ``seed`` then change nothing), else
            logits are divided by it and a token is drawn.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the fewest tokens that together hold this probability (arXiv 1904.09751), after ``top_k``.
        seed: the same seed draws the same tokens on the same device; None draws from torch's global generator.
        eos: a row is finished once it has generated this token, and is padded with it from then on.
        on_token: called with every step's tokens [B] as soon as they are known.
    Raises: InputError on an empty prompt, a token outside the vocabulary, T + max_new_tokens beyond the model's
        context, or an option out of its range.
    """
    _check(model.shape, tokens, max_new_tokens, lengths, temperature, top_k, top_p, seed, eos)
    device = model.embed_tokens.weight.device
    batch, prompt = tokens.shape
    # Made outside inference mode, so that what is returned can be trained on.
    out = torch.cat((tokens, tokens.new_zeros(batch, max_new_tokens)), dim=1).to(device, torch.int64)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    with torch.inference_mode():
        cache = model.new_cache(batch, prompt + max_new_tokens - 1)
        finished = torch.zeros(batch, dtype=torch.bool, device=device)
        last = _prefill(model, out[:, :prompt], cache, lengths)
        for end in range(prompt, prompt + max_new_tokens):
            if end > prompt:
                last = model.hidden(out[:, end - 1 : end], cache)
            step = _next(model.logits(last)[:, 0], temperature, top_k, top_p, generator)
            if eos is not None:
                step = step.masked_fill(finished, eos)
                finished |= step == eos
            out[:, end] = step
            if on_token is not None:
                on_token(out[:, end])
            if eos is not None and finished.all():
                return out[:, : end + 1]
    return out


def _prefill(model: Llama, tokens: Tensor, cache: KVCache, lengths: Sequence[int] | None) -> Tensor:
    """The prompts into the empty cache -> each one's last hidden state [B, 1, dim]. Prompts of different lengths are
    read one after the other, without a token of padding, and end at the same slot."""
    if lengths is None or set(lengths) == {tokens.shape[1]}:
        return model.hidden(tokens, cache)[:, -1:]
    starts = [tokens.shape[1] - length for length in lengths]
    rows = [model.hidden(tokens[b : b + 1, start:], cache.row(b, start))[:, -1:] for b, start in enumerate(starts)]
    cache.length, cache.starts = tokens.shape[1], starts
    return torch.cat(rows)


def _next(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """logits [B, V] -> tokens [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    # float64, from the largest down: a tiny temperature then sends the others to -inf instead of all to inf.
    scores, order = logits.double().sort(descending=True, stable=True)
    probabilities = ((scores[:, :top_k] - scores[:, :1]) / temperature).softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


def _check(
    shape: ModelShape,
    tokens: Tensor,
    max_new_tokens: int,
    lengths: Sequence[int] | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    eos: int | None,
) -> None:
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(f"expected tokens [B, T] of integers, got {list(tokens.shape)} of {tokens.dtype}")
    if 0 in tokens.shape:
        raise InputError(f"the prompt is empty: expected at least one row and one token, got {list(tokens.shape)}")
    longest = tokens.shape[1]
    if lengths is not None and not (len(lengths) == len(tokens) and all(1 <= length <= longest for length in lengths)):
        raise InputError(f"lengths must be {len(tokens)} whole numbers from 1 to {longest}, got {list(lengths)}")
    wide = tokens.long()  # uint8 compared with a vocabulary of 256 would wrap
    read = torch.ones_like(wide, dtype=torch.bool)
    for row, length in enumerate(lengths or ()):
        read[row, : longest - length] = False
    outside = wide[read & ((wide < 0) | (wide >= shape.vocab_size))]
    if outside.numel():
        raise InputError(f"token {int(outside[0])} is outside the vocabulary; valid: 0 to {shape.vocab_size - 1}")
    total = tokens.shape[1] + check_size("max_new_tokens", max_new_tokens)
    if total > shape.max_context:
        raise InputError(
            f"{tokens.shape[1]} prompt tokens + {max_new_tokens} new = {total} exceed the model's context of "
            f"{shape.max_context}; valid: max_new_tokens up to {max(shape.max_context - tokens.shape[1], 0)}"
        )
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"temperature must be 0 (greedy) or a finite number above, got {temperature}")
    if top_k is not None and check_size("top_k", top_k) > shape.vocab_size:
        raise InputError(f"top_k must be between 1 and the vocabulary's {shape.vocab_size}, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, got {top_p}")
    if seed is not None:
        check_size("seed", seed, minimum=0)
    if eos is not None and check_size("eos", eos, minimum=0) >= shape.vocab_size:
        raise InputError(f"eos must be a token from 0 to {shape.vocab_size - 1}, got {eos}")
