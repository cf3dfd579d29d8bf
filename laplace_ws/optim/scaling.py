"""What a `GradScaler` tells an optimiser with `_step_supports_amp_scaling`: the factor on the loss, and whether gradients overflowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def loss_scale(optimizer: Any, scaler: torch.amp.GradScaler | None) -> float:
    """By how much the loss was scaled when it was differentiated.

    Raises:
        ValueError: a scaler that the optimiser does not know has unscaled the gradients, so that they do not tell.
    """
    if scaler is not None:
        return scaler.get_scale()
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if hasattr(optimizer, "found_inf") and scale is None:
        raise ValueError(
            "a GradScaler scaled the loss and unscaled the gradients, so that the scale of the factors is not known; give it to the "
            "optimizer, KFAC(model, grad_scaler=scaler)."
        )
    return 1.0 if scale is None else scale.item()


def has_overflowed(optimizer: Any) -> bool:
    """Whether the scaler found gradients that are not finite, which take no step."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def unscale(optimizer: Any, parameters: Sequence[Tensor]) -> None:
    """Divide the gradients by the scale of the loss, where the scaler left that to the optimiser."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        torch._foreach_mul_([p.grad for p in parameters], 1 / scale.item())  # pyright: ignore
