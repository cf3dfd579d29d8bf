"""The factors that KFAC averages, against those of a fit, in float64."""

import pytest
import torch
from cases import CASES, LINEAR_CASES, N, double
from torch import nn

from laplace_ws import UnsupportedParameterError, kron_factors, make_likelihood, row_examples
from laplace_ws.data import GraphBatch
from laplace_ws.errors import CurvatureWarning
from laplace_ws.optim import KFAC

BY_NAME = {case.name: case for case in CASES}


def in_training(case):
    """A case whose network is the same function in train mode as in eval mode."""
    model, x, y = case.make()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    return model, x, y


def of_one_pass(model, loss_of_outputs, x, **options):
    """The curvature after one step that moves nothing."""
    optimizer = KFAC(model, lr=0.0, loss_reduction="sum", **options)
    loss_of_outputs(model(x)).backward()
    optimizer.step()
    return optimizer.kron(n_data=len(x)), optimizer


def assert_equal_blocks(found, truth, covered=None):
    assert found
    for name in found if covered is None else covered:
        mine, other = found[name], truth[name]
        if mine.shape != other.shape or (mine.A is None) != (other.A is None):
            raise AssertionError(name)
        torch.testing.assert_close(mine.to_dense(), other.to_dense(), rtol=1e-10, atol=1e-12)
        if mine.A is not None:
            torch.testing.assert_close(mine.A, other.A, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(
                torch.as_tensor(mine.n_inputs).double(), torch.as_tensor(other.n_inputs).double(), rtol=1e-12, atol=0
            )


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_factors_of_linear_networks_are_those_of_a_fit(case, setting, approx):
    model, x = double(case.make_model(setting)), case.make_x()
    y = torch.randn_like(model(x))
    likelihood = make_likelihood("regression")
    found, optimizer = of_one_pass(model, lambda f: likelihood.nll_sum(f, y), x, kfac_approx=approx)
    truth = kron_factors(model, likelihood, [(x, y)], curvature="ef", kfac_approx=approx)
    grouped = {layer.bias for layer in optimizer.layers.values() if layer.groups > 1}
    assert_equal_blocks(found, truth, [name for name in found if name not in grouped])
    for name in grouped - {None}:  # terms between groups are left out
        blocks = found[name].B
        torch.testing.assert_close(blocks, truth[name].B * (blocks != 0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_factors_of_networks_are_those_of_a_fit(case, approx):
    model, x, y = in_training(case)
    likelihood = make_likelihood(case.likelihood)
    found, optimizer = of_one_pass(model, lambda f: likelihood.nll_sum(f, y), x, kfac_approx=approx)
    truth = kron_factors(model, likelihood, [(x, y)], curvature="ef", kfac_approx=approx)
    of_groups = {layer.bias for layer in optimizer.layers.values() if layer.groups > 1}
    assert_equal_blocks(found, truth, [name for name in found if name not in of_groups])


@pytest.mark.parametrize("curvature", ["ggn", "ggn_mc", "ggn_mc_rademacher"])
@pytest.mark.parametrize("name", ["cnn", "vision-transformer", "mlp-tokens", "mlp-regression", "message-passing"])
def test_curvature_of_a_likelihood_is_that_of_a_fit(name, curvature):
    case = BY_NAME[name]
    model, x, y = in_training(case)
    likelihood, drawn = make_likelihood(case.likelihood), torch.Generator().manual_seed(3)
    other = torch.Generator().manual_seed(3)
    found, _ = of_one_pass(
        model, lambda f: 7 * likelihood.nll_sum(f, y), x, curvature=curvature, likelihood=likelihood, generator=drawn
    )
    truth = kron_factors(model, likelihood, [(x, y)], curvature=curvature, kfac_approx="expand", generator=other)
    assert_equal_blocks(found, truth)


def test_columns_leave_the_gradients_of_training_alone():
    model, x, y = in_training(BY_NAME["cnn"])
    optimizer = KFAC(model, lr=0.0, curvature="ggn", likelihood="classification")
    nn.functional.cross_entropy(model(x), y).backward()
    found = [p.grad.clone() for p in model.parameters()]
    optimizer._capture.remove()
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters(), strict=True))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_two_half_batches_are_one(approx):
    model, _, _ = in_training(BY_NAME["cnn"])
    x, y = torch.randn(6, 2, 4, 4).double(), torch.tensor([0, 1, 2, 2, 1, 0])
    krons = []
    for parts in ([slice(0, 6)], [slice(0, 3), slice(3, 6)]):
        optimizer = KFAC(model, lr=0.0, kfac_approx=approx)
        optimizer.zero_grad()
        for part in parts:
            (nn.functional.cross_entropy(model(x[part]), y[part]) / len(parts)).backward()
        optimizer.step()
        krons.append(optimizer.kron(6))
    assert_equal_blocks(*krons)
    truth = kron_factors(model, "classification", [(x, y)], curvature="ef", kfac_approx=approx)
    assert_equal_blocks(krons[1], truth)


def test_two_forward_passes_of_one_loss_add_up():
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x, z = torch.randn(4, 3).double(), torch.randn(2, 3).double()
    optimizer = KFAC(model, lr=0.0, loss_reduction="sum")
    (model(x).square().sum() + model(z).square().sum()).backward()
    optimizer.step()
    whole, _ = of_one_pass(model, lambda f: f.square().sum(), torch.cat([x, z]))
    assert_equal_blocks(optimizer.kron(6), whole)


def test_averages_are_decayed_and_weigh_one():
    model = double(nn.Linear(3, 2))
    xs = [torch.randn(4, 3).double() for _ in range(3)]
    single = [of_one_pass(model, lambda f: f.square().sum(), x)[0] for x in xs]
    optimizer = KFAC(model, lr=0.0, loss_reduction="sum", factor_decay=0.7)
    for x in xs:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    weights = torch.tensor([0.49, 0.7, 1.0], dtype=torch.float64)
    weights /= weights.sum()
    for factor in ("A", "B"):
        mean = sum(w * getattr(kron["weight"], factor) for w, kron in zip(weights, single, strict=True))
        torch.testing.assert_close(getattr(optimizer.kron(4)["weight"], factor), mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["cnn", "grouped-conv", "vision-transformer", "transformer-first-token"])
def test_blocks_are_those_of_the_whole_factor(name, approx):
    model, x, y = in_training(BY_NAME[name])
    loss = lambda f: nn.functional.cross_entropy(f, y, reduction="sum")  # noqa: E731
    _, whole = of_one_pass(model, loss, x, kfac_approx=approx)
    _, blocked = of_one_pass(model, loss, x, kfac_approx=approx, max_factor_dim=3)
    n_blocks = 0
    for weight, layer in blocked.layers.items():
        p = dict(model.named_parameters())[weight]
        for factor, form in (("factor_A", layer.A), ("factor_B", layer.B)):
            found, truth = blocked.state[p][factor], whole.state[p][factor]
            n_blocks = max(n_blocks, form.n_blocks)
            if form.is_diagonal:
                torch.testing.assert_close(found, truth)
                continue
            b, near = form.block_size, torch.arange(form.size) // form.block_size
            assert b <= 3
            assert found.shape[-2:] == ((b, b) if form.n_blocks > 1 else (form.size, form.size))
            mask = near[:, None] == near
            torch.testing.assert_close(form.to_dense(found), truth * mask, rtol=1e-10, atol=1e-12)
    assert n_blocks > 2


# ------------------------------------------------------------------ graphs


class PlainGraphNet(nn.Module):
    """Layers on nodes and edges that are plain tensors."""

    def __init__(self, declares=False):
        super().__init__()
        self.of_nodes, self.of_edges, self.head = nn.Linear(2, 3), nn.Linear(6, 3), nn.Linear(3, 1)
        self.declares = declares

    def forward(self, nodes, edges, graph, n_graphs):
        with row_examples(graph if self.declares else None):
            h = torch.tanh(self.of_nodes(nodes))
        with row_examples(graph[edges[0]] if self.declares else None):
            m = torch.tanh(self.of_edges(torch.cat([h[edges[0]], h[edges[1]]], 1)))
        h = h.index_add(0, edges[1], m)
        return self.head(h.new_zeros(n_graphs, 3).index_add(0, graph, h))


class OnBatches(nn.Module):
    """The same network on `GraphBatch`."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        net.declares = True

    def forward(self, batch):
        return PlainGraphNet.forward(self.net, batch.nodes, batch.edges, batch.graph, len(batch))


def a_batch_of_graphs():
    sizes = [(3, 4), (2, 1), (4, 6)]
    return GraphBatch.from_graphs([(torch.randn(v, 2).double(), torch.randint(0, v, (2, e))) for v, e in sizes])


class NumberFirst(PlainGraphNet):
    """The same, with arguments that do not tell the number of examples."""

    def forward(self, n_graphs, nodes, edges, graph):
        return super().forward(nodes, edges, graph, n_graphs)


@pytest.mark.parametrize("declares", [False, True])
@pytest.mark.parametrize("kind", [PlainGraphNet, NumberFirst])
def test_expand_needs_no_examples_of_rows(kind, declares):
    net, batch = double(kind(declares)), a_batch_of_graphs()
    y = torch.randn(3, 1).double()
    optimizer = KFAC(net, lr=0.0, loss_reduction="mean")
    tensors = (batch.nodes, batch.edges, batch.graph)
    f = net(*tensors, 3) if kind is PlainGraphNet else net(3, *tensors)
    (nn.functional.mse_loss(f, y) / 2).backward()
    optimizer.step()
    truth = kron_factors(OnBatches(net), "regression", [(batch, y)], curvature="ef", kfac_approx="expand")
    found = optimizer.kron(3)
    assert len(found) == 6
    for name, block in found.items():
        torch.testing.assert_close(block.to_dense(), truth[f"net.{name}"].to_dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_batches_of_graphs_tell_their_examples(approx):
    model, batch = OnBatches(double(PlainGraphNet())), a_batch_of_graphs()
    y = torch.randn(3, 1).double()
    found, _ = of_one_pass(model, lambda f: (f - y).square().sum() / 2, batch, kfac_approx=approx)
    truth = kron_factors(model, "regression", [(batch, y)], curvature="ef", kfac_approx=approx)
    assert_equal_blocks(found, truth)


def test_reduce_refuses_rows_of_unknown_examples():
    net, batch = double(PlainGraphNet()), a_batch_of_graphs()
    optimizer = KFAC(net, kfac_approx="reduce")
    with pytest.raises(UnsupportedParameterError, match=r"'of_nodes.weight' needs to know .* 3 examples .* 9 rows"):
        net(batch.nodes, batch.edges, batch.graph, 3)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert not optimizer.state


def test_rows_of_tokens_count_once_each():
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    x = torch.randn(N, 6, 3).double()
    kron, _ = of_one_pass(model, lambda f: f.square().sum(), x)
    assert kron["0.weight"].n_inputs == pytest.approx(N * 6)


# ------------------------------------------------------------------ which example a row belongs to


class TimeFirst(nn.Module):
    """Layers on the time as the first axis."""

    def __init__(self, flattens=False):
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.flattens = flattens

    def forward(self, x, *, scale=1.0):
        h = x.transpose(0, 1)  # [T, N, 3]
        h = h.reshape(-1, 3) if self.flattens else h
        h = self.outer(torch.tanh(self.inner(h))) * scale
        return self.head(torch.tanh(h.unflatten(0, (x.shape[1], -1)) if self.flattens else h).mean(0))


@pytest.mark.parametrize("n_steps", [4, 8, 6, 5])
@pytest.mark.parametrize("by_name", [False, True])
def test_reduce_finds_the_examples_where_the_time_comes_first(n_steps, by_name):
    model, x, y = double(TimeFirst()), torch.randn(4, n_steps, 3).double(), torch.randn(4, 2).double()
    likelihood, state = make_likelihood("regression"), torch.get_rng_state()
    optimizer = KFAC(model, lr=0.0, loss_reduction="sum", kfac_approx="reduce")
    likelihood.nll_sum(model(x=x, scale=1.0) if by_name else model(x), y).backward()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    truth = kron_factors(model, likelihood, [(x, y)], curvature="ef", kfac_approx="reduce")
    assert_equal_blocks(optimizer.kron(4), truth)


def test_reduce_refuses_rows_in_another_order():
    model, x = double(TimeFirst(flattens=True)), torch.randn(4, 8, 3).double()
    optimizer = KFAC(model, lr=0.1, kfac_approx="reduce")
    with pytest.raises(
        UnsupportedParameterError, match=r"K-FAC-reduce of 'inner.weight' needs its rows grouped by example"
    ):
        model(x)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert not optimizer.state
    KFAC(model, lr=0.1, kfac_approx={"head.*": "reduce"})
    model(x).sum().backward()  # the optimizer that refused is gone


def test_rows_are_looked_at_again_when_a_network_uses_its_weights_otherwise():
    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head, self.turns = nn.Linear(3, 4), nn.Linear(4, 2), False

        def forward(self, x):
            if self.turns:
                return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0)) + self.head(
                    x.mean(1) @ x.new_ones(3, 4)
                )
            return self.head(torch.tanh(self.inner(x)).mean(1))

    model, x = double(Turning()), torch.randn(4, 8, 3).double()
    optimizer = KFAC(model, lr=0.0, loss_reduction="sum", kfac_approx="reduce", factor_decay=0.0)
    for model.turns in (False, True, True):
        optimizer.zero_grad()
        model(x).square().sum().div(2).backward()
        optimizer.step()
    y = torch.zeros(4, 2).double()
    truth = kron_factors(model, "regression", [(x, y)], curvature="ef", kfac_approx="reduce")
    assert_equal_blocks(optimizer.kron(4), truth)
    assert optimizer.state_dict()["kfac"]["time_first"] == ["inner.bias", "inner.weight"]


def test_what_cannot_be_checked_is_said():
    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x).mean(1).square().mean()

    model = double(Losses())
    optimizer = KFAC(model, kfac_approx="reduce")
    with pytest.warns(
        CurvatureWarning, match="the network returns no outputs .* so that it is not known whether rows are"
    ):
        model(torch.randn(4, 6, 3).double()).backward()
    optimizer.step()
    model.forward = lambda x: model.layer(x[[4, 3, 2, 1, 0]]).mean(1)
    other = KFAC(model, kfac_approx="reduce")
    with pytest.warns(CurvatureWarning, match=r"cannot be run on a few examples of a batch \(IndexError\)"):
        model(torch.randn(5, 6, 3).double())
    del other
