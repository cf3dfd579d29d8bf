"""How columns pass backward through one module: by BackPACK's derivatives where they apply, else along its own autograd graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from backpack.core.derivatives.basederivatives import BaseDerivatives
from backpack.core.derivatives.batchnorm_nd import BatchNormNdDerivatives
from backpack.core.derivatives.conv1d import Conv1DDerivatives
from backpack.core.derivatives.conv2d import Conv2DDerivatives
from backpack.core.derivatives.conv3d import Conv3DDerivatives
from backpack.core.derivatives.elu import ELUDerivatives
from backpack.core.derivatives.leakyrelu import LeakyReLUDerivatives
from backpack.core.derivatives.linear import LinearDerivatives
from backpack.core.derivatives.logsigmoid import LogSigmoidDerivatives
from backpack.core.derivatives.maxpool1d import MaxPool1DDerivatives
from backpack.core.derivatives.maxpool2d import MaxPool2DDerivatives
from backpack.core.derivatives.maxpool3d import MaxPool3DDerivatives
from backpack.core.derivatives.relu import ReLUDerivatives
from backpack.core.derivatives.selu import SELUDerivatives
from backpack.core.derivatives.sigmoid import SigmoidDerivatives
from backpack.core.derivatives.tanh import TanhDerivatives
from torch import Tensor, nn

_Applies = Callable[[Any, int], bool]


def _is_plain_conv(module: Any, input_ndim: int) -> bool:
    return (
        module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and input_ndim == len(module.kernel_size) + 2
    )


def _is_batched(module: Any, input_ndim: int) -> bool:
    return input_ndim >= 2


def _is_pool(n_axes: int) -> _Applies:
    return lambda module, input_ndim: input_ndim == n_axes + 2 and not module.return_indices


def _is_affine_with_statistics(module: Any, input_ndim: int) -> bool:
    return not module.training and module.track_running_stats and module.affine


DERIVATIVES: dict[type[nn.Module], tuple[BaseDerivatives, _Applies]] = {
    nn.Linear: (LinearDerivatives(), _is_batched),
    nn.Conv1d: (Conv1DDerivatives(), _is_plain_conv),
    nn.Conv2d: (Conv2DDerivatives(), _is_plain_conv),
    nn.Conv3d: (Conv3DDerivatives(), _is_plain_conv),
    nn.BatchNorm1d: (BatchNormNdDerivatives(), _is_affine_with_statistics),
    nn.BatchNorm2d: (BatchNormNdDerivatives(), _is_affine_with_statistics),
    nn.BatchNorm3d: (BatchNormNdDerivatives(), _is_affine_with_statistics),
    nn.ReLU: (ReLUDerivatives(), _is_batched),
    nn.LeakyReLU: (LeakyReLUDerivatives(), _is_batched),
    nn.ELU: (ELUDerivatives(), _is_batched),
    nn.SELU: (SELUDerivatives(), _is_batched),
    nn.Tanh: (TanhDerivatives(), _is_batched),
    nn.Sigmoid: (SigmoidDerivatives(), _is_batched),
    nn.LogSigmoid: (LogSigmoidDerivatives(), _is_batched),
    nn.MaxPool1d: (MaxPool1DDerivatives(), _is_pool(1)),
    nn.MaxPool2d: (MaxPool2DDerivatives(), _is_pool(2)),
    nn.MaxPool3d: (MaxPool3DDerivatives(), _is_pool(3)),
}
"""BackPACK's derivatives that agree with autograd, and the modules and input dimensions for which they do.

Excluded are those of average pooling, which hold only in float32 and draw random numbers, and of convolutions with a padding mode other
than zeros or padding given as a string; such modules use their own autograd graph, as all others do.
"""


def derivatives_of(module: nn.Module) -> tuple[BaseDerivatives, _Applies] | None:
    """The entry of `DERIVATIVES` for a module; a subclass with a forward of its own has none."""
    for kind in type(module).__mro__:
        if kind in DERIVATIVES:
            return DERIVATIVES[kind] if type(module).forward is kind.forward else None
    return None


def stored_inputs(module: nn.Module) -> list[Tensor]:
    """The inputs that BackPACK has stored on a module."""
    stored = vars(module)
    return [stored[f"input{i}"] for i in range(len(stored)) if f"input{i}" in stored]


def stored_output(module: nn.Module) -> Tensor:
    """The output that BackPACK has stored on a module."""
    return vars(module)["output"]


def transposed_jacobian_products(module: nn.Module, inputs: Sequence[Tensor], columns: Tensor) -> list[Tensor]:
    """Columns `[K, *output]` at the output of a module pulled back to its inputs, `[K, *input]` each.

    Args:
        module: a module with the input and output that BackPACK has stored on it.
        inputs: the inputs of the module that require grad.
        columns: vectors at its output.
    """
    found = derivatives_of(module)
    is_mixed = len({t.dtype for t in (*inputs, stored_output(module), *module.parameters())}) > 1  # under autocast
    if found is not None and found[1](module, inputs[0].ndim) and not is_mixed:
        return [found[0]._jac_t_mat_prod(module, (), (), columns)]  # pyright: ignore[reportArgumentType] - unused there
    with warnings.catch_warnings():  # about calls without a batching rule, which are looped over
        warnings.simplefilter("ignore", UserWarning)
        try:
            products = torch.autograd.grad(
                stored_output(module), inputs, columns, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:
            pulled = [
                torch.autograd.grad(
                    stored_output(module), inputs, c, retain_graph=True, materialize_grads=True, allow_unused=True
                )
                for c in columns
            ]
            products = [torch.stack(g) for g in zip(*pulled, strict=True)]
    return [
        g if g is not None else columns.new_zeros(len(columns), *t.shape) for g, t in zip(products, inputs, strict=True)
    ]
