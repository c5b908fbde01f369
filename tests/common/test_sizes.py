# SPDX-License-Identifier: Apache-2.0
"""Sizes and counts, read and written."""

from __future__ import annotations

import pytest

from vllm_eigen.common.errors import UsageError
from vllm_eigen.common.sizes import format_bytes, format_count, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GiB", 80 << 30),
        ("80 gib", 80 << 30),
        ("1.5MiB", 3 << 19),
        ("2GB", 2 * 10**9),
        ("512k", 512_000),
        ("512K", 512 << 10),
        ("4G", 4 << 30),
        ("4g", 4 * 10**9),
        ("4GB", 4 * 10**9),
        ("4gib", 4 << 30),
        ("4Gi", 4 << 30),
        ("1.5G", 3 << 29),
        ("67108864", 67108864),
    ],
)
def test_parse_size(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1XB", "1iB", "1 2", "nan", "1e9"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_formats() -> None:
    assert [format_bytes(x) for x in (0, 1023, 1024, 4 << 30, 3 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "4.0 GiB", "3.0 TiB",
    ]  # fmt: skip
    assert [format_count(x) for x in (0, 812, 999, 1000, 79_400, 131_072, 2_500_000)] == [
        "0", "812", "999", "1.0k", "79.4k", "131k", "2.5M",
    ]  # fmt: skip
