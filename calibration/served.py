"""Quality of an Eigen checkpoint against its base as vLLM serves them, one after the other.

Both engines are vLLM's own offline API, with the plugin loaded; they read the same token windows
and give back log-probabilities of the prompt. The base model's are kept until the checkpoint's are
there.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibration.metrics import Comparison, Quality, divergence
from calibration.progress import Reporter
from calibration.scoring import Scored, Scorer
from calibration.stream import allocate
from vllm_eigen.errors import EngineError
from vllm_eigen.vllm_version import check_vllm_version

WHOLE_ENTRIES = 1 << 23
"""Log-probabilities of one window up to which KL is measured: vLLM hands them over as Python
numbers, about 100 bytes each."""
KEEP_BYTES = 4 << 30
"""Distributions of the base model kept in memory; more are memory-mapped."""
_POOL_BYTES = 64 << 20
_REQUESTS = 16
"""Sequences handed to the engine at once."""


@dataclass(frozen=True)
class Positions:
    """What an engine says about the positions of a sequence, [length - 1] each.

    Attributes:
        likelihoods: log-probability of the token that follows, in nats.
        best: the likeliest token.
        whole: log-probabilities of the whole vocabulary, [length - 1, vocab_size], if asked for.
    """

    likelihoods: torch.Tensor
    best: torch.Tensor
    whole: torch.Tensor | None


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
        check_vllm_version()
        # Engine processes inherit these. Standard output is for results.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
        # A progress bar's thread is running: a forked process might wait for its locks for ever.
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        from vllm import LLM

        try:
            self._llm: Any = LLM(
                str(model),
                max_model_len=length + 1,  # vLLM always makes room for one more token
                kv_cache_dtype=kv_cache_dtype,
                kv_cache_memory_bytes=max(_POOL_BYTES, 8 * length * token_bytes),
                max_num_seqs=_REQUESTS,
                enforce_eager=True,
                use_tqdm_on_load=False,
                max_logprobs=-1,
                seed=0,
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise EngineError(f"vLLM cannot serve {model}: {reason}") from error

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        from vllm_eigen.vllm_internals import stop_engine

        stop_engine(self._llm)
        del self._llm
        gc.collect()

    def positions(
        self, sequences: Iterable[list[int]], vocab_size: int | None = None
    ) -> Iterator[Positions]:
        """What the model says about each sequence; with `vocab_size`, of the whole vocabulary."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=1 if vocab_size is None else -1,
            flat_logprobs=True,
            detokenize=False,
        )
        for group in _groups(sequences, _REQUESTS if vocab_size is None else 1):
            prompts = [TokensPrompt(prompt_token_ids=list(item)) for item in group]
            try:
                answers = self._llm.generate(prompts, params, use_tqdm=False)
            except Exception as error:
                raise EngineError(f"vLLM failed: {error}") from error
            for answer in answers:
                yield _positions(answer.prompt_logprobs, vocab_size)

    def scorer(self) -> Scorer:
        """The engine as tasks want a model."""

        def score(sequences: Iterable[list[int]]) -> Iterator[Scored]:
            for group in _groups(sequences, _REQUESTS):
                for sequence, found in zip(group, self.positions(group), strict=True):
                    greedy = found.best == torch.tensor(sequence[1:])
                    yield Scored(found.likelihoods, greedy)

        return score


def _groups(items: Iterable[list[int]], size: int) -> Iterator[list[list[int]]]:
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def _positions(flat: Any, vocab_size: int | None) -> Positions:
    """Read vLLM's `FlatLogprobs`: at each position the token that follows, then the likeliest."""
    starts = np.array(flat.start_indices[1:])
    tokens, values = np.array(flat.token_ids), np.array(flat.logprobs, dtype=np.float32)
    whole = None
    if vocab_size is not None:
        whole = torch.full((len(starts), vocab_size), -math.inf)
        places = torch.from_numpy(tokens).view(len(starts), -1)
        whole.scatter_(1, places, torch.from_numpy(values).view(len(starts), -1))
    return Positions(torch.from_numpy(values[starts]), torch.from_numpy(tokens[starts + 1]), whole)


class BaseRecord:
    """The base model's side of a comparison, until the checkpoint is measured.

    Args:
        tokens: the windows, [num_windows, length].
        vocab_size: to keep whole distributions; None leaves KL unknown.

    Raises:
        OutputError: the disk is too small for the distributions.
    """

    def __init__(
        self, engine: Engine, tokens: torch.Tensor, vocab_size: int | None, reporter: Reporter
    ) -> None:
        self._tokens, self._vocab_size = tokens, vocab_size
        count, length = tokens.shape
        self._likelihoods = torch.empty(count, length - 1)
        self._best = torch.empty(count, length - 1, dtype=torch.int64)
        self._whole: torch.Tensor | None = None
        if vocab_size is not None:
            self._whole = allocate((count, length - 1, vocab_size), KEEP_BYTES)
        for row, found in enumerate(engine.positions(tokens.tolist(), vocab_size)):
            self._likelihoods[row], self._best[row] = found.likelihoods, found.best
            if self._whole is not None and found.whole is not None:
                self._whole[row] = found.whole
            reporter.step()

    def compare(self, engine: Engine, reporter: Reporter) -> Quality:
        """Quality of the model that `engine` serves, on the same windows."""
        comparison = Comparison()
        rows = engine.positions(self._tokens.tolist(), self._vocab_size)
        for row, found in enumerate(rows):
            kl = math.nan
            if self._whole is not None and found.whole is not None:
                kl = divergence(self._whole[row], found.whole)
            agree = self._best[row] == found.best
            comparison.add_scores(self._likelihoods[row], found.likelihoods, agree, kl)
            reporter.step()
        return comparison.result()
