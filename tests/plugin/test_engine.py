# SPDX-License-Identifier: Apache-2.0
"""The engine around the kernels: compiled graphs, backends, runners, ranks, caches that travel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.plugin.conftest import Models
from tests.plugin.harness.engine import (
    MAX_MODEL_LEN,
    POOL_BYTES,
    ask,
    cached_bytes,
    engine,
    expected_logits,
    metric,
    prompts,
    relative_error,
    triton_works,
)
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.common.errors import UsageError
from vllm_eigen.plugin.step_planner import KERNELS_VARIABLE
from vllm_eigen.server.launch.process import can_compile, free_port

LIMIT = 1e-4


@pytest.mark.skipif(
    not can_compile(),
    reason="torch's compiler cannot work below a path with spaces",
)
@pytest.mark.slow
def test_compiled_logits_and_capacity(models: Models) -> None:
    folder = models("llama", "float32", 0.6)
    model = load_reference(folder)
    asked = prompts([1, 40, 300], seed=7)
    with engine(folder, enforce_eager=False) as llm:
        answers = ask(llm, asked, 4, logits=True)
        config = llm.llm_engine.vllm_config.cache_config
        tokens = config.num_gpu_blocks * config.block_size
    for prompt, answer in zip(asked, answers, strict=True):
        assert relative_error(answer.logits, expected_logits(model, prompt, answer.tokens)) < LIMIT
    possible = POOL_BYTES / cached_bytes(folder, 4)
    assert tokens == pytest.approx(possible, rel=0.02)
    assert tokens > MAX_MODEL_LEN


@pytest.mark.feature("plain PyTorch kernels")
def test_plain_pytorch_kernels(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    folder = models("llama", "float32", 0.6)
    model = load_reference(folder)
    asked = prompts([3, 200], seed=8)
    with engine(folder) as llm:
        answers = ask(llm, asked, 4, logits=True)
    for prompt, answer in zip(asked, answers, strict=True):
        assert relative_error(answer.logits, expected_logits(model, prompt, answer.tokens)) < LIMIT


@pytest.mark.skipif(not triton_works(), reason="vLLM's second model runner needs Triton")
@pytest.mark.feature("model runner V2 (the matrix above runs on V1)")
def test_second_model_runner(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    folder = models("llama", "float32", 0.6)
    model = load_reference(folder)
    asked = prompts([3, 200], seed=21)
    with engine(folder) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        answers = ask(llm, asked, 4, logits=False)
    for prompt, answer in zip(asked, answers, strict=True):
        expected = expected_logits(model, prompt, answer.tokens)
        assert expected.argmax(-1).tolist() == answer.tokens


@pytest.mark.feature("KV transfer: blocks saved and loaded by a connector")
def test_cache_travels_through_a_connector(models: Models, tmp_path: Path) -> None:
    """One engine saves its blocks, another one loads them instead of computing."""
    folder = models("llama", "float32", 0.6)
    [prompt] = prompts([200], seed=22)
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    with engine(folder, kv_transfer_config=transfer, enable_prefix_caching=False) as llm:
        ask(llm, [prompt], 1, logits=False)
    assert list(tmp_path.rglob("*.safetensors"))
    with engine(folder, kv_transfer_config=transfer, enable_prefix_caching=False) as llm:
        [answer] = ask(llm, [prompt], 4, logits=True)
    assert answer.cached >= 128
    expected = expected_logits(load_reference(folder), prompt, answer.tokens)
    assert relative_error(answer.logits, expected) < LIMIT


@pytest.mark.feature("KV events")
def test_cache_events_are_published(models: Models) -> None:
    import msgspec
    import zmq

    folder = models("llama", "float32", 0.6)
    endpoint = f"tcp://127.0.0.1:{free_port()}"  # The publisher connects: nothing is wildcarded.
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    asked = prompts([200] * 20, seed=23)
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.bind(endpoint)
        with engine(folder, kv_events_config=events, enable_prefix_caching=True) as llm:
            for prompt in asked:  # What is published before the sockets met is lost.
                ask(llm, [prompt], 1, logits=False)
                if socket.poll(500):
                    break
            *_, payload = socket.recv_multipart(zmq.NOBLOCK)
            block = llm.llm_engine.vllm_config.cache_config.block_size
    _, batch, *_ = msgspec.msgpack.decode(payload)
    stored = [event for event in batch if event["type"] == "BlockStored"]
    assert stored[-1]["token_ids"] in [prompt[: 200 // block * block] for prompt in asked]


@pytest.mark.feature("fp8 cache: at least 3.3 times the tokens at ratio 0.6")
def test_fp8_cache_halves_the_bytes_again(models: Models) -> None:
    folder = models("llama", "bfloat16", 0.6)
    base = 2 * POOL_BYTES / cached_bytes(models("llama", "bfloat16", 1.0), 4)
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


@pytest.mark.feature("tensor parallel workers of vLLM's multiprocessing executor")
@pytest.mark.slow
def test_two_ranks_in_vllm_s_own_workers(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = models("llama", "float32", 0.6)
    model = load_reference(folder)
    asked = prompts([5, 130], seed=15)
    with engine(folder, tensor_parallel_size=2) as llm:
        answers = ask(llm, asked, 4, logits=True)
    for prompt, answer in zip(asked, answers, strict=True):
        assert relative_error(answer.logits, expected_logits(model, prompt, answer.tokens)) < LIMIT


@pytest.mark.feature("speculative decoding (n-gram)")
@pytest.mark.slow
def test_speculative_decoding_changes_no_token(models: Models) -> None:
    folder = models("llama", "float32", 0.6)
    [prompt] = prompts([40], seed=16)
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }
    # Not in this process: drafting imports libraries that keep later engines from starting.
    with engine(folder, in_process=False, speculative_config=speculative) as llm:
        [answer] = ask(llm, [prompt * 4], 24, logits=False)
        assert metric(llm, "vllm:spec_decode_num_drafts") > 0
    expected = expected_logits(load_reference(folder), prompt * 4, answer.tokens)
    assert expected.argmax(-1).tolist() == answer.tokens


@pytest.mark.feature("random weights (--load-format dummy)")
def test_random_weights_need_no_tensors(models: Models, tmp_path: Path) -> None:
    shutil.copy(models("llama", "float32", 0.6) / "config.json", tmp_path)
    with engine(tmp_path, load_format="dummy", skip_tokenizer_init=True) as llm:
        [answer] = ask(llm, prompts([20], seed=17), 3, logits=False)
    assert len(answer.tokens) == 3


@pytest.mark.refused("LoRA adapters on a folded checkpoint")
def test_adapters_on_a_folded_checkpoint_are_refused(models: Models) -> None:
    folder = models("llama", "float32", 0.6)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["eigen"].get("projections", "folded") == "folded"
    with pytest.raises(UsageError, match="--eigen-bases"), engine(folder, enable_lora=True):
        raise AssertionError("the engine must not start")
