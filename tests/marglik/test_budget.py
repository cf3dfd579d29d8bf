"""The rule by which a budget becomes tunings, with seconds that are made up."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

import pytest

from laplace_ws.marglik.budget import FEWEST_TUNINGS, Budget, Spent, TuningCost

PLAIN = Budget(share=0.1, first_epoch=20, n_epochs=100, n_batches=50)
CHEAP = TuningCost(fixed_seconds=0.5, batch_seconds=0.05)


@dataclass
class Run:
    """What a run of made-up seconds did: batches and seconds of the tuning after each epoch."""

    batches: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gradient_seconds: float = 0.0

    @property
    def epochs(self) -> list[int]:
        """After which there was a tuning."""
        return [epoch for epoch, n in enumerate(self.batches, start=1) if n]


def simulate(budget: Budget, cost, epoch_seconds=lambda epoch: 10.0) -> Run:
    """A run whose tunings cost what `cost(epoch)` says, which the budget learns by what they took."""
    run, known = Run(), None
    for epoch in range(1, budget.n_epochs + 1):
        run.gradient_seconds += epoch_seconds(epoch)
        n = budget.batches_after(epoch, Spent(run.gradient_seconds, sum(run.seconds), len(run.epochs), known))
        took = cost(epoch)
        run.batches.append(n)
        run.seconds.append(took.seconds(n) if n else 0.0)
        if n:
            known = took.learned_after(known)
    return run


def random_cases(n: int) -> list[tuple[Budget, TuningCost]]:
    """Budgets and costs over four orders of magnitude, in seconds where an epoch takes 10."""
    rng, cases = random.Random(0), []
    for _ in range(n):
        n_epochs = rng.randint(1, 120)
        budget = Budget(
            share=10 ** rng.uniform(-2.5, 0),
            first_epoch=rng.randint(1, n_epochs),
            n_epochs=n_epochs,
            n_batches=rng.choice([1, 2, 7, 50, 400]),
            final_fit_cost=rng.choice([1.0, 2.0]),
        )
        cases.append((budget, TuningCost(10 ** rng.uniform(-4, 1), 10 ** rng.uniform(-4, 1))))
    return cases


def test_tunings_and_the_last_fit_keep_within_the_budget_unless_the_run_does_not_pay_for_the_fewest():
    n_kept = 0
    for budget, cost in random_cases(2000):
        run = simulate(budget, lambda epoch, cost=cost: cost)
        whole = budget.share * run.gradient_seconds
        put_aside = min(whole / 2, budget.n_batches * budget.final_fit_cost * cost.batch_seconds)
        # the first tuning is of unknown cost, the last is put aside for; the others may be forced, on single batches
        forced = 2 * cost.seconds(budget.smallest) + FEWEST_TUNINGS * cost.seconds(1)
        n_kept += forced <= whole - put_aside
        assert sum(run.seconds) <= max(whole - put_aside, forced) + 1e-9
    assert n_kept > 500


def test_at_no_moment_are_the_tunings_ahead_of_the_gradient_steps():
    for budget, cost in random_cases(300):
        run = simulate(budget, lambda epoch, cost=cost: cost)
        spent = 0.0
        for epoch, (n, seconds) in enumerate(zip(run.batches, run.seconds, strict=True), start=1):
            spent += seconds
            if n >= budget.smallest and len([e for e in run.epochs if e <= epoch]) > FEWEST_TUNINGS:
                assert spent <= budget.share * 10.0 * epoch + 1e-9


def test_every_run_tunes_after_its_last_epoch_and_never_starves():
    for budget, cost in random_cases(500):
        run = simulate(budget, lambda epoch, cost=cost: cost)
        n_rounds = budget.n_epochs - budget.first_epoch + 1
        assert run.batches[-1] > 0
        assert len(run.epochs) >= min(FEWEST_TUNINGS, n_rounds)
        assert max(b - a for a, b in zip(run.epochs, [*run.epochs[1:], budget.n_epochs], strict=True)) <= (
            math.ceil(2 * n_rounds / FEWEST_TUNINGS)
        )


def test_the_number_of_batches_is_within_its_bounds():
    for budget, cost in random_cases(500):
        run = simulate(budget, lambda epoch, cost=cost: cost)
        assert all(n == 0 for n in run.batches[: budget.first_epoch - 1])
        assert run.batches[budget.first_epoch - 1] == budget.smallest  # the first, whose cost is not known
        assert all(0 <= n <= budget.n_batches for n in run.batches)


def test_more_is_spent_on_a_larger_budget():
    spent = [sum(simulate(replace(PLAIN, share=s), lambda epoch: CHEAP).seconds) for s in (0.02, 0.05, 0.1, 0.2)]
    assert spent == sorted(spent)
    whole = 1000.0
    for share, seconds in zip((0.02, 0.05, 0.1, 0.2), spent, strict=True):
        put_aside = 50 * CHEAP.batch_seconds
        # what is left over buys no further batch, nor further tunings where all batches are seen
        assert 0.9 * (share * whole - put_aside) <= seconds <= share * whole - put_aside or seconds == pytest.approx(
            80 * CHEAP.seconds(50) + CHEAP.seconds(5), rel=1e-6
        )


def test_a_costly_tuning_waits_and_a_cheap_one_sees_more_batches():
    cheap = simulate(PLAIN, lambda epoch: CHEAP)
    assert cheap.epochs == list(range(20, 101))
    assert min(cheap.batches[20:]) > PLAIN.smallest
    costly = simulate(PLAIN, lambda epoch: TuningCost(5.0, 0.05))
    gaps = [b - a for a, b in zip(costly.epochs[2:], costly.epochs[3:], strict=False)]
    assert set(gaps[:-1]) == {5}  # 5.25 seconds each, 1.2 of which accrue after each epoch
    assert set(costly.batches[20:]) <= {0, *range(5, 51)}


def test_the_credit_of_the_burn_in_is_spread_over_the_epochs_after_it():
    late = replace(PLAIN, first_epoch=51)
    run = simulate(late, lambda epoch: CHEAP)
    halves = sum(run.seconds[50:75]), sum(run.seconds[75:])
    assert halves[0] == pytest.approx(halves[1], rel=0.1)
    assert sum(run.seconds) == pytest.approx(100.0 - 2.5, rel=0.05)  # all of it, less the last fit


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_drift_of_the_costs_is_learned(factor):
    def cost(epoch: int) -> TuningCost:
        return CHEAP if epoch < 60 else TuningCost(factor * CHEAP.fixed_seconds, factor * CHEAP.batch_seconds)

    run, steady = simulate(PLAIN, cost), simulate(PLAIN, lambda epoch: CHEAP)
    assert run.batches[:60] == steady.batches[:60]
    assert (sum(run.batches[62:]) > sum(steady.batches[62:])) == (factor < 1)
    one_error = 5 * CHEAP.seconds(max(run.batches))
    assert sum(run.seconds) <= 100.0 + one_error


def test_epochs_that_slow_down_or_speed_up_change_what_may_be_spent():
    for epoch_seconds in (lambda epoch: 10.0 if epoch < 50 else 4.0, lambda epoch: 4.0 if epoch < 50 else 10.0):
        run = simulate(PLAIN, lambda epoch: CHEAP, epoch_seconds)
        assert sum(run.seconds) <= 0.1 * run.gradient_seconds


def test_an_outlier_is_forgotten():
    slow = TuningCost(20.0, 1.0)
    run = simulate(PLAIN, lambda epoch: slow if epoch == 20 else CHEAP)
    second = run.epochs[1]
    assert run.batches[second - 1] == 1  # forced, as it is thought to be as slow as the first
    assert min(run.batches[second:]) >= PLAIN.smallest
    assert CHEAP.learned_after(slow) == CHEAP
    assert slow.learned_after(CHEAP) == TuningCost(10.25, 0.525)


def test_a_last_fit_that_costs_more_than_the_budget_leaves_half_of_it_to_the_tunings():
    run = simulate(PLAIN, lambda epoch: TuningCost(0.1, 3.0))  # a fit to all of it takes 150 seconds of the 100
    assert sum(run.seconds) <= 50.0
    assert sum(n >= PLAIN.smallest for n in run.batches) > 1  # besides the first


def test_rounds_that_are_given_are_kept():
    rounds = frozenset({20, 30, 100})
    for cost in (CHEAP, TuningCost(50.0, 1.0)):
        assert simulate(replace(PLAIN, rounds=rounds), lambda epoch, cost=cost: cost).epochs == [20, 30, 100]
    free = simulate(replace(PLAIN, rounds=rounds), lambda epoch: CHEAP)
    assert free.batches[29] > PLAIN.smallest
    costly = simulate(replace(PLAIN, rounds=rounds), lambda epoch: TuningCost(50.0, 1.0))
    assert [costly.batches[epoch - 1] for epoch in (20, 30, 100)] == [PLAIN.smallest, 1, 1]


def test_where_the_number_of_batches_is_given_only_the_frequency_is_chosen():
    run = simulate(replace(PLAIN, fit_batches=50), lambda epoch: CHEAP)
    assert {run.batches[epoch - 1] for epoch in run.epochs} == {50}
    assert sum(run.seconds) <= 100.0 - 2.5
    assert len(run.epochs) == math.floor((100.0 - 2.5) / CHEAP.seconds(50))
    lowrank = simulate(replace(PLAIN, fit_batches=50), lambda epoch: TuningCost(1.0, 20.0))
    assert lowrank.epochs == [
        20,
        100,
    ]  # no more than must be: the first, which costs ten times the budget, and the last


def test_a_clock_that_does_not_move_is_no_reason_to_fail():
    assert simulate(PLAIN, lambda epoch: TuningCost(0.0, 0.0)).batches[20:] == [50] * 80
