"""Factors that are too wide are kept as their diagonals, which are computed without them."""

from __future__ import annotations

import warnings

import cases
import pytest
import torch
from backend_coverage import BACKEND_NAMES, REFUSED
from torch import nn

from laplace_ws import Laplace, load_posterior
from laplace_ws.curvature import kron_factors
from laplace_ws.errors import CurvatureWarning
from laplace_ws.kfac import ConvUse, GroupedLinearUse, KfacApprox, KronAccumulator, LinearUse
from laplace_ws.kfac.uses import MatrixUse
from laplace_ws.matrices import Kron

pytestmark = pytest.mark.filterwarnings("ignore::laplace_ws.errors.CurvatureWarning")
WIDEST = 2


@pytest.mark.many(4)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_factors_are_whole_or_the_diagonals_of_whole_ones(case, approx, backend):
    """Every layer of the table of models; vectors keep the diagonal of the exact block."""
    if case.name in REFUSED[backend]:
        pytest.skip("not covered by this backend")
    model, x, y = case.make()
    options = {"curvature": "ef", "kfac_approx": approx, "backend": backend}
    whole = kron_factors(model, case.likelihood, [(x, y)], **options)
    narrow = kron_factors(model, case.likelihood, [(x, y)], max_factor_dim=WIDEST, **options)
    exact = _exact_diagonals(model, case.likelihood, x, y, backend)
    n_diagonal = 0
    for name, block in whole.items():
        found = narrow[name]
        for kind in "AB":
            factor, was_diagonal = getattr(block, kind), getattr(block, f"diagonal_{kind}")
            if factor is None:
                continue
            is_wide = factor.shape[-1] > WIDEST
            assert getattr(found, f"diagonal_{kind}") == (is_wide or was_diagonal)
            if block.A is None and is_wide:
                expected = exact[name]
            else:
                expected = factor.diagonal(dim1=-2, dim2=-1) if is_wide and not was_diagonal else factor
            n_diagonal += is_wide
            torch.testing.assert_close(getattr(found, kind), expected, rtol=1e-10, atol=1e-12)
        B, A = (getattr(found, kind) for kind in "BA")
        assert found.to_dense().shape == (found.shape.numel(),) * 2
        if A is not None and not found.is_grouped and found.axes.is_row_major:
            B, A = (torch.diag(t) if t.ndim == 1 else t for t in (B, A))
            torch.testing.assert_close(found.to_dense(), torch.kron(B, A))
    assert n_diagonal


def _exact_diagonals(model, likelihood, x, y, backend):
    la = Laplace(model, likelihood, hessian_structure="diag", curvature="ef", backend=backend)
    H = la.fit([(x, y)]).H
    return dict(zip(H.shapes, H.values.split([s.numel() for s in H.shapes.values()]), strict=True))


def _grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 4, 5))


def _attention() -> nn.Module:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    return Net()


NETWORKS = {
    "grouped-conv": (_grouped, lambda: torch.randn(7, 4, 4, 4, dtype=torch.float64)),
    "packed-attention": (_attention, lambda: torch.randn(7, 3, 4, dtype=torch.float64)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5)),
        lambda: torch.randint(0, 9, (7, 3)),
    ),
}


def _fitted(network, structure="kron", **options):
    make, make_x = NETWORKS[network]
    torch.manual_seed(0)
    model, x = make().double(), make_x()
    data = [(x[:4], torch.randint(0, 5, (4,))), (x[4:], torch.randint(0, 5, (3,)))]
    la = Laplace(model, "classification", hessian_structure=structure, max_factor_dim=3, prior_precision=0.7, **options)
    return la.fit(data), x, data


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_algebra_is_that_of_the_dense_matrix(network, structure):
    la, x, _ = _fitted(network, structure)
    P = la.H.to_dense() + 0.7 * torch.eye(la.n_params, dtype=torch.float64)
    log_det = la.posterior_precision.log_det()
    torch.testing.assert_close(log_det, torch.linalg.slogdet(P)[1])
    torch.testing.assert_close(la.posterior_covariance, torch.linalg.inv(P))
    J, _ = la.jacobians(x)
    torch.testing.assert_close(la.functional_moments(x)[1], J @ torch.linalg.inv(P) @ J.mT)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
@pytest.mark.parametrize("network", NETWORKS)
def test_files_keep_the_diagonals_and_the_option(network, structure, tmp_path):
    la, x, _ = _fitted(network, structure)
    la.save(tmp_path / "la.pt")
    loaded = load_posterior(tmp_path / "la.pt", la.model)
    assert loaded.options["max_factor_dim"] == 3
    torch.testing.assert_close(loaded(x), la(x))
    assert repr(loaded.H) == repr(la.H)


@pytest.mark.parametrize("network", NETWORKS)
def test_data_add_up(network):
    la, _, data = _fitted(network)
    parts = Laplace(la.model, "classification", max_factor_dim=3)
    for batch in data:
        parts.fit([batch], override=False)
    torch.testing.assert_close(parts.H.to_dense(), la.H.to_dense())


def test_a_factor_and_a_diagonal_do_not_add_up():
    la, _, data = _fitted("grouped-conv")
    with pytest.raises(ValueError, match="a factor and the diagonal of another do not add up"):
        la.H + kron_factors(la.model, "classification", data)


def test_a_state_of_an_earlier_version_has_no_such_option():
    model = nn.Linear(3, 4)
    data = [(torch.randn(5, 3), torch.randint(0, 4, (5,)))]
    la = Laplace(model, "classification").fit(data)
    state = la.state_dict()
    del state["options"]["max_factor_dim"]
    Laplace(model, "classification").load_state_dict(state)
    with pytest.raises(ValueError, match="has max_factor_dim=None, this one 2"):
        Laplace(model, "classification", max_factor_dim=2).load_state_dict(state)


def test_it_is_said_once_and_shown():
    la, _, data = _fitted("embedding")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.fit(data)
    (warning,) = [w for w in caught if issubclass(w.category, CurvatureWarning)]
    assert str(warning.message) == (
        "max_factor_dim=3 leaves only the diagonal of B (4 rows) of '0.weight', A (12 rows) of '2.weight', B (5 rows) of '2.weight', "
        "B (5 rows) of '2.bias': correlations along these axes are lost; raise it where memory allows."
    )
    assert la.H.diagonal_factors == {"0.weight": ("A", "B"), "2.weight": ("A", "B"), "2.bias": ("B",)}
    assert repr(la.H) == (
        "Kron(3 parameters, 101 weights, only the diagonal of A and B of '0.weight', A and B of '2.weight', B of '2.bias')"
    )


def test_nothing_is_said_where_all_factors_are_narrow():
    la = Laplace(nn.Linear(3, 4), "classification", max_factor_dim=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CurvatureWarning)
        la.fit([(torch.randn(5, 3), torch.randint(0, 4, (5,)))])
    assert la.H.diagonal_factors == {}


def test_no_wide_factor_is_ever_formed(monkeypatch):
    """A linear layer, a convolution and its gradients, without one product that would make a factor."""

    def refuse(*_, **__):
        raise AssertionError("a factor was formed")

    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 6))
    data = [(torch.randn(4, 3, 5), torch.randint(0, 6, (4,)))]
    for cls in (MatrixUse, LinearUse, ConvUse, GroupedLinearUse):
        for method in ("input_gram", "output_gradient_gram", "inputs"):
            if method in vars(cls):
                monkeypatch.setattr(cls, method, refuse)
    parameters = dict(model.named_parameters())
    accumulator = KronAccumulator(parameters, dict.fromkeys(parameters, KfacApprox.EXPAND), max_factor_dim=1)
    from laplace_ws.curvature.native import NativeBackend

    with NativeBackend().linearise(model, data[0][0], parameters) as linearisation:
        accumulator.start_batch(linearisation.uses)
        linearisation.stream(torch.randn(1, 4, 6), accumulator.add)
        accumulator.end_batch()
    assert isinstance(accumulator.result(), Kron)


def test_reduce_of_a_large_vocabulary_by_its_diagonal():
    model = nn.Sequential(nn.Embedding(9000, 2), nn.Flatten(), nn.Linear(6, 3))
    data = [(torch.randint(0, 9000, (4, 3)), torch.randint(0, 3, (4,)))]
    kron = kron_factors(model, "classification", data, kfac_approx="reduce", max_factor_dim=8192)
    counts = nn.functional.one_hot(data[0][0], 9000).double().mean(1)
    torch.testing.assert_close(kron["0.weight"].A.double(), counts.square().mean(0), check_dtype=False)
