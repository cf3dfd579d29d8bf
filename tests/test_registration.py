"""A structure, a likelihood and a backend from outside the package: fit, evidence, prediction and files with each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from cases import double
from torch import Tensor, nn

from laplace_ws import Gaussian, Laplace, Likelihood, load_posterior
from laplace_ws.curvature import BACKENDS, Backend, NativeBackend, exact, register_backend
from laplace_ws.kfac import DiagAccumulator
from laplace_ws.likelihoods import LIKELIHOODS, register_likelihood
from laplace_ws.matrices import Diag
from laplace_ws.posterior import STRUCTURES, Structure, register_structure

F64 = torch.float64


class LayerMeanAccumulator(DiagAccumulator):
    """The diagonal, with its mean over each parameter in place of every entry."""

    def result(self) -> Diag:
        diagonal = super().result().to_dense().diagonal()
        parts = diagonal.split([shape.numel() for shape in self.shapes.values()])
        return Diag(self.shapes, torch.cat([part.mean().expand(len(part)) for part in parts]))


@dataclass(frozen=True)
class LayerMeanStructure(Structure):
    """One curvature for all weights of a parameter, times `factor`."""

    name = "layer_mean"
    matrix = Diag
    factor: float = 1.0

    def curvature(self, problem, batches, before):
        found = problem.accumulate(batches, LayerMeanAccumulator)
        return found._replace(H=found.H * self.factor)

    def check(self, problem, x):
        problem.check(x, LayerMeanAccumulator)


class Poisson(Likelihood):
    """Counts y with rate exp(f)."""

    name = "poisson"

    def check(self, f: Tensor, y: Tensor) -> None:
        assert f.shape == y.shape

    def nll_sum(self, f, y):
        return (f.exp() - y * f + torch.lgamma(y + 1)).sum()

    def hessian_columns(self, f, mask=None) -> Iterator[Tensor]:
        for c in range(f.shape[1]):
            column = torch.zeros_like(f)
            column[:, c] = (0.5 * f[:, c]).exp()
            yield column

    def sampled_column(self, f, generator):
        return f.exp() - torch.poisson(f.exp(), generator=generator)

    def gradient_column(self, f, y):
        return f.exp() - y

    def predictive_mean(self, f):
        return f.exp()

    def predictive_nll(self, prediction, y):
        return (prediction - y * prediction.log() + torch.lgamma(y + 1)).mean()


class CountingBackend(Backend):
    """The native backend, with a count of the passes through a model."""

    name = "counting"
    n_passes = 0

    def linearise(self, model, x, parameters):
        type(self).n_passes += 1
        return NativeBackend().linearise(model, x, parameters)


@pytest.fixture(autouse=True)
def _registered():
    register_structure(LayerMeanStructure)
    register_likelihood(Poisson)
    register_backend("counting", CountingBackend)
    yield
    STRUCTURES.unregister("layer_mean")
    LIKELIHOODS.unregister("poisson")
    BACKENDS.unregister("counting")


def network() -> nn.Module:
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def dense_evidence(la: Laplace, model: nn.Module, nll_sum: Tensor) -> Tensor:
    """The formula of the log marginal likelihood, with the curvature of `la` in full."""
    delta = la.prior_precision_diag
    precision = la.H.to_dense().double() + torch.diag(delta)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    return -nll_sum - 0.5 * theta.dot(delta * theta) - 0.5 * (torch.logdet(precision) - delta.log().sum())


def restored(la: Laplace, model: nn.Module, tmp_path) -> Laplace:
    la.save(tmp_path / "la.pt")
    other = load_posterior(tmp_path / "la.pt", model)
    assert other.options == la.options
    assert other.log_marginal_likelihood() == la.log_marginal_likelihood()
    return other


def test_a_structure_from_outside(tmp_path):
    model, x, y = network(), torch.randn(9, 3, dtype=F64), torch.arange(9) % 2
    la = Laplace(model, "classification", hessian_structure="layer_mean", factor=2.0, prior_precision=3.0)
    la.fit([(x, y)])
    diagonal = exact.ggn(model, "classification", x, y).diagonal()
    means = [2 * part.mean().expand(len(part)) for part in diagonal.split([p.numel() for p in model.parameters()])]
    torch.testing.assert_close(la.H.to_dense().diagonal(), torch.cat(means))
    nll = nn.functional.cross_entropy(model(x), y, reduction="sum")
    torch.testing.assert_close(la.log_marginal_likelihood(), dense_evidence(la, model, nll.detach()))
    la.optimize_prior_precision("marglik", prior_structure="layerwise")
    other = restored(la, model, tmp_path)
    assert other.structure == LayerMeanStructure(factor=2.0)
    assert torch.equal(other(x), la(x))
    assert torch.equal(*(p.sample(2, torch.Generator().manual_seed(0)) for p in (la, other)))
    with pytest.raises(ValueError, match="factor is for hessian_structure='layer_mean', not 'kron'"):
        Laplace(model, "classification", factor=2.0)


def test_a_likelihood_from_outside(tmp_path):
    model, x = network(), torch.randn(9, 3, dtype=F64)
    y = torch.poisson(torch.ones(9, 2, dtype=F64))
    la = Laplace(model, "poisson", hessian_structure="full", prior_precision=2.0)
    la.fit([(x, y)])
    J, rates = exact.jacobian(model, x), model(x).exp().detach()
    torch.testing.assert_close(la.H.to_dense(), torch.einsum("ndp,nd,ndq->pq", J, rates, J))
    torch.testing.assert_close(la.log_marginal_likelihood(), dense_evidence(la, model, Poisson().nll_sum(model(x), y)))
    la.optimize_prior_precision("gridsearch", val_loader=[(x, y)], link_approx="mc", n_samples=5, grid_size=3)
    other = restored(la, model, tmp_path)
    assert isinstance(other.likelihood, Poisson)
    probit = la(x)
    assert torch.equal(other(x), probit)
    assert probit.shape == y.shape


def test_a_backend_from_outside(tmp_path):
    model, x, y = network(), torch.randn(9, 3, dtype=F64), torch.arange(9) % 2
    la, native = Laplace(model, "classification", backend="counting"), Laplace(model, "classification")
    for posterior in (la, native):
        posterior.fit([(x, y)])
    assert CountingBackend.n_passes > 1
    assert la.log_marginal_likelihood() == native.log_marginal_likelihood()
    torch.testing.assert_close(la(x), native(x))
    other = restored(la, model, tmp_path)
    assert other.backend.name == "counting"
    assert torch.equal(other(x), la(x))


def test_joint_moments_of_a_likelihood_that_does_not_say_that_its_mean_is_linear():
    class Squared(Gaussian):
        name = "squared"
        has_linear_mean = False

    model, x, y = network(), torch.randn(9, 3, dtype=F64), torch.randn(9, 2, dtype=F64)
    la = Laplace(model, Squared())
    la.fit([(x, y)])
    la(x)
    with pytest.raises(ValueError, match="joint=True needs a mean that is linear in the outputs, which 'squared'"):
        la(x, joint=True)
