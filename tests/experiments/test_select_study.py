"""The study of criteria over seeds, at small size."""

import dataclasses
import json
import statistics
import sys

import pytest
import select_study
import yaml

from laplace_ws.options import Options
from laplace_ws.selection import run_selection
from laplace_ws.selection.ranking import correlate

SETTINGS = {
    "seeds": [0, 1],
    "select": {
        "name": "tiny",
        "data": {"n_train": 40, "n_test": 40, "batch_size": 20},
        "model": {"name": "mlp"},
        "marglik": {"n_epochs": 1, "n_epochs_burnin": 1, "n_hypersteps": 0, "lr": 0.01},
        "criteria": ["marglik", "validation_log_likelihood", "fewest_weights"],
        "candidates": [
            {"name": "linear", "model": {"hidden": []}},
            {"name": "small", "model": {"hidden": [3]}},
            {"name": "deep", "model": {"hidden": [3, 3]}},
            {"name": "lenet", "model": {"name": "lenet"}},
        ],
    },
}


@pytest.fixture
def options(tmp_path) -> list[str]:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return ["--config", str(path), "--select.out", str(tmp_path), "--out", str(tmp_path)]


def run(monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["select_study.py", *options])
    select_study.main()


def test_every_seed_is_compared_and_collected(options, tmp_path, monkeypatch, capsys):
    run(monkeypatch, *options)
    found = json.loads((tmp_path / "tiny.json").read_text())["rows"]
    of_seeds = []
    for seed in SETTINGS["seeds"]:
        ranking = json.loads((tmp_path / f"tiny-seed{seed}" / "select.json").read_text())["ranking"]
        networks = {row["name"]: row for row in found["networks"][str(seed)]}
        assert len(networks) == 4
        for entry in ranking:
            assert networks[entry["name"]]["test_nll"] == entry["test_nll"]
            assert networks[entry["name"]]["scores"] == entry["scores"]
        values = [entry["scores"]["validation_log_likelihood"]["value"] for entry in ranking]
        of_seeds.append(correlate(values, [entry["test_nll"] for entry in ranking]).spearman)
    summary = found["criteria"]["validation_log_likelihood"]
    assert summary["all"]["spearman"] == pytest.approx(of_seeds)
    assert len(summary["perceptrons"]["spearman"]) == 2
    assert summary["convolutional"]["spearman"] == []
    printed = capsys.readouterr().out
    cell = f"{statistics.mean(of_seeds):+.2f} ± {abs(of_seeds[0] - of_seeds[1]) / 2:.2f} (worst {max(of_seeds):+.2f})"
    assert f"| validation log likelihood | {cell} |" in printed
    assert printed.rstrip().splitlines()[-3] == "Networks: 4 (seed 0), 4 (seed 1) of 4."
    (between,) = found["spearman_between_seeds"]
    assert f"between two seeds: {between:+.2f} on average" in printed


def test_what_is_there_is_reported_and_gone_on_with(options, tmp_path, monkeypatch, capsys):
    config = Options(select_study.StudyConfig).read(options)
    first = select_study.of_seed(config, 0)
    run_selection(dataclasses.replace(first, candidates=first.candidates[:3]))
    run(monkeypatch, *options, "--report_only", "true")
    assert "Networks: 3 (seed 0) of 4." in capsys.readouterr().out
    assert not (tmp_path / "tiny-seed1").exists()
    kept = (tmp_path / "tiny-seed0" / "small" / "summary.json").read_bytes()
    run(monkeypatch, *options, "--seeds", "[0]")
    assert (tmp_path / "tiny-seed0" / "small" / "summary.json").read_bytes() == kept
    assert "Networks: 4 (seed 0) of 4." in capsys.readouterr().out


def row(name: str, nll: float, value: float | None, is_perceptron: bool = True) -> dict:
    return {
        "name": name,
        "is_perceptron": is_perceptron,
        "test_nll": nll,
        "scores": {"marglik": {"value": value, "seconds": 2.0}},
    }


def test_the_loss_is_that_of_the_network_that_a_criterion_chooses():
    rows = [row("a", 0.5, -1.0), row("b", 0.7, -0.5), row("c", 0.6, None), row("d", 0.9, -2.0, False)]
    found = select_study.summary({0: rows}, "marglik")
    assert found["all"]["loss"] == [pytest.approx(0.2)]
    assert found["convolutional"]["loss"] == [0.0]
    assert found["all"]["spearman"] == [pytest.approx(-0.5)]
    assert found["perceptrons"]["spearman"] == []
    assert found["seconds"] == 2.0


def test_repeatability_is_the_rank_correlation_of_the_same_networks():
    def rows(**nll):
        return [{"name": name, "test_nll": value} for name, value in nll.items()]

    table = {0: rows(a=1.0, b=2.0, c=3.0), 1: rows(c=30.0, b=20.0, a=10.0), 2: rows(a=3.0, b=2.0, c=1.0, d=None)}
    assert select_study.repeatability(table) == pytest.approx([1.0, -1.0, -1.0])
    assert select_study.repeatability({0: table[0]}) == []


def test_mean_error_and_worst():
    assert select_study.mean_and_worst([-1.0, 0.0]) == "-0.50 ± 0.50 (worst +0.00)"
    assert select_study.mean_and_worst([0.5]) == "+0.50"
    assert select_study.mean_and_worst([]) == "–"


def test_configuration_of_the_repository_is_read():
    config = Options(select_study.StudyConfig).read(["--config", "configs/select_study.yaml"])
    assert len(config.select.candidates) >= 12
    assert len(config.seeds) == 5
    models = [config.select.run_config(candidate).model for candidate in config.select.candidates]
    assert len({str(model) for model in models}) == len(models)
    assert {model.name for model in models} == {"mlp", "lenet", "wide-resnet"}
    assert (config.select.data.name, config.select.data.n_train) == ("fashion-mnist-subset", 1000)
