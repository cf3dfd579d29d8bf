"""The criteria of trained networks: against their definitions, and kept, resumed and replaced with the comparison."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from laplace_ws import Laplace
from laplace_ws.cli import main, parse
from laplace_ws.data import ImageData, TensorLoader
from laplace_ws.experiment.folder import ExperimentError
from laplace_ws.experiment.run import load_data, make_model, train_one
from laplace_ws.marglik.checkpoint import load_training
from laplace_ws.marglik.schedule import TrainingDiverged
from laplace_ws.posterior import prior_groups
from laplace_ws.selection import (
    CRITERIA,
    Candidate,
    Criterion,
    SelectConfig,
    Selection,
    load_selection,
    networks,
    run_selection,
)
from laplace_ws.selection.conditional import log_joint_predictive
from laplace_ws.selection.config import CRITERIA_FOLDER, check_candidates
from laplace_ws.selection.networks import TUNED, Networks, Split
from laplace_ws.selection.scores import SCORES, read_scores

CHOSEN = [
    "marglik",
    "marglik_reduce",
    "marglik_expand_retuned",
    "marglik_diag",
    "marglik_expand_mc",
    "conditional_joint",
    "conditional_marginals",
    "conditional_difference",
    "train_log_likelihood",
    "validation_log_likelihood",
    "fewest_weights",
]
SETTINGS = {
    "name": "tiny",
    "data": {"n_train": 50, "n_test": 40, "batch_size": 20},
    "model": {"name": "mlp"},
    "marglik": {
        "n_epochs": 2,
        "n_epochs_burnin": 2,
        "n_hypersteps": 3,
        "lr": 0.01,
        "curvature": "ggn_mc",
        "final_curvature": "ggn",
        "kfac_approx": "reduce",
    },
    "criteria": ["marglik", "validation_log_likelihood"],
    "rank_by": "validation_log_likelihood",
    "report": False,
    "candidates": [{"name": "wide", "model": {"hidden": [6]}}, {"name": "linear", "model": {"hidden": []}}],
}


def parsed(out: Path) -> SelectConfig:
    path = out / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"out": str(out)}))
    return parse(["select", f"--config={path}"])[1]


@pytest.fixture
def config(tmp_path) -> SelectConfig:
    return parsed(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SelectConfig:
    config = replace(parsed(tmp_path_factory.mktemp("out")), criteria=CHOSEN)
    run_selection(config)
    return config


@pytest.fixture
def on_part(monkeypatch) -> list[Path]:
    """Folders of the networks that are trained on a part."""
    folders: list[Path] = []
    real = networks.train_one

    def train_one(run, task, folder, *args):
        folders.append(folder)
        return real(run, task, folder, *args)

    monkeypatch.setattr(networks, "train_one", train_one)
    return folders


def values(selection: Selection) -> dict[tuple[str, str], float | None]:
    """By candidate and criterion."""
    return {(e.name, criterion): score.value for e in selection.ranking for criterion, score in e.scores.items()}


def halves(data: ImageData) -> tuple[ImageData, torch.Tensor, torch.Tensor]:
    """The data of the part, and the rest."""
    split = Split(0.8, 0).of(data)
    return split, split.x_test, split.y_test


# ------------------------------------------------------------------ what they are


def test_the_criterion_that_is_named_ranks(finished):
    selection = load_selection(finished.folder)
    scores = [entry.scores["validation_log_likelihood"].value for entry in selection.ranking]
    assert scores == sorted(scores, reverse=True)
    assert list(selection.correlations) == CHOSEN
    assert selection.rank_by == "validation_log_likelihood"
    assert all(set(entry.scores) == set(CHOSEN) for entry in selection.ranking)


@pytest.fixture(scope="module")
def by_hand(finished) -> dict[str, float]:
    """The criteria of a candidate from its files, by their definitions."""
    run = finished.run_config(finished.candidates[0])
    data = load_data(run)
    state = load_training(finished.folder / "wide" / "checkpoint.pt")
    model = make_model(run, data)
    model.load_state_dict(state["model"])
    evidence = json.loads((finished.folder / "wide" / "summary.json").read_text())["tuned"]["log_marginal_likelihood"]
    names = {name: p.shape for name, p in model.named_parameters()}
    delta = prior_groups(names, "layerwise").spread(state["hyper"]["log_prior_precision"].exp())
    loader = TensorLoader(data.x_train, data.y_train, batch_size=50)

    def posterior(on: torch.nn.Module, batches: TensorLoader, prior: torch.Tensor, **options: str) -> Laplace:
        la = Laplace(on, "classification", prior_precision=prior, **options)
        la.fit(batches)
        return la

    part, x, y = halves(data)
    folder = finished.folder / "by-hand"
    folder.mkdir()
    result, _ = train_one(run, TUNED, folder, False, False, part)
    on_part = make_model(run, data)
    kept = load_training(folder / "checkpoint.pt")
    on_part.load_state_dict(kept["model"])
    prior = prior_groups(names, "layerwise").spread(kept["hyper"]["log_prior_precision"].exp())
    la = posterior(on_part, TensorLoader(part.x_train, part.y_train, batch_size=50), prior, kfac_approx="expand")
    retuned = posterior(model, loader, delta, kfac_approx="expand")
    retuned.optimize_prior_precision("marglik", prior_structure="layerwise")
    f, covariance = la.functional_moments(x, joint=True)
    with torch.no_grad():
        f_train, f_rest = model(data.x_train), on_part(x)
    return {
        "marglik": evidence / 50,
        "marglik_reduce": posterior(model, loader, delta, kfac_approx="reduce").log_marginal_likelihood().item() / 50,
        "marglik_expand_retuned": retuned.log_marginal_likelihood().item() / 50,
        "marglik_diag": posterior(model, loader, delta, hessian_structure="diag").log_marginal_likelihood().item() / 50,
        "conditional_joint": log_joint_predictive(la.likelihood, f.reshape(10, 10), covariance, y) / 10,
        "conditional_marginals": la(x)[range(10), y].log().mean().item(),
        "conditional_difference": (evidence - result.log_marginal_likelihood) / 10,
        "train_log_likelihood": -F.cross_entropy(f_train, data.y_train).item(),
        "validation_log_likelihood": -F.cross_entropy(f_rest, y).item(),
        "fewest_weights": -float(sum(p.numel() for p in model.parameters())),
    }


@pytest.mark.parametrize("criterion", sorted(set(CHOSEN) - {"marglik_expand_mc"}))
def test_criteria_are_their_definitions(criterion, finished, by_hand):
    assert values(load_selection(finished.folder))["wide", criterion] == pytest.approx(by_hand[criterion], rel=1e-4)


def test_the_training_s_own_evidence_is_that_of_its_structure_and_prior(finished):
    found = values(load_selection(finished.folder))
    for name in ("wide", "linear"):
        assert found[name, "marglik"] == pytest.approx(found[name, "marglik_reduce"], rel=1e-4)
        assert found[name, "marglik"] < found[name, "marglik_expand_retuned"]
        assert found[name, "marglik_expand_mc"] not in (found[name, "marglik"], None)


def test_part_and_rest_are_balanced_and_all_of_the_images(finished):
    data = load_data(finished.run_config(finished.candidates[0]))
    part, x, y = halves(data)
    assert torch.bincount(part.y_train).tolist() == [4] * 10
    assert torch.bincount(y).tolist() == [1] * 10
    together = torch.cat([part.x_train, x]).flatten(1).sum(1).sort().values
    assert torch.equal(together, data.x_train.flatten(1).sum(1).sort().values)
    assert not torch.equal(Split(0.8, 1).of(data).x_test, x)


def test_what_needs_the_part_costs_its_training(finished):
    for entry in load_selection(finished.folder).ranking:
        seconds = {name: score.seconds for name, score in entry.scores.items()}
        of_part = [seconds[name] for name in CHOSEN if CRITERIA[name].needs_part]
        others = [seconds[name] for name in ("marglik", "train_log_likelihood", "fewest_weights")]
        assert min(of_part) > max(others)


def test_a_network_too_large_for_the_full_curvature_has_none_of_it(config, monkeypatch):
    small = replace(CRITERIA["marglik_full"], most_weights=4_000, value=lambda networks: 1.0)
    monkeypatch.setitem(CRITERIA._members, "marglik_full", small)
    candidates = [Candidate("small", {"hidden": [4]}), Candidate("large", {"hidden": [6]})]
    config = replace(config, candidates=candidates, criteria=["marglik", "marglik_full"], rank_by="marglik")
    found = values(run_selection(config))
    assert (found["small", "marglik_full"], found["large", "marglik_full"]) == (1.0, None)
    with pytest.raises(
        ExperimentError, match="'large' has 4,780 weights and so no marglik_full, which takes at most 4,000"
    ):
        run_selection(replace(config, rank_by="marglik_full"), overwrite=True)


def test_a_criterion_of_one_s_own(config):
    CRITERIA.register("size", Criterion("size", lambda networks: float(networks.n_weights), unit=""))
    try:
        selection = run_selection(replace(config, criteria=["size"], rank_by="size"))
    finally:
        CRITERIA.unregister("size")
    assert [entry.name for entry in selection.ranking] == ["linear", "wide"]


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"criteria": ["marglik", "evidence"]}, "unknown criterion 'evidence'"),
        ({"criteria": []}, "criteria is empty"),
        ({"criteria": ["marglik", "marglik"], "rank_by": "marglik"}, "names one twice: marglik, marglik"),
        ({"rank_by": "marglik_full"}, "rank_by=marglik_full is none of the criteria"),
        ({"part": 1.0}, "part=1 must be above 0 and below 1"),
        ({"part": 0.999}, "part=0.999 of 50 training images leaves none to train on or none to predict"),
    ],
)
def test_criteria_that_cannot_be_are_refused_before_the_work(config, changes, says, on_part):
    with pytest.raises(ExperimentError, match=says):
        run_selection(replace(config, **changes))
    assert not config.folder.exists()


def test_a_prior_for_each_weight_does_not_go_with_kronecker_factors(config):
    marglik = replace(config.marglik, hessian_structure="diag", prior_structure="weight", kfac_approx="auto")
    config = replace(config, marglik=marglik, criteria=CHOSEN)
    with pytest.raises(ExperimentError, match="which the kron posterior of marglik_reduce does not take"):
        run_selection(config)
    found = run_selection(replace(config, criteria=["marglik", "marglik_diag"], rank_by="marglik"))
    for entry in found.ranking:
        assert entry.scores["marglik"].value == pytest.approx(entry.scores["marglik_diag"].value, rel=1e-4)


def test_the_folder_of_the_criteria_is_no_name_of_a_candidate():
    with pytest.raises(ExperimentError, match="cannot be a folder's name"):
        check_candidates([Candidate("a"), Candidate(CRITERIA_FOLDER)])


# ------------------------------------------------------------------ what is kept


def test_an_interruption_on_the_part_loses_no_candidate(config, finished, monkeypatch, on_part):
    real = networks.train_one

    def interrupted(run, task, folder, *args):
        if run.name == "linear":
            raise KeyboardInterrupt
        return real(run, task, folder, *args)

    with monkeypatch.context() as context:
        context.setattr(networks, "train_one", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_selection(config)
    on_part.clear()
    found, known = values(run_selection(config, resume=True)), values(load_selection(finished.folder))
    assert found == {key: known[key] for key in found}
    assert [folder.name for folder in on_part] == ["linear"]


def test_what_is_known_is_not_computed_again(config, on_part):
    first = run_selection(config)
    assert len(on_part) == 2
    again = run_selection(replace(config, criteria=["validation_log_likelihood", "marglik"]), resume=True)
    assert len(on_part) == 2
    assert values(again) == values(first)
    more = run_selection(replace(config, criteria=["validation_log_likelihood", "conditional_marginals"]), resume=True)
    assert len(on_part) == 4  # it goes on from its checkpoint, which is at the end
    assert {key: value for key, value in values(more).items() if key in values(first)}.items() <= values(first).items()
    assert set(read_scores(config.folder / CRITERIA_FOLDER / "wide").scores) == {
        "marglik",
        "validation_log_likelihood",
        "conditional_marginals",
    }


def test_another_part_is_computed_anew(config, on_part):
    first = run_selection(config)
    on_part.clear()
    other = run_selection(replace(config, part=0.6), resume=True)
    assert len(on_part) == 2
    assert values(other)["wide", "validation_log_likelihood"] != values(first)["wide", "validation_log_likelihood"]
    assert values(other)["wide", "marglik"] == values(first)["wide", "marglik"]


def test_the_criteria_are_replaced_with_the_comparison(config):
    run_selection(config)
    shorter = replace(config, marglik=replace(config.marglik, n_epochs=1, n_epochs_burnin=1))
    replaced = run_selection(shorter, overwrite=True)
    assert not (config.folder / "run.partial").exists()
    for name in ("wide", "linear"):
        kept = read_scores(config.folder / CRITERIA_FOLDER / name)
        assert kept.basis["run"]["marglik"]["n_epochs"] == 1
        assert kept.scores["validation_log_likelihood"].value == values(replaced)[name, "validation_log_likelihood"]


def test_a_loaded_run_is_left_as_it_is(finished, tmp_path):
    folder = finished.folder / "wide"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    candidates = [Candidate("linear", {"hidden": []}), Candidate("earlier", run=str(folder))]
    found = values(run_selection(replace(parsed(tmp_path), candidates=candidates)))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    known = values(load_selection(finished.folder))
    for criterion in ("marglik", "validation_log_likelihood"):
        assert found["earlier", criterion] == known["wide", criterion]


def test_a_network_that_diverges_on_the_part_is_not_ranked(config, monkeypatch, capsys):
    real = networks.train_one

    def train_one(run, *args):
        if run.name == "wide":
            raise TrainingDiverged("tuned: the loss became NaN", 1, None)
        return real(run, *args)

    monkeypatch.setattr(networks, "train_one", train_one)
    assert main(["select", "--config", f"{config.out}/tiny.yaml"]) == 1
    assert "not ranked: wide: on a part of the images: tuned: the loss became NaN" in capsys.readouterr().out
    assert [entry.name for entry in load_selection(config.folder).ranking] == ["linear"]


def test_a_value_that_is_not_finite_does_not_rank(config):
    CRITERIA.register("odd", Criterion("oddity", lambda networks: math.nan if networks.run.name == "wide" else 1.0))
    try:
        selection = run_selection(replace(config, criteria=["marglik", "odd"], rank_by="odd"))
    finally:
        CRITERIA.unregister("odd")
    assert selection.failed == {"wide": "its oddity is not finite"}
    assert [entry.name for entry in selection.ranking] == ["linear"]


def test_damaged_scores_are_named(config):
    run_selection(replace(config, criteria=["marglik"], rank_by="marglik"))
    (config.folder / CRITERIA_FOLDER / "wide" / SCORES).write_text("{")
    with pytest.raises(ValueError, match=r"scores\.json is not valid JSON .*; remove its folder and compare anew"):
        run_selection(replace(config, criteria=["marglik"], rank_by="marglik"), resume=True)


def test_what_criteria_share_counts_for_each_of_them(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(networks.time, "perf_counter", lambda: clock[0])
    of = Networks(*[None] * 6)  # type: ignore[arg-type]

    def works(seconds: float) -> float:
        clock[0] += seconds
        return seconds

    def first(of: Networks) -> float:
        return of._once("fit", lambda: works(5.0)) + works(1.0)

    def second(of: Networks) -> float:
        return of._once("other fit", lambda: works(3.0)) + of._once("fit", lambda: works(100.0)) + works(2.0)

    assert of.timed(first) == (6.0, 6.0)
    assert of.timed(second) == (10.0, 10.0)
    assert of.timed(first) == (6.0, 6.0)
    assert clock[0] == 12.0
