"""Posteriors against analytic evidence, dense algebra and finite differences."""

import math

import pytest
import torch
from cases import CASES, double
from scipy import stats
from torch import nn

from laplace_ws import Gaussian, InvalidBatchError, Laplace, NotFittedError, UnsupportedParameterError
from laplace_ws.curvature import exact

STRUCTURES = ["kron", "ekfac", "diag", "full", "lowrank"]


def fitted(structure="kron", case=None, **options):
    model, x, y = (case or CASES[0]).make()
    la = Laplace(model, (case or CASES[0]).likelihood, hessian_structure=structure, **options)
    la.fit([(x, y)])
    return la, x, y


def map_of_linear_model(X, y, delta, sigma):
    """Ridge regression: the mode of a linear-Gaussian model."""
    precision = X.T @ X / sigma**2 + torch.diag(delta)
    return torch.linalg.solve(precision, X.T @ y / sigma**2)


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_linear_gaussian_evidence_is_analytic(structure):
    """y = Xw + ε: the evidence is a normal density. One output and no bias: the Kronecker block is the Hessian itself."""
    X, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)
    sigma, delta = 0.6, torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64)
    if structure == "kron":
        delta = delta[:1].expand(3)
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data = map_of_linear_model(X, y, delta, sigma).T
    la = Laplace(model, "regression", hessian_structure=structure, sigma_noise=sigma)
    la.prior_precision = delta if structure == "full" else delta[0]
    la.fit([(X[:5], y[:5]), (X[5:], y[5:])])
    covariance = sigma**2 * torch.eye(12, dtype=torch.float64) + X @ torch.diag(1 / delta) @ X.T
    evidence = stats.multivariate_normal(cov=covariance.cpu().numpy()).logpdf(y[:, 0].cpu().numpy())
    assert la.log_marginal_likelihood().item() == pytest.approx(evidence, rel=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "mlp-regression", "mlp-binary", "fixup", "transformer-tokens"])
def test_log_marginal_likelihood_is_the_formula(name, structure):
    case = next(c for c in CASES if c.name == name)
    tau, delta = 1.7, 0.4
    sigma = 0.5 if case.likelihood == "regression" else 1.0
    la, x, y = fitted(structure, case, prior_precision=delta, sigma_noise=sigma, temperature=tau, prior_mean=0.1)
    scale = 1 / (sigma**2 * tau)
    precision = la.H.to_dense() * scale + delta * torch.eye(la.n_params, dtype=torch.float64)
    with torch.no_grad():
        f = la.model.eval()(x)
    likelihood = Gaussian(sigma) if case.likelihood == "regression" else la.likelihood
    nll = likelihood.nll_sum(f, y).item()
    expected = (
        -nll / tau
        - delta / 2 * (la.mean - 0.1).square().sum()
        - 0.5 * (torch.logdet(precision) - la.n_params * math.log(delta))
    )
    assert la.log_marginal_likelihood().item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("curvature", ["ggn", "ef"])
def test_gradients_equal_finite_differences(structure, curvature):
    case = next(c for c in CASES if c.name == "mlp-regression")
    la, _, _ = fitted(structure, case, curvature=curvature)
    sizes = [(), (4,)] + ([(la.n_params,)] if structure not in ("kron", "ekfac") else [])
    for size in sizes:
        inputs = [torch.rand(s, dtype=torch.float64) + 0.5 for s in (size, (), ())]
        assert torch.autograd.gradcheck(la.log_marginal_likelihood, [i.requires_grad_(True) for i in inputs])


@pytest.mark.parametrize("curvature", ["ggn", "ef"])
def test_noise_and_temperature_enter_the_curvature_as_the_likelihood_says(curvature):
    case = next(c for c in CASES if c.name == "mlp-regression")
    la, x, y = fitted("full", case, curvature=curvature, sigma_noise=0.5, prior_precision=1.0, temperature=1.5)
    from laplace_ws import Gaussian

    oracle = {"ggn": exact.ggn, "ef": exact.empirical_fisher}[curvature]
    truth = oracle(la.model, Gaussian(0.5), x, y) / 1.5 + torch.eye(la.n_params, dtype=torch.float64)
    torch.testing.assert_close(la.posterior_precision, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_samples_have_the_posterior_covariance(structure):
    la, _, _ = fitted(structure, prior_precision=2.0)
    samples = la.sample(40_000, generator=torch.Generator().manual_seed(0))
    precision = la.posterior_precision
    is_object = structure not in ("full", "diag")
    dense = precision.to_dense() if is_object else precision.diag() if structure == "diag" else precision
    covariance = torch.linalg.inv(dense)
    assert (samples.mean(0) - la.mean).abs().max() < 0.02
    torch.testing.assert_close(torch.cov(samples.T), covariance, rtol=0, atol=0.02)
    if is_object:
        torch.testing.assert_close(precision.log_det(), torch.logdet(dense))
        vectors = torch.randn(2, la.n_params, dtype=torch.float64)
        torch.testing.assert_close(precision.solve(vectors), vectors @ covariance)


def test_structures_agree_where_they_must():
    """One weight an output and input: diagonal, Kronecker and dense curvature are the same number."""
    model, x, y = double(nn.Linear(1, 1, bias=False)), torch.randn(6, 1).double(), torch.randn(6, 1).double()
    values = []
    for structure in STRUCTURES:
        la = Laplace(model, "regression", hessian_structure=structure)
        la.fit([(x, y)])
        values.append(la.log_marginal_likelihood().item())
    assert values == pytest.approx([values[0]] * len(STRUCTURES), rel=1e-12)


def test_scaling_up_a_subset():
    la, x, y = fitted()
    whole = Laplace(la.model, "classification")
    whole.fit([(x, y), (x, y), (x, y)])
    la.fit([(x, y)], n_data=15)
    assert la.n_data == whole.n_data == 15
    assert la.log_marginal_likelihood().item() == pytest.approx(whole.log_marginal_likelihood().item(), rel=1e-12)


def test_evaluating_leaves_the_hyperparameters_alone():
    la, _, _ = fitted(prior_precision=3.0)
    before = la.log_marginal_likelihood()
    la.log_marginal_likelihood(prior_precision=9.0)
    assert la.prior_precision == 3.0
    assert la.log_marginal_likelihood() == before


def test_bad_input_is_said_in_one_sentence():
    model, x, y = CASES[0].make()
    la = Laplace(model, "classification")
    with pytest.raises(NotFittedError, match="call fit"):
        la.log_marginal_likelihood()
    with pytest.raises(InvalidBatchError, match="the data hold no example"):
        la.fit([])
    with pytest.raises(InvalidBatchError, match=r"batch 1 is a tuple of length 1"):
        la.fit([(x, y), (x,)])
    with pytest.raises(InvalidBatchError, match="batch 0 has no 'labels' among its entries"):
        la.fit([{"x": x, "y": y}])
    with pytest.raises(InvalidBatchError, match="labels must lie in 0 … 2"):
        la.fit([(x, y + 5)])
    with pytest.raises(InvalidBatchError, match="outputs that are not finite; look for NaN"):
        la.fit([(x * math.nan, y)])
    with pytest.raises(InvalidBatchError, match="the negative log likelihood of a batch is nan"):
        la.fit([(x[:2], y[:2]), (x * math.nan, y)])
    with pytest.raises(InvalidBatchError, match=f"the batch is on meta and the model on {x.device}; move one of them"):
        la.fit([(x.to("meta"), y)])
    with pytest.raises(
        InvalidBatchError, match=r"one row of outputs for each of the 4 examples, but it returned shape \(1, 12\)"
    ):
        Laplace(nn.Sequential(model, nn.Flatten(0), nn.Unflatten(0, (1, -1))), "classification").fit([(x, y)])
    with pytest.raises(ValueError, match=r"one of the shapes \[\[\], \[4\]\]"):
        la.prior_precision = torch.ones(7)
    with pytest.raises(ValueError, match="must be positive, but its smallest entry is -1"):
        la.prior_precision = torch.tensor([1.0, -1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="classification likelihood has no sigma_noise"):
        la.sigma_noise = 0.5
    for options, message in (
        ({"hessian_structure": "block"}, "unknown hessian_structure 'block'"),
        ({"subset_of_weights": "last"}, "unknown subset_of_weights 'last'"),
        ({"curvature": "fisher"}, "unknown curvature 'fisher'"),
        ({"kfac_approx": "expanded"}, "unknown kfac_approx 'expanded'"),
        ({"factor_precision": "half"}, "unknown factor_precision 'half'"),
        ({"backend": "native2"}, "unknown backend 'native2'"),
    ):
        with pytest.raises(ValueError, match=message):
            Laplace(model, "classification", **options)
    with pytest.raises(UnsupportedParameterError, match="Sequential has no parameter that requires grad"):
        Laplace(model.requires_grad_(False), "classification")


def test_precision_of_the_factors_is_an_option_that_is_saved():
    model, x = torch.nn.Linear(3, 2), torch.randn(30, 3)
    data = [(x, torch.randn(30, 2))]
    posteriors = {p: Laplace(model, "regression", factor_precision=p) for p in ("float32", "bf16")}
    for la in posteriors.values():
        la.fit(data)
    single, rounded = (la.H["weight"].A for la in posteriors.values())
    assert 0 < (single - rounded).norm() / single.norm() < 2**-8
    with pytest.raises(ValueError, match="the saved posterior has factor_precision='bf16', this one 'float32'"):
        posteriors["float32"].load_state_dict(posteriors["bf16"].state_dict())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("hesian_structure", "no option 'hesian_structure'; did you mean 'hessian_structure'"),
        ("prior_precison", "did you mean 'prior_precision'"),
        ("enable_backprop", "pass backprop=True to the prediction"),
        ("backend_kwargs", "choose by curvature=, kfac_approx=, mc_samples= and backend="),
        ("zzz", "no option 'zzz'; see Laplace"),
    ],
)
def test_options_that_are_not_there(option, message):
    with pytest.raises(TypeError, match=message):
        Laplace(nn.Linear(2, 2), "classification", **{option: 1})


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_decompose_leaves_nothing_to_the_evidence_and_to_predictions(structure, monkeypatch):
    case = next(case for case in CASES if case.name == "cnn")
    la, x, _ = fitted(structure, case)
    expected = la.log_marginal_likelihood(), la.functional_moments(x)[1]
    other = Laplace(la.model, case.likelihood, hessian_structure=structure)
    other.load_state_dict(la.state_dict())
    assert other.decompose(progress_bar=True) is other

    def never(*_):
        raise AssertionError("decomposed again")

    monkeypatch.setattr(torch.linalg, "eigh", never)
    monkeypatch.setattr(torch.linalg, "eigvalsh", never)
    torch.testing.assert_close((other.log_marginal_likelihood(), other.functional_moments(x)[1]), expected)
