"""How attention is computed: one function, several implementations of the same mathematics.

``attend(q, k, v, impl=...)`` names the how; the result is the same. The ladder, from naive to fast:

    reference   the fifteen lines of the course, every score materialised; the oracle
    expanded    K and V repeated to H heads, then torch SDPA: what most code does, and what sharing heads cannot survive
    sdpa        torch SDPA with enable_gqa; its speed depends on the backend torch picks (see ``backend``)
    grouped     a group's R query heads folded into rows: K and V read once, no copy
    cpp         a decode step in C++ on the CPU: every byte read once, by every core
    flex        FlexAttention compiled, on CUDA
    triton      our own decode kernel, on CUDA: splits the context, reads K and V once for any G
    auto        takes the one that was fastest on such a machine (``auto.ranked``)

Implementations import neither each other nor the reference. Only ``auto`` may fall back; an explicit name that cannot
run raises. ``peers`` are other people's kernels, run when named: rivals to time beside ours (``third_party``).

    B batch   T query tokens   S key/value tokens   H query heads   G KV heads   R = H / G   D head_dim
"""

import math
from types import ModuleType
from typing import Any

from torch import Tensor

from attnlab.attention import auto, cpp, expanded, flex, grouped, reference, sdpa, third_party, triton_decode
from attnlab.errors import InputError, check_choice, divisors

_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "reference": reference,
    "expanded": expanded,
    "sdpa": sdpa,
    "grouped": grouped,
    "cpp": cpp,
    "flex": flex,
    "triton": triton_decode,
}
_PEERS: dict[str, Any] = {"flex_tuned": flex.TUNED, **third_party.PEERS}
DEVICES = ("cpu", "cuda")


def implementations() -> list[str]:
    """The names of our implementations, which ``attend`` takes beside "auto" and ``peers``."""
    return list(_IMPLEMENTATIONS)


def peers() -> list[str]:
    """The names of other people's kernels, absent ones included: ``supports`` says what is missing."""
    return list(_PEERS)


def _arm(impl: str) -> Any:
    return _IMPLEMENTATIONS.get(impl) or _PEERS.get(impl)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, impl: str = "auto", scale: float | None = None
) -> Tensor:
    """Grouped-query attention (arXiv 2305.13245): query head h reads KV head h // R.

    Args:
        q: [B, H, T, D].
        k, v: [B, G, S, D], G dividing H, dtype and device as q.
        causal: bottom-right aligned: query i sees keys <= S - T + i, so the last query sees them all.
        impl: "auto", or one of ``implementations()`` or ``peers()``.
        scale: factor on the scores, above 0; D ** -0.5 if None.
    Returns: [B, H, T, D].
    Raises: InputError on shapes that do not fit, causal with T > S, a scale of 0 or less, an unknown ``impl``,
            or one that cannot run here.
    """
    _check(q, k, v, causal)
    return _arm(_resolved(impl, q, k, v, causal)).attend(q, k, v, causal=causal, scale=_scale(q, scale))


def supports(impl: str, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[bool, str]:
    """(True, "") if ``impl`` can run this call, else (False, the reason). Shapes as in ``attend``."""
    check_choice("impl", impl, ["auto", *_IMPLEMENTATIONS, *_PEERS])
    try:
        _check(q, k, v, causal)
    except InputError as error:
        return False, str(error)
    own = getattr(_arm(impl), "supports", None)
    return own(q, k, v, causal) if own else (True, "")


def backend(impl: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None) -> str:
    """What ran below: the torch backend ("flash", "cudnn", "efficient", "math"), "triton" or "cuda" for a
    kernel of its own, or "torch" for plain operators. Shapes and errors as in ``attend``."""
    _check(q, k, v, causal)
    own = getattr(_arm(_resolved(impl, q, k, v, causal)), "backend", None)
    return own(q, k, v, causal=causal, scale=_scale(q, scale)) if own else "torch"


def picked(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> str:
    """The implementation that ``auto`` takes for this call. Shapes as in ``attend``, which it does not check."""
    for name in auto.ranked(q, k, causal):
        own = getattr(_IMPLEMENTATIONS[name], "supports", None)
        if own is None or own(q, k, v, causal)[0]:
            return name
    raise AssertionError("the last of auto's arms takes every call")


def _resolved(impl: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    if impl == "auto":
        return picked(q, k, v, causal)
    able, reason = supports(impl, q, k, v, causal)
    if not able:
        raise InputError(f"impl={impl!r} cannot run here: {reason}")
    return impl


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    if (
        not 0 < scale < math.inf
    ):  # torch's CPU kernel multiplies the mask's -inf by the scale: NaN from 0, garbage below
        raise InputError(f"scale must be a number above 0, got {scale!r}")
    return scale


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise InputError(
            f"expected q [B, H, T, D] and k, v [B, G, S, D], got {q.ndim}, {k.ndim} and {v.ndim} dimensions"
        )
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D:
        raise InputError(
            f"k and v must both be [{B}, G, S, {D}] for q {list(q.shape)}, got k {list(k.shape)}, v {list(v.shape)}"
        )
    if 0 in q.shape or 0 in k.shape:
        raise InputError(f"every size must be at least 1, got q {list(q.shape)}, k {list(k.shape)}")
    if H % G:
        raise InputError(f"{G} KV heads do not divide {H} query heads; valid: {', '.join(map(str, divisors(H)))}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise InputError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device or q.device.type not in DEVICES:
        raise InputError(f"q, k and v must share one device of {DEVICES}, got {q.device}, {k.device}, {v.device}")
    if causal and T > S:
        raise InputError(f"causal attention needs at least as many keys as queries, got T={T} > S={S}")
