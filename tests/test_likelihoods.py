import pytest
import torch
from scipy import stats

from laplace_ws import Bernoulli, Categorical, Gaussian, InvalidBatchError, make_likelihood

LIKELIHOODS = {"classification": Categorical(), "regression": Gaussian(0.7), "binary": Bernoulli()}


def outputs_and_targets(name, shape):
    f = torch.randn(shape, dtype=torch.float64)
    if name == "classification":
        return f, torch.randint(0, shape[-1], shape[:-1])
    return f, torch.randn_like(f) if name == "regression" else torch.randint(0, 2, shape).double()


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_columns_factor_the_hessian(name, shape):
    likelihood = LIKELIHOODS[name]
    f, y = outputs_and_targets(name, shape)
    columns = torch.stack(list(likelihood.hessian_columns(f))).flatten(2)
    for n in range(len(f)):
        hessian = torch.autograd.functional.hessian(lambda z, n=n: likelihood.nll_sum(z[None], y[n : n + 1]), f[n])
        d = columns.shape[2]
        torch.testing.assert_close(columns[:, n].T @ columns[:, n], hessian.reshape(d, d), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradient_column_is_the_gradient(name, shape):
    likelihood = LIKELIHOODS[name]
    f, y = outputs_and_targets(name, shape)
    gradient = torch.autograd.functional.jacobian(lambda z: likelihood.nll_sum(z, y), f)
    torch.testing.assert_close(likelihood.gradient_column(f, y), gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_columns_are_gradients_at_the_models_own_labels(name):
    """Their second moment is the Hessian: five standard errors of 40,000 draws are 0.025 of the largest entry or less."""
    likelihood = LIKELIHOODS[name]
    f, _ = outputs_and_targets(name, (1, 3))
    draws = likelihood.sampled_column(f.expand(40_000, -1), torch.Generator().manual_seed(0))
    columns = torch.cat(list(likelihood.hessian_columns(f)))
    hessian = columns.T @ columns
    torch.testing.assert_close(draws.T @ draws / len(draws), hessian, rtol=0, atol=0.03 * hessian.abs().max().item())
    assert draws.mean(0).abs().max() < 0.03 * hessian.abs().max().sqrt()


def test_nll_against_scipy():
    f, y = outputs_and_targets("regression", (5, 2))
    expected = -stats.norm(f.numpy(), 0.7).logpdf(y.numpy()).sum()
    assert Gaussian(0.7).nll_sum(f, y).item() == pytest.approx(expected, rel=1e-12)
    unit = Gaussian().nll_sum(f, y)
    assert Gaussian().nll_at_noise(unit, y.numel(), torch.tensor(0.7)).item() == pytest.approx(expected, rel=1e-6)
    f, y = outputs_and_targets("binary", (5, 2))
    expected = -stats.bernoulli(f.sigmoid().numpy()).logpmf(y.numpy()).sum()
    assert Bernoulli().nll_sum(f, y).item() == pytest.approx(expected, rel=1e-12)


def test_binary_columns_survive_confident_logits():
    (column,) = Bernoulli().hessian_columns(torch.tensor([[60.0]], dtype=torch.float64))
    assert column.item() ** 2 == pytest.approx(torch.tensor(-60.0, dtype=torch.float64).exp().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "f", "y", "message"),
    [
        ("classification", torch.zeros(2, 3), torch.tensor([0, 3]), r"labels must lie in 0 … 2 .* they span 0 … 3"),
        ("classification", torch.zeros(2, 3), torch.tensor([-1, 0]), r"they span -1 … 0"),
        ("classification", torch.zeros(2, 3), torch.zeros(2), r"must be integers"),
        ("classification", torch.zeros(2, 3), torch.zeros(2, 3).long(), r"needs labels of shape \(2,\)"),
        ("classification", torch.zeros(2, 1), torch.zeros(2).long(), r'use likelihood="binary"'),
        (
            "regression",
            torch.zeros(2, 1),
            torch.zeros(2),
            r"gave \(2, 1\) and the targets are \(2,\) \(add y.unsqueeze",
        ),
        ("regression", torch.zeros(2, 1), torch.zeros(2, 1).long(), r"use y.float\(\)"),
        ("binary", torch.zeros(2), torch.tensor([0.0, 0.5]), r"must be 0 or 1, but they span 0 … 0.5"),
    ],
)
def test_what_does_not_fit_is_said(name, f, y, message):
    with pytest.raises(InvalidBatchError, match=message):
        LIKELIHOODS[name].check(f, y)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown likelihood 'poisson': choose one of 'classification'"):
        make_likelihood("poisson")
    with pytest.raises(ValueError, match="sigma_noise must be positive"):
        Gaussian(0.0)
