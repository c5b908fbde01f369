# SPDX-License-Identifier: Apache-2.0
"""The one exception tree of the project.

    EigenError                    anything the user can act on
    ├── UsageError                an argument is missing, out of range or contradicts another
    ├── InputError                a model or text given as input cannot be used
    │   └── UnsupportedModelError an architecture the project has no description for
    ├── CheckpointError           an Eigen checkpoint is damaged, edited or of another version
    ├── OutputError               a result cannot be written
    ├── KernelError               a kernel cannot be built or does not cover the case asked for
    ├── InstallError              a package, library or compiler is missing or broken
    └── EngineError               vLLM is missing, of an unsupported version, or failed

Every message is one line that says what is wrong, where, and what to do next. Commands print it
and exit with `exit_code`; a traceback from one of these is a bug.
"""

from __future__ import annotations


class EigenError(Exception):
    """Base of all errors a user can act on."""

    exit_code = 1


class UsageError(EigenError):
    """An argument is missing, out of range, or contradicts another."""

    exit_code = 2


class InputError(EigenError):
    """A model or a text given as input cannot be used."""


class UnsupportedModelError(InputError):
    """The model's architecture has no description in `vllm_eigen.checkpoint.families`."""


class CheckpointError(EigenError):
    """An Eigen checkpoint is damaged, edited, or written by another format version."""


class OutputError(EigenError):
    """A result cannot be written: it exists already, or the disk refuses it."""


class KernelError(EigenError):
    """A kernel cannot be built here, or does not cover the case asked for."""


class InstallError(EigenError):
    """A package, a library or a compiler that the command needs is missing or broken."""


class EngineError(EigenError):
    """vLLM is missing, of an unsupported version, or failed to start."""


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of a foreign error's message, or its class name, to quote in one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]
