"""One multiplier of the posterior covariance, against dense algebra and loops over predictions."""

import math

import pytest
import torch
from posterior.shared import STRUCTURES, dense_moments, fitted
from posterior.test_tuning import score_of

from laplace_ws import DataWarning, FileFormatError, Laplace, load_posterior


@pytest.mark.parametrize("structure", STRUCTURES)
def test_covariances_are_multiplied_and_the_evidence_is_left(structure):
    la, x, _ = fitted(structure, "mlp", prior_precision=3.0)
    evidence, samples = la.log_marginal_likelihood(), la.sample(4, torch.Generator().manual_seed(0))
    precision = la.posterior_precision
    la.covariance_scale = 0.25
    _, covariance = la.functional_moments(x)
    truth = dense_moments(la, x)[1]  # without the multiplier
    blocks = torch.stack([truth[n, :, n] for n in range(len(x))])
    torch.testing.assert_close(covariance, 0.25 * blocks, rtol=1e-8, atol=1e-12)
    scaled = la.sample(4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaled - la.mean, 0.5 * (samples - la.mean), rtol=1e-10, atol=1e-12)
    assert la.log_marginal_likelihood() == evidence
    if isinstance(precision, torch.Tensor):
        torch.testing.assert_close(la.posterior_precision, precision / 0.25)
    else:
        torch.testing.assert_close(la.posterior_precision.to_dense(), precision.to_dense() / 0.25)


def drawn_from(la, x, n_batches):
    """Batches of other inputs whose targets are drawn from the predictive, so that the best multiplier is near the present one."""
    for _ in range(n_batches):
        x = torch.randn_like(x)
        if la.likelihood.is_regression:
            mean, variance = la(x, observation_noise=True, diagonal_output=True)
            y = mean + variance.sqrt() * torch.randn_like(mean)
        elif la.likelihood.name == "binary":
            y = torch.bernoulli(la(x))
        else:
            y = torch.distributions.Categorical(la(x)).sample()
        yield x, y


@pytest.mark.parametrize(
    ("case", "prior_precision", "options"),
    [
        ("mlp", 0.3, {}),
        ("mlp", 0.3, {"loss": "brier"}),
        ("cnn", 0.3, {"link_approx": "bridge"}),
        ("mlp-regression", 0.3, {}),
        ("mlp-binary", 2.0, {}),
        ("mlp-tokens", 0.3, {}),
    ],
)
def test_the_best_multiplier_is_that_of_a_loop_over_predictions(case, prior_precision, options):
    la, x, _ = fitted("kron", case, prior_precision=prior_precision)
    la.covariance_scale = 2.0
    data, passes = list(drawn_from(la, x, 20)), 0

    class Loader:
        def __iter__(self):
            nonlocal passes
            passes += 1
            return iter(data)

    best = la.optimize_covariance_scale(Loader(), **options)
    assert (passes, la.covariance_scale) == (1, best)
    predicted = {k: v for k, v in options.items() if k != "loss"}
    predicted |= {"observation_noise": True, "diagonal_output": True} if la.likelihood.is_regression else {}

    def score_at(scale):
        la.covariance_scale = scale
        return score_of(la, data, options.get("loss", "nll"), **predicted)

    assert 1e-3 < best < 1e3  # an optimum, not the end of the range
    score = score_at(best)
    assert all(score <= score_at(best * factor) + 1e-12 for factor in (0.2, 0.7, 0.9, 1.1, 1.4, 5.0))
    la.covariance_scale = 1.0  # what is set before has no part in the choice
    assert la.optimize_covariance_scale(data, **options) == best


def test_draws_are_the_same_at_each_multiplier():
    la, x, _ = fitted("diag", "cnn", prior_precision=0.1)
    data = list(drawn_from(la, x, 20))
    generator = torch.Generator().manual_seed(0)
    best = la.optimize_covariance_scale(data, link_approx="mc", n_samples=5, generator=generator)

    def score_at(scale):
        la.covariance_scale = scale
        generator.manual_seed(0)
        return score_of(la, data, "nll", link_approx="mc", n_samples=5, generator=generator)

    assert all(score_at(best) <= score_at(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_the_multiplier_is_saved(tmp_path):
    la, x, _ = fitted("kron")
    la.covariance_scale = 0.125
    la.save(tmp_path / "la.pt")
    loaded = load_posterior(tmp_path / "la.pt", la.model)
    assert loaded.covariance_scale == 0.125
    assert torch.equal(loaded(x), la(x))
    state = la.state_dict()
    del state["covariance_scale"]  # of a file from before there was one
    loaded.load_state_dict(state)
    assert loaded.covariance_scale == 1.0
    with pytest.raises(FileFormatError, match=r"'covariance_scale' is 0\.0 and must be finite and above 0"):
        la.load_state_dict({**state, "covariance_scale": 0.0})
    assert la.covariance_scale == 0.125


def test_an_end_of_the_range_is_said_so():
    la, x, _ = fitted("kron", prior_precision=1e-3)
    with torch.no_grad():
        certain = la.model(x).argmax(-1)
    la.fit([(x, certain)])
    with pytest.warns(UserWarning, match="the network's own outputs"):
        la.optimize_covariance_scale([(x + 1e-6, certain)])


def test_training_data_in_the_place_of_validation_data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 20, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    la = Laplace(torch.nn.Linear(20, 3), "classification")
    la.fit([(x, y)])
    with pytest.warns(DataWarning, match="among the data of the fit"):
        la.optimize_covariance_scale([(x, y)])


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_a_multiplier_is_positive_and_finite(value):
    la, _, _ = fitted("kron")
    with pytest.raises(ValueError, match="covariance_scale"):
        la.covariance_scale = value
    assert la.covariance_scale == 1.0
