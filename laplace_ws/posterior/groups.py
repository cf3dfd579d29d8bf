"""Which weights share one prior precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.posterior.structure import STRUCTURES, Structure

ELEMENTWISE = "scales and biases"
"""Name of the group of elementwise scales and biases."""


class PriorStructure(str, Enum):
    """Which weights share one prior precision."""

    SCALAR = "scalar"
    LAYERWISE = "layerwise"
    PARAMETER = "parameter"
    WEIGHT = "weight"

    @classmethod
    def _missing_(cls, value: object) -> PriorStructure:
        hint = ' ("weight": one for each weight)' if value in ("diag", "diagonal") else ""
        raise ValueError(f"prior_structure={value!r} is not one of {[member.value for member in cls]}{hint}")

    def checked(self, structure: type[Structure] | Structure) -> PriorStructure:
        """This structure, unless that of the curvature does not support it."""
        if self is PriorStructure.WEIGHT and not structure.prior_per_weight:
            able = [f'"{name}"' for name, other in STRUCTURES.items() if other.prior_per_weight]
            raise ValueError(
                f'prior_structure="weight" needs hessian_structure {", ".join(able[:-1])} or {able[-1]}, not "{structure.name}"; '
                'use "parameter" or "layerwise"'
            )
        return self


@dataclass(frozen=True)
class PriorGroups:
    """Which prior precision governs which parameter.

    Attributes:
        names: the name under which each group is reported.
        index: the group of every parameter tensor [n_tensors], or of every single weight [n_params].
    """

    names: tuple[str, ...] | list[str]
    index: Tensor

    def spread(self, values: Float[Tensor, " G"]) -> Tensor:
        """One value per group, expanded to every parameter tensor or weight as a posterior expects; a scalar where all share one."""
        return values[0] if len(values) == 1 else values[self.index.to(values.device)]

    def by_parameter(self, parameter_names: Sequence[str]) -> dict[str, str]:
        """Name of each parameter's group; its own where every weight has a prior precision."""
        if len(self.index) != len(parameter_names):
            return {name: name for name in parameter_names}
        return {name: self.names[i] for name, i in zip(parameter_names, self.index.tolist(), strict=True)}


def layer_of(name: str, shapes: Mapping[str, torch.Size]) -> str:
    """The group of a parameter under `prior_structure="layerwise"`.

    A tensor of two or more dimensions is a layer of its own. A vector or a scalar follows a weight of its own module (the
    one named like it, `bias` read as `weight`, first). Where its module has none, it is a scale or a bias that acts
    elementwise, as in normalisations and Fixup, and all of these share the group `ELEMENTWISE`.
    """
    if len(shapes[name]) >= 2:
        return name
    module, _, leaf = name.rpartition(".")
    weights = [other for other in shapes if len(shapes[other]) >= 2 and other.rpartition(".")[0] == module]
    namesake = f"{module}.{leaf.replace('bias', 'weight')}".lstrip(".")
    return namesake if namesake in weights else weights[0] if weights else ELEMENTWISE


def prior_groups(shapes: Mapping[str, torch.Size], structure: PriorStructure | str) -> PriorGroups:
    """Group parameters, given by their shapes in order, by `structure`; a layer's group is named after its weight."""
    structure = PriorStructure(structure)
    if structure is PriorStructure.SCALAR:
        return PriorGroups(("all",), torch.zeros(len(shapes), dtype=torch.long))
    if structure is PriorStructure.PARAMETER:
        return PriorGroups(tuple(shapes), torch.arange(len(shapes)))
    if structure is PriorStructure.WEIGHT:
        owners = [name for name, shape in shapes.items() for _ in range(shape.numel())]
        return PriorGroups(owners, torch.arange(len(owners)))
    heads = [layer_of(name, shapes) for name in shapes]
    names = tuple(dict.fromkeys(heads))
    return PriorGroups(names, torch.tensor([names.index(head) for head in heads]))
