"""Choosing the prior on validation data, against loops and finite differences."""

import math

import pytest
import torch
from posterior.shared import STRUCTURES, case_of, fitted, scores_of_grid
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from laplace_ws import InvalidBatchError, Laplace
from laplace_ws.likelihoods.links import LinkApprox
from laplace_ws.metrics import evaluate_classification
from laplace_ws.posterior.predict import PredictionOptions, PredType
from laplace_ws.posterior.scores import make_score

GRID = torch.logspace(-2, 3, 6, dtype=torch.float64)


def validation(x, y):
    """More data of the kind, in two batches."""
    noise = torch.randn(7, *x.shape, dtype=x.dtype) if x.is_floating_point() else None
    shifted = x if noise is None else (x + 0.3 * noise).flatten(0, 1)
    labels = y if noise is None else y.repeat(7, *[1] * (y.ndim - 1))
    return [(shifted[:9], labels[:9]), (shifted[9:], labels[9:])]


def score_of(la, data, loss, **options):
    predictions = [la(x, **options) for x, _ in data]
    y = torch.cat([y for _, y in data])
    if isinstance(predictions[0], tuple):
        predictions = tuple(torch.cat(parts) for parts in zip(*predictions, strict=True))
    else:
        predictions = torch.cat(predictions)
    return make_score(loss, la.likelihood)(predictions, y)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("loss", ["nll", "ece", "brier"])
def test_grid_is_a_loop_over_predictions(structure, loss):
    la, x, y = fitted(structure, "cnn")
    data = validation(x, y)
    options = PredictionOptions(PredType.GLM, LinkApprox.PROBIT, 10, None)
    found = scores_of_grid(la, data, GRID.tolist(), make_score(loss, la.likelihood), options)
    expected = []
    for delta in GRID:
        la.prior_precision = delta
        expected.append(score_of(la, data, loss))
    assert found == pytest.approx(expected, rel=1e-9)
    assert max(expected) - min(expected) > 1e-4
    chosen = la.optimize_prior_precision(
        "gridsearch", val_loader=data, loss=loss, log_prior_prec_min=-2, log_prior_prec_max=3, grid_size=6
    )
    assert la.prior_precision == chosen == GRID[expected.index(min(expected))]


@pytest.mark.parametrize("options", [{"link_approx": "mc"}, {"link_approx": "bridge"}, {"pred_type": "nn"}])
def test_grid_of_sampled_and_bridged_predictions(options):
    la, x, y = fitted("kron", "cnn")
    data = validation(x, y)[:1]
    parsed = PredictionOptions(
        PredType(options.get("pred_type", "glm")),
        LinkApprox(options.get("link_approx", "probit")),
        20,
        torch.Generator().manual_seed(3),
    )
    before = la.prior_precision
    found = scores_of_grid(la, data, GRID.tolist(), make_score("nll", la.likelihood), parsed)
    assert la.prior_precision == before
    for delta, score in zip(GRID, found, strict=True):
        la.prior_precision = delta
        generator = torch.Generator().manual_seed(3)
        assert score == pytest.approx(score_of(la, data, "nll", n_samples=20, generator=generator, **options), rel=1e-9)


def test_grid_of_a_regression_scores_targets_with_their_noise():
    la, x, y = fitted("full", "mlp-regression", sigma_noise=0.5)
    data = validation(x, y)
    options = PredictionOptions(PredType.GLM, LinkApprox.PROBIT, 1, None)
    found = scores_of_grid(la, data, GRID.tolist(), make_score("nll", la.likelihood), options)
    for delta, score in zip(GRID, found, strict=True):
        la.prior_precision = delta
        total = 0.0
        for x_part, y_part in data:
            mean, covariance = la(x_part, observation_noise=True)
            std = covariance.diagonal(dim1=1, dim2=2).sqrt()
            total -= torch.distributions.Normal(mean, std).log_prob(y_part).sum().item()
        assert score == pytest.approx(total / sum(part.numel() for _, part in data), rel=1e-9)


def test_a_metric_is_turned_round_where_higher_is_better():
    la, x, y = fitted("kron", "cnn")
    data = validation(x, y)
    metric = MulticlassAccuracy(num_classes=3, average="micro").to(la.mean.device)
    options = PredictionOptions(PredType.GLM, LinkApprox.PROBIT, 1, None)
    found = scores_of_grid(la, data, GRID.tolist(), make_score(metric, la.likelihood), options)
    for delta, score in zip(GRID, found, strict=True):
        la.prior_precision = delta
        labels = torch.cat([y for _, y in data])
        accuracy = evaluate_classification(torch.cat([la(x) for x, _ in data]), labels, kind="probs")["accuracy"]
        assert -score == pytest.approx(accuracy)
    assert score_of(la, data, lambda p, y: p.max()) == pytest.approx(max(la(x).max().item() for x, _ in data))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("prior", ["scalar", "layerwise", "weight"])
def test_gradient_ends_where_the_validation_likelihood_is_flat(structure, prior):
    """At the end, no step along a coordinate that is inside the limits improves the score."""
    if prior == "weight" and structure != "diag":
        pytest.skip("the others have none, or the many that they have take long")
    la, x, y = fitted(structure, "cnn", prior_precision=1.0)
    data = validation(x, y)
    before = score_of(la, data, "nll")
    la.optimize_prior_precision("gradient", prior_structure=prior, val_loader=data, n_steps=200)
    best = score_of(la, data, "nll")
    assert best < before
    delta = la.prior_precision.clone()
    for k in range(min(delta.numel(), 6)):
        for factor in (0.8, 1.25):
            moved = delta.clone()
            moved.view(-1)[k] = (moved.view(-1)[k] * factor).clamp(1e-6, 1e8)
            la.prior_precision = moved
            assert score_of(la, data, "nll") > best - 1e-6


def test_gradient_tunes_noise_and_temperature_too():
    la, x, y = fitted("full", "mlp-regression", sigma_noise=2.0)
    data = validation(x, y)
    la.optimize_prior_precision(
        "gradient", val_loader=data, optimize_noise=True, optimize_temperature=True, n_steps=200
    )
    assert la.sigma_noise != 2.0
    assert la.temperature != 1.0

    def nll():
        pairs = [la(x_part, observation_noise=True, diagonal_output=True) for x_part, _ in data]
        prediction = tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))
        return la.likelihood.predictive_nll(prediction, torch.cat([y for _, y in data])).item()

    best = nll()
    for name in ("sigma_noise", "temperature"):
        value = getattr(la, name).clone()
        for factor in (0.9, 1.1):
            setattr(la, name, value * factor)
            assert nll() > best - 1e-6
        setattr(la, name, value)


def test_gradient_in_small_parts_is_the_same():
    results = []
    for budget in (1, 2**28):
        torch.manual_seed(0)
        la, x, y = fitted("kron", "cnn", memory_budget=budget)
        la.optimize_prior_precision("gradient", prior_structure="layerwise", val_loader=validation(x, y), n_steps=3)
        results.append(la.prior_precision)
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_by_the_log_marginal_likelihood(structure):
    la, _, _ = fitted(structure, "mlp-regression", sigma_noise=0.5)
    expected = la.optimal_prior_precision("layerwise")
    found = la.optimize_prior_precision(prior_structure="layerwise")
    torch.testing.assert_close(found, expected)
    assert la.sigma_noise == 0.5
    best = la.log_marginal_likelihood()
    la.optimize_prior_precision(prior_structure="layerwise", optimize_noise=True)
    assert la.sigma_noise != 0.5
    assert la.log_marginal_likelihood() > best


def test_ignored_labels_do_not_count():
    from laplace_ws import Categorical

    model, x, y = case_of("transformer-tokens").make()
    y = y.clone()
    y[:, 0] = -100
    la = Laplace(model, Categorical(ignore_index=-100))
    la.fit([(x, y)])
    p = la(x)
    expected = -p[:, 1:].gather(-1, y[:, 1:, None]).log().mean().item()
    for loss, value in (
        ("nll", expected),
        ("brier", evaluate_classification(p[:, 1:], y[:, 1:], kind="probs")["brier"]),
    ):
        assert make_score(loss, la.likelihood)(p, y) == pytest.approx(value)
    la.optimize_prior_precision("gradient", val_loader=[(x, y)], n_steps=2)


def test_errors():
    la, x, y = fitted("kron", "mlp")
    data = [(x, y)]
    for options, message in (
        ({"method": "crossval"}, "unknown method 'crossval'"),
        ({"prior_structure": "weight"}, 'prior_structure="weight" needs hessian_structure'),
        ({"method": "gridsearch"}, "method='gridsearch' needs val_loader"),
        ({"method": "gridsearch", "val_loader": data, "prior_structure": "layerwise"}, "chooses one scalar"),
        ({"method": "gridsearch", "val_loader": data, "loss": "f1"}, "unknown loss 'f1'"),
        ({"method": "gradient", "val_loader": data, "loss": "ece"}, 'method="gradient" minimises loss="nll"'),
        ({"optimize_noise": True}, "the classification likelihood has no noise"),
        ({"optimize_temperature": True}, "the temperature is chosen on validation data"),
        (
            {"method": "gridsearch", "val_loader": data, "loss": lambda p, y: math.nan},
            "no point of the grid has a finite score",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            la.optimize_prior_precision(**options)
    with pytest.raises(InvalidBatchError, match="val_loader holds no batch"):
        la.optimize_prior_precision("gridsearch", val_loader=[])
    with pytest.raises(InvalidBatchError, match="labels must lie in 0 … 2"):
        la.optimize_prior_precision("gridsearch", val_loader=[(x, y + 5)])
    assert la.prior_precision == 1.0
    binary = Laplace(nn.Linear(2, 1), "binary")
    binary.fit([(torch.randn(4, 2), torch.ones(4, 1))])
    with pytest.raises(ValueError, match="loss='ece' is for \"classification\", not for 'binary'"):
        binary.optimize_prior_precision("gridsearch", val_loader=data, loss="ece")


@pytest.mark.parametrize("structure", ["kron", "full"])
def test_adam_goes_where_newton_is(structure):
    """On the way up it never uses another pass over the data, and its steps start from the present values."""
    la, _, _ = fitted(structure, "mlp-regression", sigma_noise=0.5, prior_precision=1.0)
    la.optimize_prior_precision(prior_structure="scalar", optimize_noise=True)
    expected = la.prior_precision.clone(), la.sigma_noise.clone()
    la.prior_precision, la.sigma_noise = 1.0, 0.5
    la.optimize_prior_precision(optimizer="adam", optimize_noise=True, n_steps=1, lr=0.1)
    assert abs(math.log(la.prior_precision)) == pytest.approx(0.1, rel=1e-3)
    la.optimize_prior_precision(optimizer="adam", optimize_noise=True, n_steps=2000, lr=0.02)
    torch.testing.assert_close((la.prior_precision, la.sigma_noise), expected, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'"):
        la.optimize_prior_precision(optimizer="sgd")


def test_a_choice_at_the_edge_of_the_grid_is_said_and_ties_are_stiff():
    """The mean of a regression does not depend on the prior, so that its error says nothing about it."""
    la, x, y = fitted("full", "mlp-regression")
    with pytest.warns(UserWarning, match="the best prior precision of the grid, 100, lies at its edge"):
        la.optimize_prior_precision(
            "gridsearch",
            val_loader=[(x, y)],
            loss=lambda mean, y: (mean - y).square().mean(),
            log_prior_prec_min=-2,
            log_prior_prec_max=2,
            grid_size=5,
        )
    assert la.prior_precision == 100
