"""Gram matrices of patches by self-correlation, against the patches themselves."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laplace_ws.kfac.conv import ConvGeometry, patch_columns, patches
from laplace_ws.kfac.correlation import MOST_TAPS, PatchGram, cheapest_plan, make_plan
from laplace_ws.kfac.factors import gram


@st.composite
def convolutions(draw):
    """A geometry and a size of images, larger or smaller than the padding and the kernel's reach."""
    dim = draw(st.integers(1, 3))
    per_axis = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dim))  # noqa: E731
    kernel, dilation, stride = per_axis(1, 4 if dim < 3 else 3), per_axis(1, 3), per_axis(1, 3)
    padding = tuple(zip(per_axis(0, 4), per_axis(0, 4), strict=True))
    least = [d * (k - 1) + 1 - sum(p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = tuple(draw(st.integers(max(1, n), max(1, n) + 5)) for n in least)
    return ConvGeometry(kernel, stride, padding, dilation, draw(st.sampled_from([1, 1, 2, 3]))), size


def by_patches(x, geometry):
    return gram(patches(x, geometry).flatten(-3, -2))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(convolutions())
def test_correlations_summed_over_batches_are_the_gram_matrix_of_all_patches(case):
    geometry, size = case
    total, truth = PatchGram(make_plan(geometry, size)), 0
    for n in (2, 1, 3):
        x = torch.randn(n, 2 * geometry.groups, *size, dtype=torch.float64)
        total.add(x)
        truth = truth + by_patches(x, geometry)
    torch.testing.assert_close(total.result(), truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        patch_columns(x, geometry).movedim(1, 0).mT,
        patches(x, geometry).reshape(geometry.groups, 3, -1, 2 * prod(geometry.kernel)),
    )


def test_border_rows_count():
    """What the interior alone gives is wrong for some pair of taps: the test above can fail."""
    geometry = ConvGeometry((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    plan = make_plan(geometry, (6, 6))
    assert plan.n_shifts == 13  # half of the 5 × 5 shifts, and the middle
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    x[:, :, 0] = 5
    whole = PatchGram(plan)
    whole.add(x)
    truth = by_patches(x, geometry)
    torch.testing.assert_close(whole.result(), truth)
    for number, region in enumerate(plan.regions):
        if region.ranges is not None:
            whole._products[number] = 0
    assert (whole.result() - truth).abs().max() > 1


@pytest.mark.parametrize("channels", [1, 64])
def test_single_precision_is_as_exact_as_with_patches(channels):
    geometry = ConvGeometry((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    x = torch.randn(64, channels, 32, 32)
    x += 3  # positive, so that rounding errors add up
    total = PatchGram(make_plan(geometry, (32, 32)))
    total.add(x)
    truth = by_patches(x.double(), geometry)
    error = lambda A: ((A - truth).norm() / truth.norm()).item()  # noqa: E731
    assert error(total.result()) < max(2 * error(by_patches(x, geometry)), 1e-6)


@pytest.mark.parametrize(
    ("geometry", "shape", "is_planned"),
    [
        (ConvGeometry((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), (32, 64, 32, 32), True),
        (ConvGeometry((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 64), (32, 64, 32, 32), True),
        (ConvGeometry((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), (32, 512, 2, 2), True),
        (ConvGeometry((1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1)), (32, 64, 32, 32), True),
        (ConvGeometry((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), (2, 3, 4, 4), False),  # the calls would cost more
        (ConvGeometry((8, 8), (8, 8), ((0, 0), (0, 0)), (1, 1)), (32, 3, 32, 32), False),  # a vision transformer's
        (ConvGeometry((12, 12), (1, 1), ((0, 0), (0, 0)), (1, 1)), (32, 64, 32, 32), False),
    ],
)
def test_the_cheaper_way_is_chosen(geometry, shape, is_planned):
    assert (cheapest_plan(geometry, shape) is not None) is is_planned
    assert prod(geometry.kernel) <= MOST_TAPS or not is_planned
