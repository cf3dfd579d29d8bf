"""Which example each row of a layer's input and output belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from laplace_ws.errors import InvalidBatchError


@dataclass(frozen=True, eq=False)
class Rows:
    """How the rows of a use's tensors, their leading axis, belong to the examples of a batch.

    Attributes:
        n_rows: B.
        n_examples: N.
        example: example of each row, for graphs and other inputs of unequal size; None where the rows lie grouped by example, B/N each.
    """

    n_rows: int
    n_examples: int
    example: Int[Tensor, " B"] | None = None

    @property
    def counts(self) -> int | Int[Tensor, " N"]:
        """Rows per example: one number for all, or one number each."""
        if self.example is None:
            return self.n_rows // self.n_examples
        return torch.bincount(self.example, minlength=self.n_examples)

    def example_of_each(self, device: torch.device) -> Int[Tensor, " B"]:
        """Example of each row, in either layout."""
        if self.example is not None:
            return self.example
        return torch.arange(self.n_examples, device=device).repeat_interleave(self.n_rows // self.n_examples)

    def sum(self, x: Tensor, axis: int = 0) -> Tensor:
        """Sum the rows of each example, axis `[..., B, ...]` to `[..., N, ...]`."""
        if self.example is None:
            return x.unflatten(axis, (self.n_examples, -1)).sum(axis + 1) if self.n_rows > self.n_examples else x
        out = x.new_zeros(*x.shape[:axis], self.n_examples, *x.shape[axis + 1 :])
        return out.index_add_(axis, self.example, x)

    def group(self, x: Tensor, axis: int = 0) -> Tensor:
        """Gather the rows of each example, axis `[..., B, ...]` to `[..., N, m, ...]`; examples with fewer rows than m end in zeros."""
        if self.example is None:
            return x.unflatten(axis, (self.n_examples, -1))
        m, place = self._places
        out = x.new_zeros(*x.shape[:axis], self.n_examples * m, *x.shape[axis + 1 :])
        return out.index_copy_(axis, place, x).unflatten(axis, (self.n_examples, m))

    @cached_property
    def _places(self) -> tuple[int, Tensor]:
        """Rows of the largest example, and where each row goes in `[N·m]`."""
        assert self.example is not None
        order = self.example.argsort(stable=True)
        counts = torch.bincount(self.example, minlength=self.n_examples)
        m = int(counts.max()) if self.n_rows else 0
        starts = counts.cumsum(0) - counts
        place = torch.empty_like(order)
        place[order] = torch.arange(self.n_rows, device=order.device) - starts[self.example[order]]
        return m, self.example * m + place


@runtime_checkable
class RaggedInputs(Protocol):
    """Inputs whose examples have unequal numbers of rows, as graphs have: what a model is called with instead of one tensor."""

    device: torch.device

    def __len__(self) -> int:
        """N, the number of examples."""
        ...

    def __getitem__(self, chosen: slice) -> RaggedInputs:
        """Some of the examples."""
        ...


@runtime_checkable
class SelectableInputs(RaggedInputs, Protocol):
    """Ragged inputs that give any of their examples, so that a check can take some at random; without `select`, it takes the first."""

    def select(self, places: Sequence[int]) -> SelectableInputs:
        """The examples at some places, in that order; one may come twice."""
        ...


@dataclass(frozen=True)
class Examples:
    """The examples of a batch, and where their rows lie.

    Attributes:
        n: N, the number of examples.
        are_ragged: whether they may have unequal numbers of rows, so that only `row_examples` shows to which example a row belongs.
    """

    n: int
    are_ragged: bool = False

    def rows(self, n_rows: int) -> Rows | None:
        """Rows of a tensor with `n_rows` rows; None where it is not known which examples they belong to."""
        index = declared_row_examples.get()
        if index is not None:
            return Rows(n_rows, self.n, index) if len(index) == n_rows else None
        is_grouped = n_rows == self.n if self.are_ragged else n_rows % self.n == 0
        return Rows(n_rows, self.n) if is_grouped else None


@dataclass(frozen=True, eq=False)
class GraphExamples(Examples):
    """Graphs, whose layers have a row for each node, each edge or each graph: which of these, their number tells.

    Attributes:
        kinds: the graph of each node, of each edge, and so on.
    """

    kinds: tuple[Int[Tensor, " B"], ...] = ()

    def rows(self, n_rows: int) -> Rows | None:
        """See `Examples.rows`; None too where rows of several kinds are as many, and belong to other graphs."""
        if declared_row_examples.get() is not None:
            return super().rows(n_rows)
        found = self._kinds_of(n_rows)
        if not found or not _are_equal(found):
            return None
        return Rows(n_rows, self.n, None if n_rows == self.n else found[0])

    @property
    def are_told_apart(self) -> bool:
        """Whether the number of rows always tells the graphs that they belong to."""
        return all(_are_equal(self._kinds_of(len(kind))) for kind in self.kinds)

    def _kinds_of(self, n_rows: int) -> list[Tensor]:
        found = [kind for kind in self.kinds if len(kind) == n_rows]
        if n_rows == self.n:
            found.append(torch.arange(self.n, device=self.kinds[0].device))
        return found


def _are_equal(kinds: Sequence[Tensor]) -> bool:
    return all(torch.equal(kinds[0], other) for other in kinds[1:])


@dataclass(frozen=True)
class ExamplesOrRows(Examples):
    """The examples of a batch whose rows need not be theirs, as those of graphs in plain tensors are not: such rows count as examples.

    K-FAC-expand does not ask which example a row belongs to.
    """

    def rows(self, n_rows: int) -> Rows:
        """See `Examples.rows`; each row is its own example where it is not known which of the N they belong to."""
        known = super().rows(n_rows)
        if known is None or (known.example is not None and n_rows and int(known.example.max()) >= self.n):
            return Rows(n_rows, n_rows)
        return known


declared_row_examples: ContextVar[Tensor | None] = ContextVar("example of each row", default=None)


@contextmanager
def row_examples(index: Int[Tensor, " B"] | None) -> Iterator[None]:
    """Declare, inside a forward pass, which example each row of the layers called within belongs to.

    For graphs and other examples of unequal size whose rows lie in one tensor:
    `with row_examples(batch.graph): h = self.embed(batch.nodes)`.

    Args:
        index: example of each row, 0 … N−1; None where the rows are the examples again.
    """
    if isinstance(index, Tensor) and (index.ndim != 1 or index.is_floating_point() or index.dtype is torch.bool):
        raise InvalidBatchError(
            f"row_examples takes integers [B], the example of each row, got {index.dtype} of shape {tuple(index.shape)}."
        )
    token = declared_row_examples.set(index)
    try:
        yield
    finally:
        declared_row_examples.reset(token)
