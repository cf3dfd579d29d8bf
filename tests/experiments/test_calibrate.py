"""The study of calibration over seeds, at small size."""

import json
import sys

import calibrate
import pytest
import yaml

from laplace_ws.options import Options

SETTINGS = {
    "seeds": [0, 1],
    "train": {
        "name": "tiny",
        "data": {"n_train": 60, "n_test": 40, "batch_size": 20},
        "model": {"name": "mlp", "hidden": [5]},
        "marglik": {"n_epochs": 2, "n_epochs_burnin": 2, "n_hypersteps": 0, "prior_prec_init": 0.5},
    },
    "data": {"n_validation": 50, "corruptions": ["contrast"], "n_corrupted": 20},
    "methods": {"laplace": ["last_layer_kron"], "priors": ["marglik"]},
}


def test_every_seed_is_scored_and_collected(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    monkeypatch.setattr(
        sys, "argv", ["calibrate.py", "--config", str(path), "--train.out", str(tmp_path), "--out", str(tmp_path)]
    )
    calibrate.main()
    found = json.loads((tmp_path / "tiny.json").read_text())["rows"]
    methods = found["methods"]
    assert list(methods) == ["map", "temperature", "laplace_last_layer_kron_marglik"]
    assert found["data"]["n_corrupted"] == 20
    for seed in SETTINGS["seeds"]:
        folder = tmp_path / f"tiny-seed{seed}"
        assert (folder / "calibration.html").exists()
        alone = json.loads((folder / "calibration.json").read_text())["methods"]
        for name, row in methods.items():
            assert row["NLL"][seed] == alone[name]["test"]["nll"]
            strongest = row["corrupted"][-1]
            assert (strongest["corruption"], strongest["strength"]) == ("contrast", 5)
            assert strongest["ece"][seed] == alone[name]["corrupted"][-1]["ece"]
    printed = capsys.readouterr().out
    assert "| temperature scaling |" in printed
    assert "OOD" not in printed


def test_mean_and_standard_error():
    assert calibrate.mean_and_error([1.0, 2.0, 3.0], 3) == "2.000 ± 0.577"
    assert calibrate.mean_and_error([1.5], 1) == "1.5"


def test_a_figure_that_one_seed_lacks_is_a_dash():
    row = {column.title: [0.5, 0.5] for column in calibrate.COLUMNS}
    table = {"map": row | {"label": "MAP"}, "other": row | {"label": "other", "NLL": [None, 0.5]}}
    assert calibrate.as_markdown(table).splitlines()[-1].startswith("| other | 50.00 ± 0.00 | – |")


def test_configuration_of_the_repository_is_read():
    config = Options(calibrate.StudyConfig).read(["--config", "configs/calibrate.yaml"])
    assert config.train.model.name == "lenet"
    assert config.methods.priors == ["marglik", "validation"]
    assert config.data.ood == "mnist"
    assert config.train.marglik.prior_prec_init == pytest.approx(5e-4 * config.train.data.n_train)
