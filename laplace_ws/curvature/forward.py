"""Checks of a model's forward pass on a few examples: it gives numbers, the same ones twice, and each example's whatever lies beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from laplace_ws.curvature.finite import check_finite
from laplace_ws.curvature.graph_inputs import places_told_apart
from laplace_ws.curvature.inputs import ModelInputs, call_model, own_copy, selected
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.randomness import random_state, set_random_state

N_PROBED = 4
"""Examples of the first batch that are probed, each separately: few enough to cost nothing, enough to tell examples apart."""
_TF32_EPS = 2**-10
"""Machine precision of TF32, in which a GPU may compute products of float32."""


def probe(x: ModelInputs) -> ModelInputs:
    """A few examples of a batch, drawn at random but the same each time, in random order, the first of them once more at the end.

    A model that sorts its examples by anything they hold puts the two copies side by side, so that it cannot leave the order as it is.
    Inputs of a class that knows only slices give the first examples of the batch.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: N_PROBED - 1].tolist()
    return selected(x, places_told_apart(x, order if len(x) == 1 else [*order, order[0]]))


def check_forward(model: nn.Module, x: ModelInputs) -> None:
    """Check the forward pass on a few examples where no backend looks at it; gradients have to be enabled.

    Raises:
        UnsupportedParameterError: the outputs do not depend on a parameter, are random, or depend on other examples of the batch.
        InvalidBatchError: the outputs are not finite.
    """
    with random_state_after_refusal(x.device):
        f = outputs_with_gradient(model, x)
        check_same_outputs(model, f, call_model(model, own_copy(x)))
        check_examples_apart(model, x, f)


def outputs_with_gradient(model: nn.Module, x: ModelInputs) -> Tensor:
    """The outputs, finite and with a gradient."""
    f = call_model(model, own_copy(x))
    check_finite(model, f)
    check_has_gradient(model, f)
    return f


def check_has_gradient(model: nn.Module, f: Tensor) -> None:
    """Raise unless outputs depend on a parameter that requires grad."""
    if not f.requires_grad:
        raise UnsupportedParameterError(
            f"the outputs of {type(model).__name__} do not depend on any parameter that requires grad; is there a detach() or a "
            "no_grad() in its forward pass?"
        )


def check_same_outputs(model: nn.Module, f: Tensor, outputs: Tensor) -> None:
    """Raise unless a second run gave the same outputs."""
    if not _are_close(f, outputs, tolerance(torch.finfo(f.dtype).eps)):
        raise UnsupportedParameterError(
            f"{type(model).__name__} gives other outputs for the same inputs, in eval mode; take out what is random in its forward pass."
        )


def check_examples_apart(model: nn.Module, x: ModelInputs, f: Tensor) -> None:
    """Raise unless some of the examples by themselves give the outputs that they have among the others.

    Args:
        model: the network.
        x: the examples; a single one has no others.
        f: their outputs.
    """
    if len(x) == 1:
        return
    inner = slice(1, max(2, min(3, len(x) - 1)))  # with others on both sides, where there are enough
    alone = call_model(model, own_copy(x[inner]))
    eps = precision(f, model.parameters())
    if f.device.type == "cuda":
        eps = max(eps, _TF32_EPS) if f.dtype is torch.float32 else eps
    if alone.shape != f[inner].shape or not _are_close(f[inner], alone, tolerance(eps)):
        raise UnsupportedParameterError(
            f"{type(model).__name__} gives other outputs for an example when others lie beside it in the batch; keep the examples of a "
            "batch apart (a mean over the batch, for instance, must be one over the training data)."
        )


def _are_close(f: Tensor, other: Tensor, rounding: float) -> bool:
    return torch.allclose(f, other, rtol=rounding, atol=rounding * f.abs().max().item())


def precision(f: Tensor, parameters: Iterable[Tensor]) -> float:
    """The coarsest ε among outputs, parameters and, under autocast, the precision of computation."""
    dtypes = {f.dtype, *(p.dtype for p in parameters if p.is_floating_point())}
    if torch.is_autocast_enabled(f.device.type):
        dtypes.add(torch.get_autocast_dtype(f.device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def tolerance(eps: float) -> float:
    """Relative rounding error by which the same sums, taken in two orders, may differ at machine precision ε."""
    return min(10 * eps**0.5, 0.05)


@contextmanager
def random_state_after_refusal(device: torch.device) -> Iterator[None]:
    """Put torch's random state back where a model is refused, perhaps for drawing numbers; not otherwise, as other threads draw too."""
    state = random_state(device)
    try:
        yield
    except UnsupportedParameterError:
        set_random_state(state, device)
        raise
