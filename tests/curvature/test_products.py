"""Products of the curvature with vectors, and its leading eigenpairs, against the dense oracle in float64."""

import numpy as np
import pytest
import torch
from cases import CASES, LINEAR_CASES, double
from curvature.shared import Wrapped, close, weight
from curvature.test_conformance import FailureInTheMiddleError as Failure
from curvature.test_conformance import assert_as_found, batches, failing, in_use, snapshot
from torch import nn

from laplace_ws import InvalidBatchError, UnsupportedParameterError
from laplace_ws.curvature import Curvature, CurvatureProducts, exact, low_rank_curvature
from laplace_ws.curvature.columns import loss_columns
from laplace_ws.likelihoods import Categorical, make_likelihood

RANDOM = ["ggn_mc", "ggn_mc_rademacher"]
ORACLES = {"ggn": exact.ggn, "ef": exact.empirical_fisher}


class Lstm(nn.Module):
    """A recurrent network, for whose weights no backend has a block."""

    def __init__(self, bidirectional=False):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.lstm = nn.LSTM(3, 2, num_layers=1 if bidirectional else 2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(4 if bidirectional else 2, 3)

    def forward(self, x):
        return self.head(self.lstm(self.embed(x))[0][:, -1])


class Upsampling(nn.Module):
    """Transposed convolutions, and a parameter in an expression of its own."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 2, 3, stride=2)
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return torch.tanh(self.up(x)).flatten(2).mean(2) * self.temperature.exp()


def dense(products):
    return products.product(torch.eye(products.n_params, dtype=torch.float64))


def images():
    return torch.randn(5, 2, 3, 3, dtype=torch.float64)


def classifier():
    """A small network of 45 weights, and data."""
    model = double(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 1), nn.Linear(1, 3)))
    return model, torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,))


# ------------------------------------------------------------------ products


@pytest.mark.many(2)
@pytest.mark.parametrize("curvature", ORACLES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_equal_the_oracle(case, curvature):
    model, x, y = case.make()
    H = dense(CurvatureProducts(model, case.likelihood, batches(x, y), curvature=curvature))
    close(H, ORACLES[curvature](model, case.likelihood, x, y))


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_products_of_linear_networks_equal_the_oracle(case, setting):
    model, x = double(case.make_model(setting)), case.make_x()
    y = torch.randn_like(model(x))
    close(dense(CurvatureProducts(model, "regression", batches(x, y))), exact.ggn(model, "regression", x, y))


@pytest.mark.parametrize("curvature", ORACLES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm(curvature, bidirectional):
    model, x, y = double(Lstm(bidirectional)), torch.randint(0, 7, (5, 4)), torch.randint(0, 3, (5,))
    H = dense(CurvatureProducts(model, "classification", batches(x, y), curvature=curvature))
    close(H, ORACLES[curvature](model, "classification", x, y))


@pytest.mark.parametrize("recurrent", [nn.GRU, nn.RNN])
def test_other_recurrent_layers(recurrent):
    layer = double(recurrent(3, 2, batch_first=True))
    model = Wrapped(lambda self, x: self.layer(x)[0], layer=layer)
    x, y = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(5, 4, 2, dtype=torch.float64)
    close(dense(CurvatureProducts(model, "regression", batches(x, y))), exact.ggn(model, "regression", x, y))


def test_transposed_convolution_and_a_parameter_in_an_expression():
    model, x, y = double(Upsampling()), images(), torch.randn(5, 2, dtype=torch.float64)
    close(dense(CurvatureProducts(model, "regression", batches(x, y))), exact.ggn(model, "regression", x, y))


def test_a_module_under_two_names():
    layer = nn.Linear(3, 3)
    model = double(nn.Sequential(layer, nn.Tanh(), layer))
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(0, 3, (5,))
    before = layer.weight.detach().clone()
    products = CurvatureProducts(model, "classification", batches(x, y))
    close(dense(products), exact.ggn(model, "classification", x, y))
    assert products.n_params == 12
    assert torch.equal(layer.weight, before)


def test_products_are_linear_and_symmetric_and_any_number_at_once():
    model, x, y = classifier()
    products = CurvatureProducts(model, "classification", batches(x, y))
    a, b = torch.randn(2, products.n_params, dtype=torch.float64)
    Ha, Hb, Hab = products.product(torch.stack([a, b, 2 * a - b]))
    close(products.product(a[None])[0], Ha)
    close(Hab, 2 * Ha - Hb)
    torch.testing.assert_close(a @ Hb, b @ Ha, rtol=1e-11, atol=1e-12)
    assert products.n_products == 2


def test_a_parameter_without_gradient_counts_as_zeros():
    model, x, y = classifier()
    truth = exact.ggn(model, "classification", x, y)
    model.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    net = Wrapped(lambda self, x: self.net(x), net=model)
    model.forward = lambda x: nn.Sequential(*list(model))(x)
    H = dense(CurvatureProducts(net, "classification", [(x, y)]))
    names = list(CurvatureProducts(net, "classification", [(x, y)]).shapes)
    assert names[0] == "net.idle"
    assert not H[:2].any()
    assert not H[:, :2].any()
    close(H[2:, 2:], truth)


def test_ignored_labels_have_no_curvature():
    model, x = double(nn.Linear(3, 4)), torch.randn(5, 6, 3, dtype=torch.float64)
    y = torch.randint(0, 4, (5, 6))
    y[:, 4:] = -100
    for curvature, oracle in ORACLES.items():
        products = CurvatureProducts(model, Categorical(ignore_index=-100), [(x, y)], curvature=curvature)
        truth = oracle(model, "classification", x[:, :4], y[:, :4])
        close(dense(products), truth)
        assert products.totals.n_targets == 20


@pytest.mark.parametrize("curvature", RANDOM)
def test_random_columns_are_none_where_labels_are_ignored(curvature):
    """The third input is seen by ignored positions only."""
    model, x = double(nn.Linear(3, 4)), torch.randn(5, 6, 3, dtype=torch.float64)
    y = torch.randint(0, 4, (5, 6))
    y[:, 4:] = -100
    x[:, :4, 2] = 0
    H = dense(CurvatureProducts(model, Categorical(ignore_index=-100), [(x, y)], curvature=curvature))
    of_weights = H.diagonal()[:12].reshape(4, 3)
    assert not of_weights[:, 2].any()
    assert of_weights[:, :2].all()


@pytest.mark.parametrize("curvature", RANDOM)
@pytest.mark.parametrize("likelihood", ["classification", "regression", "binary"])
def test_random_columns_are_those_of_the_likelihood(curvature, likelihood):
    """Against the Jacobian, with the draws that one generator makes."""
    model, x, _ = classifier()
    y = {"classification": torch.randint(0, 3, (20,))}.get(likelihood, torch.randint(0, 2, (20, 3)).double())
    products = CurvatureProducts(
        model, likelihood, batches(x, y), curvature=curvature, mc_samples=3, generator=torch.Generator().manual_seed(1)
    )
    H, J, generator = dense(products), exact.jacobian(model, x), torch.Generator().manual_seed(1)
    truth = torch.zeros_like(H)
    for part in (slice(0, 3), slice(3, None)):
        f = model(x[part]).detach()
        for s in loss_columns(
            make_likelihood(likelihood), Curvature(curvature), f, y[part], mc_samples=3, generator=generator
        ):
            g = torch.einsum("np,npd->nd", s, J[part])
            truth += g.T @ g
    close(H, truth)
    assert H.count_nonzero()


@pytest.mark.parametrize("curvature", RANDOM)
def test_draws_are_the_same_in_every_product_and_fresh_in_the_next_fit(curvature):
    model, x, y = classifier()
    generator = torch.Generator().manual_seed(0)
    one, other = (
        CurvatureProducts(model, "classification", [(x, y)], curvature=curvature, generator=generator) for _ in range(2)
    )
    first = dense(one)
    assert torch.equal(dense(one), first)
    fresh = CurvatureProducts(model, "classification", [(x, y)], curvature=curvature, generator=generator)
    assert not torch.allclose(dense(fresh), first)
    assert torch.equal(dense(other), first)


def test_totals_of_the_data():
    model, x, y = classifier()
    products = CurvatureProducts(model, "classification", batches(x, y))
    assert products.totals is None
    dense(products)
    totals = products.totals
    nll = make_likelihood("classification").nll_sum(model(x), y).item()
    assert totals.nll_sum == pytest.approx(nll, rel=1e-12)
    assert (totals.n_examples, totals.n_targets, totals.output_shape) == (20, 20, (3,))


def test_mixed_precision_of_parameters():
    model = nn.Sequential(
        nn.Linear(3, 3), nn.Tanh(), Wrapped(lambda self, x: self.last(x.double()), last=nn.Linear(3, 2).double())
    )
    products = CurvatureProducts(model, "classification", [(torch.randn(5, 3), torch.randint(0, 2, (5,)))])
    assert products.dtype == torch.float64
    H = dense(products)
    torch.testing.assert_close(H, H.T, rtol=1e-5, atol=1e-6)


def test_a_model_that_leaves_autocast_keeps_its_digits():
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.net(x)

    model = Wrapped(forward, net=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    data = [(torch.randn(5, 3), torch.randint(0, 2, (5,)))]
    products = CurvatureProducts(model, "classification", data)
    vectors = torch.eye(products.n_params)
    truth = products.product(vectors)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(products.product(vectors), truth, rtol=0, atol=1e-6)


def test_a_model_may_change_its_inputs_in_place():
    model, x, y = classifier()
    inplace = Wrapped(lambda self, x: self.net(x.mul_(0.5)), net=model)
    products = CurvatureProducts(inplace, "classification", [(x, y)])
    truth = exact.ggn(model, "classification", x / 2, y)
    for _ in range(2):
        close(dense(products), truth)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_models_have_single_precision_products(autocast):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(60, 4, 3)
    truth = exact.ggn(model, "regression", x.flatten(0, 1), torch.zeros(240, 2))
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    data = [(part, torch.zeros(4, 2, dtype=x.dtype)) for part in x]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        products = CurvatureProducts(model, "regression", data)
        H = products.product(torch.eye(products.n_params))
    assert H.dtype == torch.float32
    assert (H - truth).norm() < 0.02 * truth.norm()


# ------------------------------------------------------------------ eigenpairs


def check_leading(fit, truth, rank):
    """Eigenvalues to rounding, eigenvectors and what they span to the tolerance of Lanczos' method."""
    values, vectors = torch.linalg.eigh(truth)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    torch.testing.assert_close(fit.H.values, values, rtol=1e-10, atol=1e-12 * values[0].item())
    torch.testing.assert_close(
        (fit.H.vectors.T @ vectors).abs(), torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(fit.H.to_dense(), (vectors * values) @ vectors.T, rtol=0, atol=1e-6 * values[0].item())


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("curvature", ORACLES)
def test_leading_eigenpairs_equal_the_oracle(curvature, rank):
    model, x, y = classifier()
    fit = low_rank_curvature(model, "classification", batches(x, y), rank=rank, curvature=curvature)
    assert fit.n_products > 1, "the dense matrix was made, and Lanczos' method not used"
    check_leading(fit, ORACLES[curvature](model, "classification", x, y), rank)


def test_leading_eigenpairs_of_an_lstm():
    model, x, y = double(Lstm()), torch.randint(0, 7, (5, 4)), torch.randint(0, 3, (5,))
    fit = low_rank_curvature(model, "classification", batches(x, y), rank=4)
    assert fit.n_products > 1
    check_leading(fit, exact.ggn(model, "classification", x, y), 4)


@pytest.mark.parametrize("rank", [22, 44, 45, 1000])
def test_small_matrices_are_decomposed_as_such(rank):
    """Those of which nearly all eigenpairs are wanted, and more than there are."""
    model, x, y = classifier()
    fit = low_rank_curvature(model, "classification", batches(x, y), rank=rank)
    truth = exact.ggn(model, "classification", x, y)
    assert fit.n_products == 1
    assert fit.H.rank == min(rank, torch.linalg.matrix_rank(truth, hermitian=True))
    torch.testing.assert_close(fit.H.values, torch.linalg.eigvalsh(truth).flip(0)[: fit.H.rank], rtol=1e-8, atol=1e-12)
    if rank > 22:
        close(fit.H.to_dense(), truth)


def test_eigenvalues_below_rounding_are_dropped():
    """Two examples of three classes have a GGN of rank 4."""
    model, x, y = classifier()
    for rank in (8, 30):
        fit = low_rank_curvature(model, "classification", [(x[:2], y[:2])], rank=rank)
        assert fit.H.rank == 4
        close(fit.H.to_dense(), exact.ggn(model, "classification", x[:2], y[:2]))


@pytest.mark.parametrize("rank", [3, 30])
def test_no_curvature_has_rank_zero(rank):
    """A perfect fit has no empirical Fisher."""
    model, x, _ = classifier()
    fit = low_rank_curvature(model, "regression", [(x, model(x).detach())], rank=rank, curvature="ef")
    assert fit.H.rank == 0
    assert fit.H.vectors.shape == (fit.H.n_params, 0)


def test_single_precision():
    model, x, y = classifier()
    fit = low_rank_curvature(model.float(), "classification", batches(x.float(), y), rank=3)
    assert fit.H.vectors.dtype == torch.float32
    values = torch.linalg.eigvalsh(exact.ggn(model.double(), "classification", x, y)).flip(0)[:3]
    torch.testing.assert_close(fit.H.values, values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("curvature", RANDOM)
def test_eigenpairs_with_random_columns(curvature):
    model, x, y = classifier()
    options = {"curvature": curvature, "mc_samples": 2}
    truth = dense(
        CurvatureProducts(model, "classification", batches(x, y), generator=torch.Generator().manual_seed(3), **options)
    )
    fit = low_rank_curvature(
        model, "classification", batches(x, y), rank=3, generator=torch.Generator().manual_seed(3), **options
    )
    check_leading(fit, truth, 3)


def test_a_fit_is_reproducible_and_leaves_all_generators_alone():
    model, x, y = classifier()
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, other = (low_rank_curvature(model, "classification", batches(x, y), rank=3) for _ in range(2))
    assert torch.equal(one.H.vectors, other.H.vectors)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_rank_is_positive():
    model, x, y = classifier()
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        low_rank_curvature(model, "classification", [(x, y)], rank=0)


# ------------------------------------------------------------------ data that change


class Loader:
    """Batches made anew in each pass."""

    def __init__(self, make):
        self.make, self.n_passes = make, 0

    def __iter__(self):
        self.n_passes += 1
        return iter(self.make(self.n_passes))


def shuffled(x, y):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6, shuffle=True)


@pytest.mark.parametrize("curvature", ORACLES)
def test_shuffled_data(curvature):
    model, x, y = classifier()
    fit = low_rank_curvature(model, "classification", shuffled(x, y), rank=3, curvature=curvature)
    check_leading(fit, ORACLES[curvature](model, "classification", x, y), 3)


def test_shuffled_data_in_single_precision():
    model, x, y = classifier()
    fit = low_rank_curvature(model.float(), "classification", shuffled(x.float(), y), rank=3)
    assert fit.n_products > 20


@pytest.mark.parametrize("curvature", RANDOM)
@pytest.mark.parametrize("batch_size", [6, 20])
def test_random_columns_need_one_order(curvature, batch_size):
    model, x, y = classifier()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size, shuffle=True)
    with pytest.raises(InvalidBatchError, match=rf"another order in each pass.*'{curvature}'.*shuffle=False"):
        low_rank_curvature(model, "classification", data, rank=3, curvature=curvature)


CHANGES = {
    "augmentation": lambda x, y, n: [(x + 0.01 * n, y)],
    "labels": lambda x, y, n: [(x, y.roll(n))],
    "random subsets": lambda x, y, n: [(x[n : n + 10], y[n : n + 10])],
    "number": lambda x, y, n: [(x[:-n], y[:-n])],
}


@pytest.mark.parametrize("curvature", ["ggn", *RANDOM])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_data_that_change_are_refused(change, curvature):
    model, x, y = classifier()
    data = Loader(lambda n: change(x, y, n))
    with pytest.raises(InvalidBatchError, match=r"differ from pass to pass.*augmentation"):
        low_rank_curvature(model, "classification", data, rank=3, curvature=curvature)
    assert data.n_passes == 2


def test_a_random_model_is_refused():
    model, x, y = classifier()
    noisy = Wrapped(lambda self, x: self.net(nn.functional.dropout(x, 0.5)), net=model)
    with pytest.raises(UnsupportedParameterError, match="gives other outputs for the same inputs"):
        low_rank_curvature(noisy, "classification", [(x, y)], rank=3)


def test_data_that_are_used_up_or_empty_or_unlabelled_are_refused():
    model, x, y = classifier()
    with pytest.raises(InvalidBatchError, match="a generator is used up after the first; give a DataLoader"):
        low_rank_curvature(model, "classification", (pair for pair in [(x, y)]), rank=3)
    with pytest.raises(InvalidBatchError, match="hold no example"):
        low_rank_curvature(model, "classification", [], rank=3)
    with pytest.raises(InvalidBatchError, match="no target of the 20 examples counts"):
        low_rank_curvature(model, Categorical(ignore_index=9), [(x, torch.full_like(y, 9))], rank=3)
    with pytest.raises(InvalidBatchError, match="outputs that are not finite; look for NaN"):
        low_rank_curvature(model, "classification", [(x * torch.nan, y)], rank=3)


# ------------------------------------------------------------------ models that cannot be covered, and hygiene


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


class HidesPart(torch.autograd.Function):
    """A backward pass of which autograd sees a part."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 1.5 + g.detach() * 0.5


@pytest.mark.parametrize("function", [OnceDifferentiable, HidesPart])
@pytest.mark.parametrize("n_before", [1, 5])
def test_second_derivatives_that_are_wrong_are_refused(function, n_before):
    """Of some parameters, and of all."""
    model, x, y = classifier()
    first, last = model[:n_before], model[n_before:]
    broken = Wrapped(lambda self, x: self.last(function.apply(self.first(x))), first=first, last=last)
    with pytest.raises(UnsupportedParameterError, match="gradients of Wrapped cannot be differentiated"):
        low_rank_curvature(broken, "classification", [(x, y)], rank=3)


def test_outputs_without_gradient_are_refused():
    model = Wrapped(lambda self, x: (x @ self.w).detach(), w=weight(3, 2))
    with pytest.raises(UnsupportedParameterError, match="do not depend on any parameter"):
        low_rank_curvature(model, "classification", [(torch.randn(5, 3), torch.randint(0, 2, (5,)))], rank=1)


@pytest.mark.parametrize("curvature", ["ggn", "ggn_mc", "ef"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_leaves_the_model_as_found(case, curvature):
    model, x, y = in_use(case)
    products = CurvatureProducts(model, case.likelihood, [(x, y)], curvature=curvature)
    vectors = torch.randn(2, products.n_params, dtype=torch.float64)
    before = snapshot(model)
    with torch.no_grad():
        products.product(vectors)
    assert_as_found(model, before)


@pytest.mark.parametrize("where", ["labels", "forward", "backward"])
def test_leaves_the_model_as_found_after_a_failure(where):
    model, x, y = in_use(next(case for case in CASES if case.name == "residual-blocks"))
    before, kernels = snapshot(model), torch.backends.cuda.flash_sdp_enabled()
    if where == "labels":
        with pytest.raises(InvalidBatchError):
            low_rank_curvature(model, "classification", [(x, y), (x, torch.full_like(y, 7))], rank=2)
    else:
        with failing(model, where), pytest.raises(Failure):
            low_rank_curvature(model, "classification", [(x, y)], rank=2)
    assert_as_found(model, before)
    assert torch.backends.cuda.flash_sdp_enabled() == kernels
