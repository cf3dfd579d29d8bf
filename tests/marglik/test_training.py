"""Online training: what it reaches, and what it leaves alone."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from marglik.runs import (
    QUICK,
    SGD,
    as_found,
    assert_as_found,
    assert_equal_states,
    blobs,
    mlp,
    noisy_sine,
    norm_net,
    state_of,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ws.curvature import FACTOR_BACKENDS
from laplace_ws.data import TensorLoader
from laplace_ws.likelihoods import Gaussian
from laplace_ws.marglik import (
    MarglikResult,
    TemperatureWarning,
    marglik_training,
)
from laplace_ws.marglik.trainer import n_correct
from laplace_ws.optim import KFAC
from laplace_ws.posterior import Laplace as KronLaplace

# ------------------------------------------------------------------ what it reaches


def test_tuning_finds_the_noise_and_a_better_marginal_likelihood():
    options = {"hessian_structure": "full", "optimizer_cls": torch.optim.Adam, "optimizer_kwargs": {"lr": 0.02}}
    options |= {"n_epochs": 150, "progress_bar": False, "prior_prec_init": 1.0}
    tuned = marglik_training(
        mlp(1, 1, 16),
        noisy_sine(),
        "regression",
        n_epochs_burnin=30,
        marglik_frequency=10,
        fit_fraction=1.0,
        n_hypersteps=20,
        **options,
    )
    fixed = marglik_training(mlp(1, 1, 16), noisy_sine(), "regression", n_hypersteps=0, **options)
    assert tuned.la.log_marginal_likelihood() > fixed.la.log_marginal_likelihood() + 50
    assert tuned.la.sigma_noise.item() == pytest.approx(0.2, rel=0.2)
    assert fixed.la.sigma_noise.item() == 1.0
    assert tuned.margliks[-1] > tuned.margliks[0] + 20


@pytest.mark.parametrize("curvature", ["ggn", "ggn_mc"])
def test_every_backend_gives_the_same_training(curvature):
    def train(backend):
        torch.manual_seed(0)
        return marglik_training(
            norm_net(), blobs(), **QUICK, optimizer_kwargs=SGD, curvature=curvature, backend=backend
        )

    native = train("native")
    assert len(set(native.margliks)) == len(native.margliks) > 1
    for backend in FACTOR_BACKENDS:
        other = train(backend)
        assert other.la.backend.name == backend
        assert other.margliks == pytest.approx(native.margliks, rel=1e-9)
        torch.testing.assert_close(other.la.prior_precision, native.la.prior_precision, rtol=1e-8, atol=0)
        torch.testing.assert_close(other.la.mean, native.la.mean, rtol=1e-8, atol=1e-10)


def test_result_unpacks_into_four_and_holds_the_best():
    model = mlp()
    result = marglik_training(model, blobs(), **QUICK, optimizer_kwargs=SGD, curvature="ggn")
    la, returned, margliks, losses = result
    assert result[2] is margliks
    assert isinstance(result, MarglikResult)
    assert returned is model
    assert len(losses) == 6
    assert len(margliks) == 3  # after epochs 2, 4 and 6
    measured = {r["epoch"]: r["log_marginal_likelihood"] for r in result.history}
    assert [epoch for epoch, value in measured.items() if value is not None] == [2, 4, 6]
    assert result.best_epoch == 6
    # Model and hyperparameters are those of the epoch that was kept, so an exact refit on all the data finds its value again.
    assert la.log_marginal_likelihood().item() == pytest.approx(measured[result.best_epoch], rel=1e-5)
    assert la.n_data == 60
    assert 0 < result.curvature_seconds < result.train_seconds


def test_the_best_is_kept_when_asked_for_and_later_epochs_are_worse():
    class Wrecker:
        """A schedule that makes the last steps absurdly large."""

        def __init__(self, optimizer):
            self.optimizer, self.n = optimizer, 0

        def step(self):
            self.n += 1
            self.optimizer.param_groups[0]["lr"] = 0.02 if self.n < 16 else 2.0

        def state_dict(self):
            return {}

    options = {**QUICK, "optimizer_kwargs": SGD, "curvature": "ggn", "scheduler_cls": Wrecker}
    result = marglik_training(mlp(), blobs(), **options, keep="best")
    assert result.best_epoch == 4
    assert result.margliks[-1] < max(result.margliks) - 1
    assert result.la.log_marginal_likelihood().item() == pytest.approx(max(result.margliks), rel=1e-5)


def worse_each_time(monkeypatch) -> None:
    """Let every log marginal likelihood that is measured (not one that is ascended) be worse than the one before."""
    real, n_measured = KronLaplace.log_marginal_likelihood, 0

    def measured(self, **values):
        nonlocal n_measured
        n_measured += not values
        return real(self, **values) - (0 if values else 1e4 * n_measured)

    monkeypatch.setattr(KronLaplace, "log_marginal_likelihood", measured)


def watched_run(**options) -> tuple[MarglikResult, dict[int, dict[str, torch.Tensor]]]:
    """A run of the network with buffers, and its state after each epoch."""
    model, states = norm_net(), {}

    def watch(record):
        states[record["epoch"]] = state_of(model)

    return marglik_training(model, blobs(), **QUICK, optimizer_kwargs=SGD, on_epoch=watch, **options), states


def test_the_best_is_kept_with_its_buffers_and_hyperparameters(monkeypatch):
    worse_each_time(monkeypatch)
    result, states = watched_run(keep="best")
    assert result.best_epoch == 2
    assert not torch.equal(states[2]["1.running_mean"], states[6]["1.running_mean"])
    assert_equal_states(result.model.state_dict(), states[2])
    assert result.prior_precision == result.history[1]["prior_precision"]
    assert result.prior_precision != result.history[5]["prior_precision"]
    assert result.la.prior_precision.tolist() == pytest.approx(list(result.prior_precision.values()))


@pytest.mark.filterwarnings("ignore::laplace_ws.marglik.TemperatureWarning")
@pytest.mark.parametrize("options", [{}, {"tune_temperature": True}])
def test_the_last_is_kept_by_default(monkeypatch, options):
    worse_each_time(monkeypatch)
    result, states = watched_run(**options)
    assert result.best_epoch == 6
    assert_equal_states(result.model.state_dict(), states[6])
    assert result.la.prior_precision.tolist() == pytest.approx(list(result.prior_precision.values()))
    assert result.prior_precision == result.history[5]["prior_precision"]
    assert result.prior_precision != result.history[1]["prior_precision"]
    assert result.la.temperature.item() == pytest.approx(result.history[5]["temperature"])


def test_the_last_is_kept_where_it_was_not_tuned():
    """A budget may leave no tuning after the last epochs; their weights are left all the same."""
    model, weights = mlp(), []
    options = {**QUICK, "fit_fraction": None, "marglik_frequency": None, "optimizer_kwargs": SGD}
    result = marglik_training(model, blobs(), **options, on_epoch=lambda _: weights.append(state_of(model)))
    assert result.best_epoch == 6
    assert_equal_states(model.state_dict(), weights[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "first"}, r"keep='first' is not one of \['last', 'best'\]"),
        ({"keep": "best", "fit_fraction": None}, "give fit_fraction, or keep='last'"),
        ({"keep": "best", "tune_temperature": True}, "take keep='last' with tune_temperature"),
        ({"keep": "best", "optimizer_cls": KFAC}, "take keep='last', or refit=True"),
    ],
)
def test_the_best_is_refused_where_values_do_not_compare(options, message):
    with pytest.raises(ValueError, match=message):
        marglik_training(mlp(), blobs(), **QUICK | options)


@pytest.mark.parametrize(
    "options", [{"optimizer_cls": KFAC, "refit": True}, {"n_hypersteps": 0, "tune_temperature": True}]
)
def test_the_best_is_taken_where_values_compare_or_nothing_is_tuned(options):
    result = marglik_training(mlp(), blobs(), **QUICK | options, keep="best")
    assert result.best_epoch in (2, 4, 6)


def test_refit_stands_for_all_the_data_where_the_loader_leaves_some_out():
    x, y = blobs().dataset.tensors
    model = mlp()
    loader = TensorLoader(x, y, batch_size=16, drop_last=True)
    result = marglik_training(model, loader, **QUICK, optimizer_kwargs=SGD)
    seen = nn.functional.cross_entropy(model(x[:48]), y[:48], reduction="sum").item()
    assert result.la.n_data == 60
    assert result.la.log_likelihood.item() == pytest.approx(-seen * 60 / 48, rel=1e-9)


class Own(Gaussian):
    """A user's own likelihood, which notes its noise at every loss."""

    sigmas: ClassVar[list[float]] = []

    def nll_sum(self, f, y):
        self.sigmas.append(self.sigma_noise)
        return super().nll_sum(f, y)


def test_a_likelihood_derived_from_the_gaussian_is_trained_as_itself():
    Own.sigmas.clear()
    marglik_training(
        mlp(1, 1), noisy_sine(), Own(0.3), **QUICK | {"n_hypersteps": 0, "n_epochs": 1}, optimizer_kwargs=SGD
    )
    assert Own.sigmas[:4] == pytest.approx([0.3] * 4)  # the four gradient steps of the epoch


def test_without_hypersteps_the_prior_stays_and_nothing_is_measured_on_the_way():
    result = marglik_training(mlp(), blobs(), **QUICK | {"n_hypersteps": 0}, prior_prec_init=2.0, optimizer_kwargs=SGD)
    assert result.margliks == []
    assert {r["log_marginal_likelihood"] for r in result.history} == {None}
    assert list(result.prior_precision.values()) == pytest.approx([2.0] * 4)
    assert math.isfinite(result.la.log_marginal_likelihood().item())


def test_tuning_does_not_change_the_order_of_batches():
    """With steps too small to matter, tuned and plain training see the same batches, so the same losses."""
    runs = [
        marglik_training(mlp(), blobs(), **QUICK | {"n_hypersteps": k}, max_log_step=1e-12, optimizer_kwargs=SGD)
        for k in (0, 1)
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)


def test_default_start_is_stiff():
    result = marglik_training(mlp(), blobs(), **QUICK | {"n_hypersteps": 0}, optimizer_kwargs=SGD)
    assert result.prior_precision["0.weight"] == pytest.approx(0.01 * 60)


def test_the_likelihoods_own_noise_is_the_start():
    result = marglik_training(
        mlp(1, 1), noisy_sine(), Gaussian(0.3), **QUICK, fix_sigma_noise=True, optimizer_kwargs=SGD
    )
    assert result.la.sigma_noise.item() == pytest.approx(0.3)
    assert result.history[0]["sigma_noise"] == pytest.approx(0.3)


def test_a_part_of_the_batches_is_scaled_up(monkeypatch):
    seen = []

    def run(fraction):
        return marglik_training(
            mlp(), blobs(n=64), **QUICK | {"fit_fraction": fraction}, optimizer_kwargs=SGD, curvature="ggn"
        )

    fit = KronLaplace.fit

    def counted(self, loader, **kwargs):
        batches = list(loader)
        seen.append(sum(len(y) for _, y in batches))
        return fit(self, batches, **kwargs)

    monkeypatch.setattr(KronLaplace, "fit", counted)
    half = run(0.5)
    assert seen == [32, 32, 32, 64]  # three tunings, and the refit on everything
    whole = run(1.0)
    assert half.margliks[0] == pytest.approx(whole.margliks[0], rel=0.3)
    assert half.margliks[0] != whole.margliks[0]


def test_the_part_is_drawn_afresh_at_each_tuning(monkeypatch):
    parts = []
    fit = KronLaplace.fit

    def recorded(self, loader, **kwargs):
        batches = list(loader)
        parts.append(frozenset(float(x[0, 0]) for x, _ in batches))
        return fit(self, batches, **kwargs)

    monkeypatch.setattr(KronLaplace, "fit", recorded)
    x, y = blobs(n=64).dataset.tensors
    options = {**QUICK, "n_epochs_burnin": 1, "marglik_frequency": 1, "fit_fraction": 0.3, "optimizer_kwargs": SGD}
    marglik_training(mlp(), TensorLoader(x, y, batch_size=8), **options)
    assert {len(part) for part in parts[:-1]} == {3}
    assert len(set(parts[:-1])) > 1


def test_refit_may_use_another_curvature():
    result = marglik_training(mlp(), blobs(), **QUICK, optimizer_kwargs=SGD, curvature="ggn_mc", final_curvature="ggn")
    assert result.la.curvature.value == "ggn"
    assert result.la.prior_precision[0].item() == pytest.approx(result.prior_precision["0.weight"])


def test_tuning_the_temperature_warns():
    with pytest.warns(TemperatureWarning, match="not normalised"):
        result = marglik_training(mlp(), blobs(), **QUICK, optimizer_kwargs=SGD, tune_temperature=True)
    assert result.la.temperature.item() != 1.0


def test_accuracy_of_each_kind_of_output():
    assert n_correct(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1])).item() == 1
    assert n_correct(torch.tensor([[0.3], [-0.2]]), torch.tensor([[1], [1]])).item() == 1
    assert n_correct(torch.eye(2)[None], torch.tensor([[0, 0]])).item() == 0.5
    assert n_correct(torch.ones(2, 1), torch.ones(2, 1)).isnan()


# ------------------------------------------------------------------ what it leaves alone


def odd_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    model[2].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


@pytest.mark.parametrize("n_hypersteps", [0, 5])
def test_modes_grads_and_random_state_are_restored(n_hypersteps):
    model = odd_model()
    before, frozen, mean = as_found(model), model[0].bias.clone(), model[1].running_mean.clone()
    dataset = TensorDataset(*blobs().dataset.tensors)
    loader = DataLoader(dataset, batch_size=16, shuffle=True)
    marglik_training(model, loader, **QUICK | {"n_hypersteps": n_hypersteps}, optimizer_kwargs=SGD)
    assert_as_found(model, before)
    assert torch.equal(model[0].bias, frozen)
    assert not torch.equal(model[1].running_mean, mean)


def test_gradient_steps_run_in_train_mode_whatever_the_mode_was():
    model = odd_model().eval()
    mean = model[1].running_mean.clone()
    marglik_training(model, blobs(), **QUICK, optimizer_kwargs=SGD)
    assert not torch.equal(model[1].running_mean, mean)
    assert not any(module.training for module in model.modules())


class Boom(Exception):
    pass


def test_all_is_restored_after_an_exception():
    def explode(record):
        if record["epoch"] == 3:
            raise Boom

    model = odd_model()
    before = as_found(model)
    with pytest.raises(Boom):
        marglik_training(model, blobs(), **QUICK, optimizer_kwargs=SGD, on_epoch=explode)
    assert_as_found(model, before)


@pytest.mark.parametrize("structure", ["ekfac", "lowrank"])
def test_structures_of_several_passes_are_tuned(structure):
    """Also on a part of the batches, which is the same in each pass of a loader that does not shuffle."""
    x, y = blobs().dataset.tensors
    loader = TensorLoader(x, y, batch_size=16)
    options = {"hessian_structure": structure, "curvature": "ggn", "fit_fraction": 0.5, "optimizer_kwargs": SGD}
    result = marglik_training(mlp(), loader, **QUICK | options)
    assert result.la.hessian_structure == structure
    assert result.margliks[-1] > result.margliks[0]
    assert len(result.margliks) == 3


def conv_run(**options):
    """A convolutional network, in which K-FAC-reduce is not exact, on a few images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
    x = torch.randn(30, 1, 6, 6, dtype=torch.float64)
    data = [(x[:15], torch.arange(15) % 3), (x[15:], torch.arange(15) % 3)]
    return marglik_training(model, data, **{**QUICK, **options}, optimizer_kwargs=SGD)


def test_the_posterior_that_is_returned_has_an_approximation_and_priors_of_its_own():
    result = conv_run()
    assert result.la.H["0.weight"].approx == "expand"  # the tuning took reduce
    best = result.la.optimal_prior_precision("layerwise")
    torch.testing.assert_close(result.la.prior_precision, best)
    tuned = torch.tensor(list(result.prior_precision.values()), dtype=torch.float64)
    assert not torch.allclose(tuned, best, rtol=0.01)
    same = conv_run(final_kfac_approx="reduce")  # the training is the same, and so are the weights
    assert same.la.H["0.weight"].approx == "reduce"
    assert torch.equal(same.la.mean, result.la.mean)
    assert same.margliks == result.margliks
    torch.testing.assert_close(same.la.prior_precision, tuned)
    mapped = conv_run(final_kfac_approx={"0.*": "reduce"})
    assert mapped.la.H["0.weight"].approx == "reduce"


@pytest.mark.filterwarnings("ignore:max_factor_dim")
def test_wide_factors_are_diagonal_in_the_tuning_and_in_what_is_returned(monkeypatch):
    seen = []
    fit = KronLaplace.fit
    monkeypatch.setattr(KronLaplace, "fit", lambda la, *args, **kw: (fit(la, *args, **kw), seen.append(la.H))[0])
    result = marglik_training(mlp(), blobs(), **QUICK, optimizer_kwargs=SGD, max_factor_dim=4)
    assert len(seen) > 1
    assert all(H.diagonal_factors == {"0.weight": ("B",), "0.bias": ("B",), "2.weight": ("A",)} for H in seen)
    assert result.la.options["max_factor_dim"] == 4
    with pytest.raises(ValueError, match="max_factor_dim is for hessian_structure='kron' and 'ekfac', not 'diag'"):
        marglik_training(mlp(), blobs(), **QUICK, hessian_structure="diag", max_factor_dim=4)


def test_priors_stay_where_nothing_is_shared_or_nothing_is_tuned():
    result = marglik_training(mlp(), blobs(), **QUICK, optimizer_kwargs=SGD)
    tuned = torch.tensor(list(result.prior_precision.values()), dtype=torch.float64)
    torch.testing.assert_close(result.la.prior_precision, tuned)  # the two approximations are one
    fixed = conv_run(n_hypersteps=0, prior_prec_init=0.7)
    assert fixed.la.H["0.weight"].approx == "expand"
    torch.testing.assert_close(fixed.la.prior_precision, torch.full_like(fixed.la.prior_precision, 0.7))


def test_tokens_are_tuned_by_expand():
    def margliks(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        data = [(torch.randn(10, 2, 3, dtype=torch.float64), torch.arange(20).reshape(10, 2) % 3)]
        return marglik_training(model, data, **QUICK, optimizer_kwargs=SGD, **options).margliks

    assert margliks() == margliks(kfac_approx="expand") != margliks(kfac_approx="reduce")
