"""Trains the small Llama of the demonstration from scratch, tokenizer included, in a given time.

Reads `demo.corpus`, trains what `demo.architecture` builds, and writes a folder that calibration
and server use as any other Hugging Face model (`demo.model_folder`). One processor core and under
an hour are enough.

Usage: python -m demo.train --output DIR --minutes M --seed S --threads T [--start-from DIR]
"""

import argparse
import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from demo import corpus, model_folder
from demo.architecture import MAX_POSITIONS, build_model, pack, train_tokenizer

# (share of the time from which it holds, sequence lengths taken in turn): short sequences are fast,
# the last phase makes every position work.
LENGTHS = ((0.0, (256,)), (0.55, (512,)), (0.85, (2048, 512)))
CONTINUED_LENGTHS = ((0.0, (512,)), (0.8, (2048, 512)))
EVALUATION_LENGTH = 512
EVALUATION_WINDOWS = 64


@dataclass(frozen=True)
class Recipe:
    """Optimisation settings; one batch holds `batch_tokens` tokens whatever the length."""

    minutes: float
    seed: int
    threads: int
    start_from: Path | None = None
    batch_tokens: int = 2048
    peak_learning_rate: float = 3e-3
    final_share: float = 0.02  # of the peak learning rate
    warmup_share: float = 0.03  # of the time
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    evaluation_seconds: float = 90.0
    checkpoint_seconds: float = 600.0

    def learning_rate(self, elapsed_share: float) -> float:
        """Linear warm-up, then a cosine; `elapsed_share` is the share of the time gone."""
        if elapsed_share < self.warmup_share:
            return self.peak_learning_rate * max(elapsed_share / self.warmup_share, 0.01)
        rest = min((elapsed_share - self.warmup_share) / (1 - self.warmup_share), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * rest))
        return self.peak_learning_rate * (self.final_share + (1 - self.final_share) * cosine)


def loss(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Mean cross entropy in nats of each next token of `tokens` `[batch, length + 1]`."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def perplexity(
    model: LlamaForCausalLM, tokens: Tensor, length: int, max_windows: int | None = None
) -> float:
    """Perplexity per token over disjoint windows of `length`, spread evenly over `tokens`."""
    windows = tokens.unfold(0, length + 1, length)
    if max_windows is not None:
        windows = windows[:: max(1, len(windows) // max_windows)][:max_windows]
    batches = windows.split(max(1, 4096 // length))
    total = sum(loss(model, batch).item() * len(batch) for batch in batches)
    return math.exp(total / len(windows))


def batches(tokens: Tensor, recipe: Recipe) -> Iterator[tuple[float, Tensor]]:
    """Random windows of `tokens` until the time is over, with the share of the time gone."""
    generator = torch.Generator().manual_seed(recipe.seed)
    start = time.monotonic()
    step = 0
    while (share := (time.monotonic() - start) / (60 * recipe.minutes)) < 1:
        phases = CONTINUED_LENGTHS if recipe.start_from else LENGTHS
        lengths = next(taken for since, taken in reversed(phases) if share >= since)
        length = lengths[step % len(lengths)]
        count = max(1, recipe.batch_tokens // length)
        offsets = torch.randint(len(tokens) - length, (count, 1), generator=generator)
        yield share, tokens[offsets + torch.arange(length + 1)]
        step += 1


def optimizer_for(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.95), fused=True)


def train(output: Path, recipe: Recipe) -> None:
    """Train by `recipe` and leave the model folder at `output`, refreshed every few minutes."""
    torch.set_num_threads(recipe.threads)
    os.environ["RAYON_NUM_THREADS"] = str(recipe.threads)  # the tokenizer's threads
    torch.manual_seed(recipe.seed)
    texts = {split: list(corpus.documents(split)) for split in ("train", "heldout")}
    earlier: dict[str, Any] | None = None
    if recipe.start_from is None:
        tokenizer = train_tokenizer(texts["train"])
        model = build_model(tokenizer)
    else:
        tokenizer, model, earlier = model_folder.load(recipe.start_from)
    packed = {split: pack(tokenizer, documents) for split, documents in texts.items()}
    optimizer = optimizer_for(model, recipe)
    log: list[dict[str, Any]] = []
    shown = output.name if output.is_absolute() else output
    facts: dict[str, Any] = {
        "command": f"python -m demo.train --output {shown} --minutes {recipe.minutes:g} "
        f"--seed {recipe.seed} --threads {recipe.threads}"
        + (f" --start-from {recipe.start_from.name}" if recipe.start_from else ""),
        **model_folder.environment(),
        "recipe": {name: value for name, value in vars(recipe).items() if name != "start_from"},
        **({"earlier_run": earlier} if earlier else {}),
        "corpus": {split: _describe(texts[split], packed[split]) for split in texts},
        "parameters": model.num_parameters(),
    }

    def save(tokens_seen: int, minutes: float) -> None:
        results = {
            f"perplexity_windows_{length}": round(perplexity(model, packed["heldout"], length), 4)
            for length in (EVALUATION_LENGTH, MAX_POSITIONS)
        }
        progress = {"tokens_seen": tokens_seen, "minutes_trained": round(minutes, 2)}
        model_folder.save(output, model, tokenizer, log, facts | progress | {"heldout": results})

    start = time.monotonic()
    next_evaluation, next_checkpoint = 0.0, recipe.checkpoint_seconds
    tokens_seen = 0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=1.0)
        for step, (share, batch) in enumerate(batches(packed["train"], recipe)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(share)
            value = loss(model, batch)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            tokens_seen += batch[:, 1:].numel()
            elapsed = time.monotonic() - start
            if elapsed >= next_evaluation:
                next_evaluation = elapsed + recipe.evaluation_seconds
                heldout = perplexity(
                    model, packed["heldout"], EVALUATION_LENGTH, EVALUATION_WINDOWS
                )
                row = {
                    "seconds": round(elapsed),
                    "step": step,
                    "tokens": tokens_seen,
                    "sequence_length": batch.shape[1] - 1,
                    "learning_rate": round(recipe.learning_rate(share), 7),
                    "train_loss": round(value.item(), 4),
                    "heldout_perplexity": round(heldout, 3),
                }
                log.append(row)
                progress.console.print_json(data=row, indent=None)
                progress.update(bar, completed=share, description=f"perplexity {heldout:.2f}")
            if elapsed >= next_checkpoint:
                next_checkpoint = elapsed + recipe.checkpoint_seconds
                save(tokens_seen, elapsed / 60)
    save(tokens_seen, (time.monotonic() - start) / 60)


def _describe(documents: Sequence[str], tokens: Tensor) -> dict[str, Any]:
    text = "\n\n\n".join(documents).encode("ascii")
    return {
        "documents": len(documents),
        "bytes": len(text),
        "tokens": len(tokens),
        "sha256": hashlib.sha256(text).hexdigest(),
    }


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Train the demo model from scratch.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start-from", type=Path, help="model folder whose training goes on")
    given = parser.parse_args()
    train(given.output, Recipe(given.minutes, given.seed, given.threads, given.start_from))


if __name__ == "__main__":
    main()
