"""Leaf modules whose parameters have a curvature block, for backends that see modules rather than calls.

To cover a module of your own, add to `MODULE_CALLS` the torch call that its forward makes; its reader in `calls.READERS` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_ws.curvature.calls import Call, read_call
from laplace_ws.curvature.operands import Operand
from laplace_ws.kfac.examples import Examples
from laplace_ws.kfac.uses import Use
from laplace_ws.models.scalars import Bias, Scale

ModuleCall = tuple[Callable[..., Any], tuple[Any, ...]]
"""A torch function and the arguments that a module's forward calls it with."""

_CONVS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def _conv(m: Any, x: Tensor) -> ModuleCall:
    conv = next(function for kind, function in _CONVS.items() if isinstance(m, kind))
    if m.padding_mode == "zeros":
        return conv, (x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)
    padded = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
    return conv, (padded, m.weight, m.bias, m.stride, 0, m.dilation, m.groups)


def _conv_transpose(m: Any, x: Tensor) -> ModuleCall:
    n_axes = m.weight.ndim - 2
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n_axes - 1]
    return function, (x, m.weight, m.bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation)


def _batch_norm(m: Any, x: Tensor) -> ModuleCall:
    by_batch = m.training or m.running_mean is None
    return F.batch_norm, (x, m.running_mean, m.running_var, m.weight, m.bias, by_batch, 0.0, m.eps)


def _instance_norm(m: Any, x: Tensor) -> ModuleCall:
    by_input = m.training or not m.track_running_stats
    return F.instance_norm, (x, m.running_mean, m.running_var, m.weight, m.bias, by_input, 0.0, m.eps)


def _embedding(m: Any, x: Tensor) -> ModuleCall:
    return F.embedding, (x, m.weight, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse)


MODULE_CALLS: dict[type[nn.Module], Callable[[Any, Tensor], ModuleCall]] = {
    nn.Linear: lambda m, x: (F.linear, (x, m.weight, m.bias)),
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose1d: _conv_transpose,
    nn.ConvTranspose2d: _conv_transpose,
    nn.ConvTranspose3d: _conv_transpose,
    nn.Embedding: _embedding,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
    nn.LayerNorm: lambda m, x: (F.layer_norm, (x, m.normalized_shape, m.weight, m.bias, m.eps)),
    nn.RMSNorm: lambda m, x: (F.rms_norm, (x, m.normalized_shape, m.weight, m.eps)),
    nn.GroupNorm: lambda m, x: (F.group_norm, (x, m.num_groups, m.weight, m.bias, m.eps)),
    nn.PReLU: lambda m, x: (F.prelu, (x, m.weight)),
    Bias: lambda m, x: (torch.add, (x, m.bias)),
    Scale: lambda m, x: (torch.mul, (x, m.scale)),
}
"""The call that a module makes on its input, by class; a subclass with its own forward has none."""


NATIVE_INSTEAD = 'freeze it (requires_grad_(False)) or choose backend="native"'
"""What to do about what a backend does not cover."""


def module_call(module: nn.Module) -> Callable[[Any, Tensor], ModuleCall] | None:
    """The entry of `MODULE_CALLS` for a module, None where there is none."""
    for kind in type(module).__mro__:
        if kind in MODULE_CALLS:
            return MODULE_CALLS[kind] if type(module).forward is kind.forward else None
    return None


def module_uses(
    module: nn.Module, x: Tensor, output: Tensor, parameters: Mapping[str, nn.Parameter], examples: Examples
) -> list[Use]:
    """Uses that one call of a module makes of the parameters.

    Args:
        module: a module with an entry in `MODULE_CALLS`.
        x: its input, detached.
        output: its output.
        parameters: the parameters to cover, by name.
        examples: the examples of the batch.

    Raises:
        UnreadableCallError: the module uses a parameter in a way that has no block.
    """
    read = module_call(module)
    assert read is not None
    function, arguments = read(module, x)
    names = {id(p): name for name, p in parameters.items()}
    operands = {id(p): Operand(names[id(p)], p, p) for p in module.parameters(recurse=False) if id(p) in names}
    return read_call(function, Call(type(module).__name__, operands, output, examples), *arguments)
