"""The estimators for scikit-learn: its own checks, and that they hand on what the posterior says in the user's units."""

from __future__ import annotations

import importlib
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.datasets import load_wine, make_regression
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from laplace_ws.sklearn import LaplaceClassifier, LaplaceRegressor

QUICK = {"hidden": (10,), "n_epochs": 8, "lr": 0.05, "random_state": 0}


@pytest.mark.many(3)
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([LaplaceClassifier(**QUICK), LaplaceRegressor(**QUICK)])  # none is expected to fail
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def wine():
    X, y = load_wine(return_X_y=True)
    return StandardScaler().fit_transform(X), np.array(["red", "white", "rose"])[y]


@pytest.fixture(scope="module")
def line():
    return make_regression(60, 3, noise=5.0, random_state=0)


# ------------------------------------------------------------------ classes


def test_classes_are_those_of_the_user(wine):
    X, y = wine
    found = LaplaceClassifier(n_epochs=30, random_state=0).fit(X, y)
    assert found.classes_.tolist() == ["red", "rose", "white"]
    assert found.score(X, y) > 0.95
    probabilities = found.predict_proba(X)
    np.testing.assert_array_equal(probabilities, found.posterior_(torch.tensor(X)).numpy())
    np.testing.assert_array_equal(found.predict(X), found.classes_[probabilities.argmax(1)])
    assert found.log_marginal_likelihood_value_ == found.posterior_.log_marginal_likelihood().item()
    assert found.module_ is found.posterior_.model


def test_the_type_of_the_numbers_is_that_of_the_network(wine):
    X, y = wine
    found = LaplaceClassifier(**QUICK).fit(X.astype(np.float32), y)
    assert found.posterior_.mean.dtype == torch.float32
    assert found.predict_proba(X).dtype == np.float32  # of float64 inputs too
    assert LaplaceClassifier(**QUICK).fit(X, y).posterior_.mean.dtype == torch.float64


@pytest.mark.parametrize("options", [{"pred_type": "nn"}, {"link_approx": "mc"}, {"link_approx": "bridge"}])
def test_predictions_are_of_the_kind_that_is_asked_for_and_repeat_themselves(wine, options):
    X, y = wine
    plain, other = (LaplaceClassifier(**QUICK, **given).fit(X, y) for given in ({}, options))
    np.testing.assert_array_equal(other.predict_proba(X), other.predict_proba(X))
    np.testing.assert_allclose(other.predict_proba(X).sum(1), 1.0)
    assert np.abs(other.predict_proba(X) - plain.predict_proba(X)).max() > 1e-3


def test_in_a_pipeline_and_a_search():
    X, y = load_wine(return_X_y=True)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LaplaceClassifier(**QUICK)),
        {"laplaceclassifier__hidden": [(3,), (10,)]},
        scoring="neg_log_loss",
        cv=2,
        error_score="raise",
    ).fit(X, y)
    assert search.best_params_["laplaceclassifier__hidden"] in [(3,), (10,)]
    assert search.best_score_ > -1.0


def test_it_is_the_same_from_the_same_random_state_and_keeps_the_global_one(wine):
    X, y = wine
    before = torch.get_rng_state()
    first, again, other = (
        LaplaceClassifier(**QUICK | {"random_state": seed}).fit(X, y).predict_proba(X) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def network(n_features: int, n_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(n_features, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, n_outputs))


def test_a_network_of_ones_own_survives_clones_and_pickles(wine):
    X, y = wine
    found = clone(LaplaceClassifier(network, **QUICK)).fit(X, y)
    assert isinstance(found.module_[1], nn.LayerNorm)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).predict_proba(X), found.predict_proba(X))


def test_a_fit_that_fails_leaves_no_older_posterior(wine):
    X, y = wine
    found = LaplaceClassifier(**QUICK).fit(X, y)
    with pytest.raises(ValueError, match="two classes or more"):
        found.fit(X, np.zeros(len(X)))
    with pytest.raises(NotFittedError):
        found.predict(X)


# ------------------------------------------------------------------ numbers


def linear(**options) -> LaplaceRegressor:
    """A linear model with an exact posterior."""
    training = {"n_epochs": 30, "lr": 0.1, "hessian_structure": "full", "random_state": 0}
    return LaplaceRegressor(hidden=(), **training | options)


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("normalize_y", [True, False])
def test_means_and_deviations_against_dense_algebra(line, is_flat, normalize_y):
    X, y = line
    Y = y if is_flat else np.stack([y, 2 - y[::-1]], 1)
    found = linear(normalize_y=normalize_y).fit(X, Y)
    scale = Y.std(0) if normalize_y else np.ones_like(Y.std(0))
    design = np.concatenate([X, np.ones((len(X), 1))], 1)
    sigma, delta = found.posterior_.sigma_noise.item(), found.posterior_.prior_precision_diag.numpy()
    D = 1 if is_flat else 2
    order = [0, 1, 2, 2 * 3] if not is_flat else [0, 1, 2, 3]  # weights of the first output, then its bias
    precision = design.T @ design / sigma**2 + np.diag(delta[order])
    function = design @ np.linalg.inv(precision) @ design.T
    mean = found.predict(X)
    with torch.no_grad():
        raw = found.module_(torch.tensor(X)).numpy()
    expected = raw * scale + (Y.mean(0) if normalize_y else 0.0)
    np.testing.assert_allclose(mean, expected[:, 0] if is_flat else expected)
    for include_noise in (True, False):
        options = {"include_noise": include_noise}
        again, deviation = found.predict(X, return_std=True, **options)
        np.testing.assert_allclose(again, mean)
        _, covariance = found.predict(X, return_cov=True, **options)
        truth = function + include_noise * sigma**2 * np.eye(len(X))
        assert deviation.shape == mean.shape == Y.shape
        assert covariance.shape == (len(X), len(X), *Y.shape[1:])
        first, its_scale = (covariance, scale) if is_flat else (covariance[..., 0], scale[0])
        np.testing.assert_allclose(first, truth * its_scale**2, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(deviation.reshape(-1, D)[:, 0], truth.diagonal() ** 0.5 * its_scale, rtol=1e-6)
    np.testing.assert_allclose(found.noise_, sigma * scale)
    with pytest.raises(ValueError, match="exclude each other"):
        found.predict(X, return_std=True, return_cov=True)


def test_units_of_the_targets_do_not_matter(line):
    X, y = line
    one, other = linear().fit(X, y), linear().fit(X, 1000 * y + 7)
    (mean, deviation), (other_mean, other_deviation) = (found.predict(X, return_std=True) for found in (one, other))
    np.testing.assert_allclose(other_mean, 1000 * mean + 7, rtol=1e-6)
    np.testing.assert_allclose(other_deviation, 1000 * deviation, rtol=1e-6)
    shift = len(y) * math.log(1000)
    assert other.log_marginal_likelihood_value_ == pytest.approx(one.log_marginal_likelihood_value_ - shift, rel=1e-6)
    as_it_is = linear(normalize_y=False).fit(X, (y - y.mean()) / y.std())
    in_units = as_it_is.log_marginal_likelihood_value_ - len(y) * math.log(y.std())
    assert one.log_marginal_likelihood_value_ == pytest.approx(in_units, rel=1e-6)


def test_the_noise_is_found_and_the_bands_hold(line):
    X, y = make_regression(400, 3, noise=5.0, random_state=1)
    found = linear().fit(X[:200], y[:200])
    assert found.noise_ == pytest.approx(5.0, rel=0.2)
    mean, deviation = found.predict(X[200:], return_std=True)
    assert 0.9 < (np.abs(y[200:] - mean) < 1.96 * deviation).mean() < 0.99
    by_networks = found.set_params(pred_type="nn").predict(X[200:], return_std=True)
    np.testing.assert_allclose(by_networks[0], mean, atol=1.0)
    assert cross_val_score(linear(), X, y, cv=2).min() > 0.95


# ------------------------------------------------------------------ the dependency


def test_without_scikit_learn_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "laplace_ws.sklearn")
    with pytest.raises(ImportError, match=r"^laplace_ws.sklearn needs scikit-learn, 1.6 or newer; install it by: pip"):
        importlib.import_module("laplace_ws.sklearn")
