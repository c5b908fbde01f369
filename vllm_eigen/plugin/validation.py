# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused when the layers are built, before weights are loaded.

vLLM checks the attention backends it chooses itself; a layer that names its backend, as ours do, is
not checked, and a cache type without a meaning would be taken for another.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_eigen.checkpoint.config import EigenConfig
from vllm_eigen.checkpoint.families import Family
from vllm_eigen.common.errors import UsageError
from vllm_eigen.kernels import Kernels, RotaryTable
from vllm_eigen.plugin.backend import BLOCK_MULTIPLE, EigenAttentionBackend
from vllm_eigen.plugin.vllm_api import VllmConfig, backend_refusals, device_capability

MIN_CAPABILITY = (8, 0)
"""bfloat16 and TF32 matrix units."""
MIN_E4M3_CAPABILITY = (8, 9)
"""Conversions of float8_e4m3fn."""
_SIXTEEN_BITS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def check_attention(eigen: EigenConfig, vllm_config: VllmConfig, kernels: Kernels) -> None:
    """Refuse types, sizes and devices that the backend or its kernels do not cover.

    Raises:
        UsageError: names the option and what to use instead.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    _check_dtypes(cache.cache_dtype, model.dtype)
    if cache.user_specified_block_size and cache.block_size % BLOCK_MULTIPLE:
        raise UsageError(
            f"--block-size {cache.block_size} does not fit Eigen attention; choose a multiple of "
            f"{BLOCK_MULTIPLE}"
        )
    if kernels.name == "gpu":
        _check_gpu(eigen, cache.cache_dtype, device_capability())
    refusals = backend_refusals(EigenAttentionBackend, vllm_config, eigen.layers[0].rank_k)
    if refusals:
        raise UsageError(
            f"Eigen attention cannot serve this configuration: {'; '.join(refusals)}; drop the "
            "options that ask for it, or serve the base model"
        )


def check_positions(rotary: RotaryTable, max_model_len: int) -> None:
    """Refuse a context for which the model's RoPE table has no rows: kernels would read past it.

    Raises:
        UsageError: see above.
    """
    if rotary.max_position < max_model_len:
        raise UsageError(
            f"--max-model-len {max_model_len} is longer than this model's RoPE table of "
            f"{rotary.max_position} positions; lower it, or scale RoPE with --hf-overrides"
        )


def check_norms(family: Family, tensor_parallel_size: int) -> None:
    """Refuse to split a norm of all heads together: a rank does not see the others' heads.

    Raises:
        UsageError: see above.
    """
    if family.wide_norms and tensor_parallel_size > 1:
        raise UsageError(
            f"norms of {family.architecture} are of all heads together and cannot be split over "
            f"{tensor_parallel_size} ranks; serve it with --tensor-parallel-size 1"
        )


def _check_dtypes(cache_dtype: str, dtype: torch.dtype) -> None:
    if dtype not in EigenAttentionBackend.supported_dtypes:
        raise UsageError(f"--dtype {_name(dtype)} is not supported; choose bfloat16 or float16")
    known = EigenAttentionBackend.supported_kv_cache_dtypes
    if cache_dtype not in known:
        raise UsageError(
            f"--kv-cache-dtype {cache_dtype} is not a type of Eigen caches; choose one of "
            f"{', '.join(known)}, or calibrate with --method coded for fewer bits"
        )
    if _SIXTEEN_BITS.get(cache_dtype, dtype) != dtype:
        raise UsageError(
            f"--kv-cache-dtype {cache_dtype} differs from --dtype {_name(dtype)}; leave it at auto"
        )


def _check_gpu(eigen: EigenConfig, cache_dtype: str, capability: tuple[int, int] | None) -> None:
    from vllm_eigen.kernels.gpu.checks import MAX_RANK

    rank = max(max(layer.rank_k, layer.rank_v) for layer in eigen.layers)
    if rank > MAX_RANK:
        raise UsageError(
            f"a layer of rank {rank} is beyond the GPU kernels' {MAX_RANK}; calibrate with a lower "
            "--kv-ratio or --head-group, or set EIGEN_KERNELS=reference"
        )
    if capability is None:
        return  # Triton's interpreter
    found = ".".join(map(str, capability))
    if capability < MIN_CAPABILITY:
        raise UsageError(
            f"the GPU kernels need compute capability {_dotted(MIN_CAPABILITY)}, this GPU has "
            f"{found}; set EIGEN_KERNELS=reference"
        )
    if cache_dtype in ("fp8", "fp8_e4m3") and capability < MIN_E4M3_CAPABILITY:
        raise UsageError(
            f"--kv-cache-dtype {cache_dtype} needs compute capability "
            f"{_dotted(MIN_E4M3_CAPABILITY)}, this GPU has {found}; choose fp8_e5m2 or auto"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
