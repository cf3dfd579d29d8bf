"""The exact GGN of a last layer whose gradient factor is a diagonal, by one column in place of one for each class."""

from __future__ import annotations

import pytest
import torch
from posterior.test_last_layer_moments import NETWORKS, OTHERS, C
from torch import nn

from laplace_ws import Laplace
from laplace_ws.curvature import curvature_sum
from laplace_ws.likelihoods import Bernoulli, Categorical

pytestmark = pytest.mark.filterwarnings("ignore::laplace_ws.errors.CurvatureWarning")
APPROXIMATIONS = ["expand", "reduce"]


def _data(name, networks):
    torch.manual_seed(0)
    make, make_x, subset = networks[name]
    model, x = make().double(), make_x()
    y = torch.randint(0, C, model(x).shape[:-1])
    return model, subset, [(x[:3], y[:3]), (x[3:], y[3:])]


def _both(monkeypatch, model, subset, data, likelihood="classification", structure="kron", **options):
    """The curvature as it is computed, and by all columns; with the number of columns of each."""
    found = []
    for by_columns in (False, True):
        la = Laplace(model, likelihood, subset, structure, **options)
        n_columns = 0
        stream = curvature_sum.stream_columns

        def counted(linearisation, columns, accumulator, _stream=stream):
            nonlocal n_columns
            columns = list(columns)
            n_columns += len(columns)
            _stream(linearisation, iter(columns), accumulator)

        with monkeypatch.context() as patch:
            patch.setattr(curvature_sum, "stream_columns", counted)
            if by_columns:
                patch.setattr(curvature_sum.CurvatureSum, "_root_of_diagonal", lambda *_: None)
            found.append((la.fit(data).H.to_dense(), n_columns))
    return found


@pytest.mark.parametrize("backend", ["native", "asdl", "backpack"])
@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_it_is_that_of_all_columns(network, approx, backend, monkeypatch):
    if network == "projected" and backend == "asdl":
        pytest.skip("not covered by this backend")
    model, subset, data = _data(network, NETWORKS)
    options = {"kfac_approx": approx, "max_factor_dim": 3, "backend": backend}
    (found, n), (truth, n_all) = _both(monkeypatch, model, subset, data, **options)
    torch.testing.assert_close(found, truth)
    summed_over_positions = data[0][1].ndim > 1 and (
        approx == "reduce" or any("bias" in s or s != "head.weight" for s in subset)
    )
    assert n == (n_all if summed_over_positions else len(data))


@pytest.mark.parametrize("network", ["tokens", "pixels"])
def test_one_column_holds_all_positions_of_a_weight(network, monkeypatch):
    model, _, data = _data(network, NETWORKS)
    weight = ["2.weight"] if network == "tokens" else ["head.weight"]
    (found, n), (truth, _) = _both(monkeypatch, model, weight, data, kfac_approx="expand", max_factor_dim=3)
    torch.testing.assert_close(found, truth)
    assert n == len(data)


@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("network", OTHERS)
def test_not_where_the_outputs_are_not_those_of_the_layer(network, structure, monkeypatch):
    model, subset, data = _data(network, OTHERS)
    options = {"max_factor_dim": 3} if structure == "kron" else {}
    (found, n), (truth, n_all) = _both(monkeypatch, model, subset, data, structure=structure, **options)
    torch.testing.assert_close(found, truth)
    assert n == n_all > len(data)


def test_the_diagonal_structure_too(monkeypatch):
    model, subset, data = _data("mlp", NETWORKS)
    (found, n), (truth, _) = _both(monkeypatch, model, subset, data, structure="diag")
    torch.testing.assert_close(found, truth)
    assert n == len(data)


@pytest.mark.parametrize("options", [{}, {"max_factor_dim": 4}, {"max_factor_dim": 3, "curvature": "ef"}])
def test_not_where_more_counts_or_other_columns_are_wanted(options, monkeypatch):
    model, subset, data = _data("mlp", NETWORKS)
    (found, n), (truth, n_all) = _both(monkeypatch, model, subset, data, **options)
    torch.testing.assert_close(found, truth)
    assert n == n_all


def test_terms_without_a_label_do_not_count(monkeypatch):
    model, _, data = _data("tokens", NETWORKS)
    for _, y in data:
        y[0] = -100
    (found, n), (truth, _) = _both(
        monkeypatch, model, ["2.weight"], data, Categorical(ignore_index=-100), kfac_approx="expand", max_factor_dim=3
    )
    torch.testing.assert_close(found, truth)
    assert n == len(data)


def test_a_likelihood_of_ones_own_keeps_its_columns(monkeypatch):
    class Doubled(Categorical):
        def hessian_columns(self, f, mask=None):
            return (2 * column for column in super().hessian_columns(f, mask))

    model, subset, data = _data("mlp", NETWORKS)
    (found, n), (truth, n_all) = _both(monkeypatch, model, subset, data, Doubled(), max_factor_dim=3)
    torch.testing.assert_close(found, truth)
    assert n == n_all


def test_the_root_of_the_diagonal_keeps_small_probabilities():
    f = torch.tensor([[0.0, 60.0, -30.0], [1.0, 2.0, 3.0]])
    p = f.double().softmax(-1)
    others = torch.stack([p[:, [1, 2]].sum(1), p[:, [0, 2]].sum(1), p[:, [0, 1]].sum(1)], 1)
    torch.testing.assert_close(Categorical().root_of_diagonal(f).double(), (p * others).sqrt(), rtol=1e-5, atol=0)
    assert Bernoulli().root_of_diagonal(f) is None


def test_thousands_of_classes_take_one_column_a_batch(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5000))
    data = [(torch.randn(16, 3), torch.randint(0, 5000, (16,)))]
    monkeypatch.setattr(Categorical, "projected_column", None)
    la = Laplace(model, "classification", "last_layer", max_factor_dim=1000).fit(data)
    p = model(data[0][0]).softmax(-1)
    torch.testing.assert_close(la.H["2.weight"].B, (p - p.square()).sum(0), rtol=1e-4, atol=1e-9)
