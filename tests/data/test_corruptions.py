from __future__ import annotations

import math

import pytest
import torch

from laplace_ws.data import STRENGTHS, Corruption, corrupt, load_dataset
from laplace_ws.data.corruptions import PARAMETERS


@pytest.fixture
def pixels():
    return torch.rand(6, 1, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gaussian_blur_oracle(pixels, sigma):
    """Rows and columns one after another, borders mirrored, weights written out."""
    reach = math.ceil(3 * sigma)
    taps = torch.arange(-reach, reach + 1, dtype=pixels.dtype)
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    weights /= weights.sum()
    for axis in (2, 3):
        n = pixels.shape[axis]
        places = torch.arange(-reach, n + reach).abs()
        places = torch.where(places > n - 1, 2 * (n - 1) - places, places)
        padded = pixels.index_select(axis, places)
        pixels = sum(w * padded.narrow(axis, i, n) for i, w in enumerate(weights))
    return pixels


@pytest.mark.parametrize("corruption", Corruption)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_pixels_stay_pixels_and_inputs_stay_as_they_are(corruption, strength, pixels):
    before = pixels.clone()
    damaged = corrupt(pixels, corruption, strength)
    assert damaged.shape == pixels.shape
    assert damaged.dtype == pixels.dtype
    assert -1e-12 <= damaged.min() <= damaged.max() <= 1 + 1e-12
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("corruption", Corruption)
def test_each_strength_does_more_than_the_one_below(corruption, pixels):
    damage = [(corrupt(pixels, corruption, strength) - pixels).square().mean().item() for strength in STRENGTHS]
    assert damage[0] > 0
    assert damage == sorted(damage)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_blur_is_a_gaussian_one(strength, pixels):
    expected = gaussian_blur_oracle(pixels, PARAMETERS[Corruption.BLUR][strength - 1])
    torch.testing.assert_close(corrupt(pixels, "blur", strength), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_contrast_shrinks_the_distance_to_the_mean_of_each_image(strength, pixels):
    factor = PARAMETERS[Corruption.CONTRAST][strength - 1]
    mean = pixels.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(pixels, "contrast", strength), mean + factor * (pixels - mean))


def test_noise_has_its_deviation_and_comes_from_its_seed():
    grey = torch.full((40, 1, 32, 32), 0.5, dtype=torch.float64)
    before = torch.get_rng_state()
    first, again, other = (corrupt(grey, "noise", 1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # of 40,960 draws: the standard error is 0.35 % of the deviation
    assert (first - 0.5).std().item() == pytest.approx(PARAMETERS[Corruption.NOISE][0], rel=0.02)
    stronger = corrupt(grey, "noise", 2, seed=0)
    ratio = PARAMETERS[Corruption.NOISE][1] / PARAMETERS[Corruption.NOISE][0]
    unclipped = (stronger > 0) & (stronger < 1)
    torch.testing.assert_close((stronger - 0.5)[unclipped], ratio * (first - 0.5)[unclipped])


def test_colour_images_and_the_bundled_ones_can_be_damaged():
    colour = torch.rand(2, 3, 16, 16)
    data = load_dataset(n_train=20, n_test=20)
    for corruption in Corruption:
        assert corrupt(colour, corruption, 5).shape == colour.shape
        x = data.from_pixels(corrupt(data.to_pixels(data.x_test), corruption, 3))
        assert x.shape == data.x_test.shape
        assert not torch.allclose(x, data.x_test)


def test_normalisation_goes_there_and_back():
    data = load_dataset(n_train=20, n_test=20, dtype=torch.float64)
    levels = data.to_pixels(data.x_test) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-10)
    torch.testing.assert_close(data.from_pixels(data.to_pixels(data.x_test)), data.x_test)


def test_what_cannot_be_is_refused(pixels):
    with pytest.raises(ValueError, match="unknown corruption 'fog': choose one of 'noise', 'blur', 'contrast'"):
        corrupt(pixels, "fog", 1)
    with pytest.raises(ValueError, match="strength=6 must be from 1 to 5"):
        corrupt(pixels, "noise", 6)
    with pytest.raises(ValueError, match=r"pixels span -1.* give them in \[0, 1\]"):
        corrupt(pixels - 1, "noise", 1)
    with pytest.raises(ValueError, match="images of 6x6 pixels are too small for a blur of 2 pixels"):
        corrupt(pixels[..., :6, :6], "blur", 5)
