"""Parameters as arguments of calls: whole, as parts or views of themselves, or as what is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from laplace_ws.kfac import Use


@dataclass(frozen=True)
class Operand:
    """A parameter, a selection or a view of its entries, or what is computed from parameters alone, as an argument of a call.

    Attributes:
        name: of the parameter; one that no parameter has for what is computed.
        parameter: itself; what is computed, for that.
        tensor: the tensor that is passed to the call.
        steps: the calls that selected or rearranged its entries: functions of a tensor of the parameter's shape, one after the other.
        looked_up: whether it is rows of an embedding, looked up without a batch axis, as position embeddings are.
        provisional: the use that the look-up makes, if the rows turn out to be one per example after all.
        sources: what it is computed from, by name; none for a parameter.
        refused: the call that computed it, and why that is no use with a block, in words.
    """

    name: str
    parameter: Tensor
    tensor: Tensor
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    looked_up: bool = False
    provisional: Use | None = None
    sources: Mapping[str, Tensor] = field(default_factory=dict)
    refused: str = ""

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.parameter.shape

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters that it is, or is computed from."""
        return tuple(self.sources) or (self.name,)

    @property
    def index(self) -> Int[Tensor, "*shape"] | None:
        """Where it is a selection or a view, the place of each of its entries in the flattened parameter."""
        if not self.steps:
            return None
        places = torch.arange(self.shape.numel(), device=self.tensor.device).view(self.shape)
        with torch.no_grad():
            for step in self.steps:
                places = step(places)
        return places

    def after(self, function: Callable[..., Any], output: Any, *args: Any, **kwargs: Any) -> list[Operand]:
        """The operands that a call makes of this one, its first argument, where it selects or rearranges entries; none for other calls."""
        if function not in SELECTIONS:
            return []
        many = isinstance(output, tuple)
        outputs = output if many else (output,)
        return [
            replace(
                self,
                tensor=tensor,
                steps=(
                    *self.steps,
                    lambda x, i=i: function(x, *args, **kwargs)[i] if many else function(x, *args, **kwargs),
                ),
            )
            for i, tensor in enumerate(outputs)
        ]


@dataclass(frozen=True)
class StoredMap:
    """How a tensor that is a view of a weight holds the matrices of a linear map.

    Attributes:
        output_axes: axes of the weight over its outputs.
        groups: maps that are stacked along the first axis of the weight.
        parts: which of them the view holds; None where the call applies each to inputs of its own.
    """

    output_axes: tuple[int, ...]
    groups: int = 1
    parts: tuple[int, ...] | None = None


def stored_map(
    operand: Operand, group_axes: Sequence[int], output_axes: Sequence[int], input_axes: Sequence[int]
) -> StoredMap | None:
    """How the weight of an operand holds a map whose groups, outputs and inputs are axes of the operand's tensor, in this order.

    Read off the strides of the view; None where the weight does not hold the map in a way that a Kronecker block can follow.
    """
    parameter, tensor = operand.parameter, operand.tensor
    if not operand.steps and tuple(group_axes) in ((), (0,)):
        return StoredMap(tuple(output_axes), tensor.shape[0] if group_axes else 1)
    is_view = tensor.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    if not (is_view and parameter.is_contiguous() and parameter.ndim):
        return None
    shape, strides = parameter.shape, parameter.stride()
    axes: list[tuple[int, ...]] = []
    n_first = 1  # entries of the first axis that the view holds
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        own = _axes_of(size, stride, shape, strides)
        if own is None:
            return None
        if 0 in own:
            n_first = size // prod(shape[axis] for axis in own if axis)
        axes.append(own)
    covered = [axis for own in axes for axis in own]
    is_missing = any(size > 1 and axis not in covered for axis, size in enumerate(shape[1:], 1))
    start, rest = divmod(int(tensor.storage_offset()) - int(parameter.storage_offset()), strides[0])
    if is_missing or len(set(covered)) < len(covered) or rest or shape[0] % n_first or start % n_first:
        return None
    groups, outputs, inputs = ([axis for i in own for axis in axes[i]] for own in (group_axes, output_axes, input_axes))
    if inputs != sorted(inputs) or (group_axes and (groups != [0] or n_first < shape[0])):
        return None
    if group_axes:
        return StoredMap(tuple(outputs), shape[0])
    if n_first == shape[0]:
        return StoredMap(tuple(outputs))
    return StoredMap(tuple(outputs), shape[0] // n_first, (start // n_first,))


def _axes_of(size: int, stride: int, shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """The axes of a contiguous tensor that an axis of a view of it runs over, of the first perhaps a part; None where there are none."""
    if size == 1:
        return ()
    last = next((axis for axis, n in enumerate(shape) if n > 1 and strides[axis] == stride), None)
    if last is None:
        return None
    first, n = last, shape[last]
    while n < size and first > 0:
        first -= 1
        n *= shape[first]
    is_part = first == 0 and size < n and size % (n // shape[0]) == 0
    return (
        tuple(axis for axis in range(first, last + 1) if shape[axis] > 1 or axis == 0) if n == size or is_part else None
    )


SELECTIONS: set[Callable[..., Any]] = {
    torch.Tensor.__getitem__,
    torch.Tensor.view,
    torch.Tensor.reshape,
    torch.reshape,
    torch.Tensor.flatten,
    torch.flatten,
    torch.Tensor.unflatten,
    torch.unflatten,
    torch.Tensor.unsqueeze,
    torch.unsqueeze,
    torch.Tensor.squeeze,
    torch.squeeze,
    torch.Tensor.permute,
    torch.permute,
    torch.Tensor.movedim,
    torch.movedim,
    torch.Tensor.transpose,
    torch.transpose,
    torch.Tensor.t,
    torch.t,
    torch.Tensor.T.__get__,  # pyright: ignore
    torch.Tensor.mT.__get__,  # pyright: ignore
    torch.Tensor.contiguous,
    torch.Tensor.index_select,
    torch.index_select,
    torch.Tensor.narrow,
    torch.narrow,
    torch.Tensor.select,
    torch.select,
    torch.Tensor.unbind,
    torch.unbind,
    torch.Tensor.split,
    torch.functional.split,
    torch.Tensor.chunk,
    torch.chunk,
}
"""Calls that select or rearrange entries of their first argument."""
