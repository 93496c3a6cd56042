"""Causal attention over a whole prompt (T = S): bound by arithmetic, so sharing heads saves almost nothing here."""

from collections.abc import Callable
from typing import Any

from attnlab.measure import Point

KIND = "prefill"


def test_prefill(
    point: Point, arm: str, measured: Callable[[Point, str], Any], replay: Callable[[Any], None], benchmark: Any
) -> None:
    benchmark.group = f"prefill ctx{point.context} b{point.batch} {point.short_dtype}"
    replay(measured(point, arm))
