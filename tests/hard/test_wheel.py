"""The commands of the README, in small, from an installed wheel in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--data.n_train=60", "--data.n_test=40", "--marglik.n_epochs=2", "--marglik.n_epochs_burnin=1", "--workers=1"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the package as its wheel installs it, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder / "site"),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "site"


def test_the_commands_of_the_readme(installed, hard, tmp_path):
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(installed / "bin" / "laplace-ws"), *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import laplace_ws; print(laplace_ws.__file__)"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(installed)

    assert "laplace-ws train --config demo" in run("configs")
    fixed = ["--baselines.fixed_prior_precisions=[0.5]", "--data.batch_size=20"]
    assert "report: runs/demo/report.html" in run("train", "--config", "demo", *SMALL, *fixed)
    if not hard:  # each takes seconds to import torch
        return
    assert "report: runs/demo/report.html" in run("report", "runs/demo")
    fast = [
        "--methods.laplace=[last_layer_kron]",
        "--data.corruptions=[contrast]",
        "--data.n_validation=50",
        "--data.n_test=40",
    ]
    assert "report: runs/demo/calibration.html" in run("calibrate", "--checkpoint", "runs/demo", *fast)
    two = "[{name: a, model: {name: mlp, hidden: [3]}}, {name: b, model: {name: mlp, hidden: [4]}}]"
    assert "select.html" in run("select", "--config", "select", *SMALL, f"--candidates={two}")
