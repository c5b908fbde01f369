# SPDX-License-Identifier: Apache-2.0
"""What stands elsewhere in vLLM 0.33 than in other supported releases."""

from __future__ import annotations

from vllm.entrypoints.common.cli_args import make_arg_parser

__all__ = ["make_arg_parser"]
