"""Which weights of a model a posterior covers."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laplace_ws.curvature.backend import evaluation_mode, trainable_parameters
from laplace_ws.curvature.inputs import ModelInputs, call_model, own_copy
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.threads import alone_with
from laplace_ws.values import shown

SUBSETS = ("all", "last_layer", "subnetwork")


@dataclass(frozen=True)
class WeightSubset:
    """Covered weights, and the flat vectors over them: parameters in the order of the model, each row-major.

    Attributes:
        parameter_shapes: shape of each parameter that is covered in part or in whole, by name.
        selection: indices of the covered weights in the flattened parameter, where not all of them are.
    """

    parameter_shapes: Mapping[str, torch.Size]
    selection: Mapping[str, Int[Tensor, " D"]]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of the covered part of each parameter."""
        return {
            name: torch.Size([len(self.selection[name])]) if name in self.selection else shape
            for name, shape in self.parameter_shapes.items()
        }

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of the model that are covered in part or in whole."""
        with alone_with(model):  # another thread may have put samples in their place
            parameters = dict(model.named_parameters())
        for name, shape in self.parameter_shapes.items():
            if name not in parameters or parameters[name].shape != shape:
                found = f"shape {tuple(parameters[name].shape)}" if name in parameters else "no such parameter"
                raise UnsupportedParameterError(
                    f"the posterior covers {name!r} of shape {tuple(shape)}, but the model has {found}; make a new posterior."
                )
        return {name: parameters[name] for name in self.parameter_shapes}

    def flat(self, model: nn.Module) -> Float[Tensor, " P"]:
        """The covered weights."""
        parts = []
        for name, p in self.parameters(model).items():
            weights = p.detach().flatten()
            parts.append(weights[self.selection[name]] if name in self.selection else weights)
        return torch.cat(parts)

    def tensors(self, model: nn.Module, flat: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """Each parameter with the covered weights taken from a flat vector, and the rest, padding of embeddings too, from the model."""
        tensors = {}
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        for (name, p), part in zip(self.parameters(model).items(), parts, strict=True):
            if name in self.selection:
                part = p.detach().flatten().index_copy(0, self.selection[name], part.to(p.dtype))
            tensors[name] = part.to(p.dtype).view(p.shape)
        for module in model.modules():
            # the padding row has no gradient, so it is not a random variable either
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                for name, p in self.parameters(model).items():
                    if p is module.weight:
                        row = torch.tensor([module.padding_idx], device=p.device)
                        tensors[name] = tensors[name].index_copy(0, row, p.detach()[row])
        return tensors

    def direction(self, flat: Float[Tensor, " P"]) -> list[Tensor]:
        """A direction in the space of the parameters: each with what a flat vector has for it, and zeros where it is not covered."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        tensors = []
        for (name, shape), part in zip(self.parameter_shapes.items(), parts, strict=True):
            if name in self.selection:
                part = part.new_zeros(shape.numel()).index_copy_(0, self.selection[name], part)
            tensors.append(part.view(shape))
        return tensors


def make_subset(
    model: nn.Module,
    subset_of_weights: str | Sequence[str],
    *,
    last_layer_name: str | None = None,
    subnetwork_indices: Int[Tensor, " D"] | None = None,
) -> WeightSubset:
    """The requested weights, among those that require grad.

    Args:
        model: the network.
        subset_of_weights: "all", "last_layer", "subnetwork", or patterns of names of parameters or modules, as in
            `["head", "blocks.3.*.bias"]`.
        last_layer_name: the module that is the last layer; by default the last one that holds parameters.
        subnetwork_indices: for "subnetwork", indices into the flat vector of all parameters that require grad.

    Raises:
        UnsupportedParameterError: a parameter can have no curvature block, however it is used.
        ValueError: the model has no such weights.
    """
    trainable = trainable_parameters(model)
    _check_types(subset_of_weights, last_layer_name)
    if (subset_of_weights == "subnetwork") != (subnetwork_indices is not None):
        raise ValueError('subset_of_weights="subnetwork" and subnetwork_indices go together; give both or none.')
    if last_layer_name is not None and subset_of_weights != "last_layer":
        raise ValueError('last_layer_name is for subset_of_weights="last_layer".')
    if subset_of_weights == "all":
        return _whole(trainable)
    if subset_of_weights == "last_layer":
        return _whole(_matching(model, trainable, [last_layer_name or last_layer(model)], "last_layer_name"))
    if subnetwork_indices is not None:
        return _subnetwork(trainable, subnetwork_indices)
    if isinstance(subset_of_weights, str):
        known = ", ".join(map(repr, SUBSETS))
        raise ValueError(
            f"unknown subset_of_weights {subset_of_weights!r}: choose one of {known}, or give a list of patterns of names "
            f"([{subset_of_weights!r}])."
        )
    return _whole(_matching(model, trainable, list(subset_of_weights), "subset_of_weights"))


def _check_types(subset_of_weights: Any, last_layer_name: object) -> None:
    if last_layer_name is not None and (not isinstance(last_layer_name, str) or not last_layer_name):
        raise TypeError(f"last_layer_name must be the name of a module, got {shown(last_layer_name)}.")
    if isinstance(subset_of_weights, str):
        return
    is_list = isinstance(subset_of_weights, Sequence) and subset_of_weights
    if not is_list or not all(isinstance(pattern, str) for pattern in subset_of_weights):
        raise TypeError(
            f"subset_of_weights must be one of {', '.join(map(repr, SUBSETS))}, a list of one or more patterns of names, or a "
            f"WeightSubset, got {shown(subset_of_weights)}."
        )


def last_layer(model: nn.Module) -> str:
    """Name of the last registered module that holds parameters of its own which require grad.

    Raises:
        ValueError: there is no such module below the model itself.
    """
    with alone_with(model):
        holders = [
            name for name, m in model.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))
        ]
    if not holders[-1]:
        raise ValueError(
            f"{type(model).__name__} holds its parameters itself, so which of them make the last layer cannot be told; name them in a "
            "list as subset_of_weights."
        )
    return holders[-1]


def check_last_layer(model: nn.Module, x: ModelInputs, subset: WeightSubset, trained: Collection[str]) -> None:
    """Raise unless the covered parameters are those of the module with trained parameters that the model calls last.

    Raises:
        ValueError: they are not; names the module that is.
    """
    called: list[tuple[str, nn.Module]] = []
    with evaluation_mode(model), torch.no_grad(), ExitStack() as hooks:
        of_trained = {id(p) for name, p in model.named_parameters() if name in trained}
        for name, module in model.named_modules():
            if any(id(p) in of_trained for p in module.parameters(recurse=False)):
                note = partial(_note, called, name)
                hooks.enter_context(module.register_forward_pre_hook(note))
        call_model(model, own_copy(x))
    covered = {id(p) for p in subset.parameters(model).values()}
    name, module = called[-1] if called else ("", model)
    with alone_with(model):
        is_covered = any(id(p) in covered for p in module.parameters(recurse=False))
    if not is_covered:
        raise ValueError(
            f"the last module with parameters is {last_layer(model)!r} as registered, but {name!r} as called; say which is the last "
            f"layer by last_layer_name={name!r}."
        )


def _note(called: list[tuple[str, nn.Module]], name: str, module: nn.Module, arguments: object) -> None:
    called.append((name, module))


def _whole(parameters: Mapping[str, nn.Parameter]) -> WeightSubset:
    return WeightSubset({name: p.shape for name, p in parameters.items()}, {})


def _matching(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], patterns: Sequence[str], option: str
) -> dict[str, nn.Parameter]:
    """The parameters that match a pattern, or lie in a module that does, by any of their names."""
    first_names = {id(p): name for name, p in parameters.items()}
    with alone_with(model):
        aliases = [(alias, p) for alias, p in model.named_parameters(remove_duplicate=False) if id(p) in first_names]
    chosen = set()
    for pattern in patterns:
        matches = {
            first_names[id(p)]
            for alias, p in aliases
            if fnmatch.fnmatchcase(alias, pattern) or fnmatch.fnmatchcase(alias, f"{pattern}.*")
        }
        if not matches:
            raise ValueError(
                f"{option} {pattern!r} matches no parameter that requires grad; there are {', '.join(list(parameters)[:8])}"
                f"{', …' if len(parameters) > 8 else ''}."
            )
        chosen |= matches
    return {name: p for name, p in parameters.items() if name in chosen}


def _subnetwork(parameters: Mapping[str, nn.Parameter], indices: Int[Tensor, " D"]) -> WeightSubset:
    n_params = sum(p.numel() for p in parameters.values())
    try:
        indices = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError):
        indices = torch.empty(0)
    if indices.dtype == torch.bool and indices.shape == (n_params,):
        indices = indices.nonzero().flatten()
    is_valid = indices.ndim == 1 and not indices.is_floating_point() and indices.dtype != torch.bool and len(indices)
    if not is_valid or indices.min() < 0 or indices.max() >= n_params or len(indices.unique()) < len(indices):
        raise ValueError(
            f"subnetwork_indices must be distinct integers from 0 to {n_params - 1}, places in the flat vector of all weights that "
            f"require grad, or a mask of these {n_params}; make them with laplace_ws.posterior.subnetwork."
        )
    indices = indices.sort().values
    shapes, selection, start = {}, {}, 0
    for name, p in parameters.items():
        end = start + p.numel()
        places = indices[(indices >= start) & (indices < end)] - start
        if len(places):
            shapes[name] = p.shape
            if len(places) < p.numel():
                selection[name] = places.to(p.device)
        start = end
    return WeightSubset(shapes, selection)
