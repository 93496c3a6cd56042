"""What the cache takes, from shapes alone: against context, and as what fits on a card."""

from matplotlib.figure import Figure

from attnlab.plots import style
from attnlab.predict.machine import Machine
from attnlab.predict.memory import GB, GIB, KIB, kv_cache_bytes, max_batch, max_context, weight_bytes
from attnlab.shapes import ModelShape

_CARDS = {"rtx-4090": "RTX 4090", "a100-80gb": "A100, H100", "h200": "H200"}
_SOURCE = "Computed from shapes in bfloat16 (attnlab.predict.memory), no measurement. 1 GiB = 2³⁰ bytes"
_TOKENS = [2**exponent for exponent in range(10, 21)]


@style.styled
def kv_memory() -> Figure:
    """Cache size over tokens held, for two published shapes as MHA, as released (GQA-8) and as MQA."""
    names = {"llama-3-8b": "Llama 3 8B", "llama-2-70b": "Llama 2 70B"}
    figure, panels = style.canvas(
        "The KV cache outgrows the weights, and sharing heads moves where",
        "Both models were released as GQA-8; MHA and MQA are the same shapes with G = H and with G = 1.",
        f"{_SOURCE}, 1 GB = 10⁹ bytes; k = 1024, M = 1024².",
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
            colour = style.variant_colour(variant.variant)
            axes.plot(_TOKENS, gib, color=colour, label=variant.variant)
            each = f"{variant.kv_bytes_per_token() / KIB:g} KiB/token"
            ends.append((_TOKENS[-1], gib[-1], f"{variant.variant}\n{each}", colour))
        weights = weight_bytes(shape) / GIB
        axes.axhline(weights, color=style.INK, linewidth=1.2, linestyle=(0, (6, 3)))
        low = axes is panels[0]  # each panel has room on one side of this line only
        y, side = (weights / 1.12, "top") if low else (weights * 1.12, "bottom")
        axes.text(_TOKENS[0] * 1.1, y, f"weights {weights:.3g} GiB", va=side, size=7.5, weight="bold")
        for card, label in _CARDS.items():
            capacity = Machine.published(card).memory_bytes
            axes.axhline(capacity / GIB, color=style.MUTED, linewidth=0.9, linestyle=":")
            if axes is panels[0]:
                size = f"{capacity / GIB:.3g} GiB" + (f" ({capacity / GB:g} GB)" if capacity % GIB else "")
                y, side = (capacity / GIB / 1.08, "top") if card == "a100-80gb" else (capacity / GIB * 1.05, "bottom")
                axes.text(_TOKENS[0] * 1.1, y, f"{label}: {size}", size=7.5, color=style.MUTED, va=side)
        style.log_axis(axes, "x", _TOKENS[::2], style.tokens)
        style.log_axis(axes, "y", [0.01, 0.1, 1, 10, 100, 1000])
        axes.set(xlim=(_TOKENS[0], _TOKENS[-1]), ylim=(0.008, 9000), xlabel="tokens in the cache (batch × context)")
        axes.set_title(f"{title} (H = {shape.n_heads}, L = {shape.n_layers}, D = {shape.head_dim})")
        style.label_ends(axes, ends)
    panels[0].set_ylabel("KV cache (GiB)")
    return figure


def _rounded(count: int) -> str:
    return f"{count / 2**20:.2g}M" if count >= 2**20 else f"{count / 2**10:.0f}k"


@style.styled
def capacity() -> Figure:
    """Largest batch over context that fits 80 GiB beside the weights, one line per variant of Llama 3 8B."""
    shape, card, marked = ModelShape.published("llama-3-8b"), Machine.published("h100"), 8192
    figure, axes = style.canvas(
        f"What fits on one card of {card.memory_bytes / GIB:g} GiB: Llama 3 8B with fewer and fewer KV heads",
        f"Largest batch that fits while decoding: weights, KV cache, logits and activations. Dots: at context "
        f"{style.tokens(marked)}, for which the model was trained, and at the longest context that fits at all.",
        f"{_SOURCE}; k = 1024, M = 1024².",
        4.5,
    )
    batches = sorted({*range(1, 65), *(round(2 ** (exponent / 32)) for exponent in range(192, 416))}, reverse=True)
    for g in (32, 8, 1):
        variant = shape.with_kv_heads(g)
        name, colour = variant.variant, style.variant_colour(variant.variant)
        contexts = [max_context(variant, card.memory_bytes, batch) for batch in batches]
        axes.plot(contexts, batches, color=colour, drawstyle="steps-pre", label=name)
        left = (1024, max_batch(variant, card.memory_bytes, 1024))
        trained = (marked, max_batch(variant, card.memory_bytes, marked))
        longest = (contexts[-1], 1)
        axes.plot(*zip(trained, longest, strict=True), "o", color=colour, label=f"{name}, marked")
        for point, text in ((left, name), (trained, f"B = {trained[1]}"), (longest, _rounded(longest[0]))):
            axes.annotate(text, point, (6, 5), textcoords="offset points", color=style.darker(colour), weight="bold")
    style.log_axis(axes, "x", [2**exponent for exponent in range(10, 24, 2)], style.tokens)
    style.log_axis(axes, "y", [1, 10, 100, 1000])
    axes.set(xlabel="context S (tokens)", xlim=(1024, 2**23))
    axes.set(ylabel="largest batch B (sequences)", ylim=(0.85, 9000))
    return figure
