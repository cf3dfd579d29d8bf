"""Code lines of the package by part, without blank lines, comments and docstrings; its deepest class chain and its import circles.

python scripts/code_lines.py [folder of the package]
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

from package_imports import circles, imports, modules

PACKAGE = Path(__file__).parent.parent / "laplace_ws"
SHELL = ("calibration", "cli", "experiment", "options", "records", "report", "selection", "tables")
"""The parts around the library that a command needs."""
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Lines of a file that hold code; docstrings, of attributes too, are none."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and _is_text(statement.value):
                docstrings.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def _is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def by_part(package: Path) -> dict[str, int]:
    """Code lines of each sub-package and of each module beside them; `__init__` for the package's own."""
    found: dict[str, int] = defaultdict(int)
    for name, path in modules(package).items():
        found[[*name.split("."), "__init__"][1]] += code_lines(path.read_text(encoding="utf-8"))
    return dict(sorted(found.items()))


def deepest_chain(package: Path) -> list[str]:
    """The longest line of subclasses among the package's own classes, base first; among equals the first by name."""
    bases: dict[str, list[str]] = defaultdict(list)
    for path in modules(package).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] += [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]

    def chain(name: str) -> list[str]:
        above = [chain(base) for base in bases[name] if base in bases and base != name]
        return [*max(above, key=len, default=[]), name]

    return max((chain(name) for name in sorted(bases)), key=len, default=[])


def main(package: Path = PACKAGE) -> None:
    parts = by_part(package)
    width = max(map(len, [*parts, "shell"]))
    for part, n in parts.items():
        print(f"{part:{width}} {n:6,}")
    print(
        f"{'shell':{width}} {sum(parts.get(part, 0) for part in SHELL):6,}  ({', '.join(p for p in SHELL if p in parts)})"
    )
    print(f"{'all':{width}} {sum(parts.values()):6,}")
    chain = deepest_chain(package)
    print(f"deepest chain of classes: {len(chain)} ({' → '.join(chain)})")
    found = circles((i.importer, i.imported) for i in imports(package))
    print(f"import circles: {len(found)}" + "".join(f"\n  {', '.join(circle)}" for circle in found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
