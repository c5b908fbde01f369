# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen verify`: whether the installed vLLM serves a checkpoint as it is meant."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.common.packages import check_torchvision

if TYPE_CHECKING:
    from vllm_eigen.calibration.verification.verify import Verification

HELP = "serve a checkpoint in this vLLM: logits against the reference, capacity, features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="Eigen checkpoint")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="that vLLM computes in (the checkpoint's own); float32 is compared most closely",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="for the reference, 4 bytes a weight",
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit status is 1 if something is wrong."""
    check_torchvision()
    from vllm_eigen.calibration.model.device import pick_device
    from vllm_eigen.calibration.verification.verify import verify
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    with terminate_as_interrupt(), Reporter(quiet=args.json) as reporter:
        found = verify(
            args.checkpoint, dtype=args.dtype, device=pick_device(args.device), reporter=reporter
        )
    if args.json:
        print(json.dumps(_result(found), indent=2))
    else:
        _print(found)
    return int(not found.passed)


def _result(found: Verification) -> dict[str, Any]:
    """JSON-ready."""
    from vllm_eigen.plugin.vllm_version import vllm_version

    return {
        "passed": found.passed,
        "vllm": vllm_version(),
        "architecture": found.architecture,
        "key_mode": found.eigen.key_mode,
        "kv_ratio": found.eigen.kv_ratio,
        "dtype": found.dtype,
        "max_model_len": found.max_model_len,
        "pool_bytes": found.pool_bytes,
        "checks": [
            {
                **dataclasses.asdict(check),
                # JSON has no infinity.
                "values": {
                    name: value if math.isfinite(value) else None
                    for name, value in check.values.items()
                },
            }
            for check in found.checks
        ],
    }


def _print(found: Verification) -> None:
    from vllm_eigen.common.sizes import format_bytes
    from vllm_eigen.plugin.vllm_version import vllm_version

    print(f"model           {found.architecture}, {found.eigen.key_mode}, ", end="")
    print(f"KV ratio {found.eigen.kv_ratio:.4f}")
    print(f"engine          vLLM {vllm_version()}, {found.dtype}, ", end="")
    print(f"pool of {format_bytes(found.pool_bytes)}")
    print("limits          of the relative error of logits at half of the positions")
    print()
    for check in found.checks:
        print(f"{check.name:<15} {check.state:<7} {check.found}")
    print()
    wrong = [check.name for check in found.checks if check.state == "wrong"]
    if wrong:
        print(f"wrong: {', '.join(wrong)}")
    else:
        print("vLLM serves this checkpoint as its reference computes it")
