"""What a run may write into a folder: nothing that is there is lost, whatever is asked for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from calibration.tiny import tiny_config

from laplace_ws.experiment import folder as run_folder
from laplace_ws.experiment.folder import ExperimentError, check_name
from laplace_ws.experiment.lock import FolderInUseError, sole_writer
from laplace_ws.experiment.records import read_run
from laplace_ws.experiment.run import run_experiment


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path)


@pytest.fixture
def finished(config):
    folder, _ = run_experiment(config)
    return folder


# ------------------------------------------------------------------ what is refused, and leaves all as it was


@pytest.mark.many(2)
@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("data", "batch_size", 0),
        ("data", "n_train", 0),
        ("data", "name", "mnits"),
        ("model", "hidden", [0]),
        ("model", "name", "resnet"),
        ("marglik", "momentum", -1.0),
        ("marglik", "lr", -0.1),
        ("marglik", "mc_samples", 0),
        ("marglik", "n_epochs", 0),
        ("marglik", "max_log_step", 0.0),
        ("marglik", "lr_hyp", -1.0),
        ("marglik", "prior_prec_init", -1.0),
        ("baselines", "fixed_prior_precisions", [-1.0]),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_invalid_option_leaves_a_finished_run_alone(config, finished, section, option, value, overwrite):
    before = contents(finished)
    invalid = replace(config, **{section: replace(getattr(config, section), **{option: value})})
    with pytest.raises(ValueError, match=r"."):
        run_experiment(invalid, overwrite=overwrite)
    assert contents(finished) == before


def test_a_finished_run_is_refused(config, finished):
    before = contents(finished)
    with pytest.raises(ExperimentError, match=r"holds a finished run; choose another --name, or .* --overwrite"):
        run_experiment(config)
    assert contents(finished) == before


def test_a_finished_run_is_returned_by_resume(config, finished):
    before = contents(finished)
    folder, result = run_experiment(config, resume=True)
    assert (folder, result) == (finished, read_run(finished))
    with pytest.raises(ExperimentError, match=r"marglik\.lr was 0\.03 and is 0\.5"):
        run_experiment(replace(config, marglik=replace(config.marglik, lr=0.5)), resume=True)
    assert contents(finished) == before


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", "summary.json", "report.html", "config.json"])
def test_a_file_of_somebody_else_is_in_the_way(config, tmp_path, name):
    foreign = config.folder / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text('{"hidden_size": 768}')
    with pytest.raises(ExperimentError, match=name):
        run_experiment(config, overwrite=True)
    assert contents(config.folder) == {name: b'{"hidden_size": 768}'}


def test_other_files_stay_where_a_run_is_replaced(config, finished):
    (finished / "checkpoint_best.pt").write_text("mine")
    (finished / "notes").mkdir()
    (finished / "notes" / "day.txt").write_text("mine")
    run_experiment(replace(config, seed=1), overwrite=True)
    assert (finished / "checkpoint_best.pt").read_text() == "mine"
    assert (finished / "notes" / "day.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../up", "a/../../b", "/absolute", "nul\0", " padded"])
def test_names_that_lead_out_are_refused(name, config):
    with pytest.raises(ExperimentError, match="does not name a folder of its own"):
        check_name(name)
    with pytest.raises(ExperimentError, match="does not name a folder of its own"):
        run_experiment(replace(config, name=name))
    assert not Path(config.out).exists() or not list(Path(config.out).iterdir())


def test_a_name_in_a_group(config):
    folder, _ = run_experiment(replace(config, name="group/run"))
    assert folder == Path(config.out) / "group" / "run"


# ------------------------------------------------------------------ a run beside the one that it replaces


def test_the_old_run_is_whole_until_the_new_one_has_finished(config, finished, monkeypatch):
    before, other = contents(finished), replace(config, seed=1)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("laplace_ws.experiment.run.model_result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(other, overwrite=True)
    assert {n: b for n, b in contents(finished).items() if not n.startswith("run.partial/")} == before
    for overwrite in (False, True):
        with pytest.raises(ExperimentError, match="unfinished run that is to replace"):
            run_experiment(other, overwrite=overwrite)
    run_experiment(other, resume=True)
    assert read_run(finished).config["seed"] == 1
    assert not (finished / "run.partial").exists()


def test_a_replacement_without_a_checkpoint_is_resumed_and_not_taken_for_the_old_run(config, finished, monkeypatch):
    before = read_run(finished)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("laplace_ws.experiment.run.marglik_training", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(config, overwrite=True)
    _, result = run_experiment(config, resume=True)
    assert result.total_seconds != before.total_seconds  # it trained anew
    assert read_run(finished) == result
    assert not (finished / "run.partial").exists()


@pytest.mark.parametrize("cut_at", range(1, 9))
def test_a_replacement_that_is_cut_off_is_completed(config, finished, monkeypatch, cut_at):
    """At each step: no folder that looks finished holds files of both, and the next call completes it."""
    real, n = run_folder.os.replace, 0
    baselines = replace(config.baselines, fixed_prior_precisions=[3.0])
    other = replace(config, seed=1, baselines=baselines)

    def cut_off(source, target):
        nonlocal n
        is_step = Path(source).parent.name == "run.partial" or Path(target).parent.name == "replaced"
        if is_step and not str(source).endswith(".partial"):
            n += 1
            if n == cut_at:
                raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as context:
        context.setattr(run_folder.os, "replace", cut_off)
        try:
            run_experiment(other, overwrite=True)
        except KeyboardInterrupt:
            assert (finished / "run.partial" / "summary.json").exists()
            seeds = {json.loads((finished / n).read_text())["seed"] for n in ["config.json"] if (finished / n).exists()}
            if (finished / "summary.json").exists():
                assert seeds == {read_run(finished).config["seed"]}
        else:
            assert cut_at > 7  # as many steps as there are
    _, result = run_experiment(other, resume=True)
    assert result.config["seed"] == 1
    assert not (finished / "run.partial").exists()
    assert sorted(contents(finished)) == [
        "checkpoint-fixed-3.pt", "checkpoint.pt", "config.json", "metrics.jsonl", "summary.json"
    ]  # fmt: skip


def test_checkpoints_of_the_old_run_alone_go(config):
    run_experiment(replace(config, baselines=replace(config.baselines, fixed_prior_precisions=[7.0])))
    assert (config.folder / "checkpoint-fixed-7.pt").exists()
    run_experiment(config, overwrite=True)
    assert not (config.folder / "checkpoint-fixed-7.pt").exists()


# ------------------------------------------------------------------ one writer


def test_a_second_writer_is_refused(config, finished):
    before = contents(finished)
    with sole_writer(finished):
        for resume, overwrite in [(False, False), (True, False), (False, True)]:
            with pytest.raises(FolderInUseError, match=r"process \d+ on .* is writing into"):
                run_experiment(config, resume=resume, overwrite=overwrite)
    assert contents(finished) == before


def test_a_lock_that_a_dead_process_left_is_taken_over(tmp_path, capsys):
    (tmp_path / ".lock").write_text('{"pid": 12345, "host": "elsewhere"}')
    with sole_writer(tmp_path):
        pass
    assert "process 12345 on elsewhere ended before it was done" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
