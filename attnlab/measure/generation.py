"""Whole-model decoding, measured: a step at a fixed context and the first token, beside transformers' of these weights.

A cell is one model, batch and context. Its arms are timed in turn and checked against each other first. Caches are
filled with noise, so a long context costs no prefill, and set back after every step, so that nothing grows in the
timer. The first token (a prefill and one position's logits) is measured where it is predicted to be short.

    B batch   T prompt tokens   S context   G KV heads
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnlab import host
from attnlab.errors import check_choice
from attnlab.measure import clock
from attnlab.measure.clock import interleaved, out_of_memory, quartiles, time_fields
from attnlab.measure.roofs import measure_machine, refreshed
from attnlab.measure.step import decode_step, noise_cache
from attnlab.model.cache import KVCache
from attnlab.model.checkpoint import hf_config, hf_name
from attnlab.model.llama import Llama
from attnlab.predict.machine import Machine
from attnlab.predict.memory import decode_peak_bytes
from attnlab.predict.time import predict_decode, predict_prefill
from attnlab.results import DYNAMIC, MACHINE, OURS, STATIC, Run, row_key
from attnlab.shapes import ModelShape, dtype_name

ARMS = (OURS, DYNAMIC, STATIC)
MEMORY_SHARE = 0.6
ROUNDS, LEAST_ROUNDS, CELL_SECONDS = 15, 5, 12.0  # of a step; rounds until an arm has taken so many seconds
FIRST_TOKEN_SECONDS, FIRST_TOKEN_ROUNDS = 1.0, 3  # a first token predicted to take longer is not measured
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.06, "float16": 0.01}  # of logits, relative to the largest
SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape(8, 512, 16, 16, 32, 1408, 8192, tied_embeddings=True, max_context=16384, name="8l-512"),
        ModelShape(24, 1024, 16, 16, 64, 2816, 8192, tied_embeddings=True, max_context=16384, name="24l-1024"),
        replace(ModelShape.published("llama-2-7b"), max_context=131072),
    )
}
# (shape, batches, contexts): quick is the cells that others measured too, full adds what a machine may not hold
_GRIDS: dict[tuple[str, str], list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = {
    ("quick", "cpu"): [("8l-512", (1, 8), (128, 1024, 4096)), ("24l-1024", (1,), (128, 1024, 4096))],
    ("full", "cpu"): [("8l-512", (1, 8, 32), (128, 1024, 4096, 8192)), ("24l-1024", (1, 8), (128, 1024, 4096, 8192))],
    ("quick", "cuda"): [("llama-2-7b", (1, 32), (1024, 4096))],
    ("full", "cuda"): [("llama-2-7b", (1, 8, 32, 128), (1024, 4096, 16384, 65536))],
}
_GROUPS = {"cpu": (16, 4, 1), "cuda": (32, 8, 4, 1)}


@dataclass(frozen=True)
class Cell:
    """One model's decode step: ``shape`` with its G, B sequences, S tokens held before the step."""

    shape: ModelShape
    batch: int
    context: int
    dtype: str

    @property
    def label(self) -> str:
        """For people: "8l-512 GQA-4 ctx4096 b8 bfloat16"."""
        return f"{self.shape.name} {self.shape.variant} ctx{self.context} b{self.batch} {self.dtype}"

    def configuration(self, arm: str, device: str) -> dict[str, Any]:
        """What a row's key hashes."""
        names = ("name", "n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
        shape = {name: getattr(self.shape, name) for name in names}
        sizes: dict[str, Any] = {"batch": self.batch, "context": self.context, "dtype": self.dtype}
        return {"kind": "generate", "impl": arm, "shape": shape, **sizes, "device": device}

    def needed_bytes(self, arm: str) -> int:
        """Predicted peak of a step: transformers' growing cache is held twice, as it was and longer by one token."""
        peak = decode_peak_bytes(self.shape, self.batch, self.context + 1, self.dtype)
        return peak.total + (peak.kv_cache if arm == DYNAMIC else 0)


def cells(name: str, device: str, dtypes: list[str]) -> list[Cell]:
    """The cells of a grid, "quick" or "full"; raises ``InputError`` on another name or an unknown dtype."""
    check_choice("grid", name, ("quick", "full"))
    return [
        Cell(SHAPES[model].with_kv_heads(g), batch, context, dtype_name(dtype))
        for model, batches, contexts in _GRIDS[name, device]
        for dtype, g in itertools.product(dtypes, _GROUPS[device])
        for batch, context in itertools.product(batches, contexts)
    ]


def new_model(shape: ModelShape, dtype: str, device: str) -> Llama:
    """A random model, made quickly; the same at every call."""
    with torch.device("meta"):
        model = Llama(shape)
    model = model.to_empty(device=device).to(getattr(torch, dtype)).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(std=0.02, generator=generator)
    return model


def transformers_model(model: Llama) -> Any:
    """transformers' model around the same weights, byte for byte the same memory; its rotary frequencies stay float32
    (``.to(bfloat16)`` would cast them, and logits drift with position)."""
    import transformers

    config = transformers.AutoConfig.for_model(**hf_config(model))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    weights = {hf_name(name): value for name, value in model.state_dict().items()}
    weights.setdefault("lm_head.weight", model.embed_tokens.weight)
    theirs.load_state_dict(weights, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(model.embed_tokens.weight.device)
    return theirs.eval()


def transformers_step(theirs: Any, cache: KVCache, context: int, static: bool) -> Callable[[], Tensor]:
    """The same step by transformers, on the same cache's memory: its static cache at exactly the capacity needed, its
    most favourable size, or its dynamic cache, which makes a longer copy at every step."""
    import transformers

    kind: Any = transformers.StaticCache if static else transformers.DynamicCache
    past = kind(config=theirs.config, **({"max_cache_len": context + 1} if static else {}))
    k, v = (x if static else x[:, :, :, :context] for x in (cache.k, cache.v))
    for layer, (keys, values) in enumerate(zip(k, v, strict=True)):
        past.layers[layer].lazy_initialization(keys[:, :, :1], values[:, :, :1])
    token = torch.zeros(cache.batch, 1, dtype=torch.int64, device=k.device)

    def step() -> Tensor:
        for layer, keys, values in zip(past.layers, k, v, strict=True):
            layer.keys, layer.values = keys, values
            if static:
                layer.cumulative_length.fill_(context)
        with torch.inference_mode():
            return theirs(input_ids=token, past_key_values=past, use_cache=True).logits

    return step


def fill(run: Run, grid: list[Cell], facts: dict[str, Any], progress: Callable[[str, int, int], None]) -> None:
    """Fill ``run`` with every row that ``grid`` asks for and it does not hold; the caller holds ``host.timing()``."""
    device = facts["device"]
    keys = {(cell, arm): row_key(cell.configuration(arm, device)) for cell, arm in itertools.product(grid, ARMS)}
    run.plan(keys.values())
    if not (run.folder / MACHINE).exists():
        measure_machine(device, tuple(dict.fromkeys(cell.dtype for cell in grid))).save(run.folder / MACHINE)
    machine, model = Machine.load(run.folder / MACHINE), None
    for done, cell in enumerate(grid):
        progress(cell.label, done, len(grid))
        missing = [arm for arm in ARMS if keys[cell, arm] not in run]
        if not missing:
            continue
        if model is None or (model.shape, dtype_name(model.embed_tokens.weight.dtype)) != (cell.shape, cell.dtype):
            model = None  # freed before its successor is made
            model, machine = (
                new_model(cell.shape, cell.dtype, device),
                refreshed(machine, cell.dtype, cell.shape.head_dim),
            )
        for arm, row in measure_cell(cell, model, missing, machine):
            run.append(keys[cell, arm], {**facts, **cell.configuration(arm, device), **row})


def measure_cell(cell: Cell, model: Llama, arms: list[str], machine: Machine) -> Iterator[tuple[str, dict[str, Any]]]:
    """Time ``arms`` of one cell in turn and yield (arm, row) for each; an arm that would not fit, ran out of memory or
    is not installed is a row with the reason. Raises ``AssertionError`` where logits differ from ours."""
    rows: dict[str, dict[str, Any]] = {arm: {"status": "ok", "needed_bytes": cell.needed_bytes(arm)} for arm in arms}
    for arm, row in rows.items():
        if row["needed_bytes"] > MEMORY_SHARE * machine.memory_bytes:
            reason = f"needs {row['needed_bytes']} of {machine.memory_bytes} bytes of memory"
            row |= {"status": "too_big", "reason": reason}
        elif arm != OURS and importlib.util.find_spec("transformers") is None:
            row |= {"status": "unsupported", "reason": "transformers is not installed"}
    runnable = [arm for arm in arms if rows[arm]["status"] == "ok"]
    try:
        if runnable:
            _time(cell, model, runnable, machine, rows)
    except RuntimeError as error:
        for arm in runnable:
            rows[arm] |= {"status": "oom", "reason": out_of_memory(error)}
    yield from rows.items()


def _time(cell: Cell, model: Llama, arms: list[str], machine: Machine, rows: dict[str, dict[str, Any]]) -> None:
    cache = noise_cache(model, cell.batch, cell.context + 1)
    steps = {OURS: decode_step(model, cell.batch, cell.context, cache)}
    theirs = transformers_model(model) if set(arms) - {OURS} else None
    steps |= {arm: transformers_step(theirs, cache, cell.context, arm == STATIC) for arm in arms if arm != OURS}
    expected = steps[OURS]().float()
    for arm in set(arms) - {OURS}:
        error = float((steps[arm]().float() - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE[cell.dtype]:
            raise AssertionError(f"{cell.label} {arm}: logits differ by {error:.2g}, allowed {TOLERANCE[cell.dtype]}")
        rows[arm]["error"] = error
    steps = {arm: steps[arm] for arm in arms}
    busy, load = host.wait_for_quiet(clock.QUIET_SECONDS), host.Load()
    once = {arm: taken[0] for arm, taken in interleaved(steps, dict.fromkeys(arms, 1), machine.device).items()}
    rounds = {arm: min(ROUNDS, max(LEAST_ROUNDS, int(CELL_SECONDS / seconds))) for arm, seconds in once.items()}
    seconds = interleaved(steps, rounds, machine.device)
    first = _first_tokens(cell, model, theirs, arms, machine)
    prediction = predict_decode(cell.shape, machine, cell.batch, cell.context + 1, cell.dtype, scope="model")
    for arm in arms:
        rows[arm] |= time_fields(seconds[arm], prediction, load, busy) | first.get(arm, {})
        rows[arm] |= {
            "variant": cell.shape.variant,
            "bytes": prediction.bytes,
            "tokens_per_second": cell.batch / rows[arm]["median"],
            "read_bandwidth": machine.read_bandwidth,
        }


def _first_tokens(
    cell: Cell, model: Llama, theirs: Any, arms: list[str], machine: Machine
) -> dict[str, dict[str, Any]]:
    prediction = predict_prefill(cell.shape, machine, cell.batch, cell.context, cell.dtype, scope="model")
    if prediction.seconds > FIRST_TOKEN_SECONDS:
        return {}
    tokens = torch.zeros(cell.batch, cell.context, dtype=torch.int64, device=machine.device)

    def ours() -> Tensor:
        with torch.inference_mode():
            return model.logits(model.hidden(tokens, model.new_cache(cell.batch, cell.context))[:, -1:])

    def transformers_prefill() -> Tensor:
        with torch.inference_mode():
            return theirs(input_ids=tokens, use_cache=True, logits_to_keep=1).logits

    calls = {arm: call for arm, call in ((OURS, ours), (DYNAMIC, transformers_prefill)) if arm in arms}
    for call in calls.values():
        call()
    seconds = interleaved(calls, dict.fromkeys(calls, FIRST_TOKEN_ROUNDS), machine.device)
    names = ("first_token", "first_token_samples", "first_token_predicted")
    return {
        arm: dict(zip(names, (quartiles(taken)[1], taken, prediction.seconds), strict=True))
        for arm, taken in seconds.items()
    }
