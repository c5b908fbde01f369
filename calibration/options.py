# SPDX-License-Identifier: Apache-2.0
"""What a calibration is asked for, and the checks that need neither model nor text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.calibration.methods import DEFAULT
from vllm_eigen.calibration.preference import Preference
from vllm_eigen.calibration.target import Target
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.common.errors import UsageError
from vllm_eigen.common.files import check_free

if TYPE_CHECKING:
    from vllm_eigen.calibration.model.text import Corpus


HELD_OUT = 8
"""Windows of the text kept from calibration for the numbers in the model card."""


@dataclass(frozen=True)
class Options:
    """What a calibration is asked for.

    Attributes:
        model: folder or hub id.
        output: folder to make.
        target: the size of the KV cache.
        corpus: reads the text; called once the model is known to be usable.
        provenance: the record of this process, without its results.
        samples: windows to calibrate on.
        length: tokens a window; cut to the most the model takes.
        method, key_mode, head_group: the method's name and, if not None, other than its own
            key-cache mode and number of KV heads to a latent head.
        prefer: which key-cache mode is the model's own, where `key_mode` is None.
        refit: fit the output projections to the compressed heads; None for the method's default.
        revision: of a hub model: branch, tag or commit.
        bases_only: write the bases alone, to be applied over the untouched base model.
        resume: continue from what an interrupted run with the same options left.
        memory_limit: bytes of activations kept in memory; None for the default.
    """

    model: str
    output: Path
    target: Target
    corpus: Callable[[], Corpus]
    provenance: dict[str, Any]
    samples: int = 128
    length: int = 2048
    seed: int = 0
    method: str = DEFAULT
    key_mode: KeyMode | None = None
    prefer: Preference = Preference.MEMORY
    head_group: int | None = None
    device: str = "auto"
    refit: bool | None = None
    revision: str | None = None
    bases_only: bool = False
    overwrite: bool = False
    resume: bool = False
    memory_limit: int | None = None

    def check(self) -> None:
        """Refuse what cannot work before any work is done.

        Raises:
            UsageError: an argument is out of range or contradicts another.
            OutputError: the output exists.
        """
        self.target.check()
        if self.method == "coded":
            self.target.ratio_of_coded()
            if self.refit:
                raise UsageError(
                    "--refit fits projections to dropped ranks; choose --method sensitivity or "
                    "paper for it"
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
