"""Bytes, from a shape alone: what a model stores, what one decode step reads, what it holds at its peak.

- Three different numbers, three names: *stored* (``weight_bytes``, ``kv_cache_bytes``), *read in one decode step*
  (``weight_read_bytes``, ``decode_read_bytes``) and *held at the peak of a decode step* (``decode_peak_bytes``).
- A decode step reads every weight once, however large the batch, except that it looks up only B rows of the embedding
  table; and it reads the whole cache. So sharing heads (arXiv 2305.13245) pays where the cache outweighs the weights.
- With tensor parallelism every count is of one rank. A rank holds at least one KV head, so the cache stops shrinking
  at P = G ranks: beyond that heads are copied.
- Everything is an integer, in bytes. 1 KiB = 1024 bytes, 1 GiB = 2^30, but 1 GB = 10^9.

    B batch   S context   L n_layers   d dim   H n_heads   G n_kv_heads   D head_dim   F ffn_dim   V vocab_size
    P tensor_parallel: ranks that share one model. It must divide H, and divide G or be a multiple of it.

Raised by all: ``InputError`` on a size that is not a whole number in [1, 2^40], a dtype outside
``shapes.ELEMENT_BYTES``, a P that does not fit, and a result of 2^63 bytes or more.
"""

from dataclasses import asdict, dataclass

from attnlab.errors import MAX_BYTES, MAX_SIZE, InputError, check_bytes, check_size
from attnlab.shapes import ModelShape, element_bytes

KIB, GIB, GB = 2**10, 2**30, 10**9


@dataclass(frozen=True)
class PeakBytes:
    """Bytes of one rank at the peak of a decode step, term by term."""

    weights: int
    """Every parameter."""
    kv_cache: int
    """K and V of every sequence's context, in the KV dtype."""
    logits: int
    """One score per sequence and vocabulary entry, in the weights' dtype."""
    activations: int
    """The largest set of intermediate tensors alive at once in a layer, in the weights' dtype."""

    @property
    def total(self) -> int:
        """The sum of the terms."""
        return sum(self.terms().values())

    def terms(self) -> dict[str, int]:
        """Name -> bytes, in the order above."""
        return asdict(self)


def kv_cache_bytes(
    shape: ModelShape, batch: int, context: int, dtype: object = "bfloat16", tensor_parallel: int = 1
) -> int:
    """Bytes of K and V that one rank stores: B · S · (2 · L · max(1, G/P) · D · bytes per element).

    ``dtype`` is the cache's; of a quantised one ("float8", "int8") the elements are counted, not their scales.
    """
    tokens = check_size("batch", batch) * check_size("context", context)
    return check_bytes("the KV cache", tokens * shape.per_rank(tensor_parallel).kv_bytes_per_token(dtype))


def weight_bytes(shape: ModelShape, dtype: object = "bfloat16", tensor_parallel: int = 1) -> int:
    """Bytes of parameters that one rank stores."""
    return check_bytes("the weights", shape.per_rank(tensor_parallel).n_params * element_bytes(dtype))


def weight_read_bytes(shape: ModelShape, batch: int, dtype: object = "bfloat16", tensor_parallel: int = 1) -> int:
    """Bytes of parameters that one rank reads in one decode step: every weight once, but of the embedding table only
    the B rows looked up. A tied table is the head too, so it is read whole and its B rows once more. (With P ranks a
    row lies on one of them; all B are charged to each, which is what the busiest may read.)"""
    rows = check_size("batch", batch) * shape.dim
    return check_bytes(
        "the weights read", (_params_read_whole(shape.per_rank(tensor_parallel)) + rows) * element_bytes(dtype)
    )


def decode_read_bytes(
    shape: ModelShape,
    batch: int,
    context: int,
    dtype: object = "bfloat16",
    kv_dtype: object = None,
    tensor_parallel: int = 1,
) -> int:
    """Bytes that one rank reads in one decode step: ``weight_read_bytes`` and the whole cache of S tokens.

    ``kv_dtype`` is ``dtype`` unless given.
    """
    weights = weight_read_bytes(shape, batch, dtype, tensor_parallel)
    cache = kv_cache_bytes(shape, batch, context, dtype if kv_dtype is None else kv_dtype, tensor_parallel)
    return check_bytes("the bytes read", weights + cache)


def traffic_crossover_tokens(shape: ModelShape, dtype: object = "bfloat16", kv_dtype: object = None) -> float:
    """B · S at which a decode step reads as many bytes of cache as of weights; above it the cache is the larger half.

    The B embedding rows are left out: they grow with B alone and are a few thousandths of the whole. ``kv_dtype`` is
    ``dtype`` unless given.
    """
    weights = _params_read_whole(shape) * element_bytes(dtype)
    return weights / shape.kv_bytes_per_token(dtype if kv_dtype is None else kv_dtype)


def decode_peak_bytes(
    shape: ModelShape,
    batch: int,
    context: int,
    dtype: object = "bfloat16",
    kv_dtype: object = None,
    tensor_parallel: int = 1,
) -> PeakBytes:
    """What one rank holds at the peak of a decode step, as four terms. ``kv_dtype`` is ``dtype`` unless given.

    Activations, in elements per sequence, are those of the model in this library (T = 1, no gradients):

    - FFN: 3d + 3F: the layer's input, the residual after attention and its normed copy; SwiGLU's gate, up, product.
    - attention: 2d + max(4 · H·D, H·D + 4 · G·D): the input and its normed copy; while q is rotated, itself and three
      temporaries, and then, beside q, the same for k.

    The larger one counts; it is the FFN's in every published shape. The sum is exact for a loop that keeps the last
    step's logits while the next step runs, and otherwise too high by the smaller of logits and activations. Left out:
    the framework's own memory, an attention kernel's scratch, what sampling makes of the logits (greedy makes nothing),
    and the norm's float32 copies, which only an FFN narrower than twice d would notice. Prefill is not covered: its
    activations grow with the prompt.
    """
    rank, element = shape.per_rank(tensor_parallel), element_bytes(dtype)
    q, kv = rank.n_heads * rank.head_dim, rank.n_kv_heads * rank.head_dim
    activations = max(3 * rank.dim + 3 * rank.ffn_dim, 2 * rank.dim + max(4 * q, q + 4 * kv))
    peak = PeakBytes(
        weights=weight_bytes(shape, dtype, tensor_parallel),
        kv_cache=kv_cache_bytes(shape, batch, context, dtype if kv_dtype is None else kv_dtype, tensor_parallel),
        logits=batch * rank.vocab_size * element,
        activations=batch * activations * element,
    )
    check_bytes("the peak of a decode step", peak.total)
    return peak


def max_batch(
    shape: ModelShape,
    capacity_bytes: int,
    context: int,
    dtype: object = "bfloat16",
    kv_dtype: object = None,
    tensor_parallel: int = 1,
) -> int:
    """Largest B whose ``decode_peak_bytes`` fit ``capacity_bytes`` of one rank; 0 if not even one sequence fits.

    Exact: all terms but the weights are proportional to B. Raises also if ``capacity_bytes`` is not a whole number
    in [0, 2^63).
    """
    one = decode_peak_bytes(shape, 1, context, dtype, kv_dtype, tensor_parallel)
    return _how_many(_check_capacity(capacity_bytes) - one.weights, one.total - one.weights)


def max_context(
    shape: ModelShape,
    capacity_bytes: int,
    batch: int,
    dtype: object = "bfloat16",
    kv_dtype: object = None,
    tensor_parallel: int = 1,
) -> int:
    """Largest S whose ``decode_peak_bytes`` fit ``capacity_bytes`` of one rank; 0 if not even one token fits.

    Exact: only the cache grows with S. The answer may exceed ``shape.max_context``: this is what memory allows, not
    what the model was trained for. Raises as ``max_batch``.
    """
    one = decode_peak_bytes(shape, batch, 1, dtype, kv_dtype, tensor_parallel)
    return _how_many(_check_capacity(capacity_bytes) - (one.total - one.kv_cache), one.kv_cache)


def _params_read_whole(shape: ModelShape) -> int:
    """Parameters that a decode step reads whatever B is: all but an embedding table that is not the head as well."""
    return shape.n_params - (0 if shape.tied_embeddings else shape.embedding_params)


def _how_many(free: int, each: int) -> int:
    """How many of ``each`` bytes fit ``free`` bytes, as a valid size: in [0, 2^40]."""
    return min(max(free, 0) // each, MAX_SIZE)


def _check_capacity(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BYTES:
        raise InputError(
            f"capacity_bytes must be a whole number of bytes in [0, 2^63), got {value!r} (80 GiB is 80 * 2**30)"
        )
    return value
