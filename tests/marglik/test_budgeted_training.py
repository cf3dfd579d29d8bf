"""Training within a budget, by a clock that only data move: what it decides, records, keeps and resumes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from marglik.runs import SGD, blobs, mlp
from marglik.test_checkpoint import Stop, stop_after

from laplace_ws import Laplace
from laplace_ws.data import TensorLoader
from laplace_ws.marglik import CheckpointError, MarglikResult, Schedule, Trainer, TrainingOptions, prepare

BUDGETED = Schedule(n_epochs=40, n_epochs_burnin=5, n_hypersteps=3, curvature_budget=0.5)
OPTIONS = TrainingOptions(optimizer_kwargs=SGD, curvature="ggn")


@dataclass
class Clock:
    """Time that passes only when it is told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(TensorLoader):
    """Each batch takes a second, those before the last of a choice included."""

    clock: Clock

    def __iter__(self):
        for batch in super().__iter__():
            self.clock.now += 1.0
            yield batch


def trainer(schedule: Schedule = BUDGETED, options: TrainingOptions = OPTIONS, **more) -> Trainer:
    """A run of eight batches an epoch whose clock counts batches."""
    torch.manual_seed(0)
    clock = Clock()
    loader = Timed(*blobs(n=64).dataset.tensors, batch_size=8, shuffle=options.hessian_structure != "lowrank", seed=3)
    loader.clock = clock
    ready = prepare(mlp(), loader, "classification", schedule, options, progress_bar=False, **more)
    ready.clock = clock
    return ready


def chosen(result: MarglikResult) -> list[int]:
    """Batches of the fit after each epoch."""
    return [record["fit_batches"] for record in result.history]


def test_what_was_decided_and_what_it_took_is_in_the_records():
    result = trainer().run()
    batches = chosen(result)
    assert batches[:4] == [0] * 4
    assert batches[4] == 1  # a tenth of eight
    assert batches[-1] > 0
    assert len(set(batches)) > 2
    for record in result.history:
        assert record["seconds"] == 8.0 + record["curvature_seconds"]
        assert record["fit_batches"] <= record["curvature_seconds"] <= 8 * (record["fit_batches"] > 0)
        assert (record["log_marginal_likelihood"] is None) == (record["fit_batches"] == 0)
    assert len(result.margliks) == sum(n > 0 for n in batches)


def test_the_result_says_what_tuning_and_the_last_fit_cost():
    result = trainer(options=replace(OPTIONS, final_kfac_approx="reduce")).run()
    spent = sum(record["curvature_seconds"] for record in result.history)
    assert (result.gradient_seconds, result.final_fit_seconds) == (320.0, 8.0)
    assert result.curvature_seconds == spent + 8.0
    assert result.tuning_overhead == spent / 320
    assert result.final_fit_overhead == 8 / 320
    both = result.tuning_overhead + result.final_fit_overhead
    assert 0.4 < both <= 0.5 + 7 / 320  # up to the error of one prediction, see below
    assert (result.curvature_budget, result.over_budget) == (0.5, max(0.0, both - 0.5))


def test_more_is_put_aside_for_a_last_fit_by_another_approximation():
    spent = [
        sum(chosen(trainer(options=replace(OPTIONS, final_kfac_approx=approx)).run()))
        for approx in ("expand", "reduce")
    ]
    assert spent[0] < spent[1]


def test_a_run_too_short_for_its_budget_says_by_how_much_it_passes_it():
    result = trainer(replace(BUDGETED, n_epochs=6, curvature_budget=0.01)).run()
    assert chosen(result)[-1] == 1
    assert result.over_budget == pytest.approx(result.curvature_seconds / 48 - 0.01)
    assert result.over_budget > 0.1


def test_budgets_of_every_size_are_kept():
    """Up to the error of one tuning's prediction, whose batches lie up to seven others away in the loader."""
    tunings = []
    for share in (0.1, 0.2, 0.5, 1.0):
        result = trainer(replace(BUDGETED, curvature_budget=share)).run()
        assert result.over_budget * 320 <= 7
        tunings.append(sum(chosen(result)))
    assert tunings == sorted(set(tunings))


def test_options_that_are_given_are_kept():
    of_frequency = chosen(trainer(replace(BUDGETED, marglik_frequency=10)).run())
    assert [epoch for epoch, n in enumerate(of_frequency, start=1) if n] == [5, 15, 25, 35, 40]
    assert max(of_frequency) == 8
    of_fraction = chosen(trainer(replace(BUDGETED, fit_fraction=0.5)).run())
    assert set(of_fraction) == {0, 4}
    assert 8 < of_fraction.count(4) < 36


@pytest.mark.parametrize(
    "given",
    [
        {"marglik_frequency": 10, "fit_fraction": 0.5},
        {"marglik_frequency": 10, "curvature_budget": None},
        {"fit_fraction": 0.5, "curvature_budget": None},
        {"curvature_budget": None},
        {"n_hypersteps": 0},
    ],
)
def test_nothing_is_chosen_where_nothing_is_left_to_choose(given):
    ready = trainer(replace(BUDGETED, **given))
    assert ready.budget is None
    result = ready.run()
    frequency, fraction = given.get("marglik_frequency", 5), given.get("fit_fraction", 1.0)
    tuned = [] if given == {"n_hypersteps": 0} else [*range(5, 40, frequency), 40]
    assert chosen(result) == [8 * fraction * (epoch in tuned) for epoch in range(1, 41)]
    assert result.over_budget is None


def test_a_structure_that_needs_the_same_data_in_each_pass_sees_all_of_it():
    result = trainer(options=replace(OPTIONS, hessian_structure="lowrank")).run()
    assert set(chosen(result)) == {0, 8}
    assert chosen(result)[-1] == 8


def test_the_best_is_kept_where_fits_see_as_many_batches_each_and_it_is_asked_for(monkeypatch):
    values = itertools.count(0.0, -1.0)
    real = Laplace.log_marginal_likelihood
    monkeypatch.setattr(
        Laplace, "log_marginal_likelihood",
        lambda la, **given: real(la, **given) + (0.0 if given else 1e4 * next(values)),
    )  # fmt: skip
    assert trainer().run().best_epoch == 40
    assert trainer(replace(BUDGETED, marglik_frequency=10)).run().best_epoch == 40
    assert trainer(replace(BUDGETED, fit_fraction=0.5)).run().best_epoch == 40
    assert trainer(replace(BUDGETED, fit_fraction=0.5, keep="best")).run().best_epoch == 5


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("stop", [3, 12, 33])
def test_resumed_equals_uninterrupted_by_the_same_clock(tmp_path, stop):
    """The measurements go on where they were: also at a stop between two tunings, where the cost of one is in the checkpoint."""
    schedule = replace(BUDGETED, curvature_budget=0.15)
    whole = trainer(schedule).run()
    assert 0 in chosen(whole)[5:]
    path = tmp_path / "c.pt"
    with pytest.raises(Stop):
        trainer(schedule, checkpoint_path=path, on_epoch=stop_after(stop)).run()
    again = trainer(schedule, checkpoint_path=path)
    again.clock.now += 1e6
    again.resume()
    assert (again.progress.epoch > 0) == (stop > 5)
    resumed = again.run()
    assert resumed.history == whole.history
    assert resumed.losses == whole.losses
    assert resumed.curvature_seconds == whole.curvature_seconds


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"curvature_budget": 0.2}, r"\(curvature_budget was 0\.5 and is 0\.2\)"),
        ({"curvature_budget": None}, r"curvature_budget was 0\.5 and is None"),
        ({"marglik_frequency": 5}, r"\(marglik_frequency was None and is 5\)"),
        ({"fit_fraction": 0.5}, r"\(fit_fraction was None and is 0\.5\)"),
    ],
)
def test_a_checkpoint_of_another_budget_is_refused(tmp_path, change, says):
    path = tmp_path / "c.pt"
    with pytest.raises(Stop):
        trainer(checkpoint_path=path, on_epoch=stop_after(8)).run()
    with pytest.raises(CheckpointError, match=says):
        trainer(replace(BUDGETED, **change), checkpoint_path=path).resume()


def test_a_long_wait_between_tunings_leaves_checkpoints(tmp_path):
    path = tmp_path / "c.pt"
    rare = replace(BUDGETED, n_epochs=100, fit_fraction=1.0, curvature_budget=0.02)
    with pytest.raises(Stop):
        trainer(rare, checkpoint_path=path, on_epoch=stop_after(19)).run()
    again = trainer(rare, checkpoint_path=path)
    again.resume()
    assert again.progress.epoch == 15
    assert [record["epoch"] for record in again.progress.history if record["fit_batches"]] == [5]


# ------------------------------------------------------------------ what estimates from fewer batches are worth


def test_estimates_from_any_number_of_batches_stand_for_all_the_data_and_fewer_give_higher_ones():
    """Over all choices of k batches of equal size, log likelihood and curvature are right on average; −½ log det of a curvature that is an
    average of others is at most the average of theirs [Jensen]."""
    batches = list(blobs(n=40, batch_size=8))
    la = Laplace(mlp(), "classification", hessian_structure="full", curvature="ggn", prior_precision=0.7)
    evidence, log_likelihood, trace = {}, {}, {}
    for k in range(1, 6):
        found = []
        for subset in itertools.combinations(batches, k):
            la.fit(subset, n_data=40, recheck=False)
            assert la.n_data == 40
            found.append((la.log_marginal_likelihood(), la.log_likelihood, la.H.to_dense().trace()))
        evidence[k], log_likelihood[k], trace[k] = (
            torch.stack(values).mean().item() for values in zip(*found, strict=True)
        )
    assert list(log_likelihood.values()) == pytest.approx([log_likelihood[5]] * 5, rel=1e-10)
    assert list(trace.values()) == pytest.approx([trace[5]] * 5, rel=1e-10)
    assert evidence[1] > evidence[2] > evidence[3] > evidence[4] > evidence[5]
    assert evidence[1] > evidence[5] + 1


def test_curvature_is_averaged_over_tunings_that_see_a_part_of_the_batches(monkeypatch):
    fits: list[tuple[torch.Tensor, torch.Tensor | None, float]] = []
    fit = Laplace.fit

    def noted(la, data, **options):
        """What a fit gives alone, and what it is averaged with."""
        averaged_with = options.pop("averaged_with", None)
        fit(la, data, **options)
        alone = la.H.to_dense()
        if averaged_with is None:
            fits.append((alone, None, 0.0))
            return
        earlier, weight = averaged_with
        fits.append((alone, earlier.to_dense(), weight))
        fit(la, data, averaged_with=averaged_with, **options)

    monkeypatch.setattr(Laplace, "fit", noted)
    options = replace(OPTIONS, hessian_structure="full")
    run = trainer(options=options)
    run.loader.shuffle = False  # both fits of `noted` see the same batches
    n_batches = chosen(run.run())
    tunings = [n for n in n_batches if n]
    average = None
    for n, (alone, earlier, weight) in zip(tunings, fits, strict=False):
        newest = 1.0 if average is None else max(0.3, n / 8)
        assert weight == pytest.approx(1 - newest)
        if earlier is not None:
            torch.testing.assert_close(earlier, average)
        average = alone if average is None else average * (1 - newest) + alone * newest
    assert fits[-1][1] is None  # the last fit, of all the data at the last weights

    fits.clear()
    trainer(replace(BUDGETED, fit_fraction=0.5), options).run()
    assert all(earlier is None for _, earlier, _ in fits)


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "ekfac"])
def test_the_average_is_resumed_with_each_structure(tmp_path, structure):
    path = tmp_path / "c.pt"
    options = replace(OPTIONS, hessian_structure=structure)
    whole = trainer(options=options).run()
    with pytest.raises(Stop):
        trainer(options=options, checkpoint_path=path, on_epoch=stop_after(20)).run()
    again = trainer(options=options, checkpoint_path=path)
    again.resume()
    again.clock.now = sum(record["seconds"] for record in again.progress.history)
    assert (again.tuner.earlier is None) == (structure == "ekfac")
    assert again.run().margliks == whole.margliks
