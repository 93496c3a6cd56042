"""What is timed: one attention call at fixed sizes, and random inputs for it that are cold when their turn comes.

B batch   T query tokens   S context   H query heads   G KV heads   D head_dim
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from attnlab.errors import check_choice, check_size
from attnlab.predict.machine import Machine
from attnlab.predict.time import Prediction, attention_bytes, least_seconds, predict_decode, predict_prefill
from attnlab.shapes import ModelShape, dtype_name, element_bytes


@dataclass(frozen=True)
class Point:
    """One attention call: ``kind`` "decode" (T = 1) or "prefill" (T = S, causal)."""

    kind: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    batch: int
    context: int
    dtype: str

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("decode", "prefill"))
        for name in ("batch", "context"):
            check_size(name, getattr(self, name))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        _ = self.shape  # checks the rest

    @property
    def shape(self) -> ModelShape:
        """One layer with these heads; what surrounds attention is as small as can be."""
        return ModelShape(1, 1, self.n_heads, self.n_kv_heads, self.head_dim, 1, 1)

    @property
    def queries(self) -> int:
        """T."""
        return 1 if self.kind == "decode" else self.context

    @property
    def short_dtype(self) -> str:
        """Short name: "fp32", "bf16", "fp16"."""
        return self.dtype.replace("bfloat", "bf").replace("float", "fp")

    @property
    def label(self) -> str:
        """For people: "GQA-8 decode ctx4096 b1 bf16"."""
        return f"{self.shape.variant} {self.kind} ctx{self.context} b{self.batch} {self.short_dtype}"

    def configuration(self, impl: str, device: str) -> dict[str, Any]:
        """What a row's key hashes."""
        fields = asdict(self)
        shape = {name: fields.pop(name) for name in ("n_heads", "n_kv_heads", "head_dim")}
        return {**fields, "shape": shape, "queries": self.queries, "impl": impl, "device": device}

    def predict(self, machine: Machine, impl: str) -> Prediction:
        """What this call should take on ``machine``."""
        function = predict_decode if self.kind == "decode" else predict_prefill
        return function(self.shape, machine, self.batch, self.context, self.dtype, impl=impl)

    def least_seconds(self, machine: Machine) -> float:
        """The roofline of this call on ``machine``."""
        return least_seconds(self.shape, machine, self.batch, self.queries, self.context, self.dtype)

    def binding_roof(self, machine: Machine) -> float:
        """Bytes/s that a decode step's loop may be asked for: the read bandwidth, or half the rate of products over the
        2 R flop that each element of K and V is used for, where that is less. (Half: a loop fed from memory cannot keep
        every unit busy as a large product can.)"""
        intensity = 2 * self.shape.group_size / element_bytes(self.dtype)
        return min(machine.read_bandwidth, machine.compute_roof(self.dtype) / 2 / intensity)

    def needed_bytes(self, impl: str) -> int:
        """Memory that the call needs at once: inputs, output, what ``impl`` makes of K and V; no kernel's scratch."""
        element, heads = element_bytes(self.dtype), self.n_heads
        kv = 2 * self.batch * self.context * self.head_dim
        sizes = (self.shape, self.batch, self.queries, self.context, self.dtype)
        own = attention_bytes(*sizes)
        own += (attention_bytes(*sizes, impl) - own) // 2  # copies are written and read, but held once
        if impl == "reference":  # scores and weights, a mask, and 32-bit copies of 16-bit inputs and output
            wide = max(element, 4)
            own += 2 * self.batch * heads * self.queries * self.context * wide + self.queries * self.context
            if element < wide:
                own += wide * (2 * self.batch * heads * self.queries * self.head_dim + kv * self.n_kv_heads)
        return own


class Inputs:
    """Random q, k, v for points, cut from one block of random memory per dtype, which is kept and grows."""

    def __init__(self, device: str, rotation_bytes: int) -> None:
        self.device, self.rotation_bytes = device, rotation_bytes
        self._block = torch.empty(0)

    def rotation(self, point: Point) -> list[tuple[Tensor, Tensor, Tensor]]:
        """So many (q, k, v) that each is cold again when its turn comes: q [B, H, T, D], k and v [B, G, S, D]."""
        q_size = (point.batch, point.n_heads, point.queries, point.head_dim)
        kv_size = (point.batch, point.n_kv_heads, point.context, point.head_dim)
        sizes = [torch.Size(size).numel() for size in (q_size, kv_size, kv_size)]
        bytes_each = sum(sizes) * element_bytes(point.dtype)
        copies = 1 if bytes_each >= 4 * self.rotation_bytes else -(-self.rotation_bytes // bytes_each) + 1
        block = self._filled(copies * sum(sizes), getattr(torch, point.dtype))
        pieces = block[: copies * sum(sizes)].split(sizes * copies)
        return [
            (pieces[i].view(q_size), pieces[i + 1].view(kv_size), pieces[i + 2].view(kv_size))
            for i in range(0, len(pieces), 3)
        ]

    def _filled(self, elements: int, dtype: torch.dtype) -> Tensor:
        if self._block.dtype != dtype or self._block.numel() < elements:
            self._block = torch.empty(0)  # freed before its successor is allocated
            block = torch.empty(elements, dtype=dtype, device=self.device)
            # A random tile of odd length, repeated: much faster than drawing it all, and no two heads begin alike.
            tile = torch.randn(min(elements, 2**22 - 3), generator=torch.Generator().manual_seed(0)).to(block)
            for piece in block.split(len(tile)):
                piece.copy_(tile[: len(piece)])
            self._block = block
        return self._block
