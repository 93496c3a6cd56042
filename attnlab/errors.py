"""One exception for everything a user can mend, and the checks that raise it.

Every message says what was got, what was expected and what would be valid. The command line turns an ``InputError``
into one line on stderr and exit code 2; any other exception is a bug and keeps its traceback.
"""

import contextlib
import difflib
import math
from collections.abc import Iterable
from pathlib import Path

MAX_SIZE = 2**40
MAX_BYTES = 2**63 - 1


class InputError(ValueError):
    """Something the caller gave cannot be used; the message says what would be."""


def check_size(name: str, value: object, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer in [minimum, 2^40], else raise ``InputError``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    if not minimum <= value <= MAX_SIZE:
        raise InputError(f"{name} must be between {minimum} and 2^40, got {value}")
    return value


def check_bytes(name: str, value: int) -> int:
    """Return ``value`` if it fits a signed 64-bit count of bytes, else raise ``InputError``."""
    if value > MAX_BYTES:
        raise InputError(f"{name} comes to more than 2^63 bytes; give smaller sizes")
    return value


def check_positive(name: str, value: object) -> float:
    """Return ``value`` if it is a finite number above 0, else raise ``InputError``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise InputError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def check_choice(name: str, value: object, valid: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``valid``, else raise ``InputError`` with the nearest names."""
    valid = list(valid)
    if isinstance(value, str) and value in valid:
        return value
    near = difflib.get_close_matches(str(value).lower(), valid, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise InputError(f"unknown {name} {value!r}; {hint}valid: {', '.join(valid)}")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content``, entirely or not at all; raises ``InputError`` where that is not possible."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def divisors(n: int) -> list[int]:
    """All positive divisors of ``n``, ascending."""
    # in pairs: sizes go up to 2^40, and an error message that lists them must not hang
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]
