"""How a run looks at its test set: what it gives, and that the network is left as it was."""

from __future__ import annotations

import json
import time

import pytest
import torch
from calibration.tiny import tiny_config
from torch import nn

from laplace_ws.data import load_dataset
from laplace_ws.experiment import evaluate
from laplace_ws.experiment.evaluate import TEST_BATCH, epoch_logger, outputs


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


def test_the_look_at_the_test_set_is_not_in_the_cpu_time(tmp_path, monkeypatch):
    def slow_outputs(model, x):
        work_for(0.4)
        return torch.zeros(len(x), 10)

    monkeypatch.setattr(evaluate, "outputs", slow_outputs)
    log = epoch_logger(
        tiny_config(tmp_path), "tuned", nn.Identity(), load_dataset(n_train=10, n_test=10), tmp_path / "m"
    )
    for epoch in (4, 8):  # both with a look
        work_for(0.1)
        log({"epoch": epoch})
    times = [json.loads(line)["cpu_seconds"] for line in (tmp_path / "m").read_text().splitlines()]
    assert all(0.1 <= seconds < 0.4 for seconds in times)


def work_for(seconds: float) -> None:
    """Use the CPU for some time."""
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
