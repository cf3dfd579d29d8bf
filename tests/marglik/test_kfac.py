"""Online training by K-FAC."""

import copy

import pytest
import torch
from marglik.runs import QUICK, blobs, mlp, noisy_sine
from marglik.test_checkpoint import Stop, stop_after
from torch import nn

from laplace_ws import marglik_training
from laplace_ws.data import TensorLoader
from laplace_ws.optim import KFAC

OPTIONS = {
    "optimizer_cls": KFAC,
    "optimizer_kwargs": {"lr": 0.01, "factor_update_steps": 2, "inv_update_steps": 3, "start_steps": 2},
}


def train(**options):
    torch.manual_seed(0)
    return marglik_training(mlp(), blobs(), **QUICK | OPTIONS | options)


def test_kfac_trains_and_the_hyperparameters_are_tuned():
    result = train()
    assert result.losses[-1] < result.losses[0]
    assert len(result.margliks) > 0
    assert not any(module._forward_pre_hooks for module in result.model.modules())  # nothing is recorded any more


def test_resumed_equals_uninterrupted(tmp_path):
    path = tmp_path / "c.pt"
    whole = train()
    with pytest.raises(Stop):
        train(checkpoint_path=path, on_epoch=stop_after(3))
    resumed = train(checkpoint_path=path, resume=True)
    assert resumed.losses == whole.losses
    assert resumed.margliks == whole.margliks


def one_batch(regression=False):
    """The same data as one batch, so that the average over the steps of frozen weights is the curvature of the data."""
    loader = noisy_sine(n=48, batch_size=48) if regression else blobs(n=48, batch_size=48)
    return TensorLoader(*loader.dataset.tensors, batch_size=48)


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_at_fixed_weights_the_averages_tune_as_fits_do(regression, approx):
    model = mlp(1, 1) if regression else mlp()
    likelihood = "regression" if regression else "classification"
    options = {
        **QUICK, "optimizer_cls": KFAC, "optimizer_kwargs": {"lr": 0.0, "kfac_approx": approx}, "curvature": "ef", "kfac_approx": approx,
        "sigma_noise_init": 0.4 if regression else None,
    }  # fmt: skip
    results = [
        marglik_training(copy.deepcopy(model), one_batch(regression), likelihood, refit=refit, **options)
        for refit in (False, True)
    ]
    assert results[0].margliks == pytest.approx(results[1].margliks, rel=1e-9)
    assert results[0].prior_precision == pytest.approx(results[1].prior_precision, rel=1e-6)
    tuned = [
        [r["fit_batches"] for r in result.history if r["log_marginal_likelihood"] is not None] for result in results
    ]
    assert tuned == [[0] * len(results[0].margliks), [1] * len(results[1].margliks)]


def test_weights_without_factors_are_tuned_by_fits():
    results = []
    for refit in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
        results.append(marglik_training(model, blobs(), **QUICK | OPTIONS, refit=refit))
    assert [r["fit_batches"] for r in results[0].history] == [r["fit_batches"] for r in results[1].history]
    assert results[0].losses == results[1].losses


def test_weight_decay_is_refused():
    with pytest.raises(ValueError, match=r"KFAC has weight_decay=0\.1, but the prior is the weight decay"):
        train(optimizer_kwargs={"weight_decay": 0.1})
