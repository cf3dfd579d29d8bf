"""The BackPACK backend: gradients at the outputs of modules through BackPACK's backward pass, all columns at once.

BackPACK's own K-FAC quantities are neither expand nor reduce, have no rule for branches, and cover only a handful of layers. Here our
own extension carries columns of output space through BackPACK's hooks: by BackPACK's derivatives where they apply, else along the autograd
graph of that one module. What arrives at a module with parameters is passed on as it is, so factors and scales are those of every backend.

BackPACK's hooks need an ordinary backward pass to fire. It carries the first column, so that K columns cost K passes, and stops at the
outputs of the first modules, so that no weight gradient is computed.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from backpack import backpack, disable, extend, memory_cleanup
from backpack.context import CTX
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor, nn

from laplace_ws.curvature.backend import Backend, Linearisation
from laplace_ws.curvature.backpack_graph import Apply, Autocast, Chain, Expression, look_up
from laplace_ws.curvature.backpack_rules import (
    derivatives_of,
    stored_inputs,
    stored_output,
    transposed_jacobian_products,
)
from laplace_ws.curvature.backpack_structure import model_state
from laplace_ws.curvature.backpack_trace import convert
from laplace_ws.curvature.calls import Call, UnreadableCallError, read_call
from laplace_ws.curvature.checks import check_covered
from laplace_ws.curvature.graph_inputs import GraphInputs
from laplace_ws.curvature.inputs import ModelInputs, StructuredInputs, check_outputs, examples_of, running
from laplace_ws.curvature.module_readers import NATIVE_INSTEAD, module_uses
from laplace_ws.curvature.operands import Operand
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac.examples import Examples, row_examples
from laplace_ws.kfac.uses import Use
from laplace_ws.threads import alone_in_libraries

COLUMN_BYTES = 2**28
"""Memory that the columns of one pullback may take, at the outputs of all modules together."""


class BackpackBackend(Backend):
    """Covers what a traced forward pass shows: modules of `MODULE_CALLS` and calls that `calls` can read, as the native backend does.

    Works on a copy of the model's structure that shares its parameters and buffers, so the model itself gets no hooks and no marks.
    Forward passes that `torch.fx` cannot trace, for example with control flow that depends on data, are not covered.
    """

    name = "backpack"

    def __init__(self) -> None:
        self._cached: _Converted | None = None

    def forget(self) -> None:
        """See `Backend.forget`: a trace does not notice every change of a model."""
        self._cached = None

    def __reduce__(self) -> tuple[type[BackpackBackend], tuple[()]]:
        return type(self), ()  # the cache belongs to a model in memory

    @contextmanager
    def linearise(
        self, model: nn.Module, x: ModelInputs, parameters: Mapping[str, nn.Parameter]
    ) -> Iterator[BackpackLinearisation]:
        """See `Backend.linearise`."""
        with alone_in_libraries():
            yield from self._linearise(model, x, parameters)

    def _linearise(
        self, model: nn.Module, x: ModelInputs, parameters: Mapping[str, nn.Parameter]
    ) -> Iterator[BackpackLinearisation]:
        converted, self._cached = self._cached, None  # a second linearisation inside the first needs modules of its own
        n_arguments = len(x.arguments) if isinstance(x, StructuredInputs) else 1
        if converted is None or not converted.is_of(model, n_arguments):
            converted = _Converted.make(model, n_arguments)
        try:
            with running(model, x), _storing():
                f, live = converted.chain.run(_of_chain(x))
            yield BackpackLinearisation(check_outputs(f, len(x)), live, parameters, examples_of(x))
        finally:
            converted.forget_batch()
            self._cached = converted


def _of_chain(x: ModelInputs) -> Any:
    """The input of the chain: the one argument of the model, or all of them."""
    if isinstance(x, StructuredInputs):
        return x.arguments[0] if len(x.arguments) == 1 else x.arguments
    if isinstance(x, GraphInputs):
        return x.batch
    return x.detach() if isinstance(x, Tensor) else x


class BackpackLinearisation(Linearisation):
    """Outputs of one forward pass through modules that BackPACK has extended."""

    def __init__(
        self,
        f: Tensor,
        live: Sequence[tuple[nn.Module, Tensor | None]],
        parameters: Mapping[str, nn.Parameter],
        examples: Examples,
    ):
        self.outputs: Tensor = f.detach()
        self._f = f
        self._leaves = [leaf for leaf, _ in live]
        # where no gradient goes further back: the backward pass may stop there
        self._ends = [
            stored_output(leaf) for leaf in self._leaves if not any(t.requires_grad for t in stored_inputs(leaf))
        ]
        pairs = []
        for leaf, rows in live:
            with row_examples(rows):
                pairs += [(use, leaf) for use in _uses(leaf, parameters, examples)]
        self.uses: Sequence[Use] = [use for use, _ in pairs]
        self._users = [leaf for _, leaf in pairs]
        check_covered(self.uses, parameters)
        n_bytes = sum(stored_output(leaf).nbytes for leaf in self._leaves)
        self.columns_at_once: int = max(1, COLUMN_BYTES // max(1, n_bytes))

    def pullback(self, columns: Tensor) -> list[Tensor]:
        """See `Linearisation.pullback`."""
        extension = _Columns(self._leaves, self._users, self._f, columns[1:])
        if self._f.requires_grad:
            with backpack(extension, retain_graph=True), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                torch.autograd.grad(self._f, self._ends, columns[0], retain_graph=True, allow_unused=True)
        return [
            # a use that never reaches f has no gradient: zero
            g if g is not None else columns.new_zeros(len(columns), *stored_output(leaf).shape)
            for leaf, g in ((leaf, extension.gradients.get(id(leaf))) for leaf in self._users)
        ]


class _Columns(BackpropExtension):
    """Carries columns of output space back to the outputs of modules.

    Attributes:
        gradients: the columns that arrived at the output of each user, `[K, B, ...]`, by `id` of the module.
        n_columns: K − 1.
    """

    def __init__(self, leaves: Sequence[nn.Module], users: Sequence[nn.Module], f: Tensor, columns: Tensor):
        super().__init__("laplace_ws_columns", {type(leaf): _Propagate() for leaf in leaves})
        self.gradients: dict[int, Tensor] = {}
        self._users = {id(user) for user in users}
        self.n_columns = len(columns)  # in addition to the one that the ordinary backward pass carries
        if self.n_columns:
            self.save(f, columns)

    def expects_backpropagation_quantities(self) -> bool:
        """Called by BackPACK: whether there is more to carry than in an ordinary backward pass."""
        return self.n_columns > 0

    def accumulate_backpropagated_quantities(self, existing: Tensor, other: Tensor | None) -> Tensor:
        """Called by BackPACK where branches meet."""
        return existing if other is None else existing + other

    def save(self, tensor: Tensor, columns: Tensor) -> None:
        """Add columns to those at a tensor."""
        self.saved_quantities.save_quantity(tensor.data_ptr(), columns, self.accumulate_backpropagated_quantities)

    def keep(self, module: nn.Module, gradient: Tensor) -> None:
        """Store what arrives at the output of a module with parameters, given the gradient of the ordinary backward pass."""
        if id(module) in self._users:
            rest = self.saved_quantities.retrieve_quantity(stored_output(module).data_ptr(), delete_old=False)
            self.gradients[id(module)] = gradient[None] if rest is None else torch.cat([gradient[None], rest])


class _Propagate(ModuleExtension):
    """Takes columns from the output of a module to each of its inputs."""

    def __call__(self, extension: Any, module: nn.Module, g_inp: Any, g_out: Any) -> None:
        """Called by BackPACK's hook when the backward pass has reached the module."""
        if not stored_output(module).numel():  # an empty tensor has no address of its own
            extension.saved_quantities.retrieve_quantity(stored_output(module).data_ptr(), delete_old=True)
            extension.save(
                stored_output(module),
                stored_output(module).new_zeros(extension.n_columns, *stored_output(module).shape),
            )
        extension.keep(module, g_out[0] if g_out[0] is not None else torch.zeros_like(stored_output(module)))
        super().__call__(extension, module, g_inp, g_out)

    def backpropagate(self, extension: Any, module: nn.Module, g_inp: Any, g_out: Any, bpQuantities: Tensor) -> None:
        """Saves the columns at the inputs itself, since BackPACK would assign the same columns to all inputs."""
        inputs = [t for t in stored_inputs(module) if t.requires_grad]
        for tensor, columns in zip(inputs, transposed_jacobian_products(module, inputs, bpQuantities), strict=True):
            if tensor.numel():
                extension.save(tensor, columns)


# ------------------------------------------------------------------ modules under BackPACK


@contextmanager
def _storing() -> Iterator[None]:
    """Have BackPACK store inputs and outputs, even within its `disable`."""
    before, disable.store_io = disable.store_io, True
    try:
        yield
    finally:
        disable.store_io = before


@torch.no_grad()
def _uses(leaf: nn.Module, parameters: Mapping[str, nn.Parameter], examples: Examples) -> list[Use]:
    """Uses that a module of the chain makes of the parameters."""
    names = {id(p): name for name, p in parameters.items()}
    held = leaf.expression.held() if isinstance(leaf, Apply) else list(leaf.parameters())
    operands = {id(p): Operand(names[id(p)], p, p) for p in held if id(p) in names}
    if not operands:
        return []
    name, parameter = next((operand.name, operand.tensor) for operand in operands.values())
    call = type(leaf).__name__
    try:
        if not isinstance(leaf, Apply):
            uses = module_uses(leaf, stored_inputs(leaf)[0].detach(), stored_output(leaf), parameters, examples)
            if {n for use in uses for n in use.parameters} != {operand.name for operand in operands.values()}:
                raise UnreadableCallError("as more than the weight or the bias of the module")
            return uses
        reader = leaf.expression.reader(parameter)
        call = reader.name
        args, kwargs = leaf.expression.arguments(leaf.values(stored_inputs(leaf)), _following(operands))
        return read_call(
            leaf.expression.torch_function, Call(call, operands, stored_output(leaf), examples), *args, **kwargs
        )
    except UnreadableCallError as error:
        raise UnsupportedParameterError(f"{name!r} is used by {call}, {error}; {NATIVE_INSTEAD}.") from None


def _following(operands: dict[int, Operand]) -> Callable[[Expression, dict[str, Any]], Any]:
    """Evaluate the expressions in an argument, and follow parameters through transposes and selections."""

    def evaluate(expression: Expression, values: dict[str, Any]) -> Any:
        args, kwargs = expression.arguments(values, evaluate)
        result, function = expression.function(*args, **kwargs), expression.torch_function
        operand = operands.get(id(args[0]))
        if operand is None:
            return result
        is_look_up = function is look_up
        parts = operand.after(torch.Tensor.__getitem__ if is_look_up else function, result, *args[1:], **kwargs)
        if len(parts) != 1:
            raise UnreadableCallError("as a part or a view of itself")
        operands[id(result)] = replace(parts[0], looked_up=is_look_up or operand.looked_up)
        return result

    return evaluate


# ------------------------------------------------------------------ the converted model, kept between batches


def _returns_one_tensor_that_backpack_follows(module: nn.Module) -> bool:
    return derivatives_of(module) is not None and not getattr(module, "return_indices", False)


def _state(model: nn.Module) -> list[Any]:
    """What a chain depends on: the structure of the model, and the autocast that it is run under."""
    return [Autocast.current(next(model.parameters()).device.type), *model_state(model)]


@dataclass(frozen=True, eq=False)
class _Converted:
    """A chain, the state of the model that it was made from, and the number of arguments that the model was called with."""

    model: weakref.ref[nn.Module]
    n_arguments: int
    state: list[Any]
    chain: Chain

    @classmethod
    def make(cls, model: nn.Module, n_arguments: int) -> _Converted:
        """Convert a model and extend each of its leaf modules."""
        chain = convert(model, keeps=_returns_one_tensor_that_backpack_follows, n_arguments=n_arguments)
        n_handles = len(CTX.hook_handles)
        for step in chain.steps:
            extend(step.leaf)
        del CTX.hook_handles[n_handles:]  # the hooks live as long as the modules, which belong to us alone
        return cls(weakref.ref(model), n_arguments, _state(model), chain)

    def forget_batch(self) -> None:
        """Drop what the modules store from a forward pass."""
        for step in self.chain.steps:
            memory_cleanup(step.leaf)
            if isinstance(step.leaf, Apply):
                step.leaf.others = {}

    def is_of(self, model: nn.Module, n_arguments: int) -> bool:
        """Whether the model is the one that was converted, unchanged since, and called in the same way."""
        return self.model() is model and self.n_arguments == n_arguments and _state(model) == self.state
