"""The table of calibration methods, chosen by `--method`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vllm_eigen.errors import UsageError

if TYPE_CHECKING:
    from calibration.methods.base import Method

METHODS: dict[str, str] = {
    "sensitivity": "calibration.methods.sensitivity:Sensitivity",
    "paper": "calibration.methods.paper:Paper",
    "released": "calibration.methods.released:Released",
}
"""Name to "module:Class"; imported on use, so that `--help` stays instant."""

DEFAULT = "sensitivity"


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
