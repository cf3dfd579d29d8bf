"""How a weight of any shape holds the matrices `[O, I]` of a linear map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws import saved
from laplace_ws.files import FileFormatError


@dataclass(frozen=True)
class WeightAxes:
    """Which axes of a weight run over the outputs of a linear map; all others, in their order, run over its inputs.

    Attributes:
        shape: of the weight.
        outputs: axes over the outputs: (0,) for linear layers and convolutions, (1,) for embeddings, `x @ W` and transposed convolutions.
        groups: number of maps that are stacked along the first axis, each with inputs and outputs of its own.
    """

    shape: torch.Size
    outputs: tuple[int, ...] = (0,)
    groups: int = 1

    @cached_property
    def _own(self) -> tuple[int, ...]:
        """Shape of the weight of one group."""
        return (self.shape[0] // self.groups, *self.shape[1:]) if self.groups > 1 else tuple(self.shape)

    @cached_property
    def _order(self) -> tuple[int, ...]:
        inputs = (axis for axis in range(len(self._own)) if axis not in self.outputs)
        return (*self.outputs, *inputs)

    @property
    def sizes(self) -> tuple[int, ...]:
        """`(*G, O, I)`; without groups there is no G."""
        n_outputs = prod(self._own[axis] for axis in self.outputs)
        return (*([self.groups] if self.groups > 1 else []), n_outputs, prod(self._own) // n_outputs)

    @property
    def is_row_major(self) -> bool:
        """Whether the flattened weight is the flattened matrices."""
        return self._order == tuple(range(len(self._own)))

    def matrices(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S *G O I"]:
        """The matrices in vectors over the flattened weight."""
        *groups, n_outputs, n_inputs = self.sizes
        leading = (*x.shape[:-1], *groups)
        if self.is_row_major:
            return x.reshape(*leading, n_outputs, n_inputs)
        own = x.reshape(*leading, *self._own)
        return own.permute(*range(len(leading)), *(len(leading) + axis for axis in self._order)).reshape(
            *leading, n_outputs, n_inputs
        )

    def vectors(self, matrices: Float[Tensor, "*S *G O I"]) -> Float[Tensor, "*S D"]:
        """The vectors over the flattened weight that hold the matrices; undoes `matrices`."""
        leading = matrices.shape[:-2]
        x = matrices
        if not self.is_row_major:
            back = sorted(range(len(self._order)), key=lambda place: self._order[place])
            x = x.reshape(*leading, *(self._own[axis] for axis in self._order))
            x = x.permute(*range(len(leading)), *(len(leading) + place for place in back))
        return x.reshape(*matrices.shape[: len(leading) - (self.groups > 1)], self.shape.numel())

    def places(self, device: torch.device) -> Int[Tensor, " D"]:
        """Where each entry of the flattened matrices lies in the flattened weight."""
        return self.matrices(torch.arange(self.shape.numel(), device=device)).flatten()

    def state(self) -> list[int]:
        """The axes over the outputs as plain values."""
        return list(self.outputs)


def saved_output_axes(state: dict[str, object], shape: Sequence[int], of: str) -> tuple[int, ...]:
    """The axes over the outputs in the saved state of a block of a weight; files of earlier versions say whether it is transposed.

    Raises:
        FileFormatError: they are no axes of the weight.
    """
    if "output_axes" not in state:
        return (len(shape) - 1,) if saved.entry(state, "transposed", bool, of=of) else (0,)
    axes = saved.entry(state, "output_axes", list, of=of)
    are_whole = all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes)
    if not are_whole or len(set(axes)) < len(axes) or not all(0 <= axis < len(shape) for axis in axes):
        raise FileFormatError(
            f"the saved state is damaged: 'output_axes'{of} are {axes}, no axes of shape {tuple(shape)}."
        )
    return tuple(axes)
