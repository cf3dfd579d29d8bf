"""log p(D_rest | D_part): against the exact Gaussian value and against samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from laplace_ws.likelihoods import Categorical, Gaussian
from laplace_ws.selection.conditional import log_joint_predictive


def outputs(n: int, c: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A mean and a covariance of outputs."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(n, c, generator=generator, dtype=torch.float64)
    half = torch.randn(n * c, 2 * n * c, generator=generator, dtype=torch.float64)
    return f, scale * half @ half.mT / (2 * n * c)


def test_it_is_exact_for_a_gaussian_likelihood():
    f, covariance = outputs(4, 2, 3.0)
    y = f + torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(4, 2)
    exact = MultivariateNormal(f.flatten(), covariance + torch.eye(8, dtype=torch.float64)).log_prob(y.flatten())
    assert log_joint_predictive(Gaussian(), f, covariance, y) == pytest.approx(exact.item(), abs=1e-9)


def test_targets_predicted_together_differ_from_those_predicted_alone():
    f, covariance = outputs(4, 2, 3.0)
    y = f + 1.0
    alone = sum(
        log_joint_predictive(Gaussian(), f[n : n + 1], covariance[2 * n : 2 * n + 2, 2 * n : 2 * n + 2], y[n : n + 1])
        for n in range(4)
    )
    assert abs(alone - log_joint_predictive(Gaussian(), f, covariance, y)) > 0.1


@pytest.mark.parametrize(("scale", "error"), [(0.1, 1e-3), (1.0, 0.05), (10.0, 0.4)])
def test_classes_against_samples(scale, error):
    f, covariance = outputs(3, 4, scale)
    y = torch.tensor([0, 3, 1])
    torch.manual_seed(0)
    drawn = MultivariateNormal(f.flatten(), covariance).sample((400_000,)).reshape(-1, 3, 4)
    log_p = drawn.log_softmax(-1).gather(-1, y.expand(len(drawn), 3)[..., None]).sum((1, 2))
    sampled = (log_p.logsumexp(0) - math.log(len(drawn))).item()
    assert log_joint_predictive(Categorical(), f, covariance, y) == pytest.approx(sampled, abs=error)


def test_without_uncertainty_it_is_the_log_likelihood():
    f, covariance = outputs(3, 4, 0.0)
    y = torch.tensor([2, 2, 0])
    found = log_joint_predictive(Categorical(), f, covariance, y)
    assert found == pytest.approx(-torch.nn.functional.cross_entropy(f, y, reduction="sum").item(), abs=1e-12)


def test_far_outputs_of_the_wrong_class_are_reached():
    f = torch.tensor([[60.0, 0.0, 0.0]]).double()
    found = log_joint_predictive(Categorical(), f, 400 * torch.eye(3).double(), torch.tensor([1]))
    assert -12 < found < -3
