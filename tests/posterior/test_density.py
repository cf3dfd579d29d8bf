"""The posterior as a distribution of the weights, against dense algebra and torch's own Gaussian in float64."""

import pytest
import torch
from posterior.shared import STRUCTURES, dense_covariance, fitted
from torch.distributions import MultivariateNormal

from laplace_ws import Laplace, NotFittedError
from laplace_ws.curvature import exact

close = torch.testing.assert_close
CASES = ["mlp", "cnn", "tied-weights", "grouped-conv", "transformer-tokens", "vision-transformer"]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("case", ["mlp", "cnn", "grouped-conv"])
def test_moments_are_those_of_dense_algebra(structure, case):
    la, _, _ = fitted(structure, case, prior_precision=0.7)
    truth = dense_covariance(la)
    close(la.posterior_covariance, truth)
    close(la.posterior_variance, truth.diagonal())
    la.covariance_scale = 3.0
    close(la.posterior_covariance, 3 * truth)
    close(la.posterior_variance, 3 * truth.diagonal())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_density_is_that_of_a_gaussian(structure):
    la, _, _ = fitted(structure, prior_precision=0.7)
    la.covariance_scale = 1.5
    truth = MultivariateNormal(la.mean, 1.5 * dense_covariance(la))
    weights = la.mean + torch.randn(4, la.n_params, dtype=torch.float64)
    close(la.log_prob(weights), truth.log_prob(weights))
    close(la.log_prob(weights[0]), truth.log_prob(weights[0]))
    differences = la.log_prob(weights, normalized=False) - truth.log_prob(weights)
    close(differences, differences[:1].expand(4))
    close(la.square_norm(weights), -2 * la.log_prob(weights, normalized=False))
    assert la.square_norm(la.mean) == 0


def test_scatter_is_the_penalty_of_the_prior():
    la, _, _ = fitted("diag", prior_mean=0.2)
    delta = torch.rand(la.n_params, dtype=torch.float64) + 0.1
    la.prior_precision = delta.requires_grad_()
    deviation = la.mean - 0.2
    close(la.scatter, (deviation.square() * delta).sum())
    (gradient,) = torch.autograd.grad(la.scatter, delta)
    close(gradient, deviation.square())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["native", "asdl", "backpack"])
def test_jacobians_are_autograds(case, backend):
    if backend != "native" and case in ("transformer-tokens", "vision-transformer"):
        pytest.skip("attention needs the native backend")
    la, x, _ = fitted("diag", case, backend=backend)
    J, f = la.jacobians(x)
    close(J, exact.jacobian(la.model, x))
    close(f, la.model.eval()(x).detach())
    assert not J.requires_grad


def test_jacobians_of_some_weights():
    model = fitted("diag")[0].model
    indices = torch.tensor([0, 3, 5, 11])
    la = Laplace(model, "classification", "subnetwork", "full", subnetwork_indices=indices)
    x, y = fitted("diag")[1:]
    la.fit([(x, y)])
    close(la.jacobians(x)[0], exact.jacobian(model, x)[..., indices])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("case", ["mlp", "cnn", "grouped-conv", "transformer-first-token"])
def test_covariance_of_linear_functions(structure, case):
    la, x, _ = fitted(structure, case, prior_precision=0.7)
    J, Sigma = exact.jacobian(la.model, x), dense_covariance(la)
    close(la.functional_variance(J), J @ Sigma @ J.mT)
    flat = J.flatten(0, 1)
    close(la.functional_covariance(J), flat @ Sigma @ flat.mT)
    close(la.functional_variance(la.jacobians(x)[0]), la.functional_moments(x)[1])
    rows = torch.randn(2, 3, la.n_params, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(la.functional_variance(rows).sum(), rows)
    (truth,) = torch.autograd.grad((rows @ Sigma @ rows.mT).sum(), rows)
    close(gradient, truth)


def test_a_float32_network_has_its_moments_in_float64():
    la, x, y = fitted("kron")
    single = Laplace(la.model.float(), la.likelihood)
    single.fit([(x.float(), y)])
    J, f = single.jacobians(x.float())
    assert J.dtype == f.dtype == torch.float32
    for moment in (single.posterior_variance, single.functional_variance(J), single.log_prob(single.mean)):
        assert moment.dtype == torch.float64


@pytest.mark.parametrize("what", ["posterior_covariance", "posterior_variance", "scatter"])
def test_there_is_nothing_before_a_fit(what):
    la = Laplace(fitted("diag")[0].model, "classification")
    with pytest.raises(NotFittedError, match="call fit"):
        getattr(la, what)
