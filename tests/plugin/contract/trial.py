# SPDX-License-Identifier: Apache-2.0
"""What of the plugin runs in the vLLM release of this process; prints it as JSON.

`test_release.py` starts it on the Python files of a release that is not installed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.plugin.harness.engine import (
    POOL_BYTES,
    ask,
    cached_bytes,
    engine,
    expected_logits,
    prompts,
    relative_error,
    rotated,
    write_base,
)
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.plugin.vllm_version import check_vllm_version, own_module

BLOCK = 32
ARCHITECTURE = "EigenLlamaForCausalLM"


def flags() -> dict[str, Any]:
    """What the server's parser makes of a command line."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = own_module().make_arg_parser(FlexibleArgumentParser())
    parsed = parser.parse_args(["model", "--kv-cache-dtype", "fp8", "--port", "81"])
    return {name: getattr(parsed, name) for name in ("model_tag", "kv_cache_dtype", "port")}


def trial(folder: Path) -> dict[str, Any]:
    """Serve a small model of other ranks in every layer."""
    import vllm

    base = write_base("llama", folder / "base", torch.float32)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    size = config["hidden_size"] // config["num_attention_heads"]
    ranks = [(size - 3 * i - 1, size // 2 + i) for i in range(config["num_hidden_layers"])]
    model = rotated(base, folder / "eigen", ranks)
    reference, asked = load_reference(model), prompts([5, 40, 150])
    with engine(model, block_size=BLOCK, max_num_batched_tokens=96, max_model_len=256) as llm:
        answers = ask(llm, asked, 4, logits=True)
        config = llm.llm_engine.vllm_config
        layers = config.compilation_config.static_forward_context
        specs = [layer.get_kv_cache_spec(config) for layer in layers.values()]
        heads = next(iter(layers.values())).num_kv_heads
        capacity = config.cache_config.num_gpu_blocks * BLOCK
    errors = [
        relative_error(answer.logits, expected_logits(reference, prompt, answer.tokens))
        for prompt, answer in zip(asked, answers, strict=True)
    ]
    return {
        "version": vllm.__version__,
        "checked": check_vllm_version(),
        "registered": ARCHITECTURE in vllm.ModelRegistry.get_supported_archs(),
        "flags": flags(),
        "pages": [spec.page_size_bytes for spec in specs],
        "wanted_pages": [4 * heads * BLOCK * (rank_k + rank_v) for rank_k, rank_v in ranks],
        "capacity": capacity,
        "wanted_capacity": POOL_BYTES // (BLOCK * cached_bytes(model, 4)) * BLOCK,
        "error": max(errors),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(trial(Path(scratch))))
