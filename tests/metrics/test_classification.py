from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from laplace_ws.metrics import ReliabilityCurve, evaluate_classification, reliability_curve

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.4, 0.35, 0.25], [0.05, 0.0, 0.95]], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 0, 2])


def random_problem(n=400, n_classes=5, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(n_classes, (n,), generator=generator)


def test_hand_computed_values():
    scores = evaluate_classification(PROBS, LABELS, n_bins=5)
    assert scores["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.1) + math.log(0.4) + math.log(0.95)) / 4)
    assert scores["accuracy"] == pytest.approx(3 / 4)
    brier = (0.09 + 0.04 + 0.01) + (0.01 + 0.64 + 0.81) + (0.36 + 0.1225 + 0.0625) + (0.0025 + 0.0025)
    assert scores["brier"] == pytest.approx(brier / 4)
    # bins: [.4, .6) holds .4 (right), [.6, .8) holds .7 (right), [.8, 1] holds .8 (wrong) and .95 (right)
    assert scores["ece"] == pytest.approx((0.6 + 0.3 + 2 * abs(0.5 - 0.875)) / 4, abs=1e-6)


def test_hand_computed_curve():
    curve = reliability_curve(PROBS, LABELS, n_bins=5)
    assert curve.edges == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert curve.count == (0, 0, 1, 1, 2)
    assert curve.accuracy == (None, None, 1.0, 1.0, 0.5)
    assert curve.confidence[:2] == (None, None)
    assert curve.confidence[2:] == pytest.approx((0.4, 0.7, 0.875))
    assert curve.ece == pytest.approx((0.6 + 0.3 + 0.75) / 4)
    assert curve.n_examples == 4


@pytest.mark.parametrize("n_bins", [1, 7, 10, 15, 40])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])  # 40: many confidences are 1 in float32
def test_ece_is_the_curves(n_bins, scale):
    logits, labels = random_problem(scale=scale)
    curve = reliability_curve(logits.softmax(-1), labels, n_bins)
    assert evaluate_classification(logits, labels, n_bins)["ece"] == pytest.approx(curve.ece, abs=2e-6)
    assert curve.n_examples == len(labels)


def test_confidence_of_one_is_in_the_last_bin():
    probs = torch.tensor([[1.0, 0.0], [0.92, 0.08]])
    curve = reliability_curve(probs, torch.tensor([0, 1]), n_bins=10)
    assert curve.count[-1] == 2
    assert curve.ece == pytest.approx(abs(0.5 - 0.96))
    assert evaluate_classification(probs, torch.tensor([0, 1]), n_bins=10)["ece"] == pytest.approx(curve.ece, abs=1e-6)


def test_logits_and_probabilities_agree():
    logits, labels = random_problem()
    from_logits = evaluate_classification(logits, labels)
    assert evaluate_classification(logits.softmax(-1), labels) == pytest.approx(from_logits)
    assert evaluate_classification(logits + 50, labels, kind="logits") == pytest.approx(from_logits)


def test_leading_dimensions_are_examples():
    logits, labels = random_problem()
    split = evaluate_classification(logits.reshape(100, 4, 5), labels.reshape(100, 4))
    assert split == pytest.approx(evaluate_classification(logits, labels))


def test_low_precision_outputs():
    logits, labels = random_problem()
    halves = evaluate_classification(logits.bfloat16(), labels)
    assert halves["nll"] == pytest.approx(evaluate_classification(logits, labels)["nll"], rel=1e-2)


def test_impossible_label_has_infinite_nll():
    scores = evaluate_classification(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert scores["nll"] == math.inf
    assert scores["brier"] == 2.0


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (torch.rand(3, 4), torch.zeros(2, dtype=torch.long), "do not fit"),
        (torch.rand(3), torch.zeros(3, dtype=torch.long), "do not fit"),
        (torch.rand(0, 4), torch.zeros(0, dtype=torch.long), "no example"),
        (torch.randn(2, 3), torch.tensor([0, 3]), "from 0 to 2"),
        (torch.tensor([[math.nan, 0.0]]), torch.tensor([0]), "NaN"),
        (torch.tensor([[0.5, 0.52]]), torch.tensor([0]), "kind='logits' or kind='probs'"),
    ],
)
def test_errors(outputs, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate_classification(outputs, labels)


def test_curve_refuses_logits():
    with pytest.raises(ValueError, match="not probabilities"):
        reliability_curve(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="n_bins"):
        reliability_curve(PROBS, LABELS, n_bins=0)


def test_curve_survives_json():
    curve = reliability_curve(PROBS, LABELS)
    text = json.dumps(curve.to_dict(), allow_nan=False)
    assert "null" in text
    assert ReliabilityCurve.from_dict(json.loads(text)) == curve
    without_edges = {key: value for key, value in json.loads(text).items() if key != "edges"}
    assert ReliabilityCurve.from_dict(without_edges) == curve


@pytest.mark.parametrize(
    "values",
    [
        {"confidence": [0.5], "accuracy": [0.5]},
        {"confidence": [0.5], "accuracy": [0.5, 0.1], "count": [1]},
        {"confidence": [None], "accuracy": [0.5], "count": [1]},
        {"confidence": [], "accuracy": [], "count": []},
    ],
)
def test_broken_curves(values):
    with pytest.raises(ValueError, match=r"needs|lacks"):
        ReliabilityCurve.from_dict(values)


def test_import_leaves_torchmetrics_out():
    code = "import sys, laplace_ws.metrics; raise SystemExit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
