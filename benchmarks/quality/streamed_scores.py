# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice questions asked of models that are streamed layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_eigen.calibration.evaluation.questions import answers, read_questions
from vllm_eigen.calibration.evaluation.scoring import Continuation, Score, Scorer, score_of
from vllm_eigen.calibration.model.activations import ActivationStream, after_layers
from vllm_eigen.calibration.model.hooks import LayerCache
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.truncated import TruncatedModel

Run = Callable[[torch.Tensor], ActivationStream]
"""Hidden states of tokens [num_windows, length] after the last layer."""
GROUP = 256
"""Sequences of about one length that are padded to the longest."""


class ZeroShot:
    """The same questions for a base model and what is made of it.

    Args:
        paths: jsonl files (`calibration.evaluation.questions`).
        limit: most questions a file.

    Raises:
        InputError: a file cannot be read.
    """

    def __init__(
        self, model: LayerwiseModel, tokenizer: Any, paths: Sequence[Path], limit: int | None
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._questions = [item for path in paths for item in read_questions(path, limit)]
        self.base = self._right(lambda tokens: after_layers(model, tokens))
        """Which questions the base model answers correctly."""

    def right(self, compressed: TruncatedModel, cache: LayerCache | None = None) -> list[bool]:
        """Which questions a compressed model answers correctly, by log-likelihood."""
        return self._right(lambda tokens: compressed.run(tokens, cache=cache))

    def _right(self, run: Run) -> list[bool]:
        scorer = streamed_scorer(self._model, run)
        length = self._model.source.max_positions
        found = answers(scorer, self._tokenizer, self._questions, length=length)
        return [answer.right for answer in found]


def streamed_scorer(model: LayerwiseModel, run: Run) -> Scorer:
    """Scores with hidden states from `run`; sequences of about one length go through together.

    They are padded on the right, where causal attention does not look.
    """

    def score(asked: Iterable[Continuation]) -> Iterator[Score]:
        items = list(asked)
        scores: dict[int, Score] = {}
        order = sorted(range(len(items)), key=lambda index: len(items[index].tokens))
        for start in range(0, len(order), GROUP):
            group = order[start : start + GROUP]
            width = len(items[group[-1]].tokens)
            padded = [items[i].tokens + [0] * (width - len(items[i].tokens)) for i in group]
            stream = run(torch.tensor(padded))
            for row, index in enumerate(group):
                item = items[index]
                predicting = stream.hidden[row, item.start - 1 : len(item.tokens) - 1]
                with torch.inference_mode():
                    logits = model.token_logits(predicting.to(model.device))
                scores[index] = score_of(item, logits)
        yield from (scores[index] for index in range(len(items)))

    return score
