"""SWAG: moments and samples against dense algebra, the SGD that it follows, and the networks that it draws."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from calibration.tiny import train_tiny
from torch import nn

from laplace_ws.calibration import CalibrateConfig, CalibrationDataConfig, MethodsConfig
from laplace_ws.calibration.swag import check_swag, follow_sgd, network_at, swag_method
from laplace_ws.calibration.trained import load_trained
from laplace_ws.experiment.config import MarglikConfig
from laplace_ws.experiment.folder import ExperimentError
from laplace_ws.marglik import neg_log_joint_mean
from laplace_ws.posterior.swag import RANK, SwagMoments, flat

DATA = CalibrationDataConfig(n_validation=50)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = CalibrateConfig(str(train_tiny(tmp_path_factory.mktemp("runs"))), data=DATA)
    return load_trained(config)


def path_of_weights(n, n_params=5):
    return list(torch.randn(n, n_params, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def moments_of(path):
    moments = SwagMoments(path[0])
    for weights in path[1:]:
        moments.add(weights)
    return moments


@pytest.mark.parametrize("n", [3, 8, RANK + 4])
def test_moments_are_those_of_the_whole_path(n):
    path = path_of_weights(n)
    found, all_weights = moments_of(path), torch.stack(path)
    torch.testing.assert_close(found.mean, all_weights.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.variance, all_weights.var(0, correction=0), rtol=0, atol=1e-12)
    means = [torch.stack(path[: i + 1]).mean(0) for i in range(n)]
    deviations = torch.stack([path[i] - means[i] for i in range(1, n)][-RANK:], 1)
    torch.testing.assert_close(found.deviations, deviations, rtol=0, atol=1e-12)


def test_samples_have_the_covariance_of_the_paper():
    moments = moments_of(path_of_weights(8))
    generator = torch.Generator().manual_seed(1)
    samples = torch.stack([moments.sample(generator) for _ in range(4_000)])
    D = moments.deviations
    expected = (moments.variance.diag() + D @ D.T / (D.shape[1] - 1)) / 2
    torch.testing.assert_close(moments.covariance(), expected, rtol=0, atol=1e-12)
    scale = expected.diagonal().sqrt()
    # five standard errors of 4,000 draws
    torch.testing.assert_close(samples.mean(0) / scale, moments.mean / scale, rtol=0, atol=0.08)
    error = (samples.T.cov() - expected) / scale.outer(scale)
    assert error.abs().max() < 0.112


def test_weights_far_from_zero_have_no_negative_variance():
    constant = [torch.full((3,), 1e8, dtype=torch.float64) + 1e-9 * i for i in range(6)]
    moments = moments_of(constant)
    assert (moments.variance >= 0).all()
    assert moments.sample(torch.Generator().manual_seed(0)).isfinite().all()


def test_sgd_follows_the_objective_of_the_training(trained):
    """Plain SGD on all images at once, by autograd on likelihood and prior together; with the temperature, at which steps are scaled."""
    run = replace(
        trained.config, data=replace(trained.config.data, batch_size=60), marglik=MarglikConfig(momentum=0.0, lr=0.2)
    )
    trained = replace(trained, config=run, temperature=1.7)
    found = follow_sgd(trained, 3, 0.1)
    model = copy.deepcopy(trained.model)
    parameters = list(model.parameters())
    deltas = [trained.prior_precision[name] for name, _ in model.named_parameters()]
    x, y = trained.data.x_train, trained.data.y_train
    path = [flat(parameters)]
    for _ in range(3):
        nll = nn.functional.cross_entropy(model(x), y)
        loss = 1.7 * neg_log_joint_mean(nll, parameters, deltas, len(x), temperature=1.7)
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= 0.1 * g
        path.append(flat(parameters))
    torch.testing.assert_close(found.mean, torch.stack(path).double().mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.deviations[:, -1], moments_of(path).deviations[:, -1], rtol=0, atol=1e-6)
    assert found.deviations[:, -1].abs().max() > 1e-3


def test_the_network_is_left_as_it_was_and_samples_are_around_it(trained):
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}
    config = CalibrateConfig("x", data=DATA, methods=MethodsConfig(swag_epochs=3, swag_lr=0.01, n_samples=4))
    rng = torch.get_rng_state()
    (method,) = swag_method(config, trained)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in trained.model.state_dict().items())
    assert not trained.model.training
    assert all(p.grad is None for p in trained.model.parameters())
    prediction = method.predict(trained.data.x_test)
    samples = prediction.samples()
    assert samples.shape == (4, 40, 10)
    assert torch.equal(prediction.probs, samples.mean(0))
    assert len({tuple(sample.flatten().tolist()) for sample in samples}) == 4
    (again,) = swag_method(config, trained)
    assert torch.equal(again.predict(trained.data.x_test).probs, prediction.probs)
    assert method.facts["rank"] == 3
    assert method.seconds == pytest.approx(trained.train_seconds + method.facts["fit_seconds"])


def test_the_learning_rate_is_half_of_the_trainings_by_default(trained):
    (method,) = swag_method(CalibrateConfig("x", methods=MethodsConfig(swag_epochs=2, n_samples=1)), trained)
    assert method.facts["lr"] == trained.config.marglik.lr / 2


def test_statistics_of_batch_norm_are_those_of_the_training_images_under_the_sample(trained):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4), nn.Linear(4, 10)).eval()
    trained = replace(
        trained, model=model, config=replace(trained.config, data=replace(trained.config.data, batch_size=60))
    )
    weights = flat(list(model.parameters())) * 1.5
    drawn = network_at(trained, weights)
    assert not drawn.training
    hidden = drawn[1](trained.data.x_train.flatten(1))
    torch.testing.assert_close(drawn[2].running_mean, hidden.mean(0))
    torch.testing.assert_close(drawn[2].running_var, hidden.var(0))
    assert torch.equal(model[2].running_mean, torch.zeros(4))
    assert torch.equal(flat(list(drawn.parameters())), weights)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"swag_epochs": 1}, r"methods\.swag_epochs=1 must be at least 2, or 0 to leave SWAG out"),
        ({"swag_epochs": -2}, r"methods\.swag_epochs=-2 must be at least 2"),
        ({"swag_epochs": 2, "swag_lr": 0.0}, r"methods\.swag_lr=0\.0 must be positive"),
    ],
)
def test_impossible_options_are_refused(methods, message, trained):
    with pytest.raises(ValueError, match=message):
        check_swag(CalibrateConfig("x", methods=MethodsConfig(**methods)), trained)


def test_a_run_of_adam_has_no_learning_rate_of_sgd(trained):
    adam = replace(trained, config=replace(trained.config, marglik=MarglikConfig(optimizer="adam")))
    with pytest.raises(
        ExperimentError, match=r"trained by adam, whose learning rate is none of SGD; set --methods\.swag_lr"
    ):
        check_swag(CalibrateConfig("x", methods=MethodsConfig(swag_epochs=2)), adam)
    check_swag(CalibrateConfig("x", methods=MethodsConfig(swag_epochs=2, swag_lr=0.1)), adam)


def test_divergence_is_said(trained):
    with pytest.raises(
        ExperimentError, match=r"SGD of SWAG diverged in epoch \d at learning rate 1e\+30; lower --methods\.swag_lr"
    ):
        follow_sgd(trained, 4, 1e30)
