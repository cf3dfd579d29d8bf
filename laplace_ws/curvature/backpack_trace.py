"""Traces a model into a chain of leaf modules.

Every torch call in the forward pass becomes a module: activations, sums, products, means, views, attention. BackPACK's own converter is
not used: it refuses products of tensors, leaves activations, means and broadcasts between the modules, and writes into the model.
"""

from __future__ import annotations

import builtins
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg

from laplace_ws.curvature.backpack_graph import Apply, Autocast, Chain, Expression, Method, Slot, Step, look_up
from laplace_ws.curvature.backpack_structure import copy_structure, model_hooks
from laplace_ws.curvature.calls import READERS
from laplace_ws.curvature.module_readers import module_call
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac.examples import declared_row_examples, row_examples

_FIELDS = {"values", "indices"}  # of the results of max, sort and the like
_TENSOR_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag", *_FIELDS}
_SIZES = {"size", "shape", "dim", "ndim", "numel", "len", "stride", "device", "dtype", "is_floating_point"}
_SPLITS = {"chunk", "split", "unbind", "tensor_split", "split_with_sizes", "broadcast_tensors"}
_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")
_IN_PLACE_OPERATORS = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")
}


class _Root(nn.Module):
    """Calls the model with its inputs alone, so that further arguments take their defaults; several come as one tuple."""

    def __init__(self, model: nn.Module, n_arguments: int):
        super().__init__()
        self.model, self._n_arguments = model, n_arguments

    def forward(self, x: Any) -> Any:
        return self.model(x) if self._n_arguments == 1 else self.model(*(x[i] for i in range(self._n_arguments)))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, originals: Mapping[int, nn.Module], opaque: bool) -> None:
        super().__init__(param_shapes_constant=True)
        self._originals, self._opaque = originals, opaque
        self._outside = Autocast.current(_device_type(originals))
        self._thread = get_ident()  # while a trace goes on, all threads call their modules through it

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._opaque and not isinstance(m, nn.Sequential) and next(m.parameters(), None) is None:
            return True
        return module_call(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        rows = declared_row_examples.get()
        if isinstance(rows, fx.Proxy):
            with row_examples(
                None
            ):  # an attribute of a proxy becomes a node when it is first accessed: now, before its use
                _ = rows.node
        proxy = super().create_proxy(*args, **kwargs)
        proxy.node.meta["row_examples"] = rows
        inside = Autocast.current(self._outside.device_type)
        proxy.node.meta["autocast"] = None if inside == self._outside else inside
        return proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if get_ident() != self._thread:
            return forward(*args, **kwargs)
        original = self._originals.get(id(m), m)
        if original._forward_hooks_with_kwargs or original._forward_pre_hooks_with_kwargs:
            raise NotImplementedError(f"{type(m).__name__} has a forward hook that takes keyword arguments")
        for hook in original._forward_pre_hooks.values():
            if len(args) != 1:
                raise NotImplementedError(f"{type(m).__name__} has a forward pre-hook and more than one input")
            args = (self._call(partial(_run_pre_hook, hook, original), *args),)
        with _recorded_len(type(m).forward):
            output = super().call_module(m, forward, args, kwargs)
        for hook in model_hooks(original):
            output = self._call(partial(_run_hook, hook, original), output, *args)
        return output

    def _call(self, function: partial[Any], *args: Any) -> fx.Proxy:
        return self.create_proxy("call_function", _named(function, "hook"), args, {})


def _device_type(originals: Mapping[int, nn.Module]) -> str:
    """The type of device that a model is on."""
    return next(p for module in originals.values() for p in module.parameters()).device.type


def _run_hook(hook: Callable[..., Any], module: nn.Module, output: Any, *args: Any) -> Any:
    changed = hook(module, args, output)
    return output if changed is None else changed


def _run_pre_hook(hook: Callable[..., Any], module: nn.Module, x: Any) -> Any:
    changed = hook(module, (x,))
    return x if changed is None else changed[0] if isinstance(changed, tuple) else changed


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__name__ = name
    return call


@contextmanager
def _recorded_len(function: Callable[..., Any]) -> Iterator[None]:
    """Let `len(x)` in a function be recorded; Python itself requires it to return a number at once."""
    names = getattr(inspect.unwrap(function), "__globals__", {})
    was_set, before = "len" in names, names.get("len", builtins.len)

    def recorded(x: Any) -> Any:
        return x.tracer.create_proxy("call_function", builtins.len, (x,), {}) if isinstance(x, fx.Proxy) else before(x)

    names["len"] = recorded
    try:
        yield
    finally:
        if was_set:
            names["len"] = before
        else:
            del names["len"]


@contextmanager
def _recorded_calls(own_type: str) -> Iterator[None]:
    """Record calls that a trace would not see: tensors created to a size, and custom autograd functions, whose backward would be lost.

    `torch.autocast(x.device.type)` is told the type, since it asks for it at once.
    """
    factories = {name: getattr(torch, name) for name in _FACTORIES}
    apply, init = torch.autograd.Function.__dict__["apply"], torch.autocast.__init__

    def recorded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found: list[fx.Proxy] = []
        map_aggregate((args, kwargs), lambda a: found.append(a) if isinstance(a, fx.Proxy) else None)
        if not found:
            return function(*args, **kwargs)
        return found[0].tracer.create_proxy("call_function", function, args, kwargs)

    def recorded_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        return recorded(_named(apply.__get__(None, cls), cls.__name__), *args, **kwargs)

    def told_init(self: torch.autocast, device_type: Any, *args: Any, **kwargs: Any) -> None:
        init(self, own_type if isinstance(device_type, fx.Proxy) else device_type, *args, **kwargs)

    try:
        torch.autocast.__init__ = told_init  # type: ignore[method-assign]
        for name, function in factories.items():
            setattr(torch, name, partial(recorded, function))
        torch.autograd.Function.apply = classmethod(recorded_apply)  # type: ignore[method-assign, assignment]
        yield
    finally:
        torch.autocast.__init__ = init  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply
        for name, function in factories.items():
            setattr(torch, name, function)


def convert(model: nn.Module, keeps: Callable[[nn.Module], bool], n_arguments: int = 1) -> Chain:
    """Trace a model into a chain of leaf modules that share its parameters and buffers; the model itself is not touched.

    Args:
        model: the network.
        keeps: whether a module without parameters stays as it is where it is called, instead of becoming an `Apply`.
        n_arguments: how many inputs the model is called with; if several, the chain's input is their tuple.

    Raises:
        UnsupportedParameterError: the forward pass cannot be traced.
    """
    copies: dict[int, Any] = {}
    try:
        root = _Root(copy_structure(model, copies), n_arguments)
        originals = {id(copies[id(module)]): module for module in model.modules()}
        return _Builder(root, keeps).build(_trace(root, originals))
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise UnsupportedParameterError(
            f"{type(model).__name__} cannot be traced for BackPACK ({type(error).__name__}: {reason}); take control flow that depends on "
            'data or on shapes (if, assert, range) out of its forward pass, or choose backend="native".'
        ) from error


def _trace(root: nn.Module, originals: Mapping[int, nn.Module]) -> fx.Graph:
    """Graph of a model; where a first attempt fails, modules without parameters are not traced into."""
    with _recorded_calls(_device_type(originals)):
        try:
            return _Tracer(originals, opaque=False).trace(root)
        except Exception as error:
            with suppress(Exception):
                return _Tracer(originals, opaque=True).trace(root)
            raise error  # the first error says more


class _Builder:
    """Turns the nodes of a traced graph into steps."""

    def __init__(self, root: nn.Module, keeps: Callable[[nn.Module], bool]):
        self._root, self._keeps = root, keeps
        self._steps: list[Step] = []
        self._inlined: dict[fx.Node, Any] = {}  # tensors of the model, and expressions placed in their consumers
        self._of_data: set[fx.Node] = set()  # what depends on the values of the input, not on its size alone
        self._overwritten: dict[fx.Node, fx.Node] = {}  # by the in-place call that holds the value from then on

    def build(self, graph: fx.Graph) -> Chain:
        """The chain of a graph."""
        source, output = "", None
        for node in graph.nodes:
            if node.op == "placeholder":
                source = node.name
                self._of_data.add(node)
            elif node.op == "get_attr":
                self._inlined[node] = operator.attrgetter(node.target)(self._root)
            elif node.op == "output":
                output = self._template(node.args[0])
            elif (
                node.users or node.target is not operator.getitem
            ):  # not what is unpacked and then ignored, as attention's weights are
                self._add(node)
        return Chain(source, self._steps, output)

    def _template(self, arguments: Any) -> Any:
        """Arguments with slots, tensors and expressions in place of nodes."""

        def place(node: fx.Node) -> Any:
            while node in self._overwritten:
                node = self._overwritten[node]
            return self._inlined.get(node, Slot(node.name))

        return map_arg(arguments, place)

    def _add(self, node: fx.Node) -> None:
        args, kwargs = self._template(tuple(node.args)), self._template(dict(node.kwargs))
        is_of_data = any(source in self._of_data for source in node.all_input_nodes)
        if is_of_data:
            self._of_data.add(node)
        function: Callable[..., Any]
        if node.op == "call_module":
            module = copy_structure(self._root.get_submodule(str(node.target)))
            in_place = getattr(module, "inplace", False)
            if in_place:
                module.inplace = False
            function = module.forward
            if module_call(module) is not None or self._keeps(module):
                args, kwargs = inspect.signature(function).bind(*args, **kwargs).args, {}
                of_positions = isinstance(module, nn.Embedding) and not is_of_data
                if of_positions and module.padding_idx is None and module.max_norm is None:
                    function, args = look_up, (module.weight, *args)
                elif isinstance(args[0], Slot):
                    step = Step(node.name, module, (args[0].name,), self._rows(node), autocast=node.meta["autocast"])
                    self._append(step, node, in_place)
                    return
        else:
            function = Method(str(node.target)) if node.op == "call_method" else node.target  # type: ignore[assignment]
            function, args, kwargs, in_place = _out_of_place(function, args, kwargs)
            if function is F.embedding and not is_of_data and len(args) == 2 and not any(kwargs.values()):
                function, args, kwargs = look_up, args[::-1], {}
        expression = Expression(function, args, kwargs)
        if _is_size(expression):
            self._of_data.discard(node)
        if _is_inlined(node, expression):
            self._inlined[node] = expression
            return
        leaf = Apply(expression)
        rows, is_query = self._rows(node), _is_query(expression)
        self._append(Step(node.name, leaf, leaf.slots, rows, is_query, node.meta["autocast"]), node, in_place)

    def _rows(self, node: fx.Node) -> Any:
        rows = node.meta["row_examples"]
        return self._template(rows.node) if isinstance(rows, fx.Proxy) else rows

    def _append(self, step: Step, node: fx.Node, in_place: bool) -> None:
        self._steps.append(step)
        target = node.args[0] if node.args else None
        if in_place and isinstance(target, fx.Node):
            while target in self._overwritten:
                target = self._overwritten[target]
            self._overwritten[target] = node


def _is_inlined(node: fx.Node, expression: Expression) -> bool:
    """Whether an expression is inlined into its consumers: a part of a parameter, or several tensors of which each consumer takes one."""
    if expression.follows or expression.name in _SPLITS:
        return True
    taken = [
        (user.target is operator.getitem and type(user.args[1]) is int)
        or (user.target is getattr and user.args[1] in _FIELDS)
        for user in node.users
    ]
    return bool(taken) and all(taken) and expression.torch_function not in READERS and not _is_query(expression)


def _is_query(expression: Expression) -> bool:
    """Whether a call returns something that is not a tensor, or a tensor without a gradient."""
    if expression.function is getattr:
        return expression.args[1] not in _TENSOR_ATTRIBUTES
    return _is_size(expression)


def _is_size(expression: Expression) -> bool:
    return expression.name in _SIZES or (expression.function is getattr and expression.args[1] in _SIZES)


def _out_of_place(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], bool]:
    """The call that computes what an in-place call does, and whether it was one."""
    name = function.name if isinstance(function, Method) else getattr(function, "__name__", "")
    if function in _IN_PLACE_OPERATORS:
        return _IN_PLACE_OPERATORS[function], args, kwargs, True
    if name.endswith("_") and not name.endswith("__") and getattr(operator, name, None) is not function:
        homes = (torch.Tensor,) if isinstance(function, Method) else (torch, F, torch.special)
        plain = next((getattr(home, name[:-1]) for home in homes if callable(getattr(home, name[:-1], None))), None)
        if plain is None:
            raise NotImplementedError(f"the in-place call {name!r} has no out-of-place form")
        return (Method(name[:-1]) if isinstance(function, Method) else plain), args, kwargs, True
    if inspect.isfunction(function) and "inplace" in inspect.signature(function).parameters:
        bound = inspect.signature(function).bind(*args, **kwargs)
        if bound.arguments.get("inplace"):
            bound.arguments["inplace"] = False
            return function, bound.args, bound.kwargs, True
    return function, args, kwargs, False
