"""Preparing without training, and defaults that the library and the command share."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

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
    state_of,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.experiment.config import BaselinesConfig, DataConfig, MarglikConfig, ModelConfig, RunConfig
from laplace_ws.experiment.folder import ExperimentError, Task
from laplace_ws.experiment.run import run_experiment
from laplace_ws.experiment.training import training_options
from laplace_ws.marglik import Schedule, Trainer, TrainingOptions, marglik_training, prepare
from laplace_ws.marglik.optimizers import SGD_DEFAULTS

SHORT = Schedule(n_epochs=6, n_epochs_burnin=2, marglik_frequency=2, n_hypersteps=5, fit_fraction=1.0)
PLAIN = TrainingOptions(optimizer_cls=Never, optimizer_kwargs=SGD)


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"loader": []}, InvalidBatchError, "gives no batch"),
        ({"loader": [(torch.randn(2, 4).double(), torch.tensor([0, 3]))]}, InvalidBatchError, "0 … 2"),
        ({"likelihood": "regression"}, InvalidBatchError, "regression"),
        ({"model": mlp().requires_grad_(False)}, UnsupportedParameterError, "requires_grad_"),
        ({"model": Distances().double()}, UnsupportedParameterError, "'centres' is used by cdist"),
        ({"optimizer_kwargs": {"lr": 0.1, "weight_decay": 1e-4}}, ValueError, "weight_decay"),
        ({"prior_structure": "weight"}, ValueError, "diag"),
        ({"hessian_structure": "diag", "kfac_approx": "reduce"}, ValueError, "kron"),
        ({"prior_prec_init": -1.0}, ValueError, "positive"),
        ({"prior_prec_init": 3001.0}, ValueError, "above its limit"),
        ({"hyper_optimizer": "newton", "tune_temperature": True}, ValueError, "tune_temperature"),
        ({"curvature": "hessian"}, ValueError, "hessian"),
        ({"final_curvature": "hessian"}, ValueError, "hessian"),
        ({"n_epochs_burnin": 7}, ValueError, "n_epochs_burnin=7"),
    ],
)  # fmt: skip
def test_preparing_and_training_refuse_the_same_without_a_gradient_step(change, error, says):
    given = {"model": mlp(), "loader": blobs(), "likelihood": "classification"} | change
    task = [given.pop(name) for name in ("model", "loader", "likelihood")]
    start = state_of(task[0])

    def prepared():
        values = {**vars(SHORT), **vars(PLAIN), **given}
        schedule, options = (
            cls(**{f.name: values[f.name] for f in fields(cls)}) for cls in (Schedule, TrainingOptions)
        )
        prepare(*task, schedule, options)

    def trained():
        marglik_training(*task, **{**QUICK, **vars(PLAIN), **given})

    for refuses in (prepared, trained):
        with pytest.raises(error, match=says):
            refuses()
    assert_equal_states(state_of(task[0]), start)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prior_prec_init": 1e7}, "above its limit"),
        ({"kfac_approx": {"layer": "reduce"}}, "matches no parameter"),
        ({"tune_temperature": True, "hyper_optimizer": "mackay"}, "tune_temperature"),
        ({"hessian_structure": "diag", "kfac_approx": "reduce"}, "kfac_approx"),
        ({"prior_structure": "weight"}, "diag"),
        ({"n_epochs_burnin": 101}, "n_epochs_burnin=101"),
        ({"lr": 0.0}, r"marglik\.lr=0"),
    ],
)
def test_the_command_refuses_before_anything_is_written(changes, says, tmp_path):
    config = RunConfig(
        out=str(tmp_path / "runs"),
        data=DataConfig(n_train=20, n_test=10),
        model=ModelConfig("mlp", hidden=[3]),
        marglik=MarglikConfig(**changes),
    )
    with pytest.raises(ExperimentError, match=says):
        run_experiment(config)
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------ what it leaves alone


def test_preparing_leaves_the_model_the_loader_and_the_random_state_as_they_were():
    model, loader = mlp().eval(), blobs()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, start, untouched = as_found(model), state_of(model), [x for x, _ in blobs()]
    trainer = prepare(model, loader, "classification", SHORT, PLAIN)
    assert isinstance(trainer, Trainer)
    assert_as_found(model, before)
    assert_equal_states(state_of(model), start)
    assert all(torch.equal(x, y) for (x, _), y in zip(loader, untouched, strict=True))


def test_a_checkpoint_on_disk_is_no_matter_for_preparing(tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(b"nonsense")
    prepare(mlp(), blobs(), "classification", SHORT, PLAIN, checkpoint_path=path)
    assert path.read_bytes() == b"nonsense"


def test_a_prepared_run_is_the_training_whatever_happens_in_between():
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)).double()

    def loader() -> DataLoader:  # draws its order from the global generator
        return DataLoader(TensorDataset(*blobs().dataset.tensors), batch_size=16, shuffle=True)

    whole = marglik_training(network(), loader(), **QUICK, optimizer_kwargs=SGD)
    trainer = prepare(network(), loader(), "classification", SHORT, TrainingOptions(optimizer_kwargs=SGD))
    torch.manual_seed(99)
    result = trainer.run()
    assert result.losses == whole.losses
    assert result.margliks == whole.margliks
    assert_equal_states(state_of(result.model), state_of(whole.model))


def test_data_that_go_bad_after_preparing_are_a_divergence():
    """The data are checked once, by `prepare`."""
    loader = Poisoned(*blobs().dataset.tensors, batch_size=16)
    loader.from_pass = 1
    trainer = prepare(mlp(), loader, "classification", SHORT, replace(PLAIN, optimizer_cls=torch.optim.SGD))
    with pytest.raises(RuntimeError, match="loss became nan in epoch 1"):
        trainer.run()


# ------------------------------------------------------------------ defaults


def defaults(kind: type) -> dict:
    return {f.name: f.default for f in fields(kind)}


def test_the_function_has_the_options_and_the_defaults_of_the_dataclasses():
    signature = inspect.signature(marglik_training).parameters
    options = defaults(Schedule) | defaults(TrainingOptions)
    assert set(options) == set(signature) - {
        "model", "train_loader", "likelihood", "checkpoint_path", "resume", "n_data", "dict_key_x", "dict_key_y", "on_epoch",
        "progress_bar",
    }  # fmt: skip
    assert {name: signature[name].default for name in options} == options


def test_the_command_has_the_defaults_of_the_function():
    schedule, options = training_options(RunConfig(), Task("tuned"))
    assert schedule == Schedule()
    assert options == TrainingOptions(optimizer_kwargs=SGD_DEFAULTS)
    assert defaults(MarglikConfig).items() >= defaults(Schedule).items()
    assert set(defaults(MarglikConfig)) - set(defaults(Schedule)) - set(defaults(TrainingOptions)) == {
        "optimizer",
        "lr",
        "lr_min",
        "momentum",
    }


def test_the_defaults_are_those_that_the_documents_name():
    schedule = Schedule()
    assert (schedule.n_epochs, schedule.burnin, schedule.curvature_budget, schedule.n_hypersteps) == (100, 20, 0.1, 50)
    assert schedule.marglik_frequency is schedule.fit_fraction is None
    without = Schedule(curvature_budget=None).settings()
    assert (without["marglik_frequency"], without["fit_fraction"]) == (5, 1.0)


def test_the_options_of_the_command_reach_the_training():
    marglik = MarglikConfig(n_epochs=7, fit_fraction=0.5, lr_hyp=0.3, optimizer="adam", lr=0.1, tune_temperature=True)
    config = RunConfig(marglik=marglik, baselines=BaselinesConfig([3.0]))
    schedule, options = training_options(config, Task("tuned"))
    assert schedule == Schedule(n_epochs=7, fit_fraction=0.5)
    adam = TrainingOptions(optimizer_cls=torch.optim.Adam, optimizer_kwargs={"lr": 0.1}, lr_hyp=0.3)
    assert options == replace(adam, tune_temperature=True)
    schedule, options = training_options(config, Task("fixed-3", 3.0))
    assert schedule == Schedule(n_epochs=7, fit_fraction=0.5, n_hypersteps=0)
    assert options == replace(adam, prior_prec_init=3.0)
    without_momentum = RunConfig(marglik=MarglikConfig(momentum=0.0))
    assert training_options(without_momentum, Task("tuned"))[1].optimizer_kwargs == {
        "lr": SGD_DEFAULTS["lr"],
        "momentum": 0.0,
        "nesterov": False,
    }


@pytest.mark.parametrize("lr_min", [None, 1e-6])
def test_the_learning_rate_ends_at_its_minimum(lr_min):
    config = RunConfig(marglik=MarglikConfig(n_epochs=3, n_epochs_burnin=3, lr=0.1, lr_min=lr_min))
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    schedule, options = training_options(config, Task("tuned"))
    trainer = prepare(nn.Linear(4, 3), DataLoader(TensorDataset(x, y), 6), "classification", schedule, options)
    rates = [trainer.optimizer.param_groups[0]["lr"]]
    for _ in range(3 * 2):
        trainer.optimizer.step()
        trainer.scheduler.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[0] == 0.1
    assert rates[-1] == pytest.approx(lr_min or 0.0, abs=1e-15)


@pytest.mark.parametrize(("n_epochs", "burnin"), [(1, 0), (4, 0), (5, 1), (60, 12), (99, 19), (100, 20), (300, 20)])
def test_the_default_burnin_leaves_epochs_to_tune_in(n_epochs, burnin):
    schedule = Schedule(n_epochs)
    assert schedule.burnin == burnin
    assert schedule.tunes(n_epochs)
    assert schedule.settings() == Schedule(n_epochs, burnin).settings()


def test_a_short_training_needs_no_burnin_to_be_given():
    options = {"n_hypersteps": 1, "optimizer_kwargs": SGD, "curvature_budget": None, "progress_bar": False}
    result = marglik_training(mlp(), blobs(), n_epochs=4, **options)
    assert len(result.margliks) == 1
    with pytest.raises(ValueError, match="n_epochs_burnin=20 leaves none of n_epochs=4"):
        marglik_training(mlp(), blobs(), n_epochs=4, n_epochs_burnin=20)
    with pytest.raises(ValueError, match="n_epochs_burnin=-1 must be at least 0"):
        Schedule(n_epochs_burnin=-1)
