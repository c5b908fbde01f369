"""Sizes and counts, read and written."""

from __future__ import annotations

import pytest

from server.units import counted, parse_size, size
from vllm_eigen.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GiB", 80 << 30),
        ("80 gib", 80 << 30),
        ("1.5MiB", 3 << 19),
        ("2GB", 2 * 10**9),
        ("512k", 512_000),
        ("67108864", 67108864),
    ],
)
def test_parse_size(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1XB", "1iB", "1 2", "nan", "1e9"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_written() -> None:
    assert [size(x) for x in (0, 1023, 1024, 4 << 30, 3 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "4.0 GiB", "3.0 TiB",
    ]  # fmt: skip
    assert [counted(x) for x in (0, 812, 999, 1000, 79_400, 131_072, 2_500_000)] == [
        "0", "812", "999", "1.0k", "79.4k", "131k", "2.5M",
    ]  # fmt: skip
