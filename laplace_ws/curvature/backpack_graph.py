"""A model as a chain of leaf modules, the form in which BackPACK can follow a backward pass.

BackPACK hooks modules, so whatever lies between two modules must itself be one: `Apply` turns a torch call with any number of inputs into a
module. `backpack_trace` builds the chain of a model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.fx.node import map_aggregate

from laplace_ws.curvature.operands import SELECTIONS
from laplace_ws.errors import UnsupportedParameterError

_TORCH_FUNCTIONS = {
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.matmul: torch.matmul,
    operator.getitem: torch.Tensor.__getitem__,
}


@dataclass(frozen=True)
class Slot:
    """An argument that an earlier step of the chain computes."""

    name: str


@dataclass(frozen=True)
class Method:
    """A call of a method by its name."""

    name: str

    def __call__(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the method of `owner`."""
        return getattr(owner, self.name)(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Expression:
    """A call whose arguments are constants, tensors that the model holds, slots, and further expressions."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def torch_function(self) -> Callable[..., Any]:
        """The function as torch reports it to a function mode."""
        if isinstance(self.function, Method):
            return getattr(torch.Tensor, self.function.name, self.function)
        if self.function is getattr and isinstance(self.args[1], str):
            attribute = getattr(torch.Tensor, self.args[1], None)
            return attribute.__get__ if attribute is not None and hasattr(attribute, "__get__") else self.function
        return _TORCH_FUNCTIONS.get(self.function, self.function)

    @property
    def module(self) -> nn.Module | None:
        """The module, where the function is the forward pass of one."""
        owner = getattr(self.function, "__self__", None)
        return owner if isinstance(owner, nn.Module) else None

    @property
    def name(self) -> str:
        """Name for messages."""
        if isinstance(self.function, Method):
            return self.function.name
        if self.module is not None:
            return type(self.module).__name__
        return getattr(self.torch_function, "__name__", str(self.function))

    def leaves(self) -> Iterator[Any]:
        """Arguments that are not containers, including those of nested expressions."""
        for leaf in self._arguments():
            yield from leaf.leaves() if isinstance(leaf, Expression) else (leaf,)

    def held(self) -> list[Tensor]:
        """Tensors of the model that the expression reads."""
        tensors = []
        for leaf in self._arguments():
            tensors += leaf.held() if isinstance(leaf, Expression) else [leaf] if isinstance(leaf, Tensor) else []
        return tensors if self.module is None else tensors + list(self.module.parameters())

    def reader(self, tensor: Tensor) -> Expression:
        """The nested call that reads a tensor of the model, or an expression that `follows` it."""
        for leaf in self._arguments():
            if isinstance(leaf, Expression) and not leaf.follows and any(t is tensor for t in leaf.held()):
                return leaf.reader(tensor)
        return self

    @property
    def follows(self) -> bool:
        """Whether the expression is a transpose or a selection of entries of a tensor of the model."""
        first = self.args[0] if self.args else None
        if not (isinstance(first, Tensor) or (isinstance(first, Expression) and first.follows)):
            return False
        return self.torch_function in SELECTIONS or self.function is look_up

    def _arguments(self) -> list[Any]:
        """Arguments that are not containers."""
        found: list[Any] = []
        map_aggregate((self.args, self.kwargs), found.append)
        return found

    def arguments(
        self, values: dict[str, Any], inner: Callable[[Expression, dict[str, Any]], Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the call, with slots filled from values and expressions evaluated by `inner`."""

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Slot):
                return values[leaf.name]
            return inner(leaf, values) if isinstance(leaf, Expression) else leaf

        return map_aggregate((self.args, self.kwargs), fill)  # type: ignore[return-value]

    def evaluate(self, values: dict[str, Any]) -> Any:
        """The result of the call."""
        args, kwargs = self.arguments(values, Expression.evaluate)
        return self.function(*args, **kwargs)


def look_up(weight: Float[Tensor, "V O"], indices: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape O"]:
    """Rows of an embedding at indices that do not depend on the data, such as positions."""
    return F.embedding(indices, weight)


# ------------------------------------------------------------------ the chain


class Apply(nn.Module):
    """An expression as a module with its tensors as inputs.

    Its output never shares memory with an input, since BackPACK distinguishes tensors by their address.
    """

    def __init__(self, expression: Expression):
        super().__init__()
        self.expression = expression
        self.slots: tuple[str, ...] = tuple(
            dict.fromkeys(leaf.name for leaf in expression.leaves() if isinstance(leaf, Slot))
        )
        self.others: dict[str, Any] = {}  # in the current call, the values of slots that are not tensors

    def values(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The value of each slot, given its tensors."""
        remaining = iter(tensors)
        return {name: self.others[name] if name in self.others else next(remaining) for name in self.slots}

    def forward(self, *tensors: Tensor) -> Tensor:
        """Evaluate the expression."""
        output = self.evaluate(*tensors)
        if not isinstance(output, Tensor):
            raise UnsupportedParameterError(
                f"{self.expression.name} returns a {type(output).__name__}, which BackPACK cannot follow; index it where it is "
                'called, or choose backend="native".'
            )
        addresses = {t.untyped_storage().data_ptr() for t in (*tensors, *self.expression.held())}
        return output.clone() if output.untyped_storage().data_ptr() in addresses else output

    def evaluate(self, *tensors: Tensor) -> Any:
        """The result of the expression, of any kind."""
        return self.expression.evaluate(self.values(tensors))


@dataclass(frozen=True)
class Autocast:
    """Whether and to what torch converts the arguments of calls on a type of device; the type is None where autocast is off."""

    device_type: str
    dtype: torch.dtype | None

    @classmethod
    def current(cls, device_type: str) -> Autocast:
        """What holds in this thread at present."""
        is_on = torch.is_autocast_enabled(device_type)
        return cls(device_type, torch.get_autocast_dtype(device_type) if is_on else None)

    def active(self) -> torch.autocast:
        """A context in which it holds."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)


@dataclass(frozen=True, eq=False)
class Step:
    """One leaf module of the chain.

    Attributes:
        name: slot of its output.
        leaf: the module, a separate copy for every call in the forward pass.
        slots: slots of its inputs.
        row_examples: example of each row, where the model declares it with `kfac.examples.row_examples`; a slot or a tensor.
        is_query: whether it queries a shape or the like and returns no tensor.
        autocast: what the model itself sets for this call; None where it leaves autocast as it finds it.
    """

    name: str
    leaf: nn.Module
    slots: tuple[str, ...]
    row_examples: Any = None
    is_query: bool = False
    autocast: Autocast | None = None

    def held(self) -> list[Tensor]:
        """Tensors of the model that the leaf reads."""
        return self.leaf.expression.held() if isinstance(self.leaf, Apply) else list(self.leaf.parameters())

    def run(self, values: dict[str, Any]) -> tuple[Any, bool]:
        """The output, and whether a gradient can flow through it, in which case the module's hooks were run."""
        with nullcontext() if self.autocast is None else self.autocast.active():
            return self._run(values)

    def _run(self, values: dict[str, Any]) -> tuple[Any, bool]:
        inputs = {name: values[name] for name in self.slots}
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        if isinstance(self.leaf, Apply):
            self.leaf.others = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
        if self.is_query or not any(t.requires_grad for t in (*tensors, *self.held())):
            return (self.leaf.evaluate if isinstance(self.leaf, Apply) else self.leaf.forward)(*tensors), False
        output = self.leaf(*tensors)
        return output, output.requires_grad


@dataclass(frozen=True, eq=False)
class Chain:
    """A model as steps, each a leaf module.

    Attributes:
        input: slot of the model's input.
        steps: in the order of the forward pass.
        output: what the model returns, with slots for what the steps compute.
    """

    input: str
    steps: Sequence[Step]
    output: Any

    def run(self, x: Any) -> tuple[Any, list[tuple[nn.Module, Tensor | None]]]:
        """The model's output, and the leaves through which a gradient flows, each with the example of each row where declared."""
        values = {self.input: x}
        live = []

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Slot):
                return values[leaf.name]
            return leaf.evaluate(values) if isinstance(leaf, Expression) else leaf

        for step in self.steps:
            values[step.name], is_live = step.run(values)
            if is_live:
                live.append((step.leaf, fill(step.row_examples)))
        return map_aggregate(self.output, fill), live
