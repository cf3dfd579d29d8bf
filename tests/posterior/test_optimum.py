"""The prior precisions and the noise at which the log marginal likelihood is highest."""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
from cases import CASES, double
from scipy import optimize
from torch import nn

from laplace_ws import Laplace, NotFittedError
from laplace_ws.marglik import Hyperparameters
from laplace_ws.posterior import PriorGroups, prior_groups
from laplace_ws.posterior.evidence import BOUNDS, Box, Evidence

F64 = torch.float64
SETTINGS = [
    (structure, prior)
    for structure in ("kron", "ekfac", "diag", "full", "lowrank")
    for prior in ("scalar", "layerwise", "parameter", "weight")
    if prior != "weight" or structure not in ("kron", "ekfac")
]
ONE_OF_EACH = [
    ("kron", "layerwise"),
    ("ekfac", "parameter"),
    ("diag", "scalar"),
    ("full", "layerwise"),
    ("lowrank", "parameter"),
]
"""For what takes hundreds of steps; that every setting's optimum is stationary, which is enough of a concave value, is tested for all."""


def data_of(task: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator, dtype=F64)
    if task == "classification":
        return x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long()
    noise = 0.3 * torch.randn(40, 3, generator=generator, dtype=F64)
    return x, torch.stack([x.sum(1).sin(), x[:, 0], x[:, 1] * x[:, 2]], 1) + noise


@functools.cache
def trained(task: str) -> nn.Module:
    """A small network after some training; far from its start, so that no optimum lies at a limit."""
    torch.manual_seed(0)
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    x, y = data_of(task)
    loss = nn.functional.cross_entropy if task == "classification" else nn.functional.mse_loss
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model


def fitted(structure: str, task: str, **options):
    la = Laplace(copy.deepcopy(trained(task)), task, hessian_structure=structure, **options)
    la.fit([data_of(task)])
    return la


def gradients(la, delta: torch.Tensor, sigma: torch.Tensor, groups: PriorGroups) -> torch.Tensor:
    """∂ log p(D) by the logarithm of every group's prior precision, and of the noise."""
    log_delta = torch.zeros(len(groups.names), dtype=F64, requires_grad=True)
    log_sigma = torch.zeros((), dtype=F64, requires_grad=True)
    noise = sigma * log_sigma.exp() if la.likelihood.has_noise else None
    value = la.log_marginal_likelihood(delta * groups.spread(log_delta.exp()), noise)
    inputs = [log_delta, log_sigma] if la.likelihood.has_noise else [log_delta]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, inputs)])


@pytest.mark.parametrize("curvature", ["ggn", "ef"])
@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize(("structure", "prior"), SETTINGS)
def test_the_optimum_is_stationary_and_where_it_should_be(structure, prior, task, curvature):
    la = fitted(structure, task, curvature=curvature)
    before = la.prior_precision.clone(), la.sigma_noise.clone()
    delta, sigma = la.optimal_prior_and_noise(prior)
    groups = prior_groups(la.shapes, prior)
    slopes = gradients(la, delta, sigma, groups)
    log_delta = torch.zeros(len(groups.names), dtype=F64)
    log_delta[groups.index] = delta.log().expand(len(groups.index))
    is_low, is_high = log_delta < math.log(BOUNDS[0]) + 1e-9, log_delta > math.log(BOUNDS[1]) - 1e-9
    inside, slopes_of_prior = ~(is_low | is_high), slopes[: len(log_delta)]
    assert inside.double().mean() > 0.7
    assert slopes_of_prior[inside].abs().max() < 1e-7
    assert (slopes_of_prior[is_low] <= 0).all()  # it would go on
    assert (slopes_of_prior[is_high] >= 0).all()
    if la.likelihood.has_noise:
        assert abs(slopes[-1]) < 1e-6
        assert 0.01 < sigma < 1
    assert torch.equal(la.prior_precision, before[0])
    assert torch.equal(la.sigma_noise, before[1])
    la.prior_precision, la.sigma_noise = delta, sigma  # both are of a form that the posterior takes
    again, sigma_again = la.optimal_prior_and_noise(prior)
    torch.testing.assert_close((again.log(), sigma_again.log()), (delta.log(), sigma.log()), rtol=0, atol=1e-8)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "lowrank"])
def test_it_is_what_a_scalar_search_finds(structure):
    la = fitted(structure, "classification", temperature=1.4, prior_mean=0.05)
    search = optimize.minimize_scalar(lambda t: -la.log_marginal_likelihood(math.exp(t)).item(), (-1.0, 1.0), tol=1e-12)
    assert la.optimal_prior_precision("scalar").log().item() == pytest.approx(search.x, abs=1e-6)


@pytest.mark.many(2)
@pytest.mark.parametrize(
    ("structure", "prior", "task"), [("kron", "parameter", "regression"), ("full", "layerwise", "classification")]
)
def test_it_is_where_a_long_run_of_adam_ends(structure, prior, task):
    la = fitted(structure, task)
    delta, sigma = la.optimal_prior_and_noise(prior)
    groups = prior_groups(la.shapes, prior)
    hyper = Hyperparameters(groups, tune_sigma=la.likelihood.has_noise, lr=0.1)
    for lr in (0.1, 0.01, 1e-3, 1e-4, 1e-5):
        for options in hyper.optimizer.param_groups:
            options["lr"] = lr
        hyper.ascend(la, 300, max_log_step=30.0)
    torch.testing.assert_close(hyper.prior_precision().log(), delta.log(), rtol=0, atol=1e-6)
    assert hyper.sigma_noise().log().item() == pytest.approx(sigma.log().item(), abs=1e-6)


@pytest.mark.many(2)
@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize(("structure", "prior"), ONE_OF_EACH)
def test_mackays_updates_end_there_and_never_go_down(structure, prior, task):
    la = fitted(structure, task)
    delta, sigma = la.optimal_prior_and_noise(prior)
    groups = prior_groups(la.shapes, prior)
    evidence, limits = Evidence(la.fitted, la.prior, groups), torch.zeros(len(groups.names), dtype=F64)
    noise_limits = (math.log(BOUNDS[0]), math.log(BOUNDS[1])) if la.likelihood.has_noise else (0.0, 0.0)
    box = Box((limits + math.log(BOUNDS[0]), limits + math.log(BOUNDS[1])), noise_limits)
    point, value = (limits + 4, 0.0), -math.inf
    for _ in range(400):
        point = evidence.mackay(*point, box)
        before, value = value, evidence.value(*point)
        assert value >= before - 1e-9
    torch.testing.assert_close(groups.spread(point[0]), delta.log(), rtol=0, atol=1e-6)
    assert point[1] == pytest.approx(sigma.log().item(), abs=1e-6)


def test_mackays_update_is_mackays():
    """δ ← γ/‖θ‖², σ² ← SSE/(n − γ), with γ from dense algebra."""
    la = fitted("full", "regression", prior_precision=2.0, sigma_noise=0.5)
    groups = prior_groups(la.shapes, "scalar")
    precision = la.H.to_dense() / 0.25 + 2 * torch.eye(la.n_params, dtype=F64)
    gamma = la.n_params - 2 * torch.linalg.inv(precision).trace().item()
    x, y = data_of("regression")
    square_error = (la.model(x) - y).square().sum().item()
    free = torch.full((1,), -10.0, dtype=F64), torch.full((1,), 10.0, dtype=F64)
    log_delta, log_sigma = Evidence(la.fitted, la.prior, groups).mackay(
        torch.tensor([math.log(2.0)], dtype=F64), math.log(0.5), Box(free, (-10.0, 10.0))
    )
    assert log_delta.exp().item() == pytest.approx(gamma / la.mean.square().sum().item())
    assert math.exp(2 * log_sigma) == pytest.approx(square_error / (y.numel() - gamma))


def test_mackays_noise_update_survives_more_parameters_than_targets():
    """n − 2γ below zero has no update of its own: the noise goes up, as far as the value rises."""
    la = fitted("diag", "regression", curvature="ef", sigma_noise=0.05, prior_precision=1e-3)
    free = torch.full((1,), -14.0, dtype=F64), torch.full((1,), 14.0, dtype=F64)
    fit = replace(la.fitted, totals=replace(la.fitted.totals, n_targets=10.0))
    evidence = Evidence(fit, la.prior, prior_groups(la.shapes, "scalar"))
    before = torch.full((1,), -6.9, dtype=F64), math.log(0.05)
    assert evidence.effective(before[1], before[0].exp())[0] > 5
    after = evidence.mackay(*before, Box(free, (-14.0, 14.0)))
    assert after[1] > before[1]


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "lowrank"])
@pytest.mark.parametrize("prior", ["scalar", "layerwise"])
def test_groups_without_weights_or_curvature_end_at_the_limits(structure, prior):
    model = double(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)  # dead: nothing before the ReLU has curvature, and the second layer's inputs are zero
        model[2].weight.fill_(0.3)
        model[2].bias.zero_()
    x, y = data_of("classification")
    la = Laplace(model, "classification", hessian_structure=structure)
    la.fit([(x, y.clamp(max=1))])
    found = la.optimal_prior_precision(prior)
    assert found.isfinite().all()
    if prior == "layerwise":
        assert found[:2].tolist() == pytest.approx([BOUNDS[0]] * 2)  # weights, no curvature
    alone = la.optimal_prior_precision("parameter")
    assert alone[0] == la.prior_precision  # neither
    assert alone[1:].tolist() == pytest.approx([BOUNDS[0], BOUNDS[0], BOUNDS[1]])


def test_the_prior_mean_counts():
    la = fitted("kron", "classification")
    plain = la.optimal_prior_precision("scalar")
    la.prior_mean = la.mean + 0.01
    assert la.optimal_prior_precision("scalar") > 10 * plain


def test_a_noise_without_error_goes_to_its_limit():
    la = fitted("diag", "regression")
    x, _ = data_of("regression")
    la.fit([(x, la.model(x).detach())])
    la.prior_mean = la.mean
    delta, sigma = la.optimal_prior_and_noise("scalar")
    assert delta.item() == pytest.approx(BOUNDS[1])
    assert sigma.item() == pytest.approx(BOUNDS[0])


def test_bad_input_is_said_in_one_sentence():
    model, x, y = CASES[0].make()
    la = Laplace(model, "classification")
    with pytest.raises(NotFittedError, match="call fit"):
        la.optimal_prior_precision()
    la.fit([(x, y)])
    with pytest.raises(
        ValueError, match='prior_structure="weight" needs hessian_structure "diag", "full" or "lowrank"'
    ):
        la.optimal_prior_precision("weight")
    with pytest.raises(ValueError, match="prior_structure='layers' is not one of"):
        la.optimal_prior_precision("layers")


def test_without_noise_the_noise_stays():
    la = fitted("kron", "classification")
    delta, sigma = la.optimal_prior_and_noise("layerwise")
    assert sigma == 1
    torch.testing.assert_close(delta, la.optimal_prior_precision("layerwise"), rtol=0, atol=0)


def test_a_search_does_not_go_on_where_values_differ_by_their_rounding():
    """A perceptron whose last steps towards the joint optimum of priors and noise are lost in the rounding of the log determinant."""
    torch.manual_seed(0)
    parts = []
    for low in (-3, 1):
        part = low + 2 * torch.rand(75, 1, dtype=F64)
        parts.append((part, torch.sin(2 * part) + 0.2 * torch.randn_like(part)))
    x, y = (torch.cat(pair) for pair in zip(*parts, strict=True))
    model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
    for _ in range(1500):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    la = Laplace(model, "regression", hessian_structure="full")
    la.fit([(x, y)])
    n_values = 0
    log_det = la.H.log_det

    def counted(*args):
        nonlocal n_values
        n_values += 1
        return log_det(*args)

    la.H.log_det = counted
    la.optimize_prior_precision(prior_structure="layerwise", optimize_noise=True)
    assert n_values < 500
    evidence = Evidence(la.fitted, la.prior, prior_groups(la.shapes, "layerwise"))
    gamma, _ = evidence.effective(la.sigma_noise.log().item(), la.prior_precision[::2])
    torch.testing.assert_close(gamma, la.prior_precision[::2] * evidence.square_sums, rtol=1e-7, atol=0)
