"""Rows that a native fit looks up once and adds to every example, and rows that are the examples' own."""

import pytest
import torch
import torch.nn.functional as F
from cases import double
from curvature.shared import Wrapped, weight
from nets import Positions
from torch import nn

from laplace_ws import Laplace, UnsupportedParameterError, kron_factors
from laplace_ws.curvature import exact

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


def test_positions_that_are_negated_are_named():
    model = Positions(lambda embedding, i: -embedding(i) + 0)
    model.positions = nn.Embedding(12, 4)
    with pytest.raises(UnsupportedParameterError, match=r"'positions.weight' .*is used by neg"):
        kron_factors(model, "classification", [(torch.randint(0, 6, (5, 3)), torch.randint(0, 3, (5,)))])


TURNED = {
    "subtracted": lambda m, x: m.tokens(x) - m.positions(torch.arange(3)),
    "turned": lambda m, x: m.tokens(x)[:, :3] + m.positions(torch.arange(3)).t(),
    "of pairs": lambda m, x: (m.tokens(x) @ m.tokens(x).mT)[:, None] + m.positions(PAIRS).permute(2, 0, 1)[None],
}
PAIRS = (torch.arange(3)[:, None] - torch.arange(3)).abs()


@pytest.mark.parametrize("name", TURNED)
def test_positions_that_are_turned_have_a_block_as_vectors_have(name):
    torch.manual_seed(0)
    n_columns = 3 if name == "turned" else 4
    model = Wrapped(
        lambda m, x: TURNED[name](m, x).tanh().flatten(1),
        tokens=nn.Embedding(6, n_columns),
        positions=nn.Embedding(4, n_columns),
    )
    model, x = double(model), torch.randint(0, 6, (5, 3))
    y = torch.randn_like(model(x))
    la = Laplace(model, "regression", hessian_structure="full")
    la.fit([(x[:2], y[:2]), (x[2:], y[2:])])
    torch.testing.assert_close(la.H.to_dense(), exact.ggn(model, "regression", x, y), rtol=1e-10, atol=1e-12)


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
