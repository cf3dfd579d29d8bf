"""The risk-coverage curve and the area under it, against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from laplace_ws.metrics import METRICS, aurc, evaluate_classification, risk_coverage_curve


def random_problem(n, n_classes=4, seed=0, round_to=None):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(n, n_classes, generator=generator, dtype=torch.float64).softmax(-1)
    if round_to is not None:  # few different confidences, so that many are equal
        top = probs.max(-1).values.mul(round_to).round().div(round_to).clamp(1 / n_classes + 0.01, 0.99)
        rest = ((1 - top) / (n_classes - 1))[:, None].expand(-1, n_classes).clone()
        probs = rest.scatter(1, probs.argmax(-1, keepdim=True), top[:, None])
    return probs, torch.randint(n_classes, (n,), generator=generator)


def risks_oracle(probs, labels):
    """Mean over all orders that put no image before one of which the classifier is surer."""
    confidence = probs.max(-1).values.tolist()
    wrong = probs.argmax(-1).ne(labels).tolist()
    n, curves = len(wrong), []
    for order in itertools.permutations(range(n)):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            curves.append([sum(wrong[i] for i in order[: k + 1]) / (k + 1) for k in range(n)])
    return torch.tensor(curves, dtype=torch.float64).mean(0)


@pytest.mark.parametrize("round_to", [None, 5, 2])
@pytest.mark.parametrize("seed", range(3))
def test_risks_are_those_of_all_orders(round_to, seed):
    probs, labels = random_problem(6, seed=seed, round_to=round_to)
    expected = risks_oracle(probs, labels)
    curve = risk_coverage_curve(probs, labels)
    assert curve.coverage == pytest.approx([k / 6 for k in range(1, 7)])
    assert curve.risk == pytest.approx(expected.tolist(), abs=1e-12)
    assert aurc(probs, labels) == pytest.approx(expected.mean().item(), abs=1e-12)


def test_by_hand():
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    labels = torch.tensor([0, 0, 0, 1])  # right, wrong, right, right, from the surest on
    assert risk_coverage_curve(probs, labels).risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    assert evaluate_classification(probs, labels)["aurc"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert METRICS["aurc"].higher_is_better is False


def test_the_end_of_the_curve_is_the_error_and_order_of_the_data_does_not_count():
    probs, labels = random_problem(500, round_to=20)
    curve = risk_coverage_curve(probs, labels, n_points=10)
    assert curve.coverage == pytest.approx([k / 10 for k in range(1, 11)])
    assert curve.risk[-1] == pytest.approx(1 - evaluate_classification(probs, labels)["accuracy"])
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    assert aurc(probs[order], labels[order]) == pytest.approx(aurc(probs, labels), abs=1e-12)
    assert risk_coverage_curve(probs[order], labels[order], 10).risk == pytest.approx(curve.risk, abs=1e-12)


def test_confidences_next_to_one_keep_their_order():
    tiny = torch.tensor([1e-20, 1e-25], dtype=torch.float64)
    probs = torch.stack([1 - tiny, tiny], -1)
    assert risk_coverage_curve(probs, torch.tensor([1, 0])).risk == (0.0, 0.5)
    assert risk_coverage_curve(probs, torch.tensor([0, 1])).risk == (1.0, 0.5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="not probabilities"):
        risk_coverage_curve(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="n_points must be at least 1"):
        risk_coverage_curve(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 0)
