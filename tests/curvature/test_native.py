"""The native backend beyond the conformance suite: sampled columns, invariances, what it cannot cover, attention and graphs."""

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Positions, double
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from laplace_ws import InvalidBatchError, Laplace, UnsupportedParameterError, kron_factors, row_examples
from laplace_ws.curvature import BACKENDS, compute, exact
from laplace_ws.curvature.native import _UseRecorder
from laplace_ws.data import GraphBatch
from laplace_ws.kfac import Examples


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.name.startswith("adapters")], ids=str
)  # those have no vector
def test_kron_of_one_example_and_position_is_the_gradient_outer_product(case):
    """With one example, blocks of what is used at one position are the outer product of its gradient."""
    model, x, y = case.make()
    kron = kron_factors(model, case.likelihood, [(x[:1], y[:1])], curvature="ef", kfac_approx="reduce")
    truth, slices = exact.empirical_fisher(model, case.likelihood, x[:1], y[:1]), exact.parameter_slices(model)
    assert list(kron) == list(slices)
    unshared = [name for name, block in kron.items() if block.A is None or case.name.startswith("mlp-regression")]
    assert unshared
    for name in unshared:
        torch.testing.assert_close(kron[name].to_dense(), truth[slices[name], slices[name]], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mc_samples", [1, 2, 5])
@pytest.mark.parametrize("likelihood", ["classification", "regression", "binary"])
def test_ggn_mc_is_unbiased_for_every_number_of_samples(likelihood, mc_samples):
    model, x = (
        double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))),
        torch.randn(1, 3, dtype=torch.float64),
    )
    y = torch.zeros(1, dtype=torch.long) if likelihood == "classification" else torch.zeros(1, 3, dtype=torch.float64)
    n = 20_000 // mc_samples
    many = [(x.expand(n, -1), y.expand(n, *y.shape[1:]))]
    estimate = kron_factors(model, likelihood, many, curvature="ggn_mc", mc_samples=mc_samples)
    truth = kron_factors(model, likelihood, [(x, y)], curvature="ggn")
    for name, block in truth.items():
        if block.A is not None:
            torch.testing.assert_close(estimate[name].A, block.A)
        # 20,000 draws in all: a relative standard error of about 1 %
        assert (estimate[name].B / n).trace() / block.B.trace() == pytest.approx(1, abs=0.05), name
        assert (estimate[name].B / n - block.B).norm() / block.B.norm() < 0.06, name


def test_ggn_mc_draws_fresh_samples_and_is_reproducible():
    model, x, y = CASES[0].make()
    draw = lambda g: kron_factors(model, "classification", [(x, y)], curvature="ggn_mc", generator=g).to_dense()  # noqa: E731
    generator = torch.Generator().manual_seed(1)
    first, second = draw(generator), draw(generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, draw(torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_split_and_permutation_change_nothing(case, kfac_approx):
    model, x, y = case.make()
    whole = kron_factors(model, case.likelihood, [(x, y)], kfac_approx=kfac_approx).to_dense()
    order = torch.randperm(len(x))
    split = kron_factors(
        model, case.likelihood, [(x[i], y[i]) for i in order.split(2)], kfac_approx=kfac_approx
    ).to_dense()
    torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-12)
    halves = [kron_factors(model, case.likelihood, [(x[i], y[i])], kfac_approx=kfac_approx) for i in order.split(3)]
    torch.testing.assert_close((halves[0] + halves[1]).to_dense(), whole, rtol=1e-10, atol=1e-12)


def test_parameter_order_changes_nothing():
    class Net(nn.Module):
        def __init__(self, names):
            super().__init__()
            layers = {"first": nn.Linear(3, 4), "last": nn.Linear(4, 2)}
            for name in names:
                setattr(self, name, layers[name])

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)))

    one, other = Net(["first", "last"]).double(), Net(["last", "first"]).double()
    other.load_state_dict(one.state_dict())
    data = [(torch.randn(5, 3).double(), torch.randn(5, 2).double())]
    a, b = (kron_factors(net, "regression", data) for net in (one, other))
    assert list(a) != list(b)
    for name in a:
        torch.testing.assert_close(a[name].to_dense(), b[name].to_dense(), rtol=1e-12, atol=0)


# ------------------------------------------------------------------ what cannot be covered


class Wrapped(nn.Module):
    def __init__(self, forward, **parameters):
        super().__init__()
        for name, value in parameters.items():
            setattr(self, name, value)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def weight(*shape):
    return nn.Parameter(torch.randn(*shape))


UNSUPPORTED = {
    "lstm": (
        Wrapped(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.LSTM(3, 2, batch_first=True)),
        r"'rnn.weight_ih_l0' is used by lstm",
    ),
    "attention beyond its inputs": (
        Wrapped(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(3, 1, batch_first=True, add_bias_kv=True)),
        r"'a.*' is used by multi_head_attention_forward, with keys and values beyond the inputs' own \(add_bias_kv",
    ),
    "attention without a batch": (
        Wrapped(lambda m, x: m.a(x[:, 0], x[:, 0], x[:, 0])[0], a=nn.MultiheadAttention(3, 1)),
        r"'a.*' is used by multi_head_attention_forward, on an input without a batch axis",
    ),
    "weight norm": (
        weight_norm(nn.Linear(3, 2)),
        r"'parametrizations.weight.original0' parametrises 'weight' .* fold it in with .*remove_parametrizations\(module, 'weight'\)",
    ),
    "spectral norm": (
        nn.Sequential(nn.Linear(3, 2), spectral_norm(nn.Linear(2, 2))),
        r"'1.parametrizations.weight.original' parametrises '1.weight' .* fold it in with .*remove_parametrizations\(module, 'weight'\)",
    ),
    "unused": (
        Wrapped(lambda m, x: m.a(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2)),
        r"'b.weight' requires grad but has no gradient \(it is not used",
    ),
    "indexing": (
        Wrapped(lambda m, x: F.linear(x, m.w[:2]), w=weight(3, 3)),
        r"'w' is used by linear, as a part or a view of itself",
    ),
    "two parameters": (Wrapped(lambda m, x: x * (m.a * m.b), a=weight(3), b=weight(3)), r"'a' is used by mul"),
    "batch statistics": (
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.Flatten()),
        r"'1.weight' is used by batch_norm, with statistics of the batch",
    ),
    "tied embedding": (
        Wrapped(lambda m, x: F.linear(F.embedding(x.long().abs() % 4, m.w).mean(1), m.w), w=weight(4, 5)),
        r"'w' is used by embedding and linear in roles that share no Kronecker block",
    ),
    "time first": (
        Wrapped(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(3, 2)),
        r"'a.weight' is used by linear, whose output \(2, 4, 2\) has no leading axis of the batch's 4 examples",
    ),
    "time first, as long as the batch": (
        Wrapped(lambda m, x: m.a(x.repeat(1, 2, 1).transpose(0, 1)).transpose(0, 1), a=nn.Linear(3, 2)),
        r"rows that are not grouped by example",
    ),
    "mixed examples": (
        Wrapped(lambda m, x: m.a(x) - m.a(x).mean(0), a=nn.Linear(3, 2)),
        r"rows that are not grouped by example",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_covered_is_named(name):
    model, message = UNSUPPORTED[name]
    x = torch.randn(4, 2, 3)
    with pytest.raises(UnsupportedParameterError, match=message):
        Laplace(model, "regression").check(x)
    with pytest.raises(UnsupportedParameterError, match=message):
        Laplace(model, "regression").fit([(x, torch.zeros_like(model(x)))])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parametrisation_by_hooks_is_named(backend):
    model = nn.Sequential(nn.Linear(3, 2), nn.utils.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(
        UnsupportedParameterError, match=r"'1' has a weight .* fold it in with torch.nn.utils.remove_weight_norm"
    ):
        Laplace(model, "regression", backend=backend)
    model[1].weight_g.requires_grad_(False)
    model[1].weight_v.requires_grad_(False)
    Laplace(model, "regression", backend=backend)
    nn.utils.remove_weight_norm(model[1].requires_grad_())
    Laplace(model, "regression", backend=backend).check(torch.randn(4, 3))


@pytest.mark.parametrize("tied_in", ["diag", "full"])
def test_an_embedding_tied_to_the_output_layer_has_a_diagonal_and_a_full_matrix(tied_in):
    model = double(UNSUPPORTED["tied embedding"][0])
    x, y = torch.randint(0, 4, (5, 3)), torch.randn(5, 4).double()
    la = Laplace(model, "regression", hessian_structure=tied_in)
    la.fit([(x, y)])
    truth = exact.ggn(model, "regression", x, y)
    torch.testing.assert_close(la.H.to_dense(), truth if tied_in == "full" else truth.diagonal().diag())


@pytest.mark.parametrize("parametrise", [weight_norm, spectral_norm])
def test_a_parametrisation_folded_in_is_covered(parametrise):
    model = nn.Sequential(parametrise(nn.Linear(3, 2)), nn.Tanh(), nn.Linear(2, 2))
    remove_parametrizations(model[0], "weight")
    kron = kron_factors(model, "regression", [(torch.randn(4, 3), torch.randn(4, 2))])
    assert set(kron) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_the_way_out_works():
    model, _ = UNSUPPORTED["unused"]
    model.b.requires_grad_(False)
    la = Laplace(model, "regression")
    la.fit([(torch.randn(4, 3), torch.randn(4, 2))])
    assert la.parameter_names == ("a.weight", "a.bias")
    model.b.requires_grad_(True)


def test_input_changed_in_place_is_noticed():
    model = Wrapped(lambda m, x: (m.a(h := x * 1), h.add_(1))[0], a=nn.Linear(3, 2))
    with pytest.raises(UnsupportedParameterError, match="an input of linear was changed in place"):
        Laplace(model, "regression").check(torch.randn(4, 3))


def test_no_weight_gradient_and_one_forward(monkeypatch):
    """The point of the backend: the graph is walked to the layers' outputs, never into a weight."""
    model, x, y = next(c for c in CASES if c.name == "fixup").make()
    calls = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    for p in model.parameters():
        p.register_hook(lambda g: calls.append("weight gradient"))
    monkeypatch.setattr(compute.LinearisationCheck, "start", lambda *_: None)  # once a fit, on four examples
    monkeypatch.setattr(compute.LinearisationCheck, "knows", lambda *_: True)
    kron_factors(model, "classification", [(x[:2], y[:2]), (x[2:], y[2:])])
    assert calls == ["forward"] * 2


# ------------------------------------------------------------------ positions


LOOK_UPS = {
    "added": lambda embedding, i: embedding(i),
    "looked up with an axis": lambda embedding, i: embedding(i[None]),
    "given an axis": lambda embedding, i: embedding(i)[None],
    "given an axis by unsqueeze": lambda embedding, i: embedding(i).unsqueeze(0),
}


@pytest.mark.parametrize("n_tokens", [3, 5, 10])
@pytest.mark.parametrize("name", LOOK_UPS)
def test_positions_looked_up_once_are_covered(name, n_tokens):
    """Also where there are as many as examples, or a multiple; one block B ⊗ A, as of any embedding."""
    model = double(Positions(LOOK_UPS[name]))
    model.positions, model.shift = double(nn.Embedding(12, 4)), nn.Parameter(torch.randn(1, 12, 4).double())
    x, y = torch.randint(0, 6, (5, n_tokens)), torch.randint(0, 3, (5,))
    la = Laplace(model, "classification", hessian_structure="full")
    la.fit([(x[:1], y[:1]), (x[1:], y[1:])])
    torch.testing.assert_close(la.H.to_dense(), exact.ggn(model, "classification", x, y), rtol=1e-10, atol=1e-12)
    block = kron_factors(model, "classification", [(x, y)], kfac_approx="expand")["positions.weight"]
    torch.testing.assert_close(block.A, torch.eye(12).double().diagonal() * (torch.arange(12) < n_tokens) / n_tokens)


def test_positions_that_are_subtracted_are_named():
    model = Positions(lambda embedding, i: -embedding(i) + 0)
    model.positions, minus = nn.Embedding(12, 4), Positions(LOOK_UPS["added"])
    minus.forward = lambda x: minus.head((minus.tokens(x) - minus.positions(torch.arange(3))).mean(1))
    minus.shift, minus.table = None, None
    for net, how in ((model, "is used by neg"), (minus, "other than added to every example")):
        with pytest.raises(UnsupportedParameterError, match=f"'positions.weight' .*{how}"):
            kron_factors(net, "classification", [(torch.randint(0, 6, (5, 3)), torch.randint(0, 3, (5,)))])


USERS = {
    "linear": lambda m, x: m.b(F.one_hot(x, 6).double()) * F.linear(m.a(x), m.c),
    "normalised": lambda m, x: F.layer_norm(m.a(x), (2,), m.d) + m.b(F.one_hot(x, 6).double()),
    "plus a bias": lambda m, x: (m.a(x) + m.d) * m.b(F.one_hot(x, 6).double()),
    "class-conditional": lambda m, x: (
        torch.tanh(F.conv1d(F.one_hot(x, 6).double()[:, None], m.e, padding=1) + m.a(x)[:, :, None]).sum(2) + m.b.bias
    ),
    "multiplied": lambda m, x: torch.tanh(m.a(x)) * m.b(F.one_hot(x, 6).double()),
    "added": lambda m, x: m.a(x) + m.b(F.one_hot(x, 6).double()),
    "viewed": lambda m, x: m.b(F.one_hot(x, 6).double()) * m.a(x).unsqueeze(0)[0],
}


@pytest.mark.parametrize("name", USERS)
def test_rows_looked_up_for_each_example_are_not_taken_for_positions(name):
    model = double(
        Wrapped(USERS[name], a=nn.Embedding(6, 2), b=nn.Linear(6, 2), c=weight(2, 2), d=weight(2), e=weight(2, 1, 3))
    )
    x, y = torch.randint(0, 6, (5,)), torch.randn(5, 2).double()
    for parameter in model.parameters():  # freeze what this one does not use
        used = torch.autograd.grad(model(x).sum(), parameter, allow_unused=True)[0] is not None
        parameter.requires_grad_(used)
    la = Laplace(model, "regression", hessian_structure="full")
    la.fit([(x, y)])
    torch.testing.assert_close(la.H.to_dense(), exact.ggn(model, "regression", x, y), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ attention


class Separate(nn.Module):
    """What `nn.MultiheadAttention` computes, with a linear layer for each projection."""

    def __init__(self, attention):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(4))
        parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        with torch.no_grad():
            for layer, (w, b) in zip((self.q, self.k, self.v), parts, strict=True):
                layer.weight.copy_(w)
                layer.bias.copy_(b)
            self.out.load_state_dict(attention.out_proj.state_dict())

    def forward(self, query, key, value):
        q, k, v = (
            f(x).unflatten(-1, (2, 2)).transpose(1, 2) for f, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


ATTENDED = {
    "self": lambda x: (x, x, x),
    "two inputs": lambda x: (x, x[:, :2], x[:, :2]),
    "three inputs": lambda x: (x, x[:, :2], x[:, 1:3]),
}


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("inputs", ATTENDED)
def test_packed_projection_has_the_blocks_of_separate_ones(inputs, kfac_approx):
    packed = double(nn.MultiheadAttention(4, 2, batch_first=True))
    separate = Separate(packed)
    take = ATTENDED[inputs]
    nets = (
        Wrapped(lambda m, x: m.a(*take(torch.tanh(x)))[0].mean(1), a=packed),
        Wrapped(lambda m, x: m.a(*take(torch.tanh(x))).mean(1), a=separate),
    )
    x, y = torch.randn(5, 3, 4).double(), torch.randn(5, 4).double()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    ours, theirs = (kron_factors(net, "regression", batches, kfac_approx=kfac_approx) for net in nets)
    block = ours["a.in_proj_weight"]
    for i, name in enumerate("qkv"):
        torch.testing.assert_close(block.A[i], theirs[f"a.{name}.weight"].A, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(block.B[i], theirs[f"a.{name}.weight"].B, rtol=1e-10, atol=1e-12)
        b = ours["a.in_proj_bias"].B[4 * i : 4 * i + 4, 4 * i : 4 * i + 4]
        torch.testing.assert_close(b, theirs[f"a.{name}.bias"].B, rtol=1e-10, atol=1e-12)
    blocks = [theirs[f"a.{name}.weight"].to_dense() for name in "qkv"]
    torch.testing.assert_close(block.to_dense(), torch.block_diag(*blocks), rtol=1e-10, atol=1e-12)


ATTENTION_OPTIONS = {
    "without weights": ({}, {"need_weights": False}),
    "weights of each head": ({}, {"average_attn_weights": False}),
    "boolean masks": ({}, {"attn_mask": torch.ones(3, 3).triu(2).bool(), "key_padding_mask": torch.eye(4, 3).bool()}),
    "added masks": ({}, {"attn_mask": torch.randn(8, 3, 3).double(), "key_padding_mask": torch.randn(4, 3).double()}),
    "causal": ({}, {"attn_mask": torch.ones(3, 3).triu(1).bool(), "is_causal": True, "need_weights": False}),
    "no bias": ({"bias": False}, {}),
    "other widths": ({"kdim": 4, "vdim": 4}, {}),
    "time first": ({"batch_first": False}, {}),
}


@pytest.mark.parametrize("name", ATTENTION_OPTIONS)
def test_attention_computes_what_torch_does(name):
    options, arguments = ATTENTION_OPTIONS[name]
    attention = double(nn.MultiheadAttention(4, 2, **{"batch_first": True, **options}))
    if name == "other widths":  # asks for separate weights
        attention = double(nn.MultiheadAttention(4, 2, batch_first=True, kdim=2, vdim=3))
    x = torch.randn(4, 3, 4).double()
    if name == "time first":
        x = x.transpose(0, 1)
    inputs = (x, x[..., :2], x[..., :3]) if name == "other widths" else (x, x, x)
    parameters = dict(attention.named_parameters())
    with _UseRecorder(parameters, Examples(4)) as recorder:
        y, weights = attention(*inputs, **arguments)
    assert {p for kept in recorder.kept for p in kept.use.parameters} == set(parameters)
    expected, expected_weights = attention(*inputs, **arguments)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(weights, expected_weights)


# ------------------------------------------------------------------ graphs


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


@pytest.mark.parametrize("backend", BACKENDS)
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
