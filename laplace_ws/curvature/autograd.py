"""The backend for networks that hide how they use their parameters: gradients of each example by autograd alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.backend import Backend, Linearisation, columns_in_memory
from laplace_ws.curvature.inputs import ModelInputs, call_model, examples_of
from laplace_ws.kfac import Use
from laplace_ws.kfac.examples import Rows


@dataclass(frozen=True, kw_only=True)
class HiddenUse(Use):
    """A parameter, used in whatever way; what is back-propagated to it are the gradients of each example themselves.

    Attributes:
        name: of the parameter.
    """

    name: str
    is_known = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """See `Use.parameters`."""
        return (self.name,)

    def example_gradients(self, name: str, g: Float[Tensor, "K N ..."]) -> Float[Tensor, "K N ..."]:
        """See `Use.example_gradients`."""
        return g


class AutogradBackend(Backend):
    """Covers whatever autograd can differentiate, by a backward pass for each example and column.

    As it knows nothing of how parameters are used, there are no Kronecker factors: it is for the diagonal, the full matrix, and predictions
    of the low-rank structure, and slower than other backends by about the number of examples.
    """

    name = "autograd"

    @contextmanager
    def linearise(
        self, model: nn.Module, x: ModelInputs, parameters: Mapping[str, nn.Parameter]
    ) -> Iterator[AutogradLinearisation]:
        """See `Backend.linearise`."""
        f = call_model(model, x)
        yield AutogradLinearisation(f, parameters, examples_of(x).n)


class AutogradLinearisation(Linearisation):
    """Outputs of one forward pass, with the autograd graph behind them."""

    def __init__(self, f: Tensor, parameters: Mapping[str, nn.Parameter], n_examples: int):
        self.outputs: Tensor = f.detach()
        self.uses: Sequence[Use] = [
            HiddenUse(rows=Rows(n_examples, n_examples), call="autograd", name=name) for name in parameters
        ]
        self.column_bytes: int = n_examples * sum(p.nbytes for p in parameters.values())
        self.columns_at_once: int = columns_in_memory(self.column_bytes, f.device)
        self._f, self._parameters, self._n = f, list(parameters.values()), n_examples
        self._can_vectorise = True

    def pullback(self, columns: Float[Tensor, "K N ..."]) -> list[Float[Tensor, "K N ..."]]:
        """See `Linearisation.pullback`."""
        each = columns.new_zeros(len(columns), self._n, *columns.shape[1:])
        each.diagonal(dim1=1, dim2=2).copy_(columns.movedim(1, -1))
        found = self._pull(each.flatten(0, 1))
        return [g.unflatten(0, (len(columns), self._n)) for g in found]

    def _pull(self, vectors: Float[Tensor, "M N ..."]) -> list[Float[Tensor, "M ..."]]:
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        if self._can_vectorise:
            try:
                return list(torch.autograd.grad(self._f, self._parameters, vectors, is_grads_batched=True, **options))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation without a batching rule
                self._can_vectorise = False
        pulled = [torch.autograd.grad(self._f, self._parameters, vector, **options) for vector in vectors]
        return [torch.stack(g) for g in zip(*pulled, strict=True)]
