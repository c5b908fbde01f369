# SPDX-License-Identifier: Apache-2.0
"""Result files: written whole or not at all, with the command and machine they come from."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_eigen.common import provenance
from vllm_eigen.common.errors import InputError
from vllm_eigen.common.files import atomic_file


def collect_provenance() -> dict[str, Any]:
    """Command line, versions, machine and source revision of this process, JSON-ready."""
    return provenance.collect(["vllm-eigen", *sys.argv[1:]])


def write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        OutputError: the file system refuses.
    """
    with atomic_file(path) as work:
        work.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file.

    Raises:
        OutputError: the file system refuses.
    """
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows that all have the columns of the first.

    Raises:
        OutputError: the file system refuses.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path) -> dict[str, Any]:
    """A result written before.

    Raises:
        InputError: it cannot be read, or is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"result {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is no result of a benchmark: it holds no JSON object")
    return found
