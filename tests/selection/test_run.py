"""Comparisons from beginning to end: what they write, refuse, and go on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from scipy import stats

from laplace_ws.cli import main, parse
from laplace_ws.experiment import run as experiment
from laplace_ws.experiment.folder import ExperimentError
from laplace_ws.selection import Candidate, SelectConfig, jobs, load_selection, run_selection

SETTINGS = {
    "name": "tiny",
    "data": {"n_train": 60, "n_test": 40, "batch_size": 20},
    "model": {"name": "mlp"},
    "criteria": ["marglik", "train_log_likelihood", "fewest_weights"],
    "marglik": {
        "n_epochs": 3,
        "n_epochs_burnin": 1,
        "marglik_frequency": 1,
        "fit_fraction": 1.0,
        "n_hypersteps": 3,
        "lr": 0.01,
    },
    "candidates": [
        {"name": "wide", "model": {"hidden": [6]}},
        {"name": "linear", "model": {"hidden": []}},
        {"name": "tanh", "model": {"hidden": [4, 3], "activation": "tanh"}},
    ],
}


@pytest.fixture
def config(tmp_path) -> SelectConfig:
    return parsed(tmp_path)


def parsed(out: Path) -> SelectConfig:
    path = out / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"out": str(out)}))
    return parse(["select", f"--config={path}"])[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SelectConfig:
    config = parsed(tmp_path_factory.mktemp("out"))
    assert main(["select", "--config", f"{config.out}/tiny.yaml"]) == 0
    return config


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of the candidates that begin to train."""
    names: list[str] = []
    real = experiment.train_one

    def train_one(config, *args):
        names.append(config.name)
        return real(config, *args)

    monkeypatch.setattr(experiment, "train_one", train_one)
    return names


def interrupt(monkeypatch, candidate: str, epoch: int) -> None:
    """Have the training of a candidate interrupted after an epoch."""
    real = experiment.epoch_logger

    def logger(config, *args):
        log = real(config, *args)

        def logged(record):
            log(record)
            if config.name == candidate and record["epoch"] == epoch:
                raise KeyboardInterrupt

        return logged

    monkeypatch.setattr(experiment, "epoch_logger", logger)


def figures(config: SelectConfig) -> list[tuple]:
    ranking = load_selection(config.folder).ranking
    return [(e.name, e.n_weights, e.log_marginal_likelihood, e.test_nll, e.test_accuracy) for e in ranking]


# ------------------------------------------------------------------ what it writes


def test_candidates_are_ranked_by_what_their_runs_say(finished):
    selection = load_selection(finished.folder)
    assert [entry.log_marginal_likelihood for entry in selection.ranking] == sorted(
        (entry.log_marginal_likelihood for entry in selection.ranking), reverse=True
    )
    assert {entry.name for entry in selection.ranking} == {"wide", "linear", "tanh"}
    for entry in selection.ranking:
        summary = json.loads((finished.folder / entry.name / "summary.json").read_text())
        assert entry.log_marginal_likelihood == summary["tuned"]["log_marginal_likelihood"]
        assert entry.test_nll == summary["tuned"]["test_nll"]
        assert entry.test_accuracy == summary["tuned"]["test_accuracy"]
        assert entry.folder == (finished.folder / entry.name).as_posix()
    assert selection.data == {"name": "fashion-mnist-subset", "n_train": 60, "n_test": 40}
    assert selection.failed == {}


def test_the_numbers_of_weights(finished):
    found = {entry.name: entry.n_weights for entry in load_selection(finished.folder).ranking}
    assert found == {
        "wide": 784 * 6 + 6 + 6 * 10 + 10,
        "linear": 784 * 10 + 10,
        "tanh": 784 * 4 + 4 + 4 * 3 + 3 + 3 * 10 + 10,
    }
    architectures = {entry.name: entry.architecture for entry in load_selection(finished.folder).ranking}
    assert architectures["tanh"] == "mlp hidden=[4, 3] activation=tanh"


def test_the_correlations_are_those_of_the_values_per_example(finished):
    selection = load_selection(finished.folder)
    x, y = [selection.per_example(entry) for entry in selection.ranking], [e.test_nll for e in selection.ranking]
    assert selection.correlations["marglik"].n == 3
    assert selection.correlations["marglik"].pearson == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert selection.correlations["marglik"].spearman == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert selection.correlations["marglik"].kendall == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)


def test_a_candidate_is_the_network_that_train_gives(finished, tmp_path):
    arguments = ["--data.n_train=60", "--data.n_test=40", "--data.batch_size=20", "--model.name=mlp"]
    arguments += [f"--marglik.{key}={value}" for key, value in SETTINGS["marglik"].items()]
    arguments += ["--model.hidden=[6]", "--report=false", "--name=alone", f"--out={tmp_path}"]
    assert main(["train", *arguments]) == 0
    tuned = json.loads((tmp_path / "alone" / "summary.json").read_text())["tuned"]
    entry = next(e for e in load_selection(finished.folder).ranking if e.name == "wide")
    assert (entry.log_marginal_likelihood, entry.test_nll) == (tuned["log_marginal_likelihood"], tuned["test_nll"])


@pytest.mark.long
def test_side_by_side_equals_in_order(finished, config):
    selection = run_selection(replace(config, workers=2))
    assert selection.environment["workers"] == 2
    assert figures(config) == figures(finished)


def test_the_command_prints_the_ranking_and_writes_the_page(config, trained, capsys):
    assert main(["select", "--config", f"{config.out}/tiny.yaml"]) == 0
    out = capsys.readouterr().out
    assert trained == ["wide", "linear", "tanh"]
    assert [name for line in out.splitlines()[2:5] for name in line.split()[1:2]] == [row[0] for row in figures(config)]
    assert "Correlation with test NLL" in out
    assert f"report: {config.folder / 'select.html'}" in out
    assert "<img alt=" in (config.folder / "select.html").read_text()


# ------------------------------------------------------------------ finished runs


def test_a_finished_run_is_loaded_and_not_trained(finished, tmp_path, trained):
    loaded = Candidate("earlier", run=str(finished.folder / "wide"))
    config = replace(parsed(tmp_path), candidates=[Candidate("linear", {"hidden": []}), loaded])
    run_selection(config)
    assert trained == ["linear"]
    by_name = {row[0]: row[1:] for row in figures(finished)}
    assert {row[0]: row[1:] for row in figures(config)} == {
        "linear": by_name["linear"],
        "earlier": by_name["wide"],
    }


def test_finished_runs_alone_are_ranked_whatever_the_shared_settings(finished, tmp_path, trained):
    candidates = [Candidate(name, run=str(finished.folder / name)) for name in ("tanh", "wide", "linear")]
    config = SelectConfig(out=str(tmp_path), candidates=candidates, criteria=["marglik"])
    run_selection(config)
    assert trained == []
    assert figures(config) == figures(finished)


def test_a_run_on_other_data_is_refused_before_training(finished, config, trained):
    loaded = Candidate("earlier", run=str(finished.folder / "wide"))
    config = replace(config, data=replace(config.data, n_train=50), candidates=[*config.candidates, loaded])
    with pytest.raises(
        ExperimentError, match=r"'wide' and 'earlier' cannot be ranked together: data\.n_train is 50 and 60"
    ):
        run_selection(config)
    assert trained == []


def test_a_run_that_has_not_finished_is_refused(config, trained, tmp_path):
    config = replace(config, candidates=[*config.candidates, Candidate("earlier", run=str(tmp_path / "nowhere"))])
    with pytest.raises(ExperimentError, match="give the folder of a run that has finished"):
        run_selection(config)
    assert trained == []


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--candidates", "[]"], "candidates holds 0"),
        (["--candidates", '[{"name": "a"}, {"name": "b", "model": {"hiden": [3]}}]'], "did you mean 'hidden'?"),
        (["--candidates", '[{"name": "a"}, {"name": "b", "modle": {"hidden": [3]}}]'], "modle"),
        (
            ["--candidates", '[{"name": "a"}, {"name": "b", "model": {"activation": "relo"}}]'],
            "'b': unknown activation",
        ),
        (["--candidates", '[{"name": "a"}, {"name": "b", "model": {"depth": 10}}]'], "'b': unknown option of model"),
        (["--workers", "0"], "workers=0"),
        (["--marglik.tune_temperature", "true"], "tunes its temperature"),
        (["--marglik.lr", "0"], "candidate 'wide': marglik.lr=0"),
        (["--data.n_train", "99999"], "n_train=99999"),
        (["--baselines.fixed_prior_precisions", "[1]"], "unknown key 'baselines.fixed_prior_precisions'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(config, trained, arguments, says, capsys):
    assert main(["select", "--config", f"{config.out}/tiny.yaml", *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert trained == []
    assert not config.folder.exists()


def test_several_processes_are_refused(config, trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ExperimentError, match=r"2 processes were started, .*; start it once, with --workers 2"):
        run_selection(config)
    assert trained == []


def test_an_unwritable_folder_is_refused(config, trained, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExperimentError, match="Not a directory"):
        run_selection(replace(config, out=str(tmp_path / "file")))
    assert trained == []


# ------------------------------------------------------------------ what it goes on with


def test_an_interrupted_comparison_goes_on(config, finished, monkeypatch, trained, capsys):
    arguments = ["select", "--config", f"{config.out}/tiny.yaml"]
    with monkeypatch.context() as context:
        interrupt(context, "linear", 2)
        assert main(arguments) == 130
    assert "--resume" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "unfinished comparison; go on with it by --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--marglik.lr", "0.02"]) == 2
    assert "marglik.lr was 0.01 and is 0.02" in capsys.readouterr().err
    trained.clear()
    assert main([*arguments, "--resume"]) == 0
    assert trained == ["linear", "tanh"]
    assert figures(config) == figures(finished)


def test_a_further_candidate_is_trained_alone(config, trained):
    run_selection(replace(config, candidates=config.candidates[:2]))
    trained.clear()
    assert len(run_selection(config, resume=True).ranking) == 3
    assert trained == ["tanh"]


def test_a_finished_comparison_is_replaced_whole(config, trained):
    run_selection(config)
    before = figures(config)
    trained.clear()
    config = replace(config, marglik=replace(config.marglik, n_epochs=2))
    with pytest.raises(ExperimentError, match="holds a finished comparison"):
        run_selection(config)
    assert figures(config) == before
    run_selection(config, overwrite=True)
    assert not (config.folder / "run.partial").exists()
    assert trained == ["wide", "linear", "tanh"]
    assert figures(config) != before


def test_a_candidate_that_diverges_is_named_and_the_others_are_ranked(config, monkeypatch, capsys):
    real = jobs.run_experiment

    def run_experiment(run, *, resume):
        steep = (
            replace(run, marglik=replace(run.marglik, lr=1e38, prior_prec_init=1e-38)) if run.name == "tanh" else run
        )
        return real(steep, resume=resume)

    with monkeypatch.context() as context:
        context.setattr(jobs, "run_experiment", run_experiment)
        assert main(["select", "--config", f"{config.out}/tiny.yaml"]) == 1
    assert "not ranked: tanh: tuned: " in capsys.readouterr().out
    selection = load_selection(config.folder)
    assert {entry.name for entry in selection.ranking} == {"wide", "linear"}
    assert set(selection.failed) == {"tanh"}
    assert selection.correlations["marglik"].n == 2
    assert "Not ranked: tanh" in (config.folder / "select.html").read_text()
    assert len(run_selection(config, overwrite=True).ranking) == 3
