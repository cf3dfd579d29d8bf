"""The order of the package's layers, its picture, and the scripts that read both from the source."""

from pathlib import Path

import code_lines
import draw_architecture
import pytest
from draw_architecture import PACKAGE, PICTURE, draw, drawn_arrows, part_of, problems
from package_imports import Import, circles, imports, modules


def write(folder: Path, files: dict[str, str]) -> Path:
    """A package of small files."""
    for name, source in files.items():
        path = folder / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder / "toy"


# ------------------------------------------------------------------ the package


def test_imports_keep_the_order_of_the_layers():
    assert problems(imports(PACKAGE), map(part_of, modules(PACKAGE))) == []


def test_the_posterior_imports_nothing_for_types_alone():
    for_types = [i for i in imports(PACKAGE) if i.only_for_types and part_of(i.importer) == "posterior"]
    assert for_types == []


def test_the_picture_is_what_the_imports_draw():
    assert PICTURE.read_text() == draw(), "run `make architecture`"


# ------------------------------------------------------------------ the scripts


def test_imports_are_found_wherever_they_stand(tmp_path):
    files = {
        "a.py": "from toy.b import c\nimport os\n",
        "b/__init__.py": "",
        "b/c.py": "def f():\n    from .d import x\n    import toy.a\n",
        "b/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy import a\nx = 1\n",
    }
    package = write(tmp_path, files)
    found = imports(package)
    assert found == [
        Import("toy.a", "toy.b.c"),
        Import("toy.b.c", "toy.a"),
        Import("toy.b.c", "toy.b.d"),
        Import("toy.b.d", "toy.a", only_for_types=True),
    ]
    assert circles((i.importer, i.imported) for i in found) == [["toy.a", "toy.b.c", "toy.b.d"]]


def test_separate_circles_are_told_apart():
    assert circles([("a", "b"), ("b", "a"), ("b", "c"), ("c", "d"), ("d", "c"), ("d", "e")]) == [["a", "b"], ["c", "d"]]
    assert circles([("a", "b"), ("b", "c"), ("a", "c")]) == []


@pytest.fixture
def toy_layers(monkeypatch):
    monkeypatch.setattr(draw_architecture, "LAYERS", ({"top": 0}, {"left": 0, "right": 1}, {"low": 0}, {"base": 0}))
    monkeypatch.setattr(draw_architecture, "N_BOTTOM", 1)


PARTS = ["top", "left", "right", "low", "base"]


@pytest.mark.parametrize(
    ("start", "end", "said"),
    [
        ("top", "low.x", []),
        ("low.x", "low.y", []),
        ("__init__", "top", []),
        ("low.x", "top", ["p.low.x imports p.top, which is not below it."]),
        ("left", "right.x", ["p.left imports p.right.x, which is not below it."]),
        ("top", "__init__", ["p.top imports p.__init__, which is not below it."]),
    ],
)
def test_only_what_is_below_may_be_imported(toy_layers, start, end, said):
    assert problems([Import(f"p.{start}", f"p.{end}")], PARTS) == said


def test_each_part_has_one_layer(toy_layers):
    (missing,) = problems([], [*PARTS, "new"])
    assert missing.startswith("new has no layer")
    (gone,) = problems([], PARTS[1:])
    assert "names top, which is no part" in gone


def test_a_circle_is_a_problem(toy_layers):
    (said,) = problems([Import("p.low.x", "p.low.y"), Import("p.low.y", "p.low.x", only_for_types=True)], PARTS)
    assert said == "these import each other in a circle: p.low.x, p.low.y."


def test_arrows_that_others_imply_are_not_drawn(toy_layers):
    pairs = [("top", "left"), ("left", "low"), ("top", "low"), ("low", "top"), ("top", "base"), ("__init__", "top")]
    assert drawn_arrows(Import(f"p.{a}.x", f"p.{b}") for a, b in pairs) == [("left", "low"), ("top", "left")]


def test_code_is_counted_without_prose(tmp_path):
    prose = '"""A module\nof two lines."""\n\nx = 1  # one\n"""What x is."""\n# none\n\n'
    function = 'def f():\n    """None."""\n    return (\n        x\n    )\n'
    files = {"__init__.py": "", "cli.py": prose + function, "b/__init__.py": "y = 2\n", "b/c.py": 'z = """\ntext"""\n'}
    package = write(tmp_path, files)
    assert code_lines.by_part(package) == {"__init__": 0, "b": 3, "cli": 5}


def test_the_deepest_chain_of_classes(tmp_path, capsys):
    of_a, of_b = "class A: ...\nclass B(A[int]): ...\n", "from . import a\nclass C(a.B): ...\nclass D(Exception): ...\n"
    package = write(tmp_path, {"a.py": of_a, "b.py": of_b})
    assert code_lines.deepest_chain(package) == ["A", "B", "C"]
    code_lines.main(package)
    assert "deepest chain of classes: 3 (A → B → C)\nimport circles: 0\n" in capsys.readouterr().out
