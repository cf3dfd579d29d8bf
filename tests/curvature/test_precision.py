"""Sums over many batches, in few digits and many."""

import pytest
import torch
from torch import nn

from laplace_ws import InvalidBatchError, Laplace, UnsupportedParameterError, kron_factors
from laplace_ws.curvature import Curvature, CurvatureSum, make_backend
from laplace_ws.kfac import DenseAccumulator, DiagAccumulator, factors, roles
from laplace_ws.likelihoods import Gaussian


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_activations_are_summed_in_single_precision(autocast):
    """600 batches: a running sum in bfloat16, of 8 bits, would stop growing after some hundred."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(600, 4, 3)
    truth = kron_factors(model, "regression", [(x.flatten(0, 1), torch.randn(2400, 2))])
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        estimate = kron_factors(model, "regression", [(batch, torch.zeros(4, 2, dtype=x.dtype)) for batch in x])
    for name, block in truth.items():
        assert estimate[name].B.dtype == torch.float32
        assert estimate[name].B.trace().item() == pytest.approx(block.B.trace().item(), rel=0.02), name
        if block.A is not None:
            assert estimate[name].A.trace().item() == pytest.approx(block.A.trace().item(), rel=0.02), name


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_half_precision_models_have_single_precision_curvature(structure):
    model, x = nn.Linear(3, 2).bfloat16(), torch.randn(400, 5, 3).bfloat16()
    la = Laplace(model, "regression", hessian_structure=structure)
    la.fit([(batch, torch.zeros(5, 2, dtype=x.dtype)) for batch in x])
    truth = x.flatten(0, 1).float().square().sum(0)
    torch.testing.assert_close(la.H.to_dense().diagonal()[:3], truth, rtol=1e-3, atol=0)


def test_label_samples_are_independent_of_torchs_own_stream():
    """Inputs drawn just after the seed, as people do, must not come back as the noise of the samples."""
    torch.manual_seed(0)
    x = torch.randn(4000, 3)
    model = nn.Linear(3, 3, bias=False)
    sampled = kron_factors(model, "regression", [(x, torch.zeros(4000, 3))], curvature="ggn_mc")
    la = Laplace(model, "regression", hessian_structure="diag", curvature="ggn_mc")
    la.fit([(x, torch.zeros(4000, 3))])
    ratios = la.H.values.reshape(3, 3) / x.square().sum(0)
    assert (ratios - 1).abs().max() < 0.2
    assert torch.equal(
        sampled["weight"].B,
        kron_factors(model, "regression", [(x, torch.zeros(4000, 3))], curvature="ggn_mc")["weight"].B,
    )


def test_small_noise_loses_no_digits_of_the_likelihood():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(5000, 3)
    y = model(x).detach() + 3e-4 * torch.randn(5000, 1)
    single, double = (
        Laplace(model, "regression", sigma_noise=3e-4),
        Laplace(nn.Linear(3, 1).double(), "regression", sigma_noise=3e-4),
    )
    double.model.load_state_dict(model.state_dict())
    single.fit([(x, y)])
    double.fit([(x.double(), y.double())])
    # the outputs themselves carry single-precision rounding of about 1e-7, a thousandth of the noise
    assert single.log_likelihood.item() == pytest.approx(double.log_likelihood.item(), abs=2)


def test_a_subset_with_sequences_of_unequal_length_scales_without_rounding():
    model = nn.Linear(3, 1)
    data = [(torch.randn(2, t, 3), torch.randn(2, t, 1)) for t in (3, 4)]
    la = Laplace(model, "regression", sigma_noise=0.01)
    la.fit(data)
    whole = la.log_likelihood.item()
    la.fit(data, n_data=7)
    assert la.log_likelihood.item() == pytest.approx(whole * 7 / 4, rel=1e-12)


def test_dense_posterior_survives_a_weak_prior_in_single_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 1))
    la = Laplace(model, "regression", hessian_structure="full", prior_precision=1e-5)
    la.fit([(10 * torch.randn(100, 20), torch.randn(100, 1))])
    vector = la.log_marginal_likelihood(torch.full((la.n_params,), 1e-5))
    # the null space is exact to the rounding of the largest eigenvalue, about 1e5 · 1e-16, against δ = 1e-5
    assert vector.item() == pytest.approx(la.log_marginal_likelihood().item(), abs=1e-4)
    assert la.sample(2).isfinite().all()


def test_large_vectors_and_vocabularies(monkeypatch):
    """Above their limits vectors get the diagonal of their block, and embeddings under "auto" K-FAC-expand."""
    model = nn.Sequential(nn.Embedding(9, 5), nn.LayerNorm(5), nn.Flatten(), nn.Linear(10, 3)).double()
    data = [(torch.randint(0, 9, (6, 2)), torch.randint(0, 3, (6,)))]
    below = kron_factors(model, "classification", data)
    expand = kron_factors(model, "classification", data, kfac_approx="expand")
    monkeypatch.setattr(roles, "LARGEST_DENSE_VECTOR", 4)
    monkeypatch.setattr(roles, "LARGEST_DENSE_VOCABULARY", 8)
    above = kron_factors(model, "classification", data)
    for name in ("1.weight", "1.bias"):
        torch.testing.assert_close(above[name].to_dense(), below[name].to_dense().diagonal().diag())
    torch.testing.assert_close(above["0.weight"].to_dense(), expand["0.weight"].to_dense())
    with pytest.raises(UnsupportedParameterError, match=r'kfac_approx={"0.weight": "expand"}'):
        kron_factors(model, "classification", data, kfac_approx="reduce")


@pytest.mark.parametrize(
    "shape", [(65_536, 4), (2, 10_000, 4), (4_096, 3), (5_000, 8), (3, 4), (5_000, 1_200)], ids=str
)
def test_long_sums_keep_their_digits(shape):
    """Rows of very different size, as the gradients of many pixels are."""
    rows = torch.randn(shape) * torch.rand(*shape[:-1], 1) ** 4
    truth = rows.double().mT @ rows.double()
    assert (factors.gram(rows).double() - truth).norm() / truth.norm() < 4e-6
    torch.testing.assert_close(factors.gram(rows.double()), truth)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_products_of_rounded_inputs_are_summed_in_single_precision(kfac_approx):
    """bfloat16 has 8 bits: each input is off by up to 2⁻⁹ of itself, their summed products by less."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 4))
    data = [(torch.randn(8, 3, 16, 16), torch.randint(0, 4, (8,))) for _ in range(40)]

    def factors_in(precision):
        return kron_factors(model, "classification", data, kfac_approx=kfac_approx, factor_precision=precision)

    truth, rounded = factors_in("float32"), factors_in("bf16")
    for name in ("0.weight", "3.weight"):
        for factor, other in ((truth[name].A, rounded[name].A), (truth[name].B, rounded[name].B)):
            error = (other - factor).norm() / factor.norm()
            assert 1e-5 < error < 2**-8, name
    double = kron_factors(
        model.double(), "classification", [(x.double(), y) for x, y in data[:2]], factor_precision="bf16"
    )
    exact = kron_factors(model, "classification", [(x.double(), y) for x, y in data[:2]])
    torch.testing.assert_close(double["0.weight"].to_dense(), exact["0.weight"].to_dense(), rtol=1e-12, atol=1e-15)


def test_tf32_is_allowed_for_the_products_alone(monkeypatch):
    seen = []
    product = factors._long_product
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(
        factors, "_long_product", lambda a, b: seen.append(matmul.fp32_precision == "tf32") or product(a, b)
    )
    model, x = nn.Linear(3, 2), torch.randn(8, 4, 3)
    for precision, allowed in (("float32", False), ("tf32", True)):
        seen.clear()
        with pytest.raises(InvalidBatchError):
            kron_factors(
                model, "regression", [(x, torch.zeros(8, 4, 2)), (x, torch.zeros(1))], factor_precision=precision
            )
        assert seen
        assert all(flag is allowed for flag in seen)
        assert matmul.fp32_precision == "none"
    with pytest.raises(ValueError, match="unknown factor_precision 'half': choose one of 'float32', 'tf32', 'bf16'"):
        kron_factors(model, "regression", [(x, torch.zeros(8, 4, 2))], factor_precision="half")


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_torchs_own_precision_is_left_as_it_is(precision):
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee", "none"):
            matmul.fp32_precision = setting
            kron_factors(
                nn.Linear(3, 2), "regression", [(torch.randn(8, 3), torch.zeros(8, 2))], factor_precision=precision
            )
            assert matmul.fp32_precision == setting
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_parameters_of_several_precisions_and_of_no_dimension(structure):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.randn(3))
            self.linear = nn.Linear(3, 2).double()

        def forward(self, x):
            return self.linear((x * self.scale + self.shift).double())

    model, x = Mixed(), torch.randn(8, 3)
    la = Laplace(model, "regression", hessian_structure=structure)
    la.fit([(x, torch.zeros(8, 2, dtype=torch.float64))])
    weight = model.linear.weight.detach()
    torch.testing.assert_close(
        la.H.to_dense()[0, 0].double(), (x.double() @ weight.T).square().sum(), rtol=1e-5, atol=0
    )


def test_an_earlier_result_does_not_change_with_later_batches():
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    for kind in (DenseAccumulator, DiagAccumulator):
        total = CurvatureSum(model, Gaussian(), kind, curvature=Curvature.GGN, backend=make_backend("native"))
        total.add(x, torch.zeros(8, 2))
        first = total.accumulator.result()
        before = first.to_dense().clone()
        total.add(x, torch.zeros(8, 2))
        assert torch.equal(first.to_dense(), before)


def test_a_weight_that_changes_its_role_between_batches_is_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3) + torch.ones(3, 3))  # symmetric, so that the outputs are the same

        def forward(self, x):
            return x @ self.weight if len(x) > 9 else nn.functional.linear(x, self.weight)

    data = [(torch.randn(n, 3), torch.zeros(n, 3)) for n in (8, 12)]
    with pytest.raises(UnsupportedParameterError, match="'weight' is used in one batch otherwise than in another"):
        kron_factors(Fickle(), "regression", data)
