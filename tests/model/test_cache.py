"""The KV cache: exact bytes, exact slots, and decoding in pieces that equals one forward pass."""

import pytest
import torch

from attnlab.errors import InputError
from attnlab.model.cache import KVCache
from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape


def shape_of(n_kv_heads: int, n_heads: int = 12) -> ModelShape:
    return ModelShape(
        n_layers=2,
        dim=17,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=10,
        ffn_dim=19,
        vocab_size=23,
        max_context=64,
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 4, 6, 12])
def test_stored_bytes_are_the_formula(n_kv_heads, dtype, element, batch):
    """A cache that stores H heads, expanded ones, or a rounded capacity shows the right shapes somewhere and costs more
    bytes: the bytes of its storages are counted, after tokens went through it."""
    shape, capacity = shape_of(n_kv_heads), 13
    cache = KVCache(shape, batch, capacity, dtype)
    for layer in range(shape.n_layers):
        new = torch.ones(batch, n_kv_heads, 5, shape.head_dim, dtype=dtype)
        cache.append(layer, new, new)
    cache.advance(5)
    owned = [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    stored = sum(
        storage.nbytes() for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in owned}.values()
    )
    assert stored == cache.nbytes == 2 * 2 * batch * n_kv_heads * 13 * 10 * element


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 4, 6, 12])
def test_uneven_pieces_equal_the_full_forward(n_kv_heads):
    """A cache whose layers advance it, whose slots are off by one, or that shows unwritten memory to attention, still
    decodes something: pieces of 5, 1, 3, 1, 1, 2 tokens over memory filled with NaN must give the full forward's
    logits."""
    torch.manual_seed(n_kv_heads)
    model = Llama(shape_of(n_kv_heads))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = torch.randint(23, (3, 13))
    cache = model.new_cache(3, 17)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    with torch.no_grad():
        full = model(tokens)
        pieces = torch.cat([model(piece, cache) for piece in tokens.split([5, 1, 3, 1, 1, 2], dim=1)], dim=1)
    assert cache.length == 13
    torch.testing.assert_close(pieces, full, rtol=1e-4, atol=1e-4 * full.abs().max().item())


def test_append_writes_one_layer_and_returns_views():
    """An append that concatenated, or that advanced the length itself, would grow memory and shift every later
    layer."""
    shape = shape_of(3)
    cache = KVCache(shape, 2, 7)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    k, v = torch.randn(2, 2, 3, 5, 10).unbind()
    seen_k, seen_v = cache.append(1, k, v)
    assert cache.length == 0
    assert torch.equal(seen_k, k) and torch.equal(seen_v, v)
    assert seen_k.untyped_storage().data_ptr() == cache.k.untyped_storage().data_ptr()
    assert cache.k[0].isnan().all() and cache.v[0].isnan().all() and cache.k[1, :, :, 5:].isnan().all()
    cache.advance(5)
    one = torch.full((2, 3, 1, 10), 7.0)
    assert torch.equal(cache.append(1, one, -one)[0], torch.cat((k, one), dim=2))


def test_overflow_is_one_clear_error_and_writes_nothing():
    """A slice past the end silently clips in torch, and the last tokens would be lost without a word."""
    cache = KVCache(shape_of(4), 1, 6)
    new = torch.ones(1, 4, 5, 10)
    cache.append(0, new, new)
    cache.advance(5)
    before = cache.k.clone()
    with pytest.raises(
        InputError, match=r"^KV cache overflow: 5 tokens held \+ 5 new > capacity 6; make it larger or reset"
    ):
        cache.append(0, 2 * new, 2 * new)
    assert cache.length == 5 and torch.equal(cache.k.nan_to_num(), before.nan_to_num())
    cache.reset()
    assert torch.equal(cache.append(0, 2 * new, 2 * new)[0], 2 * new)


def test_overflow_through_the_model_names_the_capacity():
    """The error must reach whoever decodes, not only whoever appends."""
    model = Llama(shape_of(2))
    cache = model.new_cache(1, 3)
    with pytest.raises(InputError, match="capacity 3"):
        model(torch.zeros(1, 4, dtype=torch.int64), cache)


@pytest.mark.parametrize("wrong", [(3, 4, 1, 10), (2, 12, 1, 10), (2, 1, 1, 10), (2, 4, 1, 5)])
def test_append_of_another_shape_is_refused(wrong):
    """copy_ broadcasts: one head or one row would be written to all without complaint."""
    new = torch.ones(wrong)
    with pytest.raises(InputError, match=r"expected k and v of \[2, 4, 1, 10\]"):
        KVCache(shape_of(4), 2, 3).append(0, new, new)


@pytest.mark.parametrize(("batch", "capacity"), [(0, 3), (2, 0), (2, -1), (2, 1.5), (True, 3)])
def test_sizes_are_checked(batch, capacity):
    """A capacity of 1.5 or -1 would fail deep inside torch, with a message about neither."""
    with pytest.raises(InputError, match="must be"):
        KVCache(shape_of(4), batch, capacity)
