from __future__ import annotations

import math

import pytest
import torch

from laplace_ws.metrics import OodScore, ood_detection, ood_scores


def random_probs(n, c, scale=1.0, seed=0):
    return (torch.randn(n, c, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale).softmax(-1)


def detection_oracle(scores_in, scores_out):
    """All pairs for the AUROC, all thresholds for the FPR."""
    pairs = scores_out[:, None] - scores_in[None]
    auroc = ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item()
    rates = []
    for threshold in torch.cat([scores_in, scores_out]).tolist():
        found = int((scores_out >= threshold).sum())
        if 100 * found >= 95 * len(scores_out):
            rates.append((scores_in >= threshold).double().mean().item())
    return {"auroc": auroc, "fpr95": min(rates)}


@pytest.mark.parametrize(("n_in", "n_out"), [(50, 60), (7, 20), (20, 7), (1, 1)])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("score", OodScore)
def test_detection_equals_its_definition(n_in, n_out, ties, score):
    scores_in = ood_scores(random_probs(n_in, 5, 3.0, seed=1), score)
    scores_out = ood_scores(random_probs(n_out, 5, 1.0, seed=2), score)
    if ties:
        scores_in, scores_out = (scores.mul(5).round().div(5) for scores in (scores_in, scores_out))
    found = ood_detection(scores_in, scores_out)
    assert found == pytest.approx(detection_oracle(scores_in, scores_out), abs=1e-6)


def test_a_threshold_at_exactly_95_percent_counts():
    scores_out = torch.cat([torch.zeros(1), torch.full((19,), 0.9)])  # 19 of 20
    scores_in = torch.tensor([0.1, 0.2, 0.3, 0.95])
    assert ood_detection(scores_in, scores_out)["fpr95"] == 0.25


def test_sure_and_unsure_inputs_are_told_apart():
    sure, unsure = torch.tensor([[0.98, 0.01, 0.01]] * 3), torch.tensor([[0.4, 0.3, 0.3]] * 4)
    for score in OodScore:
        assert ood_detection(ood_scores(sure, score), ood_scores(unsure, score)) == {"auroc": 1.0, "fpr95": 0.0}
        assert ood_detection(ood_scores(unsure, score), ood_scores(sure, score)) == {"auroc": 0.0, "fpr95": 1.0}
        same = ood_scores(sure, score)
        assert ood_detection(same, same) == {"auroc": 0.5, "fpr95": 1.0}


def test_scores_by_hand():
    probs = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(ood_scores(probs), torch.tensor([0.5, 0.0, 2 / 3], dtype=torch.float64))
    entropy = torch.tensor([1.5 * math.log(2) / math.log(3), 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(ood_scores(probs, "entropy"), entropy)


def test_confidences_next_to_one_keep_their_order():
    tiny = torch.tensor([1e-20, 1e-25], dtype=torch.float64)
    probs = torch.stack([1 - tiny, tiny], -1)
    torch.testing.assert_close(ood_scores(probs), tiny, rtol=1e-12, atol=0)


def test_leading_dimensions_are_merged():
    probs = random_probs(6, 4)
    torch.testing.assert_close(ood_scores(probs.reshape(2, 3, 4)), ood_scores(probs))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="unknown ood_score 'loudness': choose one of 'confidence', 'entropy'"):
        ood_scores(random_probs(2, 3), "loudness")
    with pytest.raises(ValueError, match="not probabilities"):
        ood_scores(torch.randn(5, 3))
    with pytest.raises(ValueError, match="scores_in must hold one number at least"):
        ood_detection(torch.zeros(0), torch.zeros(3))
    with pytest.raises(ValueError, match="scores_out must hold"):
        ood_detection(torch.zeros(3), torch.tensor([math.nan]))
