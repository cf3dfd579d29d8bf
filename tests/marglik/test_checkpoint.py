"""Checkpoints: a resumed run equals the uninterrupted one, or is refused."""

from __future__ import annotations

import json
from collections import OrderedDict
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from marglik.runs import (
    QUICK,
    SGD,
    Never,
    blobs,
    mlp,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ws.curvature.native import NativeBackend
from laplace_ws.marglik import (
    CheckpointError,
    marglik_training,
)
from laplace_ws.marglik.checkpoint import check_settings, load_checkpoint, save_checkpoint
from laplace_ws.marglik.training import prepare


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
    adam = {"hyper_optimizer": "adam"}  # which has a state of its own
    options = (
        QUICK | adam | {"optimizer_kwargs": SGD, "fit_fraction": 0.5, "keep": "best", "checkpoint_path": path} | options
    )
    return marglik_training(model, blobs() if loader is None else loader, **options)


@pytest.fixture(scope="module")
def settings_checkpoint(tmp_path_factory) -> Path:
    """A run that stopped on the way."""
    path = tmp_path_factory.mktemp("settings") / "c.pt"
    with pytest.raises(Stop):
        long_run(path, on_epoch=stop_after(3))
    return path


class Renamed(NativeBackend):
    name = "renamed"


def without_times(history):
    return [{k: v for k, v in record.items() if not k.endswith("seconds")} for record in history]


@pytest.mark.parametrize("stop", [3, 5])
@pytest.mark.parametrize("kind", ["tensor loader", "data loader", "data loader with a generator"])
def test_resumed_equals_uninterrupted(tmp_path, stop, kind):
    def loader():
        if kind == "tensor loader":
            return blobs()
        generator = torch.Generator("cpu").manual_seed(5) if "generator" in kind else None
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kfac_approx": "expand"}, r"kfac_approx\.0\.weight was 'reduce' and is 'expand'"),
        ({"kfac_approx": {"3.bias": "expand", "*": "reduce"}}, r"\(kfac_approx\.3\.bias was 'reduce' and is 'expand'\)"),
        ({"final_kfac_approx": "reduce"}, r"final_kfac_approx\.0\.weight was 'auto' and is 'reduce'"),
        ({"prior_structure": "parameter"}, "prior_groups was"),
        ({"optimizer_kwargs": {"lr": 0.01, "momentum": 0.9}}, r"\(optimizer_kwargs\.lr was 0\.02 and is 0\.01\)"),
        ({"optimizer_kwargs": {"lr": 0.02, "momentum": 0.5}}, r"optimizer_kwargs\.momentum was 0\.9 and is 0\.5"),
        ({"optimizer_cls": torch.optim.Adam, "optimizer_kwargs": {"lr": 0.02}}, "optimizer was 'SGD' and is 'Adam'"),
        ({"scheduler_cls": None}, "scheduler was 'CosineAnnealingLR' and is 'ConstantLR'"),
        ({"scheduler_kwargs": {"eta_min": 0.01}}, r"\(scheduler_kwargs\.eta_min was None and is 0\.01\)"),
        ({"backend": Renamed()}, r"\(backend was 'native' and is 'renamed'\)"),
        ({"final_curvature": "ggn"}, r"\(final_curvature was 'ggn_mc' and is 'ggn'\)"),
        ({"mc_samples": 2}, r"\(mc_samples was 1 and is 2\)"),
        (
            {"fit_fraction": None, "keep": "last"},
            r"\(fit_fraction was 0\.5 and is None, curvature_budget was None and is 0\.1, keep was 'best' and is 'last'\)",
        ),
        ({"fit_fraction": None, "curvature_budget": None}, r"\(fit_fraction was 0\.5 and is 1\.0\)"),
        ({"lr_hyp": 0.2}, r"\(lr_hyp was 0\.1 and is 0\.2\)"),
        ({"prior_prec_init": 2.0}, r"\(starts\.prior_precision was 0\.6 and is 2\.0\)"),
    ],
)  # fmt: skip
def test_each_other_setting_is_refused_by_name(settings_checkpoint, change, says):
    with pytest.raises(CheckpointError, match=says):
        long_run(settings_checkpoint, resume=True, **change)


def test_names_of_the_groups_must_agree(tmp_path):
    """As many groups, but other parameters in them."""
    trained, named_otherwise = (
        nn.Sequential(OrderedDict({name: nn.Linear(4, 3) for name in names})).double() for names in (["a"], ["b"])
    )
    options = {**QUICK, "optimizer_kwargs": SGD, "hessian_structure": "diag", "checkpoint_path": tmp_path / "c.pt"}
    marglik_training(trained, blobs(), **options)
    with pytest.raises(CheckpointError, match=r"prior_groups was \['a\.weight'\] and is \['b\.weight'\]"):
        marglik_training(named_otherwise, blobs(), resume=True, **options)


def test_what_is_spelt_otherwise_but_equal_is_no_other_setting(settings_checkpoint):
    equal = {
        "kfac_approx": {"*": "reduce"},
        "final_kfac_approx": {"*": "auto"},
        "final_curvature": "ggn_mc",
        "scheduler_kwargs": {"T_max": 24},
    }
    assert len(long_run(settings_checkpoint, resume=True, **equal).losses) == 6


def test_a_checkpoint_from_before_there_were_budgets_is_gone_on_with(settings_checkpoint, tmp_path):
    state = load_checkpoint(settings_checkpoint)
    del state["settings"]["curvature_budget"], state["progress"]["tuning_cost"]
    save_checkpoint(tmp_path / "c.pt", state)
    assert long_run(tmp_path / "c.pt", resume=True).losses == long_run(settings_checkpoint, resume=True).losses
    with pytest.raises(CheckpointError, match=r"curvature_budget was None and is 0\.1"):
        long_run(tmp_path / "c.pt", resume=True, marglik_frequency=None)


def test_many_differences_are_counted():
    with pytest.raises(CheckpointError, match=r"a was None and is 1, .*d was None and is 1, and 2 more\)"):
        check_settings(Path("c.pt"), {}, dict.fromkeys("abcdef", 1))


def test_numbers_of_numpy_do_not_spoil_the_checkpoint(tmp_path):
    options = {
        "optimizer_kwargs": {"lr": np.float64(0.02), "momentum": np.float64(0.9)},
        "scheduler_kwargs": {"eta_min": np.float64(0.001)},
        "lr_hyp": np.float64(0.1),
        "max_log_step": np.float64(1.0),
        "prior_prec_init": np.float64(0.5),
        "n_epochs": np.int64(6),
    }

    def add(record):
        record |= {"a": np.float64(0.5), "b": [torch.tensor(2), None], "c": {"d": np.bool_(True), 3: np.str_("e")}}

    first = long_run(tmp_path / "c.pt", on_epoch=add, **options)
    again = long_run(tmp_path / "c.pt", resume=True, on_epoch=add, **options)
    assert without_times(again.history) == without_times(first.history)
    added = {key: again.history[0][key] for key in "abc"}
    assert repr(added) == "{'a': 0.5, 'b': [2, None], 'c': {'d': True, 3: 'e'}}"


class Label(str, Enum):
    A = "a"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.zeros(2), "Tensor under 'added'"),
        (np.zeros(1), "ndarray under 'added'"),
        ((1, 2), "tuple under 'added'"),
        (1j, "complex under 'added'"),
        (Label.A, "Label under 'added'"),
        ([0, {"deep": object()}], r"object under 'added\[1\]\.deep'"),
        ({(1, 2): 0}, r"key \(1, 2\) into 'added'"),
    ],
)
def test_a_record_that_no_checkpoint_can_hold_is_refused_before_it_is_saved(tmp_path, value, says):
    def add(record):
        if record["epoch"] == 4:
            record["added"] = value

    with pytest.raises(TypeError, match=says):
        long_run(tmp_path / "c.pt", on_epoch=add)
    assert load_checkpoint(tmp_path / "c.pt")["progress"]["epoch"] == 2


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


def test_without_a_terminal_there_is_a_line_for_each_epoch(capsys):
    result = marglik_training(mlp(), blobs(), **QUICK | {"progress_bar": True}, optimizer_kwargs=SGD)
    expected = [f"epoch {record['epoch']}/6, loss {record['loss']:.4f}" for record in result.history]
    for number in (1, 3, 5):  # those with a tuning
        expected[number] += f", log marginal likelihood {result.history[number]['log_marginal_likelihood']:.1f}"
    assert capsys.readouterr().err.splitlines() == expected
    marglik_training(mlp(), blobs(), **QUICK | {"progress_bar": False}, optimizer_kwargs=SGD)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_and_no_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    marglik_training(mlp(), blobs(), **QUICK | {"progress_bar": True}, optimizer_kwargs=SGD)
    said = capsys.readouterr().err
    assert "6/6" in said
    assert "epoch 1/6" not in said


def test_trainer_state_holds_tensors_and_plain_values_only(tmp_path, monkeypatch):
    """The checkpoint loads without running code; this would fail for any object of a class of ours."""
    saved = {}
    monkeypatch.setattr("laplace_ws.marglik.trainer.save_checkpoint", lambda path, state: saved.update(state))
    long_run(tmp_path / "c.pt")
    assert {"model", "optimizer", "scheduler", "hyper", "loader", "generators", "rng"} <= set(saved)
    torch.save(saved, tmp_path / "direct.pt")
    assert torch.load(tmp_path / "direct.pt", weights_only=True)["progress"]["epoch"] == 6


# ------------------------------------------------------------------ damaged checkpoints


def damaged(state, place: str, value):
    """A nested state with another value, or without one, at a place such as "progress/best"."""
    key, _, rest = place.partition("/")
    if isinstance(state, list):
        return [
            damaged(item, rest, value) if rest else value if i == int(key) else item for i, item in enumerate(state)
        ]
    key = int(key) if key.isdigit() else key
    if rest:
        return state | {key: damaged(state[key], rest, value)}
    return {k: v for k, v in state.items() if k != key} | ({} if value is MISSING else {key: value})


MISSING = object()
NAN = float("nan")
DAMAGES = [
    *((field, MISSING, f"'{field}' is missing") for field in
      ("settings", "progress", "model", "optimizer", "scheduler", "hyper", "loader", "generators", "rng")),
    *((f"progress/{field}", MISSING, f"'{field}' of 'progress' is missing") for field in
      ("epoch", "losses", "margliks", "history", "best", "train_seconds", "curvature_seconds")),
    ("model", [], "'model' is a list and not a dictionary"),
    ("progress/epoch", 1.0, "'epoch' of 'progress' is a float"),
    ("progress/epoch", 5, "it is of epoch 5 and has records of"),
    ("progress/losses", [1, "a"], "'losses' of 'progress' are not all numbers"),
    ("progress/history", [1, 2], "'history' of 'progress' is not one dictionary per epoch"),
    ("progress/train_seconds", NAN, "'train_seconds' of 'progress' is nan"),
    ("progress/tuning_cost", [], "'tuning_cost' of 'progress' is a list"),
    ("progress/tuning_cost/batch_seconds", NAN, "'batch_seconds' of 'tuning_cost' is nan"),
    ("progress/best/epoch", "a", "'epoch' of 'best' is a str"),
    ("progress/best/model", MISSING, "'model' of 'best' is missing"),
    ("progress/best/model/3.weight", torch.zeros(3, 7).double(), r"torch.float64 \[3, 7\] in place of torch.float64 \[3, 8\]"),
    ("progress/extra", 1, "does not fit this run"),
    ("model/0.weight", torch.zeros(8, 5).double(), r"'0.weight' is torch.float64 \[8, 5\] in place of torch.float64 \[8, 4\]"),
    ("model/0.weight", torch.zeros(8, 4), r"'0.weight' is torch.float32 \[8, 4\] in place of torch.float64 \[8, 4\]"),
    ("model/0.weight", torch.full((8, 4), NAN).double(), "'0.weight' holds numbers that are not finite"),
    ("model/0.weight", "text", "'0.weight' is str in place of"),
    ("model/1.running_mean", MISSING, "lacks '1.running_mean', other than this model"),
    ("model/more", torch.zeros(1), "has 'more', other than this model"),
    ("optimizer/param_groups", [], r"one of \[\] parameters in place of \[6\]"),
    ("optimizer/param_groups/0/params", [0], r"one of \[1\] parameters in place of \[6\]"),
    ("optimizer/param_groups/0/lr", MISSING, "'lr' of the optimizer is missing"),
    ("optimizer/state/0/momentum_buffer", torch.zeros(4), r"is not a number for each weight of shape \[8, 4\]"),
    ("optimizer/state/0/momentum_buffer", torch.full((8, 4), NAN), "'momentum_buffer' of the optimizer is not a number"),
    ("optimizer/state/99", {}, "the optimizer has no parameter 99"),
    ("scheduler/T_max", MISSING, "'T_max' of the scheduler is missing"),
    ("scheduler/last_epoch", "a", "'last_epoch' of the scheduler is a str"),
    ("hyper/log_prior_precision", MISSING, "'log_prior_precision' of the hyperparameters is missing"),
    ("hyper/log_prior_precision", torch.zeros(99).double(), r"'log_prior_precision' is torch.float64 \[99\] in place of"),
    ("hyper/log_temperature", torch.tensor(NAN).double(), "log_temperature holds numbers that are not finite"),
    ("hyper/_extra_state", {}, "'reported' is missing"),
    ("hyper/_extra_state/adam/state/0/exp_avg", torch.zeros(99), "'exp_avg' of the optimizer is not a number"),
    ("loader", {}, "another kind of loader"),
    ("loader/generator", torch.zeros(3, dtype=torch.uint8), "does not fit this run"),
    ("generators", [], "other random number generators"),
    ("generators/0", torch.zeros(3), "state of a random number generator is damaged"),
    ("generators/0", torch.zeros(5056, dtype=torch.uint8), "does not fit this run"),
    ("rng/cpu", torch.zeros(3, dtype=torch.uint8), "state of a random number generator is damaged"),
    ("rng/cpu", MISSING, "'cpu' of 'rng' is missing"),
]  # fmt: skip
"""A place in the state of a run, what is there instead, and what is said of it."""


@pytest.mark.parametrize(("place", "value", "says"), DAMAGES, ids=[f"{d[0]} {i}" for i, d in enumerate(DAMAGES)])
def test_a_damaged_state_is_refused_in_a_sentence_and_nothing_is_applied(
    settings_checkpoint, tmp_path, place, value, says
):
    path = tmp_path / "c.pt"
    save_checkpoint(path, damaged(load_checkpoint(settings_checkpoint), place, value))
    found = {}

    def prepared(*args, **kwargs):
        found["trainer"] = trainer = prepare(*args, **kwargs)
        found["before"] = everything(trainer)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("laplace_ws.marglik.training.prepare", prepared)
        with pytest.raises(CheckpointError, match=says) as error:
            long_run(path, resume=True)
    message = str(error.value)
    assert message.startswith(f"'{path}': ")
    assert message.endswith("; remove it to start afresh")
    assert "\n" not in message
    assert everything(found["trainer"]) == found["before"]


def everything(trainer):
    """What `resume` changes, bit for bit."""
    return plain([trainer.state_dict(), trainer.rng, trainer.la.prior_precision, trainer.la.temperature])


def plain(value):
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().cpu().numpy().tobytes()
    return repr(value)


def test_a_buffer_may_be_infinite(tmp_path):
    """Such as the mask of an attention."""
    options = {"optimizer_kwargs": SGD, "checkpoint_path": tmp_path / "c.pt", **QUICK}

    def run(**changes):
        model = mlp()
        model.register_buffer("mask", torch.full((2,), -float("inf")))
        return marglik_training(model, blobs(), **options, **changes)

    with pytest.raises(Stop):
        run(on_epoch=stop_after(3))
    assert len(run(resume=True).losses) == 6
