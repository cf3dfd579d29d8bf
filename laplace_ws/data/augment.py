"""Random crops and flips of a whole batch at once."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.values import flag, generator_or_none, given, tensor, whole_number


def random_crop_flip(
    x: Float[Tensor, "N C H W"], generator: torch.Generator, padding: int = 4, flip: bool = True
) -> Float[Tensor, "N C H W"]:
    """Shift every image by its own random offset and mirror half of them left to right.

    The same as padding by reflection (the edge pixel is not repeated, as in `torch.nn.functional.pad(mode="reflect")`),
    taking a random H×W crop of each image, and flipping it with probability ½. Reflection, unlike zeros, needs no
    knowledge of how the images were normalised.

    Args:
        x: Images; left as they are.
        generator: Source of randomness; the global one is not touched. On any device: draws are moved to that of `x`,
            so a CPU generator gives the same crops on every device.
        padding: Largest shift in pixels, smaller than both sides; 4 is usual for 32×32.
        flip: Whether to mirror; switch it off where left and right carry meaning (digits, text).

    Returns:
        New images in the shape, type and device of `x`.

    Source: Zagoruyko & Komodakis 2016, section 3 (reflection padding, crops, flips).
    """
    n, _, height, width = tensor("x", x, "of images [N, C, H, W]", 4).shape
    padding, flip = whole_number("padding", padding), flag("flip", flip)
    generator = given("generator", generator_or_none("generator", generator))
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding={padding} must be at least 0 and smaller than the images' sides, {height}x{width}")

    def draw(low: int, high: int) -> Int[Tensor, "N 1"]:
        return torch.randint(low, high, (n, 1), generator=generator, device=generator.device).to(x.device)

    rows = _reflect(torch.arange(height, device=x.device) + draw(-padding, padding + 1), height)
    cols = _reflect(torch.arange(width, device=x.device) + draw(-padding, padding + 1), width)
    if flip:
        cols = torch.where(draw(0, 2).bool(), cols.flip(1), cols)
    pixel = (rows[:, :, None] * width + cols[:, None, :]).flatten(1)
    return x.flatten(2).gather(2, pixel[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def _reflect(index: Int[Tensor, "N L"], length: int) -> Int[Tensor, "N L"]:
    """Mirror positions outside 0 … length − 1 about the first and the last."""
    last = length - 1
    return last - (last - index.abs()).abs()
