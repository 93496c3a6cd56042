"""What is drawn of one decode step is what ran."""

from attnlab import ModelShape, kv_cache_bytes
from attnlab.measure.flow import decode_flow, fill
from attnlab.model import layers
from attnlab.results import Run, load_results

SHAPE = ModelShape(3, 28, 6, 2, 10, 26, 37)
BATCH, CONTEXT = 5, 7


def test_the_sizes_of_a_step_are_those_of_the_tensors_that_ran():
    """A picture of the flow drawn by hand shows K and V with H heads, or one token too few; here they are watched."""
    found = {each["tensor"]: each for each in decode_flow(SHAPE, BATCH, CONTEXT)}
    assert found["q"]["dims"] == [5, 6, 1, 10] == found["mixed values"]["dims"]
    assert found["k of this token"]["dims"] == found["v of this token"]["dims"] == [5, 2, 1, 10]
    assert found["K in the cache, read"]["dims"] == found["V in the cache, read"]["dims"] == [5, 2, 7, 10]
    assert found["hidden state x"]["dims"] == [5, 1, 28] and found["logits"]["dims"] == [5, 1, 37]
    read = sum(found[f"{name} in the cache, read"]["bytes"] for name in "KV")
    assert SHAPE.n_layers * read == kv_cache_bytes(SHAPE, BATCH, CONTEXT, "float32")
    assert list(found).index("K in the cache, read") > list(found).index("k of this token")


def test_nothing_is_watched_afterwards():
    """A recorder left in place would slow down, and keep alive, everything that runs later in the process."""
    before = layers.attend
    decode_flow(SHAPE)
    assert layers.attend is before


def test_rows_are_added_once(tmp_path):
    """The same command again must find its rows there."""
    for _ in range(2):
        with Run(tmp_path / "m" / "r") as run:
            fill(run)
            assert run.left() == 0
    rows = load_results(tmp_path)
    assert rows.groupby("shape.n_kv_heads")["tensor"].nunique().to_dict() == {8: 13, 2: 13, 1: 13}
    same = rows.groupby("tensor")["bytes"].nunique()
    assert set(same[same > 1].index) == {f"{name} of this token" for name in "kv"} | {
        f"{name} in the cache, read" for name in "KV"
    }
