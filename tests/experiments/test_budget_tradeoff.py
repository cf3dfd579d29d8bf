"""The study of what tuning costs and brings, at small size."""

import json
import math
import sys

import budget_tradeoff
import pytest
import yaml

from laplace_ws.options import Options

ROWS = ["fixed prior", "share 0.5", "optimiser adam", "budget 0.2"]
SETTINGS = {
    "seeds": [0, 1], "rows": ROWS,
    "train": {
        "data": {"n_train": 40, "n_test": 20, "batch_size": 10}, "model": {"name": "mlp", "hidden": [3]},
        "marglik": {"n_epochs": 6, "n_epochs_burnin": 2, "n_hypersteps": 2, "lr": 0.01, "prior_prec_init": 0.5},
    },
}  # fmt: skip


@pytest.fixture
def study(tmp_path, monkeypatch):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))

    def run(*options):
        argv = ["budget_tradeoff.py", "--config", str(path), "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", argv)
        budget_tradeoff.main()
        return json.loads((tmp_path / "budget_tradeoff.json").read_text())["rows"]

    return run


def test_every_row_and_seed_is_measured_once(study, tmp_path, monkeypatch, capsys):
    rows = study()
    assert list(rows) == ROWS
    assert all(len(values) == 2 and all(map(math.isfinite, values)) for row in rows.values() for values in row.values())
    assert rows["fixed prior"]["tunings"] == rows["fixed prior"]["overhead [%]"] == [0, 0]
    assert rows["share 0.5"]["tunings"] == [2, 2]
    assert min(rows["share 0.5"]["overhead [%]"]) > 0
    for row in rows.values():
        pairs = zip(row["at its own prior [nats]"], row["log evidence [nats]"], strict=True)
        assert all(own >= given for own, given in pairs)
    assert "| optimiser adam |" in capsys.readouterr().out
    assert (tmp_path / "budget_tradeoff.svg").read_bytes().startswith(b"<svg")
    monkeypatch.setattr(budget_tradeoff, "prepare", None)  # a further training would fail
    assert study() == rows
    (tmp_path / "budget_tradeoff" / "share-0.5-seed1.json").unlink()
    with pytest.raises(TypeError):
        study()


def test_what_was_measured_with_other_settings_is_not_taken_for_it(study):
    study("--rows", "[fixed prior]", "--seeds", "[0]")
    with pytest.raises(SystemExit, match=r"fixed-prior-seed0\.json' was measured with other settings; remove it"):
        study("--rows", "[fixed prior]", "--seeds", "[0]", "--train.marglik.lr", "0.02")
    with pytest.raises(SystemExit, match="rows names 'fixed', which is none of fixed prior, all batches"):
        study("--rows", "[fixed]")


def test_configuration_of_the_repository_is_read():
    config = Options(budget_tradeoff.TradeoffConfig).read(["--config", "configs/budget_tradeoff.yaml"])
    assert len(config.row_names) == 19
    for row in config.row_names:
        assert config.run_of(row, 0).marglik.n_epochs == 30
