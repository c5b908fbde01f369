# SPDX-License-Identifier: Apache-2.0
"""Models on two tensor-parallel ranks: two processes run one engine each, one model after another.

The ranks stay for all models, so that each costs a few seconds and not the start of two workers.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.plugin.harness.engine import Answer, ask, engine
from tests.plugin.harness.rows import MAX_MODEL_LEN, Served

SECONDS = 500
LENGTHS = (5, 130)
TOKENS = 4


def word_prompts(lengths: list[int] | tuple[int, ...], seed: int) -> list[list[int]]:
    """Prompts of random ids of the tiny models' words, one of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 63, (length,), generator=generator).tolist() for length in lengths]


@dataclass(frozen=True)
class TwoRanks:
    """Answers of all models, by name, in files of this folder."""

    folder: Path

    @classmethod
    def run(cls, models: dict[str, Served], folder: Path) -> TwoRanks:
        """Serve each model on two ranks in turn; ends after `SECONDS` at the latest."""
        import torch.multiprocessing as processes

        # A store each: a rank that is ahead must not meet that of the model before. Its file's name
        # also names the ranks' shared memory, which a run that was killed leaves behind.
        table = {
            name: {
                "model": str(served.model),
                "options": served.options,
                "store": f"file://{folder}/{uuid.uuid4().hex}",
            }
            for name, served in models.items()
        }
        (folder / "models.json").write_text(json.dumps(table), encoding="utf-8")
        context = processes.start_processes(
            _rank, args=(str(folder),), nprocs=2, join=False, start_method="spawn"
        )
        try:
            ended = context.join(timeout=SECONDS)
            while not ended and any(process.is_alive() for process in context.processes):
                ended = context.join(timeout=SECONDS)
        finally:
            for process in context.processes:
                process.kill()
        return cls(folder)

    def answers(self, name: str) -> tuple[list[list[int]], list[Answer]]:
        """Prompts and the first rank's answers of one model."""
        found = torch.load(self.folder / f"{name}.pt")
        answers = [Answer(tokens, logits, 0) for tokens, logits in found]
        return word_prompts(LENGTHS, seed=10), answers


def _rank(rank: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    torch.set_num_threads(1)
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    table: dict[str, Any] = json.loads((Path(folder) / "models.json").read_text(encoding="utf-8"))
    for name, served in table.items():
        place = served["store"], rank, rank
        ExecutorWithExternalLauncher._distributed_args = lambda self, place=place: place
        with engine(
            Path(served["model"]),
            max_model_len=MAX_MODEL_LEN,
            tensor_parallel_size=2,
            distributed_executor_backend="external_launcher",
            **served["options"],
        ) as llm:
            answers = ask(llm, word_prompts(LENGTHS, seed=10), TOKENS, logits=True)
        if rank == 0:
            rows = [(answer.tokens, answer.logits) for answer in answers]
            torch.save(rows, Path(folder) / f"{name}.pt")
