# SPDX-License-Identifier: Apache-2.0
"""Byte sizes and counts as text: parsed from the command line, formatted for people."""

from __future__ import annotations

import re

from pydantic import ByteSize, TypeAdapter

from vllm_eigen.common.errors import UsageError

_BYTES = TypeAdapter(ByteSize)
_LETTERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgtKMGT])|([kmgt]ib?|[kmgt]?b)?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as `80GiB`, `512 MB`, `4G` or `67108864`.

    One letter means what it means to vLLM: `4G` is 4 GiB, `4g` is 4 GB. The rest is pydantic's;
    `4Gi` is taken as well, as Kubernetes writes it.

    Raises:
        UsageError: the text is no size, or is zero.
    """
    text = text.strip()
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{text!r} is no size; write for example 80GiB, 512MB, 4G (4GiB) or 67108864"
        )
    if letter := match[2]:
        base = 1024 if letter.isupper() else 1000
        size = int(float(match[1]) * base ** _LETTERS[letter.lower()])
    else:
        size = int(_BYTES.validate_python(text + "b" * text.lower().endswith("i")))
    if size <= 0:
        raise UsageError(f"{text!r} is no size above zero")
    return size


def format_bytes(number: float) -> str:
    """Bytes in a binary unit, e.g. `4.0 GiB`."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_count(number: float) -> str:
    """A count with three significant digits and k, M or G, e.g. `131k`, `79.4k`, `812`."""
    value = float(number)
    for unit in ("", "k", "M"):
        if abs(value) < 999.5:
            return f"{value:.0f}{unit}" if not unit or abs(value) >= 99.95 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}G"
