# SPDX-License-Identifier: Apache-2.0
"""vLLM's own load generator, `vllm bench serve`, as a function for the benchmarks."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any


def run_bench_client(arguments: Sequence[str]) -> dict[str, Any]:
    """Send one load to a running server from this process; returns what vLLM's client measured.

    A process of its own would import vLLM anew, which takes longer than most runs.

    Args:
        arguments: the command line of `vllm bench serve`.

    Raises:
        SystemExit: an argument is wrong.
        Exception: whatever the client raises, e.g. for a data set that it cannot read.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    try:
        return dict(main(parser.parse_args(list(arguments))))
    finally:
        gc.unfreeze()  # the client freezes the heap of what it takes for its own process
