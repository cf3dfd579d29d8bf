"""Batches of graphs as PyTorch Geometric's loader gives them, known by what they have, without an import of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from laplace_ws.kfac.examples import GraphExamples


@runtime_checkable
class GeometricBatch(Protocol):
    """What a `torch_geometric.data.Batch` has, as far as it is needed here."""

    num_graphs: int
    ptr: Tensor
    batch: Tensor

    def index_select(self, idx: Any) -> list[Any]:
        """The graphs at some places."""
        ...

    @classmethod
    def from_data_list(cls, data_list: list[Any]) -> Any:
        """A batch of graphs."""
        ...


def is_geometric(x: object) -> TypeGuard[GeometricBatch]:
    """Whether something is a batch of graphs of one kind of node."""
    return not isinstance(x, Tensor) and isinstance(x, GeometricBatch) and isinstance(x.batch, Tensor)  # pyright: ignore


@dataclass(frozen=True, eq=False)
class GraphInputs:
    """A batch of PyTorch Geometric as the inputs of a model, which is called with the batch; an example is a graph.

    A layer with as many rows as the batch has nodes, or edges, is one on nodes, or on edges. Where both are as many, and not so in each
    graph, a batch does not tell; `parts_told_apart` splits it.

    Attributes:
        batch: the batch.
    """

    batch: GeometricBatch

    def __len__(self) -> int:
        return self.batch.num_graphs

    def __getitem__(self, chosen: slice) -> GraphInputs:
        """Some of the graphs."""
        places = range(len(self))[chosen]
        return self if len(places) == len(self) and places.step == 1 else self.select(places)

    def select(self, places: Sequence[int]) -> GraphInputs:
        """The graphs at some places, in that order; one may come twice."""
        return GraphInputs(type(self.batch).from_data_list(self.batch.index_select(list(places))))

    def clone(self) -> GraphInputs:
        """The same graphs in tensors of their own."""
        return GraphInputs(self.batch.clone() if hasattr(self.batch, "clone") else copy.deepcopy(self.batch))  # type: ignore

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.batch.batch.device

    @cached_property
    def examples(self) -> GraphExamples:
        """The graphs, with those of each node and each edge."""
        of_nodes = self.batch.batch
        edges = getattr(self.batch, "edge_index", None)
        of_edges = (of_nodes[edges[0]],) if isinstance(edges, Tensor) and not edges.is_sparse else ()
        return GraphExamples(len(self), True, (of_nodes, *of_edges))


def parts_told_apart(x: Any, parts: Iterable[slice]) -> Iterator[slice]:
    """Slices of a batch, and in place of those whose numbers of rows do not tell nodes from edges, slices of one graph each.

    Of one graph all rows are of the same example, whatever they are.
    """
    for part in parts:
        if isinstance(x, GraphInputs) and not x[part].examples.are_told_apart:
            yield from (slice(n, n + 1) for n in range(len(x))[part])
        else:
            yield part


def places_told_apart(x: Any, places: list[int]) -> list[int]:
    """Places of graphs whose numbers of rows tell nodes from edges: these, some of them more than once, or the first alone."""
    if not isinstance(x, GraphInputs):
        return places
    for more in ([], *([place] * n for n in (1, 2) for place in places)):
        if x.select([*places, *more]).examples.are_told_apart:
            return [*places, *more]
    return places[:1]
