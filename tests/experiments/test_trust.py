"""The study of posteriors over all layers, at small size."""

import json
import sys

import pytest
import trust
import yaml

from laplace_ws.options import Options

SETTINGS = {
    "seeds": [0, 1],
    "networks": [
        {
            "name": "cnn", "model": "small-cnn", "n_train": 40, "n_epochs": 2, "chosen_on_validation": ["scalar", "layerwise"],
            "structures": ["reduce", "expand", "ekfac", "full", "last layer"],
        }
    ],
    "n_validation": 20, "n_test": 20, "n_corrupted": 10, "corruptions": ["contrast"],
    "largest_block": 200, "largest_full": 100, "n_block_images": 10,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # nothing is learned in two epochs, and choices end at limits
def test_rows_and_blocks(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    monkeypatch.setattr(sys, "argv", ["trust.py", "--config", str(path), "--out", str(tmp_path)])
    trust.main()
    found = json.loads((tmp_path / "trust.json").read_text())
    assert found["config"]["seeds"] == [0, 1]
    rows = found["rows"]["predictions"]["cnn"]
    assert all(len(values) == 2 for row in rows.values() for values in row.values())
    assert {
        "network",
        "temperature",
        "reduce, training",
        "expand, re-tuned, scaled",
        "expand, validation, layerwise",
    } <= rows.keys()
    for name in ("reduce", "expand", "ekfac"):
        assert rows[f"{name}, re-tuned"]["evidence"] >= rows[f"{name}, training"]["evidence"]
        unscaled, scaled = rows[f"{name}, training"], rows[f"{name}, training, scaled"]
        assert (unscaled["evidence"], unscaled["complexity"]) == (scaled["evidence"], scaled["complexity"])
    blocks = found["rows"]["blocks"]["cnn"]
    assert list(blocks) == [f"0.weight, {name}" for name in ("reduce", "expand", "ekfac")]
    assert blocks["0.weight, ekfac"]["trace ratio"] == pytest.approx([1.0, 1.0], rel=1e-4)
    printed = capsys.readouterr().out
    assert "| expand, training, scaled |" in printed
    assert "| 0.weight, reduce |" in printed


def test_configuration_of_the_repository_is_read():
    config = Options(trust.TrustConfig).read(["--config", "configs/trust.yaml"])
    assert [network.model for network in config.networks] == ["small-cnn", "lenet", "wide-resnet"]
    assert config.networks[0].chosen_on_validation == ["scalar", "layerwise"]
    assert set(config.networks[2].structures) < set(trust.STRUCTURES)
