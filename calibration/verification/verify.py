# SPDX-License-Identifier: Apache-2.0
"""Serve a checkpoint in the installed vLLM and compare with its offline reference.

The engine runs first and ends, then the reference is loaded, so that never both are in memory.
Logits are compared where the engine picked a token: those of the tokens that it found likeliest.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_eigen.calibration.evaluation.engine import start_engine
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.calibration.verification import tasks as asked
from vllm_eigen.calibration.verification.tasks import Task, tasks
from vllm_eigen.checkpoint.config import EigenConfig, read_config
from vllm_eigen.checkpoint.estimate import Estimate, estimate
from vllm_eigen.checkpoint.validate import validate
from vllm_eigen.common.errors import EngineError, InputError
from vllm_eigen.common.progress import Reporter

LOGITS = 20
"""Logits compared at a position."""
CAPACITY_LIMIT = 0.02
"""Most relative difference of the capacity from the one foretold."""
LIMITS = 0.01, 0.15
"""Most relative error of logits in float32, at half of the positions and at the worst. A latent
next to the border of two codes may get the other one, which moves a position further."""
ROUNDING = 3.0
"""In another type the engine may be off by this many times what rounding moves the reference."""

State = Literal["ok", "wrong", "not run"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: `not run` says nothing about the checkpoint.
        found: in a few words.
        values: the numbers behind them.
    """

    name: str
    state: State
    found: str
    values: dict[str, float]


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        architecture: of the checkpoint.
        eigen: its `eigen` section.
        dtype: that the engine computed in.
        max_model_len, pool_bytes: of the engine.
        checks: in the order of running.
    """

    architecture: str
    eigen: EigenConfig
    dtype: str
    max_model_len: int
    pool_bytes: int
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.state != "wrong" for check in self.checks)


@dataclass(frozen=True)
class Answer:
    """What the engine generated after one prompt.

    Attributes:
        prompt, tokens: ids.
        logits: of each generated token, the likeliest tokens' logits by id.
        cached: tokens of the prompt that came from the prefix cache.
    """

    prompt: list[int]
    tokens: list[int]
    logits: list[dict[int, float]]
    cached: int


@dataclass(frozen=True)
class Ran:
    """A task's answers, and the preemptions meanwhile."""

    task: Task
    answers: list[Answer]
    preemptions: int


def verify(folder: Path, *, dtype: str, device: torch.device, reporter: Reporter) -> Verification:
    """Run all checks of the checkpoint in `folder`.

    Args:
        dtype: that the engine computes in, as vLLM's `--dtype`.
        device: of the reference, which computes in float32.

    Raises:
        CheckpointError, InputError: the checkpoint is damaged or too short.
        EngineError: vLLM is missing, or does not serve it.
    """
    validate(folder)
    config, eigen = read_config(folder)
    longest = estimate(config, 1 << 60, stored_bytes=0).max_model_len
    length = min(longest, asked.MIXED_LENGTH if eigen.kept_layers else asked.LENGTH)
    if length < asked.SHORTEST:
        raise InputError(f"{folder}: it has {longest} positions; {asked.SHORTEST} are needed")
    bos = config.get("bos_token_id")
    todo = tasks(length, int(config["vocab_size"]), bos if isinstance(bos, int) else None)
    reporter.stage("start vLLM", 1)
    pool = _pool(config, dtype, length)
    with start_engine(
        folder,
        dtype=dtype,
        max_model_len=length,
        kv_cache_memory_bytes=pool,
        block_size=asked.BLOCK,
        max_num_batched_tokens=asked.CHUNK,
        max_num_seqs=asked.SEQUENCES,
        enable_prefix_caching=True,
        enforce_eager=True,
        logprobs_mode="raw_logits",
        disable_log_stats=False,
        use_tqdm_on_load=False,
        seed=0,
    ) as engine:
        found = str(engine.dtype)
        checks = [_capacity(engine, _foretold(config, found, pool, length, engine.in_flight))]
        reporter.stage("vLLM", len(todo))
        ran = [_run(engine, task, reporter) for task in todo]
    reporter.stage("reference", len(ran))
    model = load_reference(folder, device)
    errors, rounded = [], []
    for item in ran:
        errors.append(_measure(model, item, found))
        reporter.step()
        rounded.append(errors[-1][1])
    limits = _limits(rounded)
    checks += [_judge(item, off, limits) for item, (off, _) in zip(ran, errors, strict=True)]
    architecture = str(config["architectures"][0])
    return Verification(architecture, eigen, found, length, pool, checks)


def _foretold(
    config: dict[str, Any], dtype: str, pool: int, length: int, in_flight: int
) -> Estimate:
    """What `vllm-eigen estimate` says of a pool; no weights are counted."""
    return estimate(
        {**config, "dtype": dtype},
        pool,
        max_model_len=length,
        block_size=asked.BLOCK,
        in_flight=in_flight,
        stored_bytes=0,
    )


def _pool(config: dict[str, Any], dtype: str, length: int) -> int:
    """Bytes of `POOL` sequences of full length."""
    if dtype == "auto":
        dtype = "bfloat16"  # or another of two bytes: vLLM reads float32 models so, too
    large = 1 << 60
    sequences = _foretold(config, dtype, large, length, asked.CHUNK).compressed.sequences
    return math.ceil(asked.POOL * large / sequences)


def _capacity(engine: Any, foretold: Estimate) -> Check:
    """vLLM's own count of full-length sequences against the estimate's."""
    found, expected = float(engine.max_concurrency), foretold.compressed.sequences
    good = abs(found - expected) <= CAPACITY_LIMIT * expected
    return Check(
        "capacity",
        "ok" if good else "wrong",
        f"{found:.3f} sequences of {foretold.max_model_len:,}; foretold {expected:.3f}",
        {"sequences": found, "foretold": expected},
    )


def _run(engine: Any, task: Task, reporter: Reporter) -> Ran:
    """Ask the engine one task."""
    for prompt in task.first:
        _ask(engine, [prompt], 1)
    before = engine.counter("vllm:num_preemptions")
    answers = _ask(engine, task.prompts, task.tokens)
    reporter.step()
    return Ran(task, answers, int(engine.counter("vllm:num_preemptions") - before))


def _ask(engine: Any, prompts: Sequence[list[int]], tokens: int) -> list[Answer]:
    try:
        outputs = engine.generate(
            prompts,
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            logprobs=LOGITS,
            detokenize=False,
        )
    except Exception as error:
        raise EngineError(f"vLLM failed: {error}") from error
    return [
        Answer(
            list(prompt),
            list(output.outputs[0].token_ids),
            [
                {token: float(entry.logprob) for token, entry in row.items()}
                for row in output.outputs[0].logprobs
            ],
            int(output.num_cached_tokens or 0),
        )
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def _measure(model: Any, ran: Ran, dtype: str) -> tuple[list[float], list[float]]:
    """Errors of a task's logits, and in another type than float32 what rounding moves them."""
    found, rounded = [], []
    for answer in ran.answers:
        expected = _logits(model, answer)
        found += list(_errors(answer.logits, expected))
        if dtype != "float32":
            with _rounding(model, getattr(torch, dtype)):
                moved = _logits(model, answer)
            rows = [
                dict(zip(row, moved[place, list(row)].tolist(), strict=True))
                for place, row in enumerate(answer.logits)
            ]
            rounded += list(_errors(rows, expected))
    return found, rounded


def _limits(rounded: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Most error at half of the positions and at the worst, of all tasks: some have few positions.

    Args:
        rounded: of each task, what rounding moves the reference.
    """
    middle, worst = LIMITS
    tasks_rounded = [task for task in rounded if task]
    if tasks_rounded:
        middle += ROUNDING * max(statistics.median(task) for task in tasks_rounded)
        worst += ROUNDING * max(max(task) for task in tasks_rounded)
    return middle, worst


def _judge(ran: Ran, found: Sequence[float], limits: tuple[float, float]) -> Check:
    """A task's errors against the limits, and what else was to happen."""
    middle, worst = statistics.median(found), max(found)
    middle_limit, worst_limit = limits
    values: dict[str, float] = {
        "positions": len(found),
        "median_error": middle,
        "median_limit": middle_limit,
        "worst_error": worst,
        "worst_limit": worst_limit,
    }
    text = f"{len(found)} positions"
    state: State = "ok" if middle <= middle_limit and worst <= worst_limit else "wrong"
    name = ran.task.name
    if name == asked.PREFIX:
        cached = sum(answer.cached for answer in ran.answers)
        values["cached_tokens"] = cached
        text = f"{cached:,} tokens"
        state = state if cached else "wrong"
    if name == asked.PREEMPTION:
        values["preemptions"] = ran.preemptions
        text = f"{ran.preemptions} times"
        # Logits that are right say nothing about what did not happen.
        state = "not run" if state == "ok" and not ran.preemptions else state
    text += f"; error {middle:.1e} of {middle_limit:.1e}, worst {worst:.1e}"
    return Check(name, state, text, values)


def _logits(model: Any, answer: Answer) -> torch.Tensor:
    """The reference's logits [tokens, vocabulary] where the engine picked its tokens."""
    ids = torch.tensor([[*answer.prompt, *answer.tokens[:-1]]], device=model.device)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits[0, len(answer.prompt) - 1 :].cpu()
    return found


def _errors(found: Sequence[dict[int, float]], expected: torch.Tensor) -> Iterator[float]:
    """Norm of the difference relative to the norm of the reference's logits, a position each."""
    for row, logits in zip(found, expected, strict=True):
        wanted = logits[list(row)].double()
        difference = torch.tensor(list(row.values()), dtype=torch.float64) - wanted
        error = float(difference.norm() / wanted.norm())
        yield error if math.isfinite(error) else math.inf


@contextlib.contextmanager
def _rounding(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """While open, what every module gives is rounded to a type, as an engine of that type does."""

    def rounded(module: Any, arguments: Any, output: Any) -> Any:
        return output.to(dtype).to(output.dtype) if torch.is_tensor(output) else output

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_hook(rounded).remove)
        yield
