"""Rows that a forward pass selects from its data by an index or a mask, and the examples that they belong to.

Routing to experts does so: `h = x[mask]; h = expert(h); out[mask] = h`. The rows of h are no longer the examples in order, nor as many
of each. They are followed from call to call for as long as calls keep them along the first axis.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from laplace_ws.kfac.examples import Examples

_INDEXED = {torch.Tensor.__getitem__, torch.Tensor.index_select, torch.index_select}
_MOVING = {
    torch.Tensor.t, torch.t, torch.Tensor.transpose, torch.transpose, torch.Tensor.permute, torch.permute,
    torch.Tensor.movedim, torch.movedim, torch.Tensor.flip, torch.flip, torch.Tensor.roll, torch.roll, torch.Tensor.sort, torch.sort,
    torch.Tensor.index_add, torch.Tensor.index_add_, torch.index_add, torch.Tensor.index_copy, torch.Tensor.index_copy_, torch.index_copy,
    torch.Tensor.index_put, torch.Tensor.index_put_, torch.Tensor.scatter, torch.Tensor.scatter_, torch.scatter, torch.Tensor.scatter_add,
    torch.Tensor.scatter_add_, torch.scatter_add, torch.Tensor.__setitem__,
}  # fmt: skip  # pyright: ignore
"""Calls after which the first axis may hold other rows, or the same in another order."""

RowExamples = Int[Tensor, " B"]


class SelectedRows:
    """Follows selected rows through one forward pass.

    Args:
        examples: of the batch.

    Attributes:
        any: whether rows were selected; where they are, a parameter may have no part in a batch.
    """

    def __init__(self, examples: Examples):
        self._examples = examples
        self._known: dict[int, tuple[weakref.ref[Tensor], RowExamples]] = {}
        self.any: bool = False

    def of(self, values: Iterable[Any], n_rows: int) -> RowExamples | None:
        """The example of each of the rows that one of some tensors has along its first axis, as far as they were selected."""
        if not self._known:
            return None
        for value in values:
            found = self._of(value)
            if found is not None and len(found) == n_rows:
                return found
        return None

    def _of(self, value: Any) -> RowExamples | None:
        known = self._known.get(id(value))
        return known[1] if known is not None and known[0]() is value else None

    def _keep(self, tensor: Tensor, examples: RowExamples) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), examples

    def follow(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Take note of what a call on data does with rows."""
        args = (*args, *kwargs.values())
        if function in _INDEXED and len(args) > 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            if function is not torch.Tensor.__getitem__ and kwargs:  # by name, in any order
                args = (args[0], kwargs.get("dim", args[1]), kwargs["index"]) if "index" in kwargs else args[:2]
            if function is not torch.Tensor.__getitem__ and len(args) < 3:
                return
            index = args[1] if function is torch.Tensor.__getitem__ else (args[2] if args[1] == 0 else None)
            self._select(args[0], index, output)
        elif function is torch.cat and self._known and isinstance(output, Tensor):
            tensors = next(value for value in args if isinstance(value, (list, tuple)))
            parts = [self._of(part) for part in tensors]
            if len(output) == sum(len(part) for part in parts if part is not None):
                self._keep(output, torch.cat([part for part in parts if part is not None]))
        elif self._known and function not in _MOVING:
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            for tensor in outputs:
                if isinstance(tensor, Tensor) and tensor.ndim:
                    found = self.of(args, len(tensor))
                    if found is not None:
                        self._keep(tensor, found)

    def _select(self, base: Tensor, index: Any, output: Tensor) -> None:
        first = index[0] if isinstance(index, tuple) and index else index
        if isinstance(first, slice) and first != slice(None) and self._of(base) is None:
            return
        if not isinstance(first, (Tensor, slice)) or not base.ndim or not output.ndim:
            return
        examples = self._of(base)
        if examples is None:
            rows = None if self._examples.are_ragged else self._examples.rows(len(base))
            if rows is None:
                return
            examples = rows.example_of_each(base.device)
        if isinstance(first, Tensor):
            if first.ndim == 0:
                return
            if first.dtype is torch.bool:
                examples = examples.reshape(-1, *[1] * (first.ndim - 1)).expand(first.shape)[first]
            elif first.ndim == 1:
                examples = examples[first]
            else:
                return
            self.any = True
        else:
            examples = examples[first]
        if len(examples) == len(output):
            self._keep(output, examples)
