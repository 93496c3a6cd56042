"""How long it should take: bytes over bandwidth, flops over rate, plus what a call costs before it starts.

A roofline (Williams et al. 2009): the slower of moving and multiplying binds; the fixed cost is added. Decode attention
does 4·B·H·S·D flop on 2·B·G·S·D elements, R flop per byte in 16 bit, whatever B and S, so it is bound by reading.

    B batch   T query tokens   S context   H query heads   G KV heads   D head_dim   R = H / G
"""

from dataclasses import dataclass

from attnlab.errors import check_bytes, check_choice, check_size
from attnlab.predict.machine import Machine, rated_head_dim
from attnlab.predict.memory import weight_read_bytes
from attnlab.shapes import ModelShape, element_bytes

# Attention plus the seven projections of a LLaMA layer, each taken to cost one call; norms and rotations are small.
CALLS_PER_LAYER = 8
OWN = ("auto", "cpp")  # implementations whose rates ``Machine.rates`` holds
OVERLAP = 3.0  # 1: reading and computing never overlap; infinite: perfectly. Chosen on one half of a grid (LOG.md)


@dataclass(frozen=True)
class Prediction:
    """Seconds, and where they come from: ``terms`` in seconds, ``binding`` the largest of them by name."""

    seconds: float
    terms: dict[str, float]
    binding: str
    bytes: int
    flops: int


def attention_bytes(
    shape: ModelShape, batch: int, queries: int, context: int, dtype: object, impl: str = "grouped"
) -> int:
    """Bytes that one layer's attention moves: q and output, K and V once at G heads. ``expanded`` with 1 < G < H also
    writes K and V at H heads and reads them back (a single head is repeated by a stride of zero, without a copy). For
    any other implementation this is the least it can move."""
    element = element_bytes(dtype)
    own = 2 * batch * shape.n_heads * queries * shape.head_dim
    kv = 2 * batch * context * shape.head_dim
    copies = 2 * shape.n_heads if impl == "expanded" and 1 < shape.n_kv_heads < shape.n_heads else 0
    return check_bytes("what attention moves", element * (own + kv * (shape.n_kv_heads + copies)))


def attention_flops(shape: ModelShape, batch: int, queries: int, context: int) -> int:
    """Flops of one layer's causal attention, bottom-right aligned: 4·D for each (query, key it may see), per head."""
    pairs = queries * context - queries * (queries - 1) // 2
    return 4 * batch * shape.n_heads * shape.head_dim * pairs


def training_flops(shape: ModelShape, context: int) -> float:
    """Flops of one token's forward and backward pass, the mean over a window of ``context``: two for each weight it is
    multiplied by and the attention's own, and twice that again backward."""
    products = 2 * (shape.n_params - (0 if shape.tied_embeddings else shape.embedding_params))
    return 3 * (products + shape.n_layers * attention_flops(shape, 1, context, context) / context)


def predict_decode(
    shape: ModelShape,
    machine: Machine,
    batch: int,
    context: int,
    dtype: object = "bfloat16",
    scope: str = "layer",
    impl: str = "auto",
) -> Prediction:
    """One decode step at a fixed context: attention of one layer (``scope`` "layer"), or the whole model ("model").
    Raises ``InputError`` on sizes below 1, 2^63 bytes or more, an unknown dtype or scope, or a dtype the machine has no
    rate for."""
    return _predict(shape, machine, batch, 1, context, dtype, scope, impl)


def predict_prefill(
    shape: ModelShape,
    machine: Machine,
    batch: int,
    context: int,
    dtype: object = "bfloat16",
    scope: str = "layer",
    impl: str = "auto",
) -> Prediction:
    """Prefill of ``context`` tokens with an empty cache; arguments and errors as ``predict_decode``."""
    return _predict(shape, machine, batch, context, context, dtype, scope, impl)


def least_seconds(
    shape: ModelShape, machine: Machine, batch: int, queries: int, context: int, dtype: object = "bfloat16"
) -> float:
    """The roofline of one layer's attention, which nothing beats: the longer of reading and fastest computing."""
    moved = attention_bytes(shape, batch, queries, context, dtype) / machine.read_bandwidth
    return max(moved, attention_flops(shape, batch, queries, context) / machine.compute_roof(dtype))


def _predict(
    shape: ModelShape, machine: Machine, batch: int, queries: int, context: int, dtype: object, scope: str, impl: str
) -> Prediction:
    check_size("batch", batch)
    check_size("context", context)
    check_choice("scope", scope, ("layer", "model"))
    moved = attention_bytes(shape, batch, queries, context, dtype, impl)
    flops = attention_flops(shape, batch, queries, context)
    kind, rows = (
        (f"decode {rated_head_dim(shape.head_dim)}", shape.group_size) if queries == 1 else ("prefill", queries)
    )
    rate = machine.rate(kind, dtype, rows) if impl in OWN else machine.compute_roof(dtype)
    terms = {"bandwidth": moved / machine.read_bandwidth, "compute": flops / rate, "fixed": machine.call_seconds}
    # Reading and computing at their measured rates hinder each other near the ridge; a roofline is the least of both.
    together = _overlapped if impl in OWN and machine.rates else max
    seconds = together(terms["bandwidth"], terms["compute"]) + terms["fixed"]
    if scope == "model":
        weights = weight_read_bytes(shape, batch * queries, dtype)
        head, layers = shape.embedding_params, shape.n_layers
        blocks = shape.n_params - head * (1 if shape.tied_embeddings else 2)
        products = 2 * batch * (queries * blocks + head)  # only the last position of a prefill is headed
        rate = machine.rate("product", dtype, batch * queries)
        terms = {
            "weights": together(weights / machine.read_bandwidth, products / rate),
            "attention": layers * together(terms["bandwidth"], terms["compute"]),
            "fixed": machine.step_seconds + layers * (machine.layer_seconds or CALLS_PER_LAYER * machine.call_seconds),
        }
        seconds = sum(terms.values())
        moved, flops = moved * layers + weights, flops * layers + products
    return Prediction(seconds, terms, max(terms, key=lambda name: terms[name]), moved, flops)


def _overlapped(reading: float, computing: float) -> float:
    """Seconds of both together: the longer one, and near the ridge, where each waits for the other at times, more."""
    return float((reading**OVERLAP + computing**OVERLAP) ** (1 / OVERLAP))
