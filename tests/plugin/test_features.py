# SPDX-License-Identifier: Apache-2.0
"""What vLLM's users ask of a compressed model, of one engine: log-probabilities, samples, beams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugin.conftest import Models
from tests.plugin.harness.engine import (
    engine,
    expected_logits,
    prompts,
)
from vllm_eigen.calibration.model.compressed import load_reference

LIMIT = 1e-4


@pytest.fixture(scope="module")
def folder(models: Models) -> Path:
    return models("llama", "float32", 0.6)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    with engine(folder, enable_prefix_caching=True) as started:
        yield started


def _generate(llm: Any, prompt: list[int], **params: Any) -> Any:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    inputs = [TokensPrompt(prompt_token_ids=prompt)]
    return llm.generate(inputs, SamplingParams(**params), use_tqdm=False)[0]


@pytest.mark.feature("prompt log-probabilities")
def test_prompt_logprobs_are_the_reference_s(llm: Any, folder: Path) -> None:
    [prompt] = prompts([90], seed=10)
    result = _generate(llm, prompt, temperature=0, max_tokens=1, prompt_logprobs=0)
    logits = expected_logits(load_reference(folder), prompt[:1], prompt[1:])
    found = [
        row[token].logprob
        for row, token in zip(result.prompt_logprobs[1:], prompt[1:], strict=True)
    ]
    # Raw logits mode: vLLM reports the logit of each prompt token.
    expected = logits[: len(found)].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor(found), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.feature("several samples of one prompt")
def test_parallel_samples_share_the_prompt(llm: Any) -> None:
    [prompt] = prompts([60], seed=11)
    result = _generate(llm, prompt, n=4, temperature=1.0, seed=1, max_tokens=12, ignore_eos=True)
    texts = [tuple(output.token_ids) for output in result.outputs]
    assert len(texts) == 4
    assert len(set(texts)) > 1
    greedy = _generate(llm, prompt, n=2, temperature=1e-6, seed=1, max_tokens=12, ignore_eos=True)
    assert len({tuple(output.token_ids) for output in greedy.outputs}) == 1


@pytest.mark.feature("structured output")
def test_structured_output_is_valid(llm: Any) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    choice = StructuredOutputsParams(choice=["positive", "negative"])
    result = _generate(
        llm, prompts([20], seed=12)[0], temperature=0, max_tokens=16, structured_outputs=choice
    )
    assert result.outputs[0].text in ("positive", "negative")


@pytest.mark.feature("beam search")
def test_beam_search_finds_no_worse_than_greedy(llm: Any) -> None:
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import BeamSearchParams

    [prompt] = prompts([30], seed=13)
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    [result] = llm.beam_search([TokensPrompt(prompt_token_ids=prompt)], params)
    scores = [float(sequence.cum_logprob) for sequence in result.sequences]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
