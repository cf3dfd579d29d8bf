"""Files that version 0.1.0 wrote before posteriors were made of parts (format 2) are read, to the last digit that was printed then."""

from pathlib import Path

import pytest
import torch
from torch import nn

from laplace_ws import load_posterior

SAVED = Path(__file__).parent / "saved"
THEN = {
    "kron": (-34.392737893, 0.112302778),
    "ekfac": (-34.301450639, 0.113553892),
    "diag": (-35.731654325, 0.125171457),
    "full": (-33.662160631, 0.109847515),
    "lowrank": (-33.662160631, 0.109847515),
}
"""Log marginal likelihood, and the first probability of the first input."""


def grid(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


@pytest.mark.parametrize("structure", THEN)
def test_a_file_saved_before_is_read(structure):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(grid(*p.shape))
    la = load_posterior(SAVED / f"{structure}.pt", model)
    found = la.log_marginal_likelihood().item(), la(grid(6, 3))[0, 0].item()
    assert found == pytest.approx(THEN[structure], abs=2e-9)
    assert (la.hessian_structure, la.n_data, la.class_names) == (structure, 6, ("a", "b", "c"))
    assert (la.prior_precision, la.temperature) == (2.0, 0.5)
