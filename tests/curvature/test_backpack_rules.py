"""How columns pass backward through one module: each rule against autograd."""

import pytest
import torch
from cases import N, double
from curvature.shared import pulled
from torch import nn

from laplace_ws import kron_factors
from laplace_ws.curvature import backpack_rules
from laplace_ws.curvature.backpack import BackpackBackend
from laplace_ws.curvature.native import NativeBackend


def module_at(module, x, n_columns=3):
    """A module with what BackPACK stores on it, and columns at its output."""
    module.input0 = x.requires_grad_()
    module.output = module(x)
    return torch.randn(n_columns, *module.output.shape, dtype=x.dtype)


def rows(*shape):
    """Normal numbers, some of them zero, where activations have their kinks."""
    x = torch.randn(*shape, dtype=torch.float64)
    return x.where(torch.rand(shape) > 0.2, 0)


def with_statistics(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return double(norm).eval()


CONV = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
FOLLOWED_BY_BACKPACK = [
    (double(nn.Linear(3, 4)), rows(N, 3)),
    (double(nn.Linear(3, 4, bias=False)), rows(N, 2, 3, 3)),
    (double(nn.Conv1d(2, 4, 3, **CONV)), rows(N, 2, 8)),
    (double(nn.Conv2d(2, 4, (2, 3), **CONV)), rows(N, 2, 8, 7)),
    (double(nn.Conv2d(2, 4, 3, padding=(2, 0))), rows(N, 2, 4, 5)),
    (double(nn.Conv3d(2, 4, 2, **CONV)), rows(N, 2, 5, 4, 6)),
    (with_statistics(nn.BatchNorm1d(3)), rows(N, 3)),
    (with_statistics(nn.BatchNorm1d(3)), rows(N, 3, 4)),
    (with_statistics(nn.BatchNorm2d(3)), rows(N, 3, 2, 2)),
    (with_statistics(nn.BatchNorm3d(3)), rows(N, 3, 2, 2, 2)),
    (nn.ReLU(), rows(N, 9)),
    (nn.LeakyReLU(0.3), rows(N, 3, 9)),
    (nn.ELU(0.7), rows(N, 9)),
    (nn.SELU(), rows(N, 9)),
    (nn.Tanh(), rows(N, 9)),
    (nn.Sigmoid(), rows(N, 9)),
    (nn.LogSigmoid(), rows(N, 9)),
    (nn.MaxPool1d(3, stride=2, padding=1), rows(N, 2, 8)),
    (nn.MaxPool2d(2, dilation=2, ceil_mode=True), rows(N, 2, 6, 5)),
    (nn.MaxPool3d(2, stride=1), rows(N, 2, 3, 4, 3)),
]
FOLLOWED_BY_AUTOGRAD = [
    (double(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")), rows(N, 2, 4, 4)),
    (double(nn.Conv1d(2, 4, 2, padding="same")), rows(N, 2, 5)),
    (double(nn.Conv1d(2, 4, 3)), rows(2, 5)),
    (nn.BatchNorm1d(3, affine=False).double().eval(), rows(N, 3)),
    (nn.BatchNorm1d(3, track_running_stats=False).double(), rows(N, 3)),
    (nn.AvgPool2d(2), rows(N, 2, 4, 4)),
    (nn.AdaptiveAvgPool2d(1), rows(N, 2, 4, 4)),
    (nn.LayerNorm(3).double(), rows(N, 3)),
    (nn.GroupNorm(2, 4).double(), rows(N, 4, 2)),
    (nn.GELU(), rows(N, 3)),
    (nn.Dropout(0.5), rows(N, 9)),
]


def assert_follows(module, x):
    columns = module_at(module, x)
    (found,) = backpack_rules.transposed_jacobian_products(module, [module.input0], columns)
    truth = [torch.autograd.grad(module.output, module.input0, c, retain_graph=True)[0] for c in columns]
    torch.testing.assert_close(found, torch.stack(truth), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("module", "x"), FOLLOWED_BY_BACKPACK, ids=lambda v: str(v) if isinstance(v, nn.Module) else ""
)
def test_derivatives_of_backpack_equal_autograd(module, x, monkeypatch):
    monkeypatch.setattr(backpack_rules.torch.autograd, "grad", None)
    columns = module_at(module, x)
    backpack_rules.transposed_jacobian_products(module, [module.input0], columns)  # without autograd
    monkeypatch.undo()
    assert_follows(module, x)


def test_every_derivative_that_is_used_is_tested():
    assert {type(module) for module, _ in FOLLOWED_BY_BACKPACK} == set(backpack_rules.DERIVATIVES)


@pytest.mark.parametrize(
    ("module", "x"), FOLLOWED_BY_AUTOGRAD, ids=lambda v: str(v) if isinstance(v, nn.Module) else ""
)
def test_other_modules_follow_their_own_graph(module, x, monkeypatch):
    assert_follows(module, x)
    monkeypatch.setattr(backpack_rules.BaseDerivatives, "_jac_t_mat_prod", None)
    assert_follows(module, x)


def test_columns_one_by_one_where_there_is_no_batched_rule(monkeypatch):
    autograd = torch.autograd.grad

    def without_batches(*args, is_grads_batched=False, **kwargs):
        if is_grads_batched:
            raise RuntimeError
        return autograd(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", without_batches)
    assert_follows(nn.GELU(), rows(N, 3))


def test_autocast_agrees_with_the_native_backend():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3))
    data = [(torch.randn(6, 3), torch.randint(0, 3, (6,)))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        native, other = (kron_factors(model, "classification", data, backend=name) for name in ("native", "backpack"))
    torch.testing.assert_close(
        other.to_dense(), native.to_dense(), rtol=0.1, atol=0.02 * native.to_dense().max().item()
    )


def test_mixed_precision_follows_the_graph():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(N, 3)
    columns = torch.randn(3, N, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found, truth = (pulled(b, model, x, lambda f: columns.to(f), 3) for b in (BackpackBackend(), NativeBackend()))
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
