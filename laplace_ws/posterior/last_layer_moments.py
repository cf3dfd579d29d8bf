"""Covariances of the outputs of a last layer in closed form, without a backward pass for each output.

Where outputs are y = W φ + b, the gradient of output c in W is e_c φᵀ. With Σ diagonal in coordinates Q_B ⊗ Q_A, of variances v_oi there,
the covariance of the outputs at an input is Q_B diag(w) Q_Bᵀ with w_o = Σ_i v_oi (Q_Aᵀφ)_i²: for N inputs one product with an [I, O]
matrix, and for the C variances one more with the squares of Q_B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.curvature.backend import Linearisation
from laplace_ws.curvature.last_layer import layer_of_outputs
from laplace_ws.kfac import MatrixUse
from laplace_ws.matrices import CurvatureMatrix, Damping, Diag, Layout, Pushforward
from laplace_ws.matrices.base import by_parameter, rows_by_parameter
from laplace_ws.matrices.blocks import BlockMatrix
from laplace_ws.posterior.subset import WeightSubset

_COPIES = 4  # arrays of the size of the result that are alive at a time


def may_be_last_layer(subset: WeightSubset, output_shape: Sequence[int], H: CurvatureMatrix) -> bool:
    """Whether the covered weights could be those of one layer, with a curvature for which there is a closed form."""
    return (
        len(output_shape) > 0
        and len(subset.parameter_shapes) <= 2
        and not subset.selection
        and isinstance(H, (BlockMatrix, Diag))
    )


def bytes_per_example(output_shape: Sequence[int], layout: Layout) -> int:
    """Memory that `last_layer_moments` takes for each example."""
    n_outputs = torch.Size(output_shape).numel()
    entries = n_outputs if layout is Layout.DIAGONAL else n_outputs * output_shape[-1]
    return 8 * _COPIES * entries


def last_layer_moments(
    linearisation: Linearisation, names: Sequence[str], H: CurvatureMatrix, pushforward: Pushforward
) -> tuple[Tensor, list[Tensor]] | None:
    """Outputs f and, for each damping, their covariance in the layout of a pushforward; None unless f are the outputs of one layer.

    Args:
        linearisation: of the model at some examples.
        names: of the covered parameters.
        H: the curvature.
        pushforward: whose dampings and layout count.
    """
    use = layer_of_outputs(linearisation)
    if use is None or sorted(use.parameters) != sorted(names):
        return None
    f, layout = linearisation.outputs, pushforward.layout
    a = use.inputs().flatten(0, 1)  # [M, I], with M examples and positions
    covariances = []
    for damping in pushforward.dampings:
        parts = []
        if use.weight is not None:
            parts.append(_of_parameter(use.weight, use, a, H, damping, layout))
        if use.bias is not None:
            parts.append(_of_parameter(use.bias, use, a.new_ones(len(a), 1), H, damping, layout))
        covariances.append(_in_layout(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0], f, layout))
    return f, covariances


def _of_parameter(
    name: str, use: MatrixUse, a: Float[Tensor, "M I"], H: CurvatureMatrix, damping: Damping, layout: Layout
) -> Tensor:
    """The part of one parameter: `[M, C]`, `[M, C, C]`, or `[M, M, C, C]` over all pairs of positions."""
    basis, variances = H.basis(name), _variances(name, H, damping)
    if basis is None:
        axes = use.axes if name == use.weight else None
        variances = variances[:, None] if axes is None else axes.matrices(variances)
    v = variances.to(a.dtype)  # [O, I]
    if basis is not None:
        a = basis.rotate_inputs(a)
    Q = None if basis is None or basis.Q_B is None else basis.Q_B.to(a.dtype)
    w = (a[:, None] * a if layout is Layout.JOINT else a.square()) @ v.mT
    if layout is Layout.DIAGONAL:
        return w if Q is None else w @ Q.square().mT
    return torch.diag_embed(w) if Q is None else (Q * w[..., None, :]) @ Q.mT


def _variances(name: str, H: CurvatureMatrix, damping: Damping) -> Tensor:
    """The diagonal of (s·H + δ)⁻¹ of one parameter, in the coordinates of the matrix, float64."""
    scale, delta = damping
    of_parameter = by_parameter(delta.double(), H.shapes)[name]
    if isinstance(H, BlockMatrix):
        return 1 / (H[name].eigenvalues() * scale.double() + of_parameter)
    assert isinstance(H, Diag)
    (values,) = rows_by_parameter(H.values, H.shapes)[name]
    return 1 / (values.double() * scale.double() + of_parameter)


def _in_layout(covariance: Tensor, f: Float[Tensor, "N ... C"], layout: Layout) -> Tensor:
    """The shape that `LinearisedModel.moments` promises."""
    if layout is Layout.DIAGONAL:
        return covariance.reshape(f.shape)
    if layout is Layout.JOINT:
        return covariance.transpose(1, 2).reshape(f.numel(), f.numel())
    n_classes = f.shape[-1]
    return covariance if f.ndim < 3 else covariance.reshape(len(f), -1, n_classes, n_classes)
