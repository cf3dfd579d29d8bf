"""A posterior as tensors and plain values, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ws.curvature.totals import DataTotals
from laplace_ws.files import FileFormatError
from laplace_ws.posterior.fingerprint import Fingerprint
from laplace_ws.posterior.fit import Fit, all_options
from laplace_ws.posterior.network import Network
from laplace_ws.posterior.prior import Prior
from laplace_ws.posterior.structure import Problem, Structure
from laplace_ws.posterior.subset import WeightSubset

FORMAT = "laplace_ws posterior"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Restored:
    """What a saved posterior restores in one like it.

    Attributes:
        fit: curvature and sums over the data.
        prior: hyperparameters.
        class_names: names of the classes or outputs, where they were given.
    """

    fit: Fit
    prior: Prior
    class_names: tuple[str, ...] | None


def posterior_state(
    fit: Fit, prior: Prior, network: Network, *, memory_budget: int, class_names: Sequence[str] | None
) -> dict[str, Any]:
    """Everything that makes up a fitted posterior, except its model and its generator: format, options, parameters of the model with their
    shapes, class names, mean, curvature, sums over the data and hyperparameters.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "device": str(fit.mean.device),
        "options": dict(fit.options),
        "subset": {
            "parameters": {name: tuple(shape) for name, shape in network.subset.parameter_shapes.items()},
            "selection": dict(network.subset.selection),
        },
        "model_parameters": _model_parameters(network.model),
        "backend": network.backend.name,
        "dict_key_x": network.keys.x,
        "dict_key_y": network.keys.y,
        "memory_budget": memory_budget,
        "class_names": None if class_names is None else list(class_names),
        "n_arguments": fit.n_arguments,
        "surroundings": {"names": fit.fingerprint.names, "fingerprint": fit.fingerprint.sums},
        "mean": fit.mean,
        "H": fit.H.state_dict(),
        "nll_sum": fit.totals.nll_sum,
        "n_data": fit.totals.n_examples,
        "n_targets": fit.totals.n_targets,
        "output_shape": list(fit.output_shape),
        "prior_precision": prior.precision,
        "prior_mean": prior.mean,
        "sigma_noise": prior.sigma_noise,
        "temperature": prior.temperature,
    }


def check_format(state: Any, what: str = "the state") -> None:
    """Raise `FileFormatError` unless `state` is a posterior in the current format."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise FileFormatError(f"{what} is no posterior as state_dict() or save() give it.")
    if state.get("format_version") != FORMAT_VERSION:
        raise FileFormatError(
            f"{what} is a posterior of format {state.get('format_version')}, and this version reads format {FORMAT_VERSION}; fit anew and "
            "save again."
        )


@contextmanager
def damage_explained() -> Iterator[None]:
    """Turn the exception that a missing or misshapen entry causes into a clear message."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(
            f"the saved posterior is damaged: an entry is missing or of the wrong kind ({type(error).__name__}: {error})."
        ) from error


def restored(state: Mapping[str, Any], structure: Structure, problem: Problem, prior: Prior) -> Restored:
    """Fit and hyperparameters of a saved posterior, for one of the same structure and problem.

    Args:
        state: what `posterior_state` gave.
        structure: of the posterior.
        problem: its model, likelihood and options.
        prior: its current hyperparameters.

    Raises:
        FileFormatError: the state is not a posterior in this format, or is damaged.
        ValueError: options, or parameters of the model, differ.
    """
    check_format(state)
    with damage_explained():
        check_model(problem.network.model, state)
        options, subset = all_options(structure, problem), problem.network.subset
        _check_covered(subset, state["subset"])
        _check_options(options, state["options"])
        device = prior.precision.device
        if torch.device(state["device"]).type != device.type:
            warnings.warn(f"the posterior was saved on {state['device']} and is loaded on {device}.", stacklevel=3)
        n_params = problem.network.n_params
        if state["mean"].shape != (n_params,):
            raise FileFormatError(
                f"the mean of the saved posterior has {len(state['mean'])} weights in place of {n_params}."
            )
        fit = Fit(
            H=structure.matrix.from_state_dict(problem.network.shapes, _on_device(state["H"], device)),
            totals=DataTotals(state["nll_sum"], state["n_data"], state["n_targets"], tuple(state["output_shape"])),
            mean=state["mean"].to(problem.network.flat_weights()),
            likelihood=problem.unit_likelihood,
            curvature=problem.curvature,
            options=options,
            n_arguments=state["n_arguments"],
            fingerprint=Fingerprint(state["surroundings"]["names"], state["surroundings"]["fingerprint"].cpu()),
        )
        prior = prior.changed(
            precision=state["prior_precision"],
            mean=state["prior_mean"],
            sigma_noise=state["sigma_noise"],
            temperature=state["temperature"],
        )
        names = state["class_names"]
        return Restored(fit, prior, None if names is None else tuple(names))


def check_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a model has the same parameters as that of a saved posterior."""
    _check_parameters(_model_parameters(model), state["model_parameters"], "the model")


def saved_subset(state: Mapping[str, Any], device: torch.device) -> WeightSubset:
    """The weights that a saved posterior covers."""
    shapes = {name: torch.Size(shape) for name, shape in state["subset"]["parameters"].items()}
    return WeightSubset(shapes, _on_device(state["subset"]["selection"], device))


def _model_parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _check_covered(subset: WeightSubset, saved: Mapping[str, Any]) -> None:
    covered = {name: tuple(shape) for name, shape in subset.parameter_shapes.items()}
    _check_parameters(covered, saved["parameters"], "this posterior")
    selection = saved["selection"]
    if list(selection) != list(subset.selection) or any(
        not torch.equal(places.cpu(), subset.selection[name].cpu()) for name, places in selection.items()
    ):
        raise ValueError(
            "the saved posterior covers other weights of the subnetwork; make this one with the same indices."
        )


def _check_options(options: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for option, value in options.items():
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
