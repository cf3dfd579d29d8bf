"""Batches of graphs as PyTorch Geometric gives them: a class with the same attributes, and the library where it is installed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from cases import double
from torch import Tensor, nn

from laplace_ws import (
    InvalidBatchError,
    Laplace,
    UnsupportedParameterError,
    kron_factors,
    load_posterior,
    marglik_training,
    row_examples,
)
from laplace_ws.curvature import exact, jacobians
from laplace_ws.curvature.forward import probe
from laplace_ws.curvature.graph_inputs import GraphInputs, parts_told_apart
from laplace_ws.curvature.inputs import as_inputs

LABELS = torch.tensor([0, 2, 1, 1, 0])
EDGES_PER_GRAPH = {
    "unequal": [(3, 7), (1, 0), (4, 5), (2, 3), (3, 1)],
    "as many edges as nodes": [(3, 5), (1, 0), (4, 4), (2, 3), (3, 1)],
    "as many edges as graphs": [(3, 0), (1, 0), (4, 2), (2, 2), (3, 1)],
    "as many in each graph": [(3, 3), (1, 1), (4, 4), (2, 2), (3, 3)],
}


@dataclass
class Graph:
    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor


@dataclass
class Batch(Graph):
    """As much of `torch_geometric.data.Batch` as a model and a fit see."""

    batch: Tensor
    ptr: Tensor
    num_graphs: int
    graphs: list[Graph] = field(repr=False, default_factory=list)
    y: Tensor | None = None

    @classmethod
    def from_data_list(cls, data_list: list[Graph]) -> Batch:
        sizes = torch.tensor([len(graph.x) for graph in data_list])
        ptr = torch.cat([torch.zeros(1).long(), sizes.cumsum(0)])
        return cls(
            torch.cat([graph.x for graph in data_list]),
            torch.cat([graph.edge_index + start for graph, start in zip(data_list, ptr, strict=False)], 1),
            torch.cat([graph.edge_attr for graph in data_list]),
            torch.arange(len(data_list)).repeat_interleave(sizes),
            ptr,
            len(data_list),
            data_list,
        )

    def index_select(self, idx) -> list[Graph]:
        return [self.graphs[i] for i in idx]

    def mean(self, h: Tensor) -> Tensor:
        total = torch.zeros(self.num_graphs, h.shape[1]).to(h).index_add(0, self.batch, h)
        return total / self.ptr.diff()[:, None]


def batch_of(sizes, y=None, seed=0) -> Batch:
    torch.manual_seed(seed)
    graphs = [
        Graph(torch.randn(v, 2).double(), torch.randint(0, v, (2, e)), torch.randn(e, 3).double()) for v, e in sizes
    ]
    return replace(Batch.from_data_list(graphs), y=y)


class NodesAndEdges(nn.Module):
    """Layers on nodes, on edges and on graphs, of which none says what its rows are."""

    def __init__(self):
        super().__init__()
        self.embed, self.edge, self.message = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(6, 3)
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, data):
        h = self.embed(data.x).tanh()
        source, target = data.edge_index
        messages = self.message(torch.cat([h[source], self.edge(data.edge_attr).tanh()], 1)).tanh()
        return self.head(data.mean(self.norm(h.index_add(0, target, messages))).tanh())


class ReadOut(nn.Module):
    """A deep linear network on nodes, and their mean."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, data):
        return data.mean(self.last(self.first(data.x)))


@pytest.mark.parametrize("sizes", EDGES_PER_GRAPH.values(), ids=EDGES_PER_GRAPH)
@pytest.mark.parametrize("backend", ["native", "asdl"])
def test_curvature_and_predictions_are_those_of_dense_algebra(sizes, backend):
    data = batch_of(sizes, LABELS)
    model = double(NodesAndEdges())
    truth = exact.ggn(model, "classification", as_inputs(data), LABELS)
    full = Laplace(model, "classification", hessian_structure="full", backend=backend).fit([data])
    diag = Laplace(model, "classification", hessian_structure="diag", backend=backend).fit([(data, LABELS)])
    torch.testing.assert_close(full.H.to_dense(), truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(diag.H.to_dense().diagonal(), truth.diagonal(), rtol=1e-10, atol=1e-12)
    J = exact.jacobian(model, as_inputs(data))
    sigma = torch.linalg.inv(truth + torch.eye(len(truth)).to(truth))
    f, covariance = full.functional_moments(data)
    torch.testing.assert_close(covariance, J @ sigma @ J.mT, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(f, model(data).detach())


@pytest.mark.parametrize("sizes", EDGES_PER_GRAPH.values(), ids=EDGES_PER_GRAPH)
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_factors_are_those_of_declared_rows(sizes, kfac_approx):
    """Rows that the number tells against rows that the forward pass declares, graph by graph."""

    class Declared(NodesAndEdges):
        def forward(self, data):
            source, target = data.edge_index
            with row_examples(data.batch):
                h = self.embed(data.x).tanh()
            with row_examples(data.batch[source]):
                edges = self.edge(data.edge_attr).tanh()
                messages = self.message(torch.cat([h[source], edges], 1)).tanh()
            with row_examples(data.batch):
                h = self.norm(h.index_add(0, target, messages))
            return self.head(data.mean(h).tanh())

    data = batch_of(sizes, LABELS)
    model = double(NodesAndEdges())
    declared = Declared().double()
    declared.load_state_dict(model.state_dict())
    found = kron_factors(model, "classification", [data], kfac_approx=kfac_approx)
    truth = kron_factors(declared, "classification", [data], kfac_approx=kfac_approx)
    for name in truth:
        torch.testing.assert_close(found[name].to_dense(), truth[name].to_dense(), rtol=1e-10, atol=1e-12)


def test_reduce_is_exact_for_a_mean_over_unequal_numbers_of_nodes():
    model, data, y = double(ReadOut()), batch_of(EDGES_PER_GRAPH["unequal"]), torch.randn(5, 2).double()
    truth, slices = exact.ggn(model, "regression", as_inputs(data), y), exact.parameter_slices(model)
    parts = [(GraphInputs(data)[part].batch, y[part]) for part in (slice(0, 2), slice(2, 5))]
    reduce = kron_factors(model, "regression", parts, kfac_approx="reduce")
    expand = kron_factors(model, "regression", [(data, y)], kfac_approx="expand")
    for name, where in slices.items():
        torch.testing.assert_close(reduce[name].to_dense(), truth[where, where], rtol=1e-10, atol=1e-12)
        assert not torch.allclose(expand[name].to_dense(), truth[where, where], rtol=1e-2)


def test_batches_that_do_not_tell_nodes_from_edges_are_split():
    told, ambiguous = (GraphInputs(batch_of(EDGES_PER_GRAPH[name])) for name in ("unequal", "as many edges as nodes"))
    assert (told.examples.are_told_apart, ambiguous.examples.are_told_apart) == (True, False)
    assert list(parts_told_apart(told, [slice(0, 5)])) == [slice(0, 5)]
    assert list(parts_told_apart(ambiguous, [slice(0, 2), slice(0, 5)])) == [
        slice(0, 2),
        *(slice(n, n + 1) for n in range(5)),
    ]
    assert GraphInputs(batch_of(EDGES_PER_GRAPH["as many in each graph"])).examples.are_told_apart
    for name in EDGES_PER_GRAPH:
        assert probe(GraphInputs(batch_of(EDGES_PER_GRAPH[name]))).examples.are_told_apart
    with pytest.raises(UnsupportedParameterError, match="say which example each row belongs to"):
        jacobians(double(NodesAndEdges()), as_inputs(ambiguous.batch))


def test_a_probe_is_told_apart_where_its_graphs_are_not():
    x = GraphInputs(batch_of([(2, 3), (3, 2)]))
    assert not x.examples.are_told_apart
    assert probe(x).examples.are_told_apart
    assert len(probe(x)) > 1


def test_rows_that_are_neither_nodes_nor_edges_nor_graphs_are_refused():
    class Twice(ReadOut):
        def forward(self, data):
            h = self.first(torch.cat([data.x, data.x]))
            return data.mean(self.last(h[: len(data.x)] + h[len(data.x) :]))

    with pytest.raises(UnsupportedParameterError, match=r"'first.weight' is used by .*say which example each row"):
        kron_factors(double(Twice()), "regression", [(batch_of([(3, 2), (2, 7)]), torch.randn(2, 2).double())])


def test_nodes_in_another_order_are_noticed():
    class Turned(ReadOut):
        def forward(self, data):
            return data.mean(self.last(self.first(data.x.flip(0))).flip(0))

    with pytest.raises(UnsupportedParameterError, match="rows that are not grouped by example"):
        kron_factors(double(Turned()), "regression", [(batch_of([(3, 2), (1, 2)]), torch.randn(2, 2).double())])


def test_a_model_may_change_its_batch():
    class Changing(ReadOut):
        def forward(self, data):
            data.x = self.first(data.x)
            return data.mean(self.last(data.x))

    data, y = batch_of(EDGES_PER_GRAPH["unequal"]), torch.randn(5, 2).double()
    model, other = double(ReadOut()), Changing().double()
    other.load_state_dict(model.state_dict())
    truth = Laplace(model, "regression", hessian_structure="full").fit([(data, y)])
    found = Laplace(other, "regression", hessian_structure="full").fit([(data, y)])
    torch.testing.assert_close(found.H.to_dense(), truth.H.to_dense())
    torch.testing.assert_close(found.functional_moments(data)[1], truth.functional_moments(data)[1])
    assert data.x.shape == (13, 2)


def test_a_batch_without_targets_is_refused():
    with pytest.raises(InvalidBatchError, match=r"y of batch 0 is a NoneType but must be one tensor"):
        kron_factors(double(ReadOut()), "regression", [batch_of([(3, 2)])])


def test_training_and_files(tmp_path):
    data = [batch_of(EDGES_PER_GRAPH[name], LABELS) for name in ("unequal", "as many edges as nodes")]
    model = double(NodesAndEdges())
    la = marglik_training(model, data, "classification", n_epochs=2, n_epochs_burnin=0, marglik_frequency=1).la
    assert la.n_data == 10
    la.save(tmp_path / "posterior.pt")
    again = load_posterior(tmp_path / "posterior.pt", model)
    torch.testing.assert_close(again(data[0]), la(data[0]))


# ------------------------------------------------------------------ the library itself


def geometric():
    pytest.importorskip("torch_geometric")
    import torch_geometric.nn as gnn
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader

    class Convolutions(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.first, self.second, self.head = make(2, 4), make(4, 4), nn.Linear(4, 3)

        def forward(self, data):
            h = self.first(data.x, data.edge_index).tanh()
            h = self.second(h, data.edge_index).tanh()
            return self.head(gnn.global_mean_pool(h, data.batch))

    class EdgeFeatures(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = gnn.NNConv(2, 4, nn.Linear(3, 8)), nn.Linear(4, 3)

        def forward(self, data):
            h = self.conv(data.x, data.edge_index, data.edge_attr).tanh()
            return self.head(gnn.global_add_pool(h, data.batch))

    def gin(n_in, n_out):
        layers = nn.Sequential(nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.Tanh(), nn.Linear(n_out, n_out))
        return gnn.GINConv(layers, train_eps=True)

    def data_set(sizes):
        whole = batch_of(sizes)
        return [
            Data(x=graph.x, edge_index=graph.edge_index, edge_attr=graph.edge_attr, y=y[None])
            for graph, y in zip(whole.graphs, LABELS, strict=True)
        ]

    nets = {
        "gcn": lambda: Convolutions(gnn.GCNConv),
        "sage": lambda: Convolutions(gnn.SAGEConv),
        "gat": lambda: Convolutions(gnn.GATConv),
        "gin": lambda: Convolutions(gin),
        "edge conv": lambda: Convolutions(lambda n_in, n_out: gnn.EdgeConv(nn.Linear(2 * n_in, n_out))),
        "edge features": EdgeFeatures,
    }
    return nets, data_set, DataLoader


@pytest.mark.parametrize("sizes", EDGES_PER_GRAPH.values(), ids=EDGES_PER_GRAPH)
@pytest.mark.parametrize("name", ["gcn", "sage", "gat", "gin", "edge conv", "edge features"])
def test_networks_of_pytorch_geometric(name, sizes):
    nets, data_set, loader = geometric()
    model, data = double(nets[name]()).eval(), data_set(sizes)
    (whole,) = loader(data, batch_size=5)
    truth = exact.ggn(model, "classification", as_inputs(whole), LABELS)
    la = Laplace(model, "classification", hessian_structure="full").fit(loader(data, batch_size=3))
    torch.testing.assert_close(la.H.to_dense(), truth, rtol=1e-9, atol=1e-11)
    by_loader = kron_factors(model, "classification", loader(data, batch_size=2), kfac_approx="reduce")
    one_by_one = kron_factors(model, "classification", loader(data, batch_size=1), kfac_approx="reduce")
    for parameter in one_by_one:
        torch.testing.assert_close(
            by_loader[parameter].to_dense(), one_by_one[parameter].to_dense(), rtol=1e-9, atol=1e-11
        )
    J = exact.jacobian(model, as_inputs(whole))
    sigma = torch.linalg.inv(truth + torch.eye(len(truth)).to(truth))
    torch.testing.assert_close(la.functional_moments(whole)[1], J @ sigma @ J.mT, rtol=1e-7, atol=1e-9)
    assert la(whole).shape == (5, 3)
