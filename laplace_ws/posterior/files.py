"""A posterior as tensors and plain values, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laplace_ws.files import FileFormatError
from laplace_ws.posterior.subset import WeightSubset

if TYPE_CHECKING:
    from laplace_ws.posterior.base import BaseLaplace

FORMAT = "laplace_ws posterior"
FORMAT_VERSION = 2
_HYPERPARAMETERS = ("prior_precision", "prior_mean", "sigma_noise", "temperature")


def posterior_state(la: BaseLaplace) -> dict[str, Any]:
    """Everything that makes a fitted posterior, but its model and its generator: format, options, parameters of the model with their
    shapes, class names, mean, curvature, sums over the data and hyperparameters.
    """
    sums = la._fitted
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "device": str(la.mean.device),
        "options": la._options(),
        "subset": {
            "parameters": {name: tuple(shape) for name, shape in la.subset.parameter_shapes.items()},
            "selection": dict(la.subset.selection),
        },
        "model_parameters": _model_parameters(la.model),
        "backend": la.backend.name,
        "dict_key_x": la.keys.x,
        "dict_key_y": la.keys.y,
        "memory_budget": la.memory_budget,
        "class_names": None if la.class_names is None else list(la.class_names),
        "n_arguments": la._n_arguments,
        "surroundings": {"names": la._surroundings[0], "fingerprint": la._surroundings[1]},
        "mean": la.mean,
        "H": sums.H.state_dict(),
        "nll_sum": sums.nll_sum,
        "n_data": sums.n_examples,
        "n_targets": sums.n_targets,
        "output_shape": list(sums.output_shape),
        **{name: getattr(la, name) for name in _HYPERPARAMETERS},
    }


def check_format(state: Any, what: str = "the state") -> None:
    """Raise `FileFormatError` unless it is a posterior of the present format."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise FileFormatError(f"{what} is no posterior as state_dict() or save() give it.")
    if state.get("format_version") != FORMAT_VERSION:
        raise FileFormatError(
            f"{what} is a posterior of format {state.get('format_version')}, and this version reads format {FORMAT_VERSION}; fit anew and "
            "save again."
        )


@contextmanager
def damage_explained() -> Iterator[None]:
    """Turn what a missing or misshapen entry leads to into a sentence."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(
            f"the saved posterior is damaged: an entry is missing or of the wrong kind ({type(error).__name__}: {error})."
        ) from error


def restore_posterior(la: BaseLaplace, state: Mapping[str, Any]) -> None:
    """Give a posterior the fit and the hyperparameters of a saved one.

    Raises:
        FileFormatError: it is no posterior of this format, or a damaged one.
        ValueError: options, or parameters of the model, differ.
    """
    check_format(state)
    with damage_explained():
        _restore(la, state)


def _restore(la: BaseLaplace, state: Mapping[str, Any]) -> None:
    from laplace_ws.posterior.fitting import FitSums

    check_model(la.model, state)
    covered = {name: tuple(shape) for name, shape in la.subset.parameter_shapes.items()}
    _check_parameters(covered, state["subset"]["parameters"], "this posterior")
    selection = state["subset"]["selection"]
    if list(selection) != list(la.subset.selection) or any(
        not torch.equal(places.cpu(), la.subset.selection[name].cpu()) for name, places in selection.items()
    ):
        raise ValueError(
            "the saved posterior covers other weights of the subnetwork; make this one with the same indices."
        )
    _check_options(la, state["options"])
    device = la.mean.device
    if torch.device(state["device"]).type != device.type:
        warnings.warn(f"the posterior was saved on {state['device']} and is loaded on {device}.", stacklevel=3)
    H = type(la)._matrix.from_state_dict(la.shapes, _on_device(state["H"], device))
    if state["mean"].shape != la.mean.shape:
        raise FileFormatError(
            f"the mean of the saved posterior has {len(state['mean'])} weights in place of {la.n_params}."
        )
    for name in _HYPERPARAMETERS:
        setattr(la, name, state[name])
    la._sums = FitSums(H, state["nll_sum"], state["n_data"], state["n_targets"], tuple(state["output_shape"]))
    la.mean = state["mean"].to(la.mean)
    la._fitted_options = la._options()
    la._n_arguments = state["n_arguments"]
    la._surroundings = state["surroundings"]["names"], state["surroundings"]["fingerprint"].cpu()
    if la.class_names is None and state["class_names"] is not None:
        la.class_names = tuple(state["class_names"])
    la._new_check()


def check_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a model has the parameters of a saved posterior's."""
    _check_parameters(_model_parameters(model), state["model_parameters"], "the model")


def saved_subset(state: Mapping[str, Any], device: torch.device) -> WeightSubset:
    """The weights that a saved posterior covers."""
    shapes = {name: torch.Size(shape) for name, shape in state["subset"]["parameters"].items()}
    return WeightSubset(shapes, _on_device(state["subset"]["selection"], device))


def _model_parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _check_options(la: BaseLaplace, saved: Mapping[str, Any]) -> None:
    for option, value in la._options().items():
        if saved.get(option) != value:
            raise ValueError(
                f"the saved posterior has {option}={saved.get(option)!r}, this one {value!r}; make this one to match, or read the file by "
                "load_posterior."
            )


def _check_parameters(found: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]], whose: str) -> None:
    """Raise unless names and shapes are the same, in the same order."""
    saved = {name: tuple(shape) for name, shape in saved.items()}
    for name in [*saved, *found]:
        if found.get(name) != saved.get(name):
            of_saved = f"has {name!r} of shape {list(saved[name])}" if name in saved else f"has no {name!r}"
            here = f"one of shape {list(found[name])}" if name in found else "none"
            raise ValueError(
                f"the saved posterior {of_saved}, and {whose} has {here}; load it beside a model like its own."
            )
    if list(found) != list(saved):
        raise ValueError(f"{whose} has the parameters of the saved posterior in another order.")


def _on_device(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A nested dictionary with its tensors on a device."""
    return {
        key: _on_device(value, device)
        if isinstance(value, Mapping)
        else value.to(device)
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }
