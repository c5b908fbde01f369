# SPDX-License-Identifier: Apache-2.0
"""vLLM's offline engine, for the evaluation and the benchmarks: token ids in, request outputs out.

vLLM is imported where an engine starts, so this module may be imported without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


class OfflineEngine:
    """A `vllm.LLM` in a process of its own. A context manager: leaving it ends that process.

    Args:
        model: folder to serve.
        options: passed on to `vllm.LLM`.
    """

    def __init__(self, model: Path, **options: Any) -> None:
        from vllm import LLM

        self.llm: Any = LLM(str(model), **options)

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def generate(self, prompts: Iterable[list[int]], **sampling: Any) -> list[Any]:
        """vLLM's `RequestOutput` of each prompt; `sampling` are fields of `SamplingParams`."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        found: list[Any] = self.llm.generate(inputs, SamplingParams(**sampling), use_tqdm=False)
        return found

    @property
    def dtype(self) -> str:
        """The type that the model computes in, as in `bfloat16`."""
        return str(self.llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")

    @property
    def in_flight(self) -> int:
        """Most tokens scheduled and not yet settled."""
        return int(self.llm.llm_engine.vllm_config.max_in_flight_tokens)

    @property
    def max_concurrency(self) -> float:
        """Sequences of the greatest length that the pool holds, by vLLM's own count."""
        return float(self.llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency)

    def counter(self, name: str) -> float:
        """One of vLLM's counters, summed over its labels; needs `disable_log_stats=False`."""
        return float(sum(item.value for item in self.llm.get_metrics() if item.name == name))

    def stop(self) -> None:
        """End the engine's processes, which vLLM leaves to the garbage collector."""
        self.llm.llm_engine.engine_core.shutdown()
