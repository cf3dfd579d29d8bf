import io

import numpy as np
import pytest
import torch
from scipy import stats

from laplace_ws import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    InvalidBatchError,
    Likelihood,
    likelihood_from_state,
    make_likelihood,
)

LIKELIHOODS = {"classification": Categorical(), "regression": Gaussian(0.7), "binary": Bernoulli()}
SCALES = [0.5, 2.0, 1.3]
LIKELIHOODS["noise by output"] = Gaussian(0.7, SCALES)
ALL = LIKELIHOODS | {"ignoring": Categorical(ignore_index=-100), "ignoring a class": Categorical(ignore_index=1)}
ALL["heteroscedastic"] = HeteroscedasticGaussian()
IMAGES = [("regression", (2, 3, 2, 3)), ("binary", (2, 1, 2, 3)), ("noise by output", (2, 1, 2, 3))]
SHAPES = [(name, shape) for name in ALL for shape in [(4, 3), (4, 2, 3)]] + IMAGES


def outputs_and_targets(name, shape):
    """Outputs and targets; heteroscedastic outputs are twice as many on the last axis."""
    f = torch.randn(shape, dtype=torch.float64)
    if name == "heteroscedastic":
        return torch.cat([torch.randn_like(f), f], -1), torch.randn_like(f)
    if isinstance(ALL[name], Categorical):
        y = torch.randint(0, shape[-1], shape[:-1])
        if name == "ignoring":
            y[0] = y[1].flatten()[0] = y[2].flatten()[-1] = -100
        return f, y
    return f, torch.randint(0, 2, shape).double() if name == "binary" else torch.randn_like(f)


def fisher(likelihood, f, y):
    """Hessian of −log p, averaged over y where it depends on it: as it is of second order in y, by two values at ± one deviation."""
    targets = [y]
    if isinstance(likelihood, HeteroscedasticGaussian):
        mean, log_variance = likelihood.split(f)
        targets = [mean + sign * (0.5 * log_variance).exp() for sign in (1, -1)]
    hessians = [
        torch.autograd.functional.hessian(lambda z, t=t: likelihood.nll_sum(z[None], t[None]), f) for t in targets
    ]
    return (sum(hessians) / len(hessians)).reshape(f.numel(), f.numel())


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=str)
def test_columns_factor_the_hessian(name, shape):
    likelihood = ALL[name]
    f, y = outputs_and_targets(name, shape)
    columns = torch.stack(list(likelihood.hessian_columns(f, likelihood.term_mask(f, y)))).flatten(2)
    for n in range(len(f)):
        truth = fisher(likelihood, f[n], y[n])
        torch.testing.assert_close(columns[:, n].T @ columns[:, n], truth, rtol=1e-10, atol=1e-12)


def test_the_heteroscedastic_hessian_itself_is_indefinite():
    likelihood, f, y = HeteroscedasticGaussian(), torch.zeros(1, 2).double(), torch.full((1, 1), 3.0).double()
    hessian = torch.autograd.functional.hessian(lambda z: likelihood.nll_sum(z, y), f).reshape(2, 2)
    assert torch.linalg.eigvalsh(hessian).min() < -0.5


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=str)
def test_gradient_column_is_the_gradient(name, shape):
    likelihood = ALL[name]
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


def test_sampled_heteroscedastic_columns_are_gradients_at_the_models_own_targets():
    """The likelihood is of fourth order in y, so the standard errors of the moments are taken from the draws."""
    likelihood = HeteroscedasticGaussian()
    f, y = outputs_and_targets("heteroscedastic", (1, 3))
    draws = likelihood.sampled_column(f.expand(40_000, -1), torch.Generator().manual_seed(0))
    products = torch.einsum("na,nb->nab", draws, draws)
    for found, truth in ((products, fisher(likelihood, f[0], y[0])), (draws, torch.zeros(6).double())):
        errors = found.std(0) / len(draws) ** 0.5
        assert errors.max() < 0.03 * products.mean(0).max()
        assert ((found.mean(0) - truth).abs() < 5 * errors).all()


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
    # one loss term per example: the sign of every column is drawn alike, for all examples at once or column by column
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
    expected = -stats.norm(f.cpu().numpy(), 0.7).logpdf(y.cpu().numpy()).sum()
    assert Gaussian(0.7).nll_sum(f, y).item() == pytest.approx(expected, rel=1e-12)
    unit = Gaussian().nll_sum(f, y)
    assert Gaussian().nll_at_noise(unit, y.numel(), torch.tensor(0.7)).item() == pytest.approx(expected, rel=1e-6)
    f, y = outputs_and_targets("regression", (5, 4, 3))
    by_output = Gaussian(0.7, SCALES)
    expected = -stats.norm(f.cpu().numpy(), 0.7 * np.array(SCALES)).logpdf(y.cpu().numpy()).sum()
    assert by_output.nll_sum(f, y).item() == pytest.approx(expected, rel=1e-12)
    unit = by_output.at_noise(1.0).nll_sum(f, y)
    sigma = torch.tensor(0.7, dtype=torch.float64)
    assert by_output.nll_at_noise(unit, y.numel(), sigma).item() == pytest.approx(expected, rel=1e-12)
    f, y = outputs_and_targets("heteroscedastic", (5, 4, 3))
    expected = -stats.norm(f[..., :3].cpu().numpy(), (f[..., 3:] / 2).exp().cpu().numpy()).logpdf(y.cpu().numpy()).sum()
    assert HeteroscedasticGaussian().nll_sum(f, y).item() == pytest.approx(expected, rel=1e-12)
    f, y = outputs_and_targets("binary", (5, 2))
    expected = -stats.bernoulli(f.sigmoid().cpu().numpy()).logpmf(y.cpu().numpy()).sum()
    assert Bernoulli().nll_sum(f, y).item() == pytest.approx(expected, rel=1e-12)


def test_binary_columns_survive_confident_logits():
    (column,) = Bernoulli().hessian_columns(torch.tensor([[60.0]], dtype=torch.float64))
    assert column.item() ** 2 == pytest.approx(torch.tensor(-60.0, dtype=torch.float64).exp().item(), rel=1e-6)


@pytest.mark.parametrize("scales", [None, SCALES])
@pytest.mark.parametrize("curvature", ["ggn", "ef"])
def test_curvature_scales_with_the_noise(scales, curvature):
    f, y = outputs_and_targets("regression", (4, 3))
    unit, noisy = Gaussian(1.0, scales), Gaussian(0.7, scales)

    def second_moment(likelihood):
        columns = likelihood.hessian_columns(f) if curvature == "ggn" else [likelihood.gradient_column(f, y)]
        return sum(column.T @ column for column in columns)

    scale = unit.curvature_scale(torch.tensor(0.7, dtype=torch.float64), curvature)
    torch.testing.assert_close(second_moment(noisy), second_moment(unit) * scale)


# ------------------------------------------------------------------ labels that do not count


def test_ignored_labels_carry_no_loss_and_do_not_count():
    f, y = outputs_and_targets("ignoring", (4, 5, 3))
    likelihood = Categorical(ignore_index=-100)
    counts = y != -100
    assert likelihood.n_targets(f, y) == counts.sum() == 13
    assert Categorical().n_targets(f, y) == 20
    assert Categorical().term_mask(f, y) is None
    torch.testing.assert_close(likelihood.nll_sum(f, y), Categorical().nll_sum(f[counts], y[counts]))
    nothing = torch.full_like(y, -100)
    likelihood.check(f, nothing)
    assert likelihood.nll_sum(f, nothing) == 0
    assert likelihood.gradient_column(f, nothing).count_nonzero() == 0
    assert list(likelihood.hessian_columns(f, likelihood.term_mask(f, nothing))) == []


def test_labels_that_count_keep_their_curvature_beside_uncertain_ones_that_do_not():
    """A column is left out where it is below the rounding of the class's variance, and the ignored terms have most of that."""
    f = torch.tensor([[60.0, 0.0, -1000.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    likelihood, y = Categorical(ignore_index=-100), torch.tensor([0, -100])
    (column,) = likelihood.hessian_columns(f, likelihood.term_mask(f, y))
    small = torch.tensor(-60.0, dtype=torch.float64).exp().item()
    torch.testing.assert_close(column[0, :2].square(), torch.full((2,), small, dtype=torch.float64), rtol=1e-12, atol=0)
    assert column[1].count_nonzero() == 0


# ------------------------------------------------------------------ predictions and files


def test_moments_of_regressions():
    mean, var = torch.randn(5, 4).double(), torch.rand(5, 4).double()
    covariance = torch.diag_embed(var) + 0.1
    assert [likelihood.is_regression for likelihood in ALL.values()] == [False, True, False, True, False, False, True]
    assert Gaussian().moments(mean, covariance) == (mean, covariance)
    for f_var in (var, covariance):
        m, v = HeteroscedasticGaussian().moments(mean, f_var)
        assert torch.equal(m, mean[:, :2])
        assert torch.equal(v, f_var[:, :2] if f_var.ndim == 2 else f_var[:, :2, :2])
    assert torch.equal(HeteroscedasticGaussian().predictive_mean(mean), mean[:, :2])


def test_noise_variance_of_regressions():
    mean, var = torch.randn(5, 4).double(), torch.rand(5, 4).double()
    assert torch.equal(Gaussian().noise_variance(mean, var, 0.5), torch.full((5, 4), 0.25).double())
    by_output = Gaussian(9.0, [1.0, 2.0, 3.0, 4.0]).noise_variance(mean, var, torch.tensor(0.5))
    torch.testing.assert_close(by_output, torch.tensor([0.25, 1.0, 2.25, 4.0]).double().expand(5, 4))
    log_normal = stats.lognorm(s=var[:, 2:].sqrt().cpu().numpy(), scale=mean[:, 2:].exp().cpu().numpy()).mean()
    found = HeteroscedasticGaussian().noise_variance(mean, var, 1.0)
    torch.testing.assert_close(found, torch.as_tensor(log_normal), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_a_state_makes_the_likelihood_anew(name):
    likelihood = ALL[name]
    file = io.BytesIO()
    torch.save(likelihood.state(), file)
    file.seek(0)
    again = likelihood_from_state(torch.load(file, weights_only=True))
    assert type(again) is type(likelihood)
    assert again.state() == likelihood.state()
    assert repr(again) == repr(likelihood)
    f, y = outputs_and_targets(name, (4, 3))
    assert torch.equal(again.nll_sum(f, y), likelihood.nll_sum(f, y))


@pytest.mark.parametrize("name", ALL)
def test_half_precision_outputs_give_the_columns_of_their_own_values(name):
    """bfloat16 rounds to 2⁻⁸ of a number; a gradient is made in four steps at most from numbers of about 1, that of v by a square."""
    likelihood = ALL[name]
    f, y = outputs_and_targets(name, (4, 3))
    f = f.bfloat16()
    y = y if isinstance(likelihood, Categorical) else y.bfloat16()
    wide = y.double() if y.is_floating_point() else y
    found, truth = likelihood.gradient_column(f, y), likelihood.gradient_column(f.double(), wide)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), truth, rtol=8 * 2**-8, atol=8 * 2**-8)
    for half, whole in zip(likelihood.hessian_columns(f), likelihood.hessian_columns(f.double()), strict=True):
        torch.testing.assert_close(half.double(), whole, rtol=4 * 2**-8, atol=4 * 2**-8)


# ------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("name", "f", "y", "message"),
    [
        (
            "classification",
            torch.zeros(2, 3),
            torch.tensor([0, -100]),
            r"span -100 … 0; .* Categorical\(ignore_index=-100\)",
        ),
        ("classification", torch.zeros(3, 3), torch.tensor([0, -100, 3]), r"span -100 … 3; renumber the labels"),
        ("ignoring", torch.zeros(3, 3), torch.tensor([0, -100, 3]), r"they span 0 … 3; renumber the labels"),
        ("ignoring a class", torch.zeros(2, 3), torch.tensor([0, -100]), r"they span -100 … 0; renumber the labels"),
        (
            "noise by output",
            torch.zeros(2, 2),
            torch.zeros(2, 2),
            r"has 3 output_scales, .* \(2, 2\) has 2; give one scale",
        ),
        ("noise by output", torch.zeros(3), torch.zeros(3), r"has 3 output_scales, .* \(3,\) has 1"),
        ("heteroscedastic", torch.zeros(2, 3), torch.zeros(2, 3), r"needs outputs \[N, ..., 2D\]"),
        ("heteroscedastic", torch.zeros(2, 2), torch.zeros(2, 2), r"gave \(2, 2\) and the targets are \(2, 2\)"),
        ("heteroscedastic", torch.zeros(2), torch.zeros(1), r"needs outputs \[N, ..., 2D\]"),
        ("heteroscedastic", torch.zeros(2, 2), torch.zeros(2, 1).long(), r"use y.float\(\)"),
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
        ALL[name].check(f, y)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown likelihood 'poisson': choose one of 'classification'"):
        make_likelihood("poisson")
    with pytest.raises(ValueError, match="sigma_noise must be positive"):
        Gaussian(0.0)
    for scales in ([], [1.0, 0.0], [float("nan")], torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="output_scales must be positive numbers, one per output"):
            Gaussian(1.0, scales)
