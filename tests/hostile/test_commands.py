"""Wrong arguments and files of the command line: each gets one line, in words of the options, and nothing is written."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from hostile import tables

from laplace_ws.cli import USAGE, main

TINY = """
name: tiny
out: runs
data: {n_train: 30, n_test: 20, batch_size: 10}
model: {name: mlp, hidden: [3]}
marglik: {n_epochs: 1, n_epochs_burnin: 0, n_hypersteps: 1, lr: 0.01, prior_prec_init: 0.5}
report: false
"""
WIDE_RESNET = TINY.replace("{name: mlp, hidden: [3]}", "{name: wide-resnet, depth: 10, width: 1, norm: fixup}")
CASES = tables.read("commands")
FACTORIES = """
import torch
from torch import nn


def net(input_shape, n_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, n_classes))


def few(input_shape, n_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))


def nothing(input_shape, n_classes): ...


def no_arguments(): ...


def data(root, n=6, dtype=torch.long):
    return torch.randn(n, 5), (torch.arange(n) % 3).to(dtype), torch.randn(3, 5), torch.arange(3)


def three(root):
    return data(root)[:3]


def arrays(root):
    return [part.numpy() for part in data(root)]


def floats(root):
    return data(root, dtype=torch.float32)


def lengths(root):
    x, y, *rest = data(root)
    return x, y[:2], *rest


def shapes(root):
    x, y, *rest = data(root)
    return x[:, :4], y, *rest


def negative(root):
    x, y, *rest = data(root)
    return x, y - 1, *rest


def nan(root):
    x, y, *rest = data(root)
    return x / 0, y, *rest


number = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("commands")
    (path / "tiny.yaml").write_text(TINY)
    (path / "wide.yaml").write_text(WIDE_RESNET)
    (path / "hostile_factories.py").write_text(FACTORIES)
    (path / "hostile_imports.py").write_text("import not_installed_at_all")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "path", list(sys.path))
        assert main(["train", "--config", "tiny.yaml", "--name", "fin"]) == 0
    return path


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_wrong_arguments_get_their_sentence(case, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if case.text is not None:
        (folder / "own.yaml").write_text(case.text)
    before = sorted(folder.rglob("*"))
    assert main(shlex.split(case.call)) == USAGE
    assert capsys.readouterr().err == f"laplace-ws: error: {case.answer}\n"
    assert sorted(folder.rglob("*")) == before
