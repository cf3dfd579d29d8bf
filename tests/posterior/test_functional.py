"""Moments of the outputs against dense algebra, for every structure on every model of the table."""

import pytest
import torch
from cases import CASES, double
from posterior.shared import STRUCTURES, case_of, dense_covariance, dense_moments, fitted
from torch import nn

from laplace_ws import Laplace
from laplace_ws.curvature import exact
from laplace_ws.kfac import ekfac
from laplace_ws.matrices import pushforward
from laplace_ws.posterior import functional


def close(found, truth):
    torch.testing.assert_close(found, truth.reshape(found.shape), rtol=0, atol=1e-10 * truth.abs().max().item())


@pytest.mark.many(2)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_moments_are_those_of_dense_algebra(case, structure):
    la, x, _ = fitted(structure, case, prior_precision=0.7)
    outputs, covariance = dense_moments(la, x)
    by_example = covariance[range(len(x)), :, range(len(x))]
    variances = by_example.diagonal(dim1=1, dim2=2)
    f, found = la.functional_moments(x)
    close(f, outputs)
    if f.ndim == 3 and case.likelihood == "classification":
        C = f.shape[2]
        by_term = [by_example[:, t : t + C, t : t + C] for t in range(0, by_example.shape[1], C)]
        close(found, torch.stack(by_term, 1))
    else:
        close(found, by_example if f.ndim < 3 else variances)
    f, found = la.functional_moments(x, diagonal_output=True)
    assert found.shape == f.shape
    close(found, variances)
    f, found = la.functional_moments(x, joint=True)
    assert found.shape == (f.numel(), f.numel())
    close(found, covariance)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["fixup", "transformer-tokens", "grouped-conv"])
def test_moments_under_a_prior_precision_of_each_parameter(name, structure):
    la, x, _ = fitted(structure, name)
    la.prior_precision = torch.rand(len(la.shapes), dtype=torch.float64) + 0.2
    la.temperature = 1.7
    _, covariance = dense_moments(la, x)
    _, found = la.functional_moments(x, joint=True)
    close(found, covariance)


@pytest.mark.parametrize("structure", ["diag", "full", "lowrank"])
def test_moments_under_a_prior_precision_of_each_weight(structure):
    la, x, _ = fitted(structure)
    la.prior_precision = torch.rand(la.n_params, dtype=torch.float64) + 0.2
    _, covariance = dense_moments(la, x)
    close(la.functional_moments(x, joint=True)[1], covariance)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["cnn", "transformer-tokens", "message-passing"])
def test_the_memory_budget_changes_chunks_and_nothing_else(name, structure):
    la, x, _ = fitted(structure, name)
    whole = la.functional_moments(x)
    sizes = []
    linearise = la.backend.linearise

    def counted(model, part, parameters, **options):
        sizes.append(len(part))
        return linearise(model, part, parameters, **options)

    la.backend.linearise = counted
    la.memory_budget = 1
    for part, full in zip(la.functional_moments(x), whole, strict=True):
        torch.testing.assert_close(part, full, rtol=1e-10, atol=1e-12)
    assert sizes.count(1) >= len(x)


@pytest.mark.parametrize("backend", ["native", "asdl", "backpack"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_backends_predict_alike(structure, backend):
    la, x, _ = fitted(structure, "cnn")
    other = Laplace(la.model, la.likelihood, hessian_structure=structure, backend=backend)
    other.load_state_dict(la.state_dict())
    torch.testing.assert_close(other.functional_moments(x), la.functional_moments(x), rtol=1e-9, atol=1e-12)


@pytest.mark.many(2)
@pytest.mark.parametrize("diagonal_output", [False, True])
@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "grouped-conv", "transformer-tokens", "message-passing", "experts"])
def test_rows_that_are_never_formed_give_what_whole_rows_give(name, structure, diagonal_output, monkeypatch):
    """Sums over pairs of positions, parts of the outputs, and the vectors of a table that are looked up, against rows in full."""
    la, x, _ = fitted(structure, name)
    moments = []
    for by_pairs in (True, False):
        monkeypatch.setattr(pushforward, "_pairs_are_cheaper", lambda *args, of=by_pairs: of)
        monkeypatch.setattr(pushforward, "_elements_at_once", lambda device: 30)
        moments.append(la.functional_moments(x, diagonal_output=diagonal_output)[1])
    for form in ("outer_products", "lookups"):
        monkeypatch.setattr(functional, form, lambda *args: None)
    whole = la.functional_moments(x, diagonal_output=diagonal_output)[1]
    for variances in moments:
        torch.testing.assert_close(variances, whole, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("diagonal_output", [False, True])
@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_vectors_of_a_table_that_are_looked_up_several_times(structure, diagonal_output, monkeypatch):
    """An index that occurs twice in an example, one that is padding, and one table that is read by two calls."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(6, 3, padding_idx=1), nn.Linear(3, 2)

        def forward(self, x):
            return self.out((self.table(x).cumsum(1).tanh() + self.table(x.flip(1)[:, :1])).mean(1))

    torch.manual_seed(0)
    model, x = Net().double(), torch.tensor([[2, 3, 2, 2], [1, 4, 1, 0], [5, 0, 1, 5]])
    model.table.weight.data.normal_()
    la = Laplace(model, "regression", hessian_structure=structure)
    la.fit([(x, torch.randn(3, 2, dtype=torch.float64))])
    fast = la.functional_moments(x, diagonal_output=diagonal_output)[1]
    monkeypatch.setattr(functional, "lookups", lambda *args: None)
    whole = la.functional_moments(x, diagonal_output=diagonal_output)[1]
    torch.testing.assert_close(fast, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
@pytest.mark.parametrize("name", ["cnn", "grouped-conv", "transformer-tokens"])
def test_turning_factors_or_gradients_is_the_same(name, structure, monkeypatch):
    la, x, _ = fitted(structure, name)
    moments = []
    for is_forced in (True, False):
        monkeypatch.setattr(ekfac, "_turn_factors", lambda *args, is_forced=is_forced: is_forced)
        moments.append(la.functional_moments(x)[1])
    torch.testing.assert_close(*moments, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full"])
def test_gradients_to_the_inputs(structure):
    """`backprop=True`: the variance is differentiable through the Jacobian itself."""
    case = case_of("mlp")
    la, x, _ = fitted(structure, case)
    x = x[:2].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: la(z, backprop=True), (x,))
    assert torch.autograd.gradcheck(lambda z: la.functional_moments(z, backprop=True, joint=True)[1], (x,))
    assert not la(x).requires_grad


@pytest.mark.parametrize("name", ["cnn", "fixup", "vision-transformer"])
def test_gradients_to_images(name):
    la, x, _ = fitted("kron", name)
    x = x[:1].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: la(z, backprop=True), (x,))


@pytest.mark.parametrize("backend", ["asdl", "backpack"])
def test_gradients_to_the_inputs_do_not_need_the_native_backend(backend):
    la, x, y = fitted("kron", backend=backend)
    native = Laplace(la.model, la.likelihood)
    native.fit([(x, y)])
    x = x[:2].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: la(z, backprop=True), (x,))
    (found,) = torch.autograd.grad(la.functional_moments(x, backprop=True)[1].sum(), x)
    (truth,) = torch.autograd.grad(native.functional_moments(x, backprop=True)[1].sum(), x)
    torch.testing.assert_close(found, truth)
    assert la.network.backend.name == backend


@pytest.mark.parametrize(
    "structure", ["kron", "diag", "full", "lowrank"]
)  # rounding may turn the eigenvectors of ekfac
def test_float32_is_close_to_float64(structure):
    la, x, y = fitted(structure, "cnn")
    truth = la.functional_moments(x)[1]
    single = Laplace(la.model.float(), la.likelihood, hessian_structure=structure)
    single.fit([(x.float(), y)])
    found = single.functional_moments(x.float())[1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-4 * truth.abs().max().item())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_full_data_say_all_where_the_prior_says_nothing_of_note(structure):
    """One weight and one output: every structure is the same number."""
    model, x, y = double(nn.Linear(1, 1, bias=False)), torch.randn(6, 1).double(), torch.randn(6, 1).double()
    la = Laplace(model, "regression", hessian_structure=structure, prior_precision=0.5, sigma_noise=0.3)
    la.fit([(x, y)])
    expected = x.square() / (x.square().sum() / 0.09 + 0.5)
    torch.testing.assert_close(la(x)[1][:, 0], expected)


def test_ekfac_eigenvalues_are_the_curvature_in_the_eigenvectors():
    for name in ("cnn", "transformer-tokens", "sequence-conv1d", "adapters", "grouped-conv"):
        case = case_of(name)
        la, x, y = fitted("ekfac", case)
        kron = Laplace(la.model, case.likelihood)
        kron.fit([(x, y)])
        ggn, start = exact.ggn(la.model, la.likelihood, x, y), 0
        for name_of_parameter, block in la.H.items():
            size = block.shape.numel()
            Q = kron.H[name_of_parameter].basis.rotate(torch.eye(size, dtype=torch.float64)).flatten(1)
            of_parameter = ggn[start : start + size, start : start + size]
            truth = torch.einsum("ip,ij,jp->p", Q, of_parameter, Q)
            torch.testing.assert_close(block.values.flatten(), truth, rtol=1e-9, atol=1e-12 * truth.max().item())
            errors = [(H.to_dense() - of_parameter).norm() for H in (block, kron.H[name_of_parameter])]
            assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-12 * of_parameter.norm()
            start += size


@pytest.mark.parametrize("structure", STRUCTURES)
def test_samples_have_the_posterior_covariance_exactly(structure):
    """Samples are the mean plus L ε; with the unit vectors as ε, L Lᵀ is the covariance."""
    la, _, _ = fitted(structure, "cnn", prior_precision=2.0)
    L = la.H.inv_sqrt(torch.eye(la.n_params, dtype=torch.float64), *la.fitted.damping(la.prior)).mT
    torch.testing.assert_close(L @ L.mT, dense_covariance(la), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("vocabulary", "is_small"), [(50, False), (9000, True)])
def test_rows_of_a_table_count_where_they_may_be_formed(vocabulary, is_small):
    """By reduce a small vocabulary has a dense input factor, in whose eigenvectors the rows of its table are formed in full."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(vocabulary, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.out(self.table(x).mean(1))

    x = torch.arange(6).reshape(3, 2)
    la = Laplace(Net(), "classification", kfac_approx="reduce" if vocabulary < 100 else "expand")
    la.fit([(x, torch.tensor([0, 1, 0]))])
    assert (la.H.basis("table.weight").Q_A is None) == is_small
    assert ("table.weight" in la.network.check.small_rows) == is_small
    assert "out.weight" in la.network.check.small_rows
