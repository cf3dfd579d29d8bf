"""Numbers that are not finite, noticed in outputs, gradients and curvature before anything is built on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from laplace_ws.errors import InvalidBatchError
from laplace_ws.matrices import CurvatureMatrix


def check_finite(model: nn.Module, f: Tensor) -> None:
    """Raise `InvalidBatchError` if outputs are not finite."""
    if not f.isfinite().all():
        raise InvalidBatchError(
            f"{type(model).__name__} gives outputs that are not finite; look for NaN in its weights or inputs."
        )


def check_finite_curvature(H: CurvatureMatrix) -> None:
    """Raise `InvalidBatchError`, naming the parameter, unless everything that a curvature stores is finite; waits once for the device."""
    _check("curvature", H.tensors_by_parameter())


def check_finite_gradients(gradients: Mapping[str, Tensor]) -> None:
    """Raise `InvalidBatchError`, naming the parameter, unless gradients are finite; waits once for the device."""
    _check("gradient", {name: (gradient,) for name, gradient in gradients.items()})


def _check(what: str, tensors: Mapping[str, Sequence[Tensor]]) -> None:
    named = [(name, tensor) for name, own in tensors.items() for tensor in own if tensor.numel()]
    if not named:
        return
    # the extremes are NaN where any entry is, and no mask of the size of the tensor is made
    extremes = torch.stack([torch.stack(tensor.detach().aminmax()).double() for _, tensor in named])
    for (name, _), is_finite in zip(named, extremes.isfinite().all(1).tolist(), strict=True):
        if not is_finite:
            raise InvalidBatchError(
                f"the {what} of {name!r} is not finite; look for infinite values and NaN in the inputs of all batches and in the "
                "model's weights."
            )
