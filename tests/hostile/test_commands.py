"""Wrong arguments and files of the command line: each gets one line, in words of the options, and nothing is written."""

from __future__ import annotations

import shlex
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("commands")
    (path / "tiny.yaml").write_text(TINY)
    (path / "wide.yaml").write_text(WIDE_RESNET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert main(["train", "--config", "tiny.yaml", "--name", "fin"]) == 0
    return path


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_wrong_arguments_get_their_sentence(case, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    if case.text is not None:
        (folder / "own.yaml").write_text(case.text)
    before = sorted(folder.rglob("*"))
    assert main(shlex.split(case.call)) == USAGE
    assert capsys.readouterr().err == f"laplace-ws: error: {case.answer}\n"
    assert sorted(folder.rglob("*")) == before
