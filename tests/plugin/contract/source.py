# SPDX-License-Identifier: Apache-2.0
"""Names of Python packages and what they are, read from the files; nothing is imported.

A name is written `module:name` or `module:Class.member`, as entry points are. Imports are followed
to where a name is defined, and members through base classes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Definition:
    """Where a name is defined, and as what."""

    module: str
    node: ast.AST


class Source:
    """Packages below some folders.

    Args:
        packages: name of a package -> its folder.
    """

    def __init__(self, packages: dict[str, Path]) -> None:
        self._packages = packages
        self.tree = cache(self._tree)

    def describe(self, name: str) -> str | None:
        """What a name is, on one line: a signature, a field or another kind; None without it.

        `(a, b, *, c=…)` is a function and `class (…)` a class with what it takes; a member says
        whether it is `static`, a `class` method or a `property`.
        """
        module, _, path = name.partition(":")
        if not path:
            return "module" if self.tree(module) else None
        first, *rest = path.split(".")
        found = self.find(module, first)
        for member in rest:
            if found is None or not isinstance(found.node, ast.ClassDef):
                return None
            found = self.member(found, member)
        return None if found is None else self._show(found, is_member=bool(rest))

    def find(self, module: str, name: str, depth: int = 20) -> Definition | None:
        """The definition of a module's name, through imports."""
        tree = self.tree(module)
        if tree is None or depth == 0:
            return None
        stars = []
        for node in _statements(tree.body):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if node.name == name:
                    return Definition(module, node)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return Definition(module, node)
            elif isinstance(node, ast.ImportFrom):
                source = self._absolute(module, node)
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(source)
                    elif (alias.asname or alias.name) == name and (
                        found := self.find(source, alias.name, depth - 1)
                    ):
                        return found
        for source in stars:
            if (found := self.find(source, name, depth - 1)) is not None:
                return found
        submodule = self.tree(f"{module}.{name}")
        return Definition(f"{module}.{name}", submodule) if submodule else None

    def member(self, owner: Definition, name: str, depth: int = 20) -> Definition | None:
        """A class's member, its own or a base's: in its body, or set on `self` in a method."""
        assert isinstance(owner.node, ast.ClassDef)
        for node in _statements(owner.node.body):
            if name in _defined(node):
                return Definition(owner.module, node)
        for node in ast.walk(owner.node):
            is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if is_set and node.attr == name and ast.unparse(node.value) == "self":
                return Definition(owner.module, node)
        for base in self.bases(owner) if depth else []:
            if (found := self.member(base, name, depth - 1)) is not None:
                return found
        return None

    def bases(self, owner: Definition) -> Iterator[Definition]:
        """The base classes that are defined in the packages, the nearest first."""
        assert isinstance(owner.node, ast.ClassDef)
        for base in owner.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                found = self.find(owner.module, base.id)
                if found is not None and isinstance(found.node, ast.ClassDef):
                    yield found

    def methods(self, owner: Definition) -> list[str]:
        """Names of the methods in the class's own body."""
        assert isinstance(owner.node, ast.ClassDef)
        return [node.name for node in owner.node.body if isinstance(node, ast.FunctionDef)]

    def _show(self, found: Definition, is_member: bool) -> str:
        node = found.node
        if isinstance(node, ast.Module):
            return "module"
        if isinstance(node, ast.ClassDef):
            start = self.member(found, "__init__")
            if start is not None and isinstance(start.node, ast.FunctionDef):
                return f"class {_arguments(start.node.args)}"
            return "class"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kinds = {ast.unparse(decorator) for decorator in node.decorator_list}
            if kinds & {"property", "cached_property", "functools.cached_property"}:
                return "property"
            kind = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
            kind += "static " if "staticmethod" in kinds else ""
            kind += "class " if "classmethod" in kinds else ""
            return kind + _arguments(node.args)
        if isinstance(node, ast.AnnAssign):
            return f"field: {ast.unparse(node.annotation)}"
        return "attribute" if is_member else "value"

    def _tree(self, module: str) -> ast.Module | None:
        package, *path = module.split(".")
        if package not in self._packages:
            return None
        place = self._packages[package].joinpath(*path)
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package, *path = module.split(".")
        parts = [package, *path]
        is_package = (self._packages[package].joinpath(*path) / "__init__.py").is_file()
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])


def imports(file: Path, package: str) -> set[str]:
    """What a file imports from a package anywhere in it, as `module:name`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            found |= {f"{node.module}:{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == package}
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at the level of a module or class, those of conditions included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _statements(node.body)
            yield from _statements(getattr(node, "orelse", []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _defined(node: ast.stmt) -> set[str]:
    """The names that a statement of a class's body defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _arguments(arguments: ast.arguments) -> str:
    """A signature without annotations; defaults are left out, that there is one is not."""
    plain = [*arguments.posonlyargs, *arguments.args]
    required = len(plain) - len(arguments.defaults)
    parts = [arg.arg + ("=…" if i >= required else "") for i, arg in enumerate(plain)]
    if arguments.posonlyargs:
        parts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parts.append(arg.arg + ("" if default is None else "=…"))
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(parts)})"
