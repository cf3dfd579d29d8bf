"""What of a batch counts, and how: labels that are missing, noise by output or of the model's own, images, few digits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_ws import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, InvalidBatchError, kron_factors
from laplace_ws.curvature import FACTOR_BACKENDS, Curvature, CurvatureSum, exact, make_backend
from laplace_ws.kfac import DenseAccumulator, DiagAccumulator

# ------------------------------------------------------------------ labels that do not count


def tokens():
    """Ten sequences of four tokens, of which some have no label; the last sequence has none at all."""
    torch.manual_seed(2)
    x, y = torch.randn(10, 4, 3).double(), torch.randint(0, 3, (10, 4))
    y[torch.rand(10, 4) < 0.4] = -100
    y[-1] = -100
    return x, y


def token_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def summed(model, likelihood, data, kind=DenseAccumulator, **options):
    options = {"curvature": Curvature.GGN, "backend": make_backend("native")} | options
    total = CurvatureSum(model, likelihood, kind, **options)
    total.add_all(data)
    return total


IGNORING = Categorical(ignore_index=-100)


@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
def test_ignored_labels_have_no_curvature(backend):
    x, y = tokens()
    model, counts = token_model(), y != -100
    options = {"backend": make_backend(backend)}
    full = summed(model, IGNORING, [(x, y)], **options)
    alone = exact.ggn(model, "classification", x[counts], y[counts])  # a token of this network is an example of its own
    torch.testing.assert_close(full.accumulator.result().to_dense(), alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(exact.ggn(model, IGNORING, x, y), alone)
    assert (full.totals.n_examples, full.totals.n_targets) == (10, counts.sum())
    nll = Categorical().nll_sum(model(x)[counts], y[counts]).item()
    assert full.totals.nll_sum == pytest.approx(nll, rel=1e-12)
    diag = summed(model, IGNORING, [(x, y)], DiagAccumulator, **options).accumulator.result()
    torch.testing.assert_close(diag.values, alone.diagonal(), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(alone, exact.ggn(model, "classification", x, y.clamp(min=0)))


@pytest.mark.parametrize("curvature", ["ggn", "ef"])
def test_gradient_factors_are_those_of_the_labelled_tokens(curvature):
    """B is theirs, and A the mean over all tokens: every one is a position of the layers."""
    x, y = tokens()
    model, counts = token_model(), y != -100
    found = kron_factors(model, IGNORING, [(x, y)], curvature=curvature, kfac_approx="expand")
    labelled = kron_factors(
        model, "classification", [(x[counts], y[counts])], curvature=curvature, kfac_approx="expand"
    )
    every = kron_factors(model, "classification", [(x, y.clamp(min=0))], curvature=curvature, kfac_approx="expand")
    for name, block in found.items():
        torch.testing.assert_close(block.B, labelled[name].B, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(block.B, every[name].B)
        if block.A is not None:
            torch.testing.assert_close(block.A, every[name].A, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("curvature", ["ggn_mc", "ggn_mc_rademacher"])
def test_sampled_columns_leave_ignored_labels_out(curvature):
    """With all but one label ignored the sum over draws tends to the exact matrix: five standard errors of 4,000 draws are 0.1."""
    x, y = tokens()
    model = token_model()
    y[:] = -100
    y[3, 1] = 2
    truth = exact.ggn(model, "classification", x[3, 1][None], y[3, 1][None])
    sums = [
        summed(model, IGNORING, [(x[3:4], y[3:4])], curvature=Curvature(curvature), mc_samples=4000,
               generator=torch.Generator().manual_seed(0)).accumulator.result().to_dense(),
        summed(model, IGNORING, [(x, y)], curvature=Curvature(curvature), mc_samples=4000,
               generator=torch.Generator().manual_seed(1)).accumulator.result().to_dense(),
    ]  # fmt: skip
    for found in sums:
        assert ((found - truth).norm() / truth.norm()).item() < 0.1
        assert torch.linalg.matrix_rank(found, rtol=1e-10) == 2  # one softmax of three classes


@pytest.mark.parametrize("curvature", list(Curvature))
def test_a_batch_without_labels_adds_nothing(curvature):
    x, y = tokens()
    model, nothing = token_model(), torch.full_like(y, -100)
    options = {"curvature": curvature}

    def run(data):
        return summed(model, IGNORING, data, generator=torch.Generator().manual_seed(0), **options)

    # the labelled batch first, as both draw from one generator
    with_it, without = run([(x, y), (x + 1, nothing)]), run([(x, y)])
    assert torch.equal(with_it.accumulator.result().to_dense(), without.accumulator.result().to_dense())
    assert (with_it.totals.nll_sum, with_it.totals.n_targets) == (without.totals.nll_sum, without.totals.n_targets)
    assert (with_it.totals.n_examples, without.totals.n_examples) == (20, 10)


def test_any_split_of_the_data_gives_the_same_factors():
    x, y = tokens()
    model = token_model()
    whole, split = (kron_factors(model, IGNORING, zip(x.split(n), y.split(n), strict=True)) for n in (10, 1))
    torch.testing.assert_close(split.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-12)


def test_data_without_any_label_are_refused():
    x, y = tokens()
    with pytest.raises(
        InvalidBatchError, match=r"no target of the 10 examples counts for Categorical\(ignore_index=-100\)"
    ):
        kron_factors(token_model(), IGNORING, [(x, torch.full_like(y, -100))])


# ------------------------------------------------------------------ noise that the model gives itself, noise by output, images


def weighted(J, scale):
    """Σ_n J_nᵀ diag(scale²) J_n."""
    rows = J * scale.flatten(1)[..., None]
    return rows.flatten(0, 1).T @ rows.flatten(0, 1)


@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
def test_heteroscedastic_curvature_is_the_fisher_information(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y, likelihood = torch.randn(7, 3).double(), torch.randn(7, 2).double(), HeteroscedasticGaussian()
    log_variance = model(x)[:, 2:].detach()
    roots = torch.cat([(-log_variance / 2).exp(), torch.full_like(log_variance, 0.5**0.5)], 1)
    truth = weighted(exact.jacobian(model, x), roots)
    options = {"backend": make_backend(backend)}
    torch.testing.assert_close(summed(model, likelihood, [(x, y)], **options).accumulator.result().to_dense(), truth)
    ef = summed(model, likelihood, [(x, y)], curvature=Curvature.EF, **options)
    torch.testing.assert_close(ef.accumulator.result().to_dense(), exact.empirical_fisher(model, likelihood, x, y))
    assert ef.totals.n_targets == 14
    kron = kron_factors(model, likelihood, [(x, y)], backend=backend)
    slices = exact.parameter_slices(model)
    for name in ("0.bias", "2.bias"):  # exact for biases of layers used once
        torch.testing.assert_close(kron[name].to_dense(), truth[slices[name], slices[name]])


def test_noise_by_output_weighs_the_outputs():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(7, 3).double(), torch.randn(7, 2).double()
    likelihood = Gaussian(0.5, [1.0, 4.0])
    kron = kron_factors(model, likelihood, [(x, y)])
    torch.testing.assert_close(kron["bias"].to_dense(), torch.diag(7 / torch.tensor([0.5, 2.0]).double() ** 2))
    torch.testing.assert_close(kron["weight"].to_dense(), exact.ggn(model, likelihood, x, y)[:6, :6])


def image_model(n_outputs):
    torch.manual_seed(0)
    first, last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, n_outputs, 3, padding=1, bias=False)
    return nn.Sequential(first, nn.ReLU(), last).double()


IMAGE_LIKELIHOODS = {
    "regression": (Gaussian(0.6), 2, lambda f: torch.randn_like(f)),
    "multi-label": (Bernoulli(), 2, lambda f: (torch.rand_like(f) < 0.5).double()),
    "segmentation": (Bernoulli(), 1, lambda f: torch.rand_like(f) < 0.5),
}


@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
@pytest.mark.parametrize("name", IMAGE_LIKELIHOODS)
def test_images_to_images(name, backend):
    likelihood, n_outputs, targets = IMAGE_LIKELIHOODS[name]
    model, x = image_model(n_outputs), torch.randn(3, 2, 4, 3).double()
    y = targets(model(x).detach())
    truth, slices = exact.ggn(model, likelihood, x, y), exact.parameter_slices(model)
    total = summed(model, likelihood, [(x, y)], backend=make_backend(backend))
    torch.testing.assert_close(total.accumulator.result().to_dense(), truth, rtol=1e-10, atol=1e-12)
    assert total.totals.n_targets == y.numel()
    kron = kron_factors(model, likelihood, [(x, y)], kfac_approx="expand", backend=backend)
    auto = kron_factors(model, likelihood, [(x, y)], backend=backend)
    assert torch.equal(auto.to_dense(), kron.to_dense())  # outputs of several terms are the expand setting
    if (
        likelihood.is_regression
    ):  # the last layer meets columns that do not depend on the input: A ⊗ B is exact but for the borders
        last = kron["2.weight"]
        torch.testing.assert_close(last.B, torch.eye(2).double() * 3 * 12 / 0.6**2)
        torch.testing.assert_close(
            last.to_dense(), truth[slices["2.weight"], slices["2.weight"]], rtol=1e-10, atol=1e-10
        )
    reduce = kron_factors(model, likelihood, [(x, y)], kfac_approx="reduce", backend=backend)
    bias = slices["0.bias"]
    torch.testing.assert_close(reduce["0.bias"].to_dense(), truth[bias, bias], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("curvature", ["ggn_mc", "ggn_mc_rademacher"])
@pytest.mark.parametrize("name", IMAGE_LIKELIHOODS)
def test_sampled_images_to_images(name, curvature):
    """The trace of the estimate has a relative standard error of 0.009 at most, with 400 draws of 3 images; five of them are allowed."""
    likelihood, n_outputs, targets = IMAGE_LIKELIHOODS[name]
    model, x = image_model(n_outputs), torch.randn(3, 2, 4, 3).double()
    y = targets(model(x).detach())
    estimate = summed(model, likelihood, [(x, y)], curvature=Curvature(curvature), mc_samples=400)
    ratio = estimate.accumulator.result().to_dense().trace() / exact.ggn(model, likelihood, x, y).trace()
    assert abs(ratio.item() - 1) < 0.045


# ------------------------------------------------------------------ few digits


HALF_LIKELIHOODS = {
    "classification": (IGNORING, 4, lambda n: torch.arange(n) % 4),
    "regression": (Gaussian(0.5, [1.0, 2.0, 1.0, 0.5]), 4, lambda n: torch.zeros(n, 4)),
    "heteroscedastic": (HeteroscedasticGaussian(), 4, lambda n: torch.zeros(n, 2)),
    "binary": (Bernoulli(), 4, lambda n: torch.zeros(n, 4)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF_LIKELIHOODS)
def test_half_precision_models_agree_with_single_precision_ones(name, dtype):
    """The numbers of the model and of its inputs are the same in both, so the first A, of the inputs alone, is equal but for the sums.

    A rounding is off by u = ε/2 of a number at most, and by u/√3 in the root mean square. On the path to a gradient in the first layer
    there are eight (product and bias of two layers, tanh, the column, the product back, tanh'), and a factor holds its square: 2 √8 u/√3
    or 3.3 u of the norm, less where a sum runs over many examples.
    """
    u = torch.finfo(dtype).eps / 2
    likelihood, n_outputs, targets = HALF_LIKELIHOODS[name]
    torch.manual_seed(0)
    half = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, n_outputs)).to(
        dtype
    )
    torch.manual_seed(0)
    single = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, n_outputs))
    single.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    x, y = torch.randint(0, 9, (40, 3)), targets(40)
    y = y if y.dtype is torch.int64 else y.to(dtype)
    data = list(zip(x.split(10), y.split(10), strict=True))

    def close(found, truth):
        assert found.dtype == torch.float32
        assert ((found - truth).norm() / truth.norm()).item() < 4 * u

    kron, truth = (kron_factors(model, likelihood, data) for model in (half, single))
    torch.testing.assert_close(kron["2.weight"].A, truth["2.weight"].A, rtol=1e-5, atol=1e-7)
    assert not torch.equal(kron["4.weight"].A, truth["4.weight"].A)
    close(kron["4.weight"].A, truth["4.weight"].A)
    for key, block in truth.items():
        close(kron[key].B, block.B)
    for kind in (DiagAccumulator, DenseAccumulator):
        found, expected = (summed(model, likelihood, data, kind) for model in (half, single))
        close(found.accumulator.result().to_dense(), expected.accumulator.result().to_dense())
        assert found.totals.nll_sum == pytest.approx(expected.totals.nll_sum, rel=4 * u)
