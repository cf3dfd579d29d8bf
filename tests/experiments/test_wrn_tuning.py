"""The study of tuned and fixed weight decays, at small size."""

import dataclasses
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from image_folders import image_folder
from wrn_tuning import command, measure, search
from wrn_tuning.config import StudyConfig, StudyError, check_study, rows_of, run_of, seeds_of
from wrn_tuning.measure import Figures, TuningSeconds, split_seconds
from wrn_tuning.search import Clock, Found, found_by, left_out
from wrn_tuning.table import as_markdown, picture

from laplace_ws import Laplace
from laplace_ws.data import load_dataset
from laplace_ws.experiment.lock import sole_writer
from laplace_ws.experiment.records import EpochRecord
from laplace_ws.experiment.run import run_experiment
from laplace_ws.options import Options

SMALL = {
    "data.n_train": 12, "data.n_test": 8, "data.batch_size": 6, "model.width": 1, "marglik.n_epochs": 3,
    "marglik.n_epochs_burnin": 2, "marglik.marglik_frequency": 1, "marglik.n_hypersteps": 3, "test_every": 3,
    "seeds": [0], "weight_decays": [1e-2], "search.budgets": [4], "search.n_validation": 4,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # nothing is learned from twelve images of noise


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    image_folder(root, n=8, side=8)
    return root


@pytest.fixture
def options(images, tmp_path) -> list[str]:
    places = {"data.root": images, "out": tmp_path}
    given = [text for key, value in {**SMALL, **places}.items() for text in (f"--{key}", str(value))]
    return ["--config", "configs/wrn_tuning.yaml", *given]


def run(monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["wrn_tuning.py", *options])
    command.main()


def config_of(options: list[str], **changes) -> StudyConfig:
    return dataclasses.replace(Options(StudyConfig).read(options), **changes)


# ------------------------------------------------------------------ the whole


@pytest.mark.long
def test_every_row_is_trained_once_and_reported(options, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    run(monkeypatch, *options, "--rows", "[optuna-4]")
    assert "optuna-4, seed 0: waits for reduce" in capsys.readouterr().out
    run(monkeypatch, *options, "--rows", "[reduce, wd-1e-02]")
    assert list(json.loads((tmp_path / "wrn_tuning.json").read_text())["rows"]) == ["reduce", "wd-1e-02"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("figures.json")}
    assert len(before) == 2
    run(monkeypatch, *options)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    found = json.loads((tmp_path / "wrn_tuning.json").read_text())["rows"]
    assert list(found) == ["reduce", "expand", "wd-1e-02", "optuna-4"]
    for name, (row,) in found.items():
        assert row["total_seconds"] == row["gradient_seconds"] + row["tuning_seconds"] + row["search_seconds"]
        assert (row["evidence_own"] == row["evidence_expand"]) == (name != "reduce")
        is_tuned = name in ("reduce", "expand")
        assert (row["n_tunings"], row["tuning"] is not None, row["weight_decay"] is None) == (
            2 * is_tuned, is_tuned, is_tuned
        )  # fmt: skip
    assert all(seconds > 0 for seconds in found["reduce"][0]["tuning"].values())
    searched = json.loads((tmp_path / "wrn_tuning" / "optuna-4-seed0" / "search.json").read_text())
    assert searched["seconds"] == found["optuna-4"][0]["search_seconds"]
    assert searched["seconds"] >= 4 * found["reduce"][0]["total_seconds"]
    assert searched["weight_decay"] == found["optuna-4"][0]["weight_decay"]
    printed = capsys.readouterr().out
    assert "CIFAR-10 (JPEG), 12 training images" in printed
    assert "| optuna-4 | 1 |" in printed
    assert (tmp_path / "wrn_tuning.svg").read_bytes().startswith(b"<svg")

    monkeypatch.setattr(command, "train_and_measure", None)
    run(monkeypatch, *options, "--report_only", "true", "--seeds", "[0, 1]")
    assert capsys.readouterr().out.count("| reduce | 1 |") == 1


def test_what_another_process_trains_is_left_to_it(options, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "wrn_tuning" / "wd-1e-02-seed0"
    folder.mkdir(parents=True)
    with sole_writer(folder):
        run(monkeypatch, *options, "--rows", "[wd-1e-02]")
    assert "wd-1e-02, seed 0: another process is at it" in capsys.readouterr().out
    assert not (folder / "figures.json").exists()


def test_evidences_are_those_of_the_kept_network_at_its_prior(options):
    config = config_of(options)
    row = rows_of(config)[0]
    figures = measure.train_and_measure(config, row, 0, None)
    training = run_of(config, row, 0, None)
    folder, result = run_experiment(training, resume=True)
    data = load_dataset("image-folder", root=config.data.root, n_train=12, n_test=8, seed=0)
    kept = measure.kept_by_training(folder / "checkpoint.pt", training, data)
    for approx, found in (("reduce", figures.evidence_own), ("expand", figures.evidence_expand)):
        la = Laplace(kept.model, "classification", kfac_approx=approx)
        la.prior_precision = torch.tensor(list(result.tuned.prior_precision.values()), dtype=torch.float64)
        la.fit([(data.x_train, data.y_train)])
        assert found == pytest.approx(la.log_marginal_likelihood().item(), rel=1e-5)


# ------------------------------------------------------------------ its parts


def test_an_epoch_that_tunes_has_the_gradient_steps_of_the_others():
    epochs = [EpochRecord(run="tuned", epoch=i + 1, cpu_seconds=s) for i, s in enumerate((2.0, 1.0, 3.0))]
    tuning = EpochRecord(run="tuned", epoch=4, cpu_seconds=7.0, log_marginal_likelihood=-1.0)
    assert split_seconds([*epochs, tuning]) == (8.0, 5.0)
    assert split_seconds(epochs) == (6.0, 0.0)


def test_runs_differ_in_what_the_row_says(options):
    config = config_of(options)
    reduce, expand, fixed, searched = rows_of(config)
    tuned = run_of(config, reduce, 0, None)
    assert (tuned.marglik.kfac_approx, tuned.marglik.n_hypersteps) == ("reduce", 3)
    assert run_of(config, expand, 0, None).marglik.kfac_approx == "expand"
    at_fixed = run_of(config, fixed, 0, fixed.weight_decay)
    assert (at_fixed.marglik.n_hypersteps, at_fixed.marglik.prior_prec_init) == (0, pytest.approx(0.12))
    assert dataclasses.replace(at_fixed, out=tuned.out, marglik=tuned.marglik) == tuned
    several = dataclasses.replace(config, seeds=[0, 1])
    assert (seeds_of(several, reduce), seeds_of(several, searched)) == ([0, 1], [0])


def test_a_search_trains_on_what_it_does_not_judge_by(options):
    config = config_of(options)
    data = load_dataset("image-folder", root=config.data.root, n_train=12, n_test=8)
    fit, (x, y) = left_out(config, data, 0)
    assert (len(fit.y_train), len(y), y.bincount().tolist()) == (8, 4, [2, 2])
    both = torch.cat([fit.x_train, x]).flatten(1)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, data.x_train.flatten(1).tolist()))
    trial = search.trial_run(config, rows_of(config)[-1], 0, 1e-2, len(fit.y_train))
    assert trial.marglik.prior_prec_init == pytest.approx(0.08)


def test_the_clock_leaves_out_what_it_is_set_back_by(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    clock = Clock(10.0)
    now[0] += 6.0
    spent = clock.spent
    now[0] += 5.0
    assert (spent, clock.is_over) == (6.0, True)
    clock.back_to(spent)
    assert (clock.spent, clock.is_over) == (6.0, False)


def trial(state: str, decay: float, value: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(state=state, value=value, params={"weight_decay": decay})


def test_only_trials_that_ended_are_chosen_from():
    states = SimpleNamespace(COMPLETE="complete")
    study = SimpleNamespace(
        trials=[trial("complete", 1e-3, 0.9), trial("complete", 1e-2, 0.8), trial("pruned", 1e-1, 0.1)]
    )
    expected = Found(weight_decay=1e-2, validation_nll=0.8, seconds=5.0, n_complete=2, n_pruned=1)
    assert found_by(study, states, 5.0) == expected
    with pytest.raises(StudyError, match=r"^no trial ended within 5 s of CPU time; raise search\.budgets$"):
        found_by(SimpleNamespace(trials=study.trials[2:]), states, 5.0)


def test_without_optuna_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(StudyError, match=r"^optuna, which searches, is not installed; pip install '\.\[experiments\]'"):
        search.load_optuna()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "[reduc]"], "unknown row 'reduc'; did you mean 'reduce'?"),
        (["--device", "cuda"], "device=cuda, but the study compares CPU times; use device=cpu"),
        (["--data.n_train", "null"], "data.n_train is missing; give the number of training images"),
        (["--search.lowest", "1"], "search.lowest=1.0 must be positive and below search.highest=0.05"),
        (["--search.n_validation", "12"], "search.n_validation=12 must be positive and below data.n_train=12"),
        (["--weight_decays", "[0]"], "weight_decays must be positive: [0.0]"),
        (
            ["--weight_decays", "[1e-3, 1.1e-3]"],
            "two rows have one name, 'wd-1e-03'; give weight_decays and search.budgets",
        ),
        (["--marglik.n_epochs_burnin", "1"], "every epoch tunes, so that none has the time of gradient steps alone"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(options, arguments, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *options, *arguments)
    assert str(ended.value).startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def figures(row: str, seed: int, nll: float, **own) -> Figures:
    scores = {"test_nll": nll, "test_accuracy": 0.5, "test_ece": 0.1, "evidence_expand": -10.0, "evidence_own": -9.0}
    times = {"gradient_seconds": 60.0, "tuning_seconds": 30.0}
    return Figures(row=row, seed=seed, best_epoch=3, n_tunings=2, **scores, **{**times, **own})


def test_the_table_has_means_and_standard_errors(options):
    config = config_of(options)
    tuning = TuningSeconds(fit=2.0, eigenvalues=1.0, hypersteps=0.5)
    table = {
        "reduce": [figures("reduce", seed, nll, tuning=tuning) for seed, nll in ((0, 1.0), (1, 2.0))],
        "wd-1e-02": [figures("wd-1e-02", 0, 1.5, weight_decay=1e-2, tuning_seconds=0.0)],
    }
    lines = as_markdown(config, table).splitlines()
    assert lines[4].startswith(
        "| reduce | 2 | – | 1.500 ± 0.500 | 50.0 ± 0.0 | 10.0 ± 0.0 | -10 ± 0 | -9 ± 0 | 1.0 ± 0.0 | 0.5"
    )
    assert lines[5].startswith("| wd-1e-02 | 1 | 0.010000 | 1.500 |")
    assert lines[-1] == "| reduce | 2.00 ± 0.00 | 1.00 ± 0.00 | 0.50 ± 0.00 |"
    assert picture(config, table) != picture(config, {"reduce": table["reduce"]})


def test_the_configuration_has_a_geometric_grid_about_5e4():
    config = Options(StudyConfig).read(["--config", "configs/wrn_tuning.yaml"])
    check_study(config)
    decays = torch.tensor(config.weight_decays).log10()
    assert len(decays) == 8
    torch.testing.assert_close(decays.diff(), torch.full((7,), 0.5), atol=0.01, rtol=0)
    assert 5e-4 in config.weight_decays
