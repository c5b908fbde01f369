"""What vLLM's users run, on a compressed model: quantized cache, sampling, adapters, two ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.unfold import load_reference
from tests.engine.conftest import Models
from tests.engine.harness import (
    POOL_BYTES,
    ask,
    cached_elements,
    calibrate,
    engine,
    expected_logits,
    prompts,
    relative_error,
)
from vllm_eigen.checkpoint import serving_overrides

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


def test_parallel_samples_share_the_prompt(llm: Any) -> None:
    [prompt] = prompts([60], seed=11)
    result = _generate(llm, prompt, n=4, temperature=1.0, seed=1, max_tokens=12, ignore_eos=True)
    texts = [tuple(output.token_ids) for output in result.outputs]
    assert len(texts) == 4
    assert len(set(texts)) > 1
    greedy = _generate(llm, prompt, n=2, temperature=1e-6, seed=1, max_tokens=12, ignore_eos=True)
    assert len({tuple(output.token_ids) for output in greedy.outputs}) == 1


def test_structured_output_is_valid(llm: Any) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    choice = StructuredOutputsParams(choice=["positive", "negative"])
    result = _generate(
        llm, prompts([20], seed=12)[0], temperature=0, max_tokens=16, structured_outputs=choice
    )
    assert result.outputs[0].text in ("positive", "negative")


def test_beam_search_finds_no_worse_than_greedy(llm: Any) -> None:
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import BeamSearchParams

    [prompt] = prompts([30], seed=13)
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    [result] = llm.beam_search([TokensPrompt(prompt_token_ids=prompt)], params)
    scores = [float(sequence.cum_logprob) for sequence in result.sequences]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_fp8_cache_halves_the_bytes_again(models: Models) -> None:
    folder = models("llama", "bfloat16", 0.6)
    base = 2 * POOL_BYTES / (4 * cached_elements(models("llama", "bfloat16", 1.0)))
    asked = prompts([200, 400], seed=14)
    with engine(folder, "bfloat16") as llm:
        plain = ask(llm, asked, 1, logits=True)
    with engine(folder, "bfloat16", kv_cache_dtype="fp8") as llm:
        quantized = ask(llm, asked, 1, logits=True)
        config = llm.llm_engine.vllm_config.cache_config
        tokens = config.num_gpu_blocks * config.block_size
    assert tokens >= 3.3 * base * 0.98
    p, q = (torch.cat([a.logits for a in side]).log_softmax(-1) for side in (plain, quantized))
    divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert 0 < float(divergence) < 0.05


def test_two_ranks_give_the_same_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = load_reference(folder)
    asked = prompts([5, 130], seed=15)
    with engine(folder, tensor_parallel_size=2) as llm:
        answers = ask(llm, asked, 4, logits=True)
    for prompt, answer in zip(asked, answers, strict=True):
        assert relative_error(answer.logits, expected_logits(model, prompt, answer.tokens)) < LIMIT


def test_speculative_decoding_changes_no_token(folder: Path, llm: Any) -> None:
    [prompt] = prompts([40], seed=16)
    asked = [prompt * 4]
    expected = ask(llm, asked, 24, logits=False)
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with engine(folder, speculative_config=speculative) as drafted:
        found = ask(drafted, asked, 24, logits=False)
    assert found[0].tokens == expected[0].tokens


def test_bases_over_the_untouched_base_model(
    models: Models, text: Path, folder: Path, tmp_path: Path
) -> None:
    base = models("llama", "float32", 0)
    bases = calibrate(base, tmp_path / "bases", text, 0.6, "--bases-only")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    model = load_reference(folder)
    asked = prompts([9, 210], seed=17)
    with engine(base, hf_overrides=serving_overrides(bases, config)) as llm:
        answers = ask(llm, asked, 4, logits=True)
    for prompt, answer in zip(asked, answers, strict=True):
        assert relative_error(answer.logits, expected_logits(model, prompt, answer.tokens)) < LIMIT


def test_adapters_on_a_folded_checkpoint_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["eigen"].get("projections", "folded") == "folded"
    with pytest.raises(Exception, match="initialization failed"), engine(folder, enable_lora=True):
        raise AssertionError("the engine must not start")
