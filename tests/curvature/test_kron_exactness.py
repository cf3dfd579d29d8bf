"""What holds for K-FAC whatever the backend: vector blocks, equality without sharing, the choice of the approximation; and the oracles."""

import pytest
import torch
from cases import CASES, LINEAR_CASES, Case, double
from torch import nn

from laplace_ws import kron_factors
from laplace_ws.curvature import exact

SETTINGS = ["expand", "reduce"]


def relative_error(estimate, truth):
    return ((estimate - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_auto_picks_the_exact_one(case, setting):
    """That it is exact, and that the other is not, the conformance suite shows for every backend."""
    model, x = double(case.make_model(setting)), case.make_x()
    data = [(x, torch.randn_like(model(x)))]
    auto, chosen = (kron_factors(model, "regression", data, kfac_approx=approx) for approx in ("auto", setting))
    assert torch.equal(auto.to_dense(), chosen.to_dense())


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.target_shape == c.target_shape[:1] or c.likelihood == "regression"], ids=str
)
def test_vector_blocks_of_reduce_are_exact(case: Case):
    """Biases of layers used once, scales, biases, affine parameters: on any network."""
    model, x, y = case.make()
    kron = kron_factors(model, case.likelihood, [(x, y)], kfac_approx="reduce")
    truth, slices = exact.ggn(model, case.likelihood, x, y), exact.parameter_slices(model)
    vectors = [name for name, block in kron.items() if block.A is None]
    assert vectors or case.name in ("adapters", "adapters-bare", "einsum-attention")
    for name in vectors:
        assert relative_error(kron[name].to_dense(), truth[slices[name], slices[name]]) < 1e-10, name


def test_expand_equals_reduce_without_sharing():
    case = next(c for c in CASES if c.name == "mlp")
    model, x, y = case.make()
    expand = kron_factors(model, case.likelihood, [(x, y)], kfac_approx="expand")
    reduce = kron_factors(model, case.likelihood, [(x, y)], kfac_approx="reduce")
    torch.testing.assert_close(expand.to_dense(), reduce.to_dense(), rtol=1e-12, atol=0)


def test_approximation_by_layer():
    model, x = double(LINEAR_CASES[0].make_model("reduce")), LINEAR_CASES[0].make_x()
    data = [(x, torch.randn_like(model(x)))]
    both = {approx: kron_factors(model, "regression", data, kfac_approx=approx) for approx in SETTINGS}
    mixed = kron_factors(model, "regression", data, kfac_approx={"layers.0.*": "expand", "*.weight": "reduce"})
    assert torch.equal(mixed["layers.0.weight"].A, both["expand"]["layers.0.weight"].A)
    assert torch.equal(mixed["layers.1.weight"].A, both["reduce"]["layers.1.weight"].A)
    with pytest.raises(ValueError, match=r"'layer.0.weight' matches no parameter .* nearest name is 'layers.0.weight'"):
        kron_factors(model, "regression", data, kfac_approx={"layer.0.weight": "expand"})


def test_oracle_equals_hessian_of_linear_model():
    for likelihood, y in (("classification", torch.randint(0, 3, (5,))), ("regression", torch.randn(5, 3).double())):
        model, x = double(nn.Linear(4, 3)), torch.randn(5, 4, dtype=torch.float64)
        torch.testing.assert_close(exact.ggn(model, likelihood, x, y), exact.hessian(model, likelihood, x, y))


def test_oracle_equals_hessian_blocks_of_piecewise_linear_network():
    """A ReLU network is linear in each layer's weights, so the Hessian's diagonal blocks hold no second derivative of f."""
    model = double(nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9, 3)))
    x, y = torch.randn(5, 2, 4, dtype=torch.float64), torch.randint(0, 3, (5,))
    ggn, hessian = exact.ggn(model, "classification", x, y), exact.hessian(model, "classification", x, y)
    for name, where in exact.parameter_slices(model).items():
        torch.testing.assert_close(ggn[where, where], hessian[where, where], msg=name)
    assert relative_error(ggn, hessian) > 1e-2  # between layers they differ
