"""Low-rank curvature against dense algebra in float64."""

import pytest
import torch

from laplace_ws.matrices import Dense, Layout, LowRank, lowrank

f64 = {"dtype": torch.float64}
SHAPES = {"w": torch.Size([4, 2]), "b": torch.Size([3]), "scalar": torch.Size([])}
P = 12


def low_rank(rank=4, values=None):
    vectors = torch.linalg.qr(torch.randn(P, rank, **f64)).Q
    return LowRank(SHAPES, vectors, torch.logspace(2, -1, rank, **f64) if values is None else values)


def tensor(value):
    return torch.tensor(value, **f64)


@pytest.fixture(params=["one chunk", "many chunks"])
def _chunks(request, monkeypatch):
    """Sums over the weights in pieces, of which the last is ragged."""
    if request.param == "many chunks":
        monkeypatch.setattr(lowrank, "_CHUNK", 20)


pytestmark = pytest.mark.usefixtures("_chunks")

DELTAS = {
    "scalar": lambda: tensor(0.7),
    "per tensor": lambda: torch.rand(3, **f64) + 0.1,
    "per weight": lambda: torch.rand(P, **f64) + 0.1,
}
GROUPS = {
    "one": torch.tensor([0, 0, 0]),
    "tensors": torch.tensor([0, 1, 2]),
    "shared": torch.tensor([1, 0, 1]),
    "weights": torch.arange(P),
    "across tensors": torch.arange(P) % 3,
    "one empty": torch.tensor([0, 2, 0]),
}


@pytest.fixture(params=DELTAS)
def delta(request):
    return DELTAS[request.param]()


def per_weight(delta):
    sizes = torch.tensor([shape.numel() for shape in SHAPES.values()])
    return delta.repeat_interleave(sizes) if delta.shape == (3,) else delta.expand(P)


def precision(H, scale, delta):
    return scale * H.to_dense() + torch.diag(per_weight(delta))


# ------------------------------------------------------------------ log det and what depends on it


def test_log_det_and_its_gradients(delta):
    H, scale = low_rank(), tensor(1.3).requires_grad_()
    delta.requires_grad_()
    truth, estimate = torch.logdet(precision(H, scale, delta)), H.log_det(scale, delta)
    torch.testing.assert_close(estimate, truth, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(estimate, (scale, delta)), torch.autograd.grad(truth, (scale, delta))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_log_det_passes_gradcheck_twice(delta):
    H, inputs = low_rank(), (tensor(1.3).requires_grad_(), delta.requires_grad_())
    assert torch.autograd.gradcheck(H.log_det, inputs)
    assert torch.autograd.gradgradcheck(H.log_det, inputs)


def test_log_det_of_single_precision_eigenvectors_is_double(delta):
    H = low_rank()
    single = LowRank(SHAPES, H.vectors.float(), H.values)
    estimate = single.log_det(torch.tensor(1.3), delta.float())
    assert estimate.dtype == torch.float64
    torch.testing.assert_close(estimate, H.log_det(tensor(1.3), delta), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_effective_parameters_equal_dense_algebra(groups):
    H, scale = low_rank(), tensor(1.3)
    of_group = torch.rand(int(groups.max()) + 1, **f64) + 0.1
    gamma, slopes = H.effective_parameters(scale, of_group, groups)
    dense_gamma, dense_slopes = Dense(SHAPES, H.to_dense()).effective_parameters(scale, of_group, groups)
    torch.testing.assert_close(gamma, dense_gamma, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(slopes, dense_slopes, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_effective_parameters_equal_finite_differences(groups):
    """γ_g = G_g − ∂ log det/∂ log δ_g, and its slopes, by central differences."""
    H, scale, step = low_rank(), tensor(1.3), 1e-5
    u = torch.randn(int(groups.max()) + 1, **f64)

    def log_det(u):
        return H.log_det(scale, u.exp()[groups])

    def gammas(u):
        return H.effective_parameters(scale, u.exp(), groups)[0]

    def differences(f):
        return torch.stack([(f(u + d) - f(u - d)) / (2 * step) for d in step * torch.eye(len(u), **f64)], -1)

    gamma, slopes = H.effective_parameters(scale, u.exp(), groups)
    sizes = per_weight(groups) if len(groups) == 3 else groups
    torch.testing.assert_close(gamma, sizes.bincount(minlength=len(u)) - differences(log_det), rtol=0, atol=1e-8)
    slopes = slopes if slopes.ndim == 2 else slopes.diag()
    torch.testing.assert_close(slopes, -differences(gammas), rtol=0, atol=1e-8)


def test_a_tiny_number_of_effective_parameters_keeps_its_digits():
    """At δ far above the curvature γ → tr H/δ; as 1 − δ Σ_ii it would be lost to rounding."""
    H = low_rank()
    gamma, _ = H.effective_parameters(tensor(1.0), torch.full((3,), 1e14, **f64), GROUPS["tensors"])
    traces = torch.stack([part.sum() for part in H.to_dense().diagonal().split([8, 3, 1])]) / 1e14
    torch.testing.assert_close(gamma, traces, rtol=1e-9, atol=0)


# ------------------------------------------------------------------ the covariance


def test_solve(delta):
    H, scale, vectors = low_rank(), tensor(1.3), torch.randn(5, P, **f64)
    truth = torch.linalg.solve(precision(H, scale, delta), vectors.T).T
    torch.testing.assert_close(H.solve(vectors, scale, delta), truth, rtol=1e-11, atol=1e-12)


def test_inverse_root_gives_the_covariance_of_samples(delta):
    H, scale = low_rank(), tensor(1.3)
    root = H.inv_sqrt(torch.eye(P, **f64), scale, delta).T
    torch.testing.assert_close(root @ root.T, torch.linalg.inv(precision(H, scale, delta)), rtol=1e-11, atol=1e-12)


def test_stiff_directions_survive_single_precision():
    """s·l/δ = 1e12: the variance along an eigenvector is the difference of two numbers that agree to 12 digits."""
    H = LowRank(SHAPES, torch.eye(P)[:, :2].contiguous(), torch.tensor([1e12, 1e6]))
    one = torch.tensor(1.0)
    variances = H.solve(torch.eye(P), one, one).diagonal()[:3]
    torch.testing.assert_close(variances, torch.tensor([1e-12, 1e-6, 1.0]), rtol=1e-3, atol=0)
    deviations = H.inv_sqrt(torch.eye(P), one, one).diagonal()[:3]
    torch.testing.assert_close(deviations, torch.tensor([1e-6, 1e-3, 1.0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["solve", "inv_sqrt"])
def test_all_is_differentiable_in_scale_and_delta(name, delta):
    H, vectors = low_rank(), torch.randn(2, P, **f64)

    def function(scale, delta):
        return getattr(H, name)(vectors, scale, delta)

    assert torch.autograd.gradcheck(function, (tensor(1.3).requires_grad_(), delta.requires_grad_()))


@pytest.mark.parametrize("layout", Layout)
def test_pushforward_equals_that_of_the_dense_matrix(layout, delta):
    H, scale = low_rank(), tensor(1.3)
    rows = torch.randn(3, 2, P, **f64)
    dampings = [(scale, delta), (2 * scale, tensor(0.4))]
    results = []
    for matrix in (H, Dense(SHAPES, H.to_dense())):
        pushforward = matrix.pushforward(dampings, layout)
        for name, part in zip(SHAPES, rows.split([8, 3, 1], dim=2), strict=True):
            pushforward.add(name, part)
        results.append(pushforward.result())
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ algebra


def test_sum_is_exact_and_of_both_ranks():
    one, other = low_rank(4), low_rank(3)
    total = one + other
    assert total.rank == 7
    torch.testing.assert_close(total.to_dense(), one.to_dense() + other.to_dense(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.vectors.T @ total.vectors, torch.eye(7, **f64), rtol=0, atol=1e-13)
    assert (total.values.diff() <= 0).all()


def test_sum_with_itself_and_of_more_ranks_than_weights():
    H = low_rank(8)
    total = H + H
    assert total.rank == P
    torch.testing.assert_close(total.to_dense(), 2 * H.to_dense(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.vectors.T @ total.vectors, torch.eye(P, **f64), rtol=0, atol=1e-13)


def test_scale_and_files():
    H = low_rank()
    torch.testing.assert_close((H * 2.5).to_dense(), 2.5 * H.to_dense())
    restored = LowRank.from_state_dict(H.shapes, H.state_dict())
    assert torch.equal(restored.to_dense(), H.to_dense())


def test_no_curvature_is_the_prior(delta):
    H, one = low_rank(0), tensor(1.0)
    torch.testing.assert_close(H.log_det(one, delta), per_weight(delta).log().sum())
    vectors = torch.randn(2, P, **f64)
    torch.testing.assert_close(H.solve(vectors, one, delta), vectors / per_weight(delta))
    torch.testing.assert_close(H.inv_sqrt(vectors, one, delta), vectors / per_weight(delta).sqrt())
    assert not H.effective_parameters(one, torch.ones(3, **f64), GROUPS["tensors"])[0].any()
    torch.testing.assert_close((H + low_rank(2, torch.ones(2, **f64))).values, torch.ones(2, **f64))
    assert (H + H).rank == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"must be 12 weights × 2 eigenvalues, got shape \(3, 2\)"):
        LowRank(SHAPES, torch.eye(3)[:, :2], torch.ones(2))
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        low_rank(2, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="differ in structure or in parameters"):
        low_rank() + Dense(SHAPES, torch.eye(P))
    with pytest.raises(ValueError, match=r"must be a scalar, 3 numbers .* or 12"):
        low_rank().log_det(tensor(1.0), torch.ones(4))
