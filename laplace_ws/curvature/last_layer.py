"""Whether the outputs of a network are those of the one layer that is covered, so that nothing need be pulled back to it."""

from __future__ import annotations

import torch

from laplace_ws.curvature.backend import Linearisation
from laplace_ws.kfac import EmbeddingUse, MatrixUse
from laplace_ws.kfac.uses import at_least_float32


def layer_of_outputs(linearisation: Linearisation) -> MatrixUse | None:
    """The only use of parameters, if its outputs are those of the network, up to terms that do not depend on it; else None.

    They are where the gradient at the use's output equals the column that is pulled back: random numbers stay the same under no other
    linear map.
    """
    if len(linearisation.uses) != 1:
        return None
    (use,), f = linearisation.uses, linearisation.outputs
    if (
        not isinstance(use, MatrixUse)
        or isinstance(use, EmbeddingUse)
        or use.groups != 1
        or not isinstance(use.n_positions, int)
        or f.ndim < 2
    ):
        return None
    generator = torch.Generator(f.device).manual_seed(0)
    column = torch.randn(f.shape, dtype=torch.float32, device=f.device, generator=generator).to(f.dtype)
    (g,) = linearisation.pullback(column[None])
    found = use.output_gradients(g)[0]  # [N, R, O]
    expected = at_least_float32(column).reshape(len(f), -1, f.shape[-1])
    return use if found.shape == expected.shape and torch.equal(found, expected) else None
