"""Checks what a backend reports about a model against autograd, on a few examples, before any of it is trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.anatomy import Anatomy
from laplace_ws.curvature.backend import Backend, memory_for_columns
from laplace_ws.curvature.batch_axis import RowsElsewhere
from laplace_ws.curvature.finite import check_finite_gradients
from laplace_ws.curvature.forward import (
    N_PROBED,
    check_examples_apart,
    check_same_outputs,
    outputs_with_gradient,
    probe,
    random_state_after_refusal,
    tolerance,
)
from laplace_ws.curvature.inputs import ModelInputs, leaves, own_copy
from laplace_ws.curvature.models import check_visible
from laplace_ws.curvature.setting import parameters_in_reduce_setting
from laplace_ws.curvature.watch import final_operation
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac import EmbeddingUse, MatrixUse, Use, example_gradients, has_small_rows

SMALL_COLUMN_BYTES = 2**26
"""Columns that take fewer bytes, at the outputs of all uses together, never require memory to be saved."""


class LinearisationCheck:
    """Checks what a backend reports about a model against autograd: on a few examples of the first batch, and again whenever the model uses
    its parameters differently from any batch before.

    What was found is kept from pass to pass, and forgotten when modules, their hooks, their attributes or the parameters are others. What
    it does not see are changes within an object that a module refers to, such as a dictionary of settings (`forget` sees to them), and
    rows of a layer that belong to other examples from one batch to the next while their number stays.

    Args:
        backend: the backend that runs the model.
        model: the network.

    Attributes:
        column_bytes_per_example: bytes that a column takes per example at the outputs of all uses, as measured on the largest examples
            that were checked.
        positions: by weight, the sharing positions that an example has at all uses of it together, as measured on the same examples; a
            look-up in a table, and what is no linear map, has none.
        final_operation: what makes the outputs into probabilities, see `watch.final_operation`, as the last check found it.
        small_rows: parameters whose gradients of an example need not be formed in full, see `kfac.has_small_rows`.
    """

    def __init__(self, backend: Backend, model: nn.Module):
        self.backend = backend
        self.model = model
        self.column_bytes_per_example: float = 0.0
        self.positions: Mapping[str, float] = {}
        self.final_operation: str | None = None
        self.small_rows: frozenset[str] = frozenset()
        self._parameters: Mapping[str, nn.Parameter] = {}
        self._anatomy: Anatomy | None = None
        self._signatures: set[tuple[Any, ...]] = set()
        self._most_examples = self._largest_example = 0
        self._in_reduce_setting: frozenset[str] | None = None

    def start(self, x: ModelInputs, parameters: Mapping[str, nn.Parameter]) -> None:
        """Check a few examples of the first batch of a pass, before any work is done on it, unless the network has been checked.

        Args:
            x: the batch.
            parameters: those that are covered, by name.
        """
        self.begin(parameters)
        # one example does not show whether examples are kept apart, and a small one not what memory a large one takes
        if min(len(x), N_PROBED) > self._most_examples or _example_size(x) > self._largest_example:
            self.run(probe(x))

    @property
    def has_run(self) -> bool:
        """Whether there was a check since the findings were last forgotten."""
        return self._most_examples > 0

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Begin a pass: discard the findings if the network or its covered parameters have changed."""
        self._parameters = parameters
        anatomy = Anatomy.of(self.model, parameters)
        if self._anatomy is None or self._anatomy.facts != anatomy.facts:
            check_visible(self.model, parameters.values())
            self._anatomy = anatomy
            self.forget()

    def forget(self) -> None:
        """Check anew at the next pass."""
        self.backend.forget()
        self._signatures.clear()
        self._most_examples = self._largest_example = 0
        self._in_reduce_setting = None

    def knows(self, uses: Sequence[Use]) -> bool:
        """Whether a batch with uses like these has been checked."""
        return use_signature(uses) in self._signatures

    def run(self, x: ModelInputs) -> Findings:
        """Check a batch, see `check_linearisation`."""
        found = check_linearisation(self.backend, self.model, x, self._parameters)
        self.final_operation = found.final_operation
        self.small_rows = frozenset(name for name in self._parameters if has_small_rows(name, found.uses))
        known = self._in_reduce_setting
        self._in_reduce_setting = found.in_reduce_setting if known is None else known & found.in_reduce_setting
        self._signatures.add(use_signature(found.uses))
        self._most_examples = max(self._most_examples, min(len(x), N_PROBED))
        if (size := _example_size(x)) >= self._largest_example:
            self._largest_example, self.column_bytes_per_example = size, found.column_bytes / len(x)
            self.positions = _positions(found.uses)
        return found

    @property
    def in_reduce_setting(self) -> frozenset[str]:
        """Parameters that all checked examples showed to be in the reduce setting, see `parameters_in_reduce_setting`."""
        return self._in_reduce_setting or frozenset()

    @in_reduce_setting.setter
    def in_reduce_setting(self, names: frozenset[str]) -> None:
        self._in_reduce_setting = names

    def n_parts(self, n_examples: int, device: torch.device) -> int:
        """Into how many parts to split a batch, so that a column of each takes little memory, as measured by the last check."""
        little = max(memory_for_columns(device), SMALL_COLUMN_BYTES)
        return max(1, math.ceil(n_examples * self.column_bytes_per_example / little))


def _example_size(x: ModelInputs) -> int:
    """Entries that one example has in the inputs; of examples of unequal size, their mean."""
    return sum(leaf.numel() for leaf in leaves(x) if isinstance(leaf, Tensor)) // len(x)


def _positions(uses: Sequence[Use]) -> dict[str, float]:
    """See `LinearisationCheck.positions`."""
    sums: dict[str, float] = {}
    for use in uses:
        if isinstance(use, MatrixUse) and use.weight is not None and not isinstance(use, EmbeddingUse):
            sums[use.weight] = sums.get(use.weight, 0.0) + float(torch.as_tensor(use.n_positions).double().mean())
    return sums


def use_signature(uses: Sequence[Use]) -> tuple[Any, ...]:
    """What distinguishes one way of using the parameters from another: calls, and rows per example where none are declared.

    A single example does not show how rows belong to examples.
    """
    return tuple(
        (use.call, use.parameters, use.rows.n_examples > 1, use.rows.counts if use.rows.example is None else None)
        for use in uses
    )


@dataclass(frozen=True)
class Findings:
    """What the check of a batch reveals.

    Attributes:
        uses: of the parameters.
        column_bytes: bytes that a column takes at the outputs of all uses.
        final_operation: what makes the outputs into probabilities, if anything does.
        in_reduce_setting: parameters in the reduce setting.
    """

    uses: Sequence[Use]
    column_bytes: int
    final_operation: str | None
    in_reduce_setting: frozenset[str]


def check_linearisation(
    backend: Backend, model: nn.Module, x: ModelInputs, parameters: Mapping[str, nn.Parameter]
) -> Findings:
    """Check the uses and gradients of a batch against autograd.

    A use that a backend cannot see, an operation that mixes examples, or rows in an order other than by example would silently give
    curvature of the wrong scale.

    Raises:
        UnsupportedParameterError: names the parameter, and what is wrong with its uses.
        InvalidBatchError: the outputs or their gradients are not finite.
    """
    backend.forget()
    while True:
        try:
            return _check_once(backend, model, x, parameters)
        except RowsElsewhere:
            continue


def _check_once(backend: Backend, model: nn.Module, x: ModelInputs, parameters: Mapping[str, nn.Parameter]) -> Findings:
    """Raises `RowsElsewhere` where a repetition may find other rows."""
    with random_state_after_refusal(x.device):
        f = outputs_with_gradient(model, x)  # before the backend, which might hide what it does
        with (
            backend.linearise(model, own_copy(x), parameters) as linearisation,
            torch.autocast(x.device.type, enabled=False),
        ):
            check_same_outputs(model, f, linearisation.outputs)
            generator = torch.Generator(f.device).manual_seed(0)
            v = torch.randn(f.shape, dtype=torch.float32, device=f.device, generator=generator).to(f.dtype)
            probed = [*range(min(N_PROBED, len(x)) - 1), len(x) - 1]
            singled_out = torch.zeros(len(probed), *v.shape, dtype=v.dtype, device=v.device)
            for column, n in enumerate(probed):
                singled_out[column, n] = v[n]
            # at once, as some backends treat the first column differently
            g = linearisation.pullback(torch.cat([v[None], singled_out, v[None]]))
            check_rows_by_example(backend, linearisation.uses, [g_use[1:-1] for g_use in g], probed)
            streamed: dict[int, Tensor] = {}
            linearisation.stream(v[None], streamed.__setitem__)
            by_use = [streamed[number][0] for number in range(len(linearisation.uses))]
            for gradients in ([g_use[0] for g_use in g], [g_use[-1] for g_use in g], by_use):
                check_gradients(linearisation.uses, gradients, f, v, parameters)
            uses = linearisation.uses
            found = Findings(
                uses,
                linearisation.column_bytes,
                final_operation(f),
                parameters_in_reduce_setting(uses, [g_use[:1] for g_use in g], f.ndim),
            )
        check_examples_apart(model, x, f)
    return found


def check_rows_by_example(
    backend: Backend, uses: Sequence[Use], g: Sequence[Float[Tensor, "K B ..."]], probed: Sequence[int]
) -> None:
    """Raise unless vectors that are non-zero for a single example each, `probed`, reach only the rows of that example."""
    wrong = misplaced_rows(uses, g, probed)
    if not wrong:
        return
    use = wrong[0][0]
    if backend.rows_are_elsewhere([use for use, _ in wrong], use.n_examples, [size for _, size in wrong]):
        raise RowsElsewhere
    raise UnsupportedParameterError(
        f"{use.parameters[0]!r} is used by {use.call} with rows that are not grouped by example: put the batch axis first, "
        "and keep the examples of a batch apart, or freeze it (requires_grad_(False))."
    )


def misplaced_rows(
    uses: Sequence[Use], g: Sequence[Float[Tensor, "K B ..."]], probed: Sequence[int]
) -> list[tuple[Use, torch.Size]]:
    """Uses of which vectors that are non-zero for a single example each, `probed`, reach rows of others; with the sizes of the outputs."""
    wrong: list[tuple[Use, torch.Size]] = []
    for use, columns in zip(uses, g, strict=True):
        example = use.rows.example_of_each(columns.device)
        if any(column[example != n].count_nonzero() for n, column in zip(probed, columns, strict=True)):
            wrong.append((use, columns.shape[1:]))
    return wrong


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
        # under autocast gradients are rounded more than parameters
        rounding = max(tolerance(torch.finfo(t.dtype).eps) for t in (parameter, *g))
        found = example_gradients(name, uses, [g_use[None] for g_use in g]).sum((0, 1)).to(truth.dtype)
        allowed = rounding * (truth.norm() + found.norm()) + torch.finfo(truth.dtype).eps * largest
        if not (found - truth).norm() <= allowed:
            check_finite_gradients({name: truth})
            if (found - truth).norm() <= allowed + rounding**2 * _summed_magnitudes(name, uses, g):
                continue
            calls = ", ".join(sorted({use.call for use in uses if name in use.parameters}))
            raise UnsupportedParameterError(
                f"{name!r} is used by {calls}, but not by that alone: part of its gradient comes from a call that cannot be seen (compiled "
                "or traced code, a custom autograd function, an in-place operation on a view); write it with plain calls, or freeze it "
                "(requires_grad_(False))."
            )


def _summed_magnitudes(name: str, uses: Sequence[Use], g: Sequence[Float[Tensor, "B ..."]]) -> Tensor:
    """Norm of what a gradient would be if none of its terms cancelled another: what its rounding is judged by where they all do.

    A bias before a normalisation over positions, for instance, has a gradient of zero, of which only the rounding of its terms is left.
    """
    sums = example_gradients(name, [use.magnitudes() for use in uses], [g_use.abs()[None] for g_use in g])
    return sums.sum((0, 1)).norm()


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
    """The tensors that uses keep from the forward pass, with their versions: a detached tensor shares the version counter of the one that
    the model goes on to use.
    """
    return [(use, t, t._version) for use in uses for t in vars(use).values() if isinstance(t, Tensor)]


def check_unchanged(kept: Sequence[tuple[Use, Tensor, int]]) -> None:
    """Raise if a tensor of `versions` has been changed since."""
    for use, tensor, version in kept:
        if tensor._version != version:
            raise UnsupportedParameterError(
                f"an input of {use.call} was changed in place after the call; make the operation that follows out of place."
            )
