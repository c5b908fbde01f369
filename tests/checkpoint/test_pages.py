# SPDX-License-Identifier: Apache-2.0
"""Pages of mixed models: fewer bytes never cost capacity, and nothing costs more than the base."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.checkpoint.pages import MixedCache

caches = st.builds(
    MixedCache,
    compressed_layers=st.integers(1, 12),
    kept_layers=st.integers(1, 60),
    kept_bytes=st.sampled_from([64, 512, 1024, 2048, 4096]),
    window=st.integers(1, 4096),
    in_flight=st.integers(16, 8192),
    max_model_len=st.integers(1, 131072),
)
block_sizes = st.sampled_from([16, 32, 48, 64, 128, 256])


@settings(deadline=None)
@given(cache=caches, block_size=block_sizes, share=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_fewer_bytes_never_take_more(
    cache: MixedCache, block_size: int, share: tuple[float, float]
) -> None:
    less, more = sorted(max(1, round(cache.kept_bytes * part)) for part in share)
    small, large = (cache.pages(block_size, size) for size in (less, more))
    assert small.sequence_bytes <= large.sequence_bytes
    assert large.sequence_bytes <= cache.base_pages(block_size).sequence_bytes


@settings(deadline=None)
@given(cache=caches, block_size=block_sizes, share=st.floats(0, 1))
def test_pages_hold_their_tokens(cache: MixedCache, block_size: int, share: float) -> None:
    size = max(1, round(cache.kept_bytes * share))
    pages = cache.pages(block_size, size)
    assert pages.block_size % 16 == 0
    assert pages.block_size * size <= pages.page_bytes
    assert pages.kept_block_size * cache.kept_bytes == pages.page_bytes
    assert pages.kept_block_size % block_size == 0
    # Prefix hits are multiples of both; blocks of 48 tokens have no quarters of 16.
    most = 4 if block_size != 48 else 6
    assert math.lcm(pages.block_size, pages.kept_block_size) <= most * pages.block_size


def test_a_quarter_of_the_bytes_takes_four_times_the_tokens() -> None:
    cache = MixedCache(
        compressed_layers=3,
        kept_layers=15,
        kept_bytes=1024,
        window=512,
        in_flight=2048,
        max_model_len=32768,
    )
    pages = cache.pages(128, 256)
    assert (pages.block_size, pages.page_bytes) == (512, 128 * 1024)
    # One group with full attention, five with windows of (511 + 2048) / 128 blocks and one more.
    assert pages.sequence_blocks == 32768 // 512 + 5 * (20 + 1)
    assert cache.base_pages(128).sequence_blocks == 32768 // 128 + 5 * (20 + 1)


def test_more_bytes_than_the_base_are_refused() -> None:
    cache = MixedCache(1, 1, 64, 8, 8, 64)
    with pytest.raises(ValueError, match="65"):
        cache.pages(16, 65)
