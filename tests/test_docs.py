"""The Python examples of the documents run."""

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code):
    torch.manual_seed(0)
    layers = OrderedDict(conv1=nn.Conv2d(1, 2, 3), relu=nn.ReLU(), flatten=nn.Flatten(), linear=nn.Linear(8, 3))
    data = TensorDataset(torch.randn(12, 1, 4, 4), torch.arange(12) % 3)
    exec(code, {"model": nn.Sequential(layers), "train_loader": DataLoader(data, batch_size=6)})
