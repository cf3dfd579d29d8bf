"""The script is the command."""

import runpy
import sys
from pathlib import Path

import pytest

from laplace_ws.cli import USAGE


def test_arguments_go_to_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_curvature.py", "--n_rounds", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "bench_curvature.py"), run_name="__main__")
    assert ended.value.code == USAGE
    assert "n_rounds=0 must be at least 1" in capsys.readouterr().err
