# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench served-tasks`: do served models score as the offline evaluation says?

The same multiple-choice questions go, as one task of lm-evaluation-harness, through its
`local-completions` client to a running server, and through the offline evaluation of
`vllm-eigen evaluate` in transformers. Scores must agree within half a point. Servers compute in
float32 unless `--dtype` says otherwise, so that what differs is the path and not the rounding.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.common.errors import UsageError

if TYPE_CHECKING:
    from vllm_eigen.benchmarks.quality.served_scores import Comparison
    from vllm_eigen.common.progress import Reporter

HELP = "whether served models score in lm-evaluation-harness as offline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--base", required=True, metavar="MODEL", help="uncompressed model")
    parser.add_argument("--eigen", required=True, type=Path, metavar="DIR", help="its checkpoint")
    parser.add_argument(
        "--questions", required=True, type=Path, metavar="FILE", help="jsonl of ctx, choices, gold"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="first N questions")
    parser.add_argument(
        "--tolerance", type=float, default=0.5, metavar="POINTS", help="largest gap (%(default)s)"
    )
    parser.add_argument("--dtype", default="float32", help="of the servers started here (float32)")
    parser.add_argument("--pool-mib", type=int, default=64, help="KV pool of each, MiB (64)")
    parser.add_argument("--base-url", metavar="URL", help="a running server instead")
    parser.add_argument("--eigen-url", metavar="URL", help="the same for Eigen")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write the scores there")


def run(args: argparse.Namespace) -> int:
    """Ask both ways and compare; 0 if all scores agree.

    Raises:
        UsageError: the harness is missing, or one URL is.
        InputError: the questions cannot be used.
        EngineError: a server fails.
    """
    from vllm_eigen.benchmarks.lib.results import collect_provenance, write_json
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    if find_spec("lm_eval") is None or find_spec("tenacity") is None:
        raise UsageError("lm_eval is missing; install the project with its [bench] extra")
    if (args.base_url is None) != (args.eigen_url is None):
        raise UsageError("give both --base-url and --eigen-url, or neither")
    with terminate_as_interrupt(), Reporter() as reporter:
        rows = _compare(args, reporter)
    for row in rows:
        verdict = "agrees" if row.gap <= args.tolerance else "DIFFERS"
        print(
            f"{row.side:<6} {row.metric:<9} served {row.served:6.2f}  offline {row.offline:6.2f}  "
            f"gap {row.gap:.2f} points over {row.questions} questions: {verdict}"
        )
    if args.output_json is not None:
        document: dict[str, Any] = {
            "questions": args.questions.name,
            "dtype": args.dtype,
            "tolerance": args.tolerance,
            "scores": [asdict(row) for row in rows],
            "provenance": collect_provenance(),
        }
        write_json(args.output_json, document)
    return int(any(row.gap > args.tolerance for row in rows))


def _compare(args: argparse.Namespace, reporter: Reporter) -> list[Comparison]:
    from vllm_eigen.benchmarks.lib.endpoint import Endpoint
    from vllm_eigen.benchmarks.lib.servers import running, set_environment
    from vllm_eigen.benchmarks.quality.served_scores import (
        ask_offline,
        ask_server,
        compare,
        write_task,
    )

    set_environment(args.base, args.eigen)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    served = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        task = write_task(args.questions, folder)
        offline = ask_offline(args.base, args.eigen, task, folder, args.limit, reporter)
        sides = (("base", args.base, args.base_url), ("eigen", str(args.eigen), args.eigen_url))
        for side, model, url in sides:
            reporter.note(f"{side}: {'asking ' + url if url else 'starting vLLM'} ...")
            if url is not None:
                served[side] = ask_server(Endpoint(url), args.base, task, folder, args.limit)
                continue
            options = ("--dtype", args.dtype, "--kv-cache-memory-bytes", str(args.pool_mib << 20))
            with running(model, *options, log=folder / f"{side}.log") as server:
                endpoint = Endpoint(server.url)
                served[side] = ask_server(endpoint, args.base, task, folder, args.limit)
    return compare(served, offline)
