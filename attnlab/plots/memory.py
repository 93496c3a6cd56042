"""What the cache takes, from shapes alone: against context, and as what fits on a card."""

import math

from matplotlib.figure import Figure

from attnlab.plots.style import INK, MUTED, canvas, darker, label_ends, log_axis, styled, tokens, variant_colour
from attnlab.predict.machine import Machine
from attnlab.predict.memory import GB, GIB, KIB, kv_cache_bytes, max_batch, weight_bytes
from attnlab.shapes import ModelShape

_CARDS = {"rtx-4090": "RTX 4090", "a100-80gb": "A100, H100", "h200": "H200"}
_TOKENS = [2**exponent for exponent in range(10, 21)]


@styled
def kv_memory() -> Figure:
    """Cache size over tokens held, for two published shapes as MHA, as released (GQA-8) and as MQA."""
    names = {"llama-3-8b": "Llama 3 8B", "llama-2-70b": "Llama 2 70B"}
    figure, panels = canvas(
        "The KV cache outgrows the weights, and sharing heads moves where",
        "bfloat16, one copy of the model. Both models were released as GQA-8; MHA and MQA are the same shapes with "
        "G = H and G = 1.",
        "Computed from shapes (attnlab.predict.memory), no measurement. 1 GiB = 2^30 bytes, 1 GB = 10^9 bytes; k = 1024, M = k².",
        4.6,
        ncols=2,
        sharey=True,
    )
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        shape = ModelShape.published(name)
        ends = []
        for g in (shape.n_heads, 8, 1):
            variant = shape.with_kv_heads(g)
            gib = [kv_cache_bytes(variant, 1, count) / GIB for count in _TOKENS]
            colour = variant_colour(variant.variant)
            axes.plot(_TOKENS, gib, color=colour, label=variant.variant)
            each = f"{variant.kv_bytes_per_token() / KIB:g} KiB/token"
            ends.append((_TOKENS[-1], gib[-1], f"{variant.variant}\n{each}", colour))
        weights = weight_bytes(shape) / GIB
        axes.axhline(weights, color=INK, linewidth=1.2, linestyle=(0, (6, 3)))
        axes.text(2**15, weights / 1.12, f"weights {weights:.3g} GiB", ha="right", va="top", weight="bold")
        for card, label in _CARDS.items():
            capacity = Machine.published(card).memory_bytes
            axes.axhline(capacity / GIB, color=MUTED, linewidth=0.9, linestyle=":")
            if axes is panels[0]:
                size = f"{capacity / GIB:.3g} GiB" + (f" ({capacity / GB:g} GB)" if capacity % GIB else "")
                axes.text(_TOKENS[0], capacity / GIB * 1.04, f"{label}: {size}", size=7.5, color=MUTED, va="bottom")
        log_axis(axes, "x", _TOKENS[::2], tokens)
        log_axis(axes, "y", [0.01, 0.1, 1, 10, 100, 1000])
        axes.set(xlim=(_TOKENS[0], _TOKENS[-1]), ylim=(0.008, 3500), xlabel="tokens in the cache (batch × context)")
        axes.set_title(f"{title} (H = {shape.n_heads}, L = {shape.n_layers}, D = {shape.head_dim})")
        label_ends(axes, ends)
    panels[0].set_ylabel("KV cache (GiB)")
    return figure


@styled
def capacity() -> Figure:
    """Largest batch over context that fits 80 GiB beside the weights, one line per variant of Llama 3 8B."""
    shape, card, marked = ModelShape.published("llama-3-8b"), Machine.published("h100"), 8192
    figure, axes = canvas(
        f"What fits on one card of {card.memory_bytes / GIB:g} GiB: Llama 3 8B with fewer and fewer KV heads",
        f"Largest batch whose weights, KV cache, logits and activations fit while decoding, all in bfloat16. On and below a "
        f"line fits. Dots: at context {tokens(marked)}, the longest this model was trained for.",
        "Computed from shapes (attnlab.predict.memory), no measurement. 1 GiB = 2^30 bytes; k = 1024, M = k².",
        4.5,
    )
    contexts = sorted({round(2 ** (exponent / 16)) for exponent in range(160, 352)})
    for g in (32, 8, 4, 1):
        variant = shape.with_kv_heads(g)
        batches = [max_batch(variant, card.memory_bytes, context) or math.nan for context in contexts]
        colour = variant_colour(variant.variant)
        axes.plot(contexts, batches, color=colour, label=variant.variant)
        fits = max_batch(variant, card.memory_bytes, marked)
        axes.plot([marked], [fits], "o", color=colour)
        axes.annotate(
            f"{variant.variant}: {fits} sequences",
            (marked, fits),
            (7, 4),
            textcoords="offset points",
            color=darker(colour),
            weight="bold",
        )
    log_axis(axes, "x", [2**exponent for exponent in range(10, 23, 2)], tokens)
    log_axis(axes, "y", [1, 10, 100, 1000])
    axes.set(xlabel="context S (tokens)", ylabel="largest batch B (sequences)", xlim=(1024, 2**22), ylim=(0.85, None))
    return figure
