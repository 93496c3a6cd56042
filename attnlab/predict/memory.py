"""Bytes, from a shape alone: what a model stores, what one decode step reads, what it holds at its peak.

- Three different numbers, three names: *stored* (``weight_bytes``, ``kv_cache_bytes``), *read in one decode step*
  (``weight_read_bytes``, ``decode_read_bytes``) and *held at the peak* of a decode step, of a prefill or of a step of
  training (``decode_peak_bytes``, ``prefill_peak_bytes``, ``training_peak_bytes``).
- A decode step reads every weight once, however large the batch, except that it looks up only B rows of the embedding
  table; and it reads the whole cache. So sharing heads (arXiv 2305.13245) pays where the cache outweighs the weights.
- Training holds what the backward pass will ask for: the tensors that autograd saved, of every layer at once; or, where
  blocks are computed again (gradient checkpointing), the input of every layer and the rest of one.
- With tensor parallelism every count is of one rank. A rank holds at least one KV head, so the cache stops shrinking
  at P = G ranks: beyond that heads are copied.
- Everything is an integer, in bytes. 1 KiB = 1024 bytes, 1 GiB = 2^30, but 1 GB = 10^9.

    B batch   T query tokens   S context   L n_layers   d dim   H n_heads   G n_kv_heads   D head_dim   F ffn_dim
    V vocab_size
    P tensor_parallel: ranks that share one model. It must divide H, and divide G or be a multiple of it.

``kv_dtype``, the cache's, is ``dtype`` unless given. Raised by all: ``InputError`` on a size that is not a whole number
in [1, 2^40], a dtype outside ``shapes.ELEMENT_BYTES``, a P that does not fit, and a result of 2^63 bytes or more.
"""

from bisect import bisect_right
from dataclasses import asdict, dataclass

from attnlab.errors import MAX_BYTES, MAX_SIZE, InputError, check_bytes, check_size
from attnlab.shapes import ModelShape, element_bytes

KIB, GIB, GB = 2**10, 2**30, 10**9
LOSS_SCORES = 2**18  # what the loss of training holds at once, on a CPU


@dataclass(frozen=True)
class Held:
    """Bytes at a peak, term by term."""

    @property
    def total(self) -> int:
        """The sum of the terms."""
        return sum(self.terms().values())

    def terms(self) -> dict[str, int]:
        """Name -> bytes, in the order of the fields."""
        return asdict(self)


@dataclass(frozen=True)
class PeakBytes(Held):
    """Bytes of one rank at the peak of a decode step or a prefill."""

    weights: int  # every parameter
    kv_cache: int  # K and V of every sequence's context, in the KV dtype
    activations: int  # ``activation_bytes``, in the weights' dtype


@dataclass(frozen=True)
class TrainingBytes(Held):
    """Bytes at the peak of a step of training."""

    weights: int  # every parameter
    average: int  # of each over the last steps
    optimizer: int  # AdamW's two moments of each
    gradients: int  # of those parameters that have one when the peak is reached
    activations: int  # what autograd saved and the operations at work hold


def kv_cache_bytes(
    shape: ModelShape, batch: int, context: int, dtype: object = "bfloat16", tensor_parallel: int = 1
) -> int:
    """Bytes of K and V that one rank stores: B · S · (2 · L · max(1, G/P) · D · bytes per element). ``dtype`` is the
    cache's; of a quantised one ("float8", "int8") the elements are counted, not their scales."""
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
    params = _params_read_whole(shape.per_rank(tensor_parallel)) + rows
    return check_bytes("the weights read", params * element_bytes(dtype))


def decode_read_bytes(
    shape: ModelShape,
    batch: int,
    context: int,
    dtype: object = "bfloat16",
    kv_dtype: object = None,
    tensor_parallel: int = 1,
) -> int:
    """Bytes that one rank reads in one decode step: ``weight_read_bytes`` and the whole cache of S tokens."""
    weights = weight_read_bytes(shape, batch, dtype, tensor_parallel)
    cache = kv_cache_bytes(shape, batch, context, dtype if kv_dtype is None else kv_dtype, tensor_parallel)
    return check_bytes("the bytes read", weights + cache)


def traffic_crossover_tokens(shape: ModelShape, dtype: object = "bfloat16", kv_dtype: object = None) -> float:
    """B · S at which a decode step reads as many bytes of cache as of weights; above it the cache is the larger half.
    The B embedding rows are left out: they grow with B alone and are a few thousandths of the whole."""
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
    """What one rank holds at the peak of a decode step (T = 1), a cache of ``context`` tokens included."""
    return _peak_bytes(shape, batch, 1, context, dtype, kv_dtype, tensor_parallel)


def prefill_peak_bytes(
    shape: ModelShape,
    batch: int,
    context: int,
    dtype: object = "bfloat16",
    kv_dtype: object = None,
    tensor_parallel: int = 1,
) -> PeakBytes:
    """What one rank holds at the peak of a prefill in one pass, T = S = ``context``, of which ``generate`` heads the
    last position only. As ``decode_peak_bytes``, but the activations grow with the prompt."""
    return _peak_bytes(shape, batch, context, context, dtype, kv_dtype, tensor_parallel)


def activation_bytes(shape: ModelShape, batch: int, tokens: int, dtype: object = "bfloat16") -> int:
    """Bytes of the largest set of intermediate tensors alive at once while the model of this library reads T new tokens
    of each of B sequences, without gradients. The sets, in elements per token, with q = H·D and kv = G·D:

    - RoPE: 2d, the layer's input and its normed copy; q + 2kv, their one product; 3 (q + kv), while q and k are rotated
      together. (Norms on q and k leave another q + kv, from here on.)
    - attention: 3d, as before and the projected output; q + 2kv and the rotated q + kv; q, what attention mixed.
    - FFN: 3d, the layer's input, the residual after attention and its normed copy; 2F, gate and up; F, their product;
      and F of silu(gate), or, once that is gone, d of the output.
    - the head: d, the normed output of every token; and once per sequence V, the logits of its last.

    A layer has, once for all sequences, cosine and sine of 2D and a position of 8 bytes for each of T tokens. Left out:
    the framework's own memory; scratch inside an attention kernel and copies that an implementation makes; temporaries
    of the CPU's norm, which an FFN narrower than 2d, or 16-bit norms on wide q and k, would notice.
    """
    d, ffn, element = shape.dim, shape.ffn_dim, element_bytes(dtype)
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    product = q + 2 * kv + (q + kv if shape.qk_norm else 0)
    rope, attention = 2 * d + product + 3 * (q + kv), 3 * d + product + (q + kv) + q
    layer = batch * max(rope, attention, 3 * d + 3 * ffn + max(ffn, d)) + 2 * shape.head_dim
    return max(tokens * (layer * element + 8), batch * (tokens * d + shape.vocab_size) * element)


def _peak_bytes(
    shape: ModelShape, batch: int, tokens: int, context: int, dtype: object, kv_dtype: object, tensor_parallel: int
) -> PeakBytes:
    weights = weight_bytes(shape, dtype, tensor_parallel)
    cache = kv_cache_bytes(shape, batch, context, dtype if kv_dtype is None else kv_dtype, tensor_parallel)
    peak = PeakBytes(weights, cache, activation_bytes(shape.per_rank(tensor_parallel), batch, tokens, dtype))
    check_bytes("the peak", peak.total)
    return peak


def training_peak_bytes(shape: ModelShape, batch: int, context: int, recompute: bool = False) -> TrainingBytes:
    """What ``train`` holds at the peak of its steps, in float32: B sequences of S tokens forward, their loss and its
    gradients, then AdamW and the average. ``recompute``: each block keeps its input alone, and computes the rest again
    when its backward pass comes.

    The peak is one of a few moments, below, with the gradients that there are by then: those of one step are freed
    before the next. Counted is what runs on a CPU, not compiled, with ``impl="sdpa"``, whose flash backend keeps no
    scores. ("grouped" with 1 < G and 1 < B keeps G·D less per token and layer; with norms on q and k (H + G)·D more.)
    Left out are scratch inside the attention kernels and, where batches accumulate, the rest of the gradients. On CUDA
    the norm is one kernel that keeps d less; bfloat16 autocast keeps half of most.
    """
    n = check_size("batch", batch) * check_size("context", context)
    d, ffn, vocab, L = shape.dim, shape.ffn_dim, shape.vocab_size, shape.n_layers
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    # What autograd saves, in elements per token. A norm: its input (the residual stream), 1/rms, the normed copy before
    # the weight, and its output, which is the input of the projections behind it.
    norm = 3 * d + 1
    # The joined product, since v is a view of it; q and k, rotated (which saves cosine and sine only); the logsumexp of
    # each head; what attention mixed, for its own backward pass and o_proj's. Norms on q and k keep 1/rms and a copy.
    attention = (q + 2 * kv) + (q + kv) + shape.n_heads + q
    attention += (q + kv + shape.n_heads + shape.n_kv_heads) * shape.qk_norm
    block = norm + attention + norm + 4 * ffn  # gate and up, joined; silu(gate); its product with up, for down_proj
    kept = d if recompute else block  # of a block that is not at work
    table = shape.embedding_params
    layer = (shape.n_params - d - table * (1 if shape.tied_embeddings else 2)) // L
    # Two of a piece of the loss, scores and their exponentials, and the gradients of the piece before.
    scores = vocab * min(2 * n, 3 * max(1, LOSS_SCORES // vocab))
    moments = [  # (gradients, activations), in elements
        # The loss: the last norm's and the gradient of its output; then that, and the head's, again times the loss's.
        (table, n * (L * kept + norm) + max(scores, n * d + table)),
        (table, n * (L * kept + 6 * d)),  # backward through that norm, by torch's formula for a power
        (shape.n_params, 2 * max(table, d * ffn, d * q)),  # averaging, matrix by matrix, when every gradient is there
    ]
    for index in {0, L - 1}:  # between the first and the last block everything grows or shrinks in proportion
        done, earlier = table + d + (L - 1 - index) * layer, index * kept
        moments += [
            # In the FFN: gradients of its output, of the product and both factors, when the product itself is gone.
            (done + d * ffn, n * (earlier + block + d + 2 * ffn)),
            # In attention, when the FFN is gone: gradients of the block's output, of what was mixed, and of q, k, v.
            (done + 3 * d * ffn + d * q + d, n * (earlier + norm + attention + d + 2 * q + 2 * kv)),
        ]
    gradients, activations = max(moments, key=sum)
    activations += n * d + 2 * shape.head_dim * context  # the last hidden states, by name; cosine and sine
    weights = weight_bytes(shape, "float32")
    peak = TrainingBytes(weights, weights, 2 * weights, 4 * gradients, 4 * activations)
    check_bytes("the peak", peak.total)
    return peak


def max_batch(
    shape: ModelShape,
    capacity_bytes: int,
    context: int,
    dtype: object = "bfloat16",
    kv_dtype: object = None,
    tensor_parallel: int = 1,
) -> int:
    """Largest B whose ``decode_peak_bytes`` fit ``capacity_bytes`` of one rank; 0 if not even one sequence fits. Exact,
    by bisection. (A prefill of all of them in one pass takes more: ``prefill_peak_bytes``.) Raises also if
    ``capacity_bytes`` is not a whole number in [0, 2^63)."""
    one = decode_peak_bytes(shape, 1, context, dtype, kv_dtype, tensor_parallel)
    rank = shape.per_rank(tensor_parallel)

    def held(batch: int) -> int:
        return one.weights + batch * one.kv_cache + activation_bytes(rank, batch, 1, dtype)

    return bisect_right(range(1, MAX_SIZE + 1), _check_capacity(capacity_bytes), key=held)


def max_context(
    shape: ModelShape,
    capacity_bytes: int,
    batch: int,
    dtype: object = "bfloat16",
    kv_dtype: object = None,
    tensor_parallel: int = 1,
) -> int:
    """Largest S whose ``decode_peak_bytes`` fit ``capacity_bytes`` of one rank; 0 if not even one token fits. Exact:
    only the cache grows with S. The answer may exceed ``shape.max_context``: this is what memory allows, not what the
    model was trained for. Raises as ``max_batch``."""
    one = decode_peak_bytes(shape, batch, 1, dtype, kv_dtype, tensor_parallel)
    free = _check_capacity(capacity_bytes) - (one.total - one.kv_cache)
    return min(max(free, 0) // one.kv_cache, MAX_SIZE)


def _params_read_whole(shape: ModelShape) -> int:
    """Parameters that a decode step reads whatever B is: all but an embedding table that is not the head as well."""
    return shape.n_params - (0 if shape.tied_embeddings else shape.embedding_params)


def _check_capacity(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BYTES:
        raise InputError(
            f"capacity_bytes must be a whole number of bytes in [0, 2^63), got {value!r} (80 GiB is 80 * 2**30)"
        )
    return value
