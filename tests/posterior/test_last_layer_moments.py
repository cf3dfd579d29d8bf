"""Covariances of the outputs of a last layer in closed form, against dense algebra and against the way by backward passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_ws import Laplace
from laplace_ws.posterior import functional

pytestmark = pytest.mark.filterwarnings(
    "ignore::laplace_ws.errors.CurvatureWarning", "ignore:the gradient method stopped"
)
N, C = 5, 4


class Permuted(nn.Module):
    """A head that is a convolution, with the classes put last and the pixels in a row."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(2, 3, 3), nn.Conv2d(3, C, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))).flatten(2).mT


class Shifted(nn.Module):
    """A head whose outputs are added to what does not depend on it."""

    def __init__(self):
        super().__init__()
        self.body, self.skip, self.head = nn.Linear(3, 6), nn.Linear(3, C), nn.Linear(6, C)

    def forward(self, x):
        return torch.log_softmax(self.skip(x), -1) + self.head(torch.tanh(self.body(x)))


class Projected(nn.Module):
    """A head that is a matrix product with the outputs last in W, and no bias."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 6), nn.Module()
        self.head.weight = nn.Parameter(torch.randn(6, C))

    def forward(self, x):
        return torch.tanh(self.body(x)) @ self.head.weight


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, C))


def _vectors():
    return torch.randn(N, 3, dtype=torch.float64)


def _images():
    return torch.randn(N, 2, 5, 4, dtype=torch.float64)


NETWORKS = {
    "mlp": (mlp, _vectors, ["2.*"]),
    "mlp-no-bias": (mlp, _vectors, ["2.weight"]),
    "mlp-bias-only": (mlp, _vectors, ["2.bias"]),
    "tokens": (mlp, lambda: torch.randn(N, 2, 3, dtype=torch.float64), ["2.*"]),
    "pixels": (Permuted, _images, ["head"]),
    "shifted": (Shifted, _vectors, ["head"]),
    "projected": (Projected, _vectors, ["head.weight"]),
}
OTHERS = {  # not the outputs of the layer: scaled, mixed, or of another layer
    "scaled": (lambda: nn.Sequential(mlp(), Scale()), _vectors, ["0.2.*"]),
    "mixed": (lambda: nn.Sequential(mlp(), Flip()), _vectors, ["0.2.*"]),
    "relu": (lambda: nn.Sequential(mlp(), nn.ReLU()), _vectors, ["0.2.*"]),
    "first layer": (mlp, _vectors, ["0.*"]),
    "square first layer": (lambda: nn.Sequential(nn.Linear(3, C), nn.Tanh(), nn.Linear(C, C)), _vectors, ["0.*"]),
}


class Scale(nn.Module):
    def forward(self, f):
        return 2 * f


class Flip(nn.Module):
    def forward(self, f):
        return f.flip(-1)


def _fitted(make, make_x, subset, structure="kron", **options):
    torch.manual_seed(0)
    model, x = make().double(), make_x()
    y = torch.randint(0, C, model(x).shape[:-1])
    la = Laplace(model, "classification", subset, structure, prior_precision=0.7, temperature=1.3, **options)
    return la.fit([(x, y)]), x


def _dense(la, x):
    """Covariance over all examples and outputs `[N, D, N, D]`, by the Jacobian in full and an inverse."""
    scale, _ = la.fitted.damping(la.prior)
    covariance = torch.linalg.inv(la.H.to_dense() * scale + torch.diag(la.prior_precision_diag))
    J, f = la.jacobians(x)
    return torch.einsum("ndp,pq,meq->ndme", J, covariance, J), f


def _check(la, x):
    truth, outputs = _dense(la, x)
    f, covariance = la.functional_moments(x)
    torch.testing.assert_close(f, outputs)
    own = truth[range(N), :, range(N)]
    if f.ndim == 3:
        own = torch.stack([own[:, t : t + C, t : t + C] for t in range(0, own.shape[1], C)], 1)
    close(covariance, own)
    close(la.functional_moments(x, diagonal_output=True)[1], own.diagonal(dim1=-2, dim2=-1).reshape(f.shape))
    close(la.functional_moments(x, joint=True)[1], truth.reshape(f.numel(), f.numel()))


def close(found, truth):
    assert found.shape == truth.shape
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


@pytest.fixture
def by_backward_passes(monkeypatch):
    """Counts the moments that take a backward pass for each output."""
    calls = []
    covariances = functional.LinearisedModel._covariances

    def counted(self, *args):
        calls.append(None)
        return covariances(self, *args)

    monkeypatch.setattr(functional.LinearisedModel, "_covariances", counted)
    return calls


@pytest.mark.parametrize("max_factor_dim", [None, 3, 5])
@pytest.mark.parametrize("network", NETWORKS)
def test_kron_is_dense_algebra_without_backward_passes(network, max_factor_dim, by_backward_passes):
    la, x = _fitted(*NETWORKS[network], max_factor_dim=max_factor_dim)
    _check(la, x)
    assert not by_backward_passes


@pytest.mark.parametrize("structure", ["ekfac", "diag"])
@pytest.mark.parametrize("network", NETWORKS)
def test_other_structures_too(network, structure, by_backward_passes):
    la, x = _fitted(*NETWORKS[network], structure)
    _check(la, x)
    assert not by_backward_passes


@pytest.mark.parametrize("backend", ["asdl", "backpack"])
@pytest.mark.parametrize("network", ["mlp", "tokens", "pixels"])
def test_other_backends_too(network, backend, by_backward_passes):
    la, x = _fitted(*NETWORKS[network], backend=backend)
    _check(la, x)
    assert not by_backward_passes


@pytest.mark.parametrize("network", OTHERS)
def test_what_is_not_the_output_of_the_layer_takes_the_other_way(network, by_backward_passes):
    la, x = _fitted(*OTHERS[network])
    _check(la, x)
    assert by_backward_passes


def test_a_prior_precision_of_each_parameter_or_weight():
    la, x = _fitted(*NETWORKS["mlp"])
    la.prior_precision = torch.tensor([0.3, 2.0])
    _check(la, x)
    la, x = _fitted(*NETWORKS["mlp"], "diag")
    la.prior_precision = torch.rand(la.n_params, dtype=torch.float64) + 0.2
    _check(la, x)


def test_the_memory_budget_changes_chunks_and_nothing_else():
    la, x = _fitted(*NETWORKS["tokens"])
    whole = la.functional_moments(x)
    la.memory_budget = 1
    for part, full in zip(la.functional_moments(x), whole, strict=True):
        torch.testing.assert_close(part, full)


def test_examples_that_differ_in_whether_the_closed_form_holds():
    """A ReLU behind the layer is the identity for the first example alone."""
    la, x = _fitted(lambda: nn.Sequential(mlp(), nn.ReLU()), _vectors, ["0.2.*"])
    with torch.no_grad():
        la.model[0][2].bias -= la.model[0](x[:1])[0] - 0.1
    la = Laplace(la.model, "classification", ["0.2.*"]).fit([(x, torch.zeros(N, dtype=torch.long))])
    assert (la.model(x[:1]) > 0).all()
    assert not (la.model(x) > 0).all()
    la.memory_budget = 1
    _check(la, x)


def test_gradients_in_the_inputs_are_those_of_the_other_way():
    la, x = _fitted(*NETWORKS["mlp"])
    x.requires_grad_()
    _, variances = la.functional_moments(x, diagonal_output=True, backprop=True)
    (found,) = torch.autograd.grad(variances.sum(), x)
    step = 1e-5 * torch.randn_like(x)
    up, down = (la.functional_moments((x + sign * step).detach(), diagonal_output=True)[1].sum() for sign in (1, -1))
    torch.testing.assert_close((found * step).sum(), (up - down) / 2, rtol=1e-5, atol=0)


def test_validation_in_the_prior_is_differentiable():
    la, x = _fitted(*NETWORKS["mlp"])
    y = torch.randint(0, C, (N,))
    la.optimize_prior_precision("gradient", val_loader=[(x, y)], n_steps=3)
    assert la.prior_precision.item() != 0.7


def test_many_classes_take_seconds_and_not_minutes():
    """3,000 classes with the diagonal of B: variances of 64 inputs took 190 groups of backward passes before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3000))
    x, y = torch.randn(64, 3), torch.randint(0, 3000, (64,))
    la = Laplace(model, "classification", "last_layer", curvature="ggn_mc", max_factor_dim=512).fit([(x, y)])
    pulled = []
    linearise = la.backend.linearise

    def counted(*args, **options):
        pulled.append(None)
        return linearise(*args, **options)

    la.backend.linearise = counted
    assert la(x).shape == (64, 3000)
    assert len(pulled) <= 3
