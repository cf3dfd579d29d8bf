"""A calibration run from the checkpoint to its result: what is scored, on which images, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from calibration.tiny import train_tiny

from laplace_ws import Laplace
from laplace_ws.calibration import (
    CalibrateConfig,
    CalibrationDataConfig,
    MethodsConfig,
    as_text,
    read_result,
    run_calibration,
    write_result,
)
from laplace_ws.calibration import score as scoring
from laplace_ws.calibration.laplace import choose_prior, make_posterior
from laplace_ws.calibration.trained import load_trained
from laplace_ws.data import TensorLoader, corrupt, load_dataset
from laplace_ws.experiment.config import DataConfig, RunConfig, read_config
from laplace_ws.experiment.folder import ExperimentError
from laplace_ws.metrics import evaluate_classification, ood_detection, ood_scores
from laplace_ws.records import RecordError

N_VALIDATION, N_OOD, N_CORRUPTED = 50, 30, 20
DATA = CalibrationDataConfig(n_validation=N_VALIDATION, ood="mnist", n_ood=N_OOD, n_corrupted=N_CORRUPTED)
METHODS = MethodsConfig(laplace=["kron", "last_layer_full"], priors=["training", "marglik", "scaled", "validation"])
NAMES = ["map", "temperature"] + [
    f"laplace_{structure}_{prior}" for structure in METHODS.laplace for prior in METHODS.priors
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def other_things():
    """White noise in place of MNIST, normalised by a mean and deviation of its own."""

    def load(name, **options):
        if name != "mnist":
            return load_dataset(name, **options)
        data = load_dataset("fashion-mnist-subset", n_train=100, n_test=options["n_test"], seed=options["seed"])
        noise = torch.rand(data.x_test.shape, generator=torch.Generator().manual_seed(5))
        data = replace(data, mean=torch.tensor([0.5]), std=torch.tensor([0.1]))
        return replace(data, x_test=data.from_pixels(noise))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "load_dataset", load)
        yield


@pytest.fixture(scope="module")
def config(folder):
    return CalibrateConfig(checkpoint=str(folder), data=DATA, methods=METHODS, n_bins=10)


@pytest.fixture(scope="module")
def result(config, other_things):
    return run_calibration(config)


def plain(result):
    """All but the times."""
    times = ("total_seconds", "predict_seconds", "fit_seconds", "needed_seconds", "training_runs", "predict_cost")
    strip = lambda v: {k: strip(x) for k, x in v.items() if k not in times} if isinstance(v, dict) else v  # noqa: E731
    return strip(result.to_dict())


# ------------------------------------------------------------------ what is scored


def test_every_method_has_every_score_and_runs_repeat(config, result, other_things):
    assert [method.name for method in result.methods] == NAMES
    for method in result.methods:
        assert set(method.test) == {"accuracy", "nll", "brier", "ece", "aurc"}
        assert method.reliability.n_examples == 40
        assert sum(method.ood_confidence) == N_OOD
        assert 0 <= method.ood["auroc"] <= 1
        assert [(e.corruption, e.strength) for e in method.corrupted] == [
            (corruption, strength) for corruption in ("noise", "blur", "contrast") for strength in range(6)
        ]
        assert all(math.isfinite(value) for entry in method.corrupted for value in entry.scores.values())
    assert plain(run_calibration(config)) == plain(result)
    json.dumps(result.to_dict(), allow_nan=False)


def test_map_is_the_network_that_training_kept(result, folder):
    summary = json.loads((folder / "summary.json").read_text())["tuned"]
    network = result.methods[0]
    assert network.test["nll"] == pytest.approx(summary["test_nll"], abs=1e-6)
    assert network.test["accuracy"] == summary["test_accuracy"]
    assert result.trained["epoch"] == summary["best_epoch"]


def test_temperature_is_fitted_on_held_out_training_images(result, config):
    trained = load_trained(config)
    temperature = result.methods[1].facts["temperature"]
    with torch.no_grad():
        f = trained.model(trained.x_validation).double()
        f_test = trained.model(trained.data.x_test).double()
    nll = lambda t: F.cross_entropy(f / t, trained.y_validation).item()  # noqa: E731
    assert nll(temperature) < min(nll(1.01 * temperature), nll(temperature / 1.01))
    expected = F.cross_entropy(f_test / temperature, trained.data.y_test).item()
    assert result.methods[1].test["nll"] == pytest.approx(expected)
    assert result.methods[1].test["accuracy"] == result.methods[0].test["accuracy"]


def test_validation_images_are_training_images_that_the_network_did_not_see(config):
    trained = load_trained(config)
    whole = load_dataset("fashion-mnist-subset", dtype=torch.float64)
    rows = lambda data, x: set(map(tuple, data.to_pixels(x).mul(255).round().int().flatten(1).tolist()))  # noqa: E731
    everything = rows(whole, whole.x_train)
    seen, held_out = rows(trained.data, trained.data.x_train), rows(trained.data, trained.x_validation)
    assert len(held_out) == N_VALIDATION
    assert held_out <= everything
    assert not held_out & seen
    assert not held_out & rows(trained.data, trained.data.x_test)


def test_a_run_that_was_tested_on_held_out_images_is_scored_on_the_test_set(tmp_path):
    folder = train_tiny(tmp_path, held_out=True)
    trained = load_trained(CalibrateConfig(checkpoint=str(folder)))
    expected = load_dataset("fashion-mnist-subset", n_train=60, n_test=40)
    assert torch.equal(trained.data.x_test, expected.x_test)
    assert len(trained.y_validation) == 3940


def test_wide_factors_are_diagonal_where_this_is_asked_for(config):
    config = replace(config, methods=replace(config.methods, max_factor_dim=7))
    trained = load_trained(config)
    assert make_posterior(config, trained, "ekfac").options["max_factor_dim"] == 7
    assert "max_factor_dim" not in make_posterior(config, trained, "last_layer_diag").options


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("laplace_kron", {}),
        ("laplace_last_layer_full", {"subset_of_weights": "last_layer", "hessian_structure": "full"}),
    ],
)
def test_laplace_scores_are_those_of_its_posterior(name, options, result, config):
    trained = load_trained(config)
    data = trained.data
    la = Laplace(trained.model, "classification", **options)
    la.fit(TensorLoader(data.x_train, data.y_train, batch_size=60))
    la.prior_precision = la.optimal_prior_precision("layerwise")
    by_name = {method.name: method for method in result.methods}
    method = by_name[f"{name}_marglik"]
    expected = evaluate_classification(la(data.x_test), data.y_test, 10, kind="probs")
    assert dict(method.test) == pytest.approx(expected, rel=1e-4)
    assert method.facts["log_marginal_likelihood"] == pytest.approx(la.log_marginal_likelihood().item(), rel=1e-5)
    scaled = by_name[f"{name}_scaled"]
    assert la.optimize_covariance_scale([(trained.x_validation, trained.y_validation)]) == pytest.approx(
        scaled.facts["covariance_scale"], rel=1e-3
    )
    assert scaled.facts["prior_precision"] == pytest.approx(method.facts["prior_precision"])
    expected = evaluate_classification(la(data.x_test), data.y_test, 10, kind="probs")
    assert dict(scaled.test) == pytest.approx(expected, rel=1e-3)
    assert method.facts["covariance_scale"] == by_name[f"{name}_validation"].facts["covariance_scale"] == 1.0
    la.covariance_scale = 1.0
    # the validation's prior predicts the validation images no worse than the marginal likelihood's, but for the grid
    by_validation = by_name[f"{name}_validation"].facts["prior_precision"]
    assert by_validation["smallest"] == pytest.approx(by_validation["largest"])
    validation_nll = []
    for precision in (by_validation["smallest"], 10 * by_validation["smallest"], by_validation["smallest"] / 10):
        la.prior_precision = precision
        validation_nll.append(
            evaluate_classification(la(trained.x_validation), trained.y_validation, kind="probs")["nll"]
        )
    assert validation_nll[0] == min(validation_nll)


def test_damaged_and_other_images_are_normalised_as_the_training_images(result, config):
    trained = load_trained(config)
    model, data = trained.model, trained.data
    network = result.methods[0]
    images = scoring.load_scored_images(replace(config, data=replace(DATA, ood=None)), trained)
    x = data.from_pixels(corrupt(data.to_pixels(images.x_damaged), "noise", 5, seed=config.seed))
    with torch.no_grad():
        expected = F.cross_entropy(model(x).double(), images.y_damaged).item()
    (entry,) = [e for e in network.corrupted if (e.corruption, e.strength) == ("noise", 5)]
    assert entry.scores["nll"] == pytest.approx(expected)
    noise = data.from_pixels(torch.rand(N_OOD, 1, 28, 28, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad():
        scores = [ood_scores(model(part).double().softmax(-1)) for part in (data.x_test, noise)]
    assert network.ood == pytest.approx(ood_detection(*scores), abs=1e-6)


def test_sampled_predictions_repeat_and_differ_from_probit(config, result, other_things):
    sampled = replace(
        config,
        data=replace(DATA, corruptions=[]),
        methods=MethodsConfig(temperature=False, laplace=["kron"], priors=["marglik"], link_approx="mc", n_samples=20),
    )
    first, again = run_calibration(sampled), run_calibration(sampled)
    assert plain(first) == plain(again)
    assert first.methods[1].test["nll"] != result.methods[2].test["nll"]
    assert first.methods[1].corrupted == ()
    assert first.methods[1].mean_corrupted("nll") is None


def test_entropy_is_another_score(config, result, other_things):
    by_entropy = run_calibration(replace(config, ood_score="entropy", methods=MethodsConfig(laplace=[])))
    assert by_entropy.methods[0].ood != result.methods[0].ood
    assert by_entropy.methods[0].test == result.methods[0].test


def test_table_leaves_out_what_no_method_has(config, result):
    text = as_text(result.methods)
    n_sampled = len(NAMES) - 2
    assert len(text.splitlines()) == 2 + len(NAMES) + 1 + 2 + n_sampled
    assert "OOD AUROC" in text
    assert "Laplace kron (marglik)" in text
    assert "last-layer full (validation)" in text
    bare = run_calibration(
        replace(config, data=CalibrationDataConfig(corruptions=[]), methods=MethodsConfig(laplace=[]))
    )
    text = as_text(bare.methods)
    assert not {"OOD", "corrupted", "fit"} & set(text.split())
    assert f"{bare.methods[0].test['nll']:.4f}" in text


# ------------------------------------------------------------------ what is read and refused


def test_configuration_is_read_as_it_was_written(folder, tmp_path):
    config = read_config(folder / "config.json")
    assert config.data == DataConfig(n_train=60, n_test=40, batch_size=20)
    assert config.model.hidden == [5]
    assert isinstance(config, RunConfig)
    with pytest.raises(ExperimentError, match=r"config\.json', which says how the network was made, is missing"):
        read_config(tmp_path / "config.json")
    for text in ("{", "[1]", '{"colour": "red"}', '{"data.colour": "red"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ExperimentError, match="not a configuration of this version of laplace_ws"):
            read_config(tmp_path / "config.json")


def test_file_and_folder_mean_the_same(config, folder):
    by_file = load_trained(replace(config, checkpoint=str(folder / "checkpoint.pt")))
    by_folder = load_trained(config)
    for p, q in zip(by_file.model.parameters(), by_folder.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not by_file.model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "absent"}, "no checkpoint at 'absent'; give a run folder"),
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"n_bins": 0}, "n_bins=0 must be at least 1"),
        ({"data": CalibrationDataConfig(n_validation=5000)}, r"data\.n_validation=5000 must be from 1 to 3940"),
        ({"data": CalibrationDataConfig(n_corrupted=5000)}, r"data\.n_corrupted=5000 must be from 1 to 40"),
        ({"data": CalibrationDataConfig(corruptions=["blur", "blur"])}, r"data\.corruptions names one twice"),
        ({"methods": MethodsConfig(laplace=["kron", "kron"])}, r"methods\.laplace names one twice: kron, kron"),
        ({"methods": MethodsConfig(kfac_approx={"nowhere": "expand"})}, "'nowhere'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(change, message, config, other_things):
    with pytest.raises(ExperimentError, match=message):
        run_calibration(replace(config, **change))


def test_without_validation_images_only_what_needs_none(config, tmp_path):
    config = replace(config, checkpoint=str(train_tiny(tmp_path, n_train=None, batch_size=500)))
    with pytest.raises(ExperimentError, match=r"trained on all of them; train with a smaller data\.n_train, or set"):
        run_calibration(config)
    methods = MethodsConfig(temperature=False, laplace=["last_layer_full"], priors=["marglik"])
    found = run_calibration(replace(config, data=CalibrationDataConfig(corruptions=[]), methods=methods))
    assert [method.name for method in found.methods] == ["map", "laplace_last_layer_full_marglik"]


def test_other_images_of_another_shape_are_refused(config, monkeypatch):
    def load(name, **options):
        data = load_dataset("fashion-mnist-subset", n_test=10)
        return replace(data, x_train=data.x_train[..., :14], x_test=data.x_test[..., :14])

    trained = load_trained(config)
    monkeypatch.setattr(scoring, "load_dataset", load)
    with pytest.raises(ValueError, match=r"data\.ood=mnist has images of 1x28x14, but .* images of 1x28x28"):
        scoring.load_scored_images(config, trained)
    images = scoring.load_scored_images(replace(config, data=replace(DATA, ood_fit=True)), trained)
    assert images.x_ood.shape == (10, 1, 28, 28)
    expected = trained.data.from_pixels(torch.zeros(1, 1, 1, 1))
    assert torch.equal(images.x_ood[..., :7], expected.expand(10, 1, 28, 7))
    small = replace(trained, data=replace(trained.data, x_train=trained.data.x_train[..., :10]))
    with pytest.raises(
        ValueError, match=r"data\.ood=mnist with data\.ood_fit: images of 1x28x14 do not fit into 1x28x10"
    ):
        scoring.load_scored_images(replace(config, data=replace(DATA, ood_fit=True)), small)


def test_weights_of_another_network_are_refused(config, folder, tmp_path):
    run = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(run | {"model.hidden": [7]}))
    (tmp_path / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes())
    with pytest.raises(ExperimentError, match="do not fit the network of"):
        run_calibration(replace(config, checkpoint=str(tmp_path)))
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ExperimentError, match="cannot be read as a checkpoint"):
        run_calibration(replace(config, checkpoint=str(tmp_path)))


# ------------------------------------------------------------------ the prior of the training


def test_the_prior_of_the_training_is_that_of_its_summary(folder, config):
    """By parameter, also for a posterior of some of them."""
    summary = json.loads((folder / "summary.json").read_text())["tuned"]
    trained = load_trained(config)
    assert len(set(summary["prior_precision"].values())) > 1
    for structure in ("kron", "last_layer_full"):
        la = make_posterior(config, trained, structure)
        choose_prior(la, "training", config, trained)
        expected = [summary["prior_precision"][name] for name in la.parameter_names]
        assert la.prior_precision.tolist() == pytest.approx(expected, rel=1e-6)
    whole = make_posterior(config, trained, "kron")
    choose_prior(whole, "training", config, trained)
    whole.fit(TensorLoader(trained.data.x_train, trained.data.y_train, batch_size=20))
    assert whole.curvature.value == "ggn"
    assert whole.log_marginal_likelihood().isfinite()


def test_the_training_is_described_as_its_run_wrote_it(folder, config, result):
    """Not with the test images of the calibration, nor with defaults in place of what is no part of a run's result."""
    stored = result.trained["config"]
    assert "workers" not in stored
    assert stored["data"]["n_test"] == 40
    assert stored["model"]["hidden"] == [5]


def test_a_result_is_read_as_it_was_written(result, tmp_path):
    path = write_result(result, tmp_path)
    assert json.dumps(read_result(tmp_path).to_dict()) == json.dumps(result.to_dict())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"methods": [1]}))
    with pytest.raises(RecordError, match=r"calibration\.json: 'methods' is no object of objects; write one by method"):
        read_result(tmp_path)
