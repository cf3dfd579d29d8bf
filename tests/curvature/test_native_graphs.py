"""Layers on nodes and edges of graphs."""

import pytest
import torch
from cases import double
from torch import nn

from laplace_ws import InvalidBatchError, UnsupportedParameterError, kron_factors, row_examples
from laplace_ws.curvature import FACTOR_BACKENDS, exact
from laplace_ws.data import GraphBatch


class ReadOut(nn.Module):
    """A deep linear network on nodes, and their mean."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, batch):
        with row_examples(batch.graph):
            return batch.mean(self.last(self.first(batch.nodes)))


def graphs(*sizes):
    return GraphBatch.from_graphs([(torch.randn(v, 2).double(), torch.randint(0, v, (2, e))) for v, e in sizes])


def test_reduce_is_exact_for_a_mean_over_unequal_numbers_of_nodes():
    model, x, y = double(ReadOut()), graphs((3, 2), (1, 4), (5, 0)), torch.randn(3, 2).double()
    truth, slices = exact.ggn(model, "regression", x, y), exact.parameter_slices(model)
    reduce = kron_factors(model, "regression", [(x[:2], y[:2]), (x[2:], y[2:])], kfac_approx="reduce")
    expand = kron_factors(model, "regression", [(x, y)], kfac_approx="expand")
    for name, where in slices.items():
        torch.testing.assert_close(reduce[name].to_dense(), truth[where, where], rtol=1e-10, atol=1e-12)
        assert not torch.allclose(expand[name].to_dense(), truth[where, where], rtol=1e-2)


def test_factors_of_graphs_are_sums_over_nodes():
    model, x, y = double(ReadOut()), graphs((3, 2), (1, 4), (5, 0)), torch.randn(3, 2).double()
    expand = kron_factors(model, "regression", [(x, y)], kfac_approx="expand")["first.weight"]
    torch.testing.assert_close(expand.A, x.nodes.T @ x.nodes / 9)
    J = model.last.weight.detach()  # each node's share of the mean
    torch.testing.assert_close(expand.B, J.T @ J * (1 / 3 + 1 + 1 / 5))


class Undeclared(ReadOut):
    def forward(self, batch):
        return batch.mean(self.last(self.first(batch.nodes)))


class WrongIndex(ReadOut):
    def forward(self, batch):
        with row_examples(batch.graph_of_edge):
            return batch.mean(self.last(self.first(batch.nodes)))


@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
@pytest.mark.parametrize("sizes", [((3, 2), (2, 2), (2, 2)), ((2, 1), (2, 1), (2, 1))], ids=["uneven", "even"])
@pytest.mark.parametrize(
    ("net", "says"),
    [
        (Undeclared, r"\(say which example each row belongs to: with laplace_ws.row_examples\(index\)"),
        (WrongIndex, r"has other rows than the \d+ that row_examples declares"),
    ],
)
def test_rows_of_graphs_are_declared_or_refused(net, says, sizes, backend):
    """Also where there are as many of each graph: the next batch may have other numbers."""
    with pytest.raises(UnsupportedParameterError, match=f"'first.weight' is used by .*{says}"):
        kron_factors(double(net()), "regression", [(graphs(*sizes), torch.randn(3, 2).double())], backend=backend)


def declared(index):
    def forward(net, batch):
        with row_examples(index(batch)):
            return batch.mean(net.last(net.first(batch.nodes)))

    return type("Declared", (ReadOut,), {"forward": forward})


BAD_GRAPHS = {
    "index of floats": lambda: declared(lambda b: b.graph.double())()(graphs((3, 2))),
    "index of two axes": lambda: declared(lambda b: b.graph[None])()(graphs((3, 2))),
    "no graph": lambda: GraphBatch.from_graphs([]),
    "negative node": lambda: GraphBatch.from_graphs([(torch.randn(2, 2), torch.tensor([[0], [-1]]))]),
    "edges by row": lambda: GraphBatch(torch.randn(3, 2), torch.zeros(4, 2), torch.zeros(3).long(), 1),
    "graph of too few nodes": lambda: GraphBatch(torch.randn(3, 2), torch.zeros(2, 4), torch.zeros(2).long(), 1),
    "one graph by its number": lambda: graphs((3, 2))[0],
}
SAYS = {
    "index of floats": "row_examples takes integers",
    "index of two axes": "row_examples takes integers",
    "no graph": "a batch needs one graph at least",
    "negative node": "names node -1",
    "edges by row": r"edges must be \[2, E\], .* got \(4, 2\)",
    "graph of too few nodes": r"each of the 3 nodes, got \(2,\)",
    "one graph by its number": r"batch\[0:1\]",
}


@pytest.mark.parametrize("name", BAD_GRAPHS)
def test_bad_graphs_are_refused_in_one_sentence(name):
    with pytest.raises((InvalidBatchError, TypeError), match=SAYS[name]):
        BAD_GRAPHS[name]()


def test_the_index_of_rows_is_not_that_of_others():
    class Swapped(ReadOut):
        def forward(self, batch):
            with row_examples(batch.graph.flip(0)):
                return batch.mean(self.last(self.first(batch.nodes)))

    with pytest.raises(UnsupportedParameterError, match="rows that are not grouped by example"):
        kron_factors(double(Swapped()), "regression", [(graphs((3, 2), (1, 2)), torch.randn(2, 2).double())])
