"""The gradient that training follows is that of the MAP objective."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_ws.curvature.backend import trainable_parameters
from laplace_ws.likelihoods import make_likelihood
from laplace_ws.marglik import marglik_training, neg_log_joint_mean
from laplace_ws.marglik.objective import split_by_parameter


class Recorder(torch.optim.SGD):
    """Keeps the gradients of its first step."""

    seen: list[torch.Tensor]

    def step(self, closure=None):
        if not hasattr(self, "seen"):
            type(self).last = self
            self.seen = [p.grad.clone() for p in self.param_groups[0]["params"]]
        return super().step(closure)


def make(likelihood: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[0].bias.requires_grad_(False)
    x = torch.randn(8, 3, dtype=torch.float64)
    y = torch.arange(8) % 3 if likelihood == "classification" else torch.randn(8, 3, dtype=torch.float64)
    return model, x, y


@pytest.mark.parametrize(("likelihood", "structure"), [("classification", "layerwise"), ("regression", "weight")])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradient_equals_autograd_of_the_objective(likelihood, structure, temperature):
    model, x, y = make(likelihood)
    parameters = list(trainable_parameters(model).values())
    sigma = 0.7 if likelihood == "regression" else 1.0
    delta = 5.0
    f = model(x)
    nll = (
        nn.functional.cross_entropy(f, y)
        if likelihood == "classification"
        else (f - y).square().sum() / 2 / 8 / sigma**2
    )
    objective = neg_log_joint_mean(nll, parameters, [torch.tensor(delta)] * len(parameters), 8, temperature)
    expected = torch.autograd.grad(objective * temperature * sigma**2, parameters)
    marglik_training(
        model,
        [(x, y)],
        likelihood,
        hessian_structure="diag",
        optimizer_cls=Recorder,
        optimizer_kwargs={"lr": 0.1},
        n_epochs=1,
        n_hypersteps=0,
        prior_structure=structure,
        prior_prec_init=delta,
        sigma_noise_init=sigma,
        temperature_init=temperature,
        progress_bar=False,
    )
    for got, want in zip(Recorder.last.seen, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_one_prior_precision_a_weight_is_split_in_order():
    parameters = [torch.zeros(2, 3), torch.zeros(2)]
    parts = split_by_parameter(torch.arange(8.0), parameters)
    assert torch.equal(parts[0], torch.arange(6.0).view(2, 3))
    assert torch.equal(parts[1], torch.tensor([6.0, 7.0]))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_losses_are_the_objective_in_nats(temperature):
    model, x, y = make("classification")
    parameters = list(trainable_parameters(model).values())
    nll = make_likelihood("classification").nll_sum(model(x), y) / 8
    expected = neg_log_joint_mean(nll, parameters, [torch.tensor(2.0)] * 3, 8, temperature).item()
    result = marglik_training(
        model,
        [(x, y)],
        n_epochs=1,
        n_hypersteps=0,
        prior_prec_init=2.0,
        temperature_init=temperature,
        optimizer_kwargs={"lr": 1e-12},
        progress_bar=False,
    )
    assert result.losses == pytest.approx([expected], rel=1e-9)
    assert result.history[0]["train_nll"] == pytest.approx(nll.item(), rel=1e-9)
