"""The comparison of the backends, at a small size."""

import json
import sys

import compare_backends
import pytest

from laplace_ws.curvature import FACTOR_BACKENDS


@pytest.mark.long
def test_backends_agree_to_rounding_and_are_timed(tmp_path, monkeypatch, capsys):
    small = {
        "networks": '["fixup", "mlp"]',
        "curvatures": '["ggn"]',
        "image_size": "8",
        "n_classes": "3",
        "n_images": "4",
    }
    options = [f"--{key}={value}" for key, value in {**small, "n_repeats": "1", "out": str(tmp_path)}.items()]
    monkeypatch.setattr(sys, "argv", ["compare_backends.py", *options])
    compare_backends.main()
    rows = json.loads((tmp_path / "compare_backends.json").read_text())["rows"]
    assert [(row["network"], row["kfac_approx"]) for row in rows] == [
        ("fixup", "reduce"), ("fixup", "expand"), ("mlp", "reduce"), ("mlp", "expand")
    ]  # fmt: skip
    for row in rows:
        assert row["largest_difference"] < 1e-10
        assert row["n_factors"] >= 9
        assert set(row["in_training_steps"]) == set(FACTOR_BACKENDS)
        assert all(time > 0 for time in row["in_training_steps"].values())
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(rows) + 4


def test_a_difference_is_seen():
    class Block:
        def __init__(self, factor):
            self.A, self.B = None, factor

    import torch

    one, other = {"w": Block(torch.tensor([3.0, 4.0]))}, {"w": Block(torch.tensor([3.0, 4.5]))}
    assert compare_backends.relative_differences(one, other) == {"w B": pytest.approx(0.1)}
