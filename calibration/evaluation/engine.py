# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine as the evaluation uses it: log-probabilities of prompts.

vLLM itself is reached through `plugin.offline_engine`.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_eigen.calibration.evaluation.scoring import TokenLogprobs
from vllm_eigen.common.errors import EngineError, first_line
from vllm_eigen.plugin.offline_engine import OfflineEngine
from vllm_eigen.plugin.vllm_version import check_vllm_version

_CACHE_BYTES = 64 << 20
"""KV cache of an engine, at least."""
_REQUESTS = 16
"""Sequences handed to the engine at once."""
_ENVIRONMENT = {
    # Standard output is for results.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    # The progress bar has a thread: a forked process might wait for its locks forever.
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
}
"""What the engine's processes inherit, unless the user has set it."""


def start_engine(model: Path, **options: Any) -> OfflineEngine:
    """Start vLLM in a process of its own, with nothing on standard output.

    Args:
        model: folder to serve.
        options: of `vllm.LLM`.

    Raises:
        EngineError: vLLM is missing, of another version, or does not start.
    """
    check_vllm_version()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return OfflineEngine(model, **options)
    except Exception as error:
        raise EngineError(f"vLLM cannot serve {model}: {first_line(error, 300)}") from error


class Engine:
    """A vLLM engine. A context manager: leaving it gives the memory back.

    Args:
        model: folder to serve.
        length: most tokens of a sequence.
        token_bytes: KV-cache bytes of a token, at most.
        kv_cache_dtype: as vLLM's option.

    Raises:
        EngineError: vLLM is missing, of another version, or does not start.
    """

    def __init__(
        self, model: Path, *, length: int, token_bytes: int, kv_cache_dtype: str = "auto"
    ) -> None:
        self._engine = start_engine(
            model,
            max_model_len=length + 1,  # vLLM always makes room for one more token
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory_bytes=max(_CACHE_BYTES, 8 * length * token_bytes),
            max_num_seqs=_REQUESTS,
            enforce_eager=True,
            use_tqdm_on_load=False,
            max_logprobs=-1,
            seed=0,
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()
        del self._engine
        gc.collect()

    def logprobs(
        self, sequences: Iterable[list[int]], vocab_size: int | None = None
    ) -> Iterator[TokenLogprobs]:
        """The model's predictions of each sequence, in their order.

        Args:
            vocab_size: to have those of the whole vocabulary too.
        """
        remaining = iter(sequences)
        while group := list(islice(remaining, _REQUESTS if vocab_size is None else 1)):
            try:
                outputs = self._engine.generate(
                    group,
                    max_tokens=1,
                    temperature=0,
                    prompt_logprobs=1 if vocab_size is None else -1,
                    flat_logprobs=True,
                    detokenize=False,
                )
            except Exception as error:
                raise EngineError(f"vLLM failed: {error}") from error
            for output in outputs:
                yield read_logprobs(output.prompt_logprobs, vocab_size)


def read_logprobs(flat: Any, vocab_size: int | None) -> TokenLogprobs:
    """Read vLLM's `FlatLogprobs`: at each position the prompt's token, then tokens by rank."""
    starts = np.array(flat.start_indices[1:])
    tokens, values = np.array(flat.token_ids), np.array(flat.logprobs, dtype=np.float32)
    vocab_logprobs = None
    if vocab_size is not None:
        vocab_logprobs = torch.full((len(starts), vocab_size), -math.inf)
        places = torch.from_numpy(tokens).view(len(starts), -1)
        vocab_logprobs.scatter_(1, places, torch.from_numpy(values).view(len(starts), -1))
    return TokenLogprobs(
        torch.from_numpy(tokens[starts]),
        torch.from_numpy(values[starts]),
        torch.from_numpy(tokens[starts + 1]),
        vocab_logprobs,
    )
