"""Scalar parameters of Fixup networks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Bias(nn.Module):
    """Adds one learned number, at first 0, to every element [Zhang et al. 2019]."""

    def __init__(self) -> None:
        super().__init__()
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return x + bias."""
        return x + self.bias


class Scale(nn.Module):
    """Multiplies every element by one learned number, at first 1 [Zhang et al. 2019]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: nn.Parameter = nn.Parameter(torch.ones(1))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return x · scale."""
        return x * self.scale
