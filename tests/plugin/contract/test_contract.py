# SPDX-License-Identifier: Apache-2.0
"""Every supported vLLM release has what the plugin relies on; one that has not is seen."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugin.contract import check, wheel
from tests.plugin.contract.source import Definition, Source, imports
from vllm_eigen.common.errors import EigenError, InputError
from vllm_eigen.plugin.vllm_version import SUPPORTED, minor_version

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
OURS = [*(ROOT / "vllm_eigen/plugin").rglob("*.py"), *(ROOT / "server").rglob("*.py")]
TESTED = ("0.32.0", "0.33.0")


def test_the_newest_tested_release_of_each_minor_one_is_checked() -> None:
    assert [minor_version(version) for version in TESTED] == list(SUPPORTED)


@pytest.mark.parametrize("version", TESTED)
def test_release(version: str) -> None:
    try:
        wheel.python_files(version)
    except InputError as error:
        pytest.skip(str(error))
    assert "keeps the contract" in check.check_release(version)


def test_installed_release() -> None:
    from vllm_eigen.plugin.vllm_version import check_vllm_version

    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    entries = check.read_contract(check_vllm_version())
    assert not check.compare(entries, Source({"vllm": Path(spec.origin).parent}))


def _contract() -> dict[str, set[str]]:
    """Use -> names, of all versions together."""
    found: dict[str, set[str]] = {use: set() for use in check.USES}
    for version in TESTED:
        for use, names in check.read_contract(version).items():
            found[use] |= set(names)
    return found


def test_every_import_is_in_the_contract() -> None:
    names = set().union(*_contract().values())
    for file in OURS:
        missing = imports(file, "vllm") - names
        assert not missing, f"{file.name} imports what contract.toml does not have: {missing}"


def _overridden() -> Iterator[tuple[str, str]]:
    """Our methods that stand in for one of vLLM's: where, and `module:Class.method` of vLLM's."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = Source({"vllm": Path(spec.origin).parent, "vllm_eigen": ROOT / "vllm_eigen"})
    for file in (ROOT / "vllm_eigen/plugin").glob("*.py"):
        module = f"vllm_eigen.plugin.{file.stem}"
        tree = source.tree(module)
        assert tree is not None
        for node in tree.body:
            owner = Definition(module, node)
            if not hasattr(node, "bases"):
                continue
            for base in source.bases(owner):
                for method in source.methods(owner):
                    found = source.member(base, method)
                    if base.module.startswith("vllm.") and found is not None:
                        yield f"{file.name}: {node.name}.{method}", f"{base.node.name}.{method}"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_every_overridden_method_is_in_the_contract() -> None:
    # A class's own constructor is called by us, except that of the attention classes.
    called_by_us = {"QKVParallelLinear.__init__", "Attention.__init__"}
    ours = [(where, name) for where, name in _overridden() if name not in called_by_us]
    assert len(ours) > 10
    known = {name.partition(":")[2] for name in _contract()["overridden"]}
    missing = [f"{where} overrides {name}" for where, name in ours if name not in known]
    assert not missing, "contract.toml does not have under overridden: " + ", ".join(missing)


FAKE = {
    "fake/__init__.py": "from .layers import Layer as Layer",
    "fake/layers/__init__.py": "from fake.layers.base import *\nfrom .base import _scale",
    "fake/layers/base.py": """
class Base:
    capacity: int = 3
    def build(self, size, *, fast=False): self.built = True
    @classmethod
    def name(cls): ...
class Layer(Base):
    def __init__(self, size, dtype=None): ...
def _scale(value, by=1): ...
""",
}
CONTRACT = """
[all.called]
"fake:Layer" = "class (self, size, dtype=…)"
"fake.layers:_scale" = "(value, by=…)"
[all.overridden]
"fake:Layer.build" = "(self, size, *, fast=…)"
"fake:Layer.name" = "class (cls)"
[all.read]
"fake:Layer.capacity" = "field: int"
"fake:Layer.built" = "attribute"
["2.0".read]
"fake.later" = "module"
"""
PLANTED = {
    "a function is gone": (
        ("def _scale", "def _rescale"),
        "fake.layers:_scale (called): it is gone",
    ),
    "a parameter is gone": (("value, by=1", "value"), "parameters are gone: by"),
    "a parameter is needed": (("(value, by", "(value, zero, by"), "parameters are needed: zero"),
    "a parameter moved": (("value, by=1", "by=1, value=1"), "parameters moved"),
    "a class takes more": (("size, dtype=None", "size, dtype"), "no longer optional: dtype"),
    "a hook is called otherwise": (
        ("fast=False", "fast=False, slow=False"),
        "fake:Layer.build (overridden): vLLM calls ours with other parameters",
    ),
    "a hook is of another kind": (("    @classmethod\n", ""), "it is of another kind"),
    "an attribute is gone": (("capacity", "size"), "fake:Layer.capacity (read): it is gone"),
    "what is set in a method": (("self.built", "built"), "fake:Layer.built (read): it is gone"),
}


def _fake(folder: Path, change: tuple[str, str] = ("", "")) -> list[check.Difference]:
    for name, text in FAKE.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace(*change) if change[0] else text, encoding="utf-8")
    contract = folder / "contract.toml"
    contract.write_text(CONTRACT, encoding="utf-8")
    entries = check.read_contract("1.9.3", contract)
    return check.compare(entries, Source({"fake": folder / "fake"}))


@pytest.mark.parametrize(
    "change",
    [
        ("", ""),
        ("by=1", "by=1, offset=0"),
        ("dtype=None", "dtype=None, **options"),
        ("capacity: int = 3", "capacity: int = 4"),
    ],
    ids=("none", "one more option", "any option", "another value"),
)
def test_what_keeps_the_contract(change: tuple[str, str], tmp_path: Path) -> None:
    assert _fake(tmp_path, change) == []


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_change_is_told(planted: str, tmp_path: Path) -> None:
    change, message = PLANTED[planted]
    [difference] = _fake(tmp_path, change)
    lines = str(difference).splitlines()
    assert message in lines[0]
    assert [line[:6] for line in lines[1:]] == ["    - ", "    + "]
    assert lines[1] != lines[2].replace("+", "-")


def test_a_version_has_names_of_its_own(tmp_path: Path) -> None:
    _fake(tmp_path)
    [difference] = check.compare(
        check.read_contract("2.1.0", tmp_path / "contract.toml"),
        Source({"fake": tmp_path / "fake"}),
    )
    assert difference.name == "fake.later"


def test_the_command_fails_readably(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "python_files", lambda version: tmp_path)
    monkeypatch.setattr("sys.argv", ["check", "0.99.0"])
    assert check.main() == 1
    told = capsys.readouterr().err
    assert told.startswith("vLLM 0.99.0 differs from the contract in ")
    assert "adapt vllm_eigen/plugin" in told


@pytest.mark.parametrize("version", ["", "0", "../1.0", "1.0; rm", "latest"])
def test_no_version(version: str) -> None:
    with pytest.raises(EigenError, match="no version of vLLM"):
        wheel.python_files(version)
