"""laplace-torch 0.3 as an oracle, where it and we approximate alike: separate biases, summed over the data."""

from importlib.metadata import requires, version

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ws import Laplace

laplace = pytest.importorskip("laplace", reason="laplace-torch is in the extra 'bench'")
from laplace.curvature import AsdlGGN, CurvlinopsEF, CurvlinopsGGN  # noqa: E402

NEEDED_ASDL = next(r for r in map(Requirement, requires("laplace-torch") or []) if r.name == "asdfghjkl")
needs_its_asdl = pytest.mark.skipif(
    not NEEDED_ASDL.specifier.contains(version("asdfghjkl"), prereleases=True),
    reason=f"laplace-torch {version('laplace-torch')} needs {NEEDED_ASDL}; {version('asdfghjkl')} is installed",
)
"""On tests in which laplace-torch calls ASDL: its full posterior over all layers."""

PREDICTIONS = ["probit", "bridge", "bridge_norm"]


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(20, 5)


def cnn():
    convolutions = (nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, stride=2), nn.Tanh())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(12, 3)), torch.randn(20, 2, 5, 5)


def pair(make, likelihood, structure, subset="all", backend=CurvlinopsGGN, **options):
    """Our posterior and theirs, in float64, of one network and one data set."""
    torch.manual_seed(0)
    model, x = make()
    model, x = model.double(), x.double()
    y = torch.arange(20) % 3 if likelihood == "classification" else torch.randn(20, 3, dtype=torch.float64)
    noise = {"sigma_noise": 0.7} if likelihood == "regression" else {}
    ours = Laplace(model, likelihood, subset, structure, prior_precision=0.6, **noise, **options)
    ours.fit(DataLoader(TensorDataset(x, y), batch_size=7))
    theirs = laplace.Laplace(
        model, likelihood, subset, structure, prior_precision=0.6, backend=backend, enable_backprop=False, **noise
    )
    theirs.fit(DataLoader(TensorDataset(x, y), batch_size=7))
    return ours, theirs, x


def close(ours, theirs):
    torch.testing.assert_close(ours.double(), theirs.double().detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("structure", [pytest.param("full", marks=needs_its_asdl), "diag", "kron"])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_evidence_variance_and_predictions(make, structure, likelihood):
    """Their Kronecker factors of convolutions are those of K-FAC-expand."""
    backend = AsdlGGN if structure == "full" else CurvlinopsGGN
    options = {"kfac_approx": "expand"} if structure == "kron" else {}
    ours, theirs, x = pair(make, likelihood, structure, backend=backend, **options)
    close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    if likelihood == "regression":
        mean, covariance = ours(x)
        close(mean, theirs(x)[0])
        close(covariance, theirs(x)[1])
        return
    covariance = ours.functional_moments(x)[1]
    close(covariance, theirs.functional_variance(theirs.backend.jacobians(x)[0]))
    for link in PREDICTIONS:
        close(ours(x, link_approx=link), theirs(x, link_approx=link))


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_last_layer(structure):
    options = {"kfac_approx": "expand"} if structure == "kron" else {}
    ours, theirs, x = pair(mlp, "classification", structure, "last_layer", **options)
    close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    for link in PREDICTIONS:
        close(ours(x, link_approx=link), theirs(x, link_approx=link))


def test_empirical_fisher():
    ours, theirs, _ = pair(mlp, "classification", "diag", backend=CurvlinopsEF, curvature="ef")
    close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
