# SPDX-License-Identifier: Apache-2.0
"""Models split into two pipeline stages, each in a process of its own, without vLLM's engine.

vLLM's CPU runner cannot run any pipeline, so the stages are built by vLLM's loader and stepped by
hand: one prompt over a cache of blocks, hidden states sent from stage to stage. The two processes
stay for all models, since importing vLLM costs most of their time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugin.harness.engine import start_quickly
from vllm_eigen.server.launch.process import free_port

SECONDS = 300
BLOCK = 16


def logits_of_stages(
    models: dict[str, Path], prompt: list[int], folder: Path
) -> dict[str, torch.Tensor]:
    """Each model's logits [tokens, vocabulary] of a prompt that went through two stages."""
    import torch.multiprocessing as processes

    context = processes.start_processes(
        _stage,
        args=(models, prompt, folder, free_port()),
        nprocs=2,
        join=False,
        start_method="spawn",
    )
    try:
        while not context.join(timeout=SECONDS):
            if all(process.is_alive() for process in context.processes):
                raise TimeoutError(f"two stages took more than {SECONDS} s")
    finally:
        for process in context.processes:
            process.kill()
    return {name: torch.load(folder / f"{name}.pt") for name in models}


def _stage(stage: int, models: dict[str, Path], prompt: list[int], folder: Path, port: int) -> None:
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_DIST_IDENT": f"stages-{port}",  # names shared memory; vLLM's CPU worker sets it
    }
    torch.set_num_threads(1)
    start_quickly(pytest.MonkeyPatch())
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()  # as vLLM's CPU worker does before it loads
    for name, model in models.items():
        arguments = EngineArgs(
            model=str(model),
            dtype="float32",
            pipeline_parallel_size=2,
            enforce_eager=True,
            max_model_len=256,
        )
        config = arguments.create_engine_config()
        with set_current_vllm_config(config), torch.no_grad():
            if not torch.distributed.is_initialized():
                init_distributed_environment(2, stage, f"tcp://127.0.0.1:{port}", stage, "gloo")
                initialize_model_parallel(1, 2, backend="gloo")
            built: Any = get_model(vllm_config=config)
            hidden = _step(built, config, prompt, stage)
            if stage == 1:
                torch.save(built.compute_logits(hidden), folder / f"{name}.pt")
            torch.distributed.barrier()


def _step(model: Any, config: Any, prompt: list[int], stage: int) -> Any:
    """Run a stage over the prompt; the first sends what it found, the second returns it."""
    from vllm.forward_context import set_forward_context
    from vllm.sequence import IntermediateTensors

    from vllm_eigen.kernels import Step
    from vllm_eigen.plugin.attention import EigenAttention
    from vllm_eigen.plugin.backend import EigenMetadata

    tokens = len(prompt)
    blocks = -(-tokens // BLOCK)
    step = Step(
        query_start_loc=torch.tensor([0, tokens], dtype=torch.int32),
        seq_lens=torch.tensor([tokens], dtype=torch.int32),
        block_table=torch.arange(blocks, dtype=torch.int32)[None],
        num_actual_tokens=tokens,
        max_query_len=tokens,
        max_seq_len=tokens,
    )
    layers = config.compilation_config.static_forward_context
    assert {type(layer) for layer in layers.values()} == {EigenAttention}
    impl = next(iter(layers.values())).impl
    plan = impl.planner.kernels.plan(step, impl.prepared.spec.plan_geometry(BLOCK))
    for layer in layers.values():
        width = layer.head_size + layer.head_size_v
        layer.kv_cache = torch.zeros(blocks, layer.num_kv_heads, BLOCK, width)
    slots = {name: torch.arange(tokens) for name in layers}
    received = None
    if stage == 1:
        empty = model.make_empty_intermediate_tensors(tokens, torch.float32, torch.device("cpu"))
        for name in sorted(empty.tensors):
            torch.distributed.recv(empty.tensors[name], src=0)
        received = IntermediateTensors(empty.tensors)
    with set_forward_context(
        dict.fromkeys(layers, EigenMetadata(plan)), config, num_tokens=tokens, slot_mapping=slots
    ):
        found = model(torch.tensor(prompt), torch.arange(tokens), received)
    if stage == 1:
        return found
    for name in sorted(found.tensors):
        torch.distributed.send(found.tensors[name].contiguous(), dst=1)
    return None
