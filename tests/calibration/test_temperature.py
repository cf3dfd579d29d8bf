"""The temperature against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from laplace_ws.calibration import fit_temperature
from laplace_ws.errors import NumericalRepairWarning


def overconfident(n, scale, seed=0):
    """Labels drawn from softmax(f), and f times a scale."""
    generator = torch.Generator().manual_seed(seed)
    f = 2 * torch.randn(n, 4, dtype=torch.float64, generator=generator)
    return scale * f, torch.multinomial(f.softmax(-1), 1, generator=generator)[:, 0]


def nll(f, y, temperature):
    return F.cross_entropy(f / temperature, y)


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_gradient_vanishes_and_no_grid_point_is_better(scale):
    f, y = overconfident(300, scale)
    temperature = torch.tensor(fit_temperature(f, y), dtype=torch.float64, requires_grad=True)
    loss = nll(f, y, temperature)
    (gradient,) = torch.autograd.grad(loss, temperature)
    assert abs(gradient * temperature).item() < 1e-6
    grid = torch.logspace(-1.99, 1.99, 399, dtype=torch.float64)
    assert loss.item() <= min(nll(f, y, t).item() for t in grid)


def test_a_scale_of_the_logits_is_found_and_scales_the_temperature():
    f, y = overconfident(20_000, 5.0)
    assert fit_temperature(f, y) == pytest.approx(5.0, rel=0.03)
    assert fit_temperature(3 * f, y) == pytest.approx(3 * fit_temperature(f, y), rel=1e-6)


def test_float32_logits_are_taken_in_float64():
    f, y = overconfident(200, 2.0)
    assert fit_temperature(f.float(), y) == pytest.approx(fit_temperature(f, y), rel=1e-5)


def test_without_an_optimum_the_limit_is_named():
    f = torch.eye(3, dtype=torch.float64)
    with pytest.warns(NumericalRepairWarning, match=r"held at its limit 0\.01.* of the 3 validation images"):
        assert fit_temperature(f, torch.arange(3)) == pytest.approx(0.01, rel=1e-3)
    with pytest.warns(NumericalRepairWarning, match="held at its limit 100"):
        assert fit_temperature(f, torch.tensor([1, 2, 0])) == pytest.approx(100, rel=1e-3)
