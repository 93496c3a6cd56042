"""What pytest must know before it looks for tests: where ``--benchmark-only`` looks, and the bench suites' options.

They stand here and not in bench/ because pytest reads options before it collects a folder. Without pytest-benchmark a
plain ``pytest`` works all the same, and ``--benchmark-only`` is an unknown option.
"""

import argparse

import pytest

DTYPES = ("float32", "bfloat16", "float16")


def _dtypes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in DTYPES]:
        raise argparse.ArgumentTypeError(
            f"unknown dtype {unknown[0]!r}; valid, with commas between: {', '.join(DTYPES)}"
        )
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attnlab", "bench suites of attnlab")
    group.addoption(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA where there is one"
    )
    group.addoption(
        "--dtype", type=_dtypes, default="float32,bfloat16", metavar="NAMES", help="default: float32,bfloat16"
    )
    group.addoption("--grid", choices=("quick", "full"), default="quick", help="points to measure; default: quick")
    group.addoption("--heads", type=_positive, default=32, metavar="H", help="query heads; default: 32")


def pytest_configure(config: pytest.Config) -> None:
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if config.getoption("benchmark_only", False) and not named:
        config.args = [str(config.rootpath / "bench")]
