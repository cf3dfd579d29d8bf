"""Random networks have the curvature of dense algebra, or are refused by name."""

import collections

import pytest
from random_nets import draw

from laplace_ws import Laplace, UnsupportedParameterError
from laplace_ws.curvature import exact

IN_ALL = 2000
ACCEPTED = 0.9
"""Least share of the networks that are not refused."""


def check(seeds) -> collections.Counter:
    """How many are refused, and by which sentence; raises where the curvature of any is another than that of dense algebra."""
    refused = collections.Counter()
    for seed in seeds:
        net = draw(seed)
        x, y = net.x, net.y
        data = [(x[:3], y[:3]), (x[3:], y[3:])]
        full = Laplace(net.model, "regression", hessian_structure="full")
        try:
            full.fit(data)
        except UnsupportedParameterError as error:
            refused[str(error).split(";")[0]] += 1
            continue
        truth = exact.ggn(net.model, "regression", x, y)
        difference = (full.H.to_dense() - truth).norm() / truth.norm().clamp(min=1e-12)
        assert difference < 1e-8, (seed, net.model.written, difference)
        kron = Laplace(net.model, "regression", kfac_approx="expand")
        kron.fit(data)
        mean, variance = kron(x)
        assert mean.isfinite().all(), (seed, net.model.written)
        assert variance.isfinite().all(), (seed, net.model.written)
    return refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_some_random_networks(part):
    refused = check(range(part * 10, part * 10 + 10))
    assert refused.total() <= 1, refused


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_two_thousand_random_networks():
    refused = check(range(100, 100 + IN_ALL))
    print(f"{refused.total()} of {IN_ALL} refused: {refused}")
    assert refused.total() <= (1 - ACCEPTED) * IN_ALL, refused
