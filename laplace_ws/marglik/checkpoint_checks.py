"""Whether the state that a checkpoint holds is that of a training, and fits the run that is to go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ws import saved
from laplace_ws.files import FileFormatError
from laplace_ws.marglik.budget import TuningCost

_OF_WEIGHTS = {
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),
    *("square_avg", "grad_avg", "acc_delta", "sum", "prev", "ax"),
}
"""Entries of torch's optimisers with one number per weight."""


def check_fields(state: Mapping[str, Any]) -> None:
    """Check that a state has all fields of a training, each of its type.

    Raises:
        FileFormatError: it has not.
    """
    if "averaged_curvature" in state:
        saved.entry(state, "averaged_curvature", Mapping, None)
    for name in ("settings", "progress", "model", "optimizer", "scheduler", "hyper", "loader", "rng"):
        saved.entry(state, name, Mapping)
    for generator in [*saved.entry(state, "generators", list), *state["rng"].values()]:
        if not (isinstance(generator, Tensor) and generator.dtype == torch.uint8 and generator.ndim == 1):
            raise FileFormatError("the saved state of a random number generator is damaged.")
    _check_generator(saved.entry(state["rng"], "cpu", Tensor, of=" of 'rng'"))
    of, progress = " of 'progress'", state["progress"]
    epoch = saved.whole_number(progress, "epoch", 0, of)
    for name in ("losses", "margliks"):
        values = saved.entry(progress, name, list, of=of)
        if not all(type(value) is float for value in values):
            raise FileFormatError(f"the saved {name!r}{of} are not all numbers.")
    history = saved.entry(progress, "history", list, of=of)
    if not all(isinstance(record, Mapping) for record in history):
        raise FileFormatError(f"the saved 'history'{of} is not one dictionary per epoch.")
    if not epoch == len(history) == len(progress["losses"]):
        raise FileFormatError(f"the saved state is damaged: it is of epoch {epoch} and has records of {len(history)}.")
    for name in ("train_seconds", "curvature_seconds"):
        saved.number(progress, name, of=of)
    # Checkpoints from before there were budgets have none.
    if "tuning_cost" in progress and (cost := saved.entry(progress, "tuning_cost", Mapping, None, of=of)) is not None:
        for field in fields(TuningCost):
            saved.number(cost, field.name, of=" of 'tuning_cost'")
    _check_hyper(state["hyper"])
    if (best := saved.entry(progress, "best", Mapping, None, of=of)) is not None:
        saved.whole_number(best, "epoch", 1, " of 'best'")
        saved.number(best, "log_marginal_likelihood", of=" of 'best'")
        saved.entry(best, "model", Mapping, of=" of 'best'")
        _check_hyper(saved.entry(best, "hyper", Mapping, of=" of 'best'"))


def check_fits(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    hyper_optimizer: torch.optim.Optimizer | None,
    n_epochs: int,
) -> None:
    """Check that a state, which has all fields, can be that of a run.

    Args:
        state: as `check_fields` accepts it.
        own: that of the run before it goes on.
        model: of the run.
        optimizer: of its weights.
        hyper_optimizer: of its hyperparameters, where they have one with a state.
        n_epochs: how many epochs it takes.

    Raises:
        FileFormatError: it cannot.
    """
    if state["progress"]["epoch"] > n_epochs:
        raise FileFormatError(f"the saved state is of epoch {state['progress']['epoch']} of {n_epochs}.")
    weights = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for part in (state, state["progress"]["best"]):
        if part is not None:
            _check_module(part["model"], own["model"], weights)
            _check_module(part["hyper"], own["hyper"], own["hyper"].keys())
            tuning = saved.entry(part["hyper"], "_extra_state", Mapping)
            saved.entry(tuning, "reported", list)
            if hyper_optimizer is not None:
                _check_optimizer(saved.entry(tuning, "adam", Mapping), hyper_optimizer)
    _check_optimizer(state["optimizer"], optimizer)
    for name, value in own["scheduler"].items():
        kinds = (int, float) if type(value) in (int, float) else (None if value is None else type(value),)
        if not name.startswith("_"):  # those are torch's own, and differ between versions
            saved.entry(state["scheduler"], name, *kinds, of=" of the scheduler")
    if state["loader"].keys() != own["loader"].keys():
        raise FileFormatError("the saved state is that of another kind of loader.")
    if [g.shape for g in state["generators"]] != [g.shape for g in own["generators"]]:
        raise FileFormatError("the saved state has other random number generators.")


def _check_generator(state: Tensor) -> None:
    try:
        torch.Generator().set_state(state)
    except RuntimeError as error:
        raise FileFormatError("the saved state of a random number generator is damaged.") from error


def _check_hyper(state: Mapping[str, Any]) -> None:
    of = " of the hyperparameters"
    for name in ("log_prior_precision", "log_sigma_noise", "log_temperature"):
        saved.floats(saved.entry(state, name, Tensor, of=of), name)


def _check_module(state: Mapping[str, Any], own: Mapping[str, Any], finite: Any) -> None:
    """Check names, shapes and dtypes of a module's state, and that those of `finite` are; a buffer may hold infinities."""
    for name in dict.fromkeys([*own, *state]):
        if name not in state or name not in own:
            raise FileFormatError(
                f"the saved state {'lacks' if name in own else 'has'} {name!r}, other than this model."
            )
        value, like = state[name], own[name]
        if not isinstance(like, Tensor):
            continue
        if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise FileFormatError(f"the saved {name!r} is {found} in place of {like.dtype} {list(like.shape)}.")
        if name in finite and value.is_floating_point():
            saved.floats(value, repr(name))


def _check_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Check groups and sizes of an optimiser's state; what only it can understand is left to it."""
    of = " of the optimizer"
    groups, entries = saved.entry(state, "param_groups", list, of=of), saved.entry(state, "state", Mapping, of=of)
    own = [len(group["params"]) for group in optimizer.param_groups]
    found = [len(saved.entry(group, "params", list, of=of)) for group in groups]
    if own != found:
        raise FileFormatError(f"the saved optimizer is one of {found} parameters in place of {own}.")
    for group in groups:
        saved.entry(group, "lr", int, float, Tensor, of=of)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for place, entry in entries.items():
        if type(place) is not int or not 0 <= place < len(parameters) or not isinstance(entry, Mapping):
            raise FileFormatError(f"the saved state is damaged: the optimizer has no parameter {place!r}.")
        for name in _OF_WEIGHTS & entry.keys():
            value, shape = entry[name], parameters[place].shape
            if value is not None and not (
                isinstance(value, Tensor) and value.shape == shape and not value.isnan().any()
            ):
                raise FileFormatError(f"the saved {name!r}{of} is not a number for each weight of shape {list(shape)}.")
