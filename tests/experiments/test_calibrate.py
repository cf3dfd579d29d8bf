"""The study of calibration over seeds, at small size."""

import json
import sys
from dataclasses import replace

import calibrate
import pytest
import yaml
from image_folders import image_folder

from laplace_ws.calibration import MethodsConfig
from laplace_ws.experiment.config import RunConfig, read_config
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


def test_every_seed_is_scored_and_collected_and_a_study_goes_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))

    def study(*options):
        given = ["--config", str(path), "--train.out", str(tmp_path), "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", ["calibrate.py", *given])
        calibrate.main()
        return json.loads((tmp_path / "tiny.json").read_text())["rows"]

    scored = []
    actual = calibrate.run_calibration
    monkeypatch.setattr(calibrate, "run_calibration", lambda config: scored.append(config.seed) or actual(config))
    study("--seeds", "[0]")
    found = study("--resume", "true")
    assert scored == [0, 1]
    assert study("--resume", "true") == found
    assert scored == [0, 1]

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

    with pytest.raises(SystemExit, match=r"holds a finished run; choose another --name"):
        study()
    says = r"calibration\.json was scored with n_bins=15, this study says 7; choose another train\.name"
    with pytest.raises(SystemExit, match=says):
        study("--resume", "true", "--n_bins", "7")


def test_mean_and_standard_error():
    assert calibrate.mean_and_error([1.0, 2.0, 3.0], 3) == "2.000 ± 0.577"
    assert calibrate.mean_and_error([1.5], 1) == "1.5"


def test_a_figure_that_one_seed_lacks_is_a_dash():
    row = {column.title: [0.5, 0.5] for column in calibrate.columns()}
    row |= {column.title: [None, None] for column in calibrate.uncertainty_columns()}
    table = {"map": row | {"label": "MAP"}, "other": row | {"label": "other", "NLL": [None, 0.5]}}
    assert calibrate.as_markdown(table).splitlines()[-1].startswith("| other | 50.00 ± 0.00 | – |")


def test_configuration_of_the_repository_is_read():
    config = Options(calibrate.StudyConfig).read(["--config", "configs/calibrate.yaml"])
    assert config.train.model.name == "lenet"
    assert config.methods.priors == ["marglik", "validation"]
    assert config.data.ood == "mnist"
    assert config.train.marglik.prior_prec_init == pytest.approx(5e-4 * config.train.data.n_train)


# ------------------------------------------------------------------ rivals that the study trains


def test_further_networks_have_other_seeds_and_the_same_images():
    config = calibrate.StudyConfig(ensemble_size=3, dropout=0.2, train=RunConfig(name="a"))
    run = calibrate.run_of(config, 7)
    *members, dropped = calibrate.further_runs(config, run)
    assert [member.name for member in members] == ["a-seed7-member1", "a-seed7-member2"]
    assert len({run.seed, *(member.seed for member in members)}) == 3
    assert {member.data_seed for member in members} == {run.data_seed} == {7}
    assert all(replace(m, name=run.name, seed=run.seed, data=run.data) == run for m in members)
    assert replace(dropped, name=run.name, model=run.model) == run
    assert dropped.model.dropout == 0.2
    assert calibrate.further_runs(calibrate.StudyConfig(), run) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ensemble_size": 0}, "ensemble_size=0 must be at least 1"),
        ({"methods": MethodsConfig(ensemble=["runs/a"])}, "are trained by the study; give ensemble_size and dropout"),
        ({"methods": MethodsConfig(mc_dropout="runs/a")}, "are trained by the study"),
        ({"methods": MethodsConfig(n_samples=0)}, r"methods\.n_samples=0 must be at least 1"),
    ],
)
def test_what_would_fail_after_the_training_fails_before(change, message):
    with pytest.raises(ValueError, match=message):
        calibrate.check_study(replace(calibrate.StudyConfig(), **change))


@pytest.mark.long
def test_the_study_of_the_wide_resnet_at_small_size(tmp_path, monkeypatch, capsys):
    """Every row of configs/trust_wrn.yaml, on 8 images: out-of-distribution ones are made to fit."""
    image_folder(tmp_path / "images")
    small = {
        "seeds": [0], "ensemble_size": 2, "out": tmp_path, "train.out": tmp_path, "train.data.root": tmp_path / "images",
        "train.data.n_train": 8, "train.data.n_test": 6, "train.threads": 1, "train.marglik.n_epochs": 1,
        "train.marglik.n_epochs_burnin": 1,
        "data.n_validation": 4, "data.n_ood": 5, "data.n_corrupted": 4, "data.corruptions": ["contrast"], "methods.swag_epochs": 2,
        "methods.n_samples": 2,
    }  # fmt: skip
    options = [text for key, value in small.items() for text in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "--config", "configs/trust_wrn.yaml", *options])
    monkeypatch.setattr(calibrate, "write_calibration_report", lambda *args: None)  # of other tests, and slow
    calibrate.main()
    methods = json.loads((tmp_path / "trust-wrn.json").read_text())["rows"]["methods"]
    laplace = [f"laplace_{name}_{prior}" for name in ("kron", "last_layer_kron") for prior in ("scaled", "validation")]
    rows = ["map", "temperature", "ensemble", "mc_dropout", "swag", *laplace]
    assert list(methods) == rows
    assert methods["ensemble"]["label"] == "deep ensemble of 2"
    for name, row in methods.items():
        assert len(row["cost"]) == len(row["OOD AUROC"]) == 1
        assert (row["epistemic, OOD"] == [None]) == (name in ("map", "temperature"))
    assert methods["map"]["cost"] == [1.0]
    assert read_config(tmp_path / "trust-wrn-seed0-member1" / "config.json").data_seed == 0
    printed = capsys.readouterr().out
    assert "| epistemic, corrupted [nats] |" in printed
    assert printed.count("| deep ensemble of 2 |") == 2
    assert printed.count("| temperature scaling |") == 1
