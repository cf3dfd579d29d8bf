"""The command line: what it writes, what it refuses, and that side by side equals in order."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from times import TIMES

from laplace_ws.cli import bundled_configs, main, parse
from laplace_ws.curvature import FACTOR_BACKENDS
from laplace_ws.experiment import run as experiment
from laplace_ws.experiment.config import RunConfig
from laplace_ws.experiment.records import read_run
from laplace_ws.experiment.run import run_experiment
from laplace_ws.options import UnknownKeyError, check_keys, config_keys, flatten
from laplace_ws.report import load_run

SETTINGS = {
    "name": "tiny",
    "data": {"n_train": 60, "n_test": 40, "batch_size": 20},
    "model": {"name": "mlp", "hidden": [5]},
    "marglik": {
        "n_epochs": 4,
        "n_epochs_burnin": 2,
        "marglik_frequency": 1,
        "fit_fraction": 1.0,
        "n_hypersteps": 3,
        "lr": 0.01,
        "prior_prec_init": 0.5,
    },
    "baselines": {"fixed_prior_precisions": [0.5, 100]},
    "report": False,
}


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"out": str(tmp_path / "runs")}))
    return path


@pytest.fixture
def no_training(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(experiment, "marglik_training", fail)


def parse_train(args: list[str]) -> tuple[RunConfig, bool]:
    _, config, flags = parse(["train", *args])
    return config, flags["resume"]


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def results(folder: Path) -> tuple[list, dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return without_times(lines), without_times({k: summary[k] for k in ("tuned", "fixed", "data")})


# ------------------------------------------------------------------ what it writes


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    path = out / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"out": str(out)}))
    assert main(["train", "--config", str(path)]) == 0
    return out / "tiny"


def test_metrics_have_one_line_an_epoch_and_network(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["run"], r["epoch"]) for r in lines] == [
        (run, epoch) for run in ("tuned", "fixed-0.5", "fixed-100") for epoch in (1, 2, 3, 4)
    ]
    names = {"0.weight", "0.bias"}
    for r in lines:
        assert {"train_nll", "train_accuracy", "test_nll", "test_accuracy", "lr", "seconds"} <= set(r)
        assert all(math.isfinite(r[key]) for key in ("train_nll", "test_nll", "lr", "seconds", "temperature"))
        assert r["cpu_seconds"] > 0
        assert 0 <= r["test_accuracy"] <= 1
        assert names <= {name.replace("1.", "0.") for name in r["prior_precision"]}
        measured = r["run"] == "tuned" and r["epoch"] >= 2
        assert (r["fit_batches"], r["curvature_seconds"] > 0) == (3 * measured, measured)
        assert (r["log_marginal_likelihood"] is not None) == measured


def test_summary_has_the_agreed_fields(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["format_version"] == 1
    assert summary["data"] == {"name": "fashion-mnist-subset", "n_train": 60, "n_test": 40}
    assert set(summary["environment"]) == {"python", "torch", "laplace_ws", "threads", "device"}
    assert set(summary["fixed"]) == {"0.5", "100"}
    assert summary["config"]["marglik"]["n_epochs"] == 4
    for model in (summary["tuned"], *summary["fixed"].values()):
        for key in ("log_marginal_likelihood", "test_nll", "test_accuracy", "test_ece", "train_seconds"):
            assert math.isfinite(model[key]), key
        assert 0 < model["curvature_seconds"] < model["train_seconds"]
        gradient_seconds = model["train_seconds"] - model["curvature_seconds"]
        overhead = model["tuning_overhead"] + model["final_fit_overhead"]
        assert overhead == pytest.approx(model["curvature_seconds"] / gradient_seconds)
        assert model["over_budget"] is None  # nothing was left to it
        assert sum(model["reliability"]["count"]) == 40
        assert model["collapsed"] == []
    assert list(summary["fixed"]["100"]["prior_precision"].values()) == pytest.approx([100.0] * 4)
    assert load_run(finished).tuned.test_nll == summary["tuned"]["test_nll"]  # the report reads it


def test_networks_start_alike_and_see_the_same_batches(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    tuned, same = ([r for r in lines if r["run"] == run and r["epoch"] <= 2] for run in ("tuned", "fixed-0.5"))
    assert [r["test_nll"] for r in tuned] == [r["test_nll"] for r in same]  # until the first tuning ends epoch 2
    assert lines[2]["test_nll"] != lines[6]["test_nll"]


def test_a_run_within_a_budget_says_what_it_chose_and_what_it_cost(tmp_path):
    """The default: neither frequency nor share of the batches is given."""
    marglik = {k: v for k, v in SETTINGS["marglik"].items() if k not in ("marglik_frequency", "fit_fraction")}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"marglik": marglik, "out": str(tmp_path), "report": True}))
    assert main(["train", "--config", str(path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [r["fit_batches"] > 0 for r in lines if r["run"] == "tuned"] == [False, True, True, True]  # it never starves
    assert {r["fit_batches"] for r in lines if r["run"] != "tuned"} == {0}
    record = load_run(tmp_path / "tiny")
    assert record.tuned.over_budget >= 0
    assert {model.over_budget for model in record.fixed} == {None}
    assert "the budget of 10 %" in (tmp_path / "tiny" / "report.html").read_text()


def test_side_by_side_equals_in_order(finished, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"out": str(tmp_path), "workers": 2}))
    assert main(["train", "--config", str(path)]) == 0
    assert results(tmp_path / "tiny") == results(finished)


def test_a_finished_run_is_replaced_whole_when_told_to(config_file, tmp_path, capsys):
    folder = tmp_path / "runs" / "tiny"
    assert main(["train", "--config", str(config_file)]) == 0
    before = results(folder)
    smaller = ["--marglik.n_epochs", "3", "--baselines.fixed_prior_precisions", "[]"]
    assert main(["train", "--config", str(config_file), *smaller]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert results(folder) == before
    assert main(["train", "--config", str(config_file), *smaller, "--overwrite"]) == 0
    lines, summary = results(folder)
    assert len(lines) == 3
    assert summary["fixed"] == {}
    assert (lines, summary) != before
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["checkpoint.pt", "config.json", "metrics.jsonl", "summary.json"]
    )


def test_resume_after_an_interrupt_gives_the_same_files(config_file, finished, tmp_path, monkeypatch, capsys):
    real = experiment.epoch_logger

    def interrupted_logger(config, run, *args):
        log = real(config, run, *args)

        def logged(record):
            log(record)
            if run == "fixed-0.5" and record["epoch"] == 4:
                raise KeyboardInterrupt

        return logged

    monkeypatch.setattr(experiment, "epoch_logger", interrupted_logger)
    arguments = ["train", "--config", str(config_file)]
    assert main(arguments) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(experiment, "epoch_logger", real)
    assert main(arguments) == 2
    assert "unfinished run; go on with it by --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--marglik.lr", "0.02"]) == 2
    assert "marglik.lr was 0.01 and is 0.02" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert results(tmp_path / "runs" / "tiny") == results(finished)


def test_without_a_terminal_each_network_says_its_epochs(config_file, capsys):
    assert main(["train", "--config", str(config_file), "--baselines.fixed_prior_precisions", "[0.5]"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(", loss ")[0] for line in said] == [
        f"tiny {run}: epoch {epoch}/4" for run in ("tuned", "fixed-0.5") for epoch in range(1, 5)
    ]
    assert ["log marginal likelihood -" in line for line in said] == [False, True, True, True] + 4 * [False]


def test_report_is_written_and_named(config_file, tmp_path, capsys):
    assert (
        main(["train", "--config", str(config_file), "--report", "true", "--baselines.fixed_prior_precisions", "[]"])
        == 0
    )
    out = capsys.readouterr().out
    path = tmp_path / "runs" / "tiny" / "report.html"
    assert f"report: {path}" in out
    assert "tuned" in out
    path.unlink()
    assert main(["report", str(path.parent)]) == 0
    assert path.exists()


# ------------------------------------------------------------------ what it reads


def test_every_field_can_be_overridden(config_file):
    config, resume = parse_train(
        [f"--config={config_file}", "--data.n_train=30", "--model.norm", "none", "--marglik.kfac_approx", "reduce",
         "--baselines.fixed_prior_precisions", "[1, 2.5]", "--resume"]
    )  # fmt: skip
    assert resume
    assert config.data.n_train == 30
    assert config.data.batch_size == 20  # from the file
    assert config.model.norm == "none"
    assert config.marglik.kfac_approx == "reduce"
    assert config.baselines.fixed_prior_precisions == [1.0, 2.5]


@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
def test_a_run_with_each_backend(config_file, tmp_path, backend):
    arguments = [f"--config={config_file}", "--out", str(tmp_path), "--marglik.backend", backend, "--report", "false"]
    config, _ = parse_train([*arguments, "--baselines.fixed_prior_precisions", "[]"])
    assert config.marglik.backend == backend
    _, result = run_experiment(config)
    assert math.isfinite(result.tuned.log_marginal_likelihood)


def test_mapping_of_layers_to_approximations(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("marglik:\n  kfac_approx:\n    'conv*': expand\n    '*': reduce\n")
    config, _ = parse_train([f"--config={path}"])
    assert config.marglik.kfac_approx == {"conv*": "expand", "*": "reduce"}


def test_demo_file_is_valid():
    config, _ = parse_train(["--config=demo"])
    assert config.name == "demo"
    assert len(config.baselines.fixed_prior_precisions) == 3
    assert max(config.baselines.fixed_prior_precisions) >= 999 * min(config.baselines.fixed_prior_precisions)


def test_keys_cover_the_whole_configuration():
    assert set(flatten(asdict(RunConfig()), config_keys(RunConfig))) == set(config_keys(RunConfig))
    with pytest.raises(UnknownKeyError, match=r"'data\.nane'; did you mean 'data\.name'"):
        check_keys(["data.nane"], config_keys(RunConfig))


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--marglik.n_epoch", "3"], "unknown key 'marglik.n_epoch'; did you mean 'marglik.n_epochs'?"),
        (["--marglik.n_epoch=3"], "unknown key 'marglik.n_epoch'; did you mean 'marglik.n_epochs'?"),
        (["--confg", "x"], "did you mean 'config'?"),
        (["--marglik", '{"n_epoch": 3}'], "n_epoch"),
        (["--marglik.n_epochs", "many"], "marglik.n_epochs"),
        (["--marglik.curvature", "hessian"], "curvature"),
        (["--config", "nowhere.yaml"], "'nowhere.yaml' is no file; give a YAML file, or the name of a bundled"),
        (["--config"], "config"),
        (["--data.n_train", "99999"], "n_train=99999"),
        (["--data.name", "cifar10", "--data.root", "/nowhere"], "/nowhere"),
        (["--model.depth", "11"], "depth=11"),
        (["--model.name", "mlpp"], "did you mean 'mlp'?"),
        (["--marglik.n_epochs", "0"], "n_epochs=0"),
        (["--marglik.prior_structure", "weight"], "diag"),
        (["--baselines.fixed_prior_precisions", "[1, 1.0]"], "twice"),
        (["--baselines.fixed_prior_precisions", "[-1]"], "positive"),
        (["--workers", "0"], "workers=0"),
        (["--data.n_train", "60", "--marglik.lr", "0.1", "--marglik.prior_prec_init", "601"], "above its limit of 600"),
        (["--data.n_train", "60", "--marglik.temperature_init", "-1"], "temperature starts at -1"),
        (["--data.n_train", "60", "--marglik.lr", "0"], "marglik.lr=0"),
        (["--marglik.kfac_approx", '{"layer.*": "reduce"}'], "matches no parameter"),
        (["--marglik.kfac_approx", "reduce", "--marglik.hessian_structure", "diag"], "kfac_approx"),
        (["--marglik.backend", "natve"], "unknown backend 'natve'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, says, no_training, tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("marglik:\n  n_epoch: 3\n", "unknown key 'marglik.n_epoch'; did you mean 'marglik.n_epochs'?"),
        ("modle: {}\n", "did you mean 'model'?"),
        ("marglik:\n  n_epochs: many\n", "marglik.n_epochs"),
        ("name: [\n", "not valid YAML"),
        ("demo\n", "must hold keys and values"),
    ],
)
def test_bad_files_are_refused_in_one_line(text, says, no_training, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert main(["train", "--out", str(tmp_path), "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_unwritable_folder_is_refused_before_training(no_training, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["train", "--out", str(tmp_path / "file"), "--data.n_train", "50"]) == 2
    assert f"the folder '{tmp_path / 'file' / 'run'}' cannot be written" in capsys.readouterr().err


def test_divergence_names_the_network_and_keeps_what_there_is(config_file, tmp_path, capsys):
    assert main(["train", "--config", str(config_file), "--baselines.fixed_prior_precisions", "[1.0e+9]"]) == 1
    err = capsys.readouterr().err
    assert "fixed-1e+09: the " in err
    assert "in epoch" in err
    folder = tmp_path / "runs" / "tiny"
    assert (folder / "checkpoint.pt").exists()
    assert sum('"tuned"' in line for line in (folder / "metrics.jsonl").read_text().splitlines()) == 4


def test_commands(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "{train,select,calibrate,report,configs}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert main(["report", "nowhere"]) == 2


def test_bundled_configurations(capsys, tmp_path, monkeypatch):
    assert main(["configs"]) == 0
    out = capsys.readouterr().out
    assert "laplace-ws train --config demo" in out
    assert "laplace-ws select --config select" in out
    for name, path in bundled_configs().items():
        assert main(["configs", "--show", name]) == 0
        text = capsys.readouterr().out
        assert text == path.read_text()
        _, found, _ = parse([path.parent.name, "--config", name])
        own = tmp_path / f"{name}.yaml"
        own.write_text(text)
        assert parse([path.parent.name, "--config", str(own)])[1] == found
    assert main(["configs", "--show", "dem"]) == 2
    assert "did you mean 'demo'?" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("name: mine\n")  # a file of one's own goes first
    assert parse_train(["--config", "demo"])[0].name == "mine"


def test_run_experiment_returns_what_it_writes(tmp_path):
    config, _ = parse_train(["--out", str(tmp_path), "--data.n_train", "40", "--data.n_test", "20", "--model.name", "mlp",
                             "--marglik.n_epochs", "1", "--marglik.n_epochs_burnin", "0"])  # fmt: skip
    folder, result = run_experiment(config)
    assert read_run(folder) == result


@pytest.mark.long
def test_an_interrupt_of_workers_stops_them_all(tmp_path):
    """Ctrl-C reaches the whole process group; a network that is still queued must not be trained to its end."""
    path = tmp_path / "long.yaml"
    long = SETTINGS | {
        "out": str(tmp_path),
        "name": "long",
        "workers": 2,
        "marglik": SETTINGS["marglik"] | {"n_epochs": 4000},
    }
    path.write_text(yaml.safe_dump(long))
    command = [sys.executable, "-m", "laplace_ws", "train", "--config", str(path)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell has its background jobs ignore it
    )
    metrics = tmp_path / "long" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and {"tuned", "fixed-0.5"} <= runs_in(metrics)):
        time.sleep(0.2)
    assert {"tuned", "fixed-0.5"} <= runs_in(metrics)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"train --config {path} --resume" in err
    assert "fixed-100" not in runs_in(metrics)


def runs_in(metrics: Path) -> set[str]:
    lines = metrics.read_text().splitlines()
    return {json.loads(line)["run"] for line in lines if line.endswith("}")}
