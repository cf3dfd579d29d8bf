"""The use of what is computed from parameters alone, in place of the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.kfac.uses import Use


@dataclass(frozen=True, kw_only=True)
class ExpressionUse(Use):
    """A use of q = h(p, …): exp(p), p + p′, a masked weight, a product of two weights.

    Gradients with respect to q are those of the use, and by the chain rule those with respect to p: as h need not be linear in p, p has no
    Kronecker block but that of a vector.

    Attributes:
        of_value: the use of q.
        value_name: its name for q.
        value: q, in the autograd graph that leads to its parameters.
        sources: those that require grad, by name.
    """

    of_value: Use
    value_name: str
    value: Tensor
    sources: Mapping[str, Tensor]
    hides_matrix = True

    @property
    def parameters(self) -> tuple[str, ...]:
        """See `Use.parameters`."""
        return tuple(self.sources)

    def example_gradients(self, name: str, g: Float[Tensor, "K B ..."]) -> Float[Tensor, "K N ..."]:
        """See `Use.example_gradients`."""
        of_value = self.of_value.example_gradients(self.value_name, g)
        columns = of_value.flatten(0, 1).to(self.value.dtype)
        p = self.sources[name]
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.value, p, columns, retain_graph=True, is_grads_batched=True)
        return found.unflatten(0, of_value.shape[:2]).to(of_value.dtype)
