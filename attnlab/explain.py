"""What a model's number of KV heads costs and saves on a card, in sentences. Every number is another module's.

H n_heads   G n_kv_heads   R = H / G   S context   B batch
"""

import math
from typing import TYPE_CHECKING

from attnlab.effects import effects, finished
from attnlab.errors import check_positive, check_size, divisors
from attnlab.predict.machine import Machine
from attnlab.predict.memory import GIB, KIB, decode_peak_bytes, kv_cache_bytes, max_batch, weight_bytes
from attnlab.predict.memory import traffic_crossover_tokens as crossover
from attnlab.predict.time import predict_decode
from attnlab.shapes import ModelShape

if TYPE_CHECKING:  # pandas costs 0.3 s to import; only whoever has rows needs it
    import pandas

TERMS = {"weights": "products with the weights", "attention": "attention over the cache", "fixed": "fixed costs"}


def memory(shape: ModelShape, context: int, dtype: str = "bfloat16") -> list[str]:
    """Who reads which KV head; bytes of a token and of S tokens, beside MHA's and MQA's. Raises ``InputError`` on sizes
    and dtypes that are none."""
    name, H, G, own, ends = shape.name or "this model", shape.n_heads, shape.n_kv_heads, shape.max_context, _ends(shape)
    token, cache = shape.kv_bytes_per_token(dtype), kv_cache_bytes(shape, 1, context, dtype)
    tokens = ((end.variant, end.kv_bytes_per_token(dtype)) for end in ends)
    caches = ((end.variant, kv_cache_bytes(end, 1, context, dtype)) for end in ends)
    beyond = f", beyond the {own:,} that the model was made for," if context > own else ""
    return [
        f"{name} is {shape.variant}: {H} query heads read {G} KV head{'s' * (G > 1)}, R = {shape.group_size} to each.",
        f"A token adds {_short(token / KIB)} KiB of {dtype} to the KV cache"
        + "".join(f"; {end} {_short(many / KIB)} KiB ({many / token:.3g}×)" for end, many in tokens)
        + ".",
        f"{context:,} tokens{beyond} are {cache / GIB:,.2f} GiB of cache per sequence"
        + "".join(f"; {end} {many / GIB:,.2f} GiB" for end, many in caches)
        + f"; beside {weight_bytes(shape, dtype) / GIB:,.2f} GiB of weights.",
        f"A decode step reads more cache than weights once the batch holds {crossover(shape, dtype):,.0f} tokens.",
    ]


def speed(
    shape: ModelShape, card: Machine, context: int, batch: int | None, dtype: str, price: float | None = None
) -> list[str]:
    """What fits ``card``; the whole model's decode step at B sequences (None, or more than fit: as many as fit), its
    tokens/s, and the price of a million tokens where an hour of the card costs ``price`` dollars; the same of MHA and
    MQA. Raises ``InputError`` on a size or price that is none, and on a dtype that the card has no rate for."""
    wanted = None if batch is None else check_size("batch", batch)
    price = None if price is None else check_positive("price", price)
    fits = {one: max_batch(one, card.memory_bytes, context, dtype) for one in (shape, *_ends(shape))}
    holds = f"{card.name} holds {card.memory_bytes / GIB:.1f} GiB"
    if not fits[shape]:
        missing = decode_peak_bytes(shape, 1, context, dtype).total - card.memory_bytes
        return [f"{holds}: {missing / GIB:,.2f} GiB too few for one sequence; {_remedy(shape, card, context, dtype)}."]
    room = ", ".join(f"{one.variant} {fit:,}" for one, fit in fits.items())
    lines = [f"{holds}, the framework's own share left out; sequences that fit: {room}."]
    basis = "published peaks, not measured" if card.source.startswith("published") else "measured roofs"
    own: tuple[float, ...] = ()  # of the shape itself, which comes first
    for one, fit in fits.items():
        if not fit:
            continue
        B = min(fit, wanted or fit)
        step = predict_decode(one, card, B, context, dtype, "model")
        numbers = step.seconds, B / step.seconds, dollars(price or 1.0, B / step.seconds)
        own = own or numbers
        ratios = [f" ({n / o:.3g}×)" * (one is not shape) for n, o in zip(numbers, own, strict=True)]
        share = f"{step.terms[step.binding] / step.seconds:.0%} of it {TERMS[step.binding]}"
        said = [
            f"{B:,} sequence{'s' * (B != 1)}" + (f" ({wanted:,} do not fit)" if wanted and wanted > B else ""),
            f"a step of {_short(1e3 * numbers[0])} ms{ratios[0]}, {share}",
            f"{_short(numbers[1])} tokens/s in all{ratios[1]}, {_short(1 / step.seconds)} for each",
            *([f"${_short(numbers[2])} per million tokens{ratios[2]}"] if price else []),
        ]
        lines.append(f"{one.variant}, predicted from {basis}: {'; '.join(said)}.")
    return lines


def dollars(price: float, tokens_per_second: float) -> float:
    """What a million tokens cost where an hour costs ``price``."""
    return price / 3600 / tokens_per_second * 1e6


def parameters(shape: ModelShape) -> str:
    """What K and V lost by sharing, and the FFN width that would spend it again."""
    mha = shape.with_kv_heads(shape.n_heads)
    lost, width = mha.n_params - shape.n_params, mha.with_kv_heads(shape.n_kv_heads, match_params=True).ffn_dim
    if not lost:
        return "Nothing is shared, so no parameter is lost."
    share = f"{lost:,} parameters, {lost / mha.n_params:.1%} of MHA's"
    return f"Sharing leaves out {share}; an FFN of {width:,} in place of {shape.ffn_dim:,} would give them back."


def quality(rows: "pandas.DataFrame", shape: ModelShape) -> str:
    """Loss minus MHA's at the measured R nearest to the shape's, by ratio, with verdicts and the scale. Raises
    ``InputError`` where ``rows`` hold no sweep over G that can be judged."""
    if (R := shape.group_size) == 1:
        return "Nothing is shared, so no quality is lost."
    done = finished(rows, "g-sweep")
    found, heads = effects(done), int(done["shape.n_heads"].iloc[0])
    G = min((effect.n_kv_heads for effect in found), key=lambda g: abs(math.log(heads / g / R)))
    size, tokens = done.loc[done["shape.n_kv_heads"] == heads, ["n_params", "tokens"]].astype(int).iloc[0]
    nearest = "" if heads == R * G else f", of those measured the nearest to {R}"
    arms = [effect for effect in found if effect.n_kv_heads == G]
    said = "; ".join(f"{arm.arm} {arm.mean:+.4f} ± {arm.half_width:.4f} ({arm.verdict})" for arm in arms)
    scale = f"{size:,} parameters, {tokens:,} tokens, {min(arm.seeds for arm in arms)} seeds"
    return (
        f"Quality at R = {heads // G}{nearest}: bits per byte minus MHA's, 95 % interval: {said}. "
        f"Measured at {scale}, not on {shape.name or 'this model'} itself ({shape.n_params:,} parameters)."
    )


def _ends(shape: ModelShape) -> list[ModelShape]:
    """The same model as MHA and as MQA, but not the one that it is."""
    return [shape.with_kv_heads(g) for g in dict.fromkeys((shape.n_heads, 1)) if g != shape.n_kv_heads]


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def _remedy(shape: ModelShape, card: Machine, context: int, dtype: str) -> str:
    """Numbers of KV heads that would fit, or that none does."""
    fewer = [shape.with_kv_heads(g) for g in divisors(shape.n_heads) if g < shape.n_kv_heads]
    fitting = [one.variant for one in fewer if max_batch(one, card.memory_bytes, context, dtype)]
    if not fitting:
        return f"no number of KV heads fits beside {weight_bytes(shape, dtype) / GIB:,.2f} GiB of weights"
    return f"it fits as {fitting[-1]}" + (f", or with fewer KV heads, down to {fitting[0]}" if fitting[1:] else "")
