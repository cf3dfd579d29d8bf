"""The use of a parameter that has no part in a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.kfac.uses import Use, at_least_float32


@dataclass(frozen=True, kw_only=True)
class AbsentUse(Use):
    """No use at all, in a batch of which no example was routed to an expert; its output is that of the network.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
    """

    name: str
    shape: torch.Size

    @property
    def parameters(self) -> tuple[str, ...]:
        """See `Use.parameters`."""
        return (self.name,)

    def example_gradients(self, name: str, g: Float[Tensor, "K N ..."]) -> Float[Tensor, "K N ..."]:
        """See `Use.example_gradients`; zeros."""
        return at_least_float32(g).new_zeros(len(g), self.n_examples, *self.shape)
