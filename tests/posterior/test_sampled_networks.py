"""Deep networks at weights drawn under a weak prior overflow, which is said, and ends no search for a better prior."""

import math

import pytest
import torch
from torch import nn

from laplace_ws import InvalidBatchError, Laplace

TOO_WIDE = (
    r"\d+ of 20 networks with weights drawn from this posterior give outputs that are not finite; take a larger "
    r'prior_precision, or pred_type="glm"\.'
)


def deep(likelihood="classification", **options):
    torch.manual_seed(0)
    layers = [layer for i in range(30) for layer in (nn.Linear(32 if i else 3, 32), nn.SiLU())]
    la = Laplace(
        nn.Sequential(*layers, nn.Linear(32, 3)), likelihood, hessian_structure="diag", prior_precision=1e-3, **options
    )
    x, y = torch.randn(12, 3), torch.arange(12) % 3
    data = x, (y if likelihood == "classification" else torch.nn.functional.one_hot(y).float())
    la.fit([data])
    return la, *data


@pytest.mark.parametrize("likelihood", ["classification", "binary", "regression"])
def test_draws_that_overflow_are_said(likelihood):
    la, x, _ = deep(likelihood)
    for call in (la, la.predictive_samples, la.functional_samples):
        with pytest.raises(InvalidBatchError, match=TOO_WIDE):
            call(x, pred_type="nn", n_samples=20)


def test_an_input_that_is_not_a_number_is_not_blamed_on_the_draws():
    la, x, _ = deep()
    la.prior_precision = 1e6
    with pytest.raises(
        InvalidBatchError, match="Sequential gives outputs that are not finite; look for NaN in its weights"
    ):
        la(x * torch.nan, pred_type="nn", n_samples=20)


@pytest.mark.parametrize("likelihood", ["classification", "binary", "regression"])
def test_a_point_of_the_grid_that_overflows_is_not_chosen_and_ends_nothing(likelihood):
    la, x, y = deep(likelihood)
    options = {"val_loader": [(x, y)], "pred_type": "nn", "n_samples": 20, "log_prior_prec_min": -3.0}
    la.optimize_prior_precision("gridsearch", log_prior_prec_max=5.0, grid_size=9, **options)
    assert math.log10(la.prior_precision.item()) > 0
    la.functional_samples(x, pred_type="nn", n_samples=20)
    with pytest.raises(ValueError, match="no point of the grid has a finite score"):
        la.optimize_prior_precision("gridsearch", log_prior_prec_max=-2.0, grid_size=2, **options)


def test_a_loss_that_makes_a_number_of_anything_does_not_choose_a_point_that_overflows():
    la, x, y = deep()
    la.optimize_prior_precision(
        "gridsearch",
        val_loader=[(x, y)],
        loss=lambda probabilities, y: 0.0 if probabilities.isnan().any() else 1.0,
        pred_type="nn",
        n_samples=20,
        log_prior_prec_min=-3.0,
        log_prior_prec_max=5.0,
        grid_size=9,
    )
    assert la(x, pred_type="nn").isfinite().all()
