"""One decode step's attention (T = 1) at a fixed context, every implementation: what sharing heads saves in time."""

from collections.abc import Callable
from typing import Any

from attnlab.measure import Point

KIND = "decode"


def test_decode(
    point: Point, arm: str, measured: Callable[[Point, str], Any], replay: Callable[[Any], None], benchmark: Any
) -> None:
    benchmark.group = f"decode ctx{point.context} b{point.batch} {point.short_dtype}"
    replay(measured(point, arm))
