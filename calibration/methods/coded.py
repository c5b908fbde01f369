# SPDX-License-Identifier: Apache-2.0
"""`--method coded`, the default: every direction of the eigenbasis gets the bits it is worth.

Bases, steps and widths come from the keys and values of the text and the gradients of the model's
own loss in them (`calibration.coding`).
"""

from __future__ import annotations

from vllm_eigen.calibration.methods.base import Method


class Coded(Method):
    """8, 4, 2 or 0 bits a direction, by the loss of the model's output."""

    name = "coded"
    summary = "8, 4, 2 or 0 bits for each direction of an eigenbasis, by the model's own loss"
