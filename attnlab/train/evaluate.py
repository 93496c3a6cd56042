"""Loss in bits per byte, so that models of different tokenizers compare."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.errors import InputError, check_size
from attnlab.model.llama import Llama

BATCH = 32  # windows in one forward pass, fewer where they are long: at most WINDOW_TOKENS, or one window
WINDOW_TOKENS = 8192
LOGITS = 2**25  # scores held at once: a window of 8192 tokens has 10^9 of them with a vocabulary of 128k


def bits_per_byte(model: Llama, tokens: Tensor, context: int, text_bytes: int | None = None) -> float:
    """−log2 p(text) per byte. ``tokens`` [N] are cut into windows of ``context`` that do not overlap; every token but
    the first is predicted once, from those before it in its window. ``text_bytes`` is what the predicted tokens stand
    for (one each if None: a byte-level model). Raises ``InputError`` on fewer than two tokens or a context below 1."""
    bits, _ = bits_by_position(model, tokens, context)
    return bits.sum().item() / (len(tokens) - 1 if text_bytes is None else text_bytes)


def bits_by_position(model: Llama, tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """As above, told apart by how many tokens of its window a prediction sees: bits in all, and predictions made, at
    positions 0 … context - 1; [context] float64 each."""
    if len(tokens) < 2:
        raise InputError(f"the text has {len(tokens)} tokens, at least 2 are needed to predict one")
    device = model.embed_tokens.weight.device
    whole = (len(tokens) - 1) // check_size("context", context)
    rows = max(1, LOGITS // model.shape.vocab_size)
    bits, counts = torch.zeros(2, context, dtype=torch.float64)
    with torch.inference_mode():
        size = max(1, min(BATCH, WINDOW_TOKENS // context))
        batches = list(tokens.unfold(0, context + 1, context).split(size)) if whole else []
        if len(rest := tokens[whole * context :]) > 1:
            batches.append(rest[None])
        for batch in batches:
            batch = batch.to(device).long()
            hidden, targets = model.hidden(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
            nats = torch.cat(
                [
                    F.cross_entropy(model.logits(states).float(), expected, reduction="none")
                    for states, expected in zip(hidden.split(rows), targets.split(rows), strict=True)
                ]
            )
            seen = batch.shape[1] - 1
            bits[:seen] += nats.view(len(batch), seen).double().sum(0).cpu() / math.log(2)
            counts[:seen] += len(batch)
    return bits, counts


def load_tokenizer(directory: Path | str) -> Any:
    """The tokenizer of a model directory, through transformers (extra ``hf``), never running code from the directory.
    Raises ``InputError`` where transformers is not installed, or the directory holds no tokenizer it can read."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError("reading a tokenizer needs transformers; install it with: pip install 'attnlab[hf]'") from None
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"no readable tokenizer in {directory}: {reason}") from None


def tokenized(model: Llama, directory: Path | str, text: bytes) -> tuple[Tensor, int]:
    """Tokens [N] of ``text`` and the bytes that all but the first stand for: bytes themselves for a model of 256
    symbols, else by the directory's tokenizer (a beginning-of-text token, if it adds one, is the first)."""
    if not text:
        raise InputError("the text is empty")
    if model.shape.vocab_size == 256:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8), max(1, len(text) - 1)
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the text is not UTF-8: {error}") from None
    tokenizer = load_tokenizer(directory)
    ids = tokenizer(decoded)["input_ids"]
    if not ids or ids[0] != tokenizer.bos_token_id:
        return torch.tensor(ids), len(text) - len(tokenizer.decode(ids[:1]).encode())
    return torch.tensor(ids), len(text)
