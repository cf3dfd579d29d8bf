"""The iterations for prior precisions and noise, against bisection on random problems."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from laplace_ws.posterior.newton import decreasing_root, joint_optimum, log_ratio, separate_optimum, uphill

F64 = torch.float64
LOW, HIGH = math.log(1e-6), math.log(1e8)

magnitudes = st.floats(-25, 25).map(lambda e: 10.0**e)
problems = st.tuples(
    st.lists(st.one_of(st.just(0.0), magnitudes), min_size=1, max_size=12),
    magnitudes,
    st.one_of(st.just(0.0), magnitudes),
)


def slope(log_delta: float, values: list[float], scale: float, square_sum: float) -> float:
    """Derivative of twice the log marginal likelihood in log δ."""
    delta = math.exp(log_delta)
    return math.fsum(scale * v / (scale * v + delta) for v in values) - delta * square_sum


def by_bisection(*problem) -> float:
    if slope(HIGH, *problem) >= 0:
        return HIGH
    if slope(LOW, *problem) <= 0:
        return LOW
    return optimize.brentq(slope, LOW, HIGH, args=problem, xtol=1e-13)


@settings(max_examples=150, deadline=None)
@given(st.lists(problems, min_size=1, max_size=5), st.floats(LOW, HIGH))
def test_newton_finds_what_bisection_finds(groups, start):
    n_calls = 0

    def effective(delta):
        nonlocal n_calls
        n_calls += 1
        gammas, decreases = [], []
        for (values, scale, _), d in zip(groups, delta, strict=True):
            x = scale * torch.tensor(values, dtype=F64)
            p = x / (x + d)
            gammas.append(p.sum())
            decreases.append((p * d / (x + d)).sum())
        return torch.stack(gammas), torch.stack(decreases)

    square_sums = torch.tensor([q for *_, q in groups], dtype=F64)
    limits = torch.tensor(LOW, dtype=F64), torch.tensor(HIGH, dtype=F64)
    starts = torch.full((len(groups),), start, dtype=F64)
    found = separate_optimum(effective, square_sums, starts, *limits)
    assert n_calls <= 60
    for got, problem in zip(found.tolist(), groups, strict=True):
        if problem[2] == 0 and not any(problem[0]):
            assert got == start
        else:
            assert got == pytest.approx(by_bisection(*problem), abs=1e-8)


def test_few_evaluations_from_far():
    values = torch.logspace(-12, 6, 400, dtype=F64)
    n_calls = 0

    def effective(delta):
        nonlocal n_calls
        n_calls += 1
        p = values / (values + delta)
        return p.sum()[None], (p * (1 - p)).sum()[None]

    limits = torch.tensor(LOW, dtype=F64), torch.tensor(HIGH, dtype=F64)
    separate_optimum(effective, torch.tensor([3.0], dtype=F64), torch.tensor([HIGH], dtype=F64), *limits)
    assert n_calls <= 8


def test_interacting_groups_need_every_slope():
    """Two groups that share a stiff direction: the joint solution is not that of either alone."""
    H = 50 * torch.tensor([[1.0, 0.95], [0.95, 1.0]], dtype=F64)
    q = torch.tensor([0.3, 0.01], dtype=F64)
    low, high = (torch.full((2,), v, dtype=F64) for v in (LOW, HIGH))

    def effective(delta):
        S = torch.linalg.inv(H + torch.diag(delta))
        return (S * H).sum(1), torch.diag(delta * S.diagonal()) - delta[:, None] * S.square() * delta

    def value(t):
        return (0.5 * (t.sum() - torch.logdet(H + torch.diag(t.exp())) - t.exp().dot(q))).item()

    found = joint_optimum(effective, value, q, torch.zeros(2, dtype=F64), low, high)
    gradient = torch.autograd.functional.jacobian(
        lambda t: 0.5 * (t.sum() - torch.logdet(H + torch.diag(t.exp())) - t.exp().dot(q)), found
    )
    assert gradient.abs().max() < 1e-9

    def alone(delta):
        p = H.diagonal() / (H.diagonal() + delta)
        return p, p * (1 - p)

    assert (found - separate_optimum(alone, q, torch.zeros(2, dtype=F64), low, high)).abs().max() > 0.01


def test_limits():
    """All weights at the prior mean: the upper one; no curvature: the lower one; neither: where it began."""
    gamma, q = torch.tensor([1.0, 0.0, 0.0], dtype=F64), torch.tensor([0.0, 1.0, 0.0], dtype=F64)
    t = torch.tensor([0.5, 0.5, 0.5], dtype=F64)
    assert log_ratio(gamma, q, t).tolist() == [math.inf, -math.inf, 0.0]
    low, high = (torch.full((3,), v, dtype=F64) for v in (LOW, HIGH))
    assert separate_optimum(lambda d: (gamma, 0 * gamma), q, t, low, high).tolist() == [HIGH, LOW, 0.5]
    coupled = joint_optimum(
        lambda d: (gamma, torch.zeros(3, 3, dtype=F64)), lambda t: (t[0] - t[1]).item(), q, t, low, high
    )
    assert coupled.tolist() == [HIGH, LOW, 0.5]


def test_a_step_uphill_is_shortened_until_it_is_one():
    origin = torch.zeros(1, dtype=F64)
    end = uphill(lambda x: -(x - 1).square().item(), origin, torch.full((1,), 8.0, dtype=F64))
    assert end.item() == 2.0
    assert uphill(lambda x: -x.abs().item(), origin, torch.ones(1, dtype=F64), 5) is origin


@pytest.mark.parametrize(("zero", "start", "expected"), [(3.0, -5.0, 3.0), (-30.0, 2.0, LOW), (99.0, HIGH, HIGH)])
def test_the_root_of_a_falling_function(zero, start, expected):
    assert decreasing_root(lambda x: zero - x, start, LOW, HIGH) == pytest.approx(expected, abs=1e-9)
