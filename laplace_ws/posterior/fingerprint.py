"""What a posterior rests on beside the weights that it covers: frozen parameters and buffers, known again by sums over them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.posterior.subset import WeightSubset

_TOLERANCE = 1e-5
"""Relative change of a tensor that its rounding on another device may make."""


def surroundings(model: nn.Module, subset: WeightSubset) -> dict[str, Tensor]:
    """The tensors of a model's state that a posterior does not cover, or not whole."""
    parameters = subset.parameters(model)
    whole = {id(p) for name, p in parameters.items() if name not in subset.selection}
    state = model.state_dict(keep_vars=True)
    return {
        name: tensor.detach()
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() and id(tensor) not in whole
    }


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor]) -> Float[Tensor, "K 2"]:
    """Sum and norm of each tensor, in float64 on the CPU."""
    if not tensors:
        return torch.zeros(0, 2, dtype=torch.float64)
    sums = [torch.stack([t.sum(dtype=torch.float64), _norm(t)]) for t in tensors.values()]
    return torch.stack(sums).cpu()


def check_surroundings(tensors: Mapping[str, Tensor], names: list[str], expected: Float[Tensor, "K 2"]) -> None:
    """Raise `ValueError` unless tensors are those of a fingerprint.

    Args:
        tensors: by name.
        names: of those of the fingerprint.
        expected: the fingerprint.
    """
    for name in [*names, *tensors]:
        if (name in tensors) != (name in names):
            raise ValueError(f"{name!r} is frozen or covered otherwise than in the fit; fit anew.")
    for name, found, (total, norm) in zip(names, fingerprint(tensors), expected, strict=True):
        scale = max(norm.item(), found[1].item())
        is_same_norm = abs(found[1] - norm) <= _TOLERANCE * scale
        is_same_sum = abs(found[0] - total) <= _TOLERANCE * scale * math.sqrt(tensors[name].numel())
        if not (is_same_norm and is_same_sum):
            raise ValueError(
                f"{name!r}, which the posterior does not cover, is not as it was in the fit; load the state that the model had then, or "
                "fit anew."
            )


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)
