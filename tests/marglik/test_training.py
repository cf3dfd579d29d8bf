"""Online training: what it reaches, what it leaves alone, and how it fails."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ws.data import TensorLoader
from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.likelihoods import Gaussian
from laplace_ws.marglik import (
    CheckpointError,
    MarglikResult,
    Schedule,
    TemperatureWarning,
    TrainingDiverged,
    marglik_training,
)
from laplace_ws.marglik.checkpoint import load_checkpoint, save_checkpoint
from laplace_ws.marglik.trainer import n_correct
from laplace_ws.posterior import KronLaplace

QUICK = {"n_epochs": 6, "n_epochs_burnin": 2, "marglik_frequency": 2, "n_hypersteps": 5, "progress_bar": False}
SGD = {"lr": 0.02, "momentum": 0.9}


def noisy_sine(n: int = 160, sigma: float = 0.2, batch_size: int = 40) -> TensorLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 6 - 3
    y = torch.sin(x) + sigma * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return TensorLoader(x, y, batch_size=batch_size, shuffle=True, seed=3)


def blobs(n: int = 60, batch_size: int = 16) -> TensorLoader:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64) + 2 * nn.functional.one_hot(y, 4)
    return TensorLoader(x, y, batch_size=batch_size, shuffle=True, seed=3)


def mlp(n_in: int = 4, n_out: int = 3, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_in, width), nn.Tanh(), nn.Linear(width, n_out)).double()


class Poisoned(TensorLoader):
    """Gives NaN inputs from one pass on; the pass that checks the data counts as pass 0."""

    from_pass = 0

    def __iter__(self):
        self.n_passes = getattr(self, "n_passes", -1) + 1
        for x, y in super().__iter__():
            yield (x * math.nan if self.n_passes >= self.from_pass else x), y


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
        n_hypersteps=20,
        **options,
    )
    fixed = marglik_training(mlp(1, 1, 16), noisy_sine(), "regression", n_hypersteps=0, **options)
    assert tuned.la.log_marginal_likelihood() > fixed.la.log_marginal_likelihood() + 50
    assert tuned.la.sigma_noise.item() == pytest.approx(0.2, rel=0.2)
    assert fixed.la.sigma_noise.item() == 1.0
    assert tuned.margliks[-1] > tuned.margliks[0] + 20


def test_result_unpacks_into_four_and_holds_the_best():
    model = mlp()
    result = marglik_training(model, blobs(), **QUICK, optimizer_kwargs=SGD, curvature="ggn")
    la, returned, margliks, losses = result
    assert isinstance(result, MarglikResult)
    assert returned is model
    assert len(losses) == 6
    assert len(margliks) == 3  # after epochs 2, 4 and 6
    measured = {r["epoch"]: r["log_marginal_likelihood"] for r in result.history}
    assert [epoch for epoch, value in measured.items() if value is not None] == [2, 4, 6]
    assert result.best_epoch == max((2, 4, 6), key=measured.__getitem__)
    # Model and hyperparameters are those of the best epoch, so an exact refit on all the data finds its value again.
    assert la.log_marginal_likelihood().item() == pytest.approx(max(margliks), rel=1e-5)
    assert la.n_data == 60
    assert 0 < result.curvature_seconds < result.train_seconds


def test_best_is_restored_when_later_epochs_are_worse():
    class Wrecker:
        """A schedule that makes the last steps absurdly large."""

        def __init__(self, optimizer):
            self.optimizer, self.n = optimizer, 0

        def step(self):
            self.n += 1
            self.optimizer.param_groups[0]["lr"] = 0.02 if self.n < 16 else 2.0

        def state_dict(self):
            return {}

    result = marglik_training(mlp(), blobs(), **QUICK, optimizer_kwargs=SGD, curvature="ggn", scheduler_cls=Wrecker)
    assert result.best_epoch == 4
    assert result.margliks[-1] < max(result.margliks) - 1
    assert result.la.log_marginal_likelihood().item() == pytest.approx(max(result.margliks), rel=1e-5)


def test_without_hypersteps_the_prior_stays_and_nothing_is_measured_on_the_way():
    result = marglik_training(mlp(), blobs(), **QUICK | {"n_hypersteps": 0}, prior_prec_init=2.0, optimizer_kwargs=SGD)
    assert result.margliks == []
    assert {r["log_marginal_likelihood"] for r in result.history} == {None}
    assert list(result.prior_precision.values()) == pytest.approx([2.0] * 4)
    assert math.isfinite(result.la.log_marginal_likelihood().item())


def test_tuning_does_not_change_the_order_of_batches():
    """With steps too small to matter, tuned and plain training see the same batches, so the same losses."""
    runs = [
        marglik_training(mlp(), blobs(), **QUICK | {"n_hypersteps": k}, lr_hyp=1e-12, optimizer_kwargs=SGD)
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
            mlp(), blobs(n=64), **QUICK, optimizer_kwargs=SGD, fit_fraction=fraction, curvature="ggn"
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


def as_found(model: nn.Module) -> tuple:
    modes = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return modes, grads, torch.get_rng_state(), [p.requires_grad for p in model.parameters()]


def assert_as_found(model: nn.Module, before: tuple) -> None:
    modes, grads, rng, requires_grad = as_found(model)
    assert modes == before[0]
    for got, want in zip(grads, before[1], strict=True):
        assert (got is None and want is None) or torch.equal(got, want)
    assert torch.equal(rng, before[2])
    assert requires_grad == before[3]


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


# ------------------------------------------------------------------ how it fails


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
        TrainingDiverged, match=r"loss became nan in epoch 4.*after epoch 3.*checkpoint\.pt' is kept"
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


def test_weights_that_overflow_in_the_last_step_of_an_epoch_are_no_good_state():
    model = mlp(4, 3)
    loader = [(torch.randn(8, 4).double(), torch.arange(8) % 3)]
    with pytest.raises(TrainingDiverged, match=r"regulariser became (inf|nan) in epoch 1"):
        marglik_training(model, loader, **QUICK, optimizer_kwargs={"lr": 1e200})
    assert all(v.abs().max() < 10 for v in model.state_dict().values())


def test_divergence_survives_a_process_border():
    error = pickle.loads(pickle.dumps(TrainingDiverged("the training loss became nan", 3, None)))
    assert error.epoch == 3
    assert "in epoch 3" in str(error)


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, None])[0][:, 0]


class Never(torch.optim.SGD):
    """Proves that no step was taken."""

    def step(self, closure=None):
        raise AssertionError("training began")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"loader": []}, InvalidBatchError, "gives no batch"),
        ({"loader": [(torch.randn(2, 4).double(),)]}, InvalidBatchError, "must give pairs"),
        ({"loader": [(torch.randn(2, 4).double(), torch.tensor([0, 3]))]}, InvalidBatchError, "0 … 2"),
        ({"loader": [(torch.randn(2, 4).double(), torch.tensor([0, 1])), (torch.randn(1, 4).double(), torch.tensor([7]))]},
         InvalidBatchError, "7"),
        ({"likelihood": "regression"}, InvalidBatchError, "regression"),
        ({"model": mlp().to("meta")}, InvalidBatchError, "meta"),
        ({"model": mlp().requires_grad_(False)}, UnsupportedParameterError, "requires_grad_"),
        ({"model": Lstm().double()}, UnsupportedParameterError, "lstm.weight"),
        ({"optimizer_kwargs": {"lr": 0.1, "weight_decay": 1e-4}}, ValueError, "weight_decay"),
        ({"prior_structure": "weight"}, ValueError, "diag"),
        ({"prior_structure": "layers"}, ValueError, "layerwise"),
        ({"hessian_structure": "diag", "kfac_approx": "reduce"}, ValueError, "kron"),
        ({"prior_prec_init": -1.0}, ValueError, "positive"),
        ({"n_epochs_burnin": 7}, ValueError, "n_epochs_burnin=7"),
        ({"fit_fraction": 0.0}, ValueError, "fit_fraction"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_training(change, error, says):
    options = {"model": mlp(), "loader": blobs(), "optimizer_cls": Never, "optimizer_kwargs": SGD, **QUICK} | change
    model, loader = options.pop("model"), options.pop("loader")
    with pytest.raises(error, match=says):
        marglik_training(model, loader, **options)


def test_rounds_of_the_schedule():
    schedule = Schedule(n_epochs=12, n_epochs_burnin=4, marglik_frequency=3, n_hypersteps=1)
    assert [epoch for epoch in range(1, 13) if schedule.tunes(epoch)] == [4, 7, 10, 12]


# ------------------------------------------------------------------ going on


class Stop(Exception):
    pass


def stop_after(epoch: int):
    def on_epoch(record):
        if record["epoch"] == epoch:
            raise Stop

    return on_epoch


def long_run(path, loader=None, **options):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)).double()
    torch.manual_seed(0)
    for layer in (model[0], model[3]):
        layer.reset_parameters()
    torch.manual_seed(7)
    options = {"optimizer_kwargs": SGD, "fit_fraction": 0.5, "checkpoint_path": path} | QUICK | options
    return marglik_training(model, blobs() if loader is None else loader, **options)


def without_times(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


@pytest.mark.parametrize("stop", [3, 5])
@pytest.mark.parametrize("kind", ["tensor loader", "data loader", "data loader with a generator"])
def test_resumed_equals_uninterrupted(tmp_path, stop, kind):
    def loader():
        if kind == "tensor loader":
            return blobs()
        generator = torch.Generator().manual_seed(5) if "generator" in kind else None
        return DataLoader(TensorDataset(*blobs().dataset.tensors), batch_size=16, shuffle=True, generator=generator)

    whole = long_run(tmp_path / "whole.pt", loader())
    with pytest.raises(Stop):
        long_run(tmp_path / "part.pt", loader(), on_epoch=stop_after(stop))
    torch.rand(3)  # the state of the process must not matter
    resumed_epochs = []
    resumed = long_run(
        tmp_path / "part.pt", loader(), resume=True, on_epoch=lambda record: resumed_epochs.append(record["epoch"])
    )
    assert resumed_epochs[0] == 2 * ((stop - 1) // 2) + 1  # from the checkpoint, not from the start
    assert resumed.losses == whole.losses
    assert resumed.margliks == whole.margliks
    assert without_times(resumed.history) == without_times(whole.history)
    assert resumed.best_epoch == whole.best_epoch
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert resumed.la.log_marginal_likelihood().item() == whole.la.log_marginal_likelihood().item()


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = long_run(tmp_path / "c.pt")
    again = long_run(tmp_path / "c.pt", resume=True, optimizer_cls=type("SGD", (Never,), {}))
    assert again.losses == first.losses
    assert again.la.log_marginal_likelihood().item() == first.la.log_marginal_likelihood().item()


def test_checkpoint_of_another_run_is_refused(tmp_path):
    long_run(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="n_epochs was 6 and is 8"):
        long_run(tmp_path / "c.pt", resume=True, n_epochs=8)


@pytest.mark.parametrize("content", [b"", b"nonsense", json.dumps({"format_version": 1}).encode()])
def test_damaged_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"c\.pt"):
        long_run(tmp_path / "c.pt", resume=True)


class Spy:
    ran = False

    def __reduce__(self):
        return (setattr, (Spy, "ran", True))


def test_checkpoint_cannot_run_code(tmp_path):
    torch.save({"format_version": 1, "settings": Spy()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        long_run(tmp_path / "c.pt", resume=True)
    assert not Spy.ran


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"value": 1})

    def half(obj, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"value": 2})
    assert load_checkpoint(path)["value"] == 1


def test_no_bar_without_a_terminal(capsys):
    marglik_training(mlp(), blobs(), **QUICK | {"progress_bar": True}, optimizer_kwargs=SGD)
    assert capsys.readouterr().err == ""


def test_trainer_state_holds_tensors_and_plain_values_only(tmp_path, monkeypatch):
    """The checkpoint loads without running code; this would fail for any object of a class of ours."""
    saved = {}
    monkeypatch.setattr("laplace_ws.marglik.trainer.save_checkpoint", lambda path, state: saved.update(state))
    long_run(tmp_path / "c.pt")
    assert {"model", "optimizer", "scheduler", "hyper", "loader", "generators", "rng"} <= set(saved)
    torch.save(saved, tmp_path / "direct.pt")
    assert torch.load(tmp_path / "direct.pt", weights_only=True)["progress"]["epoch"] == 6
