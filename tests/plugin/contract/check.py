# SPDX-License-Identifier: Apache-2.0
"""Whether a vLLM release has what the plugin relies on: `contract.toml` against its files.

Usage: python -m tests.plugin.contract.check VERSION            fetch its files and check them
       python -m tests.plugin.contract.check VERSION --write    set the right sides from them

`called`: we call it. Parameters may be added if they are optional, none may go or move.
`overridden`: ours is called in its place, so its parameters must be the same.
`read`: we read it, or derive from it. It must be there.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.plugin.contract.source import Source
from tests.plugin.contract.wheel import newest_version, python_files
from vllm_eigen.common.errors import EigenError
from vllm_eigen.plugin.vllm_version import minor_version

CONTRACT = Path(__file__).with_name("contract.toml")
USES = ("called", "overridden", "read")
Entries = dict[str, dict[str, str]]
"""Use -> name -> description."""


@dataclass(frozen=True)
class Difference:
    """One name that is not what the contract says."""

    name: str
    use: str
    wanted: str
    found: str | None
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.use}): {self.reason}\n"
            f"    - {self.wanted}\n    + {self.found or 'not there'}"
        )


def read_contract(version: str, file: Path = CONTRACT) -> Entries:
    """What a release must have: what all must, and what the nearest one not above it must.

    Args:
        version: for example 0.33.0.
    """
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    numbers = _numbers(version)
    below = [name for name in tables if name != "all" and _numbers(name) <= numbers]
    own = tables[max(below, key=_numbers)] if below else {}
    return {use: {**tables["all"].get(use, {}), **own.get(use, {})} for use in USES}


def compare(entries: Entries, source: Source) -> list[Difference]:
    """What of the contract a release does not keep."""
    differences = []
    for use, names in entries.items():
        for name, wanted in names.items():
            found = source.describe(name)
            reason = "it is gone" if found is None else _reason(use, wanted, found)
            if reason:
                differences.append(Difference(name, use, wanted, found, reason))
    return differences


def check_release(version: str) -> str:
    """The report of a release that keeps the contract.

    Raises:
        EigenError: it does not, with a line and the two sides of each difference.
    """
    entries = read_contract(version)
    differences = compare(entries, Source({"vllm": python_files(version) / "vllm"}))
    if differences:
        listed = "\n".join(map(str, differences))
        raise EigenError(
            f"vLLM {version} differs from the contract in {len(differences)} names:\n{listed}\n"
            "adapt vllm_eigen/plugin (what differs between versions has a module for each), "
            "then tests/plugin/contract/contract.toml"
        )
    return f"vLLM {version} keeps the contract: {sum(map(len, entries.values()))} names"


def _reason(use: str, wanted: str, found: str) -> str | None:
    """Why a name that is there does not do, or None."""
    if use == "read":
        return None
    if wanted.partition("(")[0] != found.partition("(")[0]:
        return "it is of another kind"
    old, new = _parameters(wanted), _parameters(found)
    if use == "overridden":
        return None if old == new else "vLLM calls ours with other parameters"
    gone = [name for name in old if name not in new]
    if gone:
        return f"parameters are gone: {', '.join(gone)}"
    added = [name for name, optional in new.items() if name not in old and not optional]
    if added:
        return f"parameters are needed: {', '.join(added)}"
    needed = [name for name, optional in old.items() if optional and not new[name]]
    if needed:
        return f"parameters are no longer optional: {', '.join(needed)}"
    if _positions(wanted) != _positions(found)[: len(_positions(wanted))]:
        return "parameters moved"
    return None


def _parameters(signature: str) -> dict[str, bool]:
    """Parameter -> whether it may be left out; `*` and `/` are parameters of no name."""
    inside = signature.partition("(")[2].removesuffix(")")
    names = [part for part in inside.split(", ") if part]
    return {name.removesuffix("=…"): name.endswith("=…") or name[0] in "*/" for name in names}


def _positions(signature: str) -> list[str]:
    names = []
    for name in _parameters(signature):
        if name.startswith("*"):
            break
        names.append(name)
    return names


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def write(version: str) -> None:
    """Set the right sides from a release: of `all`, and of the table that is its own."""
    source = Source({"vllm": python_files(version) / "vllm"})
    lines = []
    applies = True
    for line in CONTRACT.read_text(encoding="utf-8").splitlines():
        if section := re.fullmatch(r'\["?([\w.]+?)"?\.\w+\]', line):
            applies = section[1] in ("all", minor_version(version))
        entry = re.fullmatch(r'("(\S+)" = )".*"', line)
        found = source.describe(entry[2]) if entry and applies else None
        lines.append(f'{entry[1]}"{found}"' if entry and found else line)
    CONTRACT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    """Print the report, or the differences; the exit status."""
    parser = argparse.ArgumentParser(description="check what the plugin relies on in vLLM")
    parser.add_argument("version", help="release of vLLM, for example 0.33.0, or newest")
    parser.add_argument("--write", action="store_true", help="set contract.toml from it instead")
    args = parser.parse_args()
    try:
        version = newest_version() if args.version == "newest" else args.version
        if args.write:
            write(version)
        else:
            print(check_release(version))
    except EigenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
