"""What a backend says of a model, held against autograd on a few examples, before any of it is believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.backend import Backend, check_outputs
from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.kfac import Use, example_gradients

N_PROBED = 4
"""Examples of the batch that are probed: few enough to cost nothing, enough to tell examples apart."""


def check_linearisation(
    backend: Backend, model: nn.Module, x: Tensor, parameters: Mapping[str, nn.Parameter]
) -> tuple[Sequence[Use], Tensor]:
    """Hold uses and gradients of the first few examples of a batch against autograd; returns their uses and outputs.

    A use that a backend cannot see, an operation that mixes examples, or rows in another order than by example would give curvature
    of a wrong scale in silence.

    Raises:
        UnsupportedParameterError: names the parameter, and what is wrong with its uses.
        InvalidBatchError: the outputs are not finite.
    """
    x = x[:N_PROBED]
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        f = check_outputs(
            model(x), len(x)
        )  # before the backend: what it leaves in the model must not hide what it does to it
        if not f.isfinite().all():
            raise InvalidBatchError(
                f"{type(model).__name__} gives outputs that are not finite; look for NaN in its weights or inputs."
            )
        if not f.requires_grad:
            raise UnsupportedParameterError(
                f"the outputs of {type(model).__name__} do not depend on any parameter that requires grad; is there a detach() or a "
                "no_grad() in its forward pass?"
            )
        with backend.linearise(model, x, parameters) as linearisation:
            _check_same_outputs(model, f, linearisation.outputs)
            generator = torch.Generator(f.device).manual_seed(0)
            v = torch.randn(f.shape, dtype=torch.float32, device=f.device, generator=generator).to(f.dtype)
            first, last = torch.zeros_like(v), torch.zeros_like(v)
            first[0], last[-1] = v[0], v[-1]
            g = linearisation.pullback(
                torch.stack([v, first, last, v])
            )  # at once: some backends treat a first column differently
            check_rows_by_example(linearisation.uses, [g_use[1:3] for g_use in g])
            for column in (0, 3):
                check_gradients(linearisation.uses, [g_use[column] for g_use in g], f, v, parameters)
            return linearisation.uses, linearisation.outputs


def _check_same_outputs(model: nn.Module, f: Tensor, outputs: Tensor) -> None:
    if not torch.allclose(f, outputs, rtol=_tolerance(f), atol=_tolerance(f) * f.abs().max().item()):
        raise UnsupportedParameterError(
            f"{type(model).__name__} gives other outputs for the same inputs, in eval mode; take out what is random in its forward pass."
        )


def check_rows_by_example(uses: Sequence[Use], g: Sequence[Float[Tensor, "2 B ..."]]) -> None:
    """Raise unless a vector that is zero but for the first example, and one but for the last, reach that example's rows alone."""
    for use, (first, last) in zip(uses, g, strict=True):
        example = use.rows.example_of_each(first.device)
        if first[example != 0].count_nonzero() or last[example != use.n_examples - 1].count_nonzero():
            raise UnsupportedParameterError(
                f"{use.parameters[0]!r} is used by {use.call} with rows that are not grouped by example: put the batch axis first, "
                "and keep the examples of a batch apart, or freeze it (requires_grad_(False))."
            )


def check_gradients(
    uses: Sequence[Use],
    g: Sequence[Float[Tensor, "B ..."]],
    f: Tensor,
    v: Float[Tensor, "N ..."],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Raise unless the gradients that the uses give for v add up to those of autograd."""
    expected = torch.autograd.grad(
        f, list(parameters.values()), v, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    largest = max(gradient.abs().max().item() for gradient in expected)
    for (name, parameter), truth in zip(parameters.items(), expected, strict=True):
        found = example_gradients(name, uses, [g_use[None] for g_use in g]).sum((0, 1)).to(truth.dtype)
        allowed = _tolerance(parameter) * (truth.norm() + found.norm()) + torch.finfo(truth.dtype).eps * largest
        if not (found - truth).norm() <= allowed:
            calls = ", ".join(sorted({use.call for use in uses if name in use.parameters}))
            raise UnsupportedParameterError(
                f"{name!r} is used by {calls}, but not by that alone: part of its gradient comes from a call that cannot be seen (compiled "
                "or traced code, a custom autograd function, an in-place operation on a view); write it with plain calls, or freeze it "
                "(requires_grad_(False))."
            )


def _tolerance(x: Tensor) -> float:
    """Relative rounding error that two orders of the same sums may differ by."""
    return 10 * torch.finfo(x.dtype).eps ** 0.5


def check_covered(uses: Sequence[Use], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise unless every parameter has a use."""
    covered = {name for use in uses for name in use.parameters}
    for name in parameters:
        if name not in covered:
            raise UnsupportedParameterError(
                f"{name!r} requires grad but has no gradient (it is not used in the forward pass, or in compiled code alone); freeze it "
                "(requires_grad_(False))."
            )


def versions(uses: Sequence[Use]) -> list[tuple[Use, Tensor, int]]:
    """The tensors that uses keep of the forward pass, with their versions: a detached tensor shares the counter of the one that the
    model goes on with.
    """
    return [(use, t, t._version) for use in uses for t in vars(use).values() if isinstance(t, Tensor)]


def check_unchanged(kept: Sequence[tuple[Use, Tensor, int]]) -> None:
    """Raise if a tensor of `versions` was changed since."""
    for use, tensor, version in kept:
        if tensor._version != version:
            raise UnsupportedParameterError(
                f"an input of {use.call} was changed in place after the call; make the operation that follows out of place."
            )
