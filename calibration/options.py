"""What a calibration is asked for, and the checks that need neither model nor text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.errors import UsageError
from vllm_eigen.families import KeyMode
from vllm_eigen.files import check_free

if TYPE_CHECKING:
    from calibration.text import Corpus


@dataclass(frozen=True)
class Options:
    """What a calibration is asked for.

    Attributes:
        model: folder or hub id.
        output: folder to make.
        corpus: reads the text; called once the model is known to be usable.
        kv_ratio, error_budget, ranks: exactly one is given; `ranks` is a JSON file.
        samples: windows to calibrate on.
        length: tokens a window; cut to the most the model takes.
        method, key_mode, head_group: the method's name and, if not None, other than its own
            key-cache mode and number of KV heads to a latent head.
        refit: fit the output projections to the compressed heads; None for what the method likes.
        bases_only: write the bases alone, to be applied over the untouched base model.
        resume: take up what an interrupted run with the same options left.
        provenance: the record of this process, without its results.
        spill_limit: bytes of activations kept in memory; None for the default.
    """

    model: str
    output: Path
    corpus: Callable[[], Corpus]
    provenance: dict[str, Any]
    kv_ratio: float | None = None
    error_budget: float | None = None
    ranks: Path | None = None
    samples: int = 128
    length: int = 2048
    seed: int = 0
    method: str = "paper"
    key_mode: KeyMode | None = None
    head_group: int | None = None
    device: str = "auto"
    refit: bool | None = None
    bases_only: bool = False
    overwrite: bool = False
    resume: bool = False
    spill_limit: int | None = None

    def check(self) -> None:
        """Refuse what cannot work before any work is done.

        Raises:
            UsageError: an argument is out of range or contradicts another.
            OutputError: the output exists.
        """
        if sum(item is not None for item in (self.kv_ratio, self.error_budget, self.ranks)) != 1:
            raise UsageError(
                "pass one of --kv-ratio R (e.g. 0.6), --error-budget E (e.g. 0.05), --ranks FILE"
            )
        if self.kv_ratio is not None and not 0 < self.kv_ratio <= 1:
            raise UsageError(
                f"--kv-ratio {self.kv_ratio:g} is out of range; it lies above 0 and at most 1"
            )
        if self.error_budget is not None and not 0 <= self.error_budget < 1:
            raise UsageError(
                f"--error-budget {self.error_budget:g} is out of range; it lies from 0 to below 1"
            )
        if self.refit and self.bases_only:
            raise UsageError(
                "--refit changes output projections, which --bases-only leaves to the base model; "
                "drop one of them"
            )
        for name, value, least in (
            ("--samples", self.samples, 1),
            ("--seq-len", self.length, 2),
            ("--head-group", self.head_group or 1, 1),
        ):
            if value < least:
                raise UsageError(f"{name} {value} is out of range; it is at least {least}")
        check_free(self.output, overwrite=self.overwrite)
