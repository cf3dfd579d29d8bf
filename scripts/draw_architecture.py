"""Draw the layers of the package from its imports, `docs/architecture.svg`; fails where an import breaks their order.

python scripts/draw_architecture.py [file]
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from package_imports import Import, circles, imports, modules, reachable

PACKAGE = Path(__file__).parent.parent / "laplace_ws"
PICTURE = Path(__file__).parent.parent / "docs" / "architecture.svg"

THIS = "scripts/draw_architecture.py"

LAYERS: tuple[dict[str, int], ...] = (
    {"cli": 2},
    {"report": 2},
    {"calibration": 1, "selection": 3},
    {"experiment": 2, "sklearn": 3, "callbacks": 1},
    {"compat": 1, "marglik": 2, "optim": 3},
    {"posterior": 2},
    {"curvature": 2},
    {"kfac": 2},
    {"likelihoods": 3},
    {"matrices": 1, "metrics": 3, "models": 0, "data": 4},
    {"saved": 0, "options": 1, "records": 2, "tables": 3, "interrupts": 4},
    {"option_errors": 1, "memory": 2},
    {
        "_version": 0,
        "errors": 1,
        "files": 2,
        "randomness": 3,
        "registry": 4,
        "threads": 5,
        "values": 6,
        "hashes": 7,
        "distributed": 8,
    },
)
"""The parts of the package, each with its column in the picture. A part may import what stands below it, not beside or above it."""
N_BOTTOM = 2
"""The lowest layers, which are drawn without arrows: all the others use them."""
ENTRY_POINTS = {"__init__", "__main__"}
"""Modules that only hand on what others define: they stand above all layers and are not drawn."""


# ------------------------------------------------------------------ what the imports must keep


def part_of(module: str) -> str:
    """The sub-package or module right under the package that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def problems(found: Iterable[Import], parts: Iterable[str]) -> list[str]:
    """What breaks the order of the layers, one sentence each; none where all is well."""
    found, levels = list(found), _levels()
    parts = set(parts) - ENTRY_POINTS
    said = [f"{part} has no layer; give it one in LAYERS of {THIS}." for part in sorted(parts - set(levels))]
    said += [f"LAYERS of {THIS} names {part}, which is no part of the package." for part in sorted(set(levels) - parts)]
    said += [f"{i.importer} imports {i.imported}, which is not below it." for i in found if not _goes_down(i, levels)]
    groups = circles((i.importer, i.imported) for i in found)
    return said + [f"these import each other in a circle: {', '.join(group)}." for group in groups]


def _levels() -> dict[str, int]:
    """The layer of each part, counted from the top; that of the entry points is above all."""
    return {part: level for level, layer in enumerate(LAYERS) for part in layer}


def _goes_down(i: Import, levels: Mapping[str, int]) -> bool:
    start, end = part_of(i.importer), part_of(i.imported)
    if start == end or start in ENTRY_POINTS:
        return True
    return end not in ENTRY_POINTS and levels.get(start, -1) < levels.get(end, len(LAYERS))


def drawn_arrows(found: Iterable[Import]) -> list[tuple[str, str]]:
    """The pairs of parts of which one imports the other, without those that a way over others implies, and without the lowest layers."""
    left_out, levels = ENTRY_POINTS | {part for layer in LAYERS[-N_BOTTOM:] for part in layer}, _levels()
    pairs = {(part_of(i.importer), part_of(i.imported)) for i in found if _goes_down(i, levels)}
    pairs = {(start, end) for start, end in pairs if start != end and not left_out & {start, end}}
    below: dict[str, set[str]] = {}
    for start, end in pairs:
        below.setdefault(start, set()).add(end)
    return sorted((start, end) for start, end in pairs if end not in reachable(below, start, leave_out=end))


# ------------------------------------------------------------------ the picture

_WIDTH, _HEIGHT = 200, 66  # of a box
_ACROSS, _DOWN = 216, 92  # from box to box
_MARGIN = 16
_TEXT, _LINE, _FILL, _BOTTOM_FILL = "#1b1f24", "#57606a", "#eef3fa", "#f3f3f3"


@dataclass(frozen=True)
class _Box:
    """A part of the package in the picture: its name, what it is, and its middle."""

    name: str
    about: str
    x: float
    y: float
    fill: str

    def svg(self) -> list[str]:
        left, top = self.x - _WIDTH / 2, self.y - _HEIGHT / 2
        lines = textwrap.wrap(self.about, 34)
        first = self.y - 6 * len(lines) + 2
        return [
            f'<rect x="{left:g}" y="{top:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{self.fill}" stroke="{_LINE}"/>',
            f'<text x="{self.x:g}" y="{first:g}" font-weight="bold" font-size="14">{escape(self.name)}</text>',
            *(
                f'<text x="{self.x:g}" y="{first + 13 * (n + 1):g}" font-size="10.5">{escape(line)}</text>'
                for n, line in enumerate(lines)
            ),
        ]


def draw(package: Path = PACKAGE) -> str:
    """The picture as SVG; the same text for the same imports."""
    files = modules(package)
    parts = {part_of(name): path for name, path in files.items() if name.count(".") == 1}
    boxes: dict[str, _Box] = {}
    rows = [{p: column for p, column in layer.items() if p in parts and not p.startswith("_")} for layer in LAYERS]
    rows = [row for row in rows if row]
    for level, row in enumerate(rows):
        for part, column in row.items():
            x, y = _MARGIN + _WIDTH / 2 + column * _ACROSS, _MARGIN + _HEIGHT / 2 + level * _DOWN
            fill = _BOTTOM_FILL if row in rows[-N_BOTTOM:] else _FILL
            boxes[part] = _Box(part, _about(parts[part]), x, y, fill)
    width = 2 * _MARGIN + _WIDTH + max(max(layer.values()) for layer in LAYERS) * _ACROSS
    height = 2 * _MARGIN + _HEIGHT + (len(rows) - 1) * _DOWN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" text-anchor="middle" '
        f'fill="{_TEXT}">',
        "<title>The parts of laplace_ws, each above those that it imports</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{_LINE}"/></marker>',
    ]
    lines += [_arrow(boxes[start], boxes[end]) for start, end in drawn_arrows(imports(package))]
    for box in boxes.values():
        lines += box.svg()
    return "\n".join([*lines, "</svg>", ""])


def _arrow(start: _Box, end: _Box) -> str:
    """Straight between neighbours; else out at the side and down in the column of its end."""
    side = (end.x > start.x) - (end.x < start.x)
    if side and end.y - start.y > _DOWN:
        x = start.x + side * _WIDTH / 2
        bend = end.x - side * 60
        path = f"M{x:g} {start.y:g}H{bend:g}Q{end.x:g} {start.y:g} {end.x:g} {start.y + 60:g}V{end.y - _HEIGHT / 2:g}"
    else:
        path = f"M{start.x:g} {start.y + _HEIGHT / 2:g}L{end.x:g} {end.y - _HEIGHT / 2:g}"
    return f'<path d="{path}" fill="none" stroke="{_LINE}" stroke-width="1.3" marker-end="url(#tip)"/>'


def _about(path: Path) -> str:
    """What a module says of itself, up to the first full stop or colon."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"[.:](?:\s|$)", " ".join(docstring.split()), maxsplit=1)[0].replace("`", "")


def main(picture: Path = PICTURE) -> int:
    picture.write_text(draw(), encoding="utf-8")
    said = problems(imports(PACKAGE), {part_of(name) for name in modules(PACKAGE)})
    print("\n".join(said), file=sys.stderr, end="\n" if said else "")
    return bool(said)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
