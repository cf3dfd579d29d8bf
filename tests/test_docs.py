"""The Python examples of the documents run, and print what the pages say; the reference names everything public."""

import contextlib
import io
import re
import shlex
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_ws
from laplace_ws.cli import main

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guide").glob("*.md"))
EXAMPLES = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]
NEEDS = {
    "graphs.md": ("torch_geometric",),
    "scikit_learn.md": ("sklearn",),
    "training_loops.md": ("lightning", "transformers", "tensorboard"),
}
"""Libraries that a page is about, without which it is not run."""
RUN = ("python", "bash", "yaml")
"""Blocks that `run_block` knows."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def test_there_are_examples():
    assert len(EXAMPLES) >= 4
    assert len(GUIDES) >= 5


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layers = OrderedDict(conv1=nn.Conv2d(1, 2, 3), relu=nn.ReLU(), flatten=nn.Flatten(), linear=nn.Linear(8, 3))
    x, y = torch.randn(12, 1, 4, 4), torch.arange(12) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    exec(code, {"model": nn.Sequential(layers), "train_loader": loader, "val_loader": loader, "x": x})


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_guide_prints_what_it_says(path, tmp_path, monkeypatch):
    """The blocks of a page run in order in one namespace; what one prints is the text block after it."""
    for library in NEEDS.get(path.name, ()):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # a command adds the current folder
    namespace: dict = {"__name__": path.stem}
    n_shown = 0
    for number, (kind, code, shown) in enumerate(blocks(path.read_text())):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            run_block(kind, code, f"{path.name}, block {number}", namespace)
        assert_says(printed.getvalue(), shown)
        n_shown += bool(shown)
    assert n_shown, "the page shows no result"


def run_block(kind: str, code: str, name: str, namespace: dict) -> None:
    """Run Python code; write a file whose name is its first line; run commands for such a file, whose tables are not compared."""
    first = code.partition("\n")[0]
    if re.fullmatch(r"# \w+\.(py|yaml)", first):
        Path(first[2:]).write_text(code)
    elif first.startswith("laplace-ws ") and list(Path().glob("*.py")):
        with contextlib.redirect_stdout(io.StringIO()):
            assert [main(shlex.split(line)[1:]) for line in code.splitlines()] == [0] * len(code.splitlines())
    elif kind == "python":
        exec(compile(code, name, "exec"), namespace)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Each block of Python, commands or a file with the text block that follows it directly, "" where none does."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    pairs = zip(found, [*found[1:], ("", "")], strict=True)
    return [(kind, body, after[1] if after[0] == "text" else "") for (kind, body), after in pairs if kind in RUN]


def assert_says(printed: str, shown: str) -> None:
    """Equal words; numbers equal to two units of the last digit shown or to 5 %, as machines round differently."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), printed
    for found, said in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        found, said = found.replace(",", ""), said.replace(",", "")
        decimals = len(said.partition(".")[2])
        assert float(found) == pytest.approx(float(said), abs=2.01 * 10.0**-decimals, rel=0.05), printed


@pytest.mark.parametrize(
    ("printed", "shown", "agree"),
    [
        ("nll 0.52, 1,234 weights\n", "nll 0.54, 1,234 weights\n", True),
        ("nll 0.52", "nll 0.55", False),
        ("nll 0.5", "ece 0.5", False),
        ("a  -1.0\n", "a -3.0\n", False),
        ("a 1 2", "a 1", False),
        ("printed", "", False),
    ],
)
def test_outputs_are_compared_to_the_last_digits(printed, shown, agree):
    if agree:
        assert_says(printed, shown)
    else:
        with pytest.raises(AssertionError):
            assert_says(printed, shown)


def test_the_blocks_of_a_page():
    page = "a\n```python\nx = 1\n```\nb\n\n```python\nprint(x)\n```\n\nIt says\n\n```text\n1\n```\n\n```bash\nls\n```\n"
    expected = [("python", "x = 1\n", ""), ("python", "print(x)\n", "1\n"), ("bash", "ls\n", "")]
    assert blocks(page) == expected


def test_the_reference_names_all_that_is_public():
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    documented = set(re.findall(r"^\.\. auto\w+:: laplace_ws\.(\w+)$", page, re.MULTILINE))
    public = {name for name in laplace_ws.__all__ if not isinstance(getattr(laplace_ws, name), types.ModuleType)}
    assert documented == public - {"__version__"}


def test_every_page_of_the_guide_is_in_the_contents():
    contents = (ROOT / "docs" / "index.md").read_text()
    assert {path.stem for path in GUIDES} == set(re.findall(r"^guide/(\w+)$", contents, re.MULTILINE))
