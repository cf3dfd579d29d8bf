"""Groups of the prior, and the damped ascent on the marginal likelihood."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from laplace_ws.curvature.backend import trainable_parameters
from laplace_ws.marglik import Hyperparameters, PriorCollapseWarning
from laplace_ws.models import WideResNet
from laplace_ws.posterior import Laplace, PriorGroups, prior_groups
from laplace_ws.posterior.groups import ELEMENTWISE


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of what is trained, by name."""
    return {name: parameter.shape for name, parameter in trainable_parameters(model).items()}


def group_names(model: nn.Module, structure: str) -> dict[str, str]:
    """The group of every parameter, by name."""
    named = list(trainable_parameters(model).items())
    groups = prior_groups(shapes_of(model), structure)
    return {name: groups.names[i] for (name, _), i in zip(named, groups.index.tolist(), strict=True)}


def test_layerwise_on_fixup_net_gives_scalars_one_prior_that_starts_at_one():
    model = WideResNet(depth=10, width=1, in_channels=1)
    got = group_names(model, "layerwise")
    layers = [name for name, p in model.named_parameters() if p.ndim >= 2]
    scalars = [name for name, p in model.named_parameters() if p.numel() == 1]
    assert len(layers) == 10
    assert {name: got[name] for name in layers} == {name: name for name in layers}
    assert got["classifier.bias"] == "classifier.weight"
    assert {got[name] for name in scalars} == {ELEMENTWISE}
    assert len(got) == len(layers) + len(scalars) + 1
    named = list(trainable_parameters(model).items())
    start = Hyperparameters(prior_groups(shapes_of(model), "layerwise"), prior_precision=10.0).by_parameter(named)
    assert start == pytest.approx({name: 1.0 if name in scalars else 10.0 for name in start})


class Odd(nn.Module):
    """A scale before every weight, a norm after, and a frozen layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.first_scale = nn.Parameter(torch.ones(()))
        self.a = nn.Linear(2, 3)
        self.frozen = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.attention = nn.MultiheadAttention(3, 1)
        self.frozen.requires_grad_(False)


def test_layerwise_covers_the_odd_cases():
    assert group_names(Odd(), "layerwise") == {
        "first_scale": ELEMENTWISE,
        "a.weight": "a.weight",
        "a.bias": "a.weight",
        "norm.weight": ELEMENTWISE,
        "norm.bias": ELEMENTWISE,
        "attention.in_proj_weight": "attention.in_proj_weight",
        "attention.in_proj_bias": "attention.in_proj_weight",
        "attention.out_proj.weight": "attention.out_proj.weight",
        "attention.out_proj.bias": "attention.out_proj.weight",
    }


def test_layerwise_without_any_matrix_is_one_group_that_starts_as_told():
    model = nn.LayerNorm(3)
    named = list(trainable_parameters(model).items())
    hyper = Hyperparameters(prior_groups(shapes_of(model), "layerwise"), prior_precision=3.0)
    assert hyper.by_parameter(named) == pytest.approx({"weight": 3.0, "bias": 3.0})


@pytest.mark.parametrize(
    ("structure", "n_groups", "length"), [("scalar", 1, 4), ("parameter", 4, 4), ("weight", 17, 17)]
)
def test_structures_expand_to_what_the_posterior_takes(structure, n_groups, length):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    hyper = Hyperparameters(
        prior_groups(shapes_of(model), structure), prior_precision=3.0, device=model[0].weight.device
    )
    assert hyper.log_prior_precision.shape == (n_groups,)
    torch.testing.assert_close(hyper.prior_precision(), torch.full((length,), 3.0, dtype=torch.float64))
    named = list(trainable_parameters(model).items())
    assert hyper.by_parameter(named) == pytest.approx(dict.fromkeys(trainable_parameters(model), 3.0))


def test_by_parameter_keeps_the_order_of_the_groups():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    named = list(trainable_parameters(model).items())
    hyper = Hyperparameters(prior_groups(shapes_of(model), "layerwise"))
    with torch.no_grad():
        hyper.log_prior_precision.copy_(torch.tensor([2.0, 5.0]).log())
    assert hyper.by_parameter(named) == pytest.approx({"0.weight": 2, "0.bias": 2, "1.weight": 5, "1.bias": 5})


def linear_gaussian(n: int = 40) -> tuple[nn.Linear, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    x = torch.randn(n, 3, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.0]], dtype=torch.float64) + 0.1 * torch.randn(n, 1, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return model, [(x, y)]


def ascend(n_steps: int, **options) -> tuple[Hyperparameters, float, float]:
    model, data = linear_gaussian()
    la = Laplace(model, "regression", hessian_structure="full")
    la.fit(data)
    groups = prior_groups(shapes_of(model), "scalar")
    hyper = Hyperparameters(groups, tune_sigma=True, lr=0.2, device=la.mean.device)
    hyper.assign_to(la)
    before = la.log_marginal_likelihood().item()
    hyper.ascend(la, n_steps, **options)
    return hyper, before, la.log_marginal_likelihood().item()


def test_ascent_reaches_the_stationary_point():
    """At the optimum δ‖θ‖² = tr(H(H + δ)⁻¹) = γ, and σ² = RSS/(N − γ) [MacKay 1992]."""
    hyper, before, after = ascend(400, max_log_step=10.0)
    model, [(x, y)] = linear_gaussian()
    delta, sigma = hyper.log_prior_precision.exp().item(), hyper.sigma_noise().item()
    H = x.T @ x / sigma**2
    gamma = torch.trace(torch.linalg.solve(H + delta * torch.eye(3, dtype=torch.float64), H)).item()
    rss = (y - model(x)).square().sum().item()
    assert after > before
    assert delta * model.weight.square().sum().item() == pytest.approx(gamma, rel=1e-3)
    assert sigma**2 == pytest.approx(rss / (len(x) - gamma), rel=1e-3)


def test_no_logarithm_moves_further_than_allowed():
    hyper, _, _ = ascend(50, max_log_step=0.3)
    assert hyper.log_sigma_noise.item() == pytest.approx(-0.3)
    assert abs(hyper.log_prior_precision.item()) <= 0.3 + 1e-12
    free, _, _ = ascend(50, max_log_step=10.0)
    assert free.log_sigma_noise.item() < -1


def test_what_is_not_tuned_stays():
    model, data = linear_gaussian()
    la = Laplace(model, "regression", hessian_structure="full")
    la.fit(data)
    hyper = Hyperparameters(prior_groups(shapes_of(model), "scalar"), sigma_noise=0.5, device=la.mean.device)
    hyper.ascend(la, 20)
    assert hyper.sigma_noise().item() == pytest.approx(0.5, rel=1e-12)
    assert la.sigma_noise.item() == pytest.approx(0.5, rel=1e-12)
    assert hyper.log_prior_precision.item() != 0.0


def test_collapse_is_reported_once_by_name():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    x = torch.randn(20, 3, dtype=torch.float64)
    la = Laplace(model, "regression", hessian_structure="diag")
    la.fit([(x, torch.randn(20, 1, dtype=torch.float64))])
    hyper = Hyperparameters(prior_groups(shapes_of(model), "layerwise"), lr=1.0, device=la.mean.device)
    with pytest.warns(PriorCollapseWarning, match=r"'0\.weight'") as caught:
        hyper.ascend(la, 40, max_log_step=100.0, stiffness=50.0)
    assert len(caught) == 1
    assert hyper.collapsed(50.0) == ["0.weight"]
    assert hyper.log_prior_precision[0].item() == pytest.approx(math.log(50.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hyper.ascend(la, 5, max_log_step=100.0, stiffness=50.0)


def test_the_limit_is_on_the_step_that_training_takes():
    """The regulariser's gradient is δτσ²θ/N, so the limit of δ grows as the noise falls."""
    groups = PriorGroups(("all",), torch.zeros(1, dtype=torch.long))
    hyper = Hyperparameters(groups, prior_precision=100.0, sigma_noise=0.5, temperature=2.0)
    assert hyper.collapsed(stiffness=49.0) == ["all"]
    assert hyper.collapsed(stiffness=51.0) == []


def test_state_restores_the_next_step_exactly():
    model, data = linear_gaussian()
    la = Laplace(model, "regression", hessian_structure="full")
    la.fit(data)
    groups = prior_groups(shapes_of(model), "scalar")
    first, second, without_adam = (Hyperparameters(groups, tune_sigma=True, device=la.mean.device) for _ in range(3))
    first.ascend(la, 7)
    second.load_state_dict(first.state_dict())
    without_adam.load_state_dict({k: v for k, v in first.state_dict().items() if "extra" not in k}, strict=False)
    for hyper in (first, second, without_adam):
        hyper.ascend(la, 7)
    assert torch.equal(first.log_prior_precision, second.log_prior_precision)
    assert not torch.equal(first.log_prior_precision, without_adam.log_prior_precision)


@pytest.mark.parametrize("start", [0.0, -1.0, math.nan, math.inf])
def test_starts_must_be_positive(start):
    with pytest.raises(ValueError, match="sigma_noise starts at"):
        Hyperparameters(PriorGroups(("all",), torch.zeros(1, dtype=torch.long)), sigma_noise=start)
