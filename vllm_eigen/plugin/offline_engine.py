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

    def stop(self) -> None:
        """End the engine's processes, which vLLM leaves to the garbage collector."""
        self.llm.llm_engine.engine_core.shutdown()
