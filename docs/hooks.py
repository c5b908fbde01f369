# SPDX-License-Identifier: Apache-2.0
"""What `mkdocs build` adds to the pages of this folder (`hooks` in mkdocs.yml).

- `cli.md`, rendered from the argparse parsers;
- `measurements/`, the tables and plots of `benchmarks/results`; links to that folder lead there;
- figures in the page itself, so that they follow the light and dark scheme.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cli_reference import render
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = re.compile(r'<img alt="[^"]*" src="(?:\.\./)*(figures/[\w-]+\.svg)"\s*/?>')
LINK = re.compile(r"\]\((?:\.\./)*benchmarks/results/(?:\w+/)*([\w.-]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "cli.md", content=render()))
    for path in sorted(RESULTS.rglob("*.*")):
        name = f"measurements/{path.name}"
        if path.suffix in (".md", ".png", ".csv", ".json"):
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted(RESULTS.rglob("attention-*.json")):
        if ".provenance" not in path.name and not path.with_suffix(".md").exists():
            content = attention_page(path)
            files.append(File.generated(config, f"measurements/{path.stem}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to result files to their copies in the site."""
    here = "" if page.file.src_uri.startswith("measurements/") else "measurements/"
    return LINK.sub(rf"]({here}\1)", markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Put the drawn figures into the page."""

    def figure(match: re.Match[str]) -> str:
        drawing = (ROOT / "docs" / match[1]).read_text(encoding="utf-8")
        return f'<span class="figure">{drawing}</span>'

    return FIGURE.sub(figure, html)


def attention_page(path: Path) -> str:
    """The rows of a kernel benchmark as a table."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    record = json.loads(path.with_suffix(".provenance.json").read_text(encoding="utf-8"))
    about = f"`{record['command']}`, {record['date'][:10]}, commit {record['commit']}, "
    about += f"{record['cpu']}, kernels `{record['isa']}`."
    columns = ("heads", "kv_heads", "rank_k", "rank_v", "key_mode", "phase", "context", "batch")
    columns += ("dtype", "threads", "pairs", "vllm_ms", "eigen_ms", "speedup", "relative_error")
    lines = [f"# Attention kernels, {path.stem}", "", about, "", "| " + " | ".join(columns) + " |"]
    lines.append("|---" * len(columns) + "|")
    lines += ["| " + " | ".join(_cell(row.get(key, "")) for key in columns) + " |" for row in rows]
    return "\n".join([*lines, "", f"![plot]({path.stem}.png)", ""])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
