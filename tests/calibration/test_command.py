"""`laplace-ws calibrate`: options, files, and one-line errors."""

from __future__ import annotations

import json

import pytest
import yaml
from calibration.tiny import train_tiny

from laplace_ws.calibration import run as calibration
from laplace_ws.cli import main, parse

FAST = ["--methods.laplace", "[last_layer_kron]", "--data.corruptions", "[contrast]", "--data.n_validation", "50"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("runs"))


def test_files_are_written_beside_the_checkpoint_and_named(folder, capsys):
    assert main(["calibrate", "--checkpoint", str(folder / "checkpoint.pt"), *FAST]) == 0
    printed = capsys.readouterr().out
    assert f"result: {folder / 'calibration.json'}" in printed
    assert f"report: {folder / 'calibration.html'}" in printed
    assert "last-layer kron (scaled)" in printed
    found = json.loads((folder / "calibration.json").read_text())
    laplace = [f"laplace_last_layer_kron_{prior}" for prior in ("training", "scaled")]
    assert list(found["methods"]) == ["map", "temperature", *laplace]
    assert found["data"]["n_validation"] == 50
    assert found["config"]["methods"]["laplace"] == ["last_layer_kron"]
    assert found["trained"]["config"]["model"]["hidden"] == [5]


def test_settings_come_from_a_file_and_are_overridden(folder, tmp_path):
    path = tmp_path / "calibrate.yaml"
    path.write_text(
        yaml.safe_dump(
            {"checkpoint": str(folder), "n_bins": 5, "methods": {"laplace": ["diag"], "priors": ["marglik"]}}
        )
    )
    _, config, _ = parse(
        ["calibrate", "--config", str(path), "--methods.laplace", "[kron, last_layer_full]", "--data.ood=mnist"]
    )
    assert config.checkpoint == str(folder)
    assert config.n_bins == 5
    assert config.methods.laplace == ["kron", "last_layer_full"]
    assert config.methods.priors == ["marglik"]
    assert config.data.ood == "mnist"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods.laplaec", "[kron]"], "unknown key 'methods.laplaec'; did you mean 'methods.laplace'?"),
        (["--methods.laplace", "[kronecker]"], "kronecker"),
        (["--checkpoint", "absent"], "no checkpoint at 'absent'"),
        (["--data.n_corrupted", "1000"], "data.n_corrupted=1000 must be from 1 to 40"),
    ],
)
def test_errors_are_one_line(arguments, message, folder, tmp_path, capsys):
    assert main(["calibrate", "--checkpoint", str(folder), "--out", str(tmp_path), *FAST, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_behind(folder, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "score", interrupted)
    assert main(["calibrate", "--checkpoint", str(folder), "--out", str(tmp_path), *FAST]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_earlier_results_are_kept_unless_told_otherwise(folder, tmp_path, monkeypatch, capsys):
    arguments = ["calibrate", "--checkpoint", str(folder), "--out", str(tmp_path), *FAST]
    assert main(arguments) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"calibration.json", "calibration.html"}
    assert main(arguments) == 2
    assert "holds a calibration already, 'calibration.json'" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--data.batch_size", "0"]) == 2

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(calibration, "score", interrupted)
        assert main([*arguments, "--overwrite"]) == 130
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main([*arguments, "--overwrite", "--n_bins", "7"]) == 0
    assert json.loads((tmp_path / "calibration.json").read_text())["config"]["n_bins"] == 7
    (tmp_path / "calibration.html").write_text("mine")
    assert main([*arguments, "--overwrite"]) == 2
    assert (tmp_path / "calibration.html").read_text() == "mine"
