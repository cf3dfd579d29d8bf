"""Newton's method and MacKay's updates in the place of Adam: confined as it is, and part of a run's settings."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from marglik.runs import QUICK, SGD, Never, blobs, mlp, noisy_sine
from torch import nn

from laplace_ws.experiment.config import DataConfig, MarglikConfig, RunConfig
from laplace_ws.experiment.run import load_data, make_model
from laplace_ws.experiment.training import check_training
from laplace_ws.marglik import CheckpointError, Hyperparameters, PriorCollapseWarning, marglik_training
from laplace_ws.posterior import Laplace, prior_groups
from laplace_ws.posterior.evidence import BOUNDS

CLOSED = ["newton", "mackay"]


def fitted(structure: str = "kron"):
    torch.manual_seed(0)
    model = mlp(1, 1)
    la = Laplace(model, "regression", hessian_structure=structure)
    la.fit(list(noisy_sine()))
    return la


def hyperparameters(la, prior: str = "layerwise", **options) -> Hyperparameters:
    return Hyperparameters(prior_groups(la.shapes, prior), **{"tune_sigma": True, "device": la.mean.device} | options)


@pytest.mark.parametrize("hyper_optimizer", CLOSED)
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_ascent_ends_at_the_posteriors_own_optimum(structure, hyper_optimizer):
    la = fitted(structure)
    delta, sigma = la.optimal_prior_and_noise("layerwise")
    hyper = hyperparameters(la, hyper_optimizer=hyper_optimizer, prior_precision=50.0)
    hyper.ascend(la, 300, max_log_step=30.0)
    torch.testing.assert_close(hyper.prior_precision().log(), delta.log(), rtol=0, atol=1e-6)
    assert hyper.sigma_noise().log().item() == pytest.approx(sigma.log().item(), abs=1e-6)
    torch.testing.assert_close(la.prior_precision, hyper.prior_precision().detach(), rtol=0, atol=0)
    torch.testing.assert_close(la.sigma_noise, hyper.sigma_noise().detach(), rtol=0, atol=0)


def test_newton_needs_one_step_and_mackay_counts_them():
    la = fitted()
    values = {}
    for hyper_optimizer, n_steps in (("newton", 1), ("newton", 50), ("mackay", 1), ("mackay", 2)):
        hyper = hyperparameters(la, hyper_optimizer=hyper_optimizer)
        hyper.ascend(la, n_steps, max_log_step=30.0)
        values[hyper_optimizer, n_steps] = la.log_marginal_likelihood().item()
    assert values["newton", 1] == values["newton", 50]
    assert values["mackay", 1] < values["mackay", 2] < values["newton", 1]
    hyper = hyperparameters(la, hyper_optimizer="newton")
    hyper.ascend(la, 0)
    assert hyper.log_prior_precision.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("hyper_optimizer", CLOSED)
def test_no_logarithm_moves_further_than_allowed(hyper_optimizer):
    la = fitted()
    hyper = hyperparameters(la, hyper_optimizer=hyper_optimizer, prior_precision=1e4)
    before = [p.detach().clone() for p in hyper.tuned]
    hyper.ascend(la, 20, max_log_step=0.3)
    moves = torch.cat([(p.detach() - start).flatten() for p, start in zip(hyper.tuned, before, strict=True)])
    assert moves.abs().max().item() == pytest.approx(0.3)


@pytest.mark.parametrize("hyper_optimizer", CLOSED)
def test_within_the_box_the_best_is_taken(hyper_optimizer):
    """A box that keeps one group from its optimum must not keep the others from theirs, and the noise from its own."""
    la = fitted("full")
    delta, _ = la.optimal_prior_and_noise("layerwise")
    hyper = hyperparameters(la, hyper_optimizer=hyper_optimizer)
    with torch.no_grad():
        hyper.log_prior_precision.copy_(delta.log()[[0, 2]] + torch.tensor([5.0, 0.5]))
    hyper.ascend(la, 300, max_log_step=3.0)
    assert hyper.log_prior_precision[0].item() == pytest.approx(delta[0].log().item() + 2.0)
    la.log_marginal_likelihood(hyper.prior_precision(), hyper.sigma_noise()).backward()
    assert hyper.log_prior_precision.grad[0] < -0.1
    assert abs(hyper.log_prior_precision.grad[1]) < 1e-5
    assert abs(hyper.log_sigma_noise.grad) < 1e-5


@pytest.mark.parametrize("hyper_optimizer", CLOSED)
@pytest.mark.parametrize("fixed", ["prior", "sigma"])
def test_what_is_not_tuned_stays(hyper_optimizer, fixed):
    la = fitted()
    options = {"tune_prior": fixed != "prior", "tune_sigma": fixed != "sigma"}
    hyper = hyperparameters(la, hyper_optimizer=hyper_optimizer, sigma_noise=0.5, prior_precision=3.0, **options)
    hyper.ascend(la, 200, max_log_step=30.0)
    moved = {"prior": hyper.log_prior_precision - math.log(3.0), "sigma": hyper.log_sigma_noise - math.log(0.5)}
    assert moved.pop(fixed).abs().max() < 1e-12
    ((name, move),) = moved.items()
    assert move.abs().max() > 0.01
    la.log_marginal_likelihood(hyper.prior_precision(), hyper.sigma_noise()).backward()
    grad = hyper.log_prior_precision.grad if name == "prior" else hyper.log_sigma_noise.grad
    assert grad.abs().max() < 1e-5


@pytest.mark.parametrize("hyper_optimizer", CLOSED)
def test_collapse_is_confined_and_reported_once(hyper_optimizer):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    x = torch.randn(20, 3, dtype=torch.float64)
    la = Laplace(model, "regression", hessian_structure="diag")
    la.fit([(x, torch.randn(20, 1, dtype=torch.float64))])
    hyper = hyperparameters(la, hyper_optimizer=hyper_optimizer, tune_sigma=False)
    with pytest.warns(PriorCollapseWarning, match=r"'0\.weight'") as caught:
        hyper.ascend(la, 40, max_log_step=100.0, stiffness=50.0)
    assert len(caught) == 1
    assert hyper.collapsed(50.0) == ["0.weight"]
    assert hyper.log_prior_precision[0].item() == pytest.approx(math.log(50.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hyper.ascend(la, 5, max_log_step=100.0, stiffness=50.0)
    hyper.ascend(la, 5, max_log_step=100.0)
    assert hyper.log_prior_precision[0].item() == pytest.approx(math.log(BOUNDS[1]))


def test_the_limit_holds_at_the_new_noise_too():
    la = fitted()
    hyper = hyperparameters(la, hyper_optimizer="newton", sigma_noise=0.01, prior_precision=50.0)
    with pytest.warns(PriorCollapseWarning):
        hyper.ascend(la, 1, max_log_step=30.0, stiffness=1e-4)
    assert (hyper.prior_precision() * hyper.sigma_noise() ** 2 <= 1e-4 * (1 + 1e-9)).all()


@pytest.mark.filterwarnings("ignore::laplace_ws.marglik.TemperatureWarning")
@pytest.mark.parametrize("hyper_optimizer", CLOSED)
def test_temperature_is_left_to_adam(hyper_optimizer):
    says = f'tune_temperature needs hyper_optimizer="adam": "{hyper_optimizer}" has no closed form for it'
    with pytest.raises(ValueError, match=says):
        marglik_training(
            mlp(), blobs(), **QUICK, optimizer_cls=Never, tune_temperature=True, hyper_optimizer=hyper_optimizer
        )
    marglik = MarglikConfig(tune_temperature=True, hyper_optimizer=hyper_optimizer)
    config = RunConfig(data=DataConfig(n_train=100), marglik=marglik)
    data = load_data(config)
    with pytest.raises(ValueError, match=says):
        check_training(config, make_model(config, data), data)


def test_an_unknown_name_is_refused_before_training():
    with pytest.raises(ValueError, match=r"hyper_optimizer='lbfgs' is not one of \['adam', 'newton', 'mackay'\]"):
        marglik_training(mlp(), blobs(), **QUICK, optimizer_cls=Never, hyper_optimizer="lbfgs")


class Stop(Exception):
    pass


def run(path, hyper_optimizer: str, *, until: int | None = None, regression: bool = False, **options):
    def on_epoch(record):
        if record["epoch"] == until:
            raise Stop

    torch.manual_seed(7)
    task = (mlp(1, 1), noisy_sine(), "regression") if regression else (mlp(), blobs(), "classification")
    options = QUICK | {"optimizer_kwargs": SGD, "fit_fraction": 0.5, "checkpoint_path": path} | options
    return marglik_training(*task, on_epoch=on_epoch, hyper_optimizer=hyper_optimizer, **options)


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("hyper_optimizer", CLOSED)
def test_resumed_equals_uninterrupted(tmp_path, hyper_optimizer, regression):
    whole = run(tmp_path / "whole.pt", hyper_optimizer, regression=regression)
    with pytest.raises(Stop):
        run(tmp_path / "part.pt", hyper_optimizer, until=3, regression=regression)
    resumed = run(tmp_path / "part.pt", hyper_optimizer, resume=True, regression=regression)
    assert resumed.losses == whole.losses
    assert resumed.margliks == whole.margliks
    assert resumed.prior_precision == whole.prior_precision
    assert len(set(whole.margliks)) == 3


@pytest.mark.parametrize("other", CLOSED)
def test_another_optimizer_is_another_run(tmp_path, other):
    with pytest.raises(Stop):
        run(tmp_path / "c.pt", "adam", until=3)
    with pytest.raises(CheckpointError, match=rf"\(hyper_optimizer was 'adam' and is '{other}'\)"):
        run(tmp_path / "c.pt", other, resume=True)


def test_adam_remains_the_default(tmp_path):
    named, default = run(tmp_path / "a.pt", "adam"), marglik_training.__kwdefaults__["hyper_optimizer"]
    assert default == MarglikConfig().hyper_optimizer == "adam"
    assert named.margliks != run(tmp_path / "b.pt", "newton").margliks
