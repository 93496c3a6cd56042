"""What conversion does to attention: the weights of the query heads that come to share a KV head, before and after."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnlab.model.convert import METHODS, to_grouped
from attnlab.model.layers import rope_frequencies, rotate, rotation
from attnlab.model.llama import Llama
from attnlab.train.corpus import Corpus

TOKENS = 24


def attention_weights(model: Llama, tokens: Tensor, layer: int) -> Tensor:
    """softmax(q·k/√D) of every query head of one layer: tokens [T] -> [H, T, T], a row for each query."""
    attention: Any = model.layers[layer].self_attn
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.hidden(tokens[None])
        hook.remove()
        by = rotation(rope_frequencies(model.shape), torch.arange(len(tokens)), seen[0].dtype)
        q, k = (
            rotate(projection(seen[0]).unflatten(-1, (-1, model.shape.head_dim)), by)[0].transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj)
        )
        scores = q @ k.repeat_interleave(model.shape.group_size, 0).mT * model.shape.head_dim**-0.5
        return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)


def conversion_rows(model: Llama, corpus: Corpus) -> Iterator[dict[str, Any]]:
    """A row for each method and each query head of the first group of GQA-2, in the middle layer: its weights on the
    first ``TOKENS`` tokens of the validation text."""
    n_kv_heads, layer = min(2, model.shape.n_kv_heads), model.shape.n_layers // 2
    tokens = corpus.validation[:TOKENS].long()
    texts = [corpus.tokenizer.decode([token]) for token in tokens.tolist()]
    models = {"before": model} | {name: to_grouped(model, n_kv_heads, name) for name in METHODS}
    for method, one in models.items():
        for head, weights in enumerate(attention_weights(one, tokens, layer)[: model.shape.n_heads // n_kv_heads]):
            rounded = [[round(weight, 4) for weight in line] for line in weights.tolist()]
            where = {"n_kv_heads": n_kv_heads, "layer": layer, "head": head}
            yield {
                "kind": "conversion",
                "status": "ok",
                "method": method,
                **where,
                "attention": rounded,
                "tokens": texts,
            }
