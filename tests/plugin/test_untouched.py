# SPDX-License-Identifier: Apache-2.0
"""Bases over a base model that stays as it is: quantized weights, and adapters on its projections.

The reference is transformers: the same weights (rounded, or with the adapter merged), and hooks
that pass keys and values through the same bases.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.plugin.harness.engine import ask, check, engine, expected_logits, relative_error
from tests.plugin.harness.quantized import FORMATS, quantize
from tests.plugin.harness.rows import CODED_ROWS, MAX_MODEL_LEN, ROWS, Row, Served, limits
from tests.plugin.harness.two_ranks import word_prompts
from vllm_eigen.calibration.model.hooks import coded_cache, compress
from vllm_eigen.calibration.model.unfold import unfold_layer
from vllm_eigen.checkpoint.config import parse_config
from vllm_eigen.checkpoint.families import family_of
from vllm_eigen.checkpoint.validate import serving_overrides

[ROW] = [row for row in ROWS if str(row) == "llama-bases-only"]
[CODED] = [row for row in CODED_ROWS if str(row) == "llama-bases-only-coded"]
Tensors = dict[str, torch.Tensor]
BF16_LIMIT, INT8_LIMIT = 0.06, 0.2
"""Of relative errors, where activations are bfloat16, and where they are rounded to eight bits."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return ROW.write(tmp_path_factory.mktemp("untouched"))


class _Stored(dict[str, torch.Tensor]):
    """Tensors by name, as calibration reads them."""

    def get(self, name: str) -> torch.Tensor:  # type: ignore[override]
        return self[name]


@contextlib.contextmanager
def reference(served: Served, bases: Path, weights: Tensors) -> Iterator[Any]:
    """The base model in transformers, some weights replaced, its cache passed through the bases."""
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM
    model = build.from_pretrained(served.base, dtype=torch.float32)
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    config = json.loads((served.base / "config.json").read_text(encoding="utf-8"))
    family = family_of(config)
    eigen = parse_config(config | serving_overrides(bases, config))
    stored = _Stored(load_file(bases / "bases.safetensors"))
    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(model.model.layers):
            found = unfold_layer(
                stored, family.attention_path(index), family, eigen, eigen.layers[index]
            )
            geometry = family.geometry(config)
            hooks.enter_context(
                compress(
                    layer,
                    family,
                    geometry,
                    eigen.key_mode,
                    found.key,
                    found.value,
                    coded_cache(eigen.layers[index]),
                    key_offset=found.key_offset,
                    value_offset=found.value_offset,
                )
            )
        yield model


def overrides(served: Served, model: Path) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = serving_overrides(served.eigen.parent / "bases", config)
    return found


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="vLLM has no kernels for 4-bit weights, and inexact ones for 8-bit, without AVX512",
)
@pytest.mark.parametrize(
    "form",
    [pytest.param(f, marks=pytest.mark.feature(f"{f} weights under bases-only")) for f in FORMATS],
)
def test_quantized_weights(form: str, served: Served, tmp_path: Path) -> None:
    quantized, rounded = quantize(served.base, tmp_path / form, form)
    asked = word_prompts([30, 100], seed=12)
    with engine(
        quantized,
        "bfloat16",
        max_model_len=MAX_MODEL_LEN,
        hf_overrides=overrides(served, quantized),
    ) as llm:
        answers = ask(llm, asked, 3, logits=True)
    # With AMX vLLM multiplies 4-bit weights with 8-bit activations too.
    int8_activations = form == "compressed-tensors" or torch.cpu._is_amx_tile_supported()
    bases = served.eigen.parent / "bases"
    with reference(served, bases, rounded) as model, reference(served, bases, {}) as exact:
        for prompt, answer in zip(asked, answers, strict=True):
            error = relative_error(answer.logits, expected_logits(model, prompt, answer.tokens))
            other = relative_error(answer.logits, expected_logits(exact, prompt, answer.tokens))
            assert error < (INT8_LIMIT if int8_activations else BF16_LIMIT)
            if not int8_activations:
                assert error < other / 2, "the rounded weights should be nearer than the exact"


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(ROW, marks=pytest.mark.feature("LoRA adapters over bases-only")),
        pytest.param(
            CODED, marks=pytest.mark.feature("coded latents: LoRA adapters over bases-only")
        ),
    ],
    ids=str,
)
def test_adapters(row: Row, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    served = row.write(tmp_path)
    adapter, merged = write_adapter(served.base, tmp_path / "adapter")
    asked = word_prompts([9, 100], seed=13)
    with engine(
        served.model,
        max_model_len=MAX_MODEL_LEN,
        enable_lora=True,
        max_lora_rank=8,
        **served.options,
    ) as llm:
        request = LoRARequest("adapter", 1, str(adapter))
        adapted = ask(llm, asked, 4, logits=True, lora_request=request)
        plain = ask(llm, asked, 4, logits=True)
    bases = served.eigen.parent / "bases"
    for weights, answers in ((merged, adapted), ({}, plain)):
        with reference(served, bases, weights) as model:
            check(model, asked, answers, **limits(row))
    assert relative_error(adapted[1].logits[:1], plain[1].logits[:1]) > 0.05


def write_adapter(base: Path, output: Path, rank: int = 8) -> tuple[Path, Tensors]:
    """A random LoRA adapter on every linear map of a Llama, and the weights it merges to."""
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    merged: Tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if ".layers." not in name or weight.ndim != 2:
            continue
        down = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
        up = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        merged[name] = weight + up @ down
    output.mkdir()
    save_file(tensors, output / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in merged})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (output / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return output, merged
