# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen doctor`: what is installed, what is wrong, and the fix."""

from __future__ import annotations

import argparse
import dataclasses
import json

HELP = "show what is installed, what is wrong or absent, and the fix"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON only")


def run(args: argparse.Namespace) -> int:
    """Print the findings; the exit status is 1 if something is wrong, absent parts apart."""
    from vllm_eigen.server.launch.doctor import examine

    findings = examine()
    if args.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.state:<7} {finding.what:<16} {finding.found}")
            if finding.fix:
                print(f"{'':<24} fix: {finding.fix}")
    return int(any(finding.state == "wrong" for finding in findings))
