# SPDX-License-Identifier: Apache-2.0
"""Compress a model from Python and print the codes of its layers.

python examples/calibrate.py "$(python -m demo.model)" eigen-demo README.md docs/*.md
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from vllm_eigen.calibration.model.text import read_files
from vllm_eigen.calibration.options import Options
from vllm_eigen.calibration.pipeline import calibrate
from vllm_eigen.calibration.target import Target
from vllm_eigen.common import provenance
from vllm_eigen.common.progress import Reporter


def main() -> None:
    """Calibrate with the default method."""
    parser = argparse.ArgumentParser(description="Compress a model's KV cache.")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("text", nargs="+", type=Path, help="text files to calibrate on")
    parser.add_argument("--kv-ratio", type=float, default=0.27)
    parser.add_argument("--samples", type=int, default=32, help="windows of text")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    args = parser.parse_args()

    options = Options(
        model=args.model,
        output=args.output,
        corpus=partial(read_files, args.text),
        provenance=provenance.collect(),
        target=Target(kv_ratio=args.kv_ratio),
        samples=args.samples,
        length=args.length,
    )
    with Reporter() as reporter:
        eigen = calibrate(options, reporter)

    print(f"{args.output}: KV ratio {eigen.kv_ratio:.3f}")
    for index, ranks in enumerate(eigen.layers):
        print(f"layer {index}: keys {ranks.key_code}, values {ranks.value_code}")


if __name__ == "__main__":
    main()
