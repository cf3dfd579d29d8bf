"""How a run looks at its test set: what it gives, and that the network is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_ws.experiment.evaluate import TEST_BATCH, outputs


class FailsInEvalMode(nn.Module):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("no such kernel")
        return x


def test_outputs_are_those_of_eval_mode_without_a_graph():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    x = torch.randn(TEST_BATCH + 7, 3)
    f = outputs(model, x)
    assert not f.requires_grad
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(f, model.eval()(x))


def test_modes_return_where_the_network_fails():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), FailsInEvalMode())
    model[1].eval()
    with pytest.raises(RuntimeError, match="no such kernel"):
        outputs(model, torch.zeros(1, 2))
    assert [module.training for module in model.modules()] == [True, True, False, True]
