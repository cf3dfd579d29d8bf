"""The files of a run: what is written is what is read, also what earlier versions wrote."""

from __future__ import annotations

import json
from dataclasses import asdict

from laplace_ws.experiment.records import DataFacts, EpochRecord, ModelResult, RunResult, read_epochs, read_run
from laplace_ws.metrics import ReliabilityCurve

CURVE = ReliabilityCurve((0.0, 0.5, 1.0), (None, 0.8), (None, 0.75), (0, 4))
MODEL = ModelResult(
    log_marginal_likelihood=-12.5,
    test_nll=0.5,
    best_epoch=2,
    prior_precision={"0.weight": 3.0},
    prior_group={"0.weight": "0"},
    collapsed=("0",),
    reliability=CURVE,
)
RESULT = RunResult(
    name="demo",
    config={"seed": 0, "data": {"name": "x"}},
    environment={"threads": 1},
    data=DataFacts(name="x", n_train=60, n_test=40),
    total_seconds=1.5,
    tuned=MODEL,
    fixed={"0.5": ModelResult(test_nll=0.25)},
)

# As written before the records had classes, with entries that they do not have.
SUMMARY_0_1 = """{"name": "demo", "format_version": 1, "config": {"seed": 0, "data": {"name": "x"}}, "environment": {"threads": 1},
"data": {"name": "x", "n_train": 60, "n_test": 40}, "total_seconds": 1.5, "tuned": {"log_marginal_likelihood": -12.5, "test_nll": 0.5,
"best_epoch": 2, "prior_precision": {"0.weight": 3.0}, "prior_group": {"0.weight": "0"}, "collapsed": ["0"], "test_rmse": null,
"weight_decay": {"0.weight": 0.05}, "reliability": {"edges": [0.0, 0.5, 1.0], "confidence": [null, 0.8], "accuracy": [null, 0.75],
"count": [0, 4]}}, "fixed": {"0.5": {"test_nll": 0.25}}}"""
LINE_0_1 = """{"run": "tuned", "epoch": 1, "train_nll": 2.25, "train_accuracy": 0.25, "test_nll": null, "test_accuracy": 0, "loss": 2.5,
"log_marginal_likelihood": null, "prior_precision": {"0.weight": 1}, "sigma_noise": null, "temperature": 1.0, "lr": 0.03, "seconds": 0.5}"""


def test_a_run_is_read_as_it_was_written(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(asdict(RESULT)))
    assert read_run(tmp_path) == RESULT


def test_files_of_an_earlier_version_are_read(tmp_path):
    (tmp_path / "summary.json").write_text(SUMMARY_0_1)
    (tmp_path / "metrics.jsonl").write_text(" ".join(LINE_0_1.split("\n")) + "\n")
    assert read_run(tmp_path) == RESULT
    (epoch,), notes = read_epochs(tmp_path)
    assert epoch == EpochRecord(
        run="tuned",
        epoch=1,
        train_nll=2.25,
        train_accuracy=0.25,
        test_accuracy=0.0,
        loss=2.5,
        prior_precision={"0.weight": 1.0},
        temperature=1.0,
        lr=0.03,
        seconds=0.5,
    )
    assert notes == []
