"""Text for the demonstration: the documentation inside installed Python source files.

First step of the demo: `demo.train` reads the `train` split, the calibration reads `calibration`,
the evaluation reads `heldout`. Nothing is downloaded or shipped; the text is whatever documentation
strings the standard library and the installed packages carry, read with `ast` (no import).

A module belongs to exactly one split, chosen by a hash of its name, so the calibration and held-out
documents come from modules the model never saw; documents copied between modules (common in
transformers) stay in one split only.

Usage: python -m demo.corpus --split heldout --output FILE --max-bytes N
"""

import argparse
import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from vllm_eigen.files import atomic_file

STDLIB = "stdlib"
# Sure to be installed wherever the plugin runs, and enough for calibration and evaluation.
EVALUATION_SOURCES = (STDLIB, "torch", "transformers")
# Further permissively licensed packages vLLM brings along; those not installed are skipped.
TRAINING_SOURCES = (
    *EVALUATION_SOURCES,
    *("vllm", "numpy", "networkx", "numba", "huggingface_hub", "compressed_tensors", "pydantic"),
    *("openai", "fastapi", "starlette", "aiohttp", "requests", "urllib3", "httpx", "click", "rich"),
    *("jinja2", "jsonschema", "pip", "websockets", "fsspec", "PIL", "psutil"),
)
SPLITS = ("heldout", "calibration", "train")  # each leaves out what those before it hold
HELDOUT_PERCENT = CALIBRATION_PERCENT = 3

_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "testing", "_vendor"}
_MIN_CHARACTERS = 160
_MIN_PROSE_SHARE = 0.82
_MIN_COMMON_WORDS = 0.12
_MAX_COPIED_SHARE = 0.5
_COMMON_WORDS = frozenset(
    (
        *("a", "an", "and", "are", "as", "at", "be", "by", "can", "for", "from", "has", "if", "in"),
        *("is", "it", "not", "of", "on", "or", "that", "the", "this", "to", "used", "when"),
        *("which", "will", "with", "you"),
    )
)
_LICENCE = re.compile(r"copyright|licen[cs]ed? (under|is)|warrant(y|ies)|all rights reserved", re.I)
_ROLE = re.compile(r":[a-z]+(?::[a-z]+)*:`[~!]?([^`<]*?)(?:\s*<[^>`]*>)?`")
_FENCE = re.compile(r"^[ ]*```.*?(?:^[ ]*```[ ]*$|\Z)", re.M | re.S)
_ASCII = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u00a0", "''\"\"-- ") | {0x2026: "..."}
_DOCTEST = re.compile(r"^[ ]*>>>.*\n?(?:[ ]*\S.*\n?)*", re.M)
_DIRECTIVE = re.compile(r"^[ ]*\.\. .*\n?", re.M)
_TRAILING_HEADING = re.compile(r"\n(?:Examples?|Usage)\b[^\n]*(?:\n-+)?\s*\Z")
_BLANK_LINES = re.compile(r"\n\s*\n+")


def documents(split: str, sources: Iterable[str] | None = None) -> Iterator[str]:
    """Yield the documents of `split` (one of `SPLITS`), always in the same order on one machine.

    Documents of one module follow each other, modules come in order of their hash. `sources` are
    package names or `"stdlib"`; by default `TRAINING_SOURCES` for the training split and
    `EVALUATION_SOURCES` for the two others. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if sources is None:
        sources = TRAINING_SOURCES if split == "train" else EVALUATION_SOURCES
    elsewhere: set[int] = set()
    for other in SPLITS[: SPLITS.index(split)]:
        for document in _documents(other, EVALUATION_SOURCES, set()):
            elsewhere.update(map(hash, document.split("\n\n")))
    yield from _documents(split, sources, elsewhere)


def write(split: str, path: Path, max_bytes: int) -> int:
    """Write whole documents of `split`, up to `max_bytes`, parted by two blank lines, to `path`.

    The file appears complete or not at all. Returns the number of bytes written.
    """
    pieces: list[str] = []
    size = 0
    for document in documents(split):
        piece = document + "\n\n\n"
        if size + len(piece) > max_bytes:
            break
        pieces.append(piece)
        size += len(piece)
    with atomic_file(path) as work:
        work.write_text("".join(pieces), encoding="ascii")
    return size


def source_root(source: str) -> Path | None:
    """The directory with the source files of `source`, None when it is not installed."""
    if source == STDLIB:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(source)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _documents(split: str, sources: Iterable[str], seen: set[int]) -> Iterator[str]:
    """Documents of the modules of `split` that are not mostly `seen` paragraphs (hashes)."""
    files = (item for source in sources for item in _modules(source))
    chosen = sorted((_digest(name), name, path) for name, path in files if _split(name) == split)
    for _, _, path in chosen:
        for text in _strings(path):
            document = _clean(text)
            if _reads_as_prose(document) and not _mostly_copied(document, seen):
                yield document


def _modules(source: str) -> Iterator[tuple[str, Path]]:
    """Every (module name, file) below `source`."""
    root = source_root(source)
    if root is None:
        return
    for directory, children, files in os.walk(root):
        children[:] = sorted(set(children) - _SKIPPED_DIRECTORIES)
        for file in files:
            if file.endswith(".py"):
                path = Path(directory, file)
                parts = path.relative_to(root).with_suffix("").parts
                yield ".".join(parts if source == STDLIB else (source, *parts)), path


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _split(module: str) -> str:
    percentile = _digest(module) % 100
    if percentile < HELDOUT_PERCENT:
        return "heldout"
    return "calibration" if percentile < HELDOUT_PERCENT + CALIBRATION_PERCENT else "train"


def _strings(path: Path) -> Iterator[str]:
    """String literals of a source file in source order; f-strings left out.

    Not only docstrings: torch attaches much of its documentation by calls, and the standard library
    keeps the language reference in a dictionary.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    found: list[tuple[int, int, str]] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if len(node.value) >= _MIN_CHARACTERS:
                found.append((node.lineno, node.col_offset, node.value))
        elif not isinstance(node, ast.JoinedStr):
            waiting.extend(ast.iter_child_nodes(node))
    for _, _, text in sorted(found):
        yield text


def _clean(text: str) -> str:
    """Dedent, drop examples of code and reST markup, and leave single blank lines."""
    text = inspect.cleandoc(text).replace("\r", "").translate(_ASCII)
    for pattern in (_FENCE, _DOCTEST, _DIRECTIVE):
        text = pattern.sub("", text)
    text = _ROLE.sub(r"`\1`", text).replace("``", "`")
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return _TRAILING_HEADING.sub("", _BLANK_LINES.sub("\n\n", text).strip())


def _reads_as_prose(document: str) -> bool:
    """True for ASCII English of some length that is not mainly code, tables or a licence."""
    if len(document) < _MIN_CHARACTERS or not document.isascii() or _LICENCE.search(document):
        return False
    if not all(character.isprintable() or character == "\n" for character in document):
        return False
    visible = [character for character in document if not character.isspace()]
    if sum(map(str.isalpha, visible)) < _MIN_PROSE_SHARE * len(visible):
        return False
    words = document.lower().split()
    return sum(word in _COMMON_WORDS for word in words) >= _MIN_COMMON_WORDS * len(words)


def _mostly_copied(document: str, seen: set[int]) -> bool:
    """True when most of `document` is paragraphs already in `seen`; adds its paragraphs there."""
    paragraphs = document.split("\n\n")
    copied = sum(len(paragraph) for paragraph in paragraphs if hash(paragraph) in seen)
    seen.update(map(hash, paragraphs))
    return copied > _MAX_COPIED_SHARE * len(document)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write one split of the demo corpus to a file.")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-bytes", type=int, default=1_000_000)
    arguments = parser.parse_args()
    size = write(arguments.split, arguments.output, arguments.max_bytes)
    print(f"{arguments.output}: {size} bytes")


if __name__ == "__main__":
    main()
