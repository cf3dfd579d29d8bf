"""Forward passes as people write them, traced for BackPACK, and those that cannot be."""

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from cases import N
from curvature import shared
from curvature.shared import close, pulled, snapshot_with_backpack, weight
from torch import nn

from laplace_ws import Laplace, UnsupportedParameterError
from laplace_ws.curvature import exact
from laplace_ws.curvature.backpack import BackpackBackend


class Wrapped(shared.Wrapped):
    """Of this file, as a trace records `len` in the file of the forward pass."""

    def forward(self, x):
        return self._forward(self, x)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign() + x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class LooksAtShapes(nn.Module):
    def forward(self, x):
        return x.tanh() if x.ndim == 2 else x


def between(forward, **attributes):
    """A network with a computation between its two layers."""
    first, last = nn.Linear(3, 4), nn.Linear(4, 2)
    return Wrapped(lambda m, x: m.last(forward(m, m.first(x))), first=first, last=last, **attributes)


def hooked():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[1].register_forward_hook(lambda module, args, output: output * args[0])
    model[2].register_forward_pre_hook(lambda module, args: (args[0].exp(),))
    model.register_forward_hook(lambda module, args, output: output.sin())
    return model


def with_buffer():
    model = between(lambda m, h: h * m.mask[:, : h.shape[-1]])
    model.register_buffer("mask", torch.randn(1, 9))
    return model


FORWARDS = {
    "same tensor twice": between(lambda m, h: h * h + h**2 + torch.add(h, h, alpha=2)),
    "in-place module": between(lambda m, h: m.act(h) + h, act=nn.ReLU(inplace=True)),
    "in-place function": between(lambda m, h: F.relu(h, inplace=True) + h),
    "in-place method": between(lambda m, h: (h.mul_(2), h + 1)[1]),
    "module called twice": between(
        lambda m, h: m.act(m.inner(m.act(m.inner(h)))), act=nn.Tanh(), inner=nn.Linear(4, 4)
    ),
    "split": between(lambda m, h: (lambda a, b: torch.cat([a.sin(), a * b], -1))(*(h.split(2, -1)[i] for i in (0, 1)))),
    "unbind and stack": between(lambda m, h: torch.stack(h.unbind(-1), -1) + torch.cat(h.chunk(2, -1), -1)),
    "fields": between(lambda m, h: h.unflatten(-1, (2, 2)).max(-1).values.repeat(1, 2) + h.min(-1, keepdim=True)[0]),
    "views": between(
        lambda m, h: h.view(-1, 2, 2).flatten(1) * h.reshape(-1, 4) + h.t().T + m.same(h) + m.drop(h),
        same=nn.Identity(),
        drop=nn.Dropout(),
    ),
    "view as output": Wrapped(lambda m, x: m.a(x).view(-1, 2, 2).transpose(1, 2), a=nn.Linear(3, 4)),
    "one module": nn.Linear(3, 2),
    "branch to nowhere": between(
        lambda m, h: (m.aside(h.exp()), h.sin())[1], aside=nn.Linear(4, 4).requires_grad_(False)
    ),
    "empty branch": between(lambda m, h: torch.cat([h, h[:, :0].sin()], -1)),
    "no gradient": between(lambda m, h: h * h.detach().exp() + (h > 0) + h.new_ones(4)),
    "sizes": between(lambda m, h: h.reshape(h.size(0), 2, -1).reshape(len(h), -1) / h.shape[-1] ** 0.5),
    "buffer": with_buffer(),
    "pool with indices": between(lambda m, h: m.pool(h)[0].repeat(1, 2), pool=nn.MaxPool1d(2, return_indices=True)),
    "custom function": between(lambda m, h: StraightThrough.apply(h)),
    "untraceable part": between(lambda m, h: m.part(h), part=LooksAtShapes()),
    "frozen recurrence": between(
        lambda m, h: m.rnn(h[:, None])[0][:, 0], rnn=nn.LSTM(4, 4, batch_first=True).requires_grad_(False)
    ),
    "hooks": hooked(),
    "made to measure": between(lambda m, h: h + torch.arange(h.shape[1]) * torch.eye(h.size(1))[0]),
    "part of a parameter": between(lambda m, h: h + m.p[:, : h.shape[1]].view(-1), p=weight(1, 9)),
    "tied": Wrapped(lambda m, x: F.linear(x @ m.w, m.w.mT) + x @ m.w @ m.w.T, w=weight(3, 3)),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forward_passes_equal_the_oracle(name, recwarn):
    model, x = FORWARDS[name].double(), torch.randn(N, 3, dtype=torch.float64)
    y = torch.randn_like(model(x))
    la = Laplace(model, "regression", hessian_structure="full", backend=BackpackBackend())
    la.fit([(x, y)])
    close(la.H.to_dense(), exact.ggn(model, "regression", x, y))
    assert not [w.message for w in recwarn if "hook" in str(w.message)]


def test_use_that_never_reaches_the_output_is_zero():
    model = Wrapped(lambda m, x: (m.b(x), m.a(x))[1], a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    found = pulled(BackpackBackend(), model, torch.randn(4, 3), lambda f: torch.randn(2, 4, 2), 2)
    assert [g.shape for g in found] == [(2, 4, 2)] * 2
    assert sorted(g.count_nonzero().item() for g in found) == [0, 16]


BLOCKS = r"freeze it \(requires_grad_\(False\)\) or choose backend=\"native\""
NATIVE = r'freeze it \(requires_grad_\(False\)\) or choose backend="native"'
UNSUPPORTED = {
    "recurrence": (
        Wrapped(lambda m, x: m.rnn(x[:, None])[0][:, -1], rnn=nn.LSTM(3, 2, batch_first=True)),
        rf"'rnn.weight_ih_l0' is used by LSTM, which has no curvature block; {NATIVE}",
    ),
    "attention": (
        Wrapped(lambda m, x: m.a(x[:, None], x[:, None], x[:, None])[0][:, 0], a=nn.MultiheadAttention(3, 1)),
        rf"'a.in_proj_weight' is used by MultiheadAttention, which has no curvature block; {NATIVE}",
    ),
    "batch statistics": (
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)),
        rf"'1.weight' is used by BatchNorm1d, with statistics of the batch, .*; {BLOCKS}",
    ),
    "indexing": (
        Wrapped(lambda m, x: F.linear(x, m.w[:2]), w=weight(3, 3)),
        rf"'w' is used by linear, as a part or a view of itself that is not the matrix of a linear map; {BLOCKS}",
    ),
    "negative": (
        Wrapped(lambda m, x: x + -m.b, b=weight(3)),
        rf"'b' is used by neg, which has no curvature block; {BLOCKS}",
    ),
    "unused": (
        Wrapped(lambda m, x: m.a(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2)),
        r"'b.weight' requires grad but has no",
    ),
    "control flow": (
        Wrapped(lambda m, x: m.a(x) if x.sum() > 0 else m.a(-x), a=nn.Linear(3, 2)),
        r"Wrapped cannot be traced for BackPACK \(TraceError: symbolically traced variables cannot be used as inputs to control flow\); "
        r"take control flow .*, or choose backend=\"native\"",
    ),
    "fill": (
        Wrapped(lambda m, x: m.a(x).zero_(), a=nn.Linear(3, 2)),
        r"the in-place call 'zero_' has no out-of-place form\); .* backend=\"native\"",
    ),
    "tuple": (
        Wrapped(lambda m, x: m.a(x) + torch.stack(torch.var_mean(m.a(x), 1), 1), a=nn.Linear(3, 2)),
        r'var_mean returns a tuple, which BackPACK cannot follow; .*, or choose backend="native"',
    ),
    "no_grad within": (
        Wrapped(lambda m, x: m.b(torch.no_grad()(m.a)(x)), a=nn.Linear(3, 2), b=nn.Linear(2, 2)),
        r"'a.weight' is used by Linear, but not by that alone",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_covered_is_named(name):
    model, message = UNSUPPORTED[name]
    la = Laplace(model, "regression", backend=BackpackBackend())
    with pytest.raises(UnsupportedParameterError, match=message) as caught:
        la.check(torch.randn(4, 3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["control flow", "custom function", "untraceable part", "hooks"])
def test_a_trace_leaves_everything_as_found(name):
    model = UNSUPPORTED[name][0] if name in UNSUPPORTED else FORWARDS[name]
    x = torch.randn(N, 3).to(next(model.parameters()))
    before = snapshot_with_backpack(model)
    with suppress(UnsupportedParameterError):
        pulled(BackpackBackend(), model, x, lambda f: torch.ones_like(f)[None])
    assert snapshot_with_backpack(model) == before
    assert "len" not in globals()
