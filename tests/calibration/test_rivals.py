"""Deep ensembles and Monte Carlo dropout as rows: what they predict, cost, and leave as it was, and which runs are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibration.tiny import tiny_config
from torch import nn

from laplace_ws.calibration import CalibrateConfig, CalibrationDataConfig, MethodsConfig, run_calibration
from laplace_ws.calibration.dropout import dropout_predict, dropping
from laplace_ws.calibration.method import probabilities
from laplace_ws.calibration.trained import load_trained
from laplace_ws.data import load_dataset
from laplace_ws.experiment.folder import ExperimentError
from laplace_ws.experiment.run import load_data, run_experiment
from laplace_ws.metrics import evaluate_classification, ood_detection, ood_scores, uncertainty_split
from laplace_ws.models import MLP

DATA = CalibrationDataConfig(
    n_validation=50, ood="fashion-mnist-subset", n_ood=30, corruptions=["contrast"], n_corrupted=20
)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains a tiny run of a name under other settings, once; its folder."""
    out = tmp_path_factory.mktemp("runs")

    def trained(name, *, seed=0, model=None, data=None):
        run = tiny_config(out, **(data or {}))
        run = replace(run, name=name, seed=seed, model=replace(run.model, **(model or {})))
        if not run.folder.exists():
            run_experiment(run)
        return str(run.folder)

    return trained


@pytest.fixture(scope="module")
def network(train):
    return train("first")


@pytest.fixture(scope="module")
def members(train):
    return [train(f"member{seed}", seed=seed, data={"seed": 0}) for seed in (1, 2)]


@pytest.fixture(scope="module")
def dropped(train):
    return train("dropped", model={"dropout": 0.3})


def config(network, **methods):
    return CalibrateConfig(network, data=DATA, methods=MethodsConfig(**{"temperature": False, "laplace": []} | methods))


def train_seconds(folder):
    """Without the last fit, which a run makes of the curvature for itself."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return sum(json.loads(line)["seconds"] for line in lines)


@pytest.fixture(scope="module")
def result(network, members, dropped):
    return run_calibration(
        config(network, ensemble=members, mc_dropout=dropped, swag_epochs=2, laplace=["last_layer_full"], n_samples=7)
    )


# ------------------------------------------------------------------ what the rows say


def test_every_rival_is_a_row(result):
    names = [
        "map",
        "ensemble",
        "mc_dropout",
        "swag",
        "laplace_last_layer_full_training",
        "laplace_last_layer_full_scaled",
    ]
    assert [method.name for method in result.methods] == names
    labels = [method.label for method in result.methods[:4]]
    assert labels == ["MAP", "deep ensemble of 3", "MC dropout", "SWAG"]


def test_an_ensemble_is_the_mean_of_its_networks(result, network, members):
    runs = [load_trained(config(folder)) for folder in (network, *members)]
    data = runs[0].data
    samples = torch.stack([probabilities(run.model, data.x_test) for run in runs])
    assert not torch.equal(samples[0], samples[1])
    ensemble = result.methods[1]
    expected = evaluate_classification(samples.mean(0), data.y_test, kind="probs")
    assert dict(ensemble.test) == pytest.approx(expected, abs=1e-9)
    split = uncertainty_split(samples)
    assert ensemble.uncertainty.total == pytest.approx(split.total.mean().item(), abs=1e-9)
    assert ensemble.uncertainty.aleatoric == pytest.approx(split.aleatoric.mean().item(), abs=1e-9)
    assert ensemble.uncertainty.epistemic == pytest.approx(split.epistemic.mean().item(), abs=1e-9)
    # the images that are to be found out, and damaged ones
    other = load_dataset("fashion-mnist-subset", n_test=30)
    x_ood = data.from_pixels(other.to_pixels(other.x_test))
    ood = torch.stack([probabilities(run.model, x_ood) for run in runs])
    found = ood_detection(split.epistemic, uncertainty_split(ood).epistemic)["auroc"]
    assert ensemble.ood["auroc_epistemic"] == pytest.approx(found, abs=1e-6)
    by_confidence = ood_detection(*(ood_scores(p.mean(0)) for p in (samples, ood)))["auroc"]
    assert ensemble.ood["auroc"] == pytest.approx(by_confidence, abs=1e-6)
    assert ensemble.ood_uncertainty.epistemic == pytest.approx(uncertainty_split(ood).epistemic.mean().item(), abs=1e-9)
    entries = [entry.uncertainty.total for entry in ensemble.corrupted if entry.strength]
    assert ensemble.corrupted_uncertainty().total == pytest.approx(sum(entries) / 5)
    assert len(set(entries)) == 5


def test_costs_are_measured_in_trainings_of_the_network(result, network, members, dropped):
    by_name = {method.name: method for method in result.methods}
    own = train_seconds(network)
    assert by_name["map"].training_runs == by_name["map"].predict_cost == 1.0
    of_members = own + sum(train_seconds(member) for member in members)
    assert by_name["ensemble"].training_runs == pytest.approx(of_members / own)
    assert by_name["mc_dropout"].training_runs == pytest.approx(train_seconds(dropped) / own)
    for name in ("swag", "laplace_last_layer_full_scaled"):
        assert by_name[name].training_runs == pytest.approx(1 + by_name[name].facts["fit_seconds"] / own)
        assert by_name[name].facts["fit_seconds"] > 0
    network_seconds = by_name["map"].predict_seconds
    assert all(m.predict_cost == pytest.approx(m.predict_seconds / network_seconds) for m in result.methods)


def test_methods_with_samples_have_a_split_and_others_none(result):
    for method in result.methods:
        splits = [method.uncertainty, method.ood_uncertainty, *(entry.uncertainty for entry in method.corrupted)]
        if method.name == "map":
            assert splits == [None] * len(splits)
            assert "auroc_epistemic" not in method.ood
            continue
        for split in splits:
            assert split.total == pytest.approx(split.aleatoric + split.epistemic)
            assert split.epistemic > 0
        assert 0 <= method.ood["auroc_epistemic"] <= 1


# ------------------------------------------------------------------ dropout


def test_passes_with_dropout_repeat_and_differ_from_each_other(dropped):
    trained = load_trained(config(dropped))
    x = trained.data.x_test
    predict = dropout_predict(trained.model, 5, seed=3)
    rng = torch.get_rng_state()
    samples = predict(x).samples()
    assert torch.equal(rng, torch.get_rng_state())
    assert samples.shape == (5, 40, 10)
    assert torch.equal(predict(x).samples(), samples)
    assert torch.equal(predict(x).probs, samples.mean(0))
    assert not torch.equal(dropout_predict(trained.model, 5, seed=4)(x).probs, samples.mean(0))
    assert len({tuple(sample.flatten().tolist()) for sample in samples}) == 5


def test_dropout_alone_is_in_train_mode_and_every_mode_is_put_back():
    net = nn.Sequential(MLP(4, (3,), 2, dropout=0.5), nn.BatchNorm1d(2))
    net.eval()
    net[1].train()
    before = [module.training for module in net.modules()]

    def fail():
        with dropping(net):
            assert [type(m) for m in net.modules() if m.training] == [nn.Dropout, nn.Dropout]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in net.modules()] == before


# ------------------------------------------------------------------ what is refused


def test_runs_of_other_seeds_see_the_same_images_by_data_seed(network, members):
    run = tiny_config(Path(network).parent)
    own = load_data(run)
    alike = load_data(replace(run, seed=1, data=replace(run.data, seed=0)))
    other = load_data(replace(run, seed=1))
    assert torch.equal(own.x_train, alike.x_train)
    assert torch.equal(own.x_test, alike.x_test)
    assert not torch.equal(own.x_train, other.x_train)
    first, second = (load_trained(config(folder)) for folder in (network, members[0]))
    assert torch.equal(first.x_validation, second.x_validation)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("seed1", {"seed": 1}, r"'[^']*seed1' was trained on other images, data\.seed=1; give a run with --data\.seed 0"),
        ("more", {"seed": 1, "data": {"n_train": 70, "seed": 0}}, r"other images, data\.n_train=70; give a run with --data\.n_train 60"),
        (
            "wide",
            {"seed": 1, "data": {"seed": 0}, "model": {"hidden": [6]}},
            r"another architecture, model\.hidden=\[6\]; give a run with --model\.hidden \[5\]",
        ),
        ("again", {"seed": 0}, r"'[^']*again' has seed 0, as '[^']*first' has; train it with another --seed and with --data\.seed 0"),
        ("dropped", {"model": {"dropout": 0.3}}, r"another architecture, model\.dropout=0\.3; give a run with --model\.dropout null"),
    ],
)  # fmt: skip
def test_what_is_no_further_network_is_refused(name, settings, message, train, network):
    with pytest.raises(ExperimentError, match=rf"methods\.ensemble: .*{message}"):
        run_calibration(config(network, ensemble=[train(name, **settings)]))


def test_one_network_counts_once(network, members):
    with pytest.raises(ExperimentError, match=r"methods\.ensemble names one twice"):
        run_calibration(config(network, ensemble=[members[0], members[0]]))
    with pytest.raises(ExperimentError, match="has seed 0, as"):
        run_calibration(config(network, ensemble=[network]))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("first", {}, r"'[^']*first' was trained without dropout; train it with --model\.dropout 0\.1, say"),
        ("wide_dropped", {"model": {"hidden": [6], "dropout": 0.3}}, r"another architecture, model\.hidden=\[6\]"),
        ("dropped1", {"seed": 1, "model": {"dropout": 0.3}}, r"other images, data\.seed=1"),
    ],
)
def test_what_is_no_network_with_dropout_is_refused(name, settings, message, train, network):
    with pytest.raises(ExperimentError, match=rf"methods\.mc_dropout: .*{message}"):
        run_calibration(config(network, mc_dropout=train(name, **settings)))


def test_a_missing_run_is_named(network):
    with pytest.raises(ExperimentError, match="no checkpoint at 'absent'"):
        run_calibration(config(network, mc_dropout="absent"))
