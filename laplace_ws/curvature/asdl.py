"""The ASDL backend: layer inputs and output gradients through ASDL's module hooks and operations.

ASDL runs one *operation* per module, before and after its hooks. Its own operations compute K-FAC-expand only, with
scalings of their own: Monte Carlo divided by the number of samples, a Linear on sequences without 1/R, and nothing for Conv1d, Conv3d
and GroupNorm. Here our own operation keeps what ASDL passes to it, the input and the output gradient of each call, so factors, columns
and scales are the same as in every other backend.

The operations are registered in the context of `asdl.extend`, as ASDL's Fisher makers do; the makers themselves support only two
losses and their own columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from laplace_ws.curvature.backend import Backend, ColumnwiseLinearisation
from laplace_ws.curvature.calls import UnreadableCallError
from laplace_ws.curvature.checks import check_covered, check_unchanged, versions
from laplace_ws.curvature.inputs import ModelInputs, call_model, examples_of
from laplace_ws.curvature.module_readers import MODULE_CALLS, NATIVE_INSTEAD, module_call, module_uses
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac.examples import Examples
from laplace_ws.kfac.uses import Use
from laplace_ws.threads import alone_in_libraries

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # torch.jit.script in its preconditioners
    import asdl
    from asdl.core import extend, named_supported_modules

MODULE_CALLS[asdl.Bias] = lambda m, x: (torch.add, (x, m.weight))
MODULE_CALLS[asdl.Scale] = lambda m, x: (torch.mul, (x, m.weight))


class AsdlBackend(Backend):
    """Covers parameters of modules in `MODULE_CALLS`, however often they are called, in any forward pass.

    Does not cover parameters that the forward pass uses outside a module in that table, nor modules with a full backward hook, next to
    which ASDL's own cannot be registered.
    """

    name = "asdl"

    @contextmanager
    def linearise(
        self, model: nn.Module, x: ModelInputs, parameters: Mapping[str, nn.Parameter]
    ) -> Iterator[AsdlLinearisation]:
        """See `Backend.linearise`."""
        owners = _owners(model, parameters)
        with (
            alone_in_libraries(),
            _as_found(model),
            _operations(model, owners, parameters, examples_of(x)) as operations,
        ):
            with warnings.catch_warnings():
                # of modules that are several autograd nodes; the gradient kept is that of the last node, as it should be
                warnings.filterwarnings("ignore", message="Using a non-full backward hook")
                f = call_model(model, x)
            linearisation = AsdlLinearisation(f, operations)
            check_covered(linearisation.uses, parameters)
            check_unchanged([pair for operation in operations for pair in operation.versions])
            yield linearisation


class AsdlLinearisation(ColumnwiseLinearisation):
    """Outputs of one forward pass under ASDL's hooks."""

    def __init__(self, f: Tensor, operations: Sequence[_KeepOperation]):
        self.outputs: Tensor = f.detach()
        self.uses: Sequence[Use] = [use for operation in operations for uses in operation.uses for use in uses]
        self._f = f
        self._operations = operations
        self._targets: Any = [target for operation in operations for target in operation.targets]

    def _pull(self, column: Tensor) -> list[Tensor]:
        for operation in self._operations:
            operation.output_gradients.clear()
        torch.autograd.grad(self._f, self._targets, column, retain_graph=True, allow_unused=True)
        return [
            g
            for operation in self._operations
            for g, uses in zip(operation.gradients_by_call(column), operation.uses, strict=True)
            for _ in uses
        ]


class _KeepOperation(asdl.Operation):
    """An ASDL operation that keeps the uses of each call of its module, and the gradients at their outputs.

    Attributes:
        module: the module.
        uses: uses of the parameters, for each call.
        versions: the tensors that the uses keep, as `checks.versions` gives them.
        targets: the tensors with respect to which gradients are requested, so that the backward pass goes through
            every call and computes no weight gradient.
        output_gradients: gradients at the outputs of the calls, the last call first, as the backward pass meets them.
    """

    def __init__(self, name: str, module: nn.Module, parameters: Mapping[str, nn.Parameter], examples: Examples):
        super().__init__(module, [])
        self.module = module
        self.uses: list[list[Use]] = []
        self.versions: list[tuple[Use, Tensor, int]] = []
        self.targets: list[GradientEdge | Tensor] = []
        self.output_gradients: list[Tensor] = []
        self._name, self._parameters, self._examples = name, parameters, examples
        self._shapes: list[torch.Size] = []

    def forward_pre_process(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Called before each forward of the module."""
        if not arguments:
            raise UnsupportedParameterError(
                f"{self._name!r} is called with its input by keyword, which ASDL does not see; give it by position, or choose "
                'backend="native".'
            )
        x = arguments[0]
        if x.requires_grad:
            self.targets.append(get_gradient_edge(x))
        else:  # the first layers of a network: their smallest parameter, which is cheap where there is a bias
            self.targets.append(min((p for p in module.parameters(recurse=False) if p.requires_grad), key=Tensor.numel))

    def forward_post_process(self, in_data: Tensor, out_data: Tensor) -> None:
        """Called by ASDL after each forward of the module."""
        try:
            self.uses.append(module_uses(self.module, in_data, out_data, self._parameters, self._examples))
        except UnreadableCallError as error:
            name = next(n for n, p in self._parameters.items() if any(p is own for own in self.module.parameters()))
            raise UnsupportedParameterError(
                f"{name!r} is used by {type(self.module).__name__}, {error}; {NATIVE_INSTEAD}."
            ) from None
        self.versions += versions(self.uses[-1])
        self._shapes.append(out_data.shape)

    def backward_pre_process(self, out_grads: Tensor, vector: Any = None) -> None:
        """Called by ASDL when a gradient reaches the output of a call."""
        self.output_gradients.append(out_grads)

    def gradients_by_call(self, column: Tensor) -> list[Tensor]:
        """Gradients at the outputs, in the order of the calls; zero where no call reaches the model's output."""
        if not self.output_gradients:
            return [column.new_zeros(shape) for shape in self._shapes]
        if len(self.output_gradients) < len(self._shapes):
            raise UnsupportedParameterError(
                f"{self._name!r} is called {len(self._shapes)} times, but only {len(self.output_gradients)} of the calls reach the output "
                f"(checkpointing calls it again), and ASDL does not tell which; {NATIVE_INSTEAD}."
            )
        return self.output_gradients[::-1]


def _owners(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Module]:
    """Modules that own a parameter directly, by name."""
    names = {id(p): name for name, p in parameters.items()}
    owners = {}
    for module_name, module in model.named_modules():
        own = [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names]
        if not own:
            continue
        kind = type(module).__name__
        if module_call(module) is None:
            raise UnsupportedParameterError(
                f"{own[0]!r} belongs to a {kind}, which ASDL has no operation for; {NATIVE_INSTEAD}."
            )
        if module._is_full_backward_hook:
            raise UnsupportedParameterError(
                f"{own[0]!r} belongs to a {kind} with a full backward hook, beside which ASDL can register none of its own; remove the "
                'hook, or choose backend="native".'
            )
        owners[module_name] = module
    return owners


@contextmanager
def _operations(
    model: nn.Module, owners: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter], examples: Examples
) -> Iterator[list[_KeepOperation]]:
    """Register an operation for each owner in ASDL's context, and ASDL's hooks where ASDL provides none."""
    hooked = [module for _, module in named_supported_modules(model)]
    ignored = [module for module in hooked if not any(module is owner for owner in owners.values())]
    handles, operations = [], []
    run_by_asdl: Any = extend(model, asdl.OP_SAVE_INPUTS, asdl.OP_SAVE_OUTGRADS, ignore_modules=ignored)
    with run_by_asdl as context:
        try:
            for name, module in owners.items():
                operations.append(_KeepOperation(name, module, parameters, examples))
                context.register_operation(module, operations[-1])
                handles.append(module.register_forward_pre_hook(operations[-1].forward_pre_process))
                handles.append(module.register_forward_hook(_without_view, prepend=True))
                if not any(module is other for other in hooked):
                    handles.append(module.register_forward_hook(partial(_call_operation, context)))
            yield operations
        finally:
            for handle in handles:
                handle.remove()


def _without_view(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    """An output that a later in-place call may modify: on a view, such as a Linear returns, the gradient would bypass ASDL's hooks."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def _call_operation(
    context: asdl.OperationContext, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor
) -> None:
    """What ASDL's own hooks do, for a module for which it provides none."""
    context.call_operations_in_forward(module, arguments[0].detach(), output.detach())
    assert output.grad_fn is not None
    place = output.output_nr
    output.grad_fn.register_prehook(lambda grads: context.call_operations_in_backward(module, grads[place].detach()))


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Restore the marks that ASDL leaves on modules and parameters."""
    mark = "_original_requires_grad"
    flags = [(module, module._is_full_backward_hook) for module in model.modules()]
    marks = [(p, vars(p).get(mark)) for p in model.parameters()]
    try:
        yield
    finally:
        for module, flag in flags:
            module._is_full_backward_hook = flag
        for parameter, value in marks:
            if value is not None:
                setattr(parameter, mark, value)
            elif hasattr(parameter, mark):
                delattr(parameter, mark)
