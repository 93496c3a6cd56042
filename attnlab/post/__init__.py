"""The blog post: a text with places for numbers, each computed from shapes, published rows or a paper's table.

``post.md`` beside this file is the text. ``{name:format}`` is a number or a sentence from ``facts``; a digit that
stands in the prose itself fails the build, since no row would notice when it is no longer true.
"""

import json
import re
from pathlib import Path
from typing import Any

import pandas

from attnlab import generated, report
from attnlab.effects import effects, finished, spreads
from attnlab.errors import InputError
from attnlab.predict.machine import Machine
from attnlab.predict.memory import GIB, KIB, kv_cache_bytes, max_batch, weight_bytes
from attnlab.results import headline, newest
from attnlab.shapes import ModelShape, variant_name
from attnlab.trained import at_best_rate

_TEXT = Path(__file__).parent / "post.md"
_PAPERS = Path(__file__).parent.parent / "plots" / "published.json"
_PLACE = re.compile(r"\{(\w+)(?::([^{}]*))?\}")
# what may hold a digit that is not a claim: code, where a link leads, names
_NAMES = r"`[^`]*`|\]\([^)]*\)|\{[^{}]*\}|Llama \d(?: \d+B)?|T5|GQA-\d|\w+float\d+|float32|arXiv \d+\.\d+|H100|^\d\. "
_SEQUENCES, _CONTEXT, _ALPHA = 32, 4096, 0.05


def build(rows: pandas.DataFrame, text: str | None = None) -> str:
    """The post as Markdown. Raises ``InputError`` where a number stands in the text itself, where a place has no fact,
    and where ``rows`` do not hold what a fact needs."""
    text = _TEXT.read_text(encoding="utf-8") if text is None else text
    bare = re.sub(_NAMES, "", text, flags=re.MULTILINE)
    if found := re.search(r".{0,30}\d.{0,30}", bare):
        raise InputError(f"a number of the post has no row behind it: {found[0].strip()!r}; make it a {{fact}}")
    try:
        known = facts(rows, headline())
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"the rows do not hold what the post says: {error!r}") from error

    def put(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise InputError(f"the post has a place for {match[1]!r}, and no fact has this name")
        return format(known[match[1]], match[2] or "")

    return _PLACE.sub(put, text)


def facts(rows: pandas.DataFrame, machine: str) -> dict[str, Any]:
    """Everything that the text has a place for, by name: bytes, times of ``machine``, losses, papers."""
    return _bytes() | _times(rows, machine) | _losses(rows, machine) | _papers() | {"machine": machine}


def _bytes() -> dict[str, Any]:
    large, small, card = (
        ModelShape.published("llama-2-70b"),
        ModelShape.published("llama-3-8b"),
        Machine.published("h100"),
    )
    found: dict[str, Any] = {
        "H": large.n_heads,
        "G": large.n_kv_heads,
        "weights": weight_bytes(large) / GIB,
        "sequences": _SEQUENCES,
        "context": _CONTEXT,
        "ridge": card.compute_roof("bfloat16") / card.read_bandwidth,
        "card_gib": card.memory_bytes / GIB,
        "window": small.max_context,
    }
    for name, g in (("mha", large.n_heads), ("gqa", large.n_kv_heads), ("mqa", 1)):
        found[f"kib_{name}"] = kv_cache_bytes(large.with_kv_heads(g), 1, 1) / KIB
        found[f"gib_{name}"] = kv_cache_bytes(large.with_kv_heads(g), _SEQUENCES, _CONTEXT) / GIB
    for name, g in (("mha", small.n_heads), ("gqa", small.n_kv_heads), ("mqa", 1)):
        found[f"fit_{name}"] = max_batch(small.with_kv_heads(g), card.memory_bytes, small.max_context)
    return found


def _times(rows: pandas.DataFrame, machine: str) -> dict[str, Any]:
    decode, prefill = (report.timed(newest(rows, kind, machine)) for kind in ("decode", "prefill"))
    decode = decode[decode["dtype"] == "float32"]
    context, batch = decode["context"].max(), decode["batch"].min()
    time = decode[(decode["context"] == context) & (decode["batch"] == batch)].set_index(["impl", "variant"])["median"]
    auto, worst = time["auto"], (time["expanded"] / time["auto"]).drop("MHA")
    middle = next(name for name in auto.index if name not in ("MHA", "MQA"))
    prompt = prefill[(prefill["impl"] == "auto") & (prefill["dtype"] == "float32")]
    prompt = prompt[prompt["context"] == prompt["context"].max()].groupby("variant")["median"].mean()
    errors = report.prediction_errors(newest(rows, "decode", machine))
    exact = newest(rows, "memory", machine)
    proof = newest(rows, "peak", machine)
    return {
        "processor": decode["processor"].iloc[0],
        "heads": int(decode["shape.n_heads"].iloc[0]),
        "held": int(context),
        "read_gb": decode["read_bandwidth"].median() / 1e9,
        "ms_mha": 1e3 * auto["MHA"],
        "middle": middle,
        "ms_middle": 1e3 * auto[middle],
        "ms_mqa": 1e3 * auto["MQA"],
        "middle_g": decode[decode["variant"] == middle]["shape.n_kv_heads"].iloc[0],
        "mqa_time": auto["MQA"] / auto[middle],
        "gain_middle": auto["MHA"] / auto[middle],
        "gain_mqa": auto["MHA"] / auto["MQA"],
        "usual_low": worst.min(),
        "usual_high": worst.max(),
        "points": len(errors),
        "error": errors.median(),
        "error_90": errors.quantile(0.9),
        "prefill_spread": prompt.max() / prompt.min() - 1,
        "caches": int((exact["status"] == "ok").sum()),
        "off": int((exact[exact["status"] == "ok"]["allocated_bytes"] != exact["predicted_bytes"]).sum()),
        "peaks": len(proof),
        "models": _bullets(
            f"{line[0].upper()}{line[1:]}"
            for line in generated.summary(generated.ratios(newest(rows, "generate", machine)))
        ),
    }


def _losses(rows: pandas.DataFrame, machine: str) -> dict[str, Any]:
    sweep = finished(rows, "g-sweep", machine)
    found, mha = effects(sweep), sweep[sweep["shape.n_kv_heads"] == sweep["shape.n_heads"]]
    whole = next(spread for spread in spreads(sweep) if spread.column == "bits_per_byte")
    trained = finished(rows, "uptraining", machine)
    trained = trained.assign(variant=list(map(variant_name, trained["shape.n_heads"], trained["shape.n_kv_heads"])))
    loss = trained.groupby(["alpha", "arm", "variant"], sort=False)["bits_per_byte"].mean()
    after = loss[_ALPHA].unstack("arm", sort=False)
    cost = after.drop(columns="continued").dropna() - after["continued"].dropna().iloc[0]
    methods = list(cost.mean().sort_values().index)
    return {
        "small_heads": int(mha["shape.n_heads"].iloc[0]),
        "params": int(mha["n_params"].iloc[0]),
        "tokens": int(mha["tokens"].iloc[0]),
        "seeds": sweep["seed"].nunique(),
        "bits": mha["bits_per_byte"].mean(),
        "gzip": mha["gzip_bits"].iloc[0],
        "arms": len(found),
        "verdicts": _bullets(
            f"**{one.variant}, {one.arm}**: {one.mean:+.4f} ± {one.half_width:.4f}, {one.verdict}" for one in found
        ),
        "grain": max(one.smallest for one in found),
        "paired": (whole.unpaired / whole.paired) ** 2,
        "orders": trained["seed"].nunique(),
        "alpha": _ALPHA,
        "methods": " before ".join(methods),
        "recovery": "\n".join(
            [
                f"| | {' | '.join(methods)} |",
                f"|---|{'---:|' * len(methods)}",
                *(
                    f"| {name} | {' | '.join(f'{cost.loc[name, way]:+.3f}' for way in methods)} |"
                    for name in cost.index
                ),
            ]
        ),
        "recall": _recall(rows, machine),
    }


def _recall(rows: pandas.DataFrame, machine: str) -> str:
    """What share of answers each variant got right in the longest plain setting."""
    done = finished(rows, "recall", machine)
    plain = done[(done["relations"] == done["relations"].min())]
    plain = plain[plain["context"] == plain["context"].max()]
    parts = []
    for g, own in sorted(plain.groupby("shape.n_kv_heads"), reverse=True):
        parts.append(f"{variant_name(int(own['shape.n_heads'].iloc[0]), int(g))} {at_best_rate(own).mean():.0%}")
    pairs, length = plain["pairs"].iloc[0], plain["context"].iloc[0]
    return f"of {pairs:g} pairs in {length:g} tokens they recall {', '.join(parts)}"


def _papers() -> dict[str, Any]:
    papers = json.loads(_PAPERS.read_text(encoding="utf-8"))
    xxl = {point["name"].removesuffix("-XXL"): point for point in papers["gqa"]["points"]}
    cla = {point["variant"]: point["perplexity"] for point in papers["cla"]["points"]}
    return {
        **{
            f"t5_seconds_{name}": xxl[key]["seconds"]
            for name, key in (("mha", "MHA"), ("gqa", "GQA-8"), ("mqa", "MQA"))
        },
        **{
            f"t5_quality_{name}": xxl[key]["quality"]
            for name, key in (("mha", "MHA"), ("gqa", "GQA-8"), ("mqa", "MQA"))
        },
        "perplexities": ", ".join(f"{value:.2f} ({name})" for name, value in cla.items()),
    }


def _bullets(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)
