from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from laplace_ws.data import random_crop_flip


def crop_flip_slow(x, generator, padding, flip):
    """One image at a time, by padding and slicing; draws in the same order."""
    n, _, height, width = x.shape
    tops = torch.randint(-padding, padding + 1, (n, 1), generator=generator)
    lefts = torch.randint(-padding, padding + 1, (n, 1), generator=generator)
    flips = torch.randint(0, 2, (n, 1), generator=generator) if flip else torch.zeros(n, 1)
    images = []
    for image, top, left, mirrored in zip(x, tops.flatten(), lefts.flatten(), flips.flatten(), strict=True):
        padded = pad(image, (padding,) * 4, mode="reflect") if padding else image
        crop = padded[:, padding + top : padding + top + height, padding + left : padding + left + width]
        images.append(crop.flip(2) if mirrored else crop)
    return torch.stack(images)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("shape", "padding"), [((40, 3, 8, 11), 4), ((16, 1, 5, 5), 4), ((8, 2, 6, 4), 0)])
def test_moves_the_pixels_of_the_slow_reference(shape, padding, flip):
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    kept = x.clone()
    fast = random_crop_flip(x, torch.Generator().manual_seed(5), padding, flip)
    slow = crop_flip_slow(x, torch.Generator().manual_seed(5), padding, flip)
    assert torch.equal(fast, slow)
    assert torch.equal(x, kept)
    if padding or flip:
        assert not torch.equal(fast, x)


def test_every_image_draws_for_itself_and_the_whole_range_is_used():
    x = torch.arange(9 * 9, dtype=torch.float32).view(1, 1, 9, 9).expand(400, -1, -1, -1)
    moved = random_crop_flip(x, torch.Generator().manual_seed(0), padding=2, flip=False)
    centres = moved[:, 0, 4, 4].unique()
    expected = x[0, 0, 2:7, 2:7].flatten()
    assert torch.equal(centres, expected)


def test_global_rng_is_untouched_and_the_generator_decides():
    x = torch.randn(8, 1, 6, 6)
    before = torch.get_rng_state()
    first, again = (random_crop_flip(x, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)


@pytest.mark.parametrize("padding", [-1, 6])
def test_impossible_padding_is_refused(padding):
    with pytest.raises(ValueError, match=f"padding={padding} must be"):
        random_crop_flip(torch.zeros(1, 1, 6, 8), torch.Generator(), padding)
