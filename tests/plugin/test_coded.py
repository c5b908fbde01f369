# SPDX-License-Identifier: Apache-2.0
"""Coded latents through the engine: the matrix of `test_matrix.py` with codes and offsets.

The reference rounds latents as `kernels.coding` defines it; the pool holds what the bytes say.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.plugin.conftest import Rows
from tests.plugin.harness import scenarios
from tests.plugin.harness.engine import (
    POOL_BYTES,
    ask,
    check,
    engine,
    expected_logits,
    metric,
    triton_works,
)
from tests.plugin.harness.rows import (
    CODED_LIMITS,
    CODED_ROWS,
    MACHINE_LIMITS,
    MACHINE_ROWS,
    MAX_MODEL_LEN,
    CodedRow,
)
from tests.plugin.harness.two_ranks import word_prompts
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.checkpoint.config import read_config
from vllm_eigen.checkpoint.estimate import estimate
from vllm_eigen.checkpoint.validate import validate
from vllm_eigen.common.errors import UsageError
from vllm_eigen.server.stats.layout import Windows, layout_of_workers

[LLAMA] = [row for row in CODED_ROWS if str(row) == "llama-pre-rope-coded"]
[GEMMA] = [row for row in CODED_ROWS if str(row) == "gemma3_text-pre-rope-coded"]


@pytest.fixture(scope="module", params=CODED_ROWS, ids=str)
def pair(request: pytest.FixtureRequest, served: Rows) -> Iterator[tuple[Any, Any]]:
    """A row's engine with little room, and its reference."""
    with scenarios.small_engine(served(request.param)) as found:
        yield found


def test_coded_prefill(pair: tuple[Any, Any]) -> None:
    scenarios.prefill(*pair, **CODED_LIMITS)


def test_coded_chunked_prefill(pair: tuple[Any, Any]) -> None:
    scenarios.chunked_prefill(*pair, **CODED_LIMITS)


def test_coded_decode(pair: tuple[Any, Any]) -> None:
    scenarios.decode(*pair, **CODED_LIMITS)


def test_coded_prefix_hit(pair: tuple[Any, Any]) -> None:
    scenarios.prefix_hit(*pair, **CODED_LIMITS)


def test_coded_preemption(pair: tuple[Any, Any]) -> None:
    scenarios.preemption(*pair, **CODED_LIMITS)


@pytest.mark.parametrize("row", MACHINE_ROWS, ids=str)
def test_the_kernels_of_the_machine(row: CodedRow, served: Rows) -> None:
    with scenarios.small_engine(served(row)) as found:
        for scenario in (
            scenarios.prefill,
            scenarios.chunked_prefill,
            scenarios.decode,
            scenarios.prefix_hit,
            scenarios.preemption,
        ):
            scenario(*found, **MACHINE_LIMITS)


@pytest.mark.feature("coded latents: the pool holds base tokens / ratio, within 1 %")
def test_pool_holds_what_the_bytes_say(served: Rows) -> None:
    found = served(LLAMA)
    eigen = validate(found.eigen)
    tokens = []
    options: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "block_size": 32}
    for model, more in ((found.base, {}), (found.eigen, found.options)):
        with engine(model, "bfloat16", **options, **more) as llm:
            config = llm.llm_engine.vllm_config.cache_config
            tokens.append(config.num_gpu_blocks * config.block_size)
            layout = [] if model == found.base else llm.collective_rpc(_layout)[0]
    assert tokens[1] == pytest.approx(tokens[0] / eigen.kv_ratio, rel=0.01)
    assert tokens[1] == pytest.approx(POOL_BYTES / eigen.bytes_per_token(2), rel=0.01)
    assert sum(row["bytes_per_token"] for row in layout) == eigen.bytes_per_token(2)
    for row, layer in zip(layout, eigen.layers, strict=True):
        assert (row["rank_k"], row["rank_v"]) == (layer.rank_k, layer.rank_v)
        assert layer.key_code is not None
        assert row["bits_k"] == layer.key_code.bits
        assert row["torch_dtype"] == "coded"


@pytest.mark.feature("layers with sliding windows: the pool holds what `estimate` says")
def test_mixed_pool_holds_what_estimate_says(served: Rows) -> None:
    found = served(GEMMA)
    config, eigen = read_config(found.eigen)
    config = {**config, "dtype": "bfloat16"}
    options = {**found.options, "max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": 64}
    with engine(found.model, "bfloat16", **options) as llm:
        vllm_config = llm.llm_engine.vllm_config
        rows = llm.collective_rpc(_layout)
    in_flight, cache = vllm_config.max_in_flight_tokens, vllm_config.cache_config
    layout = layout_of_workers(
        rows,
        element_size=2,
        max_model_len=MAX_MODEL_LEN,
        num_blocks=cache.num_gpu_blocks,
        block_size=cache.block_size,
        windows=Windows(config["sliding_window"], in_flight),
    )
    assert layout.capacity == cache.kv_cache_size_tokens
    assert layout.compressed_layers.bytes_per_token == eigen.bytes_per_token(2)
    assert layout.compressed_layers.kv_ratio == eigen.kv_ratio
    assert 0.99 * POOL_BYTES < layout.pool_bytes <= POOL_BYTES
    sizes: dict[str, Any] = {"block_size": cache.block_size, "in_flight": in_flight}
    sizes["max_model_len"] = MAX_MODEL_LEN
    weights = estimate(config, 1 << 40, **sizes).compressed.weight_bytes
    foretold = estimate(config, weights + POOL_BYTES, **sizes)
    assert foretold.compressed.tokens == cache.kv_cache_size_tokens
    assert foretold.uncompressed.tokens < foretold.compressed.tokens


def _layout(worker: Any) -> Any:
    from vllm_eigen.plugin.kv_layout import KVLayoutWorker

    return KVLayoutWorker.eigen_kv_layout(worker)


@pytest.mark.feature("coded latents: KV transfer, raw bytes saved and loaded by a connector")
def test_codes_travel_through_a_connector(served: Rows, tmp_path: Path) -> None:
    """One engine saves its blocks, another one loads them instead of computing."""
    found = served(LLAMA)
    [prompt] = word_prompts([200], seed=22)
    options: dict[str, Any] = {
        **found.options,
        "max_model_len": MAX_MODEL_LEN,
        "enable_prefix_caching": False,
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        },
    }
    with engine(found.model, **options) as llm:
        ask(llm, [prompt], 1, logits=False)
    assert list(tmp_path.rglob("*.safetensors"))
    with engine(found.model, **options) as llm:
        [answer] = ask(llm, [prompt], 4, logits=True)
    assert answer.cached >= 128
    check(load_reference(found.eigen), [prompt], [answer], **CODED_LIMITS)


@pytest.mark.slow
@pytest.mark.feature("coded latents: speculative decoding (n-gram)")
def test_speculative_decoding_changes_no_token(served: Rows) -> None:
    found = served(LLAMA)
    [words] = word_prompts([40], seed=16)
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }
    # Not in this process: drafting imports libraries that keep later engines from starting.
    options = {**found.options, "max_model_len": MAX_MODEL_LEN, "speculative_config": speculative}
    with engine(found.model, in_process=False, **options) as llm:
        [answer] = ask(llm, [words * 4], 24, logits=False)
        assert metric(llm, "vllm:spec_decode_num_drafts") > 0
    expected = expected_logits(load_reference(found.eigen), words * 4, answer.tokens)
    assert expected.argmax(-1).tolist() == answer.tokens


@pytest.mark.skipif(not triton_works(), reason="vLLM's second model runner needs Triton")
@pytest.mark.feature("coded latents: model runner V2")
def test_coded_second_model_runner(served: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    found = served(LLAMA)
    asked = word_prompts([3, 200], seed=21)
    with engine(found.model, max_model_len=MAX_MODEL_LEN, **found.options) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        answers = ask(llm, asked, 4, logits=False)
    model = load_reference(found.eigen)
    for prompt, answer in zip(asked, answers, strict=True):
        assert expected_logits(model, prompt, answer.tokens).argmax(-1).tolist() == answer.tokens


@pytest.mark.refused("an element type for a cache of coded latents (--kv-cache-dtype fp8)")
def test_another_cache_type_is_refused(served: Rows) -> None:
    found = served(LLAMA)
    with (
        pytest.raises(UsageError, match="coded latents; leave it at auto"),
        engine(found.model, max_model_len=MAX_MODEL_LEN, kv_cache_dtype="fp8"),
    ):
        raise AssertionError("the engine must not start")
