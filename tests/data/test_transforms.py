from __future__ import annotations

import pytest
import torch

from laplace_ws.data import balanced_indices, channel_statistics, fitted
from laplace_ws.data.transforms import normalise
from laplace_ws.errors import NumericalRepairWarning


def test_balanced_as_far_as_the_labels_allow():
    y = torch.tensor([0] * 50 + [1] * 3 + [2] * 20 + [5] * 10)
    index = balanced_indices(y, 33, seed=0)
    assert y[index].bincount().tolist() == [10, 3, 10, 0, 0, 10]
    assert torch.equal(index, index.sort().values)
    assert len(index.unique()) == 33


def test_all_examples_in_order():
    y = torch.tensor([2, 0, 1, 0, 2])
    assert balanced_indices(y, 5, seed=3).tolist() == [0, 1, 2, 3, 4]


def test_smaller_choice_is_contained_in_a_larger():
    y = torch.arange(100) % 7
    small, large = (set(balanced_indices(y, n, seed=1).tolist()) for n in (13, 40))
    assert small < large


def test_every_example_has_its_turn():
    y = torch.tensor([0, 0, 0, 1, 1])
    seen = torch.cat([balanced_indices(y, 1, seed=seed) for seed in range(60)]).bincount(minlength=5)
    assert (seen > 0).all()


@pytest.mark.parametrize("n", [0, 6])
def test_impossible_sizes_are_refused(n):
    with pytest.raises(ValueError, match="ask for 1 to 5"):
        balanced_indices(torch.arange(5), n, seed=0)


def test_statistics_agree_with_torch():
    x = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(x)
    scaled = x.double() / 255
    torch.testing.assert_close(mean, scaled.mean((0, 2, 3)))
    torch.testing.assert_close(std, scaled.std((0, 2, 3), correction=0))
    torch.testing.assert_close(normalise(x, mean, std), (scaled - mean[:, None, None]) / std[:, None, None])


def test_constant_channel_warns_and_is_centred():
    x = torch.full((2, 2, 3, 3), 51, dtype=torch.uint8)
    x[0, 0] = 0
    with pytest.warns(NumericalRepairWarning, match=r"channels \[1\] .* replaced by 1"):
        mean, std = channel_statistics(x)
    assert std[1] == 1
    torch.testing.assert_close(normalise(x, mean, std)[:, 1].abs().max().item(), 0.0)


def test_smaller_grey_images_are_fitted_by_black_and_equal_channels():
    grey = torch.rand(2, 1, 28, 27, generator=torch.Generator().manual_seed(0))
    found = fitted(grey, (3, 32, 32))
    assert found.shape == (2, 3, 32, 32)
    for channel in found.unbind(1):
        assert torch.equal(channel[:, 2:30, 2:29], grey[:, 0])
    assert found.sum() == pytest.approx(3 * grey.sum().item(), rel=1e-5)
    colour = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fitted(colour, (3, 4, 4)), colour)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 3, 4), (3, 4, 3), (4, 4, 4)])
def test_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=f"images of 3x4x4 do not fit into {'x'.join(map(str, shape))}"):
        fitted(torch.rand(1, 3, 4, 4), shape)
