"""The native backend on networks as people write them, against the dense oracles."""

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, double
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from laplace_ws import InvalidBatchError, Laplace, UnsupportedParameterError, kron_factors
from laplace_ws.curvature import compute, exact

CURVATURES = ["ggn", "ef"]


def dense(case: Case, curvature: str, structure: str):
    model, x, y = case.make()
    la = Laplace(model, case.likelihood, hessian_structure=structure, curvature=curvature)
    la.fit([(x[:2], y[:2]), (x[2:], y[2:])])
    oracle = {"ggn": exact.ggn, "ef": exact.empirical_fisher}[curvature]
    return la.H.to_dense(), oracle(model, case.likelihood, x, y)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_full_equals_oracle(case, curvature):
    estimate, truth = dense(case, curvature, "full")
    torch.testing.assert_close(estimate, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_diag_equals_oracle(case, curvature):
    estimate, truth = dense(case, curvature, "diag")
    torch.testing.assert_close(estimate, truth.diagonal().diag(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
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


# ------------------------------------------------------------------ hygiene


def snapshot(model):
    modules = list(model.modules())
    return {
        "modes": [m.training for m in modules],
        "attributes": [sorted(vars(m)) for m in modules],
        "hooks": [[len(v) for k, v in sorted(vars(m).items()) if k.endswith("_hooks")] for m in modules],
        "full hooks": [m._is_full_backward_hook for m in modules],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [id(p.grad) for p in model.parameters()],
        "tensor hooks": [p._backward_hooks for p in model.parameters()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "grad values": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("curvature", ["ggn", "ggn_mc", "ef"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_leaves_the_model_as_found(case, curvature, fails):
    model, x, y = case.make()
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = snapshot(model)
    la = Laplace(model, case.likelihood, curvature=curvature)
    if fails:
        bad = y.clone()
        bad[0] = 7
        bad = bad if case.likelihood != "regression" else bad[:, :1].expand(-1, 9)
        with pytest.raises(InvalidBatchError):
            la.fit([(x, y), (x, bad)])
    else:
        la.fit([(x, y)])
    after = snapshot(model)
    assert before.keys() == after.keys()
    for what in before:
        assert flat(after[what]) == flat(before[what]), what


def flat(value):
    """A snapshot's entry with its tensors as lists, so that == compares it."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, list) else value


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
    "attention": (
        Wrapped(lambda m, x: m.attention(x, x, x)[0].mean(1), attention=nn.MultiheadAttention(3, 1, batch_first=True)),
        r"'attention.*' is used by multi_head_attention_forward",
    ),
    "weight norm": (weight_norm(nn.Linear(3, 2)), r"'parametrizations.weight.original[01]' is used by _weight_norm"),
    "unused": (
        Wrapped(lambda m, x: m.a(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2)),
        r"'b.weight' requires grad but has no gradient \(it is not used",
    ),
    "indexing": (Wrapped(lambda m, x: F.linear(x, m.w[:2]), w=weight(3, 3)), r"'w' is used by __getitem__"),
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
    la = Laplace(model, "regression")
    with pytest.raises(UnsupportedParameterError, match=message):
        la.check(x)
    with pytest.raises(UnsupportedParameterError, match=message):
        la.fit([(x, torch.zeros_like(model(x)))])


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
    monkeypatch.setattr(compute, "check_linearisation", lambda *_: None)  # once a fit, on four examples
    kron_factors(model, "classification", [(x[:2], y[:2]), (x[2:], y[2:])])
    assert calls == ["forward"] * 2
