"""Fits on several processes, measured at small size, and what is computed from them."""

import json
import sys
from dataclasses import replace

import pytest
import scaling

BLOCKS = {"costs": [8.0, 4.0, 4.0], "seconds": [0.8, 0.5, 0.4]}
ALONE = {"kfac_approx": "reduce", "pass, CPU": 2.0}


def test_projected_times_are_sums_of_the_parts():
    config = scaling.ScalingConfig(
        n_images=100, n_images_projected=1000, n_projected=[1, 2, 8], bandwidth=1e-3
    )  # 1 MB per second
    alone, two, eight = scaling.projected_rows(config, ALONE, BLOCKS, (3_000_000, 1_000_000))
    assert (alone["pass"], alone["sending"], alone["eigenvalues"]) == (20.0, 0.0, pytest.approx(1.7))
    assert (two["pass"], two["sending"]) == (10.0, pytest.approx(3 + 1))
    assert two["eigenvalues"] == pytest.approx(0.9)  # the costliest block against the two others
    assert (eight["pass"], eight["sending"]) == (2.5, pytest.approx(2 * 3 * 7 / 8 + 1))
    assert eight["eigenvalues"] == pytest.approx(0.8)
    assert scaling.total(two) == pytest.approx(10 + 4 + 0.9)


def test_operations_and_bytes_are_counted_from_shapes():
    config = scaling.ScalingConfig(n_projected=[1, 2, 8])
    rows = {row["network"]: row for row in scaling.counted_rows(config)}
    layer = rows["decoder layer, 4096/14336"]
    assert layer["n_weights"] == 4 * 4096**2 + 3 * 4096 * 14336
    assert layer["largest_side"] == 14336
    assert layer["operations"] == pytest.approx(4 / 3 * (11 * 4096**3 + 3 * 14336**3))
    assert layer["sum_bytes"] == 2 * (11 * 4096 * 4097 + 3 * 14336 * 14337)
    assert layer["speed_up"][1] == 1
    assert 2.9 < layer["speed_up"][8] < 3.3  # three matrices are most of it, and none is divided
    assert rows["ResNet-18"]["largest_side"] == 9 * 512
    assert rows["ViT-B/16"]["largest_side"] == 4 * 768
    assert rows["ViT-B/16"]["operations"] == pytest.approx(
        4 / 3 * 768**3 * (12 * (3 * 2 + 2 + 2 * 65) + 2) + 4 / 3 * (768**3 + 1000**3)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_processes": [0]}, r"n_processes must be numbers of at least 1: \[0\]"),
        ({"n_projected": []}, "n_projected must be numbers of at least 1"),
        ({"bandwidth": 0.0}, r"bandwidth=0\.0 must be positive"),
        ({"n_images": 3}, "n_images=3 leaves one of 4 processes without an image"),
        ({"kfac_approxes": ["exact"]}, "must be of reduce and expand"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        scaling.check_config(replace(scaling.ScalingConfig(), **change))


@pytest.mark.long
def test_two_processes_have_the_evidence_of_one(tmp_path, monkeypatch, capsys):
    options = {
        "depth": 10,
        "width": 1,
        "n_images": 8,
        "batch_size": 2,
        "kfac_approxes": "[reduce]",
        "n_processes": "[2]",
    }
    options |= {"n_repeats": 1, "out": tmp_path}
    given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--config", "configs/scaling.yaml", *given])
    scaling.main()
    found = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    one, two = found["measured"]
    assert two["evidence"] == pytest.approx(one["evidence"], rel=1e-6)
    assert one["sum_bytes"] == 0
    assert two["sum_bytes"] > 10 * two["eigenvalue_bytes"] > 0
    assert 0 < found["machinery"]["reduce"] < 0.1
    assert "| reduce | 1000 |" in capsys.readouterr().out
