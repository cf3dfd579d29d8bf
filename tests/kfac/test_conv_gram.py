"""Gram matrices of patches by self-correlation, against the patches themselves."""

from dataclasses import replace
from math import prod
from weakref import WeakSet

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from laplace_ws import kron_factors
from laplace_ws.kfac import ConvUse, KfacApprox, KronAccumulator, Rows, conv_gram, conv_use, kron_accumulator
from laplace_ws.kfac.conv import ConvGeometry, patch_columns, patches
from laplace_ws.kfac.conv_gram import MOST_TAPS, PatchGram, cheapest_plan, make_plan
from laplace_ws.kfac.factors import gram
from laplace_ws.kfac.kron_accumulator import MOST_SIZES


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
    of_interior = tuple(entry for entry in plan.entries if plan.regions[entry[1]].ranges is None)
    interior = PatchGram(replace(plan, entries=of_interior))
    interior.add(x)
    assert (interior.result() - truth).abs().max() > 1


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


def test_images_of_many_sizes_take_no_more_memory(monkeypatch):
    monkeypatch.setattr(conv_use, "cheapest_plan", lambda geometry, shape: make_plan(geometry, tuple(shape[2:])))
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    data = [(torch.randn(2, 2, 4 + i, 5, dtype=torch.float64), torch.tensor([0, 1])) for i in range(3 * MOST_SIZES)]
    found = kron_factors(model, "classification", data, kfac_approx="expand")["0.weight"]
    geometry = ConvGeometry((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    truth = sum(by_patches(x, geometry) for x, _ in data) / sum(len(x) * x[0, 0].numel() for x, _ in data)
    torch.testing.assert_close(found.A, truth)
    parameters = {"0.weight": model[0].weight}
    made, alive = [], WeakSet()

    def make(plan):
        made.append(plan)
        alive.add(total := PatchGram(plan))
        return total

    monkeypatch.setattr(kron_accumulator, "PatchGram", make)
    total = KronAccumulator(parameters, {"0.weight": KfacApprox.EXPAND})
    for x, _ in data:
        use = ConvUse(
            rows=Rows(2, 2),
            call="conv2d",
            weight="0.weight",
            bias=None,
            weight_shape=model[0].weight.shape,
            x=x,
            geometry=geometry,
        )
        total.start_batch([use])
        assert len(alive) <= MOST_SIZES
    assert len(set(made)) == len(data)
    torch.testing.assert_close(total.result()["0.weight"].A, truth)


@pytest.mark.parametrize("value", [1e6, float("nan")])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "size", "unread"),
    [(3, 2, 1, 8, [7]), (2, 1, 7, 9, [2, 3, 4, 5, 6]), (1, 4, 1, 8, [1, 2, 3, 5, 6, 7])],
    ids=["last", "between", "skipped"],
)
def test_pixels_that_no_tap_reads_do_not_matter(kernel, stride, dilation, size, unread, value):
    geometry = ConvGeometry((kernel,) * 2, (stride,) * 2, ((0, 0),) * 2, (dilation,) * 2)
    x = torch.randn(2, 3, size, size)
    spoilt = x.clone()
    spoilt[:, :, unread] = value
    spoilt[:, :, :, unread] = value
    totals = [PatchGram(make_plan(geometry, (size, size))) for _ in range(2)]
    for total, images in zip(totals, (x, spoilt), strict=True):
        total.add(images)
    assert torch.equal(totals[0].result(), totals[1].result())
    torch.testing.assert_close(totals[0].result(), by_patches(x, geometry))


def test_plans_that_cannot_pay_are_not_made(monkeypatch):
    monkeypatch.setattr(conv_gram, "make_plan", lambda *arguments: pytest.fail("a plan was made"))
    first_of_alexnet = ConvGeometry((11, 11), (4, 4), ((2, 2), (2, 2)), (1, 1))
    assert cheapest_plan(first_of_alexnet, (4, 3, 96, 96)) is None
