"""The study of UCI tables, at small size."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import uci_regression

from laplace_ws import Laplace
from laplace_ws.data import load_uci


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    y = 50 + 10 * (np.sin(2 * x[:, 0]) + 0.1 * rng.normal(size=60))
    np.savetxt(tmp_path / "waves.txt", np.column_stack([x, y]))
    return tmp_path


def test_every_split_is_scored_and_written(folder, monkeypatch, capsys):
    options = [
        f"--folder={folder}",
        "--tables=[waves]",
        "--n_splits=2",
        "--n_epochs=20",
        "--hidden=8",
        f"--out={folder}",
    ]
    monkeypatch.setattr(sys, "argv", ["uci_regression.py", *options])
    uci_regression.main()
    (row,) = json.loads((folder / "uci_regression.json").read_text())["rows"]
    assert (row["table"], row["n"]) == ("waves", 60)
    for figure in (*uci_regression.FIGURES, "sigma_noise"):
        assert len(set(row[figure])) == 2
        assert all(map(math.isfinite, row[figure]))
    assert "| waves | 60 |" in capsys.readouterr().out


def test_scores_are_in_the_units_of_the_targets(folder):
    data = load_uci(folder / "waves.txt", dtype=torch.float64)
    model = torch.nn.Linear(2, 1).double()
    la = Laplace(model, "regression", hessian_structure="full", sigma_noise=0.4, prior_precision=2.0)
    la.fit([(data.x_train, data.y_train)])
    found = uci_regression.scores(la, data)
    # the predictive of Bayesian linear regression, in the targets' own units throughout
    phi, phi_test = (torch.cat([x, torch.ones(len(x), 1).double()], 1) for x in (data.x_train, data.x_test))
    precision = phi.T @ phi / 0.4**2 + 2.0 * torch.eye(3).double()
    variance = 0.4**2 + (phi_test @ torch.linalg.inv(precision) * phi_test).sum(1)
    s, y = data.target_std, data.y_test[:, 0] * data.target_std + data.target_mean
    mean = model(data.x_test).detach()[:, 0] * s + data.target_mean
    for name, v in (("laplace_log_likelihood", variance), ("map_log_likelihood", torch.full_like(variance, 0.4**2))):
        expected = (-0.5 * (y - mean) ** 2 / (s**2 * v) - 0.5 * torch.log(2 * math.pi * s**2 * v)).mean().item()
        assert found[name] == pytest.approx(expected, rel=1e-9)
    assert found["rmse"] == pytest.approx((y - mean).square().mean().sqrt().item(), rel=1e-9)
    assert found["sigma_noise"] == pytest.approx(0.4 * s)
