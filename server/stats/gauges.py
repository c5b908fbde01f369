# SPDX-License-Identifier: Apache-2.0
"""Prometheus gauges `vllm_eigen:*`, beside vLLM's own metrics on `/metrics`.

Every API process sets the same values from the same shared metrics once a second, so the mode
`mostrecent` yields one sample of each, whichever process is scraped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_eigen.server.stats.schemas import KVCache

if TYPE_CHECKING:
    from prometheus_client import Gauge

GAUGES: tuple[tuple[str, str, Callable[[KVCache], float]], ...] = (
    ("pool_bytes", "Bytes of the KV-cache pool.", lambda c: c.pool_bytes),
    ("bytes_per_token", "KV-cache bytes per token, all layers.", lambda c: c.bytes_per_token),
    (
        "uncompressed_bytes_per_token",
        "KV-cache bytes per token of the uncompressed model.",
        lambda c: c.uncompressed_bytes_per_token,
    ),
    ("kv_ratio", "KV-cache bytes relative to the uncompressed model.", lambda c: c.kv_ratio),
    (
        "compressed_layers_kv_ratio",
        "The same of the compressed layers alone.",
        lambda c: c.compressed_layers.kv_ratio,
    ),
    ("capacity_tokens", "Tokens the pool holds.", lambda c: c.tokens.capacity),
    (
        "uncompressed_capacity_tokens",
        "Tokens the same pool would hold uncompressed.",
        lambda c: c.uncompressed.tokens_capacity,
    ),
    ("used_tokens", "Tokens in used blocks.", lambda c: c.tokens.used),
    ("used_bytes", "Bytes of used blocks.", lambda c: c.used_bytes),
    (
        "uncompressed_used_bytes",
        "Bytes the tokens in use would need uncompressed.",
        lambda c: c.uncompressed.used_bytes,
    ),
    ("saved_bytes", "Bytes saved on the tokens in use.", lambda c: c.saved_bytes),
    (
        "possible_sequences",
        "Sequences of full length the pool holds.",
        lambda c: c.concurrency.possible,
    ),
    (
        "uncompressed_possible_sequences",
        "Sequences of full length the same pool would hold uncompressed.",
        lambda c: c.concurrency.possible_uncompressed,
    ),
)


class Gauges:
    """The gauges of one served model.

    Args:
        model_name: value of the label `model_name`, as on vLLM's own metrics.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._layers_published = False

    def publish(self, cache: KVCache) -> None:
        """Set every gauge; those of the layers once, because they never change."""
        for name, help_text, value in GAUGES:
            _gauge(name, help_text).labels(model_name=self._model_name).set(value(cache))
        if self._layers_published:
            return
        self._layers_published = True
        ranks = _gauge("layer_rank", "Cached elements per head and token.", "layer", "part")
        bits = _gauge("layer_bits", "Mean bits of a cached element.", "layer", "part")
        sizes = _gauge("layer_bytes_per_token", "KV-cache bytes per token of the layer.", "layer")
        for layer in cache.layers:
            label = {"model_name": self._model_name, "layer": layer.layer}
            ranks.labels(**label, part="key").set(layer.rank_k)
            ranks.labels(**label, part="value").set(layer.rank_v)
            bits.labels(**label, part="key").set(layer.bits_k)
            bits.labels(**label, part="value").set(layer.bits_v)
            sizes.labels(**label).set(layer.bytes_per_token)


@functools.cache
def _gauge(name: str, help_text: str, *labels: str) -> Gauge:
    """The process's gauge of that name; the registry refuses a second one."""
    from prometheus_client import Gauge

    return Gauge(
        f"vllm_eigen:{name}", help_text, ("model_name", *labels), multiprocess_mode="mostrecent"
    )
