# SPDX-License-Identifier: Apache-2.0
"""The table of calibration methods, chosen by `--method`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vllm_eigen.common.errors import UsageError

if TYPE_CHECKING:
    from vllm_eigen.calibration.methods.base import Method

METHODS: dict[str, str] = {
    "coded": "vllm_eigen.calibration.methods.coded:Coded",
    "fisher": "vllm_eigen.calibration.methods.fisher:Fisher",
    "sensitivity": "vllm_eigen.calibration.methods.sensitivity:Sensitivity",
    "paper": "vllm_eigen.calibration.methods.paper:Paper",
    "released": "vllm_eigen.calibration.methods.released:Released",
}
"""Name to "module:Class"; imported on use, so that `--help` stays instant."""

DEFAULT = "coded"


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        UsageError: there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise UsageError(f"method {name!r} is unknown; choose from {', '.join(METHODS)}")
    module, _, kind = METHODS[name].partition(":")
    method: Method = getattr(importlib.import_module(module), kind)()
    return method
