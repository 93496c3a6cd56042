"""One page, no server, no network: the explorer, with the same sums as ``attnlab.predict`` and the same rows.

``explorer.html`` is what stands there, ``explorer.css`` how it looks, ``arithmetic.js`` the sums (a test holds them to
Python's), ``explorer.js`` what moves. All of it, and the facts, become one file.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas

from attnlab.effects import effects, finished
from attnlab.errors import InputError, write_whole
from attnlab.predict.machine import RATED_HEAD_DIMS, Machine, published_machines
from attnlab.predict.time import CALLS_PER_LAYER, OVERLAP
from attnlab.results import MACHINE, PUBLISHED, headline, newest
from attnlab.shapes import DTYPE_ALIASES, ELEMENT_BYTES, ModelShape, published_names

_HERE = Path(__file__).parent
_SHAPE = ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "tied_embeddings")
_POINT = ("shape.n_heads", "shape.n_kv_heads", "shape.head_dim", "batch", "context")


def build(rows: pandas.DataFrame, published: Path = PUBLISHED) -> str:
    """The page, from ``rows`` and the machines described beside them below ``published``."""
    text = (_HERE / "explorer.html").read_text(encoding="utf-8")
    said = json.dumps(facts(rows, published), separators=(",", ":")).replace("</", "<\\/")  # it stands in a script
    parts = {"FACTS": f"const FACTS = {said};"}
    for name in ("explorer.css", "arithmetic.js", "explorer.js"):
        parts[name] = (_HERE / name).read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"/* {name} */", part)
    return text


def write(rows: pandas.DataFrame, path: Path) -> None:
    """Write the page, entirely or not at all; raises ``InputError`` where that is not possible."""
    write_whole(path, build(rows))


def facts(rows: pandas.DataFrame, published: Path = PUBLISHED) -> dict[str, Any]:
    """All that the page knows: shapes, dtypes, cards, measured machines with their points, and what quality showed."""
    shapes = {name: ModelShape.published(name) for name in published_names()}
    measured = [_measured(rows, machine, published) for machine in sorted(rows["machine"].unique())]
    return {
        "models": {
            name: {field: getattr(shape, field) for field in (*_SHAPE, "max_context")} for name, shape in shapes.items()
        },
        "element_bytes": ELEMENT_BYTES,
        "dtype_aliases": DTYPE_ALIASES,
        "cards": {name: asdict(Machine.published(name)) for name in published_machines()},
        "measured": {one["machine"]["name"]: one for one in measured if one},
        "headline": headline(),
        "quality": _quality(rows),
        "overlap": OVERLAP,
        "calls_per_layer": CALLS_PER_LAYER,
        "rated_head_dims": RATED_HEAD_DIMS,
    }


def _measured(rows: pandas.DataFrame, machine: str, published: Path) -> dict[str, Any] | None:
    """A machine's roofs, and ``auto``'s points of one layer's decoding in its newest run."""
    own = newest(rows, "decode", machine)
    own = own[(own["status"] == "ok") & (own["impl"] == "auto")]
    if own.empty:
        return None
    run, numbers = own["run"].iloc[0], own[[*_POINT]].astype(int)
    times = [[float(f"{value:.4g}") for value in own[name]] for name in ("q25", "median", "q75")]
    points = zip(own["dtype"], *(numbers[name].tolist() for name in _POINT), *times, strict=True)
    return {
        "machine": asdict(Machine.load(published / machine / run / MACHINE)),
        "processor": own["processor"].iloc[0],
        "run": run,
        "points": [list(point) for point in points],
    }


def _quality(rows: pandas.DataFrame) -> dict[str, Any] | None:
    """The newest g-sweep's differences to MHA, by R = H / G."""
    try:
        sweep = finished(rows, "g-sweep")
        found = effects(sweep)
    except InputError:
        return None
    first, heads = sweep.iloc[0], int(sweep["shape.n_heads"].iloc[0])
    base = sweep[sweep["shape.n_kv_heads"] == sweep["shape.n_heads"]]
    return {
        "arms": [
            [heads // one.n_kv_heads, one.arm, one.seeds]
            + [round(number, 5) for number in (one.mean, one.half_width, one.smallest)]
            + [one.verdict]
            for one in found
        ],
        "loss": round(float(base["bits_per_byte"].mean()), 4),
        "n_params": int(base["n_params"].iloc[0]),
        "n_heads": heads,
        "tokens": int(first["tokens"]),
        "run": first["run"],
        "machine": first["machine"],
    }
