"""Sums over Kronecker spectra, split or not, and effective numbers of parameters against dense algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices.test_matrices import damped, dense, diag, kron

from laplace_ws.matrices import Dense, spectrum

F64 = torch.float64


@settings(max_examples=40, deadline=None)
@given(
    log_ratio=st.floats(-30, 30),
    decades=st.floats(0, 20),
    n_zeros=st.integers(0, 100),
    seed=st.integers(0, 2**31),
)
def test_the_split_changes_nothing(log_ratio, decades, n_zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    b = 10 ** (-decades * torch.rand(130, generator=generator, dtype=F64))
    a = 10 ** (-decades * torch.rand(140, generator=generator, dtype=F64))
    a[:n_zeros] = 0.0
    assert b.numel() * a.numel() > spectrum.MOST_DIRECT
    ratio = torch.tensor(10.0**log_ratio, dtype=F64, requires_grad=True)
    x = ratio * b[:, None] * a
    truth, p = x.log1p().sum(), (x / (1 + x)).detach()
    estimate = spectrum.sum_log1p(b, a, ratio)
    torch.testing.assert_close(estimate, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(estimate, ratio), torch.autograd.grad(truth, ratio), rtol=1e-12, atol=0
    )
    gamma, decrease = spectrum.effective_parameters(b, a, ratio)
    torch.testing.assert_close(gamma, p.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(decrease, (p / (1 + x.detach())).sum(), rtol=1e-9, atol=1e-12 * gamma.item())


def test_the_split_is_taken():
    b, a = torch.logspace(-9, 0, 130, dtype=F64), torch.logspace(-9, 0, 140, dtype=F64)
    (b_large, a_large), small = spectrum.split(b, a, torch.ones((), dtype=F64))
    assert b_large.numel() * a_large.numel() < b.numel() * a.numel() / 4
    assert sum(x.numel() * y.numel() for x, y in [(b_large, a_large), *small]) == b.numel() * a.numel()


def grouped(matrix, n_groups, per_weight):
    """A group for every parameter tensor or weight, each group used."""
    size = matrix.n_params if per_weight else len(matrix.shapes)
    groups = torch.arange(size) % n_groups
    return groups, torch.linspace(0.3, 2.0, n_groups, dtype=F64)


@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize(
    ("make", "per_weight"), [(kron, False), (dense, False), (dense, True), (diag, False), (diag, True)]
)
def test_effective_parameters_and_their_slopes(make, per_weight, n_groups):
    matrix = make()
    groups, delta = grouped(matrix, n_groups, per_weight)
    scale = torch.tensor(1.3, dtype=F64)
    owners = groups
    if not per_weight:
        owners = groups.repeat_interleave(torch.tensor([s.numel() for s in matrix.shapes.values()]))

    def truth(log_delta):
        d = log_delta.exp()[owners]
        shares = 1 - d * torch.linalg.inv(damped(matrix, scale, d)).diagonal()
        return torch.zeros(n_groups, dtype=F64).index_add(0, owners, shares)

    gamma, decrease = matrix.effective_parameters(scale, delta, groups)
    jacobian = -torch.autograd.functional.jacobian(truth, delta.log())
    if matrix.is_separable or n_groups == 1:
        torch.testing.assert_close(jacobian, torch.diag(jacobian.diagonal()))
        jacobian = jacobian.diagonal()
    torch.testing.assert_close(gamma, truth(delta.log()))
    torch.testing.assert_close(decrease, jacobian)


def test_no_curvature_is_exactly_no_parameter():
    H = torch.zeros(5, 5, dtype=F64)
    H[:2, :2] = torch.eye(2)
    matrix = Dense({"w": torch.Size([2]), "b": torch.Size([3])}, H)
    gamma, _ = matrix.effective_parameters(
        torch.ones((), dtype=F64), torch.tensor([0.3, 0.7], dtype=F64), torch.arange(2)
    )
    assert gamma[1] == 0
    assert gamma[0].item() == pytest.approx(2 / 1.3)
