"""Batches of graphs: the nodes of several graphs in one tensor, with an index that says which graph each belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.errors import InvalidBatchError
from laplace_ws.values import tensor


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """Several graphs combined into one disconnected graph; an example is a graph.

    A layer on nodes or edges says so where the forward pass calls it, `with row_examples(batch.graph):` or
    `with row_examples(batch.graph_of_edge):`.

    Attributes:
        nodes: features of the nodes, `[V, F]` (or indices, `[V]`).
        edges: source and target node of each edge, `[2, E]`.
        graph: graph of each node, `[V]`, 0 … N−1.
        n_graphs: N.
    """

    nodes: Float[Tensor, "V F"]
    edges: Int[Tensor, "2 E"]
    graph: Int[Tensor, " V"]
    n_graphs: int

    def __post_init__(self) -> None:
        for name in ("nodes", "edges", "graph"):
            tensor(name, getattr(self, name), "of nodes [V, F], edges [2, E] or graphs [V]")
        if self.edges.ndim != 2 or len(self.edges) != 2:
            raise InvalidBatchError(
                f"edges must be [2, E], source and target of each edge, got {tuple(self.edges.shape)}."
            )
        if self.graph.shape != self.nodes.shape[:1]:
            raise InvalidBatchError(
                f"graph must name the graph of each of the {len(self.nodes)} nodes, got {tuple(self.graph.shape)}."
            )
        if self.edges.is_floating_point() or self.graph.is_floating_point():
            raise InvalidBatchError(
                f"edges and graph must hold integers, but they are {self.edges.dtype} and {self.graph.dtype}."
            )

    @classmethod
    def from_graphs(cls, graphs: Sequence[tuple[Tensor, Tensor]]) -> GraphBatch:
        """Join graphs, each given as its nodes `[v, F]` and edges `[2, e]`.

        Raises:
            InvalidBatchError: there is no graph, or an edge names a node that its graph does not have.
        """
        if not graphs:
            raise InvalidBatchError("a batch needs one graph at least.")
        for number, (nodes, edges) in enumerate(graphs):
            tensor(f"the nodes of graph {number}", nodes, "[v, F]")
            tensor(f"the edges of graph {number}", edges, "[2, e], source and target of each edge", 2)
            if nodes.shape[1:] != graphs[0][0].shape[1:]:
                found, first = list(nodes.shape[1:]), list(graphs[0][0].shape[1:])
                raise InvalidBatchError(
                    f"the nodes of graph {number} have features {found}, those of graph 0 {first}; give all graphs the same."
                )
        sizes = [len(nodes) for nodes, _ in graphs]
        for number, (size, (_, edges)) in enumerate(zip(sizes, graphs, strict=True)):
            if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < size:
                wrong = int(edges.min()) if edges.min() < 0 else int(edges.max())
                raise InvalidBatchError(f"graph {number} has {size} nodes, but an edge names node {wrong}.")
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()
        nodes = torch.cat([nodes for nodes, _ in graphs])
        edges = torch.cat([edges + start for start, (_, edges) in zip(starts, graphs, strict=True)], 1)
        graph = torch.arange(len(graphs)).repeat_interleave(torch.tensor(sizes)).to(nodes.device)
        return cls(nodes, edges, graph, len(graphs))

    @classmethod
    def collate(cls, pairs: Sequence[tuple[tuple[Tensor, Tensor], Tensor]]) -> tuple[GraphBatch, Tensor]:
        """A batch (x, y) from pairs ((nodes, edges), target): the `collate_fn` of a `DataLoader`."""
        return cls.from_graphs([graph for graph, _ in pairs]), torch.stack([torch.as_tensor(y) for _, y in pairs])

    def __len__(self) -> int:
        return self.n_graphs

    def __getitem__(self, chosen: slice) -> GraphBatch:
        """The graphs of a slice.

        Raises:
            TypeError: a number; graphs are taken by slices, `batch[2:3]`.
        """
        if isinstance(chosen, int):
            raise TypeError(f"take graphs of a batch by a slice, batch[{chosen}:{chosen + 1}].")
        numbers = torch.arange(self.n_graphs, device=self.graph.device)[chosen]
        new_number = self.graph.new_full((self.n_graphs,), -1)
        new_number[numbers] = torch.arange(len(numbers), device=self.graph.device)
        kept = new_number[self.graph] >= 0
        new_node = kept.cumsum(0) - 1
        edges = self.edges[:, kept[self.edges[0]]]
        return GraphBatch(self.nodes[kept], new_node[edges], new_number[self.graph[kept]], len(numbers))

    def select(self, places: Sequence[int]) -> GraphBatch:
        """The graphs at some places, in that order; one may come twice."""
        parts = [self[place : place + 1] for place in places]
        return GraphBatch.from_graphs([(part.nodes, part.edges) for part in parts])

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.nodes.device

    def to(self, *args: Any, **kwargs: Any) -> GraphBatch:
        """Move to a device, and the nodes to a type; see `Tensor.to`."""
        nodes = self.nodes.to(*args, **kwargs)
        return GraphBatch(nodes, self.edges.to(nodes.device), self.graph.to(nodes.device), self.n_graphs)

    @property
    def graph_of_edge(self) -> Int[Tensor, " E"]:
        """Graph of each edge."""
        return self.graph[self.edges[0]]

    def mean(self, h: Float[Tensor, "V D"]) -> Float[Tensor, "N D"]:
        """Mean over the nodes of each graph; zero for a graph without nodes."""
        sizes = torch.bincount(self.graph, minlength=self.n_graphs).clamp(min=1)
        return h.new_zeros(self.n_graphs, h.shape[1]).index_add(0, self.graph, h) / sizes[:, None]
