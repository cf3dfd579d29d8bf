"""The configuration of a comparison: what a candidate changes, and what cannot be ranked."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest

from laplace_ws.cli import parse
from laplace_ws.experiment.config import (
    DataConfig,
    ExperimentError,
    MarglikConfig,
    ModelConfig,
    RunConfig,
    read_config,
)
from laplace_ws.selection import Candidate, SelectConfig
from laplace_ws.selection.comparable import check_comparable, yardstick
from laplace_ws.selection.config import changed_model, check_candidates


def test_a_comparison_has_the_settings_of_a_run_and_their_defaults():
    run, own = {f.name: f for f in fields(RunConfig)}, {f.name: f for f in fields(SelectConfig)}
    assert set(own) == set(run) - {"baselines"} | {"candidates", "criteria", "rank_by", "part"}
    for name in set(own) & set(run) - {"name"}:
        assert (own[name].default, own[name].default_factory) == (run[name].default, run[name].default_factory)


def test_a_candidate_changes_entries_of_the_shared_model():
    shared = ModelConfig("mlp", hidden=[7], activation="tanh")
    assert changed_model(shared, Candidate("a", {"hidden": [3, 3]})) == ModelConfig(
        "mlp", hidden=[3, 3], activation="tanh"
    )
    assert changed_model(shared, Candidate("a")) == shared
    assert changed_model(shared, Candidate("a", {"activation": None})) == ModelConfig("mlp", hidden=[7])


def test_another_kind_of_model_starts_from_its_own_defaults():
    shared = ModelConfig("mlp", hidden=[7], activation="tanh")
    assert changed_model(shared, Candidate("a", {"name": "lenet"})) == ModelConfig("lenet")
    assert changed_model(shared, Candidate("a", {"name": "mlp"})) == shared


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hiden": [3]}, "candidate 'a', model: unknown key 'hiden'; did you mean 'hidden'?"),
        ({"hidden": "many"}, "hidden"),
        ({"norm": "btch"}, "norm"),
    ],
)
def test_a_change_that_no_model_knows_is_refused(changes, says):
    with pytest.raises(ExperimentError, match="candidate 'a', model") as caught:
        changed_model(ModelConfig(), Candidate("a", changes))
    assert says in str(caught.value)


def test_the_run_of_a_candidate():
    config = SelectConfig("s", "out", seed=3, workers=4, data=DataConfig(n_train=9), marglik=MarglikConfig(lr=0.5))
    run = config.run_config(Candidate("a", {"width": 2}))
    assert (run.name, run.out, run.seed, run.workers, run.report) == ("a", "out/s", 3, 1, False)
    assert run.data.n_train == 9
    assert run.marglik.lr == 0.5
    assert run.model == ModelConfig(width=2)
    assert run.baselines.fixed_prior_precisions == []


@pytest.mark.parametrize(
    ("candidates", "says"),
    [
        ([], "holds 0"),
        ([Candidate("a")], "holds 1"),
        ([Candidate("a"), Candidate("b"), Candidate("a")], "'a' is given twice"),
        ([Candidate("a"), Candidate("b/c")], "'b/c' cannot be a folder's name"),
        ([Candidate("a"), Candidate("..")], "'..' cannot be a folder's name"),
        ([Candidate("a"), Candidate("b", {"width": 2}, run="runs/b")], "'b' has a run and changes to a model"),
    ],
)
def test_lists_that_cannot_be_ranked_are_refused(candidates, says):
    with pytest.raises(ExperimentError, match=says):
        check_candidates(candidates)


def test_the_settings_of_a_run_are_read_back_whole():
    run = RunConfig(
        "a", data=DataConfig(n_train=9), model=ModelConfig("mlp", hidden=[2]), marglik=MarglikConfig(lr=1.0)
    )
    assert read_config(asdict(run)) == run
    with pytest.raises(ExperimentError, match="the run's configuration cannot be read"):
        read_config(asdict(run) | {"colour": "red"})
    with pytest.raises(ExperimentError, match="the run's configuration cannot be read"):
        read_config({key: value for key, value in asdict(run).items() if key != "marglik"})


# ------------------------------------------------------------------ what is on one scale


def check(first: RunConfig, second: RunConfig, *n: int) -> None:
    n_train, n_train_of_second = n or (10, 10)
    yardsticks = {"a": yardstick(first, n_train, 5), "b": yardstick(second, n_train_of_second, 5)}
    check_comparable(yardsticks, {"a": first, "b": second})


@pytest.mark.parametrize(
    ("second", "key"),
    [
        (RunConfig(data=DataConfig(name="mnist")), "data.name"),
        (RunConfig(data=DataConfig(augment=True)), "data.augment"),
        (RunConfig(data=DataConfig(held_out=True)), "data.held_out"),
        (RunConfig(marglik=MarglikConfig(temperature_init=2.0)), "marglik.temperature_init"),
        (RunConfig(marglik=MarglikConfig(hessian_structure="diag")), "marglik.hessian_structure"),
        (RunConfig(marglik=MarglikConfig(max_factor_dim=64)), "marglik.max_factor_dim"),
        (RunConfig(marglik=MarglikConfig(final_kfac_approx="expand")), "the last fit's kfac_approx"),
        (RunConfig(marglik=MarglikConfig(final_curvature="ggn")), "the last fit's curvature"),
        (RunConfig(marglik=MarglikConfig(mc_samples=2)), "marglik.mc_samples"),
    ],
)
def test_runs_on_another_scale_are_not_ranked_together(second, key):
    with pytest.raises(ExperimentError, match=f"'a' and 'b' cannot be ranked together: {key} is"):
        check(RunConfig(), second)
    check(second, second)


def test_other_numbers_of_images_are_not_ranked_together():
    with pytest.raises(ExperimentError, match=r"data\.n_train is 10 and 11"):
        check(RunConfig(), RunConfig(), 10, 11)


def test_the_seed_counts_where_it_chooses_the_images():
    check(RunConfig(seed=0), RunConfig(seed=1))
    subset = DataConfig(n_train=10)
    with pytest.raises(ExperimentError, match="seed"):
        check(RunConfig(seed=0, data=subset), RunConfig(seed=1, data=subset))
    of_seed_0 = DataConfig(n_train=10, seed=0)
    check(RunConfig(seed=0, data=subset), RunConfig(seed=1, data=of_seed_0))
    check(RunConfig(data=DataConfig(n_train=10)), RunConfig(data=DataConfig(n_train=10, batch_size=3)))


def test_folders_of_images_are_told_apart_by_their_place():
    first, second = (RunConfig(data=DataConfig(name="image-folder", root=root)) for root in ("a", "b"))
    with pytest.raises(ExperimentError, match=r"data\.root"):
        check(first, second)


def test_what_changes_no_number_does_not_count():
    check(
        RunConfig(), RunConfig(model=ModelConfig("mlp"), marglik=MarglikConfig(backend="asdl", n_epochs=3), threads=2)
    )
    exact = MarglikConfig(final_curvature="ggn")
    check(RunConfig(marglik=exact), RunConfig(marglik=MarglikConfig(curvature="ggn", mc_samples=4)))


def test_tuned_temperatures_are_refused():
    run = RunConfig(marglik=MarglikConfig(tune_temperature=True))
    with pytest.raises(ExperimentError, match="'a' tunes its temperature"):
        check(run, run)


# ------------------------------------------------------------------ the command line


def test_the_example_is_valid():
    _, config, flags = parse(["select", "--config=select"])
    assert not flags["resume"]
    check_candidates(config.candidates)
    runs = {candidate.name: config.run_config(candidate) for candidate in config.candidates}
    assert len(runs) >= 8
    check_comparable({name: yardstick(run, 1000, 1000) for name, run in runs.items()}, runs)
    assert len({str(run.model) for run in runs.values()}) == len(runs)


def test_candidates_can_be_given_on_the_command_line():
    _, config, flags = parse(
        ["select", "--candidates", '[{"name": "a", "model": {"width": 2}}, {"name": "b", "run": "runs/b"}]', "--resume",
         "--model.depth", "16"]
    )  # fmt: skip
    assert flags["resume"]
    assert config.candidates == [Candidate("a", {"width": 2}), Candidate("b", run="runs/b")]
    assert config.run_config(config.candidates[0]).model == ModelConfig(depth=16, width=2)


def test_the_first_criterion_ranks_where_none_is_named():
    assert SelectConfig().ranked_by == "validation_log_likelihood"
    assert SelectConfig(criteria=["marglik", "fewest_weights"]).ranked_by == "marglik"
    assert SelectConfig(criteria=["marglik", "fewest_weights"], rank_by="fewest_weights").ranked_by == "fewest_weights"
