"""What the engine tests share: models on disk, a bounded engine, logits from vLLM and torch."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.methods.base import Basis, LayerBases, tail_loss
from calibration.source import open_source
from calibration.write import eigen_config, write_checkpoint
from vllm_eigen.checkpoint import LayerRanks

DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"
POOL_BYTES = 64 << 20
MAX_MODEL_LEN = 2048
LOGIT_LIMIT = 1e-4
"""Most relative error of logits in float32."""


def write_base(family: str, folder: Path, dtype: torch.dtype) -> Path:
    """A base model: the shipped Llama, or a random OPT with the same tokenizer."""
    from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

    build: Any = AutoModelForCausalLM
    if family == "llama":
        model: Any = build.from_pretrained(DEMO, dtype=dtype)
    else:
        torch.manual_seed(0)
        config = OPTConfig(
            vocab_size=2048,
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
        model = OPTForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder


def calibrate(base: Path, folder: Path, text: Path, kv_ratio: float, *options: str) -> Path:
    """An Eigen checkpoint, made with the real command on little text."""
    from vllm_eigen import cli

    arguments = ["calibrate", str(base), "--output", str(folder), "--text", str(text)]
    arguments += ["--kv-ratio", str(kv_ratio), "--samples", "16", "--seq-len", "256", "--quiet"]
    assert cli.main([*arguments, *options]) == 0
    return folder


class _Whole(Basis):
    """A basis that turns its heads even at full rank, where calibration takes the identity."""

    def at(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder[:, :, :rank], self.decoder[:, :rank, :]


def turned(base: Path, folder: Path) -> Path:
    """A full-rank Eigen checkpoint whose heads are rotated at random: same model, other latents."""
    source = open_source(str(base))
    heads, size = source.geometry.num_kv_heads, source.geometry.head_size
    generator = torch.Generator().manual_seed(0)

    def basis() -> Basis:
        noise = torch.randn(heads, size, size, generator=generator, dtype=torch.float64)
        encoder = torch.linalg.qr(noise)[0]
        energy = torch.ones(heads, size, dtype=torch.float64)
        return _Whole(encoder, encoder.mT.contiguous(), energy, tail_loss(energy))

    layers = [LayerRanks(rank_k=size, rank_v=size)] * source.geometry.num_layers
    eigen = eigen_config(
        source,
        layers,
        key_mode=source.family.key_modes[0],
        method="turned",
        head_group=1,
        provenance={},
    )
    write_checkpoint(source, eigen, [LayerBases(basis(), basis()) for _ in layers], folder)
    return folder


@contextlib.contextmanager
def engine(
    model: Path, dtype: str = "float32", *, in_process: bool = True, **options: Any
) -> Iterator[Any]:
    """A vLLM engine that ends with the block; logits are raw and of the whole vocabulary.

    It runs in this process, where it starts in two seconds and not in twenty; the server tests
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
        if settings.get("tensor_parallel_size", 1) == 1:
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        llm = LLM(str(model), dtype=dtype, **settings)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


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
) -> None:
    """Compare every logit with a transformers model's."""
    for prompt, answer in zip(asked, answers, strict=True):
        expected = expected_logits(model, prompt, answer.tokens)
        assert relative_error(answer.logits, expected) < limit, f"prompt of {len(prompt)} tokens"


def cached_elements(folder: Path) -> int:
    """Cached elements a token by the checkpoint's config."""
    from vllm_eigen.checkpoint import parse_config

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return parse_config(config).elements_per_token
