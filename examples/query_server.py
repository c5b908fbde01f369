# SPDX-License-Identifier: Apache-2.0
"""Ask a running `vllm-eigen serve` for a completion and for the state of its KV cache.

vllm-eigen serve eigen-demo --port 8000
python examples/query_server.py "Return a new array of"
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from typing import Any


def ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET, or POST a JSON body; returns the JSON answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def main() -> None:
    """Print the completion, and what the pool holds."""
    parser = argparse.ArgumentParser(description="Query a running server.")
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    model = ask(f"{args.url}/v1/models")["data"][0]["id"]
    body = {"model": model, "prompt": args.prompt, "max_tokens": args.max_tokens}
    print(ask(f"{args.url}/v1/completions", {**body, "temperature": 0})["choices"][0]["text"])

    cache = ask(f"{args.url}/v1/kv_cache")
    tokens = cache["tokens"]
    print(f"KV bytes a token: {cache['bytes_per_token']:,}")
    print(f"tokens the pool holds: {tokens['capacity']:,}")


if __name__ == "__main__":
    main()
