"""The command that runs laplace-torch's suite, on a suite that is made up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peer_suite.command import as_text, group_of, summary

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "peer_suite.py"
SUITE = """
import laplace, pytest
from laplace.curvature.asdl import AsdlGGN
from laplace.utils import FeatureExtractor

def test_it_is_ours():
    assert laplace.Laplace.__module__ == "laplace_ws.compat.laplace_torch.laplace"
    assert AsdlGGN.__module__ == "laplace_ws.compat.laplace_torch.curvature.asdl"

def test_that_fails():
    assert not laplace.__all__

@pytest.mark.skip
def test_that_is_skipped(): ...

@pytest.mark.xfail
def test_that_is_said_to_fail():
    raise ValueError
"""


@pytest.mark.long
def test_a_suite_runs_with_our_module_in_place_of_theirs(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_baselaplace.py").write_text(SUITE)
    (tmp_path / "tests" / "test_matrix.py").write_text("def test_it(): ...\n")
    out = tmp_path / "out"
    command = [sys.executable, EXPERIMENT, tmp_path, "--out", out]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "of the public interface: 66.7 % pass" in printed
    rows = json.loads((out / "peer_suite.json").read_text())["rows"]
    assert rows["counts"]["public interface"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert rows["counts"]["internals"] == {"passed": 1, "failed": 0, "skipped": 0}
    assert list(rows["failed"]) == ["tests/test_baselaplace.py::test_that_fails"]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    found = subprocess.run([sys.executable, EXPERIMENT, tmp_path], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "is no checkout of laplace-torch" in found.stderr


@pytest.mark.parametrize(
    ("test", "group"),
    [
        ("tests/test_functional_laplace.py::test_it", "function space"),
        ("tests/test_serialization.py::test_serialize_functional[x]", "function space"),
        ("tests/test_serialization.py::test_serialize[x]", "public interface"),
        ("tests/test_curv_backends_asdl.py::test_it", "internals"),
        ("tests/test_baselaplace.py::test_functional_samples[x]", "public interface"),
    ],
)
def test_what_counts(test, group):
    assert group_of(test)[0] == group


def test_failures_are_told_with_what_is_known_of_them():
    found = {
        "tests/test_subset_params.py::test_incompatible_backend[a]": "failed",
        "tests/test_laplace.py::b": "failed",
    }
    text = as_text(summary(found))
    assert "failed, 1: asks for an error where ours works" in text
    assert "failed, 1: not known" in text
