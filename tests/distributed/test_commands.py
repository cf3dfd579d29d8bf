"""Commands started by torchrun give what they give in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from laplace_ws.cli import main

TRAIN = [
    "train", "--config", "demo", "--report", "false", "--workers", "1", "--baselines.fixed_prior_precisions", "[]",
    "--data.n_train", "100", "--data.n_test", "100", "--data.batch_size", "25",
    "--model.name", "mlp", "--model.hidden", "[10]", "--model.depth", "null",
    "--model.width", "null", "--model.norm", "null", "--marglik.n_epochs", "2", "--marglik.n_epochs_burnin", "1",
]  # fmt: skip
CALIBRATE = [
    "calibrate",
    "--data.corruptions",
    "[]",
    "--data.n_validation",
    "60",
    "--methods.laplace",
    "[kron, last_layer_kron]",
    "--methods.priors",
    "[training, marglik]",
]


def run(n: int, args: list[str]) -> subprocess.CompletedProcess:
    """Run a command under torchrun."""
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "-m", "laplace_ws"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *args], capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """Run folders by number of processes."""
    out = tmp_path_factory.mktemp("runs")
    assert main([*TRAIN, "--out", str(out), "--name", "on1"]) == 0
    ended = run(2, [*TRAIN, "--out", str(out), "--name", "on2"])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("summary:") == 1
    return {n: out / f"on{n}" for n in (1, 2)}


def test_train(folders):
    alone, two = (json.loads((folders[n] / "summary.json").read_text())["tuned"] for n in (1, 2))
    for name in ("log_marginal_likelihood", "test_nll", "test_accuracy", "test_ece"):
        assert two[name] == pytest.approx(alone[name], rel=2e-3), name
    lines = [json.loads(line) for line in (folders[2] / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]


@pytest.mark.long
def test_calibrate(folders):
    found = {}
    for n in (1, 2):
        given = [*CALIBRATE, "--checkpoint", str(folders[1] / "checkpoint.pt"), "--out", str(folders[1] / f"by{n}")]
        assert (main(given) if n == 1 else run(n, given).returncode) == 0
        found[n] = json.loads((folders[1] / f"by{n}" / "calibration.json").read_text())["methods"]
    assert list(found[1]) == list(found[2])
    for method, alone in found[1].items():
        for name, value in alone["test"].items():
            assert found[2][method]["test"][name] == pytest.approx(value, abs=1e-5), (method, name)
