# SPDX-License-Identifier: Apache-2.0
"""Entry of an Eigen architecture in vLLM's model registry."""

from __future__ import annotations

import torch
from vllm.model_executor.models.registry import _LazyRegisteredModel


class EigenModelEntry(_LazyRegisteredModel):
    """A model whose class is made of vLLM's own when vLLM asks for it.

    vLLM has a module for each architecture, some of them large, and a server needs one of them. A
    name of the form `module:class` would need the class to be in the module already.
    """

    def load_model_cls(self) -> type[torch.nn.Module]:
        """The class, made in the first call of a process."""
        from vllm_eigen.plugin.models import eigen_class

        return eigen_class(self.class_name)
