"""How a parameter enters the uses that share its Kronecker block, and which of its factors are kept whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac.approximation import KfacApprox
from laplace_ws.kfac.embedding_use import EmbeddingUse
from laplace_ws.kfac.uses import MatrixUse, Use

LARGEST_DENSE_VECTOR = 4096
"""Vectors (biases, scales, affine parameters) with more entries keep only the diagonal of their block, to fit in memory."""
LARGEST_DENSE_VOCABULARY = 8192
"""Embeddings with more rows have no dense input factor, which K-FAC-reduce needs; "auto" gives them K-FAC-expand."""


@dataclass(frozen=True)
class Role:
    """How a parameter enters its uses, and what block that gives."""

    kind: str  # "matrix": a weight; "bias": bias of matrix uses only; "vector": elementwise in at least one use
    approx: KfacApprox
    diagonal_A: bool = False
    diagonal_B: bool = False
    output_axes: tuple[int, ...] = (0,)
    groups: int = 1
    too_wide: tuple[str, ...] = ()  # the factors of which max_factor_dim leaves only the diagonal, in words

    @property
    def form(self) -> tuple[Any, ...]:
        """What the factors of all batches must have in common to be added up."""
        return self.kind == "matrix", self.diagonal_A, self.diagonal_B, self.output_axes, self.groups > 1

    @classmethod
    def of(
        cls, name: str, parameter: Tensor, uses: Sequence[Use], approx: KfacApprox, max_factor_dim: int | None
    ) -> Role:
        """The role of a parameter in the uses of one batch.

        Args:
            name: of the parameter.
            parameter: the parameter.
            uses: of it.
            approx: expand or reduce.
            max_factor_dim: see `KronAccumulator`.

        Raises:
            UnsupportedParameterError: they share no Kronecker block.
        """
        if not all(use.is_known for use in uses):
            raise UnsupportedParameterError(
                f'backend="{uses[0].call}" does not see how {name!r} is used, so that it has no Kronecker factors; choose '
                'hessian_structure="diag", "full" or "lowrank", or backend="native".'
            )
        kinds = {_kind(name, use) for use in uses}
        if "matrix" in kinds:
            diagonal_A = _has_diagonal_inputs(name, uses, kinds, approx, max_factor_dim)
            first = next(use for use in uses if isinstance(use, MatrixUse))
            *_, n_outputs, n_inputs = first.axes.sizes
            wide_A = not diagonal_A and is_too_wide(n_inputs, max_factor_dim)
            wide_B = is_too_wide(n_outputs, max_factor_dim)
            return cls(
                "matrix",
                approx,
                diagonal_A=diagonal_A or wide_A,
                diagonal_B=wide_B,
                output_axes=first.output_axes,
                groups=first.groups,
                too_wide=(
                    *([f"A ({n_inputs:,} rows)"] if wide_A else []),
                    *([f"B ({n_outputs:,} rows)"] if wide_B else []),
                ),
            )
        if any(use.hides_matrix for use in uses) and parameter.ndim > 1 and parameter.numel() > LARGEST_DENSE_VECTOR:
            calls = " and ".join(sorted({use.call for use in uses}))
            raise UnsupportedParameterError(
                f"{name!r} has no Kronecker factors, as it does not enter {calls} as it is; make the masks or products of weights that it "
                'is part of permanent (torch.nn.utils.prune.remove(module, "weight") for pruned layers), freeze it '
                '(requires_grad_(False)), or choose hessian_structure="diag" or "lowrank".'
            )
        kind = "bias" if kinds == {"bias"} else "vector"
        n = parameter.numel()
        is_wide = n <= LARGEST_DENSE_VECTOR and is_too_wide(n, max_factor_dim)
        too_wide = (f"B ({n:,} rows)",) if is_wide else ()
        return cls(kind, approx, diagonal_B=is_wide or n > LARGEST_DENSE_VECTOR, too_wide=too_wide)


def chosen(approx: KfacApprox, uses: Sequence[Use], in_reduce_setting: bool) -> KfacApprox:
    """The approximation that is meant, "auto" decided."""
    too_large = any(isinstance(u, EmbeddingUse) and u.weight_shape[0] > LARGEST_DENSE_VOCABULARY for u in uses)
    return approx.decided(in_reduce_setting and not too_large)


def is_too_wide(n_rows: int, max_factor_dim: int | None) -> bool:
    """Whether only the diagonal of a factor is kept, see `KronAccumulator`."""
    return max_factor_dim is not None and n_rows > max_factor_dim


def _kind(name: str, use: Use) -> str:
    if isinstance(use, MatrixUse):
        return "matrix" if name == use.weight else "bias"
    return "vector"


def _has_diagonal_inputs(
    name: str, uses: Sequence[Use], kinds: set[str], approx: KfacApprox, max_factor_dim: int | None
) -> bool:
    """Whether the input factor is diagonal by nature; raises where the uses of a weight share no Kronecker block."""
    forms = {(use.output_axes, use.groups, use.diagonal_inputs) for use in uses if isinstance(use, MatrixUse)}
    if kinds != {"matrix"} or len(forms) > 1:
        calls = " and ".join(sorted({use.call for use in uses}))
        raise UnsupportedParameterError(
            f"{name!r} is used by {calls} in roles that share no Kronecker block; untie it, freeze it (requires_grad_(False)) "
            'or choose hessian_structure="diag".'
        )
    diagonal = any(form[2] for form in forms) and approx is KfacApprox.EXPAND
    vocabulary = max((use.weight_shape[0] for use in uses if isinstance(use, EmbeddingUse)), default=0)
    if not diagonal and vocabulary > LARGEST_DENSE_VOCABULARY and not is_too_wide(vocabulary, max_factor_dim):
        raise UnsupportedParameterError(
            f"K-FAC-reduce of {name!r} needs a dense input factor of {vocabulary}×{vocabulary} (limit {LARGEST_DENSE_VOCABULARY}); "
            f'choose kfac_approx={{"{name}": "expand"}}, keep its diagonal alone (max_factor_dim={LARGEST_DENSE_VOCABULARY}) or freeze it '
            "(requires_grad_(False))."
        )
    return diagonal
