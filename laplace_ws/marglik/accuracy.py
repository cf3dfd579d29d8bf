"""The accuracy that training reports as it goes along."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def n_correct(f: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Number of examples whose labels the outputs get right, each averaged over its terms that count; NaN if targets are not labels."""
    if y.is_floating_point() and f.shape == y.shape:
        return torch.full((), math.nan, device=f.device)
    right = f.argmax(-1) == y if f.ndim == y.ndim + 1 else (f > 0) == (y > 0)
    right = right.double().reshape(len(y), -1)
    if mask is None:
        return right.mean(1).sum()
    counts = mask.reshape(right.shape)
    return ((right * counts).sum(1) / counts.sum(1).clamp(min=1)).sum()
