"""A posterior as tensors and plain values, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ws import saved
from laplace_ws.curvature.totals import DataTotals
from laplace_ws.files import FileFormatError
from laplace_ws.posterior.fingerprint import Fingerprint
from laplace_ws.posterior.fit import Fit, all_options
from laplace_ws.posterior.function import FunctionFingerprint
from laplace_ws.posterior.network import Network
from laplace_ws.posterior.packing import packed, unpacked
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
        covariance_scale: multiplier of the posterior covariance.
        class_names: names of the classes or outputs, where they were given.
    """

    fit: Fit
    prior: Prior
    covariance_scale: float
    class_names: tuple[str, ...] | None


def posterior_state(
    fit: Fit,
    prior: Prior,
    network: Network,
    *,
    memory_budget: int,
    covariance_scale: float,
    class_names: Sequence[str] | None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Everything that makes up a fitted posterior, except its model and its generator: format, options, parameters of the model with their
    shapes, class names, fingerprints of what is not covered and of what the model computes, mean, curvature, sums over the data and
    hyperparameters.

    Args:
        fit: curvature at the mode.
        prior: hyperparameters.
        network: the model and its covered weights.
        memory_budget: of predictions.
        covariance_scale: of the posterior.
        class_names: of the classes or outputs.
        dtype: in which large tensors of the curvature are packed, see `packing.packed`; None for the curvature as it is.
    """
    H = fit.H.state_dict()
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "device": str(fit.mean.device),
        "options": dict(fit.options),
        "subset": {
            "parameters": {name: tuple(shape) for name, shape in network.subset.parameter_shapes.items()},
            "selection": dict(network.subset.selection),
        },
        "model_parameters": {name: tuple(shape) for name, shape in _model_parameters(network.model).items()},
        "backend": network.backend.name,
        "dict_key_x": network.keys.x,
        "dict_key_y": network.keys.y,
        "memory_budget": memory_budget,
        "class_names": None if class_names is None else list(class_names),
        "n_arguments": fit.n_arguments,
        "surroundings": {"names": fit.fingerprint.names, "fingerprint": fit.fingerprint.sums},
        "function": None if fit.function is None else fit.function.state(),
        "mean": fit.mean,
        "H": H if dtype is None else packed(H, dtype),
        "nll_sum": fit.totals.nll_sum,
        "n_data": fit.totals.n_examples,
        "n_targets": fit.totals.n_targets,
        "output_shape": list(fit.output_shape),
        "prior_precision": prior.precision,
        "prior_mean": prior.mean,
        "sigma_noise": prior.sigma_noise,
        "temperature": prior.temperature,
        "covariance_scale": covariance_scale,
    }


def check_format(state: Any) -> None:
    """Raise `FileFormatError` unless `state` is a posterior in the current format."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise FileFormatError("this is no posterior as state_dict() or save() give it.")
    if state.get("format_version") != FORMAT_VERSION:
        raise FileFormatError(
            f"this is a posterior of format {state.get('format_version')}, and this version reads format {FORMAT_VERSION}; fit anew and "
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
        what = str(error).partition("\n")[0]
        raise FileFormatError(
            f"the saved posterior is damaged: an entry is missing or of the wrong kind ({type(error).__name__}: {what})."
        ) from error


@contextmanager
def values_explained() -> Iterator[None]:
    """Turn the exception by which something refuses a saved value into one about the saved posterior."""
    try:
        yield
    except ValueError as error:
        raise FileFormatError(f"the saved posterior is damaged: {error}") from error


def restored(state: Mapping[str, Any], structure: Structure, problem: Problem, prior: Prior) -> Restored:
    """Fit and hyperparameters of a saved posterior, for one of the same structure and problem.

    Args:
        state: what `posterior_state` gave.
        structure: of the posterior.
        problem: its model, likelihood and options.
        prior: its current hyperparameters.

    Raises:
        FileFormatError: the state is not a posterior in this format, or is damaged: something is missing or has an impossible value.
        ValueError: options, or parameters of the model, differ.
    """
    check_format(state)
    network, device = problem.network, prior.precision.device
    with damage_explained():
        check_model(network.model, state)
        options = all_options(structure, problem)
        _check_covered(network.subset, state)
        _check_options(options, saved.entry(state, "options", Mapping))
        saved_on = saved.entry(state, "device", str)
        if torch.device(saved_on).type != device.type:
            warnings.warn(f"the posterior was saved on {saved_on} and is loaded on {device}.", stacklevel=3)
        mean = saved.floats(saved.entry(state, "mean", Tensor), "mean", (network.n_params,))
        with values_explained():
            H = structure.matrix.from_state_dict(
                network.shapes, saved.on_device(unpacked(saved.entry(state, "H", Mapping)), device)
            )
            prior = prior.changed(
                precision=saved.entry(state, "prior_precision", Tensor, int, float),
                mean=saved.entry(state, "prior_mean", Tensor, int, float),
                sigma_noise=saved.entry(state, "sigma_noise", Tensor, int, float),
                temperature=saved.entry(state, "temperature", Tensor, int, float),
            )
        fit = Fit(
            H=H,
            totals=_totals(state),
            mean=mean.to(network.flat_weights()),
            likelihood=problem.unit_likelihood,
            curvature=problem.curvature,
            options=options,
            n_arguments=saved.whole_number(state, "n_arguments", 1),
            fingerprint=_fingerprint(state),
            function=_function(state),
        )
        of_earlier_files = {"covariance_scale": 1.0}
        covariance_scale = saved.number({**of_earlier_files, **state}, "covariance_scale", above=0)
        return Restored(fit, prior, covariance_scale, _class_names(state))


def check_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a model has the same parameters as that of a saved posterior."""
    _check_parameters(_model_parameters(model), saved.shapes(state, "model_parameters"), "the model")


def saved_subset(state: Mapping[str, Any], device: torch.device) -> WeightSubset:
    """The weights that a saved posterior covers.

    Raises:
        FileFormatError: they are not weights of its model.
    """
    shapes, of_model = (
        saved.shapes(saved.entry(state, "subset", Mapping), "parameters"),
        saved.shapes(state, "model_parameters"),
    )
    selection = saved.entry(state["subset"], "selection", Mapping)
    for name, shape in shapes.items():
        if of_model.get(name) != shape:
            raise FileFormatError(
                f"the saved posterior is damaged: it covers {name!r}, which is no parameter of its model."
            )
    for name, places in selection.items():
        if not (name in shapes and isinstance(places, Tensor) and places.dtype == torch.int64 and places.ndim == 1):
            raise FileFormatError(f"the saved posterior is damaged: the covered weights of {name!r} are not indices.")
        is_rising = not len(places) or (
            places[0] >= 0 and places[-1] < shapes[name].numel() and (places.diff() > 0).all()
        )
        if not is_rising:
            raise FileFormatError(
                f"the saved posterior is damaged: the covered weights of {name!r} are not among its weights."
            )
    return WeightSubset(shapes, saved.on_device(selection, device))


def _totals(state: Mapping[str, Any]) -> DataTotals:
    shape = saved.entry(state, "output_shape", list, tuple)
    if not saved.is_shape(shape):
        raise FileFormatError(
            f"the saved state is damaged: 'output_shape' is {shape!r} and must be a list of whole numbers."
        )
    n_examples, n_targets = saved.whole_number(state, "n_data", 1), saved.number(state, "n_targets", above=0)
    return DataTotals(saved.number(state, "nll_sum"), n_examples, n_targets, tuple(shape))


def _fingerprint(state: Mapping[str, Any]) -> Fingerprint:
    """What the model had besides the covered weights, of which a sum may be infinite, as a mask of attention is."""
    surroundings = saved.entry(state, "surroundings", Mapping)
    names, sums = saved.entry(surroundings, "names", list), saved.entry(surroundings, "fingerprint", Tensor)
    if sums.shape != (len(names), 2) or sums.dtype != torch.float64 or not all(isinstance(name, str) for name in names):
        raise FileFormatError("the saved state is damaged: 'surroundings' is not two sums for each tensor.")
    return Fingerprint(names, sums.cpu())


def _function(state: Mapping[str, Any]) -> FunctionFingerprint | None:
    """What the model gave on a fixed batch; files from before it was kept have none."""
    function = state.get("function")
    return None if function is None else FunctionFingerprint.from_state(function)


def _class_names(state: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = saved.entry(state, "class_names", list, tuple, None)
    if names is not None and not all(isinstance(name, str) for name in names):
        raise FileFormatError(f"the saved state is damaged: 'class_names' is {names!r} and must be a list of strings.")
    return None if names is None else tuple(names)


def _model_parameters(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def _check_covered(subset: WeightSubset, state: Mapping[str, Any]) -> None:
    covered = saved_subset(state, torch.device("cpu"))
    _check_parameters(subset.parameter_shapes, covered.parameter_shapes, "this posterior")
    selection = covered.selection
    if list(selection) != list(subset.selection) or any(
        not torch.equal(places, subset.selection[name].cpu()) for name, places in selection.items()
    ):
        raise ValueError(
            "the saved posterior covers other weights of the subnetwork; make this one with the same indices."
        )


def _check_options(options: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for option, value in options.items():
        if found.get(option) != value:
            raise ValueError(
                f"the saved posterior has {option}={found.get(option)!r}, this one {value!r}; make this one to match, or read the file by "
                "load_posterior."
            )


def _check_parameters(here: Mapping[str, torch.Size], there: Mapping[str, torch.Size], whose: str) -> None:
    """Raise unless names and shapes are the same, in the same order."""
    for name in [*there, *here]:
        if here.get(name) != there.get(name):
            of_saved = f"has {name!r} of shape {list(there[name])}" if name in there else f"has no {name!r}"
            of_this = f"one of shape {list(here[name])}" if name in here else "none"
            raise ValueError(
                f"the saved posterior {of_saved}, and {whose} has {of_this}; load it beside a model like its own."
            )
    if list(here) != list(there):
        raise ValueError(f"{whose} has the parameters of the saved posterior in another order.")
