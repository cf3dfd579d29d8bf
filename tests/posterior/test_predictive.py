"""Predictions: links against integrals and samples, regression in closed form, network sampling, and what must be left alone."""

import copy

import pytest
import torch
from cases import double
from posterior.shared import STRUCTURES, case_of, dense_moments, fitted
from torch import nn
from torch.distributions import MultivariateNormal

from laplace_ws import Gaussian, HeteroscedasticGaussian, InvalidBatchError, Laplace, NotFittedError
from laplace_ws.likelihoods.links import bridge, probit_scaled, root, sample_outputs
from laplace_ws.posterior.predict import Predictor

F64 = torch.float64


def integral_of_sigmoid(mean: float, variance: float) -> float:
    z = torch.linspace(-12, 12, 20_001, dtype=F64)
    density = torch.exp(-0.5 * z.square()) / (2 * torch.pi) ** 0.5
    return torch.trapezoid(torch.sigmoid(mean + variance**0.5 * z) * density, z).item()


# ------------------------------------------------------------------ links


@pytest.mark.parametrize("mean", [-2.0, 0.3, 3.0])
@pytest.mark.parametrize("variance", [0.1, 1.0, 8.0])
def test_probit_is_close_to_the_integral_of_the_sigmoid(mean, variance):
    found = torch.sigmoid(probit_scaled(torch.tensor(mean), torch.tensor(variance)))
    assert found.item() == pytest.approx(integral_of_sigmoid(mean, variance), abs=0.02)
    assert abs(torch.sigmoid(torch.tensor(mean)).item() - integral_of_sigmoid(mean, 8.0)) > 0.02


def test_mc_converges_to_the_mean_of_the_softmax():
    f, covariance = torch.tensor([[0.5, -1.0, 2.0]], dtype=F64), torch.randn(1, 3, 3, dtype=F64)
    covariance = covariance @ covariance.mT
    draws = sample_outputs(f, covariance, 200_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cov(draws[:, 0].T), covariance[0], rtol=0.02, atol=0.02)
    independent = MultivariateNormal(f[0], covariance[0]).sample((200_000,)).softmax(-1).mean(0)
    torch.testing.assert_close(draws.softmax(-1).mean(0)[0], independent, rtol=0, atol=0.01)


def test_the_root_of_a_singular_covariance():
    a = torch.randn(2, 4, 2, dtype=F64)
    singular = a @ a.mT
    L = root(singular)
    torch.testing.assert_close(L @ L.mT, singular, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalised", [False, True])
def test_bridge_is_the_dirichlet_of_the_papers_formula(normalised):
    """The formula, term by term, of one example at a time."""
    f, a = torch.randn(5, 4, dtype=F64), torch.randn(5, 4, 4, dtype=F64)
    covariance = a @ a.mT + 0.1 * torch.eye(4, dtype=F64)
    found = bridge(f, covariance, normalised=normalised)
    for n in range(5):
        ones = torch.ones(4, dtype=F64)
        S, mu = covariance[n], f[n]
        mu = mu - S @ ones * (ones @ mu) / (ones @ S @ ones)
        S = S - torch.outer(S @ ones, S @ ones) / (ones @ S @ ones)
        v = S.diagonal()
        if normalised:
            size = v.mean() / (4 / 2) ** 0.5
            mu, v = mu / size.sqrt(), v / size
        alpha = (1 - 2 / 4 + mu.exp() * (-mu).exp().sum() / 16) / v
        torch.testing.assert_close(found[n], alpha / alpha.sum(), rtol=1e-10, atol=1e-12)


def test_bridge_survives_outputs_whose_exponential_is_not_finite():
    f = torch.tensor([[2000.0, 0.0, -2000.0]])
    found = bridge(f, torch.eye(3)[None], normalised=False)
    assert found.isfinite().all()
    assert found[0].argmax() == 0


@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_class_predictions_are_probabilities_between_the_map_and_the_uniform(structure, link):
    la, x, _ = fitted(structure, "cnn", prior_precision=1e8)
    with torch.no_grad():
        at_mode = la.model.eval()(x).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    if "bridge" not in link:  # a stiff prior is the MAP
        torch.testing.assert_close(la(x, link_approx=link, generator=generator), at_mode, rtol=0, atol=1e-3)
    la.prior_precision = 1.0
    found = la(x, link_approx=link, n_samples=2000, generator=generator)
    assert found.shape == at_mode.shape
    torch.testing.assert_close(found.sum(-1), torch.ones(len(x), dtype=F64))
    if "bridge" not in link:
        assert (found.max(-1).values < at_mode.max(-1).values + 0.02).all()


def test_predictions_of_each_token():
    la, x, _ = fitted("kron", "transformer-tokens")
    for link in ("probit", "mc", "bridge"):
        found = la(x, link_approx=link, n_samples=10)
        with torch.no_grad():
            assert found.shape == la.model(x).shape
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


@pytest.mark.parametrize("name", ["mlp-binary", "mlp-flat-binary"])
def test_binary_predictions(name):
    la, x, _ = fitted("kron", name)
    f, variances = la.functional_moments(x, diagonal_output=True)
    expected = [
        integral_of_sigmoid(*pair) for pair in zip(f.flatten().tolist(), variances.flatten().tolist(), strict=True)
    ]
    expected = torch.tensor(expected, dtype=F64).reshape(f.shape)
    torch.testing.assert_close(la(x), expected, rtol=0, atol=0.02)
    draws = la(x, link_approx="mc", n_samples=40_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws, expected, rtol=0, atol=0.01)
    with pytest.raises(ValueError, match="link_approx='bridge' is for \"classification\""):
        la(x, link_approx="bridge")


# ------------------------------------------------------------------ one value for each target


def test_fit_returns_the_posterior():
    model, x, y = case_of("mlp").make()
    la = Laplace(model, "classification")
    assert la.fit([(x, y)]) is la
    assert la.fit([(x, y)], override=False) is la


@pytest.mark.parametrize("name", ["mlp", "transformer-tokens"])
@pytest.mark.parametrize("link", ["probit", "mc", "bridge"])
def test_the_class_is_the_most_probable_one(name, link):
    la, x, _ = fitted("kron", name)

    def options():
        return {"link_approx": link, "n_samples": 20, "generator": torch.Generator().manual_seed(1)}

    probabilities = la(x, **options())
    assert torch.equal(la.predict_proba(x, **options()), probabilities)
    assert torch.equal(la.predict(x, **options()), probabilities.argmax(-1))


def test_the_class_is_that_of_the_predictive_not_that_of_the_network():
    """Outputs of 1.0 and 1.2, of which the second is so uncertain that it loses."""
    model = double(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.2, 0], [0, 0, 0]]))
    la = Laplace(model, "classification", hessian_structure="diag", prior_precision=1.0)
    la.fit([(torch.eye(3, dtype=F64), torch.arange(3))])
    la.prior_precision = torch.tensor([1e6, 1.0, 1.0] + [1e-2] * 3 + [1.0] * 3, dtype=F64)
    x = torch.tensor([[1.0, 1.0, 0.0]], dtype=F64)
    assert model(x).argmax(-1).item() == 1
    assert la.predict(x).item() == 0


@pytest.mark.parametrize("name", ["mlp-binary", "mlp-flat-binary"])
def test_binary_labels(name):
    la, x, _ = fitted("kron", name)
    x = 10 * torch.randn(30, *x.shape[1:], dtype=F64)
    found = la.predict(x)
    assert found.dtype == torch.long
    assert torch.equal(found, (la(x) > 0.5).long())
    assert torch.equal(la.predict_proba(x), la(x))
    assert 0 < found.sum() < found.numel()


@pytest.mark.parametrize("likelihood", ["regression", "heteroscedastic_regression"])
def test_the_mean_of_a_regression_takes_no_jacobian(likelihood, monkeypatch):
    model = double(nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4)))
    x, y = torch.randn(9, 2, dtype=F64), torch.randn(9, 2, dtype=F64)
    la = Laplace(model, likelihood, hessian_structure="full").fit(
        [(x, y if likelihood.startswith("h") else y.repeat(1, 2))]
    )
    mean, _ = la(x)
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "moments_under", None)
        torch.testing.assert_close(la.predict(x), mean)
    by_networks = la(x, pred_type="nn", n_samples=5, generator=torch.Generator().manual_seed(0))[0]
    found = la.predict(x, pred_type="nn", n_samples=5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, by_networks)
    assert not torch.allclose(found, mean)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(ValueError, match="load_mean"):
        la.predict(x)


# ------------------------------------------------------------------ regression


def test_regression_in_closed_form():
    """A linear model is its own linearisation: the predictive is that of Bayesian linear regression."""
    X, y = torch.randn(12, 3, dtype=F64), torch.randn(12, 1, dtype=F64)
    model = double(nn.Linear(3, 1, bias=False))
    la = Laplace(model, "regression", hessian_structure="full", sigma_noise=0.4, prior_precision=2.0)
    la.fit([(X, y)])
    Z = torch.randn(5, 3, dtype=F64)
    covariance = Z @ torch.linalg.inv(X.T @ X / 0.16 + 2 * torch.eye(3, dtype=F64)) @ Z.T
    with torch.no_grad():
        expected = model(Z)
    for noise, added in ((False, 0.0), (True, 0.16)):
        mean, found = la(Z, observation_noise=noise)
        torch.testing.assert_close(mean, expected)
        torch.testing.assert_close(found, covariance.diagonal()[:, None, None] + added)
        mean, found = la(Z, joint=True, observation_noise=noise)
        torch.testing.assert_close(mean, expected[:, 0])
        torch.testing.assert_close(found, covariance + added * torch.eye(5, dtype=F64))
        mean, found = la(Z, diagonal_output=True, observation_noise=noise)
        torch.testing.assert_close(found, covariance.diagonal()[:, None] + added)
    samples = la.functional_samples(Z, n_samples=50_000, joint=True, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cov(samples[..., 0].T), covariance, rtol=0.05, atol=2e-3)
    weights = la(
        Z, pred_type="nn", n_samples=20_000, generator=torch.Generator().manual_seed(0), observation_noise=True
    )
    torch.testing.assert_close(weights[1][:, 0, 0], covariance.diagonal() + 0.16, rtol=0.05, atol=2e-3)
    targets = la.predictive_samples(Z, n_samples=50_000, observation_noise=True)
    torch.testing.assert_close(targets.var(0)[:, 0], covariance.diagonal() + 0.16, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_several_outputs_with_noise_of_their_own(structure):
    model, x, y = case_of("mlp-regression").make()
    C = y.shape[1]
    scales = torch.linspace(0.5, 2.0, C).tolist()
    la = Laplace(model, Gaussian(0.3, output_scales=scales), hessian_structure=structure)
    la.fit([(x, y)])
    mean, plain = la(x)
    _, noisy = la(x, observation_noise=True)
    added = torch.diag(0.09 * torch.tensor(scales, dtype=F64).square()).expand_as(plain)
    torch.testing.assert_close(noisy - plain, added)
    flat, joint = la(x, joint=True, observation_noise=True)
    torch.testing.assert_close(flat, mean.flatten())
    torch.testing.assert_close(joint.reshape(len(x), C, len(x), C)[2, :, 2], noisy[2])


def test_heteroscedastic_predictions():
    """The variance of the mean outputs, and on request the noise E[exp(v)]."""
    model = double(nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)))
    x, y = torch.randn(9, 2, dtype=F64), torch.randn(9, 2, dtype=F64)
    la = Laplace(model, "heteroscedastic_regression", hessian_structure="full")
    assert isinstance(la.likelihood, HeteroscedasticGaussian)
    la.fit([(x, y)])
    f, covariance = dense_moments(la, x)
    by_example = covariance[range(9), :, range(9)]
    mean, found = la(x)
    torch.testing.assert_close(mean, f[:, :2])
    torch.testing.assert_close(found, by_example[:, :2, :2])
    noise = (f[:, 2:] + 0.5 * by_example.diagonal(dim1=1, dim2=2)[:, 2:]).exp()
    torch.testing.assert_close(la(x, observation_noise=True)[1] - found, torch.diag_embed(noise))
    flat, joint = la(x, joint=True, observation_noise=True)
    torch.testing.assert_close(flat, f[:, :2].flatten())
    of_means = covariance[:, :2, :, :2].reshape(18, 18)
    torch.testing.assert_close(joint, of_means + torch.diag(noise.flatten()))
    assert la(x, pred_type="nn", n_samples=3)[0].shape == (9, 2)
    assert la.predictive_samples(x, n_samples=3, observation_noise=True).shape == (3, 9, 2)


def test_images_to_images():
    model = double(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1)))
    x, y = torch.randn(3, 1, 4, 5, dtype=F64), torch.randn(3, 1, 4, 5, dtype=F64)
    la = Laplace(model, "regression", hessian_structure="kron")
    la.fit([(x, y)])
    mean, variances = la(x)
    assert mean.shape == variances.shape == y.shape
    _, covariance = dense_moments(la, x)
    truth = covariance[range(3), :, range(3)].diagonal(dim1=1, dim2=2).reshape(y.shape)
    torch.testing.assert_close(variances, truth, rtol=1e-9, atol=1e-12)
    assert la.functional_samples(x, n_samples=4).shape == (4, *y.shape)


# ------------------------------------------------------------------ sampling weights


@pytest.mark.parametrize("name", ["tied-weights", "called-twice", "inplace-batchnorm"])
def test_network_samples_are_the_network_at_drawn_weights(name):
    la, x, _ = fitted("kron", name)
    outputs = la.functional_samples(x, "nn", 3, generator=torch.Generator().manual_seed(1))
    for weights, found in zip(la.sample(3, torch.Generator().manual_seed(1)), outputs, strict=True):
        twin = copy.deepcopy(la.model).eval()
        named = dict(twin.named_parameters())
        with torch.no_grad():
            parts = weights.split([shape.numel() for shape in la.shapes.values()])
            for parameter, part in zip(la.shapes, parts, strict=True):
                named[parameter].copy_(part.view_as(named[parameter]))
            torch.testing.assert_close(found, twin(x))


def test_gradients_through_sampled_networks():
    la, x, _ = fitted("kron", "cnn")
    x = x[:1].clone().requires_grad_(True)

    def predict(z):
        return la(z, pred_type="nn", n_samples=2, backprop=True, generator=torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(predict, (x,))


@pytest.mark.parametrize(
    "options", [{}, {"pred_type": "nn", "n_samples": 2}, {"link_approx": "mc"}, {"backprop": True}]
)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(options, fails):
    la, x, _ = fitted("kron", "inplace-batchnorm")
    la.model.train()
    frozen = next(iter(la.model.parameters()))
    frozen.grad = torch.ones_like(frozen)
    state = {name: (t.clone(), t.data_ptr()) for name, t in la.model.state_dict().items()}
    flags = [p.requires_grad for p in la.model.parameters()]
    if fails:
        with pytest.raises(InvalidBatchError):
            la(x[..., :2, :, :][:, :1], **options)
    else:
        la(x, **options)
    assert all(m.training for m in la.model.modules())
    assert flags == [p.requires_grad for p in la.model.parameters()]
    assert torch.equal(frozen.grad, torch.ones_like(frozen))
    for name, tensor in la.model.state_dict().items():
        assert torch.equal(tensor, state[name][0])
        assert tensor.data_ptr() == state[name][1]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in la.model.modules())


def test_one_seed_gives_one_prediction():
    la, x, _ = fitted("kron")
    for options in ({"pred_type": "nn"}, {"link_approx": "mc"}):
        draws = [la(x, **options, n_samples=5, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


# ------------------------------------------------------------------ errors


def test_errors():
    model, x, y = case_of("mlp").make()
    la = Laplace(model, "classification")
    with pytest.raises(NotFittedError, match="call fit"):
        la(x)
    with pytest.raises(NotFittedError, match="call fit"):
        la(x, pred_type="nn")
    la.fit([(x, y)])
    for options, message in (
        ({"pred_type": "gp"}, "unknown pred_type 'gp': choose one of 'glm', 'nn'"),
        ({"link_approx": "logit"}, "unknown link_approx 'logit'"),
        ({"joint": True}, "joint and observation_noise are for regression, not for 'classification'"),
        ({"observation_noise": True}, "joint and observation_noise are for regression"),
    ):
        with pytest.raises(ValueError, match=message):
            la(x, **options)
    with pytest.raises(InvalidBatchError, match=f"the batch is on meta and the model on {x.device}"):
        la(x.to("meta"))
    with pytest.raises(InvalidBatchError, match="x must be a tensor of inputs"):
        la("images")
    with pytest.raises(InvalidBatchError, match="a batch holds no example"):
        la(x[:0])
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    for predict in (la, lambda z: la(z, pred_type="nn"), la.functional_samples):
        with pytest.raises(ValueError, match=r"not those of the fit \('0\.weight' differs by up to 1\)"):
            predict(x)
    la.load_mean()
    la(x)
