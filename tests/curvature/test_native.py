"""The native backend beyond the conformance suite: sampled columns, invariances, what it cannot cover."""

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, double
from curvature.shared import Wrapped, weight
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from laplace_ws import Laplace, UnsupportedParameterError, kron_factors
from laplace_ws.curvature import FACTOR_BACKENDS, curvature_sum, exact


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in ("adapters", "adapters-bare", "einsum-attention")], ids=str
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
@pytest.mark.parametrize("curvature", ["ggn_mc", "ggn_mc_rademacher"])
def test_ggn_mc_is_unbiased_for_every_number_of_samples(curvature, likelihood, mc_samples):
    model, x = (
        double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))),
        torch.randn(1, 3, dtype=torch.float64),
    )
    y = torch.zeros(1, dtype=torch.long) if likelihood == "classification" else torch.zeros(1, 3, dtype=torch.float64)
    n = 20_000 // mc_samples
    many = [(x.expand(n, -1), y.expand(n, *y.shape[1:]))]
    estimate = kron_factors(model, likelihood, many, curvature=curvature, mc_samples=mc_samples)
    truth = kron_factors(model, likelihood, [(x, y)], curvature="ggn")
    for name, block in truth.items():
        if block.A is not None:
            torch.testing.assert_close(estimate[name].A, block.A)
        # 20,000 draws in all: a relative standard error of about 1 %
        assert ((estimate[name].B / n).trace() / block.B.trace()).item() == pytest.approx(1, abs=0.05), name
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


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


UNSUPPORTED = {
    "packed sequences": (
        Wrapped(
            lambda m, x: m.rnn(nn.utils.rnn.pack_padded_sequence(x, [2, 2, 1, 1], batch_first=True))[1][0][0],
            rnn=nn.LSTM(3, 2, batch_first=True),
        ),
        r"'rnn.weight_ih_l0' is used by lstm, on a packed sequence",
    ),
    "distances": (
        Wrapped(lambda m, x: m.a(torch.cdist(x, m.w)), w=weight(4, 3), a=nn.Linear(4, 2)),
        r"'w' is used by cdist, which has no curvature block",
    ),
    "pruned": (
        pruned(nn.Linear(3, 2000)),
        r"'weight_orig' has no Kronecker factors.*torch.nn.utils.prune.remove\(module, \"weight\"\)",
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
    "batch statistics": (
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.Flatten()),
        r"'1.weight' is used by batch_norm, with statistics of the batch",
    ),
    "tied embedding": (
        Wrapped(lambda m, x: F.linear(F.embedding(x.long().abs() % 4, m.w).mean(1), m.w), w=weight(4, 5)),
        r"'w' is used by embedding and linear in roles that share no Kronecker block",
    ),
    "time first, flat": (
        Wrapped(
            lambda m, x: m.a(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (2, 4)).transpose(0, 1), a=nn.Linear(3, 2)
        ),
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


@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
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
    monkeypatch.setattr(curvature_sum.LinearisationCheck, "start", lambda *_: None)  # once a fit, on four examples
    monkeypatch.setattr(curvature_sum.LinearisationCheck, "knows", lambda *_: True)
    kron_factors(model, "classification", [(x[:2], y[:2]), (x[2:], y[2:])])
    assert calls == ["forward"] * 2
