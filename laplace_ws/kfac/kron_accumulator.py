"""Sums over the data of the Kronecker factors of every parameter."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from math import prod

import torch
from jaxtyping import Bool
from torch import Tensor

from laplace_ws.distributed import Processes
from laplace_ws.errors import CurvatureWarning, UnsupportedParameterError
from laplace_ws.kfac import factors
from laplace_ws.kfac.absent_use import AbsentUse
from laplace_ws.kfac.accumulator import Accumulator, OutputGradients, has_one_position
from laplace_ws.kfac.approximation import KfacApprox
from laplace_ws.kfac.conv_gram import PatchGram, Plan
from laplace_ws.kfac.conv_use import ConvUse
from laplace_ws.kfac.roles import Role, chosen, is_too_wide
from laplace_ws.kfac.uses import MatrixUse, Use, at_least_float32
from laplace_ws.matrices import Kron, KronBlock
from laplace_ws.matrices.axes import WeightAxes
from laplace_ws.matrices.kron import at_least_one, of_groups
from laplace_ws.memory import check_memory, in_words

MOST_NAMED = 4
"""Factors that a warning names."""
MOST_SIZES = 4
"""Number of image sizes for one convolution whose products are kept separately: each takes as much memory as the factor."""


class KronAccumulator(Accumulator):
    """Sums the Kronecker factors of every parameter.

    Args:
        parameters: the parameters to cover, by name.
        approximations: approximation of each parameter.
        factor_precision: "float32", "tf32" or "bf16", see `FactorPrecision`.
        max_factor_dim: rows of the widest factor that is kept whole; of wider ones only the diagonal is computed. None for no limit.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        approximations: Mapping[str, KfacApprox],
        factor_precision: str | factors.FactorPrecision = "float32",
        max_factor_dim: int | None = None,
    ):
        super().__init__(parameters)
        self.approximations = approximations
        self.factor_precision: factors.FactorPrecision = factors.FactorPrecision(factor_precision)
        self.max_factor_dim = max_factor_dim
        self._sums: dict[str, _FactorSums] = {}
        self._said = False
        self._squares_alone = False
        self._squares: dict[str, float | Tensor] = {}  # ‖g‖² of the first batch, of weights with reduce

    def start_batch(self, uses: Sequence[Use], in_reduce_setting: Collection[str] = ()) -> None:
        """See `Accumulator.start_batch`; adds the input factors. "auto" is decided by the first batch, for all."""
        super().start_batch([use for use in uses if not isinstance(use, AbsentUse)], in_reduce_setting)
        by_parameter = {
            name: [use for use in uses if name in use.parameters and not isinstance(use, AbsentUse)]
            for name in self.parameters
        }
        if not self._sums:
            self._check_memory(by_parameter)
        for name, parameter in self.parameters.items():
            own = by_parameter[name]
            if not own:
                continue
            known = self._sums.get(name)
            approx = (
                chosen(self.approximations[name], own, name in in_reduce_setting)
                if known is None
                else known.role.approx
            )
            role = Role.of(name, parameter, own, approx, self.max_factor_dim)
            if known is None:
                self._sums[name] = _FactorSums(parameter, role)
                if role.kind == "matrix" and approx is KfacApprox.REDUCE:
                    self._squares[name] = 0.0
            if role.form != self._sums[name].role.form:
                raise UnsupportedParameterError(
                    f"{name!r} is used in one batch otherwise than in another, in roles that share no Kronecker block; untie it, freeze it "
                    '(requires_grad_(False)) or choose hessian_structure="diag".'
                )
            with factors.products_in(self.factor_precision):
                self._sums[name].add_inputs(role, own)
        self._squares_alone = len(self._uses) == 1 and all(
            self._sums[name].needs_squares_alone(has_one_position(self._uses[0]))
            for name in self._uses[0].parameters
            if name in self._sums
        )
        of_vectors = {name for name in self._sums if self._needs_example_gradients(name)}
        self._uses = [use if of_vectors & set(use.parameters) else use.without_inputs() for use in uses]

    def _check_memory(self, by_parameter: Mapping[str, Sequence[Use]]) -> None:
        """Raise `NotEnoughMemoryError` where the factors, and the copies that `result` gives, take more memory than is free."""
        entries: dict[str, int] = {}
        for name, uses in by_parameter.items():
            use = next((use for use in uses if isinstance(use, MatrixUse) and use.weight == name), None)
            if use is not None:
                *groups, n_outputs, n_inputs = use.axes.sizes
                is_diagonal = use.diagonal_inputs and self.approximations[name] is not KfacApprox.REDUCE
                has_diagonal_A = is_diagonal or is_too_wide(n_inputs, self.max_factor_dim)
                of_A = n_inputs if has_diagonal_A else n_inputs**2
                of_B = n_outputs if is_too_wide(n_outputs, self.max_factor_dim) else n_outputs**2
                entries[name] = prod(groups) * (of_A + of_B)
        if not entries:
            return
        largest = max(entries, key=lambda name: entries[name])
        p = self.parameters[largest]
        share = in_words(2 * entries[largest] * p.element_size())
        check_memory(
            2 * sum(entries.values()) * p.element_size(),
            p.device,
            f"a pair of Kronecker factors for each of {len(entries)} weights, {share} of it for {largest!r} {tuple(p.shape)},",
            'choose hessian_structure="diag" or "lowrank", keep only the diagonals of wide factors (max_factor_dim=1024), freeze the '
            "largest weights (requires_grad_(False)), or name others by subset_of_weights",
        )

    @property
    def needs_squares_alone(self) -> bool:
        """See `Accumulator.needs_squares_alone`: where all gradient factors are diagonals."""
        return self._squares_alone

    def add(self, number: int, g: Tensor) -> None:
        """See `Accumulator.add`."""
        if isinstance(self._uses[number], AbsentUse):
            return
        with factors.products_in(self.factor_precision):
            super().add(number, g)

    def _needs_example_gradients(self, name: str) -> bool:
        if name not in self._sums:  # it has had no part in any batch yet
            return False
        role = self._sums[name].role
        return role.kind == "vector" or (role.kind == "bias" and role.diagonal_B)

    def _piece(self, name: str, gradients: OutputGradients) -> Tensor:
        role = self._sums[name].role
        if self._needs_example_gradients(name):
            of_examples = gradients.of_examples(name)
            return of_examples.reshape(*of_examples.shape[:2], -1)
        is_bias = role.kind == "bias"
        if role.approx is KfacApprox.EXPAND:
            return gradients.squares() if role.diagonal_B else gradients.gram(is_bias)
        if name in self._squares:
            self._squares[name] = self._squares[name] + at_least_float32(gradients.g).square().sum()
        return gradients.sum(is_bias)

    def _add_sum(self, name: str, pieces: Tensor) -> None:
        self._sums[name].add_columns(pieces)

    def end_batch(self) -> None:
        """See `Accumulator.end_batch`; warns, after the first batch, of factors that vanish or are too wide."""
        super().end_batch()
        self._say_what_is_diagonal()
        squares, self._squares = self._squares, {}
        if not squares:
            return
        is_vanishing = torch.stack([self._sums[name].vanishes_beside(square) for name, square in squares.items()])
        vanishing = [name for name, vanishes in zip(squares, is_vanishing.tolist(), strict=True) if vanishes]
        if vanishing:
            names = ", ".join(map(repr, vanishing))
            warnings.warn(
                f"K-FAC-reduce gives no curvature for {names}: the gradients at the sharing positions of an example cancel in their "
                f'sum, as where scores of separate positions meet in one softmax; choose kfac_approx={{"{vanishing[0]}": "expand"}}.',
                CurvatureWarning,
                stacklevel=2,
            )

    def _say_what_is_diagonal(self) -> None:
        """Warn, once, of the factors that `max_factor_dim` has made diagonal."""
        if self._said or self.max_factor_dim is None:
            return
        self._said = True
        found = [f"{what} of {name!r}" for name, sums in self._sums.items() for what in sums.role.too_wide]
        if found:
            shown = found if len(found) <= MOST_NAMED else [*found[:MOST_NAMED], f"{len(found) - MOST_NAMED} others"]
            warnings.warn(
                f"max_factor_dim={self.max_factor_dim} leaves only the diagonal of {', '.join(shown)}: correlations along these axes are "
                "lost; raise it where memory allows.",
                CurvatureWarning,
                stacklevel=2,
            )

    def sum_over(self, processes: Processes) -> None:
        """See `Accumulator.sum_over`."""
        numbers = processes.gather({name: sums.n_inputs for name, sums in self._sums.items()})
        plain: list[Tensor] = []
        symmetric: list[Tensor] = []
        for name, sums in self._sums.items():
            sums.n_inputs = factors.total(of_process[name] for of_process in numbers)
            for factor, is_diagonal in sums.factors():
                (plain if is_diagonal else symmetric).append(factor)
        processes.sum_(plain, symmetric)

    def result(self) -> Kron:
        """See `Accumulator.result`; the curvature of what no example was routed to is zero."""
        blocks = {name: sums.block() for name, sums in self._sums.items()}
        absent = {
            name: KronBlock(p.shape, p.new_zeros(p.numel()), diagonal_B=True)
            for name, p in self.parameters.items()
            if name not in blocks
        }
        return Kron({name: (blocks | absent)[name] for name in self.parameters})


class _FactorSums:
    """Sums of the factors of one parameter, over batches.

    Args:
        parameter: the parameter.
        role: how it enters its uses.
    """

    def __init__(self, parameter: Tensor, role: Role):
        self.role = role
        self._shape = parameter.shape
        self._A: Tensor | None = None
        self._patch_grams: dict[Plan, PatchGram] = {}
        self.n_inputs: float | Tensor = 0
        size: tuple[int, ...] = (parameter.numel(),) * (1 if role.diagonal_B else 2)
        if role.kind == "matrix":
            *groups, n_outputs, _ = WeightAxes(parameter.shape, role.output_axes, role.groups).sizes
            size = (*groups, n_outputs) if role.diagonal_B else (*groups, n_outputs, n_outputs)
        self._B = parameter.new_zeros(size)

    def add_inputs(self, role: Role, uses: Sequence[Use]) -> None:
        """Add to the input factor what the uses in one batch contribute."""
        self.role = role
        if role.kind != "matrix":
            return
        matrix_uses = [use for use in uses if isinstance(use, MatrixUse)]
        n_examples = matrix_uses[0].n_examples
        n_positions = factors.total(use.n_positions for use in matrix_uses)
        if role.approx is KfacApprox.REDUCE:
            a = factors.mean_over_positions([use.input_sum() for use in matrix_uses], n_positions)
            self._A = (
                factors.accumulated(self._A, a.square().sum(-2)) if role.diagonal_A else factors.add_gram(self._A, a)
            )
            self.n_inputs = self.n_inputs + n_examples
            return
        self.n_inputs = self.n_inputs + _number_of_inputs(n_positions, n_examples)
        for use in matrix_uses:
            if role.diagonal_A:
                self._A = factors.accumulated(self._A, use.input_squares())
                continue
            plan = use.plan if isinstance(use, ConvUse) else None
            if plan is None:
                self._A = factors.accumulated(self._A, use.input_gram())
            else:
                assert isinstance(use, ConvUse)
                self._patch_grams.setdefault(plan, PatchGram(plan)).add(at_least_float32(use.x))
        if len(self._patch_grams) > MOST_SIZES:
            self._put_together()

    def needs_squares_alone(self, has_one_position: bool) -> bool:
        """Whether of the columns only the sum of their squares counts, at each output and position."""
        sums_positions = self.role.kind != "matrix" or self.role.approx is KfacApprox.REDUCE
        return self.role.kind != "vector" and self.role.diagonal_B and (has_one_position or not sums_positions)

    def factors(self) -> list[tuple[Tensor, bool]]:
        """The sums of the factors, and whether each is a diagonal."""
        self._put_together()
        of_B = [(self._B, self.role.diagonal_B)]
        return of_B if self._A is None else [*of_B, (self._A, self.role.diagonal_A)]

    def _put_together(self) -> None:
        """Assemble the input factor from the products of pixels."""
        for gram in self._patch_grams.values():
            self._A = factors.accumulated(self._A, gram.result())
        self._patch_grams.clear()

    def add_columns(self, pieces: Tensor) -> None:
        """Add to the gradient factor the pieces of all uses in one batch, see `KronAccumulator`."""
        if self.role.diagonal_B and self.role.kind != "matrix":
            self._B += pieces.square().sum((0, 1))
        elif self.role.diagonal_B:
            self._B += pieces if self.role.approx is KfacApprox.EXPAND else pieces.square().sum((-3, -2))
        elif self.role.kind != "vector" and self.role.approx is KfacApprox.EXPAND:
            self._B += pieces
        else:
            self._B = factors.add_gram(self._B, pieces.flatten(-3, -2))

    def vanishes_beside(self, square: float | Tensor) -> Bool[Tensor, ""]:
        """Whether the gradient factor is no more than the rounding of gradients with this squared norm."""
        rounding = max(1e-6, 100 * torch.finfo(self._B.dtype).eps ** 2)
        diagonal = self._B if self.role.diagonal_B else self._B.diagonal(dim1=-2, dim2=-1)
        return diagonal.sum() < rounding * square

    def block(self) -> KronBlock:
        """The block given by the sums so far."""
        approx = None if self.role.kind == "vector" else self.role.approx.value
        if self.role.kind != "matrix":
            return KronBlock(self._shape, self._B.clone(), diagonal_B=self.role.diagonal_B, approx=approx)
        self._put_together()
        assert self._A is not None
        A = self._A / of_groups(at_least_one(self.n_inputs), is_diagonal=self.role.diagonal_A)
        return KronBlock(
            self._shape,
            self._B.clone(),
            A,
            self.n_inputs,
            output_axes=self.role.output_axes,
            diagonal_A=self.role.diagonal_A,
            diagonal_B=self.role.diagonal_B,
            approx=approx,
        )


def _number_of_inputs(n_positions: int | Tensor, n_examples: int) -> float | Tensor:
    """Number of positions in a batch, `[G, 1, 1]` where the groups have different ones."""
    if not isinstance(n_positions, Tensor):
        return n_positions * n_examples
    n = n_positions.sum(-1)
    return n.item() if n.ndim == 0 else n[:, None, None]
