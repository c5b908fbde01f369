# SPDX-License-Identifier: Apache-2.0
"""What an engine with small blocks, chunks and pool is pushed through, each logit compared.

`limits` are those of `harness.engine.check`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tests.plugin.harness.engine import ask, check, engine, metric
from tests.plugin.harness.rows import MAX_MODEL_LEN, Served
from tests.plugin.harness.two_ranks import word_prompts
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.checkpoint.config import read_config
from vllm_eigen.checkpoint.pages import MixedCache

CHUNK = 48
BLOCK = 16
BLOCKS = 40


@contextlib.contextmanager
def small_engine(served: Served, blocks: int = BLOCKS) -> Iterator[tuple[Any, Any]]:
    """An engine with little room, and its reference in transformers.

    Args:
        blocks: of the pool, so few that `preemption` overflows it.
    """
    settings = {
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_memory_bytes": blocks * block_bytes(served),
        "block_size": BLOCK,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": 8,
        "enable_prefix_caching": True,
        **served.options,
    }
    with engine(served.model, **settings) as llm:
        yield llm, load_reference(served.eigen)


def block_bytes(served: Served) -> int:
    """Bytes of a block of the small engine's pool."""
    config, eigen = read_config(served.eigen)
    if not eigen.kept_layers:
        return BLOCK * eigen.bytes_per_token(4)
    mixed = MixedCache(
        compressed_layers=len(eigen.layers),
        kept_layers=len(eigen.kept_layers),
        kept_bytes=4 * 2 * eigen.num_kv_heads * eigen.head_size,
        window=config["sliding_window"],
        in_flight=CHUNK,
        max_model_len=MAX_MODEL_LEN,
    )
    largest = max(layer.num_bytes(4) for layer in eigen.layers)
    pages = mixed.pages(served.options["block_size"], eigen.num_latent_heads * largest)
    return pages.block_bytes


def prefill(llm: Any, model: Any, **limits: float) -> None:
    """Prompts that one step holds."""
    asked = word_prompts([1, 2, 15, 16, 17, CHUNK - 1], seed=2)
    answers = [ask(llm, [prompt], 1, logits=True)[0] for prompt in asked]
    check(model, asked, answers, **limits)


def chunked_prefill(llm: Any, model: Any, **limits: float) -> None:
    """Prompts of several steps."""
    asked = word_prompts([CHUNK + 1, 3 * CHUNK, 250, 5], seed=3)
    check(model, asked, ask(llm, asked, 2, logits=True), **limits)


def decode(llm: Any, model: Any, **limits: float) -> None:
    """Token by token."""
    asked = word_prompts([1, 33, 47], seed=4)
    check(model, asked, ask(llm, asked, 20, logits=True), **limits)


def prefix_hit(llm: Any, model: Any, **limits: float) -> None:
    """Prompts whose beginning is cached."""
    # Of mixed models hits are multiples of the block sizes of both kinds of layers.
    unit = llm.llm_engine.engine_core.engine_core.scheduler.block_size
    shared = max(160, unit + 10)
    [prompt] = word_prompts([shared + 40], seed=5)
    ask(llm, [prompt], 1, logits=False)
    asked = [prompt, [*prompt[:shared], *word_prompts([25], seed=6)[0]]]
    answers = ask(llm, asked, 4, logits=True)
    assert answers[0].cached == (shared + 39) // unit * unit > 0
    windowed = llm.llm_engine.model_config.get_sliding_window()
    found = answers[1].cached
    assert found == shared // unit * unit or windowed, "blocks behind a window may be gone"
    check(model, asked, answers, **limits)


def preemption(llm: Any, model: Any, **limits: float) -> None:
    """More sequences than the pool holds."""
    asked = word_prompts([120] * 6, seed=7)
    before = metric(llm, "vllm:num_preemptions")
    answers = ask(llm, asked, 40, logits=True)
    assert metric(llm, "vllm:num_preemptions") > before, "the pool was meant to overflow"
    check(model, asked, answers, **limits)
