# SPDX-License-Identifier: Apache-2.0
"""The documentation builds without a warning, is complete, and names files that exist."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from vllm_eigen import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FOLDERS = "vllm_eigen|calibration|server|benchmarks|tests|docker|demo|docs|examples"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")
COMMANDS = sorted(entry.name for entry in entry_points(group=cli.GROUP))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_figures_are_in_the_page(site: Path) -> None:
    concepts = (site / "concepts" / "index.html").read_text(encoding="utf-8")
    assert concepts.count('<svg class="drawn"') == 2


def test_results_are_in_the_site(site: Path) -> None:
    for path in (ROOT / "benchmarks" / "results").rglob("*.md"):
        assert (site / "measurements" / path.stem / "index.html").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_reference_has_every_option(
    command: str, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (site / "cli" / "index.html").read_text(encoding="utf-8")
    helps = [[command]]
    for words in helps:  # grows by the subcommands of `bench`
        with contextlib.suppress(SystemExit):
            cli.main([*words, "--help"])
        shown = capsys.readouterr().out
        if words == ["bench"]:
            helps += [
                [command, name] for name in re.findall(r"^    ([\w-]+)  ", shown, re.MULTILINE)
            ]
            assert len(helps) > 3
        name = " ".join(["vllm-eigen", *words])
        assert f"<code>{name}</code>" in page
        section = page.split(f"<code>{name}</code>")[1].split("<code>vllm-eigen")[0]
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown))
        assert {option for option in options - {"--help"} if option not in section} == set()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_commands_have_these_options(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for words in [shlex.split(line, comments=True) for line in lines]:
        if words[:1] != ["vllm-eigen"] or words[1] == "serve":  # that takes vLLM's flags
            continue
        named = words[1:3] if words[1] == "bench" else words[1:2]
        with contextlib.suppress(SystemExit):
            cli.main([*named, "--help"])
        shown = capsys.readouterr().out
        ours = words[: words.index("--")] if "--" in words else words
        for option in [word.partition("=")[0] for word in ours if word.startswith("--")]:
            assert option in shown, " ".join(words)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(PATH.findall(text))
    named |= set(re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", text))
    base = page.parent
    named.discard("cli.md")  # generated
    missing = [name for name in named if not ((ROOT / name).exists() or (base / name).exists())]
    assert missing == []
