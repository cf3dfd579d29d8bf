"""The imports of a Python package, read from its source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, order=True)
class Import:
    """One module of the package that imports another.

    Attributes:
        importer: dotted name of the module that imports.
        imported: dotted name of the module that it imports.
        only_for_types: whether the import stands under `if TYPE_CHECKING`.
    """

    importer: str
    imported: str
    only_for_types: bool = False


def modules(package: Path) -> dict[str, Path]:
    """The files of a package by the dotted names of their modules."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> list[Import]:
    """Who imports whom, in order and each pair once; imports within functions and for types alone count too."""
    files = modules(package)
    found = set()
    for importer, path in files.items():
        for node, only_for_types in _import_nodes(ast.parse(path.read_text(encoding="utf-8")), False):
            base = _base(node, importer, path.name == "__init__.py")
            for alias in node.names:
                full = f"{base}.{alias.name}" if base else alias.name
                imported = full if full in files else base
                if imported in files and imported != importer:
                    found.add(Import(importer, imported, only_for_types))
    return sorted(found)


def _import_nodes(node: ast.AST, only_for_types: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, only_for_types
        else:
            guards = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _import_nodes(child, only_for_types or guards)


def _base(node: ast.Import | ast.ImportFrom, importer: str, is_package: bool) -> str:
    """The module that names are imported from, "" for `import …`."""
    if isinstance(node, ast.Import):
        return ""
    if not node.level:
        return node.module or ""
    parents = importer.split(".")
    parents = parents[: len(parents) - node.level + is_package]
    return ".".join([*parents, *([node.module] if node.module else [])])


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The groups of nodes that reach each other along the edges, each in alphabetical order."""
    below: dict[str, set[str]] = {}
    for start, end in edges:
        below.setdefault(start, set()).add(end)
    reached = {node: reachable(below, node) for node in below}
    groups = {tuple(sorted(other for other in reached[node] if node in reached.get(other, ()))) for node in below}
    return [list(group) for group in sorted(groups) if group]


def reachable(below: dict[str, set[str]], start: str, leave_out: str | None = None) -> set[str]:
    """All nodes on paths from a node along `below`; not the node itself unless a path leads back.

    Args:
        below: the ends of the edges that start at each node.
        start: where the paths start.
        leave_out: an end whose direct edge from `start` is not taken.
    """
    found: set[str] = set()
    waiting = [end for end in below.get(start, ()) if end != leave_out]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += below.get(node, ())
    return found
