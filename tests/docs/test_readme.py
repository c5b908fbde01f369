# SPDX-License-Identifier: Apache-2.0
"""The commands of README.md are known: its bash blocks are parsed.

`make` and `pip install` would build an environment, so their targets and extras must exist. Those
of `vllm-eigen` are run by `tests/packaging/test_readme_lines.py`, with the installed wheel.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    words
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if (words := shlex.split(line, comments=True))
]


def test_every_line_is_known() -> None:
    assert {words[0] for words in LINES} == {"make", "pip", "vllm-eigen", "curl"}


@pytest.mark.parametrize("target", [words[1] for words in LINES if words[0] == "make"])
def test_make_targets_exist(target: str) -> None:
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"\.\[([\w,]+)\]", README)
    assert named
    extras = {extra for group in named for extra in group.split(",")}
    assert extras <= set(project["optional-dependencies"])
