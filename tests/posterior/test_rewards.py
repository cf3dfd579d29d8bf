"""Rewards that are learned from comparisons, and what is predicted of them."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from laplace_ws import BradleyTerry, InvalidBatchError, Laplace, load_posterior
from laplace_ws.curvature import exact

close = torch.testing.assert_close


class Reward(nn.Module):
    """One reward for an input, [N, 1]; the two of a pair side by side, [N, 2]."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, x):
        return self.net(x).flatten(1) if x.ndim == 3 else self.net(x)


def fitted(structure="full", **options):
    torch.manual_seed(0)
    model, pairs, y = Reward(), torch.randn(11, 2, 3, dtype=torch.float64), torch.arange(11) % 2
    la = Laplace(model, "reward_modeling", hessian_structure=structure, **options)
    la.fit([(pairs, y)])
    return la, pairs, y


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_the_curvature_is_that_of_two_classes(structure):
    la, pairs, y = fitted(structure)
    classes = Laplace(la.model, "classification", hessian_structure=structure)
    classes.fit([(pairs, y)])
    close(la.H.to_dense(), classes.H.to_dense())
    close(la.log_marginal_likelihood(), classes.log_marginal_likelihood())


def test_predictions_are_moments_of_the_rewards():
    la, pairs, _ = fitted(prior_precision=0.5)
    for x in (torch.randn(4, 3, dtype=torch.float64), pairs):
        mean, covariance = la(x)
        J = exact.jacobian(la.model, x)
        close(mean, la.model(x).detach())
        close(covariance, J @ la.posterior_covariance @ J.mT)
        close(la(x, diagonal_output=True)[1], covariance.diagonal(dim1=1, dim2=2))
        joint = la(x, joint=True)
        close(joint[0], mean.flatten())
        close(joint[1], la.functional_covariance(J))


def test_sampled_networks_and_samples_are_rewards_too():
    la, _, _ = fitted(prior_precision=50.0)
    x = torch.randn(4, 3, dtype=torch.float64)
    samples = la.predictive_samples(x, "nn", 4000, generator=torch.Generator(x.device).manual_seed(0))
    mean, covariance = la(x, "nn", n_samples=4000, generator=torch.Generator(x.device).manual_seed(0))
    close(mean, samples.mean(0))
    close(covariance[:, :, 0], samples.var(0))
    close(covariance, la(x)[1], rtol=0.15, atol=1e-3)


def test_validation_is_by_preferences():
    la, _, _ = fitted()
    pairs, y = torch.randn(40, 2, 3, dtype=torch.float64), torch.arange(40) % 2
    classes = Laplace(la.model, "classification", hessian_structure="full")
    classes.fitted = replace(la.fitted, likelihood=classes.likelihood)
    options = {"val_loader": [(pairs, y)], "grid_size": 9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels at random prefer the edge of the grid
        best = [posterior.optimize_prior_precision("gridsearch", **options) for posterior in (la, classes)]
    assert best[0] == best[1]


def test_a_saved_posterior_predicts_rewards(tmp_path):
    la, _, _ = fitted("kron")
    la.save(tmp_path / "la.pt")
    x = torch.randn(4, 3, dtype=torch.float64)
    other = load_posterior(tmp_path / "la.pt", la.model)
    assert isinstance(other.likelihood, BradleyTerry)
    close(other(x)[1], la(x)[1])


def test_what_does_not_fit_is_refused():
    la, pairs, y = fitted()
    with pytest.raises(InvalidBatchError, match=r"needs the rewards of both inputs of a pair, \[N, 2\]"):
        la.fit([(pairs[:, 0], y)])
    with pytest.raises(ValueError, match="predictions are of the outputs themselves"):
        la(pairs, link_approx="mc")


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_one_value_is_the_mean_reward_and_probabilities_are_preferences(pred_type):
    la, pairs, _ = fitted(prior_precision=50.0)
    x = torch.randn(4, 3, dtype=torch.float64)
    options = {"n_samples": 3000, "generator": torch.Generator(x.device).manual_seed(0)}
    close(la.predict(x, pred_type, **options), la.model(x).detach(), rtol=0, atol=0.05 if pred_type == "nn" else 1e-12)
    preferred = la.predict_proba(pairs, pred_type, **options)
    close(preferred.sum(1), torch.ones(11, dtype=torch.float64))
    close(preferred, la.model(pairs).softmax(1).detach(), rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="which of a pair is preferred"):
        la.predict_proba(x, pred_type, **options)
