"""Networks and data of a user's own on the command line: trained, resumed, calibrated and ranked like those that come with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from times import TIMES

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.trained import load_trained
from laplace_ws.cli import main
from laplace_ws.data import as_data, load_dataset, part_of
from laplace_ws.experiment import run as experiment
from laplace_ws.experiment.config import RunConfig, read_config
from laplace_ws.experiment.run import load_data

OWN = '''
import torch
from torch import nn

from laplace_ws.data import load_dataset


def make(input_shape, n_classes, depth=1):
    widths = [int(torch.tensor(input_shape).prod())] + depth * [6]
    layers = [part for pair in zip(widths, widths[1:]) for part in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(6, n_classes))


def renamed(input_shape, n_classes):
    return make(input_shape, n_classes)


def blobs(root):
    """Five numbers for each of three classes; the folder says how far these lie apart."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(150) % 3
    x = torch.randn(150, 5, generator=generator) + float(root.name) * nn.functional.one_hot(y, 5)
    return x[:90], y[:90], x[90:], y[90:]


def images(root):
    return load_dataset("fashion-mnist-subset", n_train=40, n_test=20)
'''
QUICK = [
    *("--marglik.n_epochs", "4", "--marglik.n_epochs_burnin", "1", "--marglik.marglik_frequency", "1"),
    *("--marglik.fit_fraction", "1.0", "--data.batch_size", "20"),
]
OURS = ["--model.factory", "own_parts:make", "--data.factory", "own_parts:blobs", "--data.root", "2", *QUICK]


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    """A module in the current folder, which a program finds as `python` would."""
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    sys.modules.pop("own_parts", None)


def results(folder: Path) -> list:
    def without_times(value):
        if isinstance(value, dict):
            return {k: without_times(v) for k, v in value.items() if k not in TIMES}
        return [without_times(v) for v in value] if isinstance(value, list) else value

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return without_times([*lines, json.loads((folder / "summary.json").read_text())["tuned"]])


def test_a_run_records_its_functions_and_can_be_calibrated(capsys):
    assert main(["train", "--name", "own", "--data.n_train", "60", *OURS]) == 0
    folder = Path("runs/own")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["config"]["model"]["factory"] == "own_parts:make"
    assert summary["config"]["data"]["factory"] == "own_parts:blobs"
    assert summary["data"] == {"name": "own_parts:blobs", "n_train": 60, "n_test": 60}
    assert read_config(folder / "config.json").model.factory == "own_parts:make"
    page = (folder / "report.html").read_text()
    assert page.count("own_parts:blobs") >= 2
    assert "factory: own_parts:make" in page
    trained = load_trained(CalibrateConfig(checkpoint=str(folder)))
    x, y = trained.data.x_train, trained.data.y_train
    assert trained.model(x).argmax(-1).eq(y).float().mean().item() > 0.5
    assert len(trained.x_validation) == 30  # those that n_train left out
    assert not (trained.x_validation[:, None] == x[None]).all(-1).any()
    assert main(["calibrate", "--checkpoint", str(folder), "--data.corruptions", "[]"]) == 0
    scored = json.loads((folder / "calibration.json").read_text())["methods"]["map"]
    assert scored["test"]["nll"] == pytest.approx(summary["tuned"]["test_nll"])
    capsys.readouterr()
    assert main(["calibrate", "--checkpoint", str(folder), "--overwrite"]) == 2
    assert "need images of known pixels, which the tensors of own_parts:blobs are not" in capsys.readouterr().err


def test_going_on_gives_the_same_numbers_and_notices_another_function(monkeypatch, capsys):
    assert main(["train", "--name", "whole", *OURS]) == 0
    real = experiment.epoch_logger

    def interrupted(*args):
        log = real(*args)

        def stop(record):
            log(record)
            if record["epoch"] == 3:
                raise KeyboardInterrupt

        return stop

    monkeypatch.setattr(experiment, "epoch_logger", interrupted)
    assert main(["train", "--name", "cut", *OURS]) == 130
    monkeypatch.setattr(experiment, "epoch_logger", real)
    capsys.readouterr()
    for changed in ("model.factory own_parts:renamed", "data.factory own_parts:images", "data.root 3"):
        key, value = changed.split()
        assert main(["train", "--name", "cut", *OURS, f"--{key}", value, "--resume"]) == 2
        assert f"{key} was '{read_config(Path('runs/cut/config.json')).settings()[key.split('.')[0]][key.split('.')[1]]}' and is '{value}'" in capsys.readouterr().err  # fmt: skip  # noqa: E501
    assert main(["train", "--name", "cut", *OURS, "--resume"]) == 0
    assert results(Path("runs/cut")) == results(Path("runs/whole"))


@pytest.mark.long
def test_side_by_side_equals_in_order(tmp_path):
    fixed = ["--baselines.fixed_prior_precisions", "[1]"]
    assert main(["train", "--name", "one", *OURS, *fixed]) == 0
    assert main(["train", "--name", "two", *OURS, *fixed, "--workers", "2"]) == 0
    assert results(Path("runs/one")) == results(Path("runs/two"))


def test_options_that_are_given_are_passed_on(capsys):
    parts = ["--model.factory", "own_parts:make", "--data.n_train", "40", "--data.n_test", "20", *QUICK]
    assert main(["train", "--name", "deep", *parts, "--model.depth", "2"]) == 0
    assert main(["train", "--name", "flat", *parts]) == 0
    deep, flat = (json.loads(Path(f"runs/{name}/summary.json").read_text()) for name in ("deep", "flat"))
    assert len(deep["tuned"]["prior_precision"]) == len(flat["tuned"]["prior_precision"]) + 2
    assert main(["train", "--name", "named", *QUICK, "--model.name", "mlp", "--data.factory", "own_parts:images"]) == 0
    named = json.loads(Path("runs/named/summary.json").read_text())
    assert named["data"] == {"name": "fashion-mnist-subset", "n_train": 40, "n_test": 20}
    assert main(["calibrate", "--checkpoint", "runs/named", "--data.corruptions", "[contrast]"]) == 2
    assert "validation" in capsys.readouterr().err  # no training image was left out


def test_a_perceptron_takes_vectors():
    assert main(["train", "--name", "mlp", *OURS[2:], "--model.name", "mlp", "--model.hidden", "[7]"]) == 0


def test_networks_of_ones_own_are_ranked(tmp_path):
    Path("select.yaml").write_text(
        "candidates:\n"
        "  - {name: deep, model: {depth: 2}}\n"
        "  - {name: flat}\n"
        "  - {name: mlp, model: {factory: null, name: mlp, hidden: [6]}}\n"
        "criteria: [marglik, fewest_weights]\n"
    )
    assert main(["select", "--config", "select.yaml", *OURS]) == 0
    ranking = json.loads(Path("runs/select/select.json").read_text())["ranking"]
    found = {entry["name"]: entry["architecture"] for entry in ranking}
    assert found == {"deep": "own_parts:make depth=2", "flat": "own_parts:make", "mlp": "mlp hidden=[6]"}
    assert len({entry["n_weights"] for entry in ranking}) == 2


# ------------------------------------------------------------------ the data


def test_subsets_are_those_of_the_bundled_data():
    whole = load_dataset("fashion-mnist-subset")
    for options in ({"n_train": 50, "n_test": 30, "seed": 3}, {"n_train": 50, "n_test": 30, "held_out": True}):
        expected, found = load_dataset("fashion-mnist-subset", **options), part_of(whole, **options)
        for split in ("train", "test"):
            assert torch.equal(getattr(found, f"y_{split}"), getattr(expected, f"y_{split}"))
            pixels = [data.to_pixels(getattr(data, f"x_{split}")) for data in (found, expected)]
            torch.testing.assert_close(*pixels, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="held_out needs n_train below 4000"):
        part_of(whole, held_out=True)


def test_tensors_become_data():
    x, y = torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)
    data = part_of(as_data("f", (x, y, x[:3], y[:3] % 2)))
    assert (data.name, data.classes, data.has_pixels) == ("f", ("0", "1", "2"), False)
    assert torch.equal(data.x_train, x)
    assert data.y_train.dtype == torch.long
    assert as_data("f", data) is data

    assert load_data(RunConfig()).has_pixels
