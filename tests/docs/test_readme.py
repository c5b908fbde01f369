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


def test_the_system_packages_that_errors_name_are_in_the_readme() -> None:
    """And the Makefile and CONTRIBUTING name the same."""
    named = re.compile(r"apt install ((?:[\w+.-]+ ){2,}[\w+-]+)")
    lines = [(ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "Makefile")]
    found = [set(match[1].split()) for text in lines if (match := named.search(text))]
    assert found == [{"g++", "make", "python3-dev", "python3-venv", "libnuma1"}] * 3
    code = "".join(path.read_text() for path in (ROOT / "server" / "launch").glob("*.py"))
    errors = set(re.findall(r"apt install ([a-z0-9+]+)", code))
    assert errors == {"g++", "libnuma1"}  # and python3.x-dev, by its version
    assert errors <= found[0]
