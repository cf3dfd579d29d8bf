"""Whether a model is still that of a fit: the covered weights by the mean, all else by sums over each tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.posterior.subset import WeightSubset
from laplace_ws.threads import alone_with

_TOLERANCE = 1e-5
"""Relative change of a tensor that its rounding on another device may make."""
_READ_WHOLE, _LOOKED_AT = 2**16, 2**10
"""Most entries of a tensor that is read whole every time, and how many are looked at of a larger one."""


@dataclass(frozen=True)
class Fingerprint:
    """What identifies the parameters and buffers that a posterior does not cover, or covers only in part.

    Attributes:
        names: of the tensors.
        sums: sum and norm of each, in float64 on the CPU.
    """

    names: list[str]
    sums: Float[Tensor, "K 2"]

    @classmethod
    def of(cls, model: nn.Module, subset: WeightSubset) -> Fingerprint:
        """The fingerprint of a model as it is."""
        tensors = _not_covered(model, subset)
        return cls(list(tensors), tensor_sums(tensors))

    def check(self, model: nn.Module, subset: WeightSubset) -> None:
        """Raise `ValueError` unless the model is that of the fingerprint."""
        tensors = _not_covered(model, subset)
        for name in [*self.names, *tensors]:
            if (name in tensors) != (name in self.names):
                raise ValueError(f"{name!r} is frozen or covered otherwise than in the fit; fit anew.")
        for name, found, (total, norm) in zip(self.names, tensor_sums(tensors), self.sums, strict=True):
            scale = max(norm.item(), found[1].item())
            is_same_norm = abs(found[1] - norm) <= _TOLERANCE * scale
            is_same_sum = abs(found[0] - total) <= _TOLERANCE * scale * math.sqrt(tensors[name].numel())
            if not (is_same_norm and is_same_sum):
                raise ValueError(
                    f"{name!r}, which the posterior does not cover, is not as it was in the fit; load the state that the model had then, "
                    "or fit anew."
                )


def check_covered_weights(
    found: Float[Tensor, " P"], mean: Float[Tensor, " P"], shapes: Mapping[str, torch.Size]
) -> None:
    """Raise `ValueError` unless the covered weights of a model are those of a fit, to the rounding of float32."""
    sizes = [shape.numel() for shape in shapes.values()]
    pairs = zip(found.to(mean).split(sizes), mean.split(sizes), strict=True)
    largest = torch.stack([torch.stack([(w - m).abs().max(), m.abs().max()]) for w, m in pairs]).tolist()
    for name, (difference, size) in zip(shapes, largest, strict=True):
        if not difference <= 1e-6 * size:
            raise ValueError(
                f"the model's weights are not those of the fit ({name!r} differs by up to {difference:.3g}); put them back by load_mean(), "
                "or fit anew."
            )


@dataclass(frozen=True)
class StateVersion:
    """What reveals, without a full read, that what a posterior does not cover may have changed.

    Attributes:
        writes: of each tensor, which one it is and how often it was written.
        entries: all or many entries of each tensor: writes through `.data` are not counted by torch.
        held: the tensors, so that none of their identities can be another's.
    """

    writes: tuple[tuple[Any, ...], ...]
    entries: Tensor
    held: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module, subset: WeightSubset) -> StateVersion:
        """The state of a model as it is."""
        whole = {id(p) for name, p in subset.parameters(model).items() if name not in subset.selection}
        with alone_with(model):
            tensors = tuple(t for t in (*model.parameters(), *model.buffers()) if id(t) not in whole)
        writes = tuple((id(t), None if t.is_inference() else t._version, t.shape) for t in tensors)
        with torch.no_grad():
            parts = [some_entries(t.detach()).double() for t in tensors if t.numel()]
            entries = torch.cat(parts) if parts else torch.zeros(0)
        return cls(writes, entries, tensors)

    def equals(self, other: StateVersion) -> bool:
        """Whether nothing seems to have been written since; NaN counts as a change."""
        return self.writes == other.writes and torch.equal(self.entries, other.entries)


def some_entries(tensor: Tensor) -> Float[Tensor, " K"]:
    """All entries of a tensor, or many of a large one, from its beginning to its end."""
    n = tensor.numel()
    if n <= _READ_WHOLE:
        return tensor.flatten()
    return tensor.take(torch.arange(_LOOKED_AT, device=tensor.device) * (n // _LOOKED_AT))


def _not_covered(model: nn.Module, subset: WeightSubset) -> dict[str, Tensor]:
    """The tensors of a model's state that a posterior does not cover, or covers only in part."""
    parameters = subset.parameters(model)
    whole = {id(p) for name, p in parameters.items() if name not in subset.selection}
    with alone_with(model):
        state = model.state_dict(keep_vars=True)
    return {
        name: tensor.detach()
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() and id(tensor) not in whole
    }


@torch.no_grad()
def tensor_sums(tensors: Mapping[str, Tensor]) -> Float[Tensor, "K 2"]:
    """Sum and norm of each tensor, in float64 on the CPU."""
    if not tensors:
        return torch.zeros(0, 2, dtype=torch.float64)
    sums = [
        torch.stack([t.sum(dtype=torch.float64), torch.linalg.vector_norm(t, dtype=torch.float64)])
        for t in tensors.values()
    ]
    return torch.stack(sums).cpu()
