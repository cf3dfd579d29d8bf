"""Calls that the native backend computes by others, or follows: each network has the full curvature of a dense oracle."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import LinearCase, double
from curvature.test_conformance import errors_on_linear
from torch import nn

from laplace_ws import Laplace, UnsupportedParameterError, kron_factors
from laplace_ws.curvature import exact
from laplace_ws.curvature.rewrites import REWRITES

N = 5


class Net(nn.Module):
    """A function of named parameters and the inputs."""

    def __init__(self, forward, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            if isinstance(shape, nn.Module):  # whose weights are those of when the table was made
                module = copy.deepcopy(shape)
                with torch.no_grad():
                    for p in module.parameters():
                        p.copy_(torch.randn_like(p) * 0.5)
                setattr(self, name, module)
            else:
                setattr(self, name, nn.Parameter(torch.randn(shape) * 0.5))
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def vectors(*shape):
    return lambda: torch.randn(N, *shape, dtype=torch.float64)


def tokens(n, size=6):
    return lambda: torch.randint(0, size, (N, n))


def experts(m, x):
    """Each row by the expert that its first entry names; one expert may get none."""
    out = torch.zeros(len(x), 3, dtype=x.dtype)
    gates = F.one_hot((x[:, 0] > 0).long(), 3).to(x.dtype)
    for e in range(3):
        out = out + gates[:, e, None] * torch.tanh(F.linear(x, m.w[e], m.b[e]))
    return out


def masked_routing(m, x):
    """Each row to the expert of its largest entry, as mixtures of experts are written; one of the four gets none."""
    out = torch.zeros(len(x), 3, dtype=x.dtype)
    h = torch.cat([m.layer(x).tanh(), torch.full_like(x[:, :1], -9.0)], 1)
    chosen = h.detach().argmax(1)
    for e in range(4):
        mask = chosen == e
        if mask.any():
            out[mask] = F.linear(F.linear(h[mask], m.w[e], m.b[e]).tanh(), m.v[e]) * h[mask].sum(1, keepdim=True)
    return out


def token_routing(m, x):
    """By places of tokens, added up; each expert is a module."""
    h = m.layer(x).tanh()
    flat = h.reshape(-1, 3)
    out = torch.zeros_like(flat)
    chosen = flat.detach().argmax(1)
    for e, expert in enumerate((m.first, m.second, m.third)):
        places = torch.where(chosen == e)[0]
        out = out.index_add(0, places, expert(flat[places]).tanh())
    return out.view(h.shape).mean(1)


def by_mask_of_tokens(m, x):
    h = m.layer(x).tanh()
    mask = h.detach()[..., 0] > 0.1
    out = torch.zeros_like(h)
    out[mask] = m.first(h[mask]).tanh()
    out[~mask] = m.second(h[~mask]).tanh()
    return out.sum(1)


def selected_by_name(m, x):
    """Rows are selected and put together by calls whose arguments are named."""
    h, order = m.first(x).tanh(), torch.arange(len(x) - 1, -1, -1)
    h = torch.cat(dim=1, tensors=[m.second(h.index_select(dim=0, index=order)), h.index_select(0, index=order)])
    return torch.index_select(h, 0, order)


MATRIX_NETS = {
    "selected by name": (selected_by_name, {"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)}, vectors(3)),
    "masked routing": (masked_routing, {"layer": nn.Linear(4, 3), "w": (4, 3, 4), "b": (4, 3), "v": (4, 3, 3)}, vectors(4)),
    "routing of tokens": (
        token_routing, {"layer": nn.Linear(4, 3), **{n: nn.Linear(3, 3) for n in ("first", "second", "third")}}, vectors(3, 4)
    ),
    "a mask of tokens": (
        by_mask_of_tokens, {"layer": nn.Linear(4, 3), "first": nn.Linear(3, 3), "second": nn.Linear(3, 3)}, vectors(3, 4)
    ),
    "addmm": (lambda m, x: torch.addmm(m.b, x.tanh(), m.w), {"w": (4, 3), "b": (3,)}, vectors(4)),
    "addmm as a method": (lambda m, x: m.b.addmm(x, m.w, beta=2, alpha=0.5), {"w": (4, 3), "b": (1, 3)}, vectors(4)),
    "conv1d of GPT-2": (
        lambda m, x: torch.addmm(m.b, x.view(-1, 4), m.w).view(N_of(x), -1, 3).mean(1).tanh() @ m.v,
        {"w": (4, 3), "b": (3,), "v": (3, 2)},
        vectors(6, 4),
    ),
    "einsum heads": (
        lambda m, x: torch.einsum("bnd,dhk->bhnk", x, m.w).tanh().mean((1, 2)), {"w": (4, 2, 3)}, vectors(3, 4)
    ),
    "einsum merging heads": (
        lambda m, x: torch.einsum("...hd,hdk->...k", x, m.w).tanh(), {"w": (2, 3, 4)}, vectors(2, 3)
    ),
    "einsum by head": (
        lambda m, x: torch.einsum("bnhd,hde->bhne", x, m.w).tanh().mean((1, 2)), {"w": (2, 3, 4)}, vectors(3, 2, 3)
    ),
    "einsum with the weight first": (lambda m, x: torch.einsum("oi,bi->bo", m.w, x).tanh(), {"w": (3, 4)}, vectors(4)),
    "einsum without an arrow": (lambda m, x: torch.einsum("bi,io", x, m.w).tanh(), {"w": (4, 3)}, vectors(4)),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=([1, 2], [1, 2])).tanh(), {"w": (4, 2, 3)}, vectors(2, 3)),
    "tensordot of the last axes": (lambda m, x: torch.tensordot(x, m.w, 1).tanh(), {"w": (3, 4)}, vectors(3)),
    "weight on the left": (lambda m, x: (m.w @ x).tanh().mean(-1), {"w": (3, 4)}, vectors(4, 2)),
    "weight on the left of columns": (lambda m, x: (m.w @ x.T).T.tanh(), {"w": (3, 4)}, vectors(4)),
    "vector on the right": (lambda m, x: torch.stack([x @ m.v, (x @ m.w).tanh()], 1), {"v": (4,), "w": (4,)}, vectors(4)),
    "batched weights": (
        lambda m, x: (x.transpose(0, 1) @ m.w).transpose(0, 1).tanh().flatten(1), {"w": (3, 4, 2)}, vectors(3, 4)
    ),
    "bmm": (
        lambda m, x: torch.bmm(x.transpose(0, 1), m.w.transpose(1, 2)).tanh().mean(0), {"w": (3, 2, 4)}, vectors(3, 4)
    ),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.w).tanh().mean(0), {"w": (3, 4, 2), "b": (3, 1, 2)},
        vectors(3, 4),
    ),
    "chunks": (
        lambda m, x: sum(F.linear(x, part).tanh() for part in m.w.chunk(3)), {"w": (6, 4)}, vectors(4)
    ),
    "split and biases": (
        lambda m, x: sum(F.linear(x, w, b).tanh() for w, b in zip(m.w.split(2), m.b.split(2), strict=True)),
        {"w": (6, 4), "b": (6,)}, vectors(4),
    ),
    "time first": (
        lambda m, x: m.norm(m.layer(x.transpose(0, 1)) * m.s + m.p).tanh().mean(0),
        {"layer": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "s": (4,), "p": (7, 1, 4)}, vectors(7, 3),
    ),
    "as many times as examples": (
        lambda m, x: m.norm(m.layer(x.transpose(0, 1)) * m.s + m.p).tanh().mean(0),
        {"layer": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "s": (4,), "p": (5, 1, 4)}, vectors(5, 3),
    ),
    "twice as many times as examples": (
        lambda m, x: m.layer(x.transpose(0, 1)).mean(0),
        {"layer": nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=False)}, vectors(10, 4),
    ),
    "encoder with the time first": (
        lambda m, x: m.layer(x.transpose(0, 1)).mean(0),
        {"layer": nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=False)}, vectors(7, 4),
    ),
    "unbound": (lambda m, x: sum((x @ w).tanh() for w in m.w.unbind()), {"w": (3, 4, 2)}, vectors(4)),
    "experts": (experts, {"w": (3, 3, 4), "b": (3, 3)}, vectors(4)),
    "viewed": (lambda m, x: F.linear(x, m.w.view(3, 4)).tanh(), {"w": (3, 2, 2)}, vectors(4)),
    "permuted": (lambda m, x: F.linear(x, m.w.permute(2, 0, 1).flatten(1)[:, :4]).tanh(), {"w": (2, 2, 3)}, vectors(4)),
    "bilinear": (
        lambda m, x: m.layer(x[:, :2].tanh(), x[:, 2:]).tanh(), {"layer": nn.Bilinear(2, 3, 4)}, vectors(5)
    ),
    "embedding bag": (
        lambda m, x: torch.cat([m.mean(x), m.sum(x), m.max(x)], 1).tanh(),
        {
            "mean": nn.EmbeddingBag(6, 2, padding_idx=1), "sum": nn.EmbeddingBag(6, 2, mode="sum"),
            "max": nn.EmbeddingBag(6, 2, mode="max"),
        },
        tokens(4),
    ),
    "embedding of a table": (lambda m, x: F.embedding(x, m.w).mean(1).tanh(), {"w": (6, 3)}, tokens(4)),
    "conv_transpose1d": (
        lambda m, x: m.layer(x).tanh().mean(2), {"layer": nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1)}, vectors(2, 4)
    ),
    "conv_transpose2d": (
        lambda m, x: m.layer(x).tanh().mean((2, 3)),
        {"layer": nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2, dilation=(1, 2))},
        vectors(4, 3, 2),
    ),
    "conv_transpose3d": (
        lambda m, x: m.layer(x).tanh().mean((2, 3, 4)), {"layer": nn.ConvTranspose3d(2, 2, 2, stride=2, padding=1)},
        vectors(2, 2, 3, 2),
    ),
    "lstm": (
        lambda m, x: m.layer(x)[0].mean(1),
        {"layer": nn.LSTM(3, 2, num_layers=2, batch_first=True, bidirectional=True)},
        vectors(4, 3),
    ),
    "lstm with a projection": (
        lambda m, x: m.layer(x.transpose(0, 1))[0][-1], {"layer": nn.LSTM(3, 4, proj_size=2)}, vectors(4, 3)
    ),
    "gru": (lambda m, x: m.layer(x)[1][0], {"layer": nn.GRU(3, 2, batch_first=True)}, vectors(4, 3)),
    "rnn": (lambda m, x: m.layer(x)[0][:, -1], {"layer": nn.RNN(3, 2, batch_first=True, bias=False)}, vectors(4, 3)),
    "rnn relu": (
        lambda m, x: m.layer(x)[0].sum(1), {"layer": nn.RNN(3, 2, nonlinearity="relu", batch_first=True)}, vectors(4, 3)
    ),
    "lstm cell": (lambda m, x: m.layer(x[:, 1], m.layer(x[:, 0]))[0], {"layer": nn.LSTMCell(3, 2)}, vectors(2, 3)),
    "gru cell": (lambda m, x: m.layer(x[:, 1], m.layer(x[:, 0])), {"layer": nn.GRUCell(3, 2)}, vectors(2, 3)),
}  # fmt: skip
"""Weights of these have a Kronecker block."""


class Linear(nn.Module):
    """A linear function of the inputs, whose positions are averaged or kept, and a linear layer."""

    def __init__(self, setting, function, *shape, size):
        super().__init__()
        self.setting, self.function = setting, function
        self.w, self.head = (
            shape[0] if shape[0:] and isinstance(shape[0], nn.Module) else nn.Parameter(torch.randn(shape)),
            nn.Linear(size, 2),
        )

    def forward(self, x):
        y = self.head(self.function(self.w, x))
        return y.mean(1) if self.setting == "reduce" else y


def linear_case(name, function, *shape, size, x):
    return LinearCase(name, lambda setting: Linear(setting, function, *shape, size=size), vectors(*x))


def pixels_last(w, x):
    return w(x).flatten(2).transpose(1, 2)


def test_stacked_experts_have_the_blocks_of_experts_apart():
    torch.manual_seed(0)
    stacked, _, _ = made(MATRIX_NETS, "masked routing")
    x = torch.randn(40, 4, dtype=torch.float64)
    y = torch.randn_like(stacked(x))
    apart = Net(
        lambda m, x: masked_routing(m, x),
        layer=nn.Linear(4, 3), **{f"{n}{e}": getattr(stacked, n)[e].shape for n in "wbv" for e in range(4)},
    ).double()  # fmt: skip
    apart.layer.load_state_dict(stacked.layer.state_dict())
    with torch.no_grad():
        for name in "wbv":
            for e in range(4):
                getattr(apart, f"{name}{e}").copy_(getattr(stacked, name)[e])
    for name in "wbv":
        setattr(apart, name, [getattr(apart, f"{name}{e}") for e in range(4)])
    for approx in ("expand", "reduce"):
        one, other = (kron_factors(net, "regression", [(x, y)], kfac_approx=approx) for net in (stacked, apart))
        for name in "wv":
            for e in range(3):  # no example is routed to the fourth
                torch.testing.assert_close(one[name].A[e], other[f"{name}{e}"].A)
                torch.testing.assert_close(one[name].B[e], other[f"{name}{e}"].B)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="torch has none")
def test_grouped_products_are_products_of_parts():
    x, w = torch.randn(7, 3), torch.randn(3, 3, 2)
    parts = REWRITES[torch._grouped_mm](lambda t: t is w, x, w, offs=torch.tensor([2, 2, 7]))
    torch.testing.assert_close(parts, torch.cat([x[:2] @ w[0], x[2:] @ w[2]]))


def test_rows_are_the_examples_own_in_every_batch():
    """The check sees few examples; a later batch may have as many examples as steps in time."""
    torch.manual_seed(0)
    model = double(Net(lambda m, x: m.layer(x.transpose(0, 1)).tanh().mean(0), layer=nn.Linear(3, 4)))
    x = torch.randn(10, 7, 3, dtype=torch.float64)
    y = torch.randn_like(model(x))
    la = Laplace(model, "regression", hessian_structure="full")
    la.fit([(x[:3], y[:3]), (x[3:], y[3:])])
    torch.testing.assert_close(la.H.to_dense(), exact.ggn(model, "regression", x, y), rtol=1e-9, atol=1e-11)


HIDDEN = Net(lambda m, x: m.a(torch.cdist(x, m.w)), w=(4, 3), a=nn.Linear(4, 2)).double()
"""No backend sees how it uses w."""


@pytest.mark.parametrize("hessian_structure", ["full", "diag"])
def test_autograd_covers_what_others_refuse(hessian_structure):
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2
    la = Laplace(HIDDEN, "classification", hessian_structure=hessian_structure, backend="autograd")
    la.fit([(x[:4], y[:4]), (x[4:], y[4:])])
    truth = exact.ggn(HIDDEN, "classification", x, y)
    truth = truth if hessian_structure == "full" else torch.diag(truth.diagonal())
    torch.testing.assert_close(la.H.to_dense(), truth, rtol=1e-10, atol=1e-12)


def test_autograd_has_no_kronecker_factors():
    with pytest.raises(UnsupportedParameterError, match=r'backend="autograd" does not see how \'w\' is used'):
        kron_factors(HIDDEN, "classification", [(torch.randn(4, 3).double(), torch.arange(4) % 2)], backend="autograd")


def test_a_low_rank_posterior_predicts_wherever_it_fits():
    """Of full rank here, so that its predictions are those of the full matrix."""
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    low, full = (
        Laplace(HIDDEN, "classification", hessian_structure=name, backend=backend, **options)
        for name, backend, options in (("lowrank", "native", {"rank": 22}), ("full", "autograd", {}))
    )
    low.fit(data)
    full.fit(data)
    torch.testing.assert_close(low(x), full(x), rtol=1e-6, atol=1e-8)


LINEAR = [
    linear_case("einsum", lambda w, x: torch.einsum("bnd,dhk->bnhk", x, w).flatten(2), 3, 2, 2, size=4, x=(4, 3)),
    linear_case("einsum of two inputs", lambda w, x: torch.einsum("bnhd,hdk->bnk", x, w), 2, 3, 4, size=4, x=(4, 2, 3)),
    linear_case("einsum inputs last", lambda w, x: torch.einsum("bnhd,khd->bnk", x, w), 4, 2, 3, size=4, x=(4, 2, 3)),
    linear_case("einsum outputs apart", lambda w, x: torch.einsum("bni,hik->bnhk", x, w).flatten(2), 2, 3, 2, size=4, x=(4, 3)),
    linear_case("groups", lambda w, x: torch.einsum("bnhd,hde->bnhe", x, w).flatten(2), 2, 3, 2, size=4, x=(4, 2, 3)),
    linear_case("groups, outputs first", lambda w, x: torch.einsum("bnhd,hed->bnhe", x, w).flatten(2), 2, 2, 3, size=4, x=(4, 2, 3)),
    linear_case("on the left", lambda w, x: (w @ x).mT, 4, 3, size=4, x=(3, 4)),
    linear_case("time first", lambda w, x: F.linear(x.transpose(0, 1), w).transpose(0, 1), 4, 3, size=4, x=(7, 3)),
    linear_case("transposed convolution", pixels_last, nn.ConvTranspose2d(2, 4, 3, 2, 1, 1, bias=False), size=4, x=(2, 3, 3)),
    linear_case("transposed convolution, wide stride", pixels_last, nn.ConvTranspose1d(2, 4, 2, 3), size=4, x=(2, 4)),
    linear_case("transposed convolution by group", pixels_last, nn.ConvTranspose2d(4, 4, 2, 1, 0, 0, 2), size=4, x=(4, 3, 3)),
]  # fmt: skip
"""Deep linear networks, for which Kronecker factors are exact in their setting, but for terms between groups."""


EXPRESSION_NETS = {
    "exponentiated": (lambda m, x: x.tanh() * m.s.exp() + m.b, {"s": (4,), "b": (4,)}, vectors(4)),
    "added to each other": (
        lambda m, x: (m.tokens(x) + (m.rows + m.columns).flatten(0, 1)).tanh().mean(1),
        {"tokens": nn.Embedding(6, 3), "rows": (2, 1, 3), "columns": (1, 2, 3)}, tokens(4),
    ),
    "repeated": (lambda m, x: (m.tokens(x) + m.p.repeat(2, 1)).tanh().mean(1), {"tokens": nn.Embedding(6, 3), "p": (2, 3)}, tokens(4)),
    "masked": (lambda m, x: F.linear(x, m.w * torch.eye(3, 4).double(), m.b).tanh(), {"w": (3, 4), "b": (3,)}, vectors(4)),
    "a product of weights": (lambda m, x: F.linear(x, m.u @ m.v + m.w).tanh(), {"u": (3, 2), "v": (2, 4), "w": (3, 4)}, vectors(4)),
    "normalised": (lambda m, x: F.linear(x, F.normalize(m.w, dim=1)).tanh(), {"w": (3, 4)}, vectors(4)),
    "a softmax of parameters": (lambda m, x: (x.tanh() * m.a.softmax(0)[:, None]).sum(1), {"a": (3,)}, vectors(3, 4)),
    "stacked": (lambda m, x: F.linear(x, torch.stack([m.u, m.v])).tanh(), {"u": (4,), "v": (4,)}, vectors(4)),
}  # fmt: skip
"""What enters the networks is computed from parameters alone, so that these have blocks as vectors have."""


def N_of(x):
    return len(x)


def made(table, name):
    torch.manual_seed(0)
    function, shapes, make_x = table[name]
    model, x = double(Net(function, **shapes)), make_x()
    return model.eval(), x, torch.randn_like(model(x))


ALL = {**MATRIX_NETS, **EXPRESSION_NETS}


@pytest.mark.many(2)
@pytest.mark.parametrize("curvature", ["ggn", "ef"])
@pytest.mark.parametrize("name", ALL)
def test_the_full_curvature_is_that_of_the_oracle(name, curvature):
    model, x, y = made(ALL, name)
    la = Laplace(model, "regression", hessian_structure="full", curvature=curvature)
    la.fit([(x[:3], y[:3]), (x[3:], y[3:])])
    oracle = {"ggn": exact.ggn, "ef": exact.empirical_fisher}[curvature]
    torch.testing.assert_close(la.H.to_dense(), oracle(model, "regression", x, y), rtol=1e-9, atol=1e-11)


@pytest.mark.many(2)
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", MATRIX_NETS)
def test_weights_have_a_kronecker_block(name, kfac_approx):
    model, x, y = made(MATRIX_NETS, name)
    la = Laplace(model, "regression", kfac_approx=kfac_approx)
    la.fit([(x, y)])
    matrices = ("w", "v", "weight", "weight_ih_l0", "weight_hh_l0", "weight_hr_l0", "weight_ih", "weight_hh")
    weights = [block for p, block in la.H.items() if p.split(".")[-1] in matrices and "norm" not in p]
    assert weights
    assert all(block.A is not None for block in weights)
    mean, variance = la(x)
    assert mean.isfinite().all()
    assert (variance.diagonal(dim1=-2, dim2=-1) > 0).any()


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_exact_in_its_setting_and_not_in_the_other(case, setting):
    other = {"expand": "reduce", "reduce": "expand"}[setting]
    assert max(errors_on_linear(case, setting, setting, "native").values()) < 1e-10
    weights = [error for name, error in errors_on_linear(case, setting, other, "native").items() if "bias" not in name]
    assert min(weights) > 1e-2


@pytest.mark.parametrize("name", EXPRESSION_NETS)
def test_what_is_computed_has_a_dense_block(name):
    model, x, y = made(EXPRESSION_NETS, name)
    kron = kron_factors(model, "regression", [(x, y)])
    truth, slices = exact.ggn(model, "regression", x, y), exact.parameter_slices(model)
    for p, block in kron.items():
        if block.A is None and "bias" not in p and p != "b":
            torch.testing.assert_close(block.to_dense(), truth[slices[p], slices[p]], rtol=1e-9, atol=1e-11)
