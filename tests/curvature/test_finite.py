"""An infinite input behind a layer that saturates leaves outputs finite; what is stored or returned is not, and is refused."""

import pytest
import torch
from cases import double
from posterior.shared import STRUCTURES
from torch import nn

from laplace_ws import InvalidBatchError, Laplace, kron_factors
from laplace_ws.curvature import FACTOR_BACKENDS, CurvatureProducts, curvature_sum, jacobians

MEND = "look for infinite values and NaN in the inputs of all batches and in the model's weights"


def network():
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))


def batches(n_batches, at=None):
    """Batches of eight examples, one of which has an infinite feature."""
    found = [(torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3) for _ in range(n_batches)]
    if at is not None:
        found[at][0][3, 1] = torch.inf
    return found


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("at", [0, 2])
def test_a_fit_to_an_infinite_input_names_the_parameter(structure, at):
    la = Laplace(network(), "classification", hessian_structure=structure)
    with pytest.raises(InvalidBatchError, match=rf"the (curvature|gradient) of '0\.weight' is not finite; {MEND}"):
        la.fit(batches(3, at))


@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
def test_factors_and_jacobians_are_finite_or_an_error(backend):
    with pytest.raises(InvalidBatchError, match=rf"the curvature of '0\.weight' is not finite; {MEND}"):
        kron_factors(network(), "classification", batches(2, 1), backend=backend)
    with pytest.raises(InvalidBatchError, match=rf"the gradient of '0\.weight' is not finite; {MEND}"):
        jacobians(network(), batches(1, 0)[0][0], backend=backend)


def test_products_are_finite_or_an_error():
    products = CurvatureProducts(network(), "classification", batches(2, 1))
    with pytest.raises(InvalidBatchError, match=rf"the gradient of '0\.weight' is not finite; {MEND}"):
        products.product(torch.ones(1, products.n_params, dtype=torch.float64))


def test_the_curvature_is_looked_at_once_a_fit(monkeypatch):
    looked = []
    check = curvature_sum.check_finite_curvature
    monkeypatch.setattr(curvature_sum, "check_finite_curvature", lambda H: looked.append(H) or check(H))
    Laplace(network(), "classification").fit(batches(5))
    assert len(looked) == 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_predictions_at_an_infinite_input_are_refused(structure):
    la = Laplace(network(), "classification", hessian_structure=structure)
    la.fit(batches(2))
    x = batches(1, 0)[0][0]
    calls = [
        *(lambda link=link: la(x, link_approx=link) for link in ("probit", "mc", "bridge", "bridge_norm")),
        lambda: la.functional_moments(x),
        lambda: la.functional_moments(x, diagonal_output=True),
        lambda: la.functional_moments(x, joint=True),
        lambda: la.functional_samples(x),
        lambda: la.predictive_samples(x),
    ]
    for call in calls:
        with pytest.raises(
            InvalidBatchError, match="predicts is not finite; look for infinite values and NaN in the inputs"
        ):
            call()


@pytest.mark.parametrize("options", [{}, {"joint": True}, {"diagonal_output": True, "observation_noise": True}])
def test_regression_at_an_infinite_input_is_refused(options):
    la = Laplace(network(), "regression")
    la.fit([(x, torch.randn(8, 3).double()) for x, _ in batches(2)])
    with pytest.raises(InvalidBatchError, match="predicts is not finite"):
        la(batches(1, 0)[0][0], **options)
