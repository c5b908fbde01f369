# SPDX-License-Identifier: Apache-2.0
"""Entry point of the vLLM plugin: registers our architectures and our attention backend.

vLLM calls `register` in every process it starts, possibly more than once; it only writes names
into vLLM's tables and imports nothing heavy.
"""

from __future__ import annotations

from vllm_eigen.checkpoint.families import FAMILIES
from vllm_eigen.common.errors import EngineError
from vllm_eigen.plugin.vllm_version import check_vllm_version

BACKEND_NAME = "EIGEN"
BACKEND = "vllm_eigen.plugin.backend.EigenAttentionBackend"


def register() -> None:
    """Make vLLM know every Eigen architecture and the Eigen attention backend.

    On an unsupported vLLM it logs one line and registers nothing, so that other models still run.
    """
    from vllm.logger import init_logger

    try:
        check_vllm_version()
    except EngineError as error:
        init_logger("vllm_eigen").error("vllm-eigen is switched off: %s", error)
        return

    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_eigen.plugin.model_entry import EigenModelEntry

    # A second registration is an error. `CUSTOM` is left to other plugins: all share that one name.
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(BACKEND_NAME, BACKEND)
    # vLLM dropped MPT; without it there would be no base model to compare with.
    for name in ("MptForCausalLM", "MPTForCausalLM"):
        ModelRegistry.register_model(name, "vllm_eigen.plugin.mpt:MPTForCausalLM")
    for family in FAMILIES:
        name = family.eigen_architecture
        # `register_model` takes a class, or the name of one that is in a module already.
        ModelRegistry.models[name] = EigenModelEntry("vllm_eigen.plugin.models", name)
