"""attnlab: what sharing key/value heads buys and costs, predicted and measured.

Names are loaded when first used, so that importing attnlab, or asking the command line for help, does not import torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "errors": ["InputError"],
    "shapes": ["ModelShape", "matched_ffn_dim", "published_names"],
    "attention": ["attend", "implementations", "supports"],
    "model.cache": ["KVCache"],
    "model.llama": ["Llama"],
    "model.generate": ["generate"],
    "model.checkpoint": ["load_hf", "save_hf"],
    "model.convert": ["to_grouped"],
    "predict.memory": ["kv_cache_bytes", "weight_bytes", "decode_peak_bytes", "max_batch", "max_context"],
    "predict.machine": ["Machine"],
    "predict.time": ["Prediction", "predict_decode", "predict_prefill"],
    "results": ["load_results"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["__version__", *_HOME_OF]  # noqa: PLE0604  # the names are the table's own


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'attnlab' has no attribute {name!r}")
    return getattr(importlib.import_module(f"attnlab.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
