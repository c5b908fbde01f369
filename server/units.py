"""Sizes and counts as people write and read them."""

from __future__ import annotations

import re

from vllm_eigen.errors import UsageError

_POWERS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as `80GiB`, `512 MB`, `1.5g` or `67108864`.

    Raises:
        UsageError: the text is no size, or is zero.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise UsageError(f"{text!r} is no size; write for example 80GiB, 512MB or 67108864")
    unit = _POWERS[match[2].lower()]
    if match[3]:
        unit = 1 << (10 * list(_POWERS).index(match[2].lower()))
    found = int(float(match[1]) * unit)
    if found <= 0:
        raise UsageError(f"{text!r} is no size above zero")
    return found


def size(number: float) -> str:
    """Bytes with a binary unit, e.g. `4.0 GiB`."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def counted(number: float) -> str:
    """A count in at most four characters of digits, e.g. `131k`, `79.4k`, `812`."""
    value = float(number)
    for unit in ("", "k", "M"):
        if abs(value) < 999.5:
            return f"{value:.0f}{unit}" if not unit or abs(value) >= 99.95 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}G"
