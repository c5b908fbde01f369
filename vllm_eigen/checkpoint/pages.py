# SPDX-License-Identifier: Apache-2.0
"""Cache pages of a model that mixes compressed layers with sliding-window layers that are kept.

vLLM gives all layers of such a model pages of one size, whatever they hold, and puts them into
groups of equally many layers (`vllm.v1.core.kv_cache_utils`); a block is one page of each layer of
a group. A page that holds fewer bytes than the others is padded, and saves nothing. So a compressed
layer takes as many tokens into its page as fit there.
"""

from __future__ import annotations

from dataclasses import dataclass

TOKEN_MULTIPLE = 16
"""Tokens of a page are a multiple of it."""
_SHARES = 4
"""Tokens of a compressed page are a multiple of this share of a kept page's. vLLM's prefix cache
finds multiples of the least common multiple of both, which finer shares would make large."""
_LARGEST = 128
"""Most tokens that a kept page is enlarged to."""


@dataclass(frozen=True)
class Pages:
    """How the cache of a mixed model is cut.

    Attributes:
        block_size, kept_block_size: tokens of a page of compressed and of kept layers.
        page_bytes: of every page.
        block_bytes: of a page of each layer of a group: what the pool is divided into.
        sequence_blocks: blocks of a sequence of the greatest length.
    """

    block_size: int
    kept_block_size: int
    page_bytes: int
    block_bytes: int
    sequence_blocks: int

    @property
    def sequence_bytes(self) -> int:
        """Bytes of a sequence of the greatest length."""
        return self.sequence_blocks * self.block_bytes


@dataclass(frozen=True)
class MixedCache:
    """What the pages of a mixed model depend on, besides block size and compression.

    Attributes:
        compressed_layers, kept_layers: how many there are, at least one of each.
        kept_bytes: of a kept layer and token.
        window: tokens that kept layers attend to.
        in_flight: most tokens scheduled and not yet settled (vLLM's `max_in_flight_tokens`); blocks
            behind the window are freed after them.
        max_model_len: tokens of the longest sequence.
    """

    compressed_layers: int
    kept_layers: int
    kept_bytes: int
    window: int
    in_flight: int
    max_model_len: int

    def pages(self, block_size: int, compressed_bytes: int) -> Pages:
        """The pages in which a sequence of the greatest length takes the fewest bytes.

        Fewer compressed bytes never take more: that holds for each size of a kept page, and so for
        the best of them. Kept pages of `block_size` tokens are among them, so that a sequence never
        takes more than that of the base model.

        Args:
            block_size: vLLM's `--block-size`, a multiple of 16.
            compressed_bytes: of a token in the largest of the compressed layers.

        Raises:
            ValueError: compressed layers take more bytes than kept ones.
        """
        if not 0 < compressed_bytes <= self.kept_bytes:
            raise ValueError(f"{compressed_bytes} bytes do not fit those kept, {self.kept_bytes}")
        sizes = [block_size]
        while 2 * sizes[-1] <= _LARGEST:
            sizes.append(2 * sizes[-1])
        found = (self._pages(size, compressed_bytes) for size in sizes)
        return min(found, key=lambda pages: pages.sequence_bytes)

    def base_pages(self, block_size: int) -> Pages:
        """Those of the base model."""
        return self._pages(block_size, self.kept_bytes)

    def _pages(self, kept_tokens: int, compressed_bytes: int) -> Pages:
        step = max(1, kept_tokens // _SHARES // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
        page = kept_tokens * self.kept_bytes
        tokens = max(kept_tokens, page // compressed_bytes // step * step)
        group = self._group_size()
        held = min(self.window - 1 + self.in_flight, self.max_model_len)
        blocks = -(-self.compressed_layers // group) * -(-self.max_model_len // tokens)
        # One more: a window need not begin where a block does.
        blocks += -(-self.kept_layers // group) * (-(-held // kept_tokens) + 1)
        return Pages(tokens, kept_tokens, page, group * page, blocks)

    def _group_size(self) -> int:
        """Layers of a group in vLLM's planner."""
        least, most = sorted((self.compressed_layers, self.kept_layers))
        return most if most < 1.5 * least else least
