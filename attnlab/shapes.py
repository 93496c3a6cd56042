"""What a model is, in integers: its shape, its name among the published ones, its exact parameter count.

One attention with G as a number: MHA (G = H) and MQA (G = 1) are its ends, GQA-G the rest (Ainslie et al. 2023,
arXiv 2305.13245). Nothing here imports torch, so a shape costs nothing to ask about.

    H n_heads   G n_kv_heads   R group_size = H / G   D head_dim (independent of dim / H)   L n_layers
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnlab.errors import InputError, check_choice, check_positive, check_size, divisors

# Bytes of one element. The 8-bit names count a quantised cache (`--kv-dtype`); no model here computes in them.
ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}
DTYPE_ALIASES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
DTYPE_ALIASES |= dict.fromkeys(("fp8", "float8_e4m3fn", "float8_e5m2"), "float8")


def dtype_name(dtype: object) -> str:
    """Canonical name of a dtype given as a string ("bfloat16", "bf16") or a ``torch.dtype``."""
    name = str(dtype).removeprefix("torch.")
    return check_choice("dtype", DTYPE_ALIASES.get(name, name), ELEMENT_BYTES)


def element_bytes(dtype: object) -> int:
    """Bytes of one element of ``dtype`` (a string or a ``torch.dtype``)."""
    return ELEMENT_BYTES[dtype_name(dtype)]


def variant_name(n_heads: int, n_kv_heads: int) -> str:
    """The label of G: "MHA" when G = H, "MQA" when G = 1, else "GQA-G"."""
    if n_kv_heads == n_heads:
        return "MHA"
    return "MQA" if n_kv_heads == 1 else f"GQA-{n_kv_heads}"


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context. ``kind`` "llama3" is computed (Llama 3.1,
    section 3.4.1 of arXiv 2407.21783: wavelengths longer than ``original_context / low_freq_factor`` are slowed by
    ``factor``, shorter than ``original_context / high_freq_factor`` kept, blended between). Any other kind can be
    counted but not run."""

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelShape:
    """A LLaMA-like decoder, in integers. Raises ``InputError`` on a size that is not a whole number in [1, 2^40],
    and when ``n_kv_heads`` does not divide ``n_heads`` (the message lists the divisors)."""

    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    max_context: int = 4096
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    name: str = ""
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for field in ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_context"):
            check_size(field, getattr(self, field))
        if self.n_heads % self.n_kv_heads:
            valid = ", ".join(map(str, divisors(self.n_heads)))
            raise InputError(f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}; valid: {valid}")
        for field in ("rope_theta", "norm_eps"):
            check_positive(field, getattr(self, field))

    @property
    def variant(self) -> str:
        """Its label: "MHA", "GQA-G" or "MQA"."""
        return variant_name(self.n_heads, self.n_kv_heads)

    @property
    def group_size(self) -> int:
        """R = H / G, query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def embedding_params(self) -> int:
        """Parameters of the token-embedding table (the head, where tied, is this same table)."""
        return self.vocab_size * self.dim

    @property
    def n_params(self) -> int:
        """Exact parameter count: embeddings, head unless tied, q k v o, optional q/k/v bias and q/k norms,
        SwiGLU's three matrices, every norm."""
        q, kv, d = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, self.dim
        extras = self.qkv_bias * (q + 2 * kv) + self.qk_norm * 2 * self.head_dim
        layer = d * q + 2 * d * kv + q * d + extras + 3 * d * self.ffn_dim + 2 * d
        return self.embedding_params * (1 if self.tied_embeddings else 2) + self.n_layers * layer + d

    def kv_bytes_per_token(self, dtype: object = "bfloat16") -> int:
        """Bytes that one token adds to one sequence's cache: 2 · L · G · D · bytes per element."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * element_bytes(dtype)

    def with_kv_heads(self, n_kv_heads: int, match_params: bool = False) -> "ModelShape":
        """The same model with G = ``n_kv_heads``; with ``match_params`` the FFN is widened (or narrowed) to the
        integer width whose parameter count comes nearest to this shape's."""
        grouped = replace(self, n_kv_heads=check_size("n_kv_heads", n_kv_heads))
        if match_params:
            saved = self.n_params - grouped.n_params
            grouped = replace(grouped, ffn_dim=matched_ffn_dim(self.ffn_dim, saved, self.dim, self.n_layers))
        return grouped

    def per_rank(self, tensor_parallel: int) -> "ModelShape":
        """What one of P tensor-parallel ranks holds: H/P query heads, max(1, G/P) KV heads (copied once P > G), an FFN
        and vocabulary slice rounded up; norms are replicated. P must divide H, and divide G or be divided by it."""
        p, g = check_size("tensor_parallel", tensor_parallel), self.n_kv_heads
        if self.n_heads % p or (g % p and p % g):
            valid = ", ".join(str(d) for d in divisors(self.n_heads) if g % d == 0 or d % g == 0)
            raise InputError(
                f"tensor_parallel={p} does not fit {self.n_heads} query heads and {g} KV heads: "
                f"it must divide n_heads, and divide n_kv_heads or be a multiple of it; valid: {valid}"
            )
        return replace(
            self,
            n_heads=self.n_heads // p,
            n_kv_heads=max(1, g // p),
            ffn_dim=-(-self.ffn_dim // p),
            vocab_size=-(-self.vocab_size // p),
        )

    @staticmethod
    def published(name: str) -> "ModelShape":
        """One of the published models by name (``published_names()``); an unknown name is answered with the nearest."""
        return _PUBLISHED[check_choice("model", name, _PUBLISHED)]

    @staticmethod
    def from_hf(source: Mapping[str, Any] | str | Path) -> "ModelShape":
        """Read a Hugging Face configuration: a dict, a ``config.json`` or the directory that holds one. Understands
        Llama, Mistral, SmolLM, Phi-3-like, Qwen2 and Qwen3, in the spelling of any transformers version. What cannot be
        counted (experts, MLA, other biases, other families) raises ``InputError`` by name. A sliding window shorter
        than the context is warned about and counted as if absent."""
        return _shape_from_hf(read_hf_config(source))


def published_names() -> list[str]:
    """Names that ``ModelShape.published`` knows."""
    return list(_PUBLISHED)


def matched_ffn_dim(ffn_dim: int, saved_params: int, dim: int, layers: int, matrices: int = 3) -> int:
    """FFN width that spends ``saved_params`` again, spread over ``layers`` FFNs of ``matrices`` dim × width matrices.
    Rounded to the nearest integer. SwiGLU has three matrices; with two this reproduces the widening 4096 → 5440 of
    Shazeer 2019 (arXiv 1911.02150, section 4)."""
    per_unit = check_size("layers", layers) * check_size("matrices", matrices) * check_size("dim", dim)
    return ffn_dim + (2 * saved_params + per_unit) // (2 * per_unit)


# --- Hugging Face configurations ------------------------------------------------------------------------------------

HF_FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
ROPE_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")  # of "llama3", there and in ``RopeScaling``


def read_hf_config(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """The configuration as a dict; raises ``InputError`` if the file is absent or not a JSON object."""
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no config.json at {path}; give a config.json or a model directory that holds one") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: UTF-8, JSON or a huge number
        raise InputError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} holds {type(config).__name__}, expected a JSON object")
    return config


def hf_window(config: Mapping[str, Any]) -> int | None:
    """Sliding window in tokens where it is in force and shorter than the context, else None."""
    # Qwen's own default: a window is listed but not used
    used = config.get("use_sliding_window", config.get("model_type") not in ("qwen2", "qwen3"))
    window = config.get("sliding_window", 4096 if config.get("model_type") == "mistral" else None)  # its default
    if window is None or not used:
        return None
    longest = check_size("max_position_embeddings", config.get("max_position_embeddings", 4096))
    return window if check_size("sliding_window", window) < longest else None


def _shape_from_hf(config: dict[str, Any]) -> ModelShape:
    family = config.get("model_type")
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(key):
            raise InputError(f"cannot count {family!r}: it has experts ({key}={config[key]})")
    if config.get("kv_lora_rank"):
        raise InputError(
            f"cannot count {family!r}: it uses multi-head latent attention (kv_lora_rank={config['kv_lora_rank']})"
        )
    if family not in HF_FAMILIES:
        raise InputError(f"cannot count model_type {family!r}; valid: {', '.join(HF_FAMILIES)} (SmolLM is a llama)")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise InputError(f"cannot count {family!r} with {key}=true: only q/k/v biases of qwen2 are counted")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"cannot count hidden_act {config['hidden_act']!r}: expected silu (SwiGLU)")
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    if missing := [key for key in needed if key not in config]:
        raise InputError(f"the configuration lacks {', '.join(missing)}")
    if (window := hf_window(config)) is not None:
        warnings.warn(
            f"sliding window of {window} tokens counted as if absent: every layer is taken to keep its whole context",
            stacklevel=3,
        )
    heads, dim = (check_size(key, config[key]) for key in ("num_attention_heads", "hidden_size"))
    # Both keys may be present and null; transformers reads null as the default too.
    kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"rope_parameters (or rope_scaling) must be a JSON object, got {rope!r}")
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return ModelShape(
        n_layers=config["num_hidden_layers"],
        dim=dim,
        n_heads=heads,
        n_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=dim // heads if head_dim is None else head_dim,
        ffn_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_context=config.get("max_position_embeddings", 4096),
        rope_theta=check_positive("rope_theta", theta),
        norm_eps=check_positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        name=str(config.get("_name_or_path") or ""),
        rope_scaling=_rope_scaling_from_hf(rope, config),
    )


def _rope_scaling_from_hf(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "llama3":
        return None if kind == "default" else RopeScaling(str(kind))
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    factors: Any = {key: check_positive(f"llama3 rope {key}", rope.get(key)) for key in ROPE_FACTORS}
    return RopeScaling("llama3", **factors, original_context=check_size("original_max_position_embeddings", original))


# --- published shapes -----------------------------------------------------------------------------------------------
# Llama 1: arXiv 2302.13971, table 2; Llama 2: arXiv 2307.09288 (34B as released with Code Llama: context 16k,
# theta 1e6); Llama 3: arXiv 2407.21783, table 3; Mistral: arXiv 2310.06825; SmolLM2: arXiv 2502.02737; the rest from
# model cards.

_LLAMA31: dict[str, Any] = {"rope_theta": 500000.0, "rope_scaling": RopeScaling("llama3", factor=8.0)}
_LLAMA32: dict[str, Any] = {"rope_theta": 500000.0, "rope_scaling": RopeScaling("llama3", factor=32.0)}
_PUBLISHED = {
    name: replace(shape, name=name)
    for name, shape in {  # layers, dim, heads, KV heads, head_dim, FFN, vocabulary, tied, context
        "llama-7b": ModelShape(32, 4096, 32, 32, 128, 11008, 32000, False, 2048, norm_eps=1e-6),
        "llama-13b": ModelShape(40, 5120, 40, 40, 128, 13824, 32000, False, 2048, norm_eps=1e-6),
        "llama-33b": ModelShape(60, 6656, 52, 52, 128, 17920, 32000, False, 2048, norm_eps=1e-6),
        "llama-65b": ModelShape(80, 8192, 64, 64, 128, 22016, 32000, False, 2048, norm_eps=1e-5),
        "llama-2-7b": ModelShape(32, 4096, 32, 32, 128, 11008, 32000, False, 4096),
        "llama-2-13b": ModelShape(40, 5120, 40, 40, 128, 13824, 32000, False, 4096),
        "llama-2-34b": ModelShape(48, 8192, 64, 8, 128, 22016, 32000, False, 16384, rope_theta=1e6),
        "llama-2-70b": ModelShape(80, 8192, 64, 8, 128, 28672, 32000, False, 4096),
        "llama-3-8b": ModelShape(32, 4096, 32, 8, 128, 14336, 128256, False, 8192, rope_theta=500000.0),
        "llama-3-70b": ModelShape(80, 8192, 64, 8, 128, 28672, 128256, False, 8192, rope_theta=500000.0),
        "llama-3.1-405b": ModelShape(126, 16384, 128, 8, 128, 53248, 128256, False, 131072, **_LLAMA31),
        "llama-3.2-1b": ModelShape(16, 2048, 32, 8, 64, 8192, 128256, True, 131072, **_LLAMA32),
        "mistral-7b-v0.1": ModelShape(32, 4096, 32, 8, 128, 14336, 32000, False, 32768),
        "smollm2-135m": ModelShape(30, 576, 9, 3, 64, 1536, 49152, True, 8192, rope_theta=100000.0),
        "smollm2-1.7b": ModelShape(24, 2048, 32, 32, 64, 8192, 49152, True, 8192, rope_theta=130000.0),
    }.items()
}
