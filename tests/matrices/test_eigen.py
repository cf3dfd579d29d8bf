"""The precision of each decomposition: decided by factor, reported, and as good as float64 where it is less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laplace_ws.matrices import Dense, Kron, KronBlock
from laplace_ws.matrices.eigen import decomposition_dtype, eigenvalues, eigh, rounding, thin_eigh

F32, F64 = torch.float32, torch.float64


def with_spectrum(values: torch.Tensor) -> torch.Tensor:
    """A symmetric float64 matrix with these eigenvalues."""
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=F64)).Q
    return (Q * values) @ Q.mT


def definite(n: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return with_spectrum(torch.linspace(0.5, 2.0, n, dtype=F64)).to(dtype)


def of_low_rank(n: int, dtype: torch.dtype = F32) -> torch.Tensor:
    x = torch.randn(n // 2, n, dtype=dtype)
    return x.mT @ x


def kron() -> tuple[Kron, dict]:
    blocks = {
        "both sides": KronBlock(torch.Size([6, 8]), of_low_rank(6), definite(8), n_inputs=1),
        "vector": KronBlock(torch.Size([6]), definite(6)),
        "float64": KronBlock(torch.Size([6, 8]), definite(6, F64), definite(8, F64), n_inputs=1),
        "grouped": KronBlock(
            torch.Size([6, 4]),
            torch.stack([definite(3), definite(3)]),
            torch.stack([definite(4), of_low_rank(4)]),
            n_inputs=1,
        ),
        "embedding": KronBlock(
            torch.Size([5, 6]), definite(6), torch.rand(5), n_inputs=1, output_axes=(1,), diagonal_A=True
        ),
        "diagonal": KronBlock(torch.Size([3]), torch.rand(3), diagonal_B=True),
    }
    expected = {
        "both sides": (F64, F32),
        "vector": (F32, None),
        "float64": (F64, F64),
        "grouped": (F32, F64),
        "embedding": (F32, None),
        "diagonal": (None, None),
    }
    return Kron(blocks), expected


def never(*_, **__):
    raise AssertionError("called")


def test_each_factor_is_decided_and_reported_without_decomposing(monkeypatch):
    H, expected = kron()
    monkeypatch.setattr(torch.linalg, "eigh", never)
    monkeypatch.setattr(torch.linalg, "eigvalsh", never)
    assert H.decomposition_dtypes == expected
    shapes = {"w": torch.Size([6])}
    assert Dense(shapes, definite(6)).decomposition_dtype == F32
    assert Dense(shapes, of_low_rank(6)).decomposition_dtype == F64


@pytest.mark.parametrize("solver", ["eigvalsh", "eigh"])
def test_the_solver_runs_in_the_reported_precision(monkeypatch, solver):
    H, expected = kron()
    seen, real = [], getattr(torch.linalg, solver)

    def spy(matrix):
        seen.append(matrix.dtype)
        return real(matrix)

    monkeypatch.setattr(torch.linalg, solver, spy)
    for name, block in H.items():
        seen.clear()
        _ = block.basis if solver == "eigh" else None
        values = block.factor_eigenvalues
        assert seen == [dtype for dtype in expected[name] if dtype is not None], name
        assert all(v.dtype == F64 for v in values)


def test_log_det_needs_no_eigenvectors(monkeypatch):
    H, _ = kron()
    dense = Dense({"w": torch.Size([8])}, definite(8, F64))
    monkeypatch.setattr(torch.linalg, "eigh", never)
    one = torch.ones((), dtype=F64)
    torch.testing.assert_close(
        H.log_det(one, one), torch.logdet(H.to_dense().double() + torch.eye(H.n_params, dtype=F64))
    )
    torch.testing.assert_close(dense.log_det(one, one), torch.logdet(dense.matrix + torch.eye(8, dtype=F64)))
    with pytest.raises(AssertionError, match="called"):
        H.solve(torch.ones(1, H.n_params), one, one)


def test_eigenvalues_come_from_the_eigenvectors_once_there_are_some(monkeypatch):
    H, _ = kron()
    one = torch.ones((), dtype=F64)
    H.solve(torch.ones(1, H.n_params), one, one)
    monkeypatch.setattr(torch.linalg, "eigvalsh", never)
    assert H.log_det(one, one).isfinite()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 40), log_condition=st.floats(0, 9), log_size=st.floats(-20, 20), seed=st.integers(0, 2**31))
def test_the_short_way_is_as_good_as_the_long_one(n, log_condition, log_size, seed):
    torch.manual_seed(seed)
    size = 10.0**log_size
    matrix = (size * with_spectrum(torch.logspace(-log_condition, 0, n, dtype=F64))).float()
    truth = torch.linalg.eigvalsh(matrix.double())
    margin = rounding(n, F32) * truth[-1]
    chosen = decomposition_dtype(matrix)
    if truth[0] > 4 * n**0.5 * margin:
        assert chosen == F32
    if chosen == F32:
        assert truth[0] > 0
        for values in (eigenvalues(matrix, F32, "it"), eigh(matrix, F32, "it")[0]):
            assert values.dtype == F64
            assert (values > 0).all()
            assert ((values - truth).abs() <= margin / 5).all()
            torch.testing.assert_close(values.log().sum(), truth.log().sum(), rtol=0, atol=0.2)
    elif truth[0] < -margin / 10:
        raise AssertionError("the matrix of the test is not semi-definite")


def test_the_other_side_would_lose_definiteness():
    """What float64 saves: with a condition of 1e8 the smallest eigenvalue is noise in float32."""
    matrix = with_spectrum(torch.logspace(-8, 0, 200, dtype=F64)).float()
    assert decomposition_dtype(matrix) == F64
    truth = torch.linalg.eigvalsh(matrix.double())
    short = torch.linalg.eigvalsh(matrix).double()
    assert (short - truth).abs().max() > truth.abs().min()


def test_zero_and_non_finite_factors_go_the_long_way():
    assert decomposition_dtype(torch.zeros(3, 3)) == F64
    assert decomposition_dtype(torch.full((3, 3), torch.nan)) == F64
    assert decomposition_dtype(torch.full((3, 3), torch.inf)) == F64


def test_where_torchs_eigensolver_fails_scipy_keeps_the_precision(monkeypatch):
    matrix = torch.stack([definite(4), 2 * definite(4)])

    def fail(*_):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    values, vectors = eigh(matrix, F32, "it")
    vectors = vectors.double()
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, matrix.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(eigenvalues(matrix, F32, "it"), values)


def test_a_definite_dense_matrix_is_taken_as_it_is(monkeypatch):
    H = Dense({"w": torch.Size([6]), "b": torch.Size([2])}, definite(8))
    monkeypatch.setattr(torch.linalg, "eigh", never)
    scale, delta = torch.tensor(1.3, dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)
    precision = 1.3 * H.matrix.double() + torch.diag(delta.repeat_interleave(torch.tensor([6, 2])))
    torch.testing.assert_close(H.log_det(scale, delta), torch.logdet(precision), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_factor_of_few_inputs_is_decomposed_by_its_range(dtype, monkeypatch):
    """A mean over 20 inputs of 300 features: eigenvalues and eigenvectors of the whole way, without a matrix of 300 rows in it."""
    x = torch.randn(20, 300, dtype=F64) * torch.logspace(0, -3, 20, dtype=F64)[:, None]
    factor = (x.mT @ x / 20).to(dtype)
    truth = torch.linalg.eigvalsh(factor.double())
    seen, real = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: seen.append(len(matrix)) or real(matrix))
    monkeypatch.setattr(torch.linalg, "eigvalsh", never)
    block = KronBlock(torch.Size([1, 300]), torch.ones(1, 1, dtype=dtype), factor, n_inputs=20)
    values, vectors = block.eigen[1]
    assert max(seen) < 50
    assert values.dtype == F64
    assert vectors.dtype == dtype
    margin = rounding(300, dtype) * truth[-1]
    assert ((values - truth).abs() <= margin).all()
    assert (values[:-30] == 0).all()
    vectors = vectors.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(300, dtype=F64), rtol=0, atol=300 * eps)
    torch.testing.assert_close(
        (vectors * values) @ vectors.mT, factor.double(), rtol=0, atol=300 * eps * truth[-1].item()
    )


def test_a_guess_of_the_rank_that_is_too_low_is_noticed():
    """As for factors that are averaged with weights, whose number of inputs says less than their rank."""
    x = torch.randn(60, 300, dtype=F64) * torch.logspace(0, -5, 60, dtype=F64)[:, None]
    factor = x.mT @ x
    assert thin_eigh(factor, 60, "it", vectors=False) is not None
    assert thin_eigh(factor, 30, "it", vectors=False) is None
    block = KronBlock(torch.Size([1, 300]), torch.ones(1, 1, dtype=F64), factor, n_inputs=30)
    torch.testing.assert_close(block.factor_eigenvalues[1], torch.linalg.eigvalsh(factor).clamp_min(0))
