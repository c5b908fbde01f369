"""A model split into two pipeline stages, each in a process of its own, without vLLM's engine.

vLLM's CPU runner cannot run any pipeline, so the stages are built by vLLM's loader and stepped by
hand: one prompt over a cache of pages, hidden states sent from stage to stage.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from server.process import free_port

SECONDS = 120
BLOCK = 16


def logits_of_stages(model: Path, prompt: list[int], folder: Path) -> torch.Tensor:
    """Logits [tokens, vocabulary] of a prompt that went through two stages."""
    import torch.multiprocessing as processes

    context = processes.start_processes(
        _stage,
        args=(str(model), prompt, str(folder), free_port()),
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
    logits: torch.Tensor = torch.load(folder / "logits.pt")
    return logits


def _stage(stage: int, model: str, prompt: list[int], folder: str, port: int) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    torch.set_num_threads(1)
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()  # as vLLM's CPU worker does before it loads
    arguments = EngineArgs(
        model=model,
        dtype="float32",
        pipeline_parallel_size=2,
        enforce_eager=True,
        max_model_len=256,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), torch.no_grad():
        init_distributed_environment(2, stage, f"tcp://127.0.0.1:{port}", stage, "gloo")
        initialize_model_parallel(1, 2, backend="gloo")
        built: Any = get_model(vllm_config=config)
        hidden = _step(built, config, prompt, stage)
        if stage == 1:
            torch.save(built.compute_logits(hidden), Path(folder) / "logits.pt")
        torch.distributed.barrier()


def _step(model: Any, config: Any, prompt: list[int], stage: int) -> Any:
    """Run a stage over the prompt; the first sends what it found, the second returns it."""
    from vllm.forward_context import set_forward_context
    from vllm.sequence import IntermediateTensors

    from vllm_eigen.attention import EigenAttention
    from vllm_eigen.backend import EigenMetadata

    tokens = len(prompt)
    blocks = -(-tokens // BLOCK)
    metadata = EigenMetadata(
        num_actual_tokens=tokens,
        query_start_loc=torch.tensor([0, tokens], dtype=torch.int32),
        seq_lens=torch.tensor([tokens], dtype=torch.int32),
        block_table=torch.arange(blocks, dtype=torch.int32)[None],
        max_query_len=tokens,
        max_seq_len=tokens,
    )
    layers = config.compilation_config.static_forward_context
    assert {type(layer) for layer in layers.values()} == {EigenAttention}
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
        dict.fromkeys(layers, metadata), config, num_tokens=tokens, slot_mapping=slots
    ):
        found = model(torch.tensor(prompt), torch.arange(tokens), received)
    if stage == 1:
        return found
    for name in sorted(found.tensors):
        torch.distributed.send(found.tensors[name].contiguous(), dst=1)
    return None
