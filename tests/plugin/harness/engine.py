# SPDX-License-Identifier: Apache-2.0
"""What the engine tests share: models on disk, a bounded engine, logits from vLLM and torch."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import small_llama
from vllm_eigen.calibration.export.write import eigen_config, write_checkpoint
from vllm_eigen.calibration.methods.basis import Basis, LayerBases, tail_loss
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.checkpoint.config import LayerRanks

POOL_BYTES = 64 << 20
MAX_MODEL_LEN = 2048
LOGIT_LIMIT = 1e-4
"""Most relative error of logits in float32."""


def triton_works() -> bool:
    """Whether vLLM finds a Triton that can run here."""
    try:
        from vllm.triton_utils import HAS_TRITON
    except ImportError:
        return False
    return bool(HAS_TRITON)


def write_base(family: str, folder: Path, dtype: torch.dtype) -> Path:
    """A base model: the small Llama, random or trained, or a random OPT with its tokenizer."""
    from transformers import OPTConfig, OPTForCausalLM

    if family in ("llama", "trained"):
        steps = small_llama.STEPS if family == "trained" else 0
        return small_llama.write(folder, dtype, steps=steps)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=small_llama.VOCABULARY,
        hidden_size=128,
        ffn_dim=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_MODEL_LEN,
        word_embed_proj_dim=128,
        init_std=0.15,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    OPTForCausalLM(config).to(dtype).save_pretrained(folder)
    small_llama.write_tokenizer(folder)
    return folder


def calibrate(base: Path, folder: Path, text: Path, kv_ratio: float, *options: str) -> Path:
    """An Eigen checkpoint of 16-bit latents, made with the real command on little text."""
    from vllm_eigen import cli

    arguments = ["calibrate", str(base), "--output", str(folder), "--text", str(text)]
    arguments += ["--kv-ratio", str(kv_ratio), "--samples", "16", "--seq-len", "256", "--quiet"]
    arguments += ["--method", "sensitivity"]
    assert cli.main([*arguments, *options]) == 0
    return folder


class _Rotation(Basis):
    """A basis that rotates its heads even at full rank, where calibration takes the identity."""

    def at(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder[:, :, :rank], self.decoder[:, :rank, :]


def rotated(base: Path, folder: Path, ranks: Sequence[tuple[int, int]] = ()) -> Path:
    """An Eigen checkpoint whose heads are rotated at random: at full rank, the same model.

    Args:
        ranks: of keys and values, a layer; full ones by default.
    """
    source = open_source(str(base))
    heads, size = source.geometry.num_kv_heads, source.geometry.head_size
    generator = torch.Generator().manual_seed(0)

    def basis() -> Basis:
        noise = torch.randn(heads, size, size, generator=generator, dtype=torch.float64)
        encoder = torch.linalg.qr(noise)[0]
        energy = torch.ones(heads, size, dtype=torch.float64)
        return _Rotation(encoder, encoder.mT.contiguous(), energy, tail_loss(energy))

    count = len(source.family.compressed_layers(source.config))
    ranks = ranks or [(size, size)] * count
    layers = [LayerRanks(rank_k=rank_k, rank_v=rank_v) for rank_k, rank_v in ranks]
    eigen = eigen_config(
        source,
        layers,
        key_mode=source.family.key_modes[0],
        method="rotated",
        head_group=1,
        provenance={},
    )
    write_checkpoint(source, eigen, [LayerBases(basis(), basis()) for _ in layers], folder)
    return folder


@contextlib.contextmanager
def engine(
    model: Path,
    dtype: str = "float32",
    *,
    in_process: bool = True,
    kernels: str | None = None,
    **options: Any,
) -> Iterator[Any]:
    """A vLLM engine that ends with the block; logits are raw and of the whole vocabulary.

    It runs in this process, where it starts in a second and not in twenty; the server tests
    have it in processes of its own.
    """
    from vllm import LLM

    settings: dict[str, Any] = {
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_memory_bytes": POOL_BYTES,
        "enforce_eager": True,
        "logprobs_mode": "raw_logits",
        "max_logprobs": -1,
        "seed": 0,
        "disable_log_stats": False,
        **options,
    }
    torch.set_num_threads(1)  # Threads that wait for each other crawl where other work runs too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if in_process else "1")
        if kernels:
            patch.setenv("EIGEN_KERNELS", kernels)
        if settings.get("tensor_parallel_size", 1) == 1:
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if in_process:
            start_quickly(patch)
        llm = LLM(str(model), dtype=dtype, **settings)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


def start_quickly(patch: pytest.MonkeyPatch) -> None:
    """Spare an engine in this process what costs most of its start, until `patch` ends.

    vLLM collects garbage eight times a start, each time over every imported module; objects that
    exist by now are left out of that. It also inspects model classes in a process of its own, so
    that CUDA stays untouched here; that process imports torch and vLLM once more.
    """
    gc.freeze()
    patch.setattr(gc, "freeze", lambda: None)
    patch.setattr(gc, "unfreeze", lambda: None)
    patch.setattr(
        "vllm.model_executor.models.registry._run_in_subprocess", lambda inspect: inspect()
    )


@dataclass(frozen=True)
class Answer:
    """One request's result.

    Attributes:
        tokens: generated tokens.
        logits: [len(tokens), vocabulary], those the tokens were picked from.
        cached: prompt tokens that came from the prefix cache.
    """

    tokens: list[int]
    logits: torch.Tensor
    cached: int


def ask(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int | Sequence[int],
    logits: bool,
    **options: Any,
) -> list[Answer]:
    """Greedy answers of so many tokens to prompts of token ids, batched as the engine likes."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    lengths = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
    params = [
        SamplingParams(
            temperature=0, max_tokens=length, ignore_eos=True, logprobs=-1 if logits else None
        )
        for length in lengths
    ]
    inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
    answers = []
    for result in llm.generate(inputs, params, use_tqdm=False, **options):
        rows = [
            [row[token].logprob for token in range(len(row))]
            for row in (result.outputs[0].logprobs or [])
        ]
        answers.append(
            Answer(list(result.outputs[0].token_ids), torch.tensor(rows), result.num_cached_tokens)
        )
    return answers


def metric(llm: Any, name: str) -> float:
    """Current value of one of vLLM's counters."""
    return float(sum(item.value for item in llm.get_metrics() if item.name == name))


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of random token ids, one of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 2000, (length,), generator=generator).tolist() for length in lengths]


def expected_logits(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """What a transformers model gives where the engine picked `tokens`: [tokens, vocabulary]."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits[0, len(prompt) - 1 :]
    return logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference relative to the norm of the expected, the worst row."""
    difference = torch.linalg.vector_norm(found.double() - expected.double(), dim=-1)
    return float((difference / torch.linalg.vector_norm(expected.double(), dim=-1)).max())


def check(
    model: Any,
    asked: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    limit: float = LOGIT_LIMIT,
    flipped: float = 0.0,
) -> None:
    """Compare every logit with a transformers model's.

    Args:
        limit: most relative error of a prompt.
        flipped: if given, what two of the prompts, which may share a prefix, may have instead: a
            latent next to the border of two codes may get the other one.
    """
    errors = [
        relative_error(answer.logits, expected_logits(model, prompt, answer.tokens))
        for prompt, answer in zip(asked, answers, strict=True)
    ]
    beyond = [error for error in errors if not error < limit]
    assert len(beyond) <= (2 if flipped else 0), (
        f"errors of prompts of {[len(p) for p in asked]}: {errors}"
    )
    assert all(error < flipped for error in beyond), f"errors: {errors}"


def cached_bytes(folder: Path, element_bytes: int) -> int:
    """Cached bytes a token by the checkpoint's config."""
    from vllm_eigen.checkpoint.config import parse_config

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return parse_config(config).bytes_per_token(element_bytes)
