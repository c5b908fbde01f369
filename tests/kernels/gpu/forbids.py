# SPDX-License-Identifier: Apache-2.0
"""What a step may not do that is captured in a CUDA graph, or that should not wait."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Forbids(TorchDispatchMode):
    """Fails where anything is allocated, computed or read back: only views may be taken."""

    VIEWS = ("view", "slice", "select", "as_strided", "alias", "detach", "view_as", "transpose")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        name = func.overloadpacket.__name__
        assert name in self.VIEWS, f"{name} is called in a step"
        found: torch.Tensor = func(*args, **(kwargs or {}))
        return found
