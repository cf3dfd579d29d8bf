"""How training refuses bad input, and what it leaves when it fails."""

from __future__ import annotations

import pickle

import pytest
import torch
from marglik.runs import (
    QUICK,
    SGD,
    Distances,
    Never,
    Poisoned,
    as_found,
    assert_as_found,
    assert_equal_states,
    blobs,
    mlp,
    norm_net,
    state_of,
)

from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.marglik import (
    Schedule,
    TrainingDiverged,
    marglik_training,
)
from laplace_ws.posterior import Laplace as KronLaplace


def test_divergence_names_the_epoch_and_keeps_the_last_good_state(tmp_path):
    def watch(record):
        states.append({k: v.clone() for k, v in model.state_dict().items()})

    states: list[dict] = []
    model, before = mlp(), None
    loader = Poisoned(*blobs().dataset.tensors, batch_size=16)
    loader.from_pass = 5  # passes 1, 2: epochs; 3: the fit after epoch 2; 4: epoch 3; 5: epoch 4
    before = as_found(model)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(
        TrainingDiverged, match=r"loss became nan in epoch 4.*after epoch 3; go on from .*checkpoint\.pt' at a lower"
    ) as e:
        marglik_training(model, loader, **QUICK, optimizer_kwargs=SGD, checkpoint_path=path, on_epoch=watch)
    assert e.value.epoch == 4
    assert e.value.checkpoint_path == path
    assert path.exists()
    assert len(states) == 3
    assert all(torch.equal(states[-1][k], v) for k, v in model.state_dict().items())
    assert_as_found(model, before)


def test_divergence_in_the_first_epoch_gives_the_start_back():
    model = mlp()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    loader = Poisoned(*blobs().dataset.tensors, batch_size=16)
    loader.from_pass = 1
    with pytest.raises(TrainingDiverged, match="in epoch 1"):
        marglik_training(model, loader, **QUICK, optimizer_kwargs=SGD)
    assert all(torch.equal(start[k], v) for k, v in model.state_dict().items())


def test_divergence_restores_the_buffers_too():
    states = []
    model = norm_net()
    loader = Poisoned(*blobs().dataset.tensors, batch_size=16)
    loader.from_pass = 5  # epoch 4
    with pytest.raises(TrainingDiverged, match="in epoch 4"):
        marglik_training(
            model, loader, **QUICK, optimizer_kwargs=SGD, on_epoch=lambda _: states.append(state_of(model))
        )
    assert len(states) == 3
    assert_equal_states(model.state_dict(), states[-1])


@pytest.mark.parametrize("method", ["fit", "log_marginal_likelihood"])
def test_a_failed_factorisation_is_a_divergence(monkeypatch, method, tmp_path):
    real, states, model = getattr(KronLaplace, method), [], norm_net()

    def failing(self, *args, **kwargs):
        if len(states) >= 3:  # the tuning after epoch 4
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(KronLaplace, method, failing)
    with pytest.raises(TrainingDiverged, match=r"failed to converge\) in epoch 4"):
        marglik_training(
            model, blobs(), **QUICK, optimizer_kwargs=SGD, on_epoch=lambda _: states.append(state_of(model))
        )
    assert_equal_states(model.state_dict(), states[-1])


def test_weights_that_overflow_in_the_last_step_of_an_epoch_are_no_good_state():
    model = mlp(4, 3)
    loader = [(torch.randn(8, 4).double(), torch.arange(8) % 3)]
    with pytest.raises(TrainingDiverged, match=r"regulariser became (inf|nan) in epoch 1"):
        marglik_training(model, loader, **QUICK | {"n_hypersteps": 0}, optimizer_kwargs={"lr": 1e200})
    assert all(v.abs().max() < 10 for v in model.state_dict().values())


def test_divergence_survives_a_process_border():
    error = pickle.loads(pickle.dumps(TrainingDiverged("the training loss became nan", 3, None)))
    assert error.epoch == 3
    assert "in epoch 3" in str(error)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"loader": []}, InvalidBatchError, "gives no batch"),
        ({"loader": [(torch.randn(2, 4).double(),)]}, InvalidBatchError, "must give pairs"),
        ({"loader": [(torch.randn(2, 4).double(), torch.tensor([0, 3]))]}, InvalidBatchError, "0 … 2"),
        ({"loader": [(torch.randn(2, 4).double(), torch.tensor([0, 1])), (torch.randn(1, 4).double(), torch.tensor([7]))]},
         InvalidBatchError, "7"),
        ({"loader": [({"a": torch.randn(2, 4)}, torch.tensor([0, 1]))]}, InvalidBatchError, r"Sequential is called as model\(dict\)"),
        ({"loader": [((torch.randn(2, 4),), torch.tensor([0, 1]))]}, InvalidBatchError, r"Sequential is called as model\(tuple\)"),
        ({"loader": [*blobs(), (torch.randn(2, 4).double(), [0, 1])]}, InvalidBatchError, "y of batch 4 is a list"),
        ({"likelihood": "regression"}, InvalidBatchError, "regression"),
        ({"model": mlp().to("meta")}, InvalidBatchError, "meta"),
        ({"model": mlp().requires_grad_(False)}, UnsupportedParameterError, "requires_grad_"),
        ({"model": Distances().double()}, UnsupportedParameterError, "'centres' is used by cdist"),
        ({"optimizer_kwargs": {"lr": 0.1, "weight_decay": 1e-4}}, ValueError, "weight_decay"),
        ({"prior_structure": "weight"}, ValueError, "diag"),
        ({"prior_structure": "layers"}, ValueError, "layerwise"),
        ({"hessian_structure": "diag", "kfac_approx": "reduce"}, ValueError, "kron"),
        ({"prior_prec_init": -1.0}, ValueError, "positive"),
        ({"n_epochs_burnin": 7}, ValueError, "n_epochs_burnin=7"),
        ({"fit_fraction": 0.0}, ValueError, "fit_fraction"),
        ({"prior_prec_init": 3001.0}, ValueError, r"starts at 3e\+03, above its limit of 3e\+03.*lower prior_prec_init"),
        ({"prior_prec_init": 1501.0, "temperature_init": 2.0}, ValueError, r"above its limit of 1\.5e\+03"),
        ({"prior_prec_init": 1e9, "optimizer_kwargs": {"lr": 1e-9}}, ValueError, r"above its limit of 1e\+08"),
        ({"optimizer_cls": torch.optim.LBFGS, "optimizer_kwargs": {}}, ValueError, "LBFGS cannot step without a closure"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_training(change, error, says):
    options = {"model": mlp(), "loader": blobs(), "optimizer_cls": Never, "optimizer_kwargs": SGD, **QUICK} | change
    model, loader = options.pop("model"), options.pop("loader")
    with pytest.raises(error, match=says):
        marglik_training(model, loader, **options)


def test_prior_precisions_may_start_at_the_limit_and_beyond_it_when_nothing_is_tuned():
    for options in ({"prior_prec_init": 3000.0}, {"prior_prec_init": 3001.0, "n_hypersteps": 0}):
        with pytest.raises(AssertionError, match="training began"):
            marglik_training(mlp(), blobs(), optimizer_cls=Never, optimizer_kwargs=SGD, **QUICK | options)


def test_rounds_of_the_schedule():
    schedule = Schedule(n_epochs=12, n_epochs_burnin=4, marglik_frequency=3, n_hypersteps=1)
    assert [epoch for epoch in range(1, 13) if schedule.tunes(epoch)] == [4, 7, 10, 12]
