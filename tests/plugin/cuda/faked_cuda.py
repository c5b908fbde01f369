# SPDX-License-Identifier: Apache-2.0
"""What vLLM makes of our models on an NVIDIA GPU, asked of a platform that only claims to be one.

`test_cuda_contract.py` runs it in a process of its own: a platform is chosen once. Layers are built
on the CPU with the Triton kernels in their interpreter; nothing is computed. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

CAPABILITY = (9, 0)


class _Compiled(ModuleType):
    """A module compiled for CUDA, whose functions nothing here calls."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Ops:
    """The CPU build's compiled functions; those asked what the CUDA build supports say nothing."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: False) if "_supports_" in name else getattr(self._ops, name)


def fake() -> None:
    """Make vLLM believe in one GPU of compute capability 9.0 with 80 GiB."""
    for name in ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn"):
        sys.modules[name] = _Compiled(name)
    import vllm.platforms as platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Faked(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*CAPABILITY)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "a GPU"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def device_count(cls) -> int:
            return 1

    CpuPlatform.import_kernels()
    torch.ops._C = _Ops(torch.ops._C)
    platforms._current_platform = Faked()


def build(model: Path, folder: Path) -> Any:
    """vLLM's configuration of an engine for the model, with the model's layers in it."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    arguments = EngineArgs(model=str(model), dtype="bfloat16", max_model_len=2048)
    config = arguments.create_engine_config()
    # The compiler's passes need CUDA's functions, so the layers are built without it.
    eager = replace(arguments, enforce_eager=True).create_engine_config()
    with set_current_vllm_config(eager):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
            initialize_model_parallel(backend="gloo")
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        initialize_model(vllm_config=eager)
        torch.set_default_dtype(default)
    layers = eager.compilation_config.static_forward_context
    config.compilation_config.static_forward_context.update(layers)
    return config


def resolve(config: Any, queries: int) -> dict[str, str | int]:
    """The CUDA graphs that vLLM captures for the layers, and their block size.

    Args:
        queries: a sequence's in a decode step, more than one with speculative decoding.
    """
    from vllm.platforms import current_platform

    asked = config.compilation_config.cudagraph_mode.name
    current_platform.update_block_size_for_backend(config)
    support = []
    for layer in config.compilation_config.static_forward_context.values():
        backend, spec = layer.get_attn_backend(), layer.get_kv_cache_spec(config)
        support.append(backend.get_builder_cls().get_cudagraph_support(config, spec))
    lowest = min(support, key=lambda one: one.value)
    mode = config.compilation_config.resolve_cudagraph_mode_and_sizes(
        lowest, "EigenAttentionBackend", queries, use_v2_model_runner=True
    )
    return {
        "asked": asked,
        "support": lowest.name,
        "mode": mode.name,
        "layers": len(support),
        "block_size": config.cache_config.block_size,
    }


def main() -> None:
    """Ask for the kernels of the environment, one query a sequence and four."""
    fake()
    from vllm.model_executor.models import registry

    from tests.plugin.harness.engine import rotated, write_base

    registry._run_in_subprocess = lambda inspect: inspect()  # which would not be faked

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = write_base("llama", folder / "base", torch.bfloat16)
        model = rotated(base, folder / "eigen")
        found = [resolve(build(model, folder), queries) for queries in (1, 4)]
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # without the teardown of a device that is not there


if __name__ == "__main__":
    main()
