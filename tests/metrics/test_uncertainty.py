"""The split of uncertainty into aleatoric and epistemic, against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from laplace_ws.metrics import ood_detection, ood_scores, uncertainty_split


def test_the_split_is_its_definition():
    p = torch.randn(5, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    found = uncertainty_split(p)
    for n in range(7):
        mean = [sum(p[s, n, c].item() for s in range(5)) / 5 for c in range(3)]
        total = -sum(q * math.log(q) for q in mean)
        aleatoric = -sum(p[s, n, c].item() * math.log(p[s, n, c].item()) for s in range(5) for c in range(3)) / 5
        # mutual information of class and sample, from their joint distribution
        information = sum(
            p[s, n, c].item() / 5 * math.log(p[s, n, c].item() / mean[c]) for s in range(5) for c in range(3)
        )
        assert found.total[n].item() == pytest.approx(total, abs=1e-12)
        assert found.aleatoric[n].item() == pytest.approx(aleatoric, abs=1e-12)
        assert found.epistemic[n].item() == pytest.approx(information, abs=1e-12)


def test_agreement_is_aleatoric_and_disagreement_epistemic():
    unsure = torch.full((4, 1, 2), 0.5, dtype=torch.float64)
    agreed = uncertainty_split(unsure)
    assert agreed.aleatoric.item() == pytest.approx(math.log(2))
    assert agreed.epistemic.item() == pytest.approx(0.0, abs=1e-12)
    certain = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    disagreed = uncertainty_split(certain)
    assert disagreed.aleatoric.item() == 0.0
    assert disagreed.epistemic.item() == pytest.approx(math.log(2))


def test_total_is_the_entropy_by_which_others_are_found():
    p = torch.randn(6, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    expected = ood_scores(p.mean(0), "entropy") * math.log(4)
    torch.testing.assert_close(uncertainty_split(p).total, expected)


def test_scores_on_any_scale_are_told_apart():
    """Nats may exceed 1 beside values that differ far below it; rounding may leave them just below 0."""
    scores_in, scores_out = torch.tensor([-1e-17, 1e-20, 1e-19]), torch.tensor([1e-18, 1e-17, 2.0])
    assert ood_detection(scores_in, scores_out)["auroc"] == 1.0


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="not probabilities"):
        uncertainty_split(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="no example"):
        uncertainty_split(torch.zeros(0, 3, 4))
    with pytest.raises(TypeError, match=r"\[S, N, C\]"):
        uncertainty_split(torch.rand(3, 4).softmax(-1))
