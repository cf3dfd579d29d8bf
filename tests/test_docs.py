"""The Python examples of the documents run, and print what the pages say; the reference names everything public."""

import contextlib
import io
import re
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_ws

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guide").glob("*.md"))
EXAMPLES = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]
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
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": path.stem}
    n_shown = 0
    for number, (code, shown) in enumerate(blocks(path.read_text())):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{path.name}, block {number}", "exec"), namespace)
        assert_says(printed.getvalue(), shown)
        n_shown += bool(shown)
    assert n_shown, "the page shows no result"


def blocks(page: str) -> list[tuple[str, str]]:
    """Each Python block with the text block that follows it directly, "" where none does."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    pairs = zip(found, [*found[1:], ("", "")], strict=True)
    return [(body, after[1] if after[0] == "text" else "") for (kind, body), after in pairs if kind == "python"]


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
    assert blocks(page) == [("x = 1\n", ""), ("print(x)\n", "1\n")]


def test_the_reference_names_all_that_is_public():
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    documented = set(re.findall(r"^\.\. auto\w+:: laplace_ws\.(\w+)$", page, re.MULTILINE))
    public = {name for name in laplace_ws.__all__ if not isinstance(getattr(laplace_ws, name), types.ModuleType)}
    assert documented == public - {"__version__"}


def test_every_page_of_the_guide_is_in_the_contents():
    contents = (ROOT / "docs" / "index.md").read_text()
    assert {path.stem for path in GUIDES} == set(re.findall(r"^guide/(\w+)$", contents, re.MULTILINE))
