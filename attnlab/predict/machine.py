"""A machine's roofs: how fast it reads, copies and multiplies, and what a call costs before any work is done.

Measured by ``attnlab machine``, loaded from a file, or published by a maker. A published roof is marked so and never
stands behind a measurement: no kernel reaches a datasheet.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from attnlab.errors import InputError, check_choice, check_positive, write_whole
from attnlab.shapes import dtype_name

RATED_HEAD_DIMS = (32, 64, 128)  # decoding is rated at these


def rated_head_dim(head_dim: int) -> int:
    """The rated one nearest to ``head_dim``, by ratio."""
    return min(RATED_HEAD_DIMS, key=lambda known: max(known, head_dim) / min(known, head_dim))


@dataclass(frozen=True)
class Machine:
    """Roofs of one device. Bandwidths in bytes/s (a copy counts what it reads and what it writes), ``matmul_rate`` in
    flop/s per dtype, ``call_seconds`` the fixed cost of one attention call, ``spread`` each figure's interquartile
    range over its median where it was measured.

    Measured machines know more: ``rates``, flop/s at which this library's own code runs on inputs that lie in a cache,
    by "decode 128 bfloat16 8" (D, dtype, R), "prefill …" (T) and "product …" (rows); ``layer_seconds`` and
    ``step_seconds``, what a decode step costs per layer and once when there is next to nothing to compute.
    """

    name: str
    device: str
    read_bandwidth: float
    copy_bandwidth: float
    matmul_rate: Mapping[str, float]
    call_seconds: float
    memory_bytes: int
    source: str = "measured"
    rates: Mapping[str, float] = field(default_factory=dict)
    layer_seconds: float = 0.0
    step_seconds: float = 0.0
    spread: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("read_bandwidth", "copy_bandwidth", "call_seconds", "memory_bytes"):
            check_positive(f"a machine's {name}", getattr(self, name))
        if not self.matmul_rate:
            raise InputError("a machine needs at least one matmul_rate, got none")
        for dtype, rate in self.matmul_rate.items():
            check_positive(f"a machine's matmul_rate of {dtype}", rate)

    def compute_roof(self, dtype: object) -> float:
        """Fastest arithmetic on inputs of ``dtype``, flop/s. On a CPU a 16-bit kernel may convert to float32 and
        multiply there, so its roof is the faster of the two; raises ``InputError`` where no rate is known."""
        names = {dtype_name(dtype)} | ({"float32"} if self.device == "cpu" else set())
        rates = [self.matmul_rate[name] for name in names if name in self.matmul_rate]
        if not rates:
            raise InputError(
                f"{self.name} has no matmul rate for {dtype_name(dtype)}; known: {', '.join(self.matmul_rate)}"
            )
        return max(rates)

    def rate(self, what: str, dtype: object, size: int) -> float:
        """``rates`` at ``size``, between its neighbours by powers; ``compute_roof`` where nothing was measured."""
        prefix = f"{what} {dtype_name(dtype)} "
        known = sorted(
            (int(name.removeprefix(prefix)), rate) for name, rate in self.rates.items() if name.startswith(prefix)
        )
        if not known:
            return self.compute_roof(dtype)
        below = max((one for one in known if one[0] <= size), default=known[0])
        above = min((one for one in known if one[0] >= size), default=known[-1])
        if below[0] == above[0]:
            return below[1]
        share = math.log(size / below[0]) / math.log(above[0] / below[0])
        return below[1] ** (1 - share) * above[1] ** share

    @staticmethod
    def published(name: str) -> "Machine":
        """A card by name from its maker's datasheet (``published_machines()``)."""
        return _PUBLISHED[check_choice("machine", name, _PUBLISHED)]

    @staticmethod
    def load(path: Path | str) -> "Machine":
        """Read a machine from JSON as ``save`` writes it; raises ``InputError`` on anything else."""
        try:
            return Machine(**json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise InputError(f"no machine file at {path}; make one with: attnlab machine --out {path}") from None
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:  # ValueError: UTF-8 and JSON
            if isinstance(error, InputError):
                raise
            remedy = "make one with: attnlab machine --out FILE"
            raise InputError(f"{path} is not a machine file ({error}); {remedy}") from None

    def save(self, path: Path | str) -> None:
        """Write as JSON, entirely or not at all; raises ``InputError`` where that is not possible."""
        write_whole(Path(path), json.dumps(asdict(self), indent=1) + "\n")


def published_machines() -> list[str]:
    """Names that ``Machine.published`` knows."""
    return list(_PUBLISHED)


def _card(name: str, bandwidth: float, half: float, single: float, memory_bytes: int, source: str) -> Machine:
    # A launch of about 5 µs is no datasheet figure but the usual cost of one kernel through CUDA.
    rates = {"bfloat16": half, "float16": half, "float32": single}
    return Machine(name, "cuda", bandwidth, bandwidth, rates, 5e-6, memory_bytes, source=f"published: {source}")


# Dense rates without sparsity; float32 is the non-tensor-core rate, which is what torch uses unless TF32 is allowed.
_PUBLISHED = {
    "a100-80gb": _card("a100-80gb", 2.039e12, 312e12, 19.5e12, 80 * 2**30, "NVIDIA A100 datasheet, SXM 80 GB"),
    "h100": _card("h100", 3.35e12, 989e12, 67e12, 80 * 2**30, "NVIDIA H100 datasheet, SXM5"),
    "h200": _card("h200", 4.8e12, 989e12, 67e12, 141 * 10**9, "NVIDIA H200 datasheet, SXM"),
    "rtx-4090": _card("rtx-4090", 1.008e12, 165.2e12, 82.6e12, 24 * 2**30, "NVIDIA Ada GPU architecture whitepaper"),
}
