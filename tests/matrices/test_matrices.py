"""Every structure against dense algebra in float64."""

import pytest
import torch

from laplace_ws import NumericalRepairWarning
from laplace_ws.matrices import (
    CurvatureMatrix,
    Dense,
    Diag,
    Ekfac,
    EkfacBlock,
    Kron,
    KronBlock,
    LowRank,
    expand_per_weight,
)

torch_double = {"dtype": torch.float64}


def psd(*shape):
    factor = torch.randn(*shape, shape[-1] + 1, **torch_double)
    return factor @ factor.mT


def kron():
    return Kron(
        {
            "plain": KronBlock(torch.Size([3, 2, 2]), psd(3), psd(4), n_inputs=2),
            "vector": KronBlock(torch.Size([3]), psd(3)),
            "grouped": KronBlock(torch.Size([4, 3]), psd(2, 2), psd(2, 3), n_inputs=2),
            "embedding": KronBlock(
                torch.Size([5, 2]), psd(2), torch.rand(5, **torch_double), n_inputs=2, output_axes=(1,), diagonal_A=True
            ),
            "matmul": KronBlock(torch.Size([3, 2]), psd(2), psd(3), n_inputs=2, output_axes=(1,)),
            "long vector": KronBlock(torch.Size([3]), torch.rand(3, **torch_double), diagonal_B=True),
        }
    )


def dense():
    return Dense({"w": torch.Size([3, 2]), "b": torch.Size([3])}, psd(9))


def diag():
    return Diag({"w": torch.Size([3, 2]), "b": torch.Size([3])}, torch.rand(9, **torch_double))


def deltas(matrix):
    yield torch.tensor(0.7, **torch_double)
    per_tensor = torch.rand(len(matrix.shapes), **torch_double) + 0.1
    yield per_tensor
    if not isinstance(matrix, Kron):
        yield torch.rand(matrix.n_params, **torch_double) + 0.1


def damped(matrix, scale, delta):
    if delta.ndim and len(delta) == len(matrix.shapes):
        delta = torch.cat([d.expand(shape.numel()) for d, shape in zip(delta, matrix.shapes.values(), strict=True)])
    return scale * matrix.to_dense() + torch.diag(delta.expand(matrix.n_params))


MATRICES = [kron, dense, diag]


@pytest.mark.parametrize("make", MATRICES)
def test_log_det_and_its_gradients(make):
    matrix, scale = make(), torch.tensor(1.3, requires_grad=True, **torch_double)
    for delta in deltas(matrix):
        delta.requires_grad_(True)
        truth = torch.logdet(damped(matrix, scale, delta))
        estimate = matrix.log_det(scale, delta)
        torch.testing.assert_close(estimate, truth)
        torch.testing.assert_close(
            torch.autograd.grad(estimate, (scale, delta)), torch.autograd.grad(truth, (scale, delta))
        )


@pytest.mark.parametrize("make", MATRICES)
def test_solve_and_inverse_root(make):
    matrix, scale = make(), torch.tensor(1.3, **torch_double)
    for delta in deltas(matrix):
        precision = damped(matrix, scale, delta)
        vectors = torch.randn(4, matrix.n_params, **torch_double)
        torch.testing.assert_close(matrix.solve(vectors, scale, delta), torch.linalg.solve(precision, vectors.T).T)
        root = matrix.inv_sqrt(torch.eye(matrix.n_params, **torch_double), scale, delta).T
        torch.testing.assert_close(root @ root.T, torch.linalg.inv(precision))


def test_a_diagonal_in_parts(monkeypatch):
    """Parts of two numbers, as large parameters have them; standard deviations are those of the damping at hand, and of its type."""
    monkeypatch.setattr("laplace_ws.matrices.diag._AT_ONCE", 2)
    h = torch.rand(9, **torch_double)
    matrix = Diag({"w": torch.Size([3, 2]), "b": torch.Size([3])}, h)
    vectors = torch.randn(4, 9, **torch_double)
    for delta in [torch.tensor(0.5, **torch_double), torch.rand(2, **torch_double), torch.rand(9, **torch_double)]:
        for scale in torch.tensor([1.3, 0.2], **torch_double):
            precision = scale * h + expand_per_weight(delta, matrix.shapes)
            torch.testing.assert_close(matrix.log_det(scale, delta), precision.log().sum())
            for dtype in (torch.float64, torch.float32):
                found = matrix.inv_sqrt(vectors.to(dtype), scale, delta)
                torch.testing.assert_close(found, (vectors / precision.sqrt()).to(dtype))
    wanted = torch.autograd.grad(matrix.inv_sqrt(vectors, scale, delta.requires_grad_()).sum(), delta)
    expected = torch.autograd.grad((vectors / (scale * h + delta).sqrt()).sum(), delta)
    torch.testing.assert_close(wanted, expected)


@pytest.mark.parametrize("make", MATRICES)
def test_sum_scale_and_files(make):
    matrix = make()
    torch.testing.assert_close((matrix * 2.5).to_dense(), 2.5 * matrix.to_dense())
    torch.testing.assert_close((matrix + matrix).to_dense(), 2 * matrix.to_dense())
    restored = type(matrix).from_state_dict(matrix.shapes, matrix.state_dict())
    assert torch.equal(restored.to_dense(), matrix.to_dense())


def test_kron_sum_is_of_data_sets_not_of_products():
    """A is a mean and B a sum: two data sets of different size add up by their inputs."""
    A1, A2, B1, B2 = psd(2), psd(2), psd(3), psd(3)
    blocks = [KronBlock(torch.Size([3, 2]), B, A, n_inputs=n) for A, B, n in ((A1, B1, 1), (A2, B2, 3))]
    total = Kron({"w": blocks[0]}) + Kron({"w": blocks[1]})
    torch.testing.assert_close(total["w"].A, (A1 + 3 * A2) / 4)
    torch.testing.assert_close(total["w"].B, B1 + B2)


def test_structures_do_not_mix():
    with pytest.raises(ValueError, match="differ in structure or in parameters"):
        dense() + diag()
    with pytest.raises(ValueError, match="scalar precision or one per parameter tensor"):
        kron().log_det(torch.tensor(1.0), torch.ones(37))
    with pytest.raises(ValueError, match=r"must be a scalar, 2 numbers .* or 9"):
        diag().log_det(torch.tensor(1.0), torch.ones(4))


@pytest.mark.parametrize("make", [kron, dense])
def test_where_torchs_eigensolver_fails_another_takes_its_place(make, monkeypatch):
    matrix, scale, delta = make(), torch.tensor(1.3, **torch_double), torch.tensor(0.7, **torch_double)

    def fail(*_):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    vectors = torch.randn(4, matrix.n_params, **torch_double)
    expected = torch.linalg.solve(damped(matrix, scale, delta), vectors.T).T
    torch.testing.assert_close(matrix.solve(vectors, scale, delta), expected)


def test_negative_eigenvalue_is_not_hidden():
    broken = Kron({"b": KronBlock(torch.Size([2]), torch.diag(torch.tensor([1.0, -0.5], **torch_double)))})
    with pytest.warns(NumericalRepairWarning, match="eigenvalue of -0.5"):
        broken.log_det(torch.tensor(1.0), torch.tensor(1.0))


def low_rank():
    vectors = torch.linalg.qr(torch.randn(9, 3, **torch_double)).Q
    return LowRank({"w": torch.Size([3, 2]), "b": torch.Size([3])}, vectors, torch.rand(3, **torch_double) * 5)


def ekfac():
    blocks = kron()
    return Ekfac(
        {name: EkfacBlock(block.shape, block.basis, block.eigenvalues() + 0.3) for name, block in blocks.items()}
    )


@pytest.mark.parametrize("make", [*MATRICES, low_rank, ekfac])
def test_diagonal_of_the_inverse_and_product(make):
    matrix, scale = make(), torch.tensor(1.3, **torch_double)
    for delta in deltas(matrix) if not isinstance(matrix, Ekfac) else deltas(kron()):
        inverse = torch.linalg.inv(damped(matrix, scale, delta))
        torch.testing.assert_close(matrix.inverse_diagonal(scale, delta), inverse.diagonal())
        by_solves = CurvatureMatrix.inverse_diagonal(matrix, scale, delta)
        torch.testing.assert_close(by_solves, inverse.diagonal())
    vectors = torch.randn(4, matrix.n_params, **torch_double)
    torch.testing.assert_close(matrix.times(vectors), vectors @ matrix.to_dense())
    torch.testing.assert_close(CurvatureMatrix.times(matrix, vectors), vectors @ matrix.to_dense())
