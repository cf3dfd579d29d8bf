import pytest
import torch
from scipy import stats

from laplace_ws import Bernoulli, Categorical, Gaussian, InvalidBatchError, Likelihood, make_likelihood

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


@pytest.mark.parametrize("shape", [(1, 3), (1, 2, 3)])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_projected_columns_have_the_hessian_as_second_moment(name, shape):
    likelihood = LIKELIHOODS[name]
    f, _ = outputs_and_targets(name, shape)
    draws = likelihood.projected_column(f.expand(40_000, *shape[1:]), torch.Generator().manual_seed(0)).flatten(1)
    columns = torch.cat(list(likelihood.hessian_columns(f))).flatten(1)
    hessian = columns.T @ columns
    torch.testing.assert_close(draws.T @ draws / len(draws), hessian, rtol=0, atol=0.03 * hessian.abs().max().item())
    assert draws.mean(0).abs().max() < 0.03 * hessian.abs().max().sqrt()


def test_projection_without_a_formula_of_its_own_is_that_of_the_columns():
    f = torch.randn(3, 4, 5, dtype=torch.float64)
    own, general = (
        kind.projected_column(Categorical(), f, torch.Generator().manual_seed(0)) for kind in (Categorical, Likelihood)
    )
    assert own.shape == general.shape == f.shape
    # one loss term an example: the sign of every column is drawn alike, for all examples at once or column by column
    many = f[:1, 0].expand(20_000, -1)
    moments = [kind.projected_column(Categorical(), many, None) for kind in (Categorical, Likelihood)]
    own, general = (draws.T @ draws / len(draws) for draws in moments)
    torch.testing.assert_close(own, general, rtol=0, atol=0.03 * own.max().item())


def test_signs_leave_no_variance_where_the_model_wavers_between_two_classes():
    """Labels would be wrong now and then by a whole class; the sign of the one column that counts does not show in its square."""
    f = torch.tensor([[3.0, 0.0, -200.0, -200.0]], dtype=torch.float64).expand(1000, -1)
    hessian = torch.autograd.functional.hessian(lambda z: Categorical().nll_sum(z, torch.tensor([0])), f[:1])[0, :, 0]
    draws = Categorical().projected_column(f, None)
    torch.testing.assert_close(
        torch.einsum("na,nb->nab", draws, draws), hessian.expand(1000, -1, -1), rtol=1e-10, atol=1e-15
    )
    labelled = Categorical().sampled_column(f, None)
    assert torch.einsum("na,nb->nab", labelled, labelled).std(0).max() > 2 * hessian.max()


def test_softmax_columns_are_one_fewer_than_classes_and_fewer_where_probabilities_vanish():
    def n_columns(f):
        return len(list(Categorical().hessian_columns(f)))

    assert n_columns(torch.randn(4, 10)) == 9
    assert n_columns(torch.randn(4, 3, 10)) == 27
    n = torch.arange(10)
    sure = torch.full((10, 10), -60.0)
    sure[n, n] = 0.0
    assert n_columns(sure) == 9  # all classes but the likeliest are as small as each other
    sure[n, (n + 3) % 10] = -2.0
    assert n_columns(sure) == 1  # the likelier two of each example stand in one column, whatever their numbers
    sure[:, 9] = -60.0  # a class that is rare everywhere keeps its curvature
    assert n_columns(sure) > 1
    assert n_columns(torch.tensor([[0.0, -200.0]])) == 0  # exp(-200) is 0 in single precision


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-13), (torch.bfloat16, 0.03)]
)
def test_columns_left_out_are_below_rounding(dtype, tolerance):
    f = (torch.randn(6, 12, dtype=torch.float64) * 40).to(dtype)
    columns = torch.stack(list(Categorical().hessian_columns(f))).double()
    assert len(columns) <= 11
    p = f.double().softmax(-1)
    others = p[:, None, :] * (1 - torch.eye(12, dtype=torch.float64))  # 1 − p without cancellation
    hessian = torch.diag_embed(p * others.sum(-1)) - others * p[:, :, None]
    found = torch.einsum("kna,knb->ab", columns, columns)
    truth = hessian.sum(0)
    of_classes = truth.diagonal().sqrt()  # every class by its own measure, however rare
    assert ((found - truth).abs() / (of_classes * of_classes[:, None])).max() < tolerance


@pytest.mark.parametrize("name", ["classification", "binary"])
def test_an_output_that_is_rare_everywhere_keeps_its_curvature(name):
    f = torch.randn(200, 3)
    f[:, 2] = -18
    likelihood = LIKELIHOODS[name]
    p = f.double().softmax(-1) if name == "classification" else f.double().sigmoid()
    truth = (p * (1 - p)).sum(0)
    columns = torch.stack(list(likelihood.hessian_columns(f))).double()
    torch.testing.assert_close(columns.square().sum((0, 1)), truth, rtol=1e-5, atol=0)


def test_softmax_columns_survive_confident_logits():
    (column,) = Categorical().hessian_columns(torch.tensor([[60.0, 0.0]], dtype=torch.float64))
    small = torch.tensor(-60.0, dtype=torch.float64).exp().item()
    torch.testing.assert_close(column.square(), torch.full((1, 2), small, dtype=torch.float64), rtol=1e-12, atol=0)


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
