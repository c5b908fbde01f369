# SPDX-License-Identifier: Apache-2.0
"""Generate text in this process with vLLM's `LLM`; the plugin registers itself.

python examples/serve_offline.py eigen-demo "Return a new array of"
"""

from __future__ import annotations

import argparse

from vllm import LLM, SamplingParams


def main() -> None:
    """Complete the prompts, greedily."""
    parser = argparse.ArgumentParser(description="Generate text from a checkpoint.")
    parser.add_argument("model", help="Eigen checkpoint, or any other model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--pool-mib", type=int, default=64, help="KV-cache pool")
    parser.add_argument("--kv-cache-dtype", default="auto", help="e.g. fp8")
    parser.add_argument("--eager", action="store_true", help="do not compile; starts faster")
    args = parser.parse_args()

    llm = LLM(
        args.model,
        kv_cache_memory_bytes=args.pool_mib << 20,
        kv_cache_dtype=args.kv_cache_dtype,
        enforce_eager=args.eager,
    )
    options = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    for answer in llm.generate(args.prompts, options, use_tqdm=False):
        print(f"{answer.prompt!r} -> {answer.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
