"""Accumulated, limited and scaled gradients in training."""

from __future__ import annotations

import math

import pytest
import torch
from marglik.runs import QUICK, SGD, blobs, mlp, noisy_sine
from marglik.test_checkpoint import Stop, long_run, stop_after
from torch import nn

from laplace_ws.experiment.config import MarglikConfig, RunConfig
from laplace_ws.experiment.folder import Task
from laplace_ws.experiment.training import training_options
from laplace_ws.marglik import CheckpointError, Schedule, TrainingOptions, marglik_training, neg_log_joint_mean, prepare


def train(model=None, loader=None, likelihood="classification", **options):
    options = QUICK | {"optimizer_kwargs": SGD, "curvature": "ggn"} | options
    return marglik_training(mlp() if model is None else model, loader or blobs(), likelihood, **options)


def weights(result) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


def scaler(**options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **options)


class Spy(torch.optim.SGD):
    """Keeps the norm of the gradient of each step."""

    norms: list[float]

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        type(self).norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        return super().step(closure)


@pytest.fixture
def spy() -> type[Spy]:
    return type("SGD", (Spy,), {"norms": []})


# ------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("structure", ["layerwise", "weight"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_batches_that_are_accumulated_are_one_batch(k, structure):
    """60 examples in batches of 8 and a last one of 4: the last group is ragged, in batches or in examples, for each k."""
    options = {"hessian_structure": "diag", "prior_structure": structure}
    small = train(loader=blobs(batch_size=8), gradient_accumulation_steps=k, **options)
    large = train(loader=blobs(batch_size=8 * k), **options)
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-10, atol=1e-12)
    assert small.margliks == pytest.approx(large.margliks, rel=1e-10)
    assert [r["lr"] for r in small.history] == [r["lr"] for r in large.history]
    assert weights(small).sub(weights(train(loader=blobs(batch_size=8), **options))).abs().max() > 1e-3


def test_noise_and_the_prior_are_in_each_step_once():
    small = train(mlp(1, 1), noisy_sine(batch_size=10), "regression", gradient_accumulation_steps=4)
    large = train(mlp(1, 1), noisy_sine(batch_size=40), "regression")
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-9, atol=1e-11)


def test_the_scheduler_steps_with_the_optimizer(spy):
    loader = blobs(batch_size=8)  # 8 batches: steps on 3, 3 and 2 of them
    trainer = prepare(
        mlp(),
        loader,
        "classification",
        Schedule(n_epochs=2, n_epochs_burnin=0),
        TrainingOptions(optimizer_cls=spy, optimizer_kwargs=SGD, gradient_accumulation_steps=3),
        progress_bar=False,
    )
    trainer.run()
    assert len(spy.norms) == trainer.scheduler.last_epoch == trainer.scheduler.T_max == 6
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0)


# ------------------------------------------------------------------ limited norms


@pytest.mark.parametrize("with_scaler", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("limit", [0.05, 1e3])
def test_the_norm_is_that_of_the_objective_per_example(spy, limit, k, with_scaler):
    model, loader = mlp(), blobs(batch_size=60 // k)
    (x, y), parameters = loader.dataset.tensors, list(model.parameters())
    loss = nn.functional.cross_entropy(model(x), y)
    objective = neg_log_joint_mean(loss, parameters, [torch.tensor(3.0)] * 4, 60)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(objective, parameters)])
    before = torch.cat([p.detach().flatten() for p in parameters])
    train(
        model,
        loader,
        optimizer_cls=spy,
        optimizer_kwargs={"lr": 0.1},
        n_epochs=1,
        n_epochs_burnin=0,
        n_hypersteps=0,
        prior_structure="scalar",
        prior_prec_init=3.0,
        max_grad_norm=limit,
        gradient_accumulation_steps=k,
        grad_scaler=scaler() if with_scaler else None,
    )
    norm = gradient.norm().item()
    assert 0.05 < norm < 1e3
    assert spy.norms == pytest.approx([min(norm, limit)], rel=1e-4)
    step = torch.cat([p.detach().flatten() for p in parameters]) - before
    torch.testing.assert_close(step, -0.1 * gradient * min(1, limit / norm), rtol=1e-4, atol=1e-9)


# ------------------------------------------------------------------ scaled losses


def test_a_power_of_two_changes_nothing():
    plain, scaled = train(), train(grad_scaler=scaler(init_scale=2.0**12, growth_interval=3))
    assert torch.equal(weights(plain), weights(scaled))
    assert plain.margliks == scaled.margliks
    disabled = train(grad_scaler=scaler(enabled=False))
    assert torch.equal(weights(plain), weights(disabled))


def test_steps_that_overflow_are_left_out(spy):
    model = mlp().float()
    loader = [(50 * x.float(), y) for x, y in blobs(batch_size=15)]
    own = scaler(init_scale=2.0**127, backoff_factor=2.0**-8)
    trainer = prepare(
        model,
        loader,
        "classification",
        Schedule(n_epochs=3, n_epochs_burnin=0),
        TrainingOptions(optimizer_cls=spy, optimizer_kwargs=SGD, grad_scaler=own),
        progress_bar=False,
    )
    result = trainer.run()
    assert own.get_scale() < 2.0**127
    assert 0 < len(spy.norms) < 12
    assert len(spy.norms) == trainer.scheduler.last_epoch
    assert all(map(math.isfinite, result.losses))
    assert weights(result).isfinite().all()


def test_small_gradients_survive_float16(spy):
    """Under float16 a gradient of less than 6e-8 is lost, unless the loss is scaled."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp().float()

        def forward(self, x):
            return self.body(x) * 1e-8

    def steps(**options):
        spy.norms.clear()
        model = Small()
        x = torch.randn(16, 4)
        with torch.autocast(x.device.type, dtype=torch.float16):
            train(
                model,
                [(x, torch.arange(16) % 3)],
                n_epochs=1,
                n_epochs_burnin=0,
                n_hypersteps=0,
                prior_prec_init=1e-30,
                optimizer_cls=spy,
                **options,
            )
        return list(spy.norms)

    (lost,), (kept,) = steps(), steps(grad_scaler=scaler())
    assert lost < 1e-12  # what the prior gives
    assert kept > 1e-10


# ------------------------------------------------------------------ checkpoints and options

ALL = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5}


def test_resumed_equals_uninterrupted(tmp_path):
    def run(path, **options):
        # its scale grows on the way, and the steps on it are as its state says
        return long_run(path, grad_scaler=scaler(init_scale=2.0, growth_interval=2), **ALL, **options)

    whole = run(tmp_path / "whole.pt")
    with pytest.raises(Stop):
        run(tmp_path / "part.pt", on_epoch=stop_after(3))
    found = []
    own = scaler(init_scale=2.0, growth_interval=2)
    resumed = long_run(
        tmp_path / "part.pt", resume=True, grad_scaler=own, on_epoch=lambda _: found.append(own.get_scale()), **ALL
    )
    assert found[0] > 2.0**2
    assert resumed.losses == whole.losses
    assert resumed.margliks == whole.margliks
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 3 and is 2"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps was 3 and is None"),
        ({"max_grad_norm": None}, "max_grad_norm was 0.5 and is None"),
        ({"grad_scaler": None}, "grad_scaler was {.*} and is None"),
        ({"grad_scaler": scaler(growth_interval=9)}, "grad_scaler.growth_interval was 2000 and is 9"),
    ],
)
def test_other_settings_are_another_run(tmp_path, change, says):
    path = tmp_path / "c.pt"
    with pytest.raises(Stop):
        long_run(path, on_epoch=stop_after(3), grad_scaler=scaler(), **ALL)
    with pytest.raises(CheckpointError, match=says):
        long_run(path, resume=True, **({"grad_scaler": scaler()} | ALL | change))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps must be a whole number, got 1.5"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive and finite, got 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be positive and finite, got nan"),
        ({"max_grad_norm": math.inf}, "max_grad_norm must be positive and finite, got inf"),
    ],
)
def test_what_is_out_of_range_is_refused(options, says):
    with pytest.raises((TypeError, ValueError), match=says):
        train(**options)


def test_a_scaler_needs_parameters_whose_gradients_it_can_unscale():
    loader = [(x.half(), y) for x, y in blobs()]
    with pytest.raises(ValueError, match=r"grad_scaler is for float32 parameters .*, and some here are torch\.float16"):
        train(mlp().half(), loader, grad_scaler=scaler())


def test_the_command_has_the_options_too():
    config = RunConfig(marglik=MarglikConfig(**ALL))
    options = training_options(config, Task("tuned"))[1]
    assert (options.gradient_accumulation_steps, options.max_grad_norm) == (3, 0.5)
