"""A posterior from the averages of KFAC, against one that is fitted."""

import copy

import pytest
import torch
from cases import double
from torch import nn

from laplace_ws import Laplace, UnsupportedParameterError
from laplace_ws.optim import KFAC


def of_images():
    torch.manual_seed(0)
    model = double(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)))
    x = torch.randn(24, 1, 4, 4).double()
    return model, x, (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 1).long()


def trained(model, x, y, loss, n_steps=1, **options):
    optimizer = KFAC(model, **options)
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return optimizer


def fitted(model, likelihood, x, y, **options):
    la = Laplace(model, likelihood, **options)
    la.fit([(x, y)])
    return la


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("source", ["nll_sum", "train_loader"])
def test_at_fixed_weights_it_is_that_of_a_fit(approx, source):
    model, x, y = of_images()
    optimizer = trained(model, x, y, nn.functional.cross_entropy, lr=0.0, n_steps=3, kfac_approx=approx)
    truth = fitted(model, "classification", x, y, curvature="ef", kfac_approx=approx, prior_precision=3.0)
    given = (
        {"nll_sum": truth.fitted.totals.nll_sum}
        if source == "nll_sum"
        else {"train_loader": [(x[:9], y[:9]), (x[9:], y[9:])]}
    )
    la = Laplace.from_optimizer(optimizer, "classification", n_data=24, prior_precision=3.0, **given)
    torch.testing.assert_close(la.log_marginal_likelihood(), truth.log_marginal_likelihood(), rtol=1e-12, atol=0)
    for mine, other in zip(la(x), truth(x), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    assert (la.n_data, la.n_outputs, la.options) == (truth.n_data, truth.n_outputs, truth.options)
    assert la.fitted.totals.n_targets == truth.fitted.totals.n_targets
    precision = [p.optimal_prior_precision() for p in (la, truth)]
    torch.testing.assert_close(*precision, rtol=1e-9, atol=0)
    la.fit([(x, y)], override=False)
    truth.fit([(x, y)], override=False)
    torch.testing.assert_close(la.log_marginal_likelihood(), truth.log_marginal_likelihood(), rtol=1e-12, atol=0)


def test_mean_squared_error_has_another_scale():
    model, x, _ = of_images()
    y = torch.randn(24, 3).double()
    optimizer = trained(model, x, y, nn.functional.mse_loss, lr=0.0)
    truth = fitted(model, "regression", x, y, curvature="ef", kfac_approx="expand", sigma_noise=0.7)
    la = Laplace.from_optimizer(
        optimizer, "regression", n_data=24, train_loader=[(x, y)], loss_scale=2 / 3, sigma_noise=0.7
    )
    torch.testing.assert_close(la.log_marginal_likelihood(), truth.log_marginal_likelihood(), rtol=1e-12, atol=0)
    by_sum = Laplace.from_optimizer(
        optimizer, "regression", n_data=24, nll_sum=truth.fitted.totals.nll_sum, loss_scale=2 / 3, sigma_noise=0.7
    )
    torch.testing.assert_close(by_sum.log_marginal_likelihood(), truth.log_marginal_likelihood(), rtol=1e-12, atol=0)


def test_columns_of_the_likelihood_need_no_scale():
    model, x, y = of_images()
    options = {"curvature": "ggn", "likelihood": "classification", "factor_decay": 0.0, "start_steps": 9, "lr": 0.01}
    loss = lambda f, y: 5 * nn.functional.cross_entropy(f, y)  # noqa: E731
    optimizer = trained(model, x, y, loss, n_steps=3, **options)
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
    truth = fitted(before, "classification", x, y, kfac_approx="expand")
    la = Laplace.from_optimizer(optimizer, "classification", n_data=24, nll_sum=1.0)
    for name, block in la.H.items():  # of the weights before the last step, as no decay keeps none of the others
        torch.testing.assert_close(block.to_dense(), truth.H[name].to_dense(), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(la.mean, truth.mean)


def test_what_has_no_factors_is_refused_or_left_out():
    torch.manual_seed(0)
    model = double(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    x, y = torch.randn(10, 3).double(), torch.arange(10) % 3
    optimizer = trained(model, x, y, nn.functional.cross_entropy, lr=0.0)
    with pytest.raises(
        UnsupportedParameterError, match=r"'1.weight', '1.bias' have no Kronecker factors in the optimizer"
    ):
        Laplace.from_optimizer(optimizer, "classification", n_data=10, nll_sum=1.0)
    la = Laplace.from_optimizer(optimizer, "classification", ["0", "2"], n_data=10, nll_sum=1.0)
    truth = fitted(model, "classification", x, y, subset_of_weights=["0", "2"], curvature="ef", kfac_approx="expand")
    assert la.parameter_names == truth.parameter_names
    for name, block in la.H.items():
        torch.testing.assert_close(block.to_dense(), truth.H[name].to_dense(), rtol=1e-10, atol=1e-12)


def test_it_can_be_saved(tmp_path):
    from laplace_ws import load_posterior

    model, x, y = of_images()
    optimizer = trained(model, x, y, nn.functional.cross_entropy, n_steps=3)
    la = Laplace.from_optimizer(optimizer, "classification", n_data=24, train_loader=[(x, y)])
    la.save(tmp_path / "posterior.pt")
    other = load_posterior(tmp_path / "posterior.pt", model)
    assert other.log_marginal_likelihood() == la.log_marginal_likelihood()
